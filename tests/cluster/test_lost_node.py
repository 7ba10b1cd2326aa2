"""A node that is lost for good, with its disk: what was promised is there, and what may be missing is said."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from sessiond.v1 import turn_pb2
from tests.cluster.ends import finish, make_writable, missing
from tests.cluster.history import CLOUD_ACK, EDGE_ACK, History, read_disk, read_logs
from tests.cluster.load import append, resume
from tests.cluster.nodes import LEASE_MS, STEAL_LEASES, TAKE_OVER_S_MAX, running_cluster, until
from tests.seaweed import Seaweed
from tests.wire import PARTIAL, assistant, user

NEVER_MS = 3_600_000
WRITABLE_S_MAX = TAKE_OVER_S_MAX + STEAL_LEASES * LEASE_MS / 1000
# By what the lost node had of them: nothing but what is committed; turns on its disk; turns, and a policy that admits
# only what is committed.
SAFE = [f"safe-{number}" for number in range(4)]
SHORT = [f"short-{number}" for number in range(9)]
STRICT = [f"strict-{number}" for number in range(3)]
SESSIONS = [*SAFE, *SHORT, *STRICT]


def test_after_a_node_and_its_disk_are_lost_every_promise_holds_or_is_named(seaweed: Seaweed) -> None:
    with running_cluster(seaweed, flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        wire = cluster[0].wire()
        before: dict[str, turn_pb2.TurnPosition] = {}
        for session in SESSIONS:
            policy = turn_pb2.SessionPolicy(min_durability=CLOUD_ACK if session in STRICT else 0)
            wire.create(session, policy=policy)
            history.appended(session, CLOUD_ACK, append(wire, session, user("c1", "safe"), CLOUD_ACK))
            asked = EDGE_ACK if session in SHORT else CLOUD_ACK
            reply = append(wire, session, assistant("a1", "perhaps"), asked)
            history.appended(session, asked, reply)
            before[session] = resume(wire, session).turns[-1]
        cluster[0].kill()
        gone = read_disk(cluster[0].daemon.data_dir)
        assert gone == {session: {"a1"} for session in SHORT}
        cluster[0].lose_disk()

        # All at once, at the other two.
        with ThreadPoolExecutor(len(SESSIONS)) as pool:
            waits = list(
                pool.map(
                    lambda place: make_writable(cluster[1 + place % 2], SESSIONS[place], "go-on", history),
                    range(len(SESSIONS)),
                )
            )
        print(f"writable after {min(waits):.1f} to {max(waits):.1f} s; lease {LEASE_MS / 1000} s")
        assert max(waits) < WRITABLE_S_MAX
        logs = read_logs(cluster[1].address, SESSIONS)
        for session in SESSIONS:
            expected = ["c1", "go-on"] if session in SHORT else ["c1", "a1", "go-on"]
            assert [turn.turn_id for turn in logs[session]] == expected
            # Nobody knows here whether a1 was the last that n1 acknowledged; where the policy says so, all do.
            ranges = missing(cluster[2], session)
            if session in STRICT:
                assert not ranges
            else:
                (row,) = ranges
                assert (row.first_seq, row.epoch, row.possible_only) == (len(expected), 1, True), session
                found = resume(cluster[2].wire(), session)
                assert found.receipt.rung == PARTIAL
                assert "may be missing" in found.receipt.notice

        # What ends it: somebody accepts it, or the log reaches again what somebody had acknowledged.
        accepted, reached, kept, *_ = SHORT
        assert not missing(cluster[1], accepted, accept_missing=1)
        knows = turn_pb2.TurnPosition(epoch=before[reached].epoch, seq=before[reached].seq)
        knows.chain = before[reached].chain
        (row,) = missing(cluster[1], kept)
        acked = turn_pb2.TurnPosition(epoch=before[kept].epoch, seq=before[kept].seq, chain=before[kept].chain)
        # By its chain: the log has another turn at that place.
        assert missing(cluster[2], kept, highest_acked=acked)
        history.appended(reached, EDGE_ACK, append(cluster[2].wire(), reached, assistant("a1", "perhaps")))
        assert missing(cluster[2], reached, highest_acked=knows), (
            "a1 stands behind go-on, where it did not stand before"
        )
        knows.ClearField("chain")
        assert not missing(cluster[2], reached, highest_acked=knows), "the log reaches its seq again"
        for member in cluster.members[1:]:
            assert not missing(member, accepted)
            assert not missing(member, reached)
            assert missing(member, kept)

        # The name comes back with an empty disk: another node, to which nothing belongs.
        cluster[0].start()
        for session in SESSIONS:
            assert bool(missing(cluster[0], session)) == (session not in (*STRICT, accepted, reached)), session
        assert not {cluster.owner(session) for session in SESSIONS} & {"n1"}
        finish(cluster, SESSIONS, history, gone, [accepted])


def test_a_session_nobody_asks_for_is_taken_by_the_first_read_after_the_loss() -> None:
    with running_cluster(flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        wire = cluster[0].wire()
        wire.create("s")
        history.appended("s", CLOUD_ACK, append(wire, "s", user("c1", "safe"), CLOUD_ACK))
        cluster[0].kill()
        cluster[0].lose_disk()
        first = resume(cluster[1].wire(), "s")
        # Its owner may be alive: what is committed is served, and what the owner may have is named.
        assert first.receipt.rung == PARTIAL
        assert [turn.turn_id for turn in first.turns] == ["c1"]
        assert first.receipt.missing
        until(lambda: resume(cluster[1].wire(), "s") and cluster.owner("s") == "n2", "a read takes it")
        assert cluster.manifest("s").epoch == 2
        finish(cluster, ["s"], history)
