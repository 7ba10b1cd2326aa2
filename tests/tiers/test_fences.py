"""A node that was taken for gone: what it owned is doubted before it holds its lease again, and settled by writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sessiond.core import envelope
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_DELETED
from sessiond.daemon import doubt_all, take_node
from sessiond.errors import Unavailable
from sessiond.tiers.cloud.bucket import lease_key
from sessiond.tiers.cloud.lease import Lease, fenced_body
from sessiond.tiers.hot.rows import PHASE_DOUBTED, PHASE_FENCED, PHASE_OWNED, PHASE_RELEASED
from sessiond.v1 import session_pb2
from tests.tiers.test_commits import (
    Killed,
    LiveNode,
    S,
    World,
    assistant,
    fenced,
    killed_once_landed,
    talk,
    unsent,
    user,
)
from tests.tiers.test_rescues import rescues


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def lease_of(node: LiveNode, **more: Any) -> Lease:
    return Lease(node.world.store, "n1", node.node.incarnation, "here", 1000, lambda: None, **more)


def holder(world: World) -> dict[str, Any]:
    return envelope.unseal(world.store.get(lease_key("n1")).body, envelope.KIND_LEASE, lease_key("n1"))[0]


def fence(world: World) -> None:
    """What another node writes over a lease that stood still."""
    found = world.store.get(lease_key("n1"))
    before = holder(world)
    body = fenced_body(before, "n1", before["incarnation"], "n2", bytes(16))
    world.store.put(lease_key("n1"), body, if_match=found.etag)


def test_a_start_after_a_fence_believes_no_row_and_one_without_believes_all(world: World) -> None:
    node = talk(world)
    take_node(lease_of(node), node.hot, node.hot.opened_at)
    node.flush()  # nobody held the name before, so that its rows were looked up
    take_node(lease_of(node), node.hot, node.hot.opened_at)
    assert node.head.phase == PHASE_OWNED
    fence(world)
    take_node(lease_of(node), node.hot, node.hot.opened_at)
    assert node.head.phase == PHASE_DOUBTED


def test_what_was_owned_is_doubted_before_the_lease_is_held_again(world: World) -> None:
    node = talk(world)
    seen: list[bool] = []

    def doubted() -> None:
        seen.append(bool(holder(world).get("fenced")) and not lease.is_valid())
        doubt_all(node.hot)

    lease = lease_of(node, on_fenced=doubted)
    take_node(lease, node.hot, node.hot.opened_at)
    tenure = lease.tenure
    fence(world)
    assert lease.renew()
    assert seen == [True]
    assert node.head.phase == PHASE_DOUBTED
    assert lease.is_valid()
    # What began before, and what began between the fence and the new lease, are both of another tenure.
    assert (lease.fences, lease.tenure) == (1, tenure + 2)


def test_a_doubt_is_settled_by_a_write_and_never_by_a_read(world: World) -> None:
    node = talk(world)
    node.flush()
    doubt_all(node.hot)
    before = world.manifest
    world.run(node.sessions.ownership.settle_doubt(world.h))
    assert node.head.phase == PHASE_OWNED
    # Whoever read the manifest while the node was taken for gone can't write over it any more.
    assert world.manifest.mutation == before.mutation + 1
    assert world.manifest.epoch == before.epoch


def test_turns_that_their_sender_appended_again_are_neither_applied_twice_nor_listed(world: World) -> None:
    node = fenced(world)
    owner = world.node("third", "n3")
    owner.append(user("t3"), assistant("t4"))
    world.run(rescues(node).offer(world.h))
    assert [turn.turn_id for turn in owner.resume().turns] == ["t1", "t2", "t3", "t4"]
    assert not world.manifest.orphans
    assert not node.proofs()


def test_a_doubt_about_what_this_node_had_deleted_ends_with_the_deletion(world: World) -> None:
    node = talk(world)
    node.flush()
    world.store.on_put = killed_once_landed
    with pytest.raises(Killed):
        world.run(node.sessions.delete(node.call, session_pb2.DeleteSessionRequest(session_id=S)))
    world.store.heal()
    assert world.manifest.lifecycle == LIFECYCLE_DELETED
    again = world.restart(node)
    assert again.head.phase == PHASE_DOUBTED
    world.run(again.sessions.ownership.settle_doubt(world.h))
    assert again.head.phase == PHASE_RELEASED
    assert again.head.tombstoned


def test_a_deletion_that_was_asked_of_a_node_that_was_gone_does_not_keep_its_rows(world: World) -> None:
    """It came to nothing there; later the session is deleted by whoever took it."""
    node = talk(world)
    node.flush()
    node.append(user("t3"))
    world.store.on_put = unsent
    with pytest.raises(Unavailable):
        world.run(node.sessions.delete(node.call, session_pb2.DeleteSessionRequest(session_id=S)))
    world.store.heal()
    other = world.node("other", "n2")
    assert other.take_over()
    again = world.restart(node)
    world.run(again.sessions.ownership.settle_doubt(world.h))
    assert (again.head.phase, again.head.lifecycle) == (PHASE_FENCED, LIFECYCLE_ACTIVE)
    world.run(other.sessions.delete(other.call, session_pb2.DeleteSessionRequest(session_id=S)))
    world.run(rescues(again).offer(world.h))
    assert again.head.tombstoned
