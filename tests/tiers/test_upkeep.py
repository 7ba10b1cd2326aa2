"""How sessions end and leave a node: deletion, expiry, idle release, eviction, merging, each with the store failing.

Real hot tiers, flushers and upkeep in this process, over a folder that answers as a test tells it to, on a clock that
is moved by hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.core import rules
from sessiond.core.expiry import DAY_MS, day_of
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, Manifest
from sessiond.errors import Unavailable
from sessiond.tiers import compact
from sessiond.tiers.cloud.bucket import manifest_key
from sessiond.tiers.cloud.store import StoreUnavailable
from sessiond.tiers.hot import log
from sessiond.tiers.hot.rows import PHASE_OWNED, PHASE_RELEASED, PHASE_RELEASING, Head
from sessiond.tiers.hydrate import Segments, load
from sessiond.tiers.pace import FAILURES_MIN
from sessiond.tiers.steady import SteadyClock
from sessiond.tiers.upkeep import SLICE_ROWS, Upkeep
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.tiers.test_commits import (
    START_MS,
    Land,
    S,
    World,
    assistant,
    is_manifest,
    lost_answers,
    refused,
    unreadable,
    unsent,
    user,
)

IDLE_MS = 300_000
HOUR_MS = 3_600_000


class Node:
    """A node of the world with its upkeep, on the world's clock; sessions by name."""

    def __init__(self, world: World, hot_name: str = "hot", name: str = "n1") -> None:
        self.world = world
        self.live = world.node(hot_name, name)
        self.store = world.store
        self.upkeep = Upkeep(
            self.live.hot,
            world.store,
            world.bucket,
            self.live.node,
            self.live.flusher,
            tenants=lambda: ["default"],
            resumed_ms=self.live.sessions.ownership.resumed_ms,
            clock_ms=world.clock,
            steady_ms=world.clock,
            running_ms=world.clock,
            idle_release_ms=IDLE_MS,
            evict_at_percent=70,
            wait=lambda _: None,
        )

    def h(self, session: str) -> bytes:
        return rules.session_hash(self.world.bucket.hash_key, "default", session)

    def create(self, session: str, **expiry: int) -> None:
        policy = turn_pb2.SessionPolicy(expiry=turn_pb2.Expiry(**expiry)) if expiry else None
        request = session_pb2.CreateSessionRequest(session_id=session, policy=policy)
        self.world.run(self.live.sessions.create(self.live.call, request))

    def append(self, session: str, *turns: turn_pb2.TurnInput) -> None:
        request = session_pb2.AppendTurnRequest(session_id=session, turns=turns)
        self.world.run(self.live.sessions.append(self.live.call, request))

    def resume(self, session: str) -> context_pb2.ActiveContext:
        request = session_pb2.ResumeSessionRequest(
            session_id=session, context=context_pb2.ContextSpec(budget_tokens=100_000)
        )
        reply = self.world.run(self.live.sessions.resume(self.live.call, request))
        self.world.run(self.live.sessions.ownership.settle())
        return context_pb2.ActiveContext.FromString(reply)

    def get(self, session: str) -> session_pb2.Session:
        request = session_pb2.GetSessionRequest(session_id=session)
        return self.world.run(self.live.sessions.get(self.live.call, request)).session

    def delete(self, session: str) -> bool:
        request = session_pb2.DeleteSessionRequest(session_id=session)
        return self.world.run(self.live.sessions.delete(self.live.call, request)).deleted

    def tick(self, rounds: int = 3) -> None:
        """Upkeep, and after it what it asked the flusher for."""
        for _ in range(rounds):
            self.upkeep.tick()
            self.flush_dirty()

    def flush_dirty(self) -> None:
        with self.live.hot.read() as transaction:
            dirty = [bytes(key) for key, _ in transaction.scan("dirty", b"")]
        for h in dirty:
            self.live.flusher.request(h).result(timeout=20)
        # A release asked for in the background has a worker of its own: one more look behind it waits for it.
        with self.live.hot.read() as transaction:
            heads = [bytes(key) for key, _ in transaction.scan("heads", b"")]
        for h in heads:
            self.live.flusher.request(h).result(timeout=20)

    def head(self, session: str) -> Head | None:
        with self.live.hot.read() as transaction:
            return log.read_head(transaction, self.h(session))

    def manifest(self, session: str) -> Manifest:
        cold = load(self.store.folder, self.h(session))
        assert cold is not None
        return cold.manifest

    def keys(self, prefix: str, session: str) -> list[str]:
        return [row.key for row in self.store.folder.list(prefix, limit=100_000) if self.h(session).hex() in row.key]

    def days(self, session: str) -> list[int]:
        return [int(key.split("/")[2], 16) for key in self.keys("x/", session)]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def node(world: World) -> Node:
    return Node(world)


