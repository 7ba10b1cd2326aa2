"""Batches against single calls: sessions per second of server CPU, 64 sessions a call, 4,000 tokens each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from bench import ratio, talk, wire
from bench.load import DIGITS
from bench.processes import Load
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

SESSIONS = 64
TURNS = 100
CALLERS, CONNECTIONS = 16, 4
# Fewer at once where a call is 64 of them.
BATCH_CALLERS = 2
NAMES = [f"batched-{number}" for number in range(SESSIONS)]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running_daemon() as running, wire.Client(running.address) as client:
        talk.make_sessions(client, NAMES, TURNS)
        client.settle()
        yield running


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[wire.Client]:
    with wire.Client(daemon.address) as made:
        yield made


def batch_reply(client: wire.Client, path: str, request: bytes) -> bytes:
    """The reply; skips where this build does not serve batches."""
    try:
        return client.raw(path)(request)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
            raise
        pytest.skip(f"this build does not serve {path.rpartition('/')[2]}")


def per_core(daemon: Daemon, load: Load, path: str, calls: int, sessions: int, *bodies: Any) -> dict[str, float]:
    """Sessions per second of server CPU, and per second."""
    before = wire.cpu_s(daemon.pid)
    answer = load.run(daemon.address, path, calls, *bodies)
    answer["per_core"] = calls * sessions / (wire.cpu_s(daemon.pid) - before)
    answer["per_s"] = calls * sessions / answer["seconds"]
    return answer


def tell(
    ledger: Any, benchmark: Any, case: str, against: str, mine: list[Any], facing: list[Any], promise: str = ""
) -> None:
    for measure, key, about in (("sessions/s of server CPU", "per_core", promise), ("sessions/s", "per_s", "")):
        made = ledger.add(
            case, measure, against, "/s", [answer[key] for answer in mine], [answer[key] for answer in facing], about
        )
        benchmark.extra_info[measure] = made.ratio


def test_batched_resume(benchmark: Any, ledger: Any, size: Any, daemon: Daemon, client: wire.Client) -> None:
    singles = [wire.resume_request(name) for name in NAMES]
    requests = [session_pb2.ResumeSessionRequest.FromString(single) for single in singles]
    batch = session_pb2.BatchResumeSessionsRequest(requests=requests).SerializeToString()
    answer = session_pb2.BatchResumeSessionsResponse.FromString(batch_reply(client, wire.BATCH_RESUME, batch))
    assert len(answer.items) == SESSIONS
    for item, single in zip(answer.items, singles, strict=True):
        alone = session_pb2.ResumeSessionResponse.FromString(client.raw(wire.RESUME)(single))
        assert not item.HasField("error"), item
        assert item.context.receipt.rung == context_pb2.RUNG_HOT
        assert item.context.tokens.total > 2500
        assert [turn.seq for turn in item.context.turns] == [turn.seq for turn in alone.context.turns]
    rounds, batches = size.of(10, 2), size.of(100, 4)
    with Load(BATCH_CALLERS, BATCH_CALLERS) as together, Load(CALLERS, CONNECTIONS) as alone_load:
        mine, facing = ratio.by_blocks(
            benchmark,
            lambda: per_core(daemon, together, wire.BATCH_RESUME, batches, SESSIONS, [batch]),
            lambda: per_core(daemon, alone_load, wire.RESUME, batches * SESSIONS, 1, singles),
            rounds,
        )
    case = f"batched resume, {SESSIONS} sessions a call, 4,000 tokens each"
    tell(ledger, benchmark, case, f"single calls, {CALLERS} callers", mine, facing, "batch")


def test_batched_append(benchmark: Any, ledger: Any, size: Any, daemon: Daemon, client: wire.Client) -> None:
    del daemon
    # Batches of its own sessions: the batch's turn ids would need 64 counters in one body.
    rounds, batches = size.of(8, 2), size.of(30, 3)

    def request(number: int) -> session_pb2.BatchAppendTurnsRequest:
        turn = talk.turn(number)
        turn.turn_id = f"batch-{number:0{DIGITS}d}"
        appends = [session_pb2.AppendTurnRequest(session_id=name, turns=[turn]) for name in NAMES]
        return session_pb2.BatchAppendTurnsRequest(requests=appends)

    first = batch_reply(client, wire.BATCH_APPEND, request(1).SerializeToString())
    items = session_pb2.BatchAppendTurnsResponse.FromString(first).items
    assert len(items) == SESSIONS
    assert all(item.response.outcome == session_pb2.APPEND_OUTCOME_APPENDED for item in items)
    assert all(item.response.durability == turn_pb2.DURABILITY_EDGE for item in items)
    number = 1

    def ours() -> list[float]:
        nonlocal number
        raws = [request(number + 1 + place).SerializeToString() for place in range(batches)]
        number += batches
        call = client.raw(wire.BATCH_APPEND)
        return [wire.timed(call, raw) / SESSIONS for raw in raws]

    def theirs() -> list[float]:
        nonlocal number
        number += 1
        raws = [append.SerializeToString() for append in request(number).requests]
        call = client.raw(wire.APPEND)
        return [wire.timed(call, raw) for raw in raws]

    mine, facing = ratio.by_blocks(benchmark, ours, theirs, rounds)
    made = ledger.add(
        f"batched append EDGE, {SESSIONS} sessions a call, one caller",
        "seconds a session",
        "single calls, one after the other",
        "s",
        [sum(block) / len(block) for block in mine],
        [sum(block) / len(block) for block in facing],
    )
    benchmark.extra_info["ratio"] = made.ratio
