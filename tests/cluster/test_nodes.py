"""The instruments themselves: three nodes on one bucket, and a history that tells a lie from the truth."""

from __future__ import annotations

import pytest

from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.cluster.history import CLOUD_ACK, EDGE_ACK, History, read_disk, read_logs
from tests.cluster.load import append
from tests.cluster.nodes import running_cluster
from tests.seaweed import Seaweed
from tests.wire import user

CONFIRMED = context_pb2.OWNERSHIP_CONFIRMED


@pytest.mark.parametrize("store", ["folder", "seaweedfs"])
def test_three_nodes_share_a_bucket_and_leave_it_sound(store: str, seaweed: Seaweed) -> None:
    with running_cluster(seaweed if store == "seaweedfs" else None) as cluster:
        history = History()
        for member in cluster:
            wire = member.wire()
            wire.create(f"of-{member.name}")
            for number in range(5):
                session = f"of-{member.name}"
                history.appended(session, EDGE_ACK, append(wire, session, user(f"t{number}", "hello"), EDGE_ACK))
        assert [cluster.owner(session) for session in history.sessions] == ["n1", "n2", "n3"]
        cluster.flush()
        logs = {}
        for member in cluster:
            logs |= read_logs(member.address, [f"of-{member.name}"])
        history.check(logs, {})
        assert cluster.stop() == [0, 0, 0]
        cluster.check_clean()


def test_the_disk_of_a_killed_node_shows_what_the_cloud_tier_lacks() -> None:
    with running_cluster(size=1, flush_interval_ms=3_600_000) as cluster:
        wire = cluster[0].wire()
        wire.create("s")
        append(wire, "s", user("flushed", "hello"), CLOUD_ACK)
        append(wire, "s", user("queued", "hello"), EDGE_ACK)
        cluster[0].kill()
        assert read_disk(cluster[0].daemon.data_dir) == {"s": {"queued"}}


def turn(turn_id: str, epoch: int, seq: int) -> turn_pb2.Turn:
    return turn_pb2.Turn(turn_id=turn_id, epoch=epoch, seq=seq)


def told(turn_id: str, epoch: int, seq: int, durability: int, cloud_seq: int = 0) -> session_pb2.AppendTurnResponse:
    reply = session_pb2.AppendTurnResponse(durability=durability, ownership=CONFIRMED, cloud_seq=cloud_seq)
    reply.turns.add(turn_id=turn_id, position=turn_pb2.TurnPosition(epoch=epoch, seq=seq))
    return reply


def history(*acks: session_pb2.AppendTurnResponse) -> History:
    made = History()
    for ack in acks:
        made.appended("s", ack.durability, ack)
    return made


LOG = [turn("a", 1, 1), turn("b", 1, 2), turn("c", 2, 3)]


@pytest.mark.parametrize(
    ("wrong", "acks", "log", "orphans"),
    [
        ("is at None", [told("d", 1, 4, CLOUD_ACK, 4)], LOG, set()),
        ("is at (1, 2)", [told("b", 1, 1, CLOUD_ACK, 1)], LOG, set()),
        ("is nowhere", [told("d", 1, 4, EDGE_ACK)], LOG, {"e"}),
        ("is at (1, 2)", [told("b", 1, 3, EDGE_ACK)], LOG, set()),
        ("is at (2, 3)", [told("c", 2, 2, EDGE_ACK)], LOG, set()),
        ("is missing", [], [turn("a", 1, 1), turn("b", 1, 3)], set()),
        ("applied twice", [], [turn("a", 1, 1), turn("a", 1, 2)], set()),
        ("after one of epoch 2", [], [turn("a", 2, 1), turn("b", 1, 2)], set()),
    ],
    ids=["cloud-gone", "cloud-moved", "edge-gone", "edge-moved", "moved-in-epoch", "gap", "twice", "epoch-back"],
)
def test_the_history_finds_what_is_wrong(
    wrong: str, acks: list[session_pb2.AppendTurnResponse], log: list[turn_pb2.Turn], orphans: set[str]
) -> None:
    with pytest.raises(AssertionError, match=wrong.replace("(", r"\(").replace(")", r"\)")):
        history(*acks).check({"s": log}, {"s": orphans})


def test_the_history_takes_what_is_rescued_listed_or_queued() -> None:
    made = history(
        told("a", 1, 1, CLOUD_ACK, 1), told("c", 1, 2, EDGE_ACK), told("d", 1, 3, EDGE_ACK), told("e", 1, 4, EDGE_ACK)
    )
    made.check({"s": LOG}, {"s": {"d"}}, {"s": {"e"}})


def test_the_history_suspects_a_whole_looking_answer_that_lacks_a_turn() -> None:
    made = history(told("a", 1, 1, EDGE_ACK), told("b", 1, 2, EDGE_ACK))
    receipt = context_pb2.Receipt(ownership=CONFIRMED, head=turn_pb2.TurnPosition(epoch=1, seq=1))
    made.resumed("s", made.floor("s"), receipt)
    with pytest.raises(AssertionError, match="CONFIRMED and nothing missing"):
        made.check({"s": LOG}, {})
    made.check({"s": LOG}, {"s": {"b"}})
    made.suspects.clear()
    receipt.missing.add(first_seq=2)
    made.resumed("s", made.floor("s"), receipt)
    made.check({"s": LOG}, {})


def test_a_node_that_joins_others_has_its_tokenizers_before_it_takes_calls() -> None:
    with running_cluster(size=2) as cluster:
        joined = cluster[1]
        joined.kill()
        joined.start()
        # Without the vocabularies it is half of that; they take the interpreter for as long as they are loaded.
        assert joined.status().resident_bytes > 100e6