def talk(node: Node, session: str = S, **expiry: int) -> None:
    node.create(session, **expiry)
    node.append(session, user("t1", "one"), assistant("t2", "two"))


def reopened(node: Node) -> Node:
    """The same hot tier in a new process."""
    node.live.close()
    node.world.nodes.remove(node.live)
    return Node(node.world, node.live.hot_name, node.live.node.name)


# Deletion ----------------------------------------------------------------------------------------------------------


def test_a_deletion_whose_answer_was_lost_is_one_deletion(node: Node) -> None:
    talk(node)
    lose = lost_answers([True])
    node.store.on_put = lambda key, land: lose(key, land) if is_manifest(key) else land()
    assert node.delete(S)
    assert node.manifest(S).lifecycle == LIFECYCLE_DELETED
    assert node.head(S) is None
    node.store.heal()
    assert not node.delete(S)


def test_a_deletion_that_the_store_did_not_take_is_refused_reads_and_is_completed_later(node: Node) -> None:
    talk(node)
    node.flush_dirty()
    node.store.on_put = unsent
    with refused("DELETE_NOT_COMMITTED"):
        node.delete(S)
    for call in (node.resume, node.get):
        with refused("SESSION_DELETED"):
            call(S)
    with refused("SESSION_DELETED"):
        node.append(S, user("t3"))
    assert node.manifest(S).lifecycle == LIFECYCLE_ACTIVE
    again = reopened(node)
    with refused("SESSION_DELETED"):
        again.resume(S)
    again.store.heal()
    assert again.delete(S), "the call that saw it committed"
    assert again.manifest(S).lifecycle == LIFECYCLE_DELETED
    assert again.head(S) is None


def test_what_a_tombstone_leaves_behind_is_removed_after_a_crash_in_between(node: Node) -> None:
    node.create(S)
    for number in range(3):
        node.append(S, user(f"q{number}", "x" * 40_000), assistant(f"a{number}"))
        node.flush_dirty()
    assert node.keys("s/", S)

    def down(key: str) -> None:
        raise StoreUnavailable(key, "down")

    node.store.on_delete = down
    assert node.delete(S), "the tombstone stands, and so the session is deleted"
    assert node.keys("s/", S)
    again = reopened(node)
    again.store.heal()
    again.flush_dirty()
    assert again.keys("", S) == [manifest_key(again.h(S))]
    assert again.head(S) is None


def test_what_a_tombstone_leaves_behind_is_removed_although_the_node_lost_its_disk(world: World) -> None:
    node, other = Node(world), Node(world, "hot2", "n2")
    talk(node)
    node.flush_dirty()

    def silent(key: str) -> None:
        if not key.startswith("x/"):
            raise StoreUnavailable(key, "down")

    world.store.on_delete = silent
    assert node.delete(S)
    # The disk is gone before anything could be removed.
    world.store.heal()
    assert node.keys("u/", S)
    assert node.days(S) == [day_of(world.clock())]
    world.clock.now_ms += DAY_MS
    other.tick()
    assert not node.keys("u/", S)
    assert not node.keys("s/", S)
    assert node.days(S) == []
    assert node.manifest(S).lifecycle == LIFECYCLE_DELETED


def test_a_copy_that_nobody_has_used_for_a_day_is_dropped(world: World) -> None:
    node, other = Node(world), Node(world, "hot2", "n2")
    talk(node)
    node.live.release()
    assert other.delete(S)
    node.tick()
    assert node.head(S) is not None
    world.clock.now_ms += DAY_MS + 1
    node.tick()
    assert node.head(S) is None


def test_a_node_that_learns_of_a_deletion_elsewhere_lets_go_of_what_it_holds(world: World) -> None:
    first, second = Node(world, "first", "n1"), Node(world, "second", "n2")
    talk(first)
    first.live.flusher.request(first.h(S), release=True).result(timeout=20)
    assert first.head(S) is not None
    assert second.delete(S)
    with refused("SESSION_DELETED"):
        first.resume(S)
    first.flush_dirty()
    assert first.head(S) is None


# Expiry ------------------------------------------------------------------------------------------------------------


