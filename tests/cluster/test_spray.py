"""A gateway that knows nothing of owners: whichever node it asks, it gets the owner's answer, and nothing moves."""

from __future__ import annotations

import itertools

from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.cluster.ends import finish
from tests.cluster.history import EDGE_ACK, History
from tests.cluster.load import append
from tests.cluster.nodes import running_cluster
from tests.seaweed import Seaweed
from tests.wire import assistant, user

ROUNDS = 40
RESUME = "/sessiond.v1.SessionService/ResumeSession"
READS: dict[str, tuple[str, object]] = {
    "resume": ("ResumeSession", session_pb2.ResumeSessionRequest(context=context_pb2.ContextSpec(budget_tokens=4000))),
    "resume-small": (
        "ResumeSession",
        session_pb2.ResumeSessionRequest(context=context_pb2.ContextSpec(budget_tokens=60)),
    ),
    "get": ("GetSession", session_pb2.GetSessionRequest()),
    "turns": ("ListTurns", session_pb2.ListTurnsRequest(page_size=5)),
    "checkpoints": ("ListCheckpoints", session_pb2.ListCheckpointsRequest()),
}


def test_calls_sprayed_over_all_nodes_move_no_session_and_get_the_owners_answers(seaweed: Seaweed) -> None:
    with running_cluster(seaweed) as cluster:
        history = History()
        wires = [member.wire() for member in cluster]
        sessions = [f"s{number}" for number in range(6)]
        for session, wire in zip(sessions, itertools.cycle(wires)):
            wire.create(session)
            history.appended(session, EDGE_ACK, append(wire, session, user("t0", "hello")))
        owners = {session: cluster.owner(session) for session in sessions}
        assert set(owners.values()) == {"n1", "n2", "n3"}

        for number in range(1, ROUNDS + 1):
            make = user if number % 2 else assistant
            for place, session in enumerate(sessions):
                turn = make(f"t{number}", f"{number} of {session}")
                history.appended(session, EDGE_ACK, append(wires[(place + number) % 3], session, turn))
        # Each turn went to another node than the one before, and each stands right behind it.
        assert [ack.place for ack in history.acks if ack.session == "s0"] == [(1, n) for n in range(1, ROUNDS + 2)]
        assert not any(ack.duplicate for ack in history.acks)
        assert all(ack.confirmed and not ack.missing for ack in history.acks)

        cluster.flush()
        for session in sessions:
            for name, (method, request) in READS.items():
                request.session_id = session  # type: ignore[attr-defined]
                raw = request.SerializeToString()  # type: ignore[attr-defined]
                path = f"/sessiond.v1.SessionService/{method}"
                answers = {wire.channel.unary_unary(path)(raw, timeout=30) for wire in wires}
                assert len(answers) == 1, f"{name} of {session} depends on the node that is asked"
        assert {session: cluster.owner(session) for session in sessions} == owners
        assert {session: cluster.manifest(session).epoch for session in sessions} == dict.fromkeys(sessions, 1)
        finish(cluster, sessions, history)


def test_a_sprayed_retry_is_a_duplicate_wherever_it_arrives() -> None:
    with running_cluster() as cluster:
        wires = [member.wire() for member in cluster]
        wires[0].create("s")
        turn = user("t1", "hello")
        first, *again = [append(wire, "s", turn) for wire in wires]
        assert [reply.turns[0].position for reply in again] == [first.turns[0].position] * 2
        assert [reply.outcome for reply in again] == [session_pb2.APPEND_OUTCOME_DUPLICATE] * 2
        head = append(wires[1], "s", user("t2", "more"), turn_pb2.DURABILITY_CLOUD).head
        assert (head.epoch, head.seq) == (1, 2)
