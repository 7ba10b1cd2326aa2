"""Batches that reach one node of several: each item finds its session's owner, and a lost node holds up no other's."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from sessiond.v1 import admin_pb2, context_pb2, session_pb2
from tests.cluster.nodes import LEASE_MS, Cluster, running_cluster, until
from tests.e2e.test_batches import append, asked, given, resume
from tests.wire import assistant, refusal, user

EACH = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes for tests that leave them as they are."""
    with running_cluster(links=False) as running:
        yield running


def spread(cluster: Cluster, prefix: str) -> list[str]:
    """Sessions of every node in turn, each with a question and its answer."""
    sessions = []
    for number in range(EACH):
        for member in cluster:
            session = f"{prefix}-{member.name}-{number}"
            wire = member.wire()
            wire.create(session)
            wire.append(session, user("t0", "One"), assistant("t1", "Two"))
            wire.close()
            sessions.append(session)
    return sessions


def owners(sessions: list[str]) -> list[str]:
    return [session.rsplit("-", 2)[1] for session in sessions]


def test_items_are_answered_by_the_owner_of_each(cluster: Cluster) -> None:
    sessions = spread(cluster, "each")
    for member in cluster:
        wire = member.wire()
        items = resume(wire, *map(asked, sessions), asked("never-made"))
        assert items.pop().error.reason == "SESSION_NOT_FOUND"
        assert [item.context.receipt.node for item in items] == owners(sessions)
        for session, item in zip(sessions, items, strict=True):
            single = wire.resume(session)
            assert item.context.turns == single.turns
            assert (item.context.context_etag, item.context.tokens) == (single.context_etag, single.tokens)
    wire = cluster[0].wire()
    requests = [given(session, user(f"n{n}", "Three")) for n in range(3) for session in sessions]
    items = append(wire, *requests)
    assert [item.response.head.seq for item in items] == [seq for seq in (3, 4, 5) for _ in sessions]
    for session in sessions:
        assert [turn.turn_id for turn in wire.turns(session)] == ["t0", "t1", "n0", "n1", "n2"]


def test_a_refusal_by_the_owner_is_told_as_it_came(cluster: Cluster) -> None:
    sessions = spread(cluster, "refused")
    wire = cluster[0].wire()
    items = append(wire, *(given(session, user("t0", "other words")) for session in sessions))
    for session, item in zip(sessions, items, strict=True):
        single = refusal(wire.append, session, user("t0", "other words"))
        assert (item.error.code, item.error.reason) == (single.code.value[0], "TURN_ID_REUSED")
        assert (item.error.message, dict(item.error.metadata)) == (single.message, single.metadata)


def test_one_that_would_rather_be_told_where_to_go_is_told_for_each_item(cluster: Cluster) -> None:
    sessions = spread(cluster, "told")
    batch = session_pb2.BatchResumeSessionsRequest(requests=map(asked, sessions))
    redirects = (("x-sessiond-redirect", "1"),)
    reply = cluster[0].wire().sessions.BatchResumeSessions(batch, metadata=redirects, timeout=30)
    for owner, item in zip(owners(sessions), reply.items, strict=True):
        if owner == "n1":
            assert item.context.receipt.node == "n1"
            continue
        assert item.error.reason == "NOT_OWNER"
        assert item.error.metadata["owner_address"] == cluster.by_name[owner].address


def test_a_killed_node_spoils_no_item_of_another_and_its_own_are_taken_over() -> None:
    with running_cluster(links=False) as cluster:
        sessions = spread(cluster, "killed")
        cluster.flush()
        cluster[2].kill()
        wire = cluster[0].wire()
        requests = [given(session, user("t2", "Three")) for session in sessions]
        items = append(wire, *requests)
        for owner, item in zip(owners(sessions), items, strict=True):
            if owner != "n3":
                assert item.response.head.seq == 3
            else:
                assert item.error.reason == "OWNER_UNREACHABLE"
        until(lambda: not any(item.HasField("error") for item in append(wire, *requests)), "every item is appended")
        for session in sessions:
            assert [turn.turn_id for turn in wire.turns(session)] == ["t0", "t1", "t2"]
        items = resume(wire, *map(asked, sessions))
        assert {item.context.receipt.node for item in items} == {"n1", "n2"}


def test_a_node_that_says_nothing_holds_no_batch_beyond_its_time() -> None:
    # Nobody is taken for gone meanwhile.
    with running_cluster(links=False, lease_ms=10 * LEASE_MS) as cluster:
        sessions = spread(cluster, "silent")
        wire = cluster[0].wire()
        assert not any(item.HasField("error") for item in resume(wire, *map(asked, sessions)))
        cluster[1].freeze()
        try:
            requests = [given(session, user(f"n{n}", "x")) for n in range(3) for session in sessions]
            began = time.monotonic()
            items = append(wire, *requests, timeout=4.0)
            assert time.monotonic() - began < 4.0
        finally:
            cluster[1].thaw()
        for owner, item in zip(owners(sessions) * 3, items, strict=True):
            if owner == "n2":
                assert item.error.reason in ("DEADLINE_TOO_SHORT", "OWNER_UNREACHABLE")
            else:
                assert item.response.head.seq
        # What became of them or not: once each, when they are sent again.
        until(lambda: not any(item.HasField("error") for item in append(wire, *requests)), "every item is appended")
        for session in sessions:
            assert sorted(turn.turn_id for turn in wire.turns(session)) == ["n0", "n1", "n2", "t0", "t1"]


def test_items_behind_many_of_a_node_that_says_nothing_are_answered() -> None:
    with running_cluster(links=False, size=2, lease_ms=10 * LEASE_MS) as cluster:
        theirs = [f"theirs-{number}" for number in range(100)]
        ours = [f"ours-{number}" for number in range(10)]
        for member, sessions in ((cluster[1], theirs), (cluster[0], ours)):
            wire = member.wire()
            for session in sessions:
                wire.create(session)
        wire = cluster[0].wire()
        # By now each node knows where the other's sessions are.
        assert not any(item.HasField("error") for item in resume(wire, *map(asked, theirs + ours)))
        cluster[1].freeze()
        try:
            items = append(wire, *(given(session, user("t", "x")) for session in theirs + ours), timeout=4.0)
        finally:
            cluster[1].thaw()
        assert all(item.HasField("error") for item in items[:100])
        assert [item.response.head.seq for item in items[100:]] == [1] * 10


def test_a_node_that_drains_has_its_items_answered_by_others() -> None:
    with running_cluster(links=False, size=2) as cluster:
        sessions = spread(cluster, "drained")
        wire = cluster[0].wire()
        assert list(wire.admin.Drain(admin_pb2.DrainRequest(), timeout=60))[-1].done
        items = append(wire, *(given(session, user("t2", "Three")) for session in sessions))
        assert [item.response.head.seq for item in items] == [3] * len(sessions)
        items = resume(wire, *map(asked, sessions))
        assert {item.context.receipt.node for item in items} == {"n2"}
        assert {item.context.receipt.rung for item in items} == {context_pb2.RUNG_HOT}
