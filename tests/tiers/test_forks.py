"""Forks between the tiers: cut short at every request to the store, and what their pins keep and let go of.

Real hot tiers, flushers and claims in this process, over a folder that answers as a test tells it to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sessiond import config
from sessiond.core import manifest as manifests
from sessiond.core import rules
from sessiond.core.manifest import LIFECYCLE_DELETED, Manifest
from sessiond.errors import Corrupt, SessiondError
from sessiond.service import forks as fork_service
from sessiond.service.forks import Forks
from sessiond.tiers import compact, fork, pins
from sessiond.tiers.cloud.bucket import manifest_key
from sessiond.tiers.cloud.store import Ambiguous, StoreUnavailable
from sessiond.tiers.hot import log
from sessiond.tiers.hot.rows import PHASE_CLAIMING, PHASE_OWNED
from sessiond.tiers.hydrate import Segments, load
from sessiond.v1 import context_pb2, session_pb2
from sessiond.verify import verify
from tests.tiers.test_commits import Killed, Land, LiveNode, S, World, assistant, is_manifest, refused, system, user

LARGE = "k " * 40_000
F = "fork"
TURNS = 6
AT = 5


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def talk(world: World, node: LiveNode) -> None:
    """The parent: some turns in a segment, some in the manifest, some not flushed."""
    node.create()
    node.append(system("t1", "Be brief."), user("t2", LARGE), assistant("t3"))
    node.flush()
    node.append(user("t4"), assistant("t5"), user("t6"))


def asked(node: LiveNode, new: str = F, seq: int = AT, session: str = S) -> session_pb2.ForkSessionResponse:
    request = session_pb2.ForkSessionRequest(session_id=session, new_session_id=new, seq=seq)
    parts = node.sessions._parts
    forks = Forks(parts, node.sessions.ownership, node.sessions)
    return node.world.run(forks.fork(node.call, request))


def resumed(node: LiveNode, session: str = F, budget: int = 200_000, **fields: Any) -> context_pb2.ActiveContext:
    spec = context_pb2.ContextSpec(budget_tokens=budget)
    request = session_pb2.ResumeSessionRequest(session_id=session, context=spec, **fields)
    reply = node.world.run(node.sessions.resume(node.call, request))
    node.world.run(node.sessions.ownership.settle())
    return context_pb2.ActiveContext.FromString(reply)


def deleted(node: LiveNode, session: str) -> bool:
    request = session_pb2.DeleteSessionRequest(session_id=session)
    done = node.world.run(node.sessions.delete(node.call, request)).deleted
    node.flusher.flush(hash_of(node.world, session))
    return bool(done)


def hash_of(world: World, session: str) -> bytes:
    return rules.session_hash(world.bucket.hash_key, "default", session)


def manifest_of(world: World, session: str) -> Manifest:
    cold = load(world.store.folder, hash_of(world, session))
    assert cold is not None
    return cold.manifest


def segments_of(world: World, session: str) -> list[str]:
    return [row.key for row in world.store.folder.list(f"s/{hash_of(world, session).hex()}/")]


def check_clean(world: World, hot_name: str) -> None:
    """End every node, then have verify look at what they leave."""
    for node in world.nodes:
        node.close()
    world.nodes.clear()
    settings = config.load(None, {}, {"data_dir": str(world.path), "cloud": f"file://{world.path / 'cloud'}"})
    assert hot_name == settings.hot_dir.name
    found = [(each.invariant, each.explanation) for each in verify(settings, lambda *_: None)]
    assert found == []


class Counted:
    """Does something to the nth request to the store, counted from 1, and lets the others pass."""

    def __init__(self, world: World, nth: int, strike: Callable[[str, Land | None], str]) -> None:
        self.count = 0
        self._nth, self._strike = nth, strike
        world.store.on_put, world.store.on_get, world.store.on_delete = self.put, self.get, self.get

    def _hits(self) -> bool:
        self.count += 1
        return self.count == self._nth

    def put(self, key: str, land: Land) -> str:
        return self._strike(key, land) if self._hits() else land()

    def get(self, key: str) -> None:
        if self._hits():
            self._strike(key, None)


def killed_before(key: str, land: Land | None) -> str:
    raise Killed


def killed_after(key: str, land: Land | None) -> str:
    if land is not None:
        land()
    raise Killed


def unanswered(key: str, land: Land | None) -> str:
    if land is None:
        raise StoreUnavailable(key, "down")
    land()
    raise Ambiguous(key, "timeout")


def unsent(key: str, land: Land | None) -> str:
    raise StoreUnavailable(key, "down")


@pytest.mark.parametrize(
    "strike", [killed_before, killed_after, unanswered, unsent], ids=lambda strike: strike.__name__
)
def test_a_fork_that_is_cut_short_at_any_request_is_finished_by_the_same_call(
    tmp_path: Path, strike: Callable[[str, Land | None], str]
) -> None:
    finished_alone = False
    for nth in range(1, 40):
        world = World(tmp_path / str(nth))
        try:
            node = world.node()
            talk(world, node)
            struck = Counted(world, nth, strike)
            try:
                asked(node)
                finished_alone = struck.count < nth
            except (Killed, SessiondError):
                pass
            world.store.heal()
            if strike in (killed_before, killed_after):
                node = world.restart(node)
            made = asked(node).session
            assert (made.head.seq, made.forked_at.seq, made.epoch) == (AT, AT, 2)
            again = asked(node)
            assert (again.created, again.session.session_id) == (False, F)
            # Whole, owned here, nothing missing, and it goes on.
            found = resumed(node)
            assert ([turn.turn_id for turn in found.turns], list(found.receipt.missing)) == (
                ["t2", "t3", "t4", "t5"],
                [],
            )
            request = session_pb2.AppendTurnRequest(session_id=F, turns=[user("n6"), assistant("t3")])
            reply = world.run(node.sessions.append(node.call, request))[1]
            assert [(turn.position.seq, turn.duplicate) for turn in reply.turns] == [(6, False), (3, True)]
            assert node.append(user("t7")).head.seq == TURNS + 1
            with node.hot.read() as transaction:
                head = log.read_head(transaction, hash_of(world, F))
            assert head is not None
            assert head.phase == PHASE_OWNED
            assert len(manifest_of(world, S).pins) == 1
            node.flusher.flush(world.h)
            node.flusher.flush(hash_of(world, F))
            if strike in (killed_before, killed_after):
                check_clean(world, node.hot_name)
        finally:
            world.close()
        if finished_alone:
            break
    assert finished_alone
    assert nth > 6


def test_the_range_is_pinned_before_anything_names_it(world: World) -> None:
    node = world.node()
    talk(world, node)
    order: list[str] = []

    def on_put(key: str, land: Land) -> str:
        if is_manifest(key):
            order.append(key)
        if key == manifest_key(hash_of(world, F)):
            pinned = manifest_of(world, S)
            assert pins.is_pinned(pinned, hash_of(world, F), AT)
            assert pinned.sealed_seq == AT  # what is named ends where it was forked
        return land()

    world.store.on_put = on_put
    asked(node)
    assert order == [manifest_key(world.h), manifest_key(hash_of(world, F))]
    fork_manifest = manifest_of(world, F)
    assert {bytes(row[8]) for row in fork_manifest.segments} == {world.h}
    assert (fork_manifest.payload, fork_manifest.kept) == (b"", [])
    # Nor is anything of the parent's in what the fork flushes later.
    request = session_pb2.AppendTurnRequest(session_id=F, turns=[user("n6", "mine"), assistant("n7", "yes")])
    world.run(node.sessions.append(node.call, request))
    node.flusher.flush(hash_of(world, F))
    own = manifest_of(world, F)
    assert (own.inline_first, own.kept) == (AT + 1, [])
    assert b"Be brief." not in own.payload


def test_a_creation_and_a_fork_under_one_id_leave_one_session_that_is_whole(world: World) -> None:
    node = world.node()
    talk(world, node)
    mine = manifest_key(hash_of(world, F))

    def killed_at_the_fork(key: str, land: Land) -> str:
        if key == mine:
            raise Killed
        return land()

    world.store.on_put = killed_at_the_fork
    with pytest.raises(Killed):
        asked(node)
    world.store.heal()
    node = world.restart(node)
    assert node.sessions.ownership.peek(hash_of(world, F)).phase == PHASE_CLAIMING  # type: ignore[union-attr]
    created = world.run(node.sessions.create(node.call, session_pb2.CreateSessionRequest(session_id=F)))
    assert created.created
    with refused("SESSION_EXISTS"):
        asked(node)
    node = world.restart(node)
    found = resumed(node)
    assert (len(found.turns), list(found.receipt.missing), found.receipt.rung) == (0, [], context_pb2.RUNG_HOT)


def test_a_reset_waits_where_waiting_can_help(world: World) -> None:
    node = world.node()
    talk(world, node)
    node.release()
    node = world.restart(node)

    def down(key: str) -> None:
        raise StoreUnavailable(key, "down")

    world.store.on_get = down
    with refused("STORE_UNAVAILABLE"):
        resumed(node, S, reset_to_session_id="new")
    world.store.heal()
    assert load(world.store.folder, hash_of(world, "new")) is None
    assert resumed(node, S, reset_to_session_id="new").receipt.rung == context_pb2.RUNG_CLOUD


def test_merging_the_parents_segments_leaves_what_forks_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact, "MERGE_SEGMENTS_MIN", 3)
    node = world.node()
    node.create()

    def grow(first: int, count: int) -> None:
        for number in range(first, first + count):
            node.append(user(f"u{number}", LARGE), assistant(f"a{number}"))
            node.flusher.flush(world.h, urgent=False)

    grow(0, 2)
    asked(node, F, 4)
    named = segments_of(world, S)
    grow(2, 6)
    assert node.flusher.merges >= 1
    world.clock.now_ms += compact.REPLACED_KEPT_MS
    before = segments_of(world, S)
    grow(8, 1)
    left = segments_of(world, S)
    assert len(set(before) - set(left)) >= 3  # what the merge replaced is gone by now
    assert set(named) <= set(left)
    node = world.restart(node)
    assert len(resumed(node).turns) == 4
    node.flusher.flush(world.h)
    check_clean(world, node.hot_name)


def test_a_long_fork_that_comes_back_fetches_its_instructions_and_its_newest_turns_alone(world: World) -> None:
    node = world.node()
    node.create()
    node.append(system("s", "Be brief."))
    for number in range(6):
        node.append(user(f"u{number}", LARGE), assistant(f"a{number}", f"answer {number}"))
        node.flush()
    asked(node, F, 13)
    assert node.flusher.flush(hash_of(world, F), release=True).released
    node = world.restart(node)
    fetched: list[str] = []

    def on_get(key: str) -> None:
        if key.startswith("s/"):
            fetched.append(key)

    for rung in (context_pb2.RUNG_CLOUD, context_pb2.RUNG_CLOUD, context_pb2.RUNG_HOT, context_pb2.RUNG_HOT):
        world.store.on_get = on_get
        node.sessions._parts.segments = Segments(world.store)
        found = resumed(node, F, budget=1000)
        assert (found.receipt.rung, found.instructions.turn_id) == (rung, "s")
        assert [turn.turn_id for turn in found.turns] == ["a5"]
        assert len(fetched) == (0 if rung == context_pb2.RUNG_HOT else 2)
        fetched.clear()


def test_verify_tells_of_a_fork_that_its_parent_does_not_know_of(world: World) -> None:
    node = world.node()
    talk(world, node)
    asked(node)
    node.release()
    cold = load(world.store.folder, world.h)
    assert cold is not None
    world.store.folder.put(manifest_key(world.h), manifests.seal(replace(cold.manifest, pins=[])))
    with pytest.raises(AssertionError, match="does not pin turns 1 to 5"):
        check_clean(world, node.hot_name)


# Pins -------------------------------------------------------------------------------------------------------------


def test_what_a_pin_keeps_goes_with_the_last_session_that_may_need_it(world: World) -> None:
    node = world.node()
    talk(world, node)
    asked(node)
    asked(node, "second", 3, F)
    parent, child = manifest_of(world, S), manifest_of(world, F)
    now_ms = world.clock()
    day_ms = pins.UNUSED_PIN_KEPT_MS

    def needed(whose: Manifest, at_ms: int = now_ms) -> list[str]:
        return [row[1] for row in pins.needed(world.store, whose, at_ms)]

    assert (needed(parent), needed(child)) == ([F], ["second"])
    # One that nobody made: it may be on its way, for a day.
    parent.pins.append([hash_of(world, "never"), "never", 1, 3, now_ms])
    assert needed(parent, now_ms + day_ms - 1) == [F, "never"]
    assert needed(parent, now_ms + day_ms) == [F]
    # An id that another session took.
    node.world.run(node.sessions.create(node.call, session_pb2.CreateSessionRequest(session_id="never")))
    assert needed(parent) == [F]
    # A deleted fork is needed for as long as its own forks are.
    assert deleted(node, F)
    assert needed(manifest_of(world, S)) == [F]
    assert deleted(node, "second")
    assert needed(manifest_of(world, S)) == []

    def unreadable(key: str) -> None:
        raise StoreUnavailable(key, "down")

    world.store.on_get = unreadable
    with refused("STORE_UNAVAILABLE"):
        needed(manifest_of(world, S))


def test_a_fork_whose_manifest_is_damaged_keeps_what_it_needs(world: World) -> None:
    node = world.node()
    talk(world, node)
    asked(node)
    kept = segments_of(world, S)
    name = manifest_key(hash_of(world, F))
    sound = world.store.folder.get(name).body
    world.store.folder.put(name, sound[:-40] + bytes(40))
    with pytest.raises(Corrupt):
        manifest_of(world, F)
    assert deleted(node, S)
    assert segments_of(world, S) == kept
    assert [row[1] for row in manifest_of(world, S).pins] == [F]
    world.store.folder.put(name, sound)
    assert resumed(node).turns


def test_a_node_with_old_rows_removes_nothing_that_a_fork_elsewhere_names(world: World) -> None:
    old = world.node("old", "n1")
    talk(world, old)
    assert old.release().released
    new = world.node("new", "n2")
    assert resumed(new, S).turns
    asked(new)
    assert deleted(new, S)
    kept = segments_of(world, S)
    assert kept
    # The first node hears of the deletion, and sweeps what it knows of from before the fork.
    with refused("SESSION_DELETED"):
        resumed(old, S)
    old.flush()
    assert segments_of(world, S) == kept
    assert [turn.turn_id for turn in resumed(new).turns] == ["t2", "t3", "t4", "t5"]


@pytest.mark.parametrize("nth", [1, 2, 3, 5, 7, 9])
def test_a_line_of_deleted_forks_is_let_go_of_wherever_it_was_cut_short(world: World, nth: int) -> None:
    node = world.node()
    talk(world, node)
    asked(node)
    asked(node, "second", 4, F)
    assert deleted(node, S)
    assert deleted(node, F)
    assert segments_of(world, S)
    request = session_pb2.DeleteSessionRequest(session_id="second")
    Counted(world, nth, killed_after)
    with contextlib.suppress(Killed, SessiondError):
        world.run(node.sessions.delete(node.call, request))
    world.store.heal()
    node = world.restart(node)
    world.run(node.sessions.delete(node.call, request))
    node.flusher.flush(hash_of(world, "second"))
    for session in (S, F, "second"):
        assert segments_of(world, session) == []
        found = manifest_of(world, session)
        assert (found.lifecycle, found.pins) == (LIFECYCLE_DELETED, [])
    check_clean(world, node.hot_name)


def test_forks_have_a_limit_that_deleted_ones_do_not_count_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_service, "PINS_MAX", 3)
    node = world.node()
    talk(world, node)
    for number in range(3):
        asked(node, f"f{number}")
    with refused("TOO_MANY_FORKS"):
        asked(node, "f3")
    assert not asked(node, "f1").created
    # A fork of a fork has a limit of its own.
    asked(node, "g0", 4, "f0")
    assert deleted(node, "f1")
    asked(node, "f3")
    assert [row[1] for row in manifest_of(world, S).pins] == ["f0", "f2", "f3"]


def test_a_fork_of_many_segments_has_an_index_of_its_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "SEGMENT_ROWS_MAX", 3)
    monkeypatch.setattr(compact, "SEGMENT_ROWS_KEPT", 2)
    node = world.node()
    node.create()
    for number in range(6):
        node.append(user(f"u{number}", LARGE), assistant(f"a{number}"))
        node.flush()
    asked(node, F, 11)
    made = manifest_of(world, F)
    assert made.index is not None
    assert str(made.index[0]).startswith(f"s/{hash_of(world, F).hex()}/index-")
    assert len(made.segments) == 2
    asked(node, "second", 9, F)
    for session, count in ((F, 11), ("second", 9)):
        request = session_pb2.ListTurnsRequest(session_id=session, page_size=100)
        frames, _ = world.run(node.sessions.list_turns(node.call, request))
        assert [turn.seq for turn in session_pb2.ListTurnsResponse.FromString(frames).turns] == list(
            range(1, count + 1)
        )
    check_clean(world, node.hot_name)


def test_a_fork_begins_above_its_turn_and_carries_what_was_lost_below_it(world: World) -> None:
    node = world.node("first", "n1")
    talk(world, node)
    node.flush()
    other = world.node("second", "n2")
    assert other.take_over()  # turns after 6 of epoch 1 may be missing
    other.append(user("u7"), assistant("u8"))
    below, above = asked(other, "below", 6).session, asked(other, "above", 8).session
    assert (below.epoch, above.epoch) == (2, 3)
    assert ([row.epoch for row in below.missing], [row.epoch for row in above.missing]) == ([], [1])
    assert manifest_of(world, "below").epochs[-1][:3] == [2, other.hot.incarnation, 7]
    assert [row[0] for row in manifest_of(world, "above").epochs] == [1, 2, 3]
    found = resumed(other, "above", accept_missing=1)
    assert (found.receipt.rung, list(found.receipt.missing)) == (context_pb2.RUNG_CLOUD, [])
    assert resumed(other, S).receipt.rung == context_pb2.RUNG_PARTIAL
