"""Outages of the store as clients see them: what is owned goes on, what is not says when to come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import grpc
import pytest

from sessiond.v1 import admin_pb2, context_pb2, session_pb2
from tests.fault.load import Load
from tests.fault.proxy import Fault, Proxy
from tests.fault.world import CLOUD_ACK, EDGE_ACK, World, answer, completed, faulty, until
from tests.seaweed import Seaweed
from tests.wire import CLOUD, HOT, Refusal, Wire, assistant, refusal, user

CONFIRMED, UNCONFIRMED = context_pb2.OWNERSHIP_CONFIRMED, context_pb2.OWNERSHIP_UNCONFIRMED


def every(fault: Fault) -> Callable[[Proxy], None]:
    """Every request fails so."""

    def begin(proxy: Proxy) -> None:
        proxy.rule = lambda _: fault

    return begin


OUTAGES: dict[str, Callable[[Proxy], None]] = {
    "down": Proxy.down,
    "silent": Proxy.black_hole,
    "throttling": every(Fault("503")),
    "failing": every(Fault("500")),
    "credentials expired": every(Fault("403")),
}


@contextmanager
def two_sessions(world: World) -> Iterator[Wire]:
    """`owned` is hot here; `cold` is in the cloud tier only, and nobody's."""
    wire = world.wire()
    for session in ("owned", "cold"):
        wire.create(session)
        wire.append(session, user("t1", "hello"), assistant("t2", "yes?"))
    wire.close()
    assert world.daemon.terminate() == 0
    world.daemon.lose_hot_tier()
    world.daemon.restart()
    with closing(world.wire()) as wire:
        wire.append("owned", user("t3", "there you are"))
        assert wire.resume("owned").receipt.rung == HOT
        yield wire


@pytest.mark.parametrize("outage", OUTAGES)
def test_through_an_outage_owned_sessions_go_on_and_others_are_told_to_wait(seaweed: Seaweed, outage: str) -> None:
    with faulty(seaweed, lease_ms=1000) as world, two_sessions(world) as wire:
        assert wire.append("owned", assistant("t4", "so I am")).ownership == CONFIRMED
        OUTAGES[outage](world.proxy)
        assert wire.append("owned", user("t5", "and now?")).durability == EDGE_ACK
        until(lambda: not world.status(wire).cloud.lease_valid, "the lease has run out")
        late = wire.append("owned", assistant("t6", "still here"))
        assert (late.ownership, late.head.seq) == (UNCONFIRMED, 6)
        context = wire.resume("owned")
        assert (context.receipt.rung, context.receipt.ownership) == (HOT, UNCONFIRMED)
        assert [turn.turn_id for turn in context.turns] == [f"t{n}" for n in range(1, 7)]
        assert len(list(wire.turns("owned"))) == 6

        uncommitted = refusal(wire.append, "owned", user("t7", "for good"), durability=CLOUD_ACK)
        assert (uncommitted.code.name, uncommitted.reason) == ("UNAVAILABLE", "CLOUD_NOT_COMMITTED")
        assert uncommitted.retry_ms > 0
        assert (uncommitted.metadata["seq"], uncommitted.metadata["durability"]) == ("7", "DURABILITY_EDGE")

        # Neither what is not owned nor what never was is called absent: nobody can know.
        calls: dict[str, Callable[[], object]] = {
            "resume": lambda: wire.resume("cold"),
            "append": lambda: wire.append("cold", user("t3", "x")),
            "get": lambda: wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id="cold"), timeout=30),
            "turns": lambda: list(wire.turns("cold")),
            "resume of what never was": lambda: wire.resume("never"),
            "create": lambda: wire.create("new"),
        }
        for name, call in calls.items():
            told = answer(call)
            assert isinstance(told, Refusal), name
            assert told.code is grpc.StatusCode.UNAVAILABLE, f"{name}: {told.code} {told.reason}"
            assert told.retry_ms > 0, f"{name}: {told.reason} without a delay"
        cloud = world.status(wire).cloud
        assert not cloud.reachable
        assert cloud.last_error

        world.proxy.heal()
        until(lambda: world.status(wire).cloud.lease_valid, "the lease is renewed")
        done = completed(lambda: wire.append("owned", user("t7", "for good"), durability=CLOUD_ACK))
        assert (done.durability, done.turns[0].position.seq, done.cloud_seq) == (CLOUD_ACK, 7, 7)
        assert (done.turns[0].duplicate, done.ownership) == (True, CONFIRMED)
        assert wire.resume("cold").receipt.rung in (CLOUD, HOT)
        assert wire.append("cold", user("t3", "x")).head.seq == 3
        wire.create("new")
        assert refusal(wire.resume, "never").reason == "SESSION_NOT_FOUND"
        cloud = world.status(wire).cloud
        assert (cloud.reachable, cloud.last_error) == (True, "")
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()


