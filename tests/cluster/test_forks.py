"""Forks, hints and accepted losses through any node: made by the parent's owner, and kept when that node is gone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import grpc

from sessiond.v1 import context_pb2, session_pb2
from tests.cluster.nodes import LEASE_MS, PATIENCE_S, STEAL_LEASES, TAKE_OVER_S_MAX, running_cluster, until
from tests.wire import PARTIAL, Wire, assistant, refusal, user

Result = TypeVar("Result")
NEVER_MS = 3_600_000
STOLEN_S_MAX = TAKE_OVER_S_MAX + STEAL_LEASES * LEASE_MS / 1000


def patiently(call: Callable[[], Result]) -> Result:
    """What a call returns once nobody says any more that waiting helps: as a client that retries sees it."""
    found: list[Result] = []

    def answered() -> bool:
        try:
            found.append(call())
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True

    until(answered, "a call is answered", STOLEN_S_MAX)
    return found[0]


def talk(wire: Wire, session: str, count: int, first: int = 1) -> None:
    turns = [(user if n % 2 else assistant)(f"t{n}", f"number {n}") for n in range(first, first + count)]
    patiently(lambda: wire.append(session, *turns))


def resume(wire: Wire, session: str, **fields: object) -> context_pb2.ActiveContext:
    return patiently(lambda: wire.resume(session, **fields))


def fork(wire: Wire, session: str, new: str, seq: int) -> session_pb2.ForkSessionResponse:
    request = session_pb2.ForkSessionRequest(session_id=session, new_session_id=new, seq=seq)
    return patiently(lambda: wire.sessions.ForkSession(request, timeout=PATIENCE_S))


def ids(context: context_pb2.ActiveContext) -> list[str]:
    return [turn.turn_id for turn in context.turns]


def test_a_fork_is_made_once_through_whichever_node_it_is_asked_for() -> None:
    with running_cluster(flush_interval_ms=NEVER_MS) as cluster:
        one, two, three = (member.wire() for member in cluster)
        one.create("a")
        talk(one, "a", 6)
        made = fork(two, "a", "b", 4)
        assert (made.created, made.session.owner_node) == (True, "n1")
        assert not fork(three, "a", "b", 4).created
        assert refusal(fork, three, "a", "b", 3).reason == "SESSION_EXISTS"
        assert [ids(wire.resume("b")) for wire in (one, two, three)] == [["t1", "t2", "t3", "t4"]] * 3
        # A hint goes to the owner, which has it hot.
        hint = session_pb2.WarmSessionRequest(session_id="a")
        assert all(wire.sessions.WarmSession(hint, timeout=PATIENCE_S).hot for wire in (one, two, three))
        # Parent and fork part: each goes where it is asked for, and is forked where it is.
        assert cluster[0].terminate() == 0
        resume(two, "a")
        talk(three, "b", 2, first=5)
        cluster[0].start()
        one = cluster[0].wire()
        owner = cluster.owner("b")
        assert owner in ("n2", "n3")
        again = fork(one, "a", "b", 4)
        assert (again.created, again.session.forked_at.seq) == (False, 4)
        assert fork(one, "b", "c", 6).session.owner_node == owner
        assert ids(one.resume("c")) == ["t1", "t2", "t3", "t4", "t5", "t6"]
        # Deleted at one node, needed at another.
        three.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="a"), timeout=PATIENCE_S)
        assert refusal(fork, two, "a", "d", 4).reason == "SESSION_DELETED"
        cluster.flush()
        assert cluster.stop() == [0, 0, 0]
        cluster.check_clean()


def test_what_was_accepted_after_a_steal_stays_accepted_and_whoever_had_it_still_hears_of_it() -> None:
    with running_cluster(flush_interval_ms=NEVER_MS) as cluster:
        one, two, three = (member.wire() for member in cluster)
        one.create("a")
        talk(one, "a", 4)
        assert fork(one, "a", "b", 4).created
        one.append("a", user("x5", "of the parent"))
        lost = one.append("b", user("y5", "of the fork"))
        cluster[0].kill()
        cluster[0].lose_disk()

        def taken(session: str) -> bool:
            resume(two, session)
            return cluster.owner(session) == "n2"

        until(lambda: taken("a") and taken("b"), "both are taken over", STOLEN_S_MAX)
        epoch = lost.head.epoch
        assert [(m.first_seq, m.epoch) for m in resume(two, "b").receipt.missing] == [(5, epoch)]
        assert [(m.first_seq, m.epoch) for m in resume(two, "a").receipt.missing] == [(5, 1)]
        # Another epoch's loss is not this one's.
        assert resume(three, "b", accept_missing=epoch + 1).receipt.rung == PARTIAL
        assert not resume(three, "b", accept_missing=epoch).receipt.missing
        cluster[1].kill()
        cluster[1].start()
        two = cluster[1].wire()

        until(lambda: not resume(three, "b").receipt.missing, "the loss stays accepted over a crash", STOLEN_S_MAX)
        told = resume(three, "b", highest_acked=lost.head).receipt
        assert [(m.first_seq, m.last_seq, m.epoch) for m in told.missing] == [(5, 5, epoch)]
        assert [(m.first_seq, m.epoch) for m in resume(three, "a").receipt.missing] == [(5, 1)]
        # A fork of either, below the loss and above it.
        talk(three, "b", 2, first=11)
        assert not fork(two, "b", "above", 6).session.missing
        assert not fork(two, "a", "below", 4).session.missing
        assert [m.epoch for m in resume(two, "above", highest_acked=lost.head).receipt.missing] == [epoch]
        cluster.heal()
        cluster.flush()
        assert cluster.stop() == [0, 0, 0]
        cluster.check_clean()