def test_a_sliding_session_expires_so_long_after_its_newest_append_and_reads_do_not_slide_it(node: Node) -> None:
    talk(node, ttl_ms=HOUR_MS)
    node.world.clock.now_ms += HOUR_MS - 1
    node.resume(S)
    node.append(S, user("t3"), assistant("t4"))
    node.world.clock.now_ms += HOUR_MS - 1
    node.resume(S)
    node.tick()
    assert node.get(S).lifecycle == session_pb2.LIFECYCLE_ACTIVE
    node.world.clock.now_ms += 1
    # From this very moment, whenever the node gets round to writing it down.
    assert node.get(S).lifecycle == session_pb2.LIFECYCLE_ARCHIVED
    with refused("SESSION_ARCHIVED"):
        node.append(S, user("t5"))
    node.tick()
    assert node.manifest(S).lifecycle == LIFECYCLE_ARCHIVED
    assert node.manifest(S).owner is None
    assert [turn.message.parts[0].text for turn in node.resume(S).turns] == ["one", "two", "hi", "ok"]
    with refused("SESSION_ARCHIVED"):
        node.append(S, user("t5"))
    assert node.days(S) == []


def test_a_fixed_session_expires_by_its_creation_and_is_deleted_where_its_policy_says_so(node: Node) -> None:
    talk(node, ttl_ms=HOUR_MS, mode=turn_pb2.EXPIRY_MODE_FIXED, action=turn_pb2.EXPIRY_ACTION_DELETE)
    node.world.clock.now_ms += HOUR_MS - 1
    node.append(S, user("t3"), assistant("t4"))
    node.world.clock.now_ms += 1
    with refused("SESSION_DELETED"):
        node.resume(S)
    node.tick()
    assert node.manifest(S).lifecycle == LIFECYCLE_DELETED
    assert node.keys("", S) == [manifest_key(node.h(S))]
    assert node.head(S) is None
    with refused("SESSION_DELETED"):
        node.create(S)


def test_the_expiry_index_names_the_day_and_is_written_only_when_the_day_changes(node: Node) -> None:
    talk(node, ttl_ms=10 * DAY_MS)
    assert node.days(S) == [day_of(START_MS + 10 * DAY_MS)]
    written: list[str] = []

    def on_put(key: str, land) -> str:
        written.append(key[0])
        return land()

    node.store.on_put = on_put
    for number in range(10):
        node.world.clock.now_ms += HOUR_MS
        node.append(S, user(f"q{number}"), assistant(f"a{number}"))
        node.flush_dirty()
    assert day_of(START_MS) == day_of(node.world.clock.now_ms), "the test is to stay within one day"
    assert written == ["m"] * 10
    node.world.clock.now_ms += DAY_MS
    node.append(S, user("next"), assistant("day"))
    node.flush_dirty()
    assert written[10:] == ["x", "m"]
    assert node.days(S) == [day_of(START_MS + 11 * DAY_MS)]


