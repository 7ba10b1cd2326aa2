"""The node's name is taken once what the hot tier believes is settled, and a lost answer costs nobody the name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.daemon import take_node
from sessiond.errors import Invalid
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.lease import Lease
from sessiond.tiers.cloud.store import Ambiguous
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hot.rows import PHASE_DOUBTED, PHASE_OWNED
from tests.tiers.test_commits import Killed, World, lost_answers, talk


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def lease(world: World, incarnation: bytes, transaction: int = 1) -> Lease:
    return Lease(
        world.store, "n1", incarnation, "here", 4000, lambda: None, lambda _: None, transaction_id=lambda: transaction
    )


def test_a_renewal_whose_answer_was_lost_is_still_ours(world: World) -> None:
    held = lease(world, b"i" * 16)
    held.acquire()
    for landing in ([True], [False], [True, True], [True, False, True]):
        world.store.on_put = lost_answers(landing)
        for _ in landing:
            assert not held.renew()
        world.store.heal()
        assert held.renew()
        assert held.is_valid()
        assert not held.lost


def test_a_lease_that_another_start_took_is_lost(world: World) -> None:
    held = lease(world, b"i" * 16)
    held.acquire()
    lease(world, b"i" * 16).acquire()
    assert not held.renew()
    assert held.lost


def test_a_name_taken_without_an_answer_is_not_taken_for_a_holder_before(world: World) -> None:
    node = talk(world)
    lease(world, b"another hot tier").acquire()
    world.store.on_put = lost_answers([True])
    puts = world.store.on_put

    def first_is_lost(key, land):
        world.store.heal()
        return puts(key, land)

    world.store.on_put = first_is_lost
    take_node(lease(world, node.hot.incarnation), node.hot, 1 << 40)
    assert node.head.phase == PHASE_DOUBTED


def test_a_crash_while_the_name_is_taken_leaves_no_old_rows_that_are_believed(world: World) -> None:
    node = talk(world)
    lease(world, b"another hot tier").acquire()

    def killed(key, land):
        land()
        raise Killed

    world.store.on_put = killed
    with pytest.raises(Killed):
        take_node(lease(world, node.hot.incarnation), node.hot, 1 << 40)
    world.store.heal()
    # The next start finds its own lease; the rows were doubted before it was written.
    take_node(lease(world, node.hot.incarnation), node.hot, 1 << 40)
    assert node.head.phase == PHASE_DOUBTED


def test_an_older_copy_of_the_disk_is_another_hot_tier(world: World) -> None:
    node = talk(world)
    before = node.hot.incarnation
    lease(world, before, transaction=1 << 30).acquire()
    take_node(lease(world, before), node.hot, 5)
    assert node.hot.incarnation != before
    assert node.head.phase == PHASE_DOUBTED


def test_the_holder_before_is_believed_where_it_is_this_very_hot_tier(world: World) -> None:
    node = talk(world)
    lease(world, node.hot.incarnation).acquire()
    take_node(lease(world, node.hot.incarnation), node.hot, 1 << 40)
    assert node.head.phase == PHASE_OWNED


def test_a_store_that_never_tells_ends_the_attempt(tmp_path: Path) -> None:
    class Silent(FolderStore):
        def put(self, key, body, *, if_absent=False, if_match=None):
            raise Ambiguous(key, "503")

    held = Lease(Silent(tmp_path), "n1", b"i" * 16, "here", 4000, lambda: None, lambda _: None)
    with pytest.raises(Exception, match="no known outcome"):
        held.acquire()


def test_starts_that_fail_make_an_old_copy_of_the_disk_no_newer(tmp_path: Path) -> None:
    first = Environment(tmp_path / "hot", 1 << 24, 16, 8)
    first.bind_store(b"s" * 16)
    before = first.transaction_id
    first.close()
    for _ in range(3):
        # As far as a start comes that can't take its name.
        again = Environment(tmp_path / "hot", 1 << 24, 16, 8)
        again.check_store(b"s" * 16)
        assert again.opened_at == again.transaction_id == before
        again.close()
    again = Environment(tmp_path / "hot", 1 << 24, 16, 8)
    with pytest.raises(Invalid):
        again.check_store(b"t" * 16)
    again.close()