def test_a_deadline_is_kept_while_the_store_is_silent_and_nobody_else_waits(seaweed: Seaweed) -> None:
    # As long as an operator may set it: whoever waits for the store itself waits for ever.
    with faulty(seaweed, store_read_timeout_ms=60_000) as world, two_sessions(world) as wire:
        world.proxy.black_hole()
        # More than there are threads for the store.
        with ThreadPoolExecutor(64) as callers:

            def ask(number: int) -> grpc.StatusCode:
                request = session_pb2.ResumeSessionRequest(
                    session_id=f"cold{number}", context=context_pb2.ContextSpec(budget_tokens=1000)
                )
                with pytest.raises(grpc.RpcError) as refused:
                    wire.sessions.ResumeSession(request, timeout=5)
                code: grpc.StatusCode = refused.value.code()
                return code

            waiting = [callers.submit(ask, number) for number in range(64)]
            request = session_pb2.AppendTurnRequest(
                session_id="owned", turns=[user("t4", "for good")], durability=CLOUD_ACK
            )
            for _ in range(4):
                with pytest.raises(grpc.RpcError) as refused:
                    wire.sessions.AppendTurn(request, timeout=3)
                # On cores that others have, the answer may be late by the little that was kept for its way back.
                if refused.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                    break
            told = Refusal(refused.value)
            assert (told.reason, told.metadata["seq"]) == ("CLOUD_NOT_COMMITTED", "4")
            # Meanwhile, and while the others still wait: the owned session's turns and contexts.
            for number in range(20):
                assert wire.append("owned", assistant(f"u{number}", "quickly")).head.seq == 5 + number
                assert wire.resume("owned").receipt.rung == HOT
            codes = {done.result() for done in waiting}
            assert codes <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
        world.proxy.heal()
        world.daemon.kill()
        world.daemon.restart()
        again = completed(lambda: wire.append("owned", user("t4", "for good"), durability=CLOUD_ACK))
        assert again.turns[0].duplicate
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()


def test_a_store_that_flaps_loses_and_doubles_nothing(seaweed: Seaweed) -> None:
    sessions = [f"s{number}" for number in range(8)]
    with faulty(seaweed, lease_ms=1000) as world, closing(world.wire()) as wire:
        for session in sessions:
            wire.create(session)
            wire.append(session, user("first-1", "hello"), durability=CLOUD_ACK)
        with Load(world.daemon.address, sessions, writers=8, seed=5, cloud_share=0.1) as load:
            for begin in (Proxy.down, Proxy.black_hole, OUTAGES["failing"], Proxy.down, OUTAGES["throttling"]) * 2:
                begin(world.proxy)
                load.wait_for_answers(60)
                world.proxy.heal()
                load.wait_for(60)
            load.end()
            assert {reason for _, reason in load.refused} <= {"CLOUD_NOT_COMMITTED"}, dict(load.refused)
            until(lambda: world.flushed(wire), "nothing is unflushed")
            load.check(wire)
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()


def test_a_slow_store_costs_time_and_nothing_else(seaweed: Seaweed) -> None:
    with faulty(seaweed, store_read_timeout_ms=10_000) as world, two_sessions(world) as wire:
        world.proxy.rule = lambda _: Fault(delay_ms=500)
        assert wire.append("owned", assistant("t4", "so I am")).ownership == CONFIRMED
        done = wire.append("owned", user("t5", "for good"), durability=CLOUD_ACK)
        assert (done.durability, done.ownership) == (CLOUD_ACK, CONFIRMED)
        assert wire.resume("cold").receipt.rung == CLOUD
        wire.create("new")
        assert wire.append("new", user("t1", "hello"), durability=CLOUD_ACK).cloud_seq == 1
        assert not wire.admin.Flush(admin_pb2.FlushRequest()).failed_sessions
        assert world.status(wire).cloud.reachable
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()