def test_expired_sessions_that_nobody_owns_end_by_one_listing_of_past_days(world: World) -> None:
    first = Node(world, "first", "n1")
    talk(first, "archive", ttl_ms=HOUR_MS)
    talk(first, "delete", ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    talk(first, "later", ttl_ms=5 * DAY_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    talk(first, "never")
    for name in ("archive", "delete", "later", "never"):
        first.live.flusher.request(first.h(name), release=True).result(timeout=20)
    world.clock.now_ms += 2 * DAY_MS
    second = Node(world, "second", "n2")
    listings: list[str] = []
    world.store.folder, plain = world.store.folder, world.store.folder.list

    def counted(prefix: str, start_after: str = "", limit: int = 1000):
        listings.append(prefix)
        return plain(prefix, start_after, limit)

    world.store.folder.list = counted  # type: ignore[method-assign]
    second.tick()
    del world.store.folder.list
    assert [prefix for prefix in listings if prefix.startswith("x/")] == [
        f"x/{world.bucket.tenant_hash('default').hex()}/"
    ]
    assert not any(prefix in ("", "m/", "s/", "u/") for prefix in listings)
    assert second.manifest("archive").lifecycle == LIFECYCLE_ARCHIVED
    assert second.keys("", "delete") == [manifest_key(second.h("delete"))]
    assert second.manifest("later").lifecycle == second.manifest("never").lifecycle == LIFECYCLE_ACTIVE
    assert (second.upkeep.done.archived, second.upkeep.done.deleted) == (1, 1)
    assert second.days("archive") == second.days("delete") == []
    assert len(second.resume("archive").turns) == 2
    # The first node still holds a released copy of what was deleted: it is never served.
    with refused("SESSION_DELETED"):
        first.resume("delete")


def test_a_released_session_ends_at_its_time_where_it_was_released(node: Node) -> None:
    talk(node, "archive", ttl_ms=HOUR_MS)
    talk(node, "delete", ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    for name in ("archive", "delete"):
        node.live.flusher.request(node.h(name), release=True).result(timeout=20)
    node.tick()
    node.world.clock.now_ms += HOUR_MS
    node.tick()
    assert node.manifest("archive").lifecycle == LIFECYCLE_ARCHIVED
    assert node.keys("", "delete") == [manifest_key(node.h("delete"))]
    assert node.days("archive") == node.days("delete") == []
    assert len(node.resume("archive").turns) == 2


def test_a_released_copy_of_a_session_that_went_on_elsewhere_ends_nothing(world: World) -> None:
    first, second = Node(world, "first", "n1"), Node(world, "second", "n2")
    talk(first, ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    first.live.flusher.request(first.h(S), release=True).result(timeout=20)
    world.clock.now_ms += HOUR_MS - 1
    second.append(S, user("t3"), assistant("t4"))
    second.live.flusher.request(second.h(S)).result(timeout=20)
    world.clock.now_ms += HOUR_MS - 1
    first.tick()
    assert second.manifest(S).lifecycle == LIFECYCLE_ACTIVE
    assert first.head(S) is None
    assert len(second.resume(S).turns) == 4
    assert second.days(S) == [day_of(START_MS + 2 * HOUR_MS)]


def test_what_cannot_be_read_and_what_another_node_owns_never_expires_here(world: World) -> None:
    first, second = Node(world, "first", "n1"), Node(world, "second", "n2")
    talk(first, "owned", ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    talk(first, "unread", ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    first.live.flusher.request(first.h("unread"), release=True).result(timeout=20)
    world.clock.now_ms += 2 * DAY_MS
    world.store.on_get = unreadable
    second.tick()
    world.store.heal()
    assert second.manifest("unread").lifecycle == LIFECYCLE_ACTIVE
    assert second.days("unread")
    second.upkeep._sweep_pause = 0
    second.tick()
    assert second.manifest("unread").lifecycle == LIFECYCLE_DELETED
    assert second.manifest("owned").lifecycle == LIFECYCLE_ACTIVE
    first.tick()
    assert first.manifest("owned").lifecycle == LIFECYCLE_DELETED


def test_a_stale_row_of_the_expiry_index_ends_nothing_and_goes(world: World) -> None:
    first = Node(world, "first", "n1")
    talk(first, ttl_ms=HOUR_MS)

    def down(key: str) -> None:
        raise StoreUnavailable(key, "down")

    world.clock.now_ms += DAY_MS // 2
    request = session_pb2.UpdateSessionRequest(
        session_id=S,
        turn_id="longer",
        change=turn_pb2.StateChange(policy=turn_pb2.SessionPolicy(expiry=turn_pb2.Expiry(ttl_ms=30 * DAY_MS))),
    )
    world.clock.now_ms -= DAY_MS // 2
    world.store.on_delete = down
    world.run(first.live.sessions.update(first.live.call, request))
    assert len(first.days(S)) == 2
    world.store.heal()
    first.live.flusher.request(first.h(S), release=True).result(timeout=20)
    world.clock.now_ms += 2 * DAY_MS
    second = Node(world, "second", "n2")
    second.tick()
    assert second.manifest(S).lifecycle == LIFECYCLE_ACTIVE
    assert second.days(S) == [day_of(START_MS + 30 * DAY_MS)]


def test_a_clock_that_jumps_forward_expires_nothing_and_one_that_runs_does() -> None:
    wall, boot, store = [START_MS], [1000], [None]
    steady = SteadyClock(lambda: wall[0], lambda: boot[0], lambda: store[0])
    wall[0] += 30 * DAY_MS
    assert steady() == START_MS
    boot[0] += HOUR_MS
    assert steady() == START_MS + HOUR_MS
    wall[0] = START_MS - DAY_MS
    assert steady() == START_MS - DAY_MS
    # The store's clock decides where it has one.
    wall[0], store[0] = START_MS + 30 * DAY_MS, START_MS + 20 * DAY_MS
    assert steady() == START_MS + 20 * DAY_MS


def test_a_clock_that_is_wrong_at_the_start_is_believed_only_when_nobody_corrects_it() -> None:
    wall, boot = [START_MS + 30 * DAY_MS], [1000]
    steady = SteadyClock(lambda: wall[0], lambda: boot[0], lambda: None, seen_ms=START_MS)
    assert steady() == START_MS
    boot[0] += HOUR_MS - 1
    assert steady() == START_MS + HOUR_MS - 1
    # It was right: the node was away for a month.
    boot[0] += 1
    assert steady() == START_MS + 30 * DAY_MS
    # And where a time server set it right meanwhile, nothing ever came of it.
    wall, boot = [START_MS + 30 * DAY_MS], [1000]
    steady = SteadyClock(lambda: wall[0], lambda: boot[0], lambda: None, seen_ms=START_MS)
    wall[0] = START_MS + 5000
    boot[0] += HOUR_MS
    assert steady() == START_MS + 5000
    # A node that was never seen, or a short while ago, is believed at once.
    assert SteadyClock(lambda: wall[0], lambda: boot[0], lambda: None, seen_ms=0)() == wall[0]
    assert SteadyClock(lambda: wall[0], lambda: boot[0], lambda: None, seen_ms=wall[0] - HOUR_MS)() == wall[0]


# Idle release and eviction -----------------------------------------------------------------------------------------


def test_an_idle_session_is_released_and_one_that_is_used_is_not(node: Node) -> None:
    for name in ("idle", "appended", "resumed"):
        talk(node, name)
    node.flush_dirty()
    node.world.clock.now_ms += IDLE_MS
    node.append("appended", user("t3"), assistant("t4"))
    node.resume("resumed")
    node.world.clock.now_ms += 1
    node.tick()
    assert node.head("idle").phase == PHASE_RELEASED
    assert node.head("appended").phase == node.head("resumed").phase == PHASE_OWNED
    assert node.manifest("idle").owner is None
    context = node.resume("idle")
    assert context.receipt.rung == context_pb2.RUNG_CLOUD
    assert node.head("idle").phase == PHASE_OWNED


def test_nothing_is_released_while_the_store_is_down(node: Node) -> None:
    talk(node)
    node.store.on_put = unsent
    for _ in range(FAILURES_MIN):
        with refused("STORE_UNAVAILABLE"):
            node.live.flusher.request(node.h(S)).result(timeout=20)
    assert node.live.flusher.failing
    node.world.clock.now_ms += 2 * IDLE_MS
    node.upkeep.tick()
    assert node.head(S).phase == PHASE_OWNED
    node.append(S, user("t3"))


def test_released_sessions_are_evicted_by_least_recent_use_and_come_back_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(world)
    names = [f"s{number:02}" for number in range(12)]
    for name in names:
        world.clock.now_ms += 1000
        talk(node, name)
    for name in names[:8]:
        node.live.flusher.request(node.h(name), release=True).result(timeout=20)
    asked = []

    def used_bytes() -> tuple[int, int]:
        # Above the watermark until four sessions are gone: as a map that fills up, without the megabytes.
        with node.live.hot.read() as transaction:
            held = transaction.entries("heads")
        asked.append(held)
        return (800 if held > 8 else 600), 1000

    monkeypatch.setattr(node.live.hot, "used_bytes", used_bytes)
    monkeypatch.setattr("sessiond.tiers.upkeep.EVICT_BATCH", 2)
    node.upkeep.tick()
    assert asked, "eviction did not look at the map"
    held = [name for name in names if node.head(name) is not None]
    assert held == names[4:]
    assert node.upkeep.done.evicted == 4
    for name in names:
        assert len(node.resume(name).turns) == 2
        assert not node.resume(name).receipt.missing


def test_every_session_is_looked_over_however_many_there_are(node: Node) -> None:
    talk(node)
    seen: set[bytes] = set()
    with node.live.hot.read() as transaction:
        known = {bytes(key) for key, _ in transaction.scan("heads", b"")}
    for index in range(3):
        seen |= {h for h, _ in node.upkeep._heads(1 if index else SLICE_ROWS)}
    assert seen == known


# The backlog -------------------------------------------------------------------------------------------------------


def background(node: Node, rounds: int) -> None:
    """What the flusher does by itself in so many half seconds."""
    flusher = node.live.flusher
    for _ in range(rounds):
        node.world.clock.now_ms += 500
        flusher._collect()
        flusher._feed()
        while flusher._running:
            time.sleep(0.0005)


def test_sessions_that_cannot_be_flushed_hold_up_no_others(node: Node) -> None:
    node.live.flusher._boot_ms = node.world.clock
    bad, good = [f"bad{number}" for number in range(5)], [f"good{number}" for number in range(3)]
    for name in (*bad, *good):
        talk(node, name)
    damned = {manifest_key(node.h(name)) for name in bad}

    def on_put(key: str, land: Land) -> str:
        if key in damned:
            raise StoreUnavailable(key, "503 for this key only")
        return land()

    node.store.on_put = on_put
    background(node, 40)
    assert [node.manifest(name).head for name in good] == [2, 2, 2]
    assert [node.manifest(name).head for name in bad] == [0] * 5
    # Nor do they come to stand in the way later, of what somebody waits for.
    refusals = 0
    for turn in range(20):
        node.append("good0", user(f"q{turn}"), assistant(f"r{turn}"))
        refused_with = node.live.flusher.request(node.h("good0")).exception(timeout=20)
        assert refused_with is None or isinstance(refused_with, Unavailable)
        refusals += refused_with is not None
        background(node, 2)
    assert refusals <= 5, "one time in four is too often"
    node.store.heal()
    background(node, 40)
    assert [node.manifest(name).head for name in bad] == [2] * 5


def test_after_an_outage_everything_goes_out_at_once_the_longest_waiting_first(node: Node) -> None:
    node.live.flusher._boot_ms = node.world.clock
    names = [f"s{number}" for number in range(20)]
    for name in names:
        node.world.clock.now_ms += 10
        talk(node, name)
    tried: list[str] = []

    def down(key: str, land: Land) -> str:
        tried.append(key)
        raise StoreUnavailable(key, "down")

    node.store.on_put = down
    background(node, 120)
    assert node.live.flusher.failing
    # A minute of outage: some tries, one at a time and on many sessions, and not thousands.
    assert 20 <= len(tried) <= 100
    assert len(set(tried)) > 10
    written: list[str] = []

    def up(key: str, land: Land) -> str:
        written.append(key)
        return land()

    node.store.on_put = up
    background(node, 6)
    assert not node.live.flusher.failing
    assert sorted(written) == sorted(manifest_key(node.h(name)) for name in names)


# Merging -----------------------------------------------------------------------------------------------------------


def long_session(node: Node, exchanges: int) -> None:
    node.create(S)
    for number in range(exchanges):
        node.append(S, user(f"q{number}", "x" * 70_000), assistant(f"a{number}"))
        node.live.flusher.flush(node.h(S), urgent=False)


def whole_log(node: Node) -> list[tuple[int, bytes]]:
    manifest = node.manifest(S)
    frames, last = Segments(node.store.folder).between(manifest, 1, manifest.head, 1 << 30)
    assert last == manifest.head
    return [(header.seq, header.chain) for header in compact.core.scan_frames(node.h(S), frames)]


def test_many_small_segments_become_one_and_the_old_ones_go_when_nobody_can_want_them(node: Node) -> None:
    long_session(node, compact.MERGE_SEGMENTS_MIN - 1)
    before, old = node.manifest(S), node.keys("s/", S)
    assert len(old) == compact.MERGE_SEGMENTS_MIN - 1
    node.append(S, user("more", "x" * 70_000), assistant("then"))
    node.live.flusher.flush(node.h(S), urgent=False)
    after = node.manifest(S)
    assert len(after.segments) == 1
    log_after = whole_log(node)
    assert [seq for seq, _ in log_after] == list(range(1, after.head + 1))
    # Whoever read the manifest just before still finds all that it names.
    frames, last = Segments(node.store.folder).between(before, 1, before.head, 1 << 30)
    assert last == before.head
    assert frames
    node.world.clock.now_ms += compact.REPLACED_KEPT_MS
    node.append(S, user("q-last"), assistant("a-last"))
    node.flush_dirty()
    left = node.keys("s/", S)
    assert left == [compact.row_key(after, after.segments[0])]
    node.append(S, user("q-very-last"), assistant("a-very-last"))
    node.flush_dirty()
    assert compact.replaced(node.manifest(S)) == []
    assert whole_log(node)[: len(log_after)] == log_after


def test_a_reader_whose_segment_is_gone_reads_the_manifest_again(node: Node) -> None:
    long_session(node, compact.MERGE_SEGMENTS_MIN - 1)
    before = node.manifest(S)
    node.append(S, user("more", "x" * 70_000), assistant("then"))
    node.live.flusher.flush(node.h(S), urgent=False)
    node.world.clock.now_ms += compact.REPLACED_KEPT_MS
    node.append(S, user("q-last"), assistant("a-last"))
    node.flush_dirty()
    segments = Segments(node.store.folder)
    _, last = segments.between(before, 1, before.head, 1 << 30)
    assert last == before.head
    # What is missing by the newest manifest, too, is an error and never a shorter log.
    newest = node.manifest(S)
    node.store.folder.delete(compact.row_key(newest, newest.segments[0]))
    with refused("MISSING_SEGMENT"):
        Segments(node.store.folder).between(before, 1, before.head, 1 << 30)


def test_a_merge_whose_commit_failed_leaves_every_segment_and_is_done_again(node: Node) -> None:
    long_session(node, compact.MERGE_SEGMENTS_MIN - 1)
    node.append(S, user("more", "x" * 70_000), assistant("then"))

    def no_manifest(key: str, land) -> str:
        if is_manifest(key):
            raise StoreUnavailable(key, "down")
        return land()

    node.store.on_put = no_manifest
    with refused("STORE_UNAVAILABLE"):
        node.live.flusher.flush(node.h(S), urgent=False)
    node.store.heal()
    again = reopened(node)
    assert len(again.manifest(S).segments) == compact.MERGE_SEGMENTS_MIN - 1
    assert [seq for seq, _ in whole_log(again)] == list(range(1, again.manifest(S).head + 1))
    again.live.flusher.flush(again.h(S), urgent=False)
    assert len(again.manifest(S).segments) == 1
    assert [seq for seq, _ in whole_log(again)] == list(range(1, again.manifest(S).head + 1))


def test_a_fenced_node_deletes_nothing_of_what_it_merged(world: World) -> None:
    first = Node(world, "first", "n1")
    long_session(first, compact.MERGE_SEGMENTS_MIN)
    assert len(first.manifest(S).segments) == 1
    before = first.keys("s/", S)
    second = Node(world, "second", "n2")
    assert second.live.take_over()
    world.clock.now_ms += compact.REPLACED_KEPT_MS
    first.live.flusher._hot.run_blocking(lambda transaction: _dirty(transaction, first.h(S)))
    with refused("EPOCH_FENCED"):
        first.live.flusher.flush(first.h(S))
    assert first.keys("s/", S) == before


def _dirty(transaction, h: bytes) -> None:
    head = log.read_head(transaction, h)
    assert head is not None
    head.changes += 1
    log.write_head(transaction, h, head, 1)


# What is not known -------------------------------------------------------------------------------------------------


def unheard_release(node: Node) -> None:
    """A release that lands and whose answer is lost, after which the store can't be reached at all."""
    node.store.on_put, node.store.on_get = lost_answers([True]), unreadable
    with refused("COMMIT_UNKNOWN"):
        node.live.flusher.flush(node.h(S), release=True)
    assert node.manifest(S).owner is None
    node.store.on_put = unsent


def test_a_release_that_may_have_landed_is_not_taken_back_by_a_later_failure(node: Node) -> None:
    talk(node)
    node.flush_dirty()
    unheard_release(node)
    for _ in range(2):
        with refused("STORE_UNAVAILABLE"):
            node.append(S, user("t3"))
    assert node.head(S).phase == PHASE_RELEASING
    node.store.heal()
    node.append(S, user("t3"), assistant("t4"))
    assert len(node.resume(S).turns) == 4
    assert not node.resume(S).receipt.missing


def test_a_release_nobody_heard_of_is_settled_without_being_asked_for(node: Node) -> None:
    talk(node)
    node.flush_dirty()
    unheard_release(node)
    node.store.heal()
    node.world.clock.now_ms += HOUR_MS
    node.tick()
    assert node.head(S).phase == PHASE_RELEASED


def test_no_object_goes_before_the_tombstone_stands(node: Node) -> None:
    node.create(S)
    node.append(S, user("big", "x" * 90_000), assistant("b2"))
    node.flush_dirty()
    unheard_release(node)
    # A deletion that the rows ask for while the manifest is active and released.
    node.live.hot.run_blocking(lambda transaction: _ask_deletion(transaction, node.h(S)))
    node.store.heal()

    def no_manifest(key: str, land: Land) -> str:
        if is_manifest(key):
            raise StoreUnavailable(key, "down")
        return land()

    node.store.on_put = no_manifest
    with refused("STORE_UNAVAILABLE"):
        node.live.flusher.flush(node.h(S))
    assert node.manifest(S).lifecycle == LIFECYCLE_ACTIVE
    assert node.keys("s/", S)
    node.store.heal()
    node.live.flusher.flush(node.h(S))
    assert node.manifest(S).lifecycle == LIFECYCLE_DELETED
    assert node.keys("", S) == [manifest_key(node.h(S))]


def _ask_deletion(transaction, h: bytes) -> None:
    head = log.read_head(transaction, h)
    assert head is not None
    head.lifecycle, head.phase = LIFECYCLE_DELETED, PHASE_RELEASED
    log.write_head(transaction, h, head, 1)


def test_a_deletion_that_another_node_fenced_is_not_said_to_be_done(world: World) -> None:
    first, second = Node(world, "first", "n1"), Node(world, "second", "n2")
    talk(first)
    first.flush_dirty()
    assert second.live.take_over()
    with refused("DELETE_NOT_COMMITTED"):
        first.delete(S)
    with refused("NOT_OWNER"):
        first.delete(S)
    second.append(S, user("t3"))
    assert second.manifest(S).lifecycle == LIFECYCLE_ACTIVE


def test_a_tombstone_whose_objects_are_still_there_is_finished_by_its_row_in_the_index(world: World) -> None:
    first = Node(world, "first", "n1")
    first.create(S, ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    first.append(S, user("big", "x" * 90_000), assistant("b2"))
    first.live.flusher.request(first.h(S), release=True).result(timeout=20)
    world.clock.now_ms += 2 * DAY_MS
    second = Node(world, "second", "n2")

    def down(key: str) -> None:
        raise StoreUnavailable(key, "down")

    world.store.on_delete = down
    second.tick()
    assert second.manifest(S).lifecycle == LIFECYCLE_DELETED
    assert second.keys("s/", S)
    world.store.heal()
    second.upkeep._sweep_pause = 0
    second.tick()
    assert second.keys("", S) == [manifest_key(second.h(S))]


def test_one_row_that_cannot_be_seen_to_holds_up_no_other_and_no_eviction(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Node(world, "first", "n1")
    names = [f"s{number}" for number in range(4)]
    for name in names:
        talk(first, name, ttl_ms=HOUR_MS)
        first.live.flusher.request(first.h(name), release=True).result(timeout=20)
    keys = sorted(manifest_key(first.h(name)) for name in names)
    world.clock.now_ms += 2 * DAY_MS

    def bad(key: str) -> None:
        if key == keys[0]:
            raise StoreUnavailable(key, "403 for this key only")

    world.store.on_get = bad
    second = Node(world, "second", "n2")
    second.tick()
    assert second.upkeep.done.archived == 3
    monkeypatch.setattr(first.live.hot, "used_bytes", lambda: (900, 1000))
    first.tick()
    assert all(first.head(name) is None for name in names)


def test_a_manifest_that_cannot_be_read_costs_no_sound_copy_of_the_session(node: Node) -> None:
    talk(node, ttl_ms=HOUR_MS, action=turn_pb2.EXPIRY_ACTION_DELETE)
    node.live.flusher.request(node.h(S), release=True).result(timeout=20)
    key = manifest_key(node.h(S))
    body = node.store.folder.get(key).body
    node.store.folder.put(key, body[:-7] + b"damaged")
    node.world.clock.now_ms += 2 * HOUR_MS
    node.tick()
    assert node.head(S) is not None
    assert node.upkeep.last_error == "CORRUPT_MANIFEST"


def test_a_clock_that_was_behind_takes_no_life_away() -> None:
    wall, boot = [START_MS], [1000]
    steady = SteadyClock(lambda: wall[0], lambda: boot[0], lambda: None)
    wall[0] -= 30 * DAY_MS
    assert steady() == START_MS - 30 * DAY_MS
    # What is made now counts its days from the real now, so that the correction ends nothing.
    assert steady.latest_ms() == START_MS


def test_a_session_used_under_another_clock_is_released_all_the_same(node: Node) -> None:
    talk(node)
    node.flush_dirty()
    node.world.clock.now_ms -= 30 * DAY_MS
    node.tick()
    assert node.manifest(S).owner is None


def test_segments_that_no_manifest_came_to_name_are_named_by_the_next(node: Node) -> None:
    node.create(S)

    def no_manifest(key: str, land: Land) -> str:
        if is_manifest(key):
            raise StoreUnavailable(key, "down")
        return land()

    node.store.on_put = no_manifest
    for number in range(6):
        node.append(S, user(f"q{number}", "x" * 70_000), assistant(f"a{number}"))
        with refused("STORE_UNAVAILABLE"):
            node.live.flusher.flush(node.h(S))
    node.store.heal()
    node.live.flusher.flush(node.h(S))
    manifest = node.manifest(S)
    assert sorted(compact.row_key(manifest, row) for row in manifest.segments) == sorted(node.keys("s/", S))
    assert [seq for seq, _ in whole_log(node)] == list(range(1, manifest.head + 1))
