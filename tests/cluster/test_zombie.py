"""A node that was taken for gone and is not: frozen for longer than three leases, or cut off from everybody.

What it had acknowledged is in the log once, or listed; what it does after it comes back changes nothing of theirs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sessiond.v1 import context_pb2
from tests.cluster.ends import finish, make_writable, missing
from tests.cluster.history import CLOUD_ACK, EDGE_ACK, History, orphans_of, read_logs
from tests.cluster.load import append, resume
from tests.cluster.nodes import LEASE_MS, PATIENCE_S, STEAL_LEASES, TAKE_OVER_S_MAX, Cluster, running_cluster, until
from tests.cluster.tcp import State
from tests.fault.world import answer
from tests.seaweed import Seaweed
from tests.wire import Refusal, assistant, user

UNCONFIRMED = context_pb2.OWNERSHIP_UNCONFIRMED
NEVER_MS = 3_600_000
# Nobody writes to this one while its owner is away; to the other one somebody does.
LEFT, WENT_ON = "left", "went-on"
SESSIONS = [LEFT, WENT_ON]
TAKEN_S_MAX = TAKE_OVER_S_MAX + STEAL_LEASES * LEASE_MS / 1000


def talk(cluster: Cluster, history: History) -> None:
    """Both sessions at n1, with turns in the cloud tier and turns that are on its disk only."""
    wire = cluster[0].wire()
    for session in SESSIONS:
        wire.create(session)
        history.appended(session, CLOUD_ACK, append(wire, session, user("c1", "safe"), CLOUD_ACK))
        history.appended(session, EDGE_ACK, append(wire, session, assistant("e1", "on the disk"), EDGE_ACK))
        history.appended(session, EDGE_ACK, append(wire, session, user("e2", "on the disk"), EDGE_ACK))
    assert {cluster.manifest(session).head for session in SESSIONS} == {1}


def take_over(cluster: Cluster, history: History) -> None:
    """n2 takes the one by an append and n3 the other by a resume; both say that turns may be missing."""
    assert make_writable(cluster[1], WENT_ON, "n2-1", history, TAKEN_S_MAX) < TAKEN_S_MAX
    history.appended(WENT_ON, CLOUD_ACK, append(cluster[1].wire(), WENT_ON, assistant("n2-2", "went on"), CLOUD_ACK))
    (lost,) = missing(cluster[1], WENT_ON)
    assert (lost.first_seq, lost.epoch, lost.possible_only) == (2, 1, True)
    assert [row.first_seq for row in missing(cluster[2], LEFT)] == [2]
    until(lambda: cluster.owner(LEFT) != "n1", "n3 has taken what nobody wrote to")
    assert {cluster.manifest(session).epoch for session in SESSIONS} == {2}


def check_return(cluster: Cluster, history: History) -> None:
    """After n1 is back: its turns are applied where nothing was appended since, and listed where something was."""
    until(lambda: not missing(cluster[1], LEFT), "what n1 had of the one is rescued")
    until(lambda: orphans_of(cluster[2].wire(), WENT_ON), "what n1 had of the other is listed")
    logs = read_logs(cluster[0].address, SESSIONS)
    assert [turn.turn_id for turn in logs[LEFT]][:3] == ["c1", "e1", "e2"]
    assert [turn.turn_id for turn in logs[WENT_ON]][:3] == ["c1", "n2-1", "n2-2"]
    listed = orphans_of(cluster[0].wire(), WENT_ON)
    assert [(turn.turn_id, turn.epoch, turn.seq) for turn in listed][:2] == [("e1", 1, 2), ("e2", 1, 3)]
    assert listed[0].message.parts[0].text == "on the disk"
    # n1 owns nothing of theirs, and says so by sending their calls on.
    assert {cluster.owner(session) for session in SESSIONS} <= {"n2", "n3"}
    assert {cluster.manifest(session).epoch for session in SESSIONS} == {2}


def check_reappended(cluster: Cluster, history: History) -> None:
    """Listed turns that are appended again are in the log, and listed no more."""
    wire = cluster[0].wire()
    for turn in orphans_of(wire, WENT_ON):
        again = user(turn.turn_id, "on the disk")
        again.role = turn.role
        again.message.CopyFrom(turn.message)
        history.appended(WENT_ON, EDGE_ACK, append(wire, WENT_ON, again))
    assert orphans_of(wire, WENT_ON) == []


def test_a_frozen_node_that_thaws_changes_nothing_and_its_turns_are_kept(seaweed: Seaweed) -> None:
    with running_cluster(seaweed, flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        talk(cluster, history)
        frozen = cluster[0].wire()
        cluster[0].freeze()
        with ThreadPoolExecutor(8) as pool:
            # These wait in its sockets, and are what it does first when it thaws.
            writes = [
                (asked, pool.submit(append, frozen, WENT_ON, user(f"late-{asked}", "?"), asked, PATIENCE_S))
                for asked in (EDGE_ACK, CLOUD_ACK)
            ]
            floor = history.floor(LEFT)
            reads = [pool.submit(resume, frozen, LEFT, PATIENCE_S) for _ in range(4)]
            take_over(cluster, history)
            cluster[0].thaw()
            for asked, waiting in writes:
                reply = answer(waiting.result)
                if isinstance(reply, Refusal):
                    assert reply.retry_ms > 0, reply.reason
                else:
                    history.appended(WENT_ON, asked, reply)
            for waiting in reads:
                history.resumed(LEFT, floor, waiting.result().receipt)
        until(lambda: cluster[0].status().cloud.lease_valid, "n1 holds its lease again")
        check_return(cluster, history)
        check_reappended(cluster, history)
        finish(cluster, SESSIONS, history)


def test_a_node_that_is_cut_off_serves_unconfirmed_and_its_turns_are_kept(seaweed: Seaweed) -> None:
    with running_cluster(seaweed, flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        talk(cluster, history)
        cluster[0].cut_off(State.LOST)
        alone = cluster[0].wire()
        take_over(cluster, history)
        for session in SESSIONS:
            reply = append(alone, session, assistant("alone", "Nobody else hears me."), EDGE_ACK)
            assert reply.ownership == UNCONFIRMED
            history.appended(session, EDGE_ACK, reply)
            receipt = resume(alone, session).receipt
            assert (receipt.ownership, receipt.head.seq) == (UNCONFIRMED, 4)
        cluster.network.heal()
        until(lambda: cluster[0].status().cloud.lease_valid, "n1 holds its lease again")
        check_return(cluster, history)
        check_reappended(cluster, history)
        finish(cluster, SESSIONS, history)


def test_a_killed_node_that_starts_late_on_its_disk_gives_its_turns_back() -> None:
    with running_cluster(flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        talk(cluster, history)
        cluster[0].kill()
        take_over(cluster, history)
        cluster[0].start()
        check_return(cluster, history)
        check_reappended(cluster, history)
        finish(cluster, SESSIONS, history)


def test_a_node_frozen_for_less_than_its_lease_keeps_its_sessions() -> None:
    with running_cluster(lease_ms=4000, flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        talk(cluster, history)
        cluster[0].freeze()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(append, cluster[1].wire(), LEFT, user("through", "?"), EDGE_ACK, PATIENCE_S)
            assert not waiting.done()
            cluster[0].thaw()
            history.appended(LEFT, EDGE_ACK, waiting.result())
        assert {cluster.manifest(session).epoch for session in SESSIONS} == {1}
        assert {cluster.owner(session) for session in SESSIONS} == {"n1"}
        finish(cluster, SESSIONS, history)
