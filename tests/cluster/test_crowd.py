"""Many at once: sessions that are all cold, and clients that all come back."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc

from sessiond.v1 import context_pb2, session_pb2, session_pb2_grpc
from tests.cluster.history import CLOUD_ACK
from tests.cluster.load import append
from tests.cluster.nodes import running_cluster, until
from tests.cluster.tcp import State
from tests.seaweed import Seaweed
from tests.wire import CLOUD, HOT, OPTIONS, Refusal, user

COLD = [f"s{number}" for number in range(150)]
CHANNELS = 20
CALL_S_MAX = 60.0
BACK_S = 0.1


async def resume_all(address: str, sessions: list[str]) -> dict[str, context_pb2.ActiveContext]:
    """One resume of each session, all begun at once over some channels; sent again while the node is not there."""
    channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for _ in range(CHANNELS)]
    stubs = [session_pb2_grpc.SessionServiceStub(channel) for channel in channels]

    async def one(place: int) -> context_pb2.ActiveContext:
        request = session_pb2.ResumeSessionRequest(
            session_id=sessions[place], context=context_pb2.ContextSpec(budget_tokens=1000)
        )
        while True:
            try:
                return (await stubs[place % CHANNELS].ResumeSession(request, timeout=CALL_S_MAX)).context
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise AssertionError(f"{sessions[place]}: {Refusal(error).reason}") from error
                await asyncio.sleep(BACK_S)

    try:
        found = await asyncio.gather(*(one(place) for place in range(len(sessions))))
    finally:
        for channel in channels:
            await channel.close()
    return dict(zip(sessions, found, strict=True))


def test_cold_sessions_resumed_all_at_once_are_fetched_once_each(seaweed: Seaweed) -> None:
    # Fewer readers than sessions: none may hold one while it waits for a store that takes its time.
    with running_cluster(seaweed, 2, flush_interval_ms=1000, readers_max=64) as cluster:
        wire = cluster[0].wire()
        for session in COLD:
            wire.create(session)
            append(wire, session, user("t1", f"the first of {session}"))
        assert cluster[0].terminate() == 0
        assert cluster[1].store is not None
        cluster[1].store.set(State.OPEN, delay_ms=100)
        before = Counter({(row.kind, row.object): row.count for row in cluster[1].status().cloud.objects})
        found = asyncio.run(resume_all(cluster[1].address, COLD))
        until(lambda: cluster[1].status().hot.sessions == len(COLD), "all are claimed")
        asked = Counter({(row.kind, row.object): row.count for row in cluster[1].status().cloud.objects}) - before
        assert {context.receipt.rung for context in found.values()} == {CLOUD}
        assert not any(context.receipt.missing for context in found.values())
        texts = {session: context.turns[0].message.parts[0].text for session, context in found.items()}
        assert texts == {session: f"the first of {session}" for session in COLD}
        assert asked["get", "manifest"] == len(COLD)
        assert {about for kind, about in asked if kind in ("get", "list")} <= {"manifest", "lease"}
        # One claim each, and nothing written twice.
        assert asked["put", "manifest"] == len(COLD)


def test_clients_that_all_come_back_after_a_crash_have_their_contexts_from_the_disk() -> None:
    with running_cluster(size=1, flush_interval_ms=3_600_000) as cluster:
        wire = cluster[0].wire()
        for session in COLD:
            wire.create(session)
            append(wire, session, user("t1", f"the first of {session}"))
            append(wire, session, user("t2", f"not flushed of {session}"))
        append(wire, COLD[0], user("t3", "flushed"), CLOUD_ACK)
        cluster[0].kill()

        async def come_back() -> dict[str, context_pb2.ActiveContext]:
            waiting = asyncio.create_task(resume_all(cluster[0].address, COLD))
            await asyncio.to_thread(cluster[0].start)
            return await waiting

        found = asyncio.run(come_back())
        assert {context.receipt.rung for context in found.values()} == {HOT}
        assert not any(context.receipt.missing for context in found.values())
        for session, context in found.items():
            assert [turn.turn_id for turn in context.turns][:2] == ["t1", "t2"], session
