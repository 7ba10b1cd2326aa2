"""Every write that a session's life depends on, failing in every way before and after it is applied.

One daemon per kind of write, many sessions at once, each with a fault of its own: once, and until it is healed. What
was acknowledged stays, once; CLOUD is said of nothing that the manifest does not have; a refusal says when to try
again, and the same turn_id completes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
import pytest

from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from tests.fault.proxy import AFTER, BEFORE, CUT, PASS, RESET, SILENCE, SWALLOW, Asked, Fault
from tests.fault.world import CLOUD_ACK, EDGE_ACK, World, answer, completed, faulty, hash_of, until
from tests.seaweed import Seaweed
from tests.wire import Refusal, Wire, assistant, user

KINDS = ("500", "503", "409", "412", SILENCE, RESET, SWALLOW, CUT)
# Nobody else wrote, and yet the condition is said not to hold.
LIE = Fault("412", BEFORE)
# More at once would only wait for each other: the daemon flushes four sessions at a time.
CALLERS = 8


@dataclass
class Case:
    """One session, the fault that its write meets, and what its caller was told."""

    session: str
    fault: Fault
    once: bool
    acked: dict[str, tuple[int, int]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    met: int = 0

    def __str__(self) -> str:
        return f"{self.fault} {'once' if self.once else 'until healed'}"

    def append(self, world: World, wire: Wire, durability: int, *turns: turn_pb2.TurnInput) -> bool:
        """Append; whether it was acknowledged. What is said at that moment has to be true at that moment."""
        reply = answer(lambda: wire.append(self.session, *turns, durability=durability))
        if isinstance(reply, Refusal):
            self.refusal(reply)
            return False
        assert isinstance(reply, session_pb2.AppendTurnResponse)
        for turn in reply.turns:
            place = (turn.position.epoch, turn.position.seq)
            assert self.acked.setdefault(turn.turn_id, place) == place, f"{self}: {turn.turn_id} has moved"
        assert reply.durability >= durability, str(self)
        if reply.durability == CLOUD_ACK:
            assert world.manifest(self.session).head >= max(turn.position.seq for turn in reply.turns), str(self)
        return True

    def complete(self, world: World, wire: Wire, durability: int, *turns: turn_pb2.TurnInput) -> None:
        """The same turns again, as often as the refusals ask for it; the store is well."""
        reply = completed(lambda: wire.append(self.session, *turns, durability=durability))
        assert self.append(world, wire, durability, *turns), str(self)
        for turn in reply.turns:
            assert self.acked[turn.turn_id] == (turn.position.epoch, turn.position.seq), str(self)

    def refusal(self, refused: Refusal) -> None:
        """A refusal that a client can act on."""
        assert refused.code is grpc.StatusCode.UNAVAILABLE, f"{self}: {refused.code} {refused.reason}"
        assert refused.retry_ms > 0, f"{self}: {refused.reason} without a delay"
        # One failed request is not the caller's business, unless the store said no without a cause.
        assert not self.once or self.fault == LIE, f"{self}: {refused.reason} {refused.message}"
        self.refused.append(refused.reason)

    def check(self, wire: Wire) -> None:
        """Everything acknowledged is there, once, where it was said to be; nothing else that was not sent."""
        turns = list(wire.turns(self.session))
        assert [turn.seq for turn in turns] == list(range(1, len(turns) + 1)), str(self)
        found = {turn.turn_id: (turn.epoch, turn.seq) for turn in turns}
        assert len(found) == len(turns), f"{self}: a turn is there twice"
        assert found == self.acked, str(self)


def cases() -> list[Case]:
    """A session for every way to fail."""
    ways = itertools.product(KINDS, (BEFORE, AFTER), (True, False))
    return [Case(f"{what}-{when}-{once}", Fault(what, when), once) for what, when, once in ways]


class Rules:
    """The faults of all cases by the key that they are for."""

    def __init__(self, made: list[Case], key_of: Callable[[bytes], str]) -> None:
        self._cases = {hash_of(case.session).hex(): case for case in made}
        self._key_of = key_of

    def __call__(self, asked: Asked) -> Fault:
        if asked.method != "PUT":
            return PASS
        for h, case in self._cases.items():
            if h in asked.key and asked.key.startswith(self._key_of(bytes.fromhex(h))):
                case.met += 1
                return case.fault if case.met == 1 or not case.once else PASS
        return PASS


def each(made: list[Case], work: Callable[[Case], object]) -> None:
    """Do this for all sessions, some at a time; first for those whose fault comes once.

    Failures that go on make the daemon spare its store, for everybody, until it answers again.
    """
    with ThreadPoolExecutor(CALLERS) as callers:
        for once in (True, False):
            for done in [callers.submit(work, case) for case in made if case.once is once]:
                done.result()


def finish(world: World, wire: Wire, made: list[Case]) -> None:
    """The end of every test here: healed, all is there, verify is clean."""
    assert all(case.met for case in made), [str(case) for case in made if not case.met]
    each(made, lambda case: case.check(wire))
    wire.close()
    assert world.daemon.terminate() == 0
    world.check_clean()
    told = sorted({(str(case), *case.refused) for case in made if case.refused})
    # With pytest -s: which fault ended in which refusal.
    print(f"{len(made)} faults met {sum(case.met for case in made)} times; refused: {told}")


def create(case: Case, wire: Wire, **fields: object) -> None:
    """Make the case's session, with no fault in the way."""
    assert wire.create(case.session, **fields).created
    reply = wire.append(case.session, user("t1", "hello"), durability=CLOUD_ACK)
    case.acked["t1"] = (reply.turns[0].position.epoch, reply.turns[0].position.seq)


@pytest.mark.parametrize("what", ["manifest", "segment"])
def test_a_flush_that_fails_in_any_way_loses_and_doubles_nothing(seaweed: Seaweed, what: str) -> None:
    made = cases()
    # A flush in the background would meet the fault that is meant for the append's own.
    with faulty(seaweed, flush_interval_ms=3_600_000) as world:
        wire = world.wire()
        each(made, lambda case: create(case, wire))
        start = {"manifest": "m/", "segment": "s/"}[what]
        world.proxy.rule = Rules(made, lambda h: start + h.hex())
        text = "long " * 16_000 if what == "segment" else "short"

        def hurt(case: Case) -> None:
            # The daemon may be sparing its store because of the others: then again, until it has met this one's fault.
            until(lambda: case.append(world, wire, CLOUD_ACK, assistant("t2", text)) or case.met, "the fault is met")
            # The session is owned: what is to be safe on the node alone is taken all the same.
            assert case.append(world, wire, EDGE_ACK, user("t3", "and now?")), str(case)
            case.append(world, wire, CLOUD_ACK, assistant("t4", text))

        each(made, hurt)
        world.proxy.heal()

        def mend(case: Case) -> None:
            for turn in (assistant("t2", text), assistant("t4", text)):
                case.complete(world, wire, CLOUD_ACK, turn)

        each(made, mend)
        finish(world, wire, made)


@pytest.mark.parametrize("what", ["manifest", "user index"])
def test_a_creation_that_fails_in_any_way_is_finished_by_the_next_call(seaweed: Seaweed, what: str) -> None:
    made = cases()
    with faulty(seaweed) as world:
        wire = world.wire()
        if what == "manifest":
            world.proxy.rule = Rules(made, lambda h: f"m/{h.hex()}")
        else:
            world.proxy.rule = Rules(made, lambda _: "u/")

        def hurt(case: Case) -> None:
            made_now = answer(lambda: wire.create(case.session, user_id="ann"))
            if isinstance(made_now, Refusal):
                case.refusal(made_now)
                # It is not known to exist, nor known not to.
                unknown = answer(lambda: wire.append(case.session, user("t1", "hello")))
                if isinstance(unknown, Refusal) and unknown.code is grpc.StatusCode.UNAVAILABLE:
                    case.refusal(unknown)

        each(made, hurt)
        world.proxy.heal()

        def mend(case: Case) -> None:
            wire.create(case.session, user_id="ann")
            assert case.append(world, wire, EDGE_ACK, user("t1", "hello")), str(case)
            case.complete(world, wire, CLOUD_ACK, assistant("t2", "yes?"))

        each(made, mend)
        request = session_pb2.ListSessionsRequest(user_id="ann", page_size=200)
        listed = [found.session_id for found in wire.sessions.ListSessions(request).sessions]
        assert sorted(listed) == sorted(case.session for case in made)
        finish(world, wire, made)


def test_a_claim_that_fails_in_any_way_is_finished_by_the_next_call(seaweed: Seaweed) -> None:
    made = cases()
    with faulty(seaweed) as world:
        wire = world.wire()
        each(made, lambda case: create(case, wire))
        wire.close()
        assert world.daemon.terminate() == 0
        world.daemon.restart()
        wire = world.wire()
        world.proxy.rule = Rules(made, lambda h: f"m/{h.hex()}")

        def hurt(case: Case) -> None:
            case.append(world, wire, EDGE_ACK, assistant("t2", "yes?"))
            # Reading needs no claim.
            assert [turn.turn_id for turn in wire.resume(case.session).turns][:1] == ["t1"], str(case)

        each(made, hurt)
        world.proxy.heal()
        each(made, lambda case: case.complete(world, wire, CLOUD_ACK, assistant("t2", "yes?")))
        finish(world, wire, made)


def test_a_release_that_fails_in_any_way_is_finished_by_the_next_drain(seaweed: Seaweed) -> None:
    made = cases()
    with faulty(seaweed, flush_interval_ms=3_600_000) as world:
        wire = world.wire()
        each(made, lambda case: create(case, wire))
        each(made, lambda case: case.append(world, wire, EDGE_ACK, assistant("t2", "yes?")))
        world.proxy.rule = Rules(made, lambda h: f"m/{h.hex()}")
        *_, hurt = wire.admin.Drain(admin_pb2.DrainRequest(grace_ms=4000))
        assert hurt.done
        # Those whose fault came once are released; of the others an answer said why not.
        assert not hurt.clean
        assert hurt.remaining_sessions <= sum(not case.once for case in made)
        assert hurt.failures
        world.proxy.heal()
        *_, mended = wire.admin.Drain(admin_pb2.DrainRequest(grace_ms=30_000))
        assert (mended.done, mended.clean, mended.remaining_sessions) == (True, True, 0)
        for case in made:
            assert world.manifest(case.session).owner is None, str(case)
        wire.close()
        assert world.daemon.terminate() == 0
        world.daemon.restart()
        wire = world.wire()
        each(made, lambda case: case.append(world, wire, EDGE_ACK, user("t3", "back again")))
        finish(world, wire, made)
