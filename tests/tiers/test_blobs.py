"""Blobs between the tiers: whatever fails between object and manifest, what was acknowledged is what is read back.

Real hot tiers, flushers and claims in this process, over a folder that answers as a test tells it to (`test_commits`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sessiond.core import blobs as rules
from sessiond.daemon import doubt_all
from sessiond.errors import NotFound, SessiondError
from sessiond.service.rescue import Rescues
from sessiond.service.states import States
from sessiond.tiers import blobs, compact
from sessiond.tiers import flush as flushing
from sessiond.tiers.cloud.bucket import blob_key
from sessiond.tiers.hot import blobs as hot
from sessiond.tiers.hot import environment
from sessiond.tiers.hot.environment import Environment, Reader
from sessiond.tiers.hot.rows import PHASE_FENCED, PHASE_OWNED
from sessiond.tiers.hydrate import load
from sessiond.v1 import context_pb2, node_pb2, session_pb2, state_pb2, turn_pb2
from tests.tiers.test_commits import (
    CLOUD,
    Killed,
    Land,
    LiveNode,
    World,
    assistant,
    is_manifest,
    lost_answers,
    refused,
    talk,
    unreadable,
    user,
)

SCOPE = state_pb2.StateScope(session_id="s")
KEPT_MS = compact.REPLACED_KEPT_MS


@dataclass
class Blobs:
    """The blobs of the world's session, through one node."""

    node: LiveNode
    states: States = field(init=False)
    writes: int = 0

    def __post_init__(self) -> None:
        self.states = States(self.node.sessions._parts, self.node.sessions.ownership)

    def put(self, key: str, content: bytes, write_id: str = "", **fields: Any) -> state_pb2.PutStateResponse:
        self.writes += 1
        write_id = write_id or f"{self.node.node.name}-{self.node.hot_name}-{self.writes}"
        request = state_pb2.PutStateRequest(scope=SCOPE, key=key, content=content, write_id=write_id, **fields)
        return self.node.world.run(self.states.put(self.node.call, request))

    def delete(self, key: str, **fields: Any) -> bool:
        self.writes += 1
        write_id = f"{self.node.node.name}-{self.node.hot_name}-{self.writes}"
        request = state_pb2.DeleteStateRequest(scope=SCOPE, key=key, write_id=write_id, **fields)
        return self.node.world.run(self.states.delete(self.node.call, request)).deleted

    def get(self, key: str) -> state_pb2.GetStateResponse:
        reply = self.node.world.run(self.states.get(self.node.call, state_pb2.GetStateRequest(scope=SCOPE, key=key)))
        self.node.world.run(self.node.sessions.ownership.settle())
        return reply

    def all(self) -> dict[str, bytes]:
        request = state_pb2.ListStatesRequest(scope=SCOPE)
        listed = self.node.world.run(self.states.list_states(self.node.call, request))
        self.node.world.run(self.node.sessions.ownership.settle())
        return {header.key: self.get(header.key).content for header in listed.headers}


def objects(world: World) -> set[str]:
    return {row.key for row in world.store.list(f"b/{world.h.hex()}/")}


def named(world: World) -> set[str]:
    return {blobs.object_key(world.h, row) for row in rules.rows(world.manifest.state_keys)}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


# From one tier to the other ------------------------------------------------------------------------------------------


def test_a_release_and_a_claim_keep_every_blob_its_version_and_its_writes(world: World) -> None:
    first = Blobs(talk(world))
    versions = {key: first.put(key, key.encode() * 9).header.version for key in ("a", "b", "gone")}
    assert first.delete("gone")
    written = first.put("labelled", b"x", media_type="text/plain", labels={"b": "2", "a": "1"}, write_id="w")
    assert first.node.release().released
    second = Blobs(world.node("other", "n2"))
    found = second.get("a")
    assert (found.content, found.header.version, found.rung) == (b"a" * 9, versions["a"], context_pb2.RUNG_CLOUD)
    assert second.node.head.phase == PHASE_OWNED
    header = second.get("labelled").header
    assert (header.media_type, dict(header.labels)) == ("text/plain", {"a": "1", "b": "2"})
    assert header.updated_at_unix_ms == written.header.updated_at_unix_ms
    again = second.put("labelled", b"x", media_type="text/plain", labels={"a": "1", "b": "2"}, write_id="w")
    assert (again.duplicate, again.header.version) == (True, written.header.version)
    with refused("WRITE_ID_REUSED"):
        second.put("labelled", b"y", media_type="text/plain", labels={"a": "1", "b": "2"}, write_id="w")
    assert second.put("b", b"new", expected_version=versions["b"]).header.version > written.header.version
    assert second.all() == {"a": b"a" * 9, "b": b"new", "labelled": b"x"}


def test_a_claim_is_one_get_and_content_comes_with_the_first_read(world: World) -> None:
    first = Blobs(talk(world))
    first.put("a", b"1" * 100_000)
    first.put("b", b"2")
    first.node.release()
    second = Blobs(world.node("other", "n2"))
    gets: list[str] = []
    world.store.on_get = gets.append
    second.node.append(user("t3"))
    assert [key.partition("/")[0] for key in gets] == ["m"]
    # Neither a list nor a write needs any content.
    second.put("b", b"3")
    listed = world.run(second.states.list_states(second.node.call, state_pb2.ListStatesRequest(scope=SCOPE)))
    assert [header.size_bytes for header in listed.headers] == [100_000, 1]
    assert [key.partition("/")[0] for key in gets] == ["m"]
    assert [second.get("a").rung for _ in range(2)] == [context_pb2.RUNG_CLOUD, context_pb2.RUNG_HOT]
    assert [key.partition("/")[0] for key in gets] == ["m", "b"]


def test_only_the_newest_version_of_many_goes_to_the_cloud_tier(world: World) -> None:
    first = Blobs(talk(world))
    for number in range(20):
        first.put("a", b"%d" % number)
    first.node.flush()
    assert len(objects(world)) == 1
    first.node.append(user("t3"))
    first.node.flush()
    assert len(objects(world)) == 1, "a blob that did not change is not written again"


def test_turns_and_blobs_of_one_flush_are_of_one_moment(world: World) -> None:
    """A write that comes while objects are on their way is not half in the manifest."""
    first = Blobs(talk(world))
    first.put("a", b"before")

    def on_put(key: str, land: Land) -> str:
        if key.startswith("b/"):
            world.store.heal()
            first.put("a", b"after")
            first.node.append(user("t3"))
        return land()

    world.store.on_put = on_put
    first.node.flush()
    [row] = rules.rows(world.manifest.state_keys)
    assert (row[2], world.manifest.head) == (len(b"before"), 2)
    assert first.node.head.is_dirty
    first.node.flush()
    [row] = rules.rows(world.manifest.state_keys)
    assert (row[2], world.manifest.head) == (len(b"after"), 3)
    assert first.get("a").content == b"after"


def test_more_content_than_one_look_takes_is_committed_whole(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "LOOK_BYTES_MAX", 1000)
    first = Blobs(talk(world))
    for number in range(7):
        first.put(f"k{number}", b"x" * 400)
    # A blob that changes with every look must not hold the commit up for ever.
    count = 0

    def on_put(key: str, land: Land) -> str:
        nonlocal count
        if key.startswith("b/"):
            count += 1
            first.put("k0", b"%d" % count * 400)
        return land()

    world.store.on_put = on_put
    first.node.flush()
    world.store.heal()
    assert len(rules.rows(world.manifest.state_keys)) == 7
    assert named(world) <= objects(world)
    first.node.flush()
    assert first.all()["k0"] == b"%d" % count * 400


# What fails on the way -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("landed", [True, False], ids=["landed", "lost"])
@pytest.mark.parametrize("failing", range(1, 7))
def test_a_process_that_ends_at_any_request_loses_no_acknowledged_write(
    world: World, failing: int, landed: bool
) -> None:
    """The manifest and the objects are put one by one; the process ends at the n-th request, before or after it."""
    first = Blobs(talk(world))
    old = first.put("a", b"old").header.version
    first.put("b", b"stays")
    first.node.flush()
    new = first.put("a", b"new", write_id="w").header.version
    first.put("c", b"fresh")
    first.delete("b")
    first.node.append(user("t3"))
    puts = 0

    def on_put(key: str, land: Land) -> str:
        nonlocal puts
        puts += 1
        if puts < failing:
            return land()
        if landed:
            land()
        raise Killed

    world.store.on_put = on_put
    try:
        first.node.flush()
        assert puts < failing
    except Killed:
        pass
    world.store.heal()
    again = Blobs(world.restart(first.node))
    assert again.all() == {"a": b"new", "c": b"fresh"}
    assert old < again.get("a").header.version == new
    assert again.put("a", b"new", write_id="w").duplicate
    assert again.node.release().released
    assert named(world) <= objects(world)
    other = Blobs(world.node("other", "n2"))
    assert other.all() == {"a": b"new", "c": b"fresh"}
    assert other.put("a", b"third", expected_version=new).header.version > new


def test_a_write_whose_commit_was_lost_is_completed_by_the_same_write_id(world: World) -> None:
    first = Blobs(talk(world))
    first.node.flush()
    world.store.on_put, world.store.on_get = lost_answers([False] * 20), unreadable
    with pytest.raises(SessiondError) as failure:
        first.put("a", b"x", write_id="w", durability=CLOUD)
    assert failure.value.reason == "CLOUD_NOT_COMMITTED"
    version = int(failure.value.metadata["version"])
    assert "write_id" in failure.value.remedy
    assert first.get("a").header.durability != CLOUD
    world.store.heal()
    done = first.put("a", b"x", write_id="w", durability=CLOUD)
    assert (done.header.version, done.header.durability, done.duplicate) == (version, CLOUD, True)
    assert named(world) == objects(world)


def test_a_commit_whose_answer_was_lost_with_the_process_counts_no_later_write_as_flushed(world: World) -> None:
    first = Blobs(talk(world))
    first.put("a", b"1")

    def on_put(key: str, land: Land) -> str:
        land()
        if is_manifest(key):
            raise Killed
        return "unused"

    world.store.on_put = on_put
    with pytest.raises(Killed):
        first.node.flush()
    world.store.heal()
    first.put("a", b"2")
    first.node.flush()
    assert not first.node.head.is_dirty
    [row] = rules.rows(world.manifest.state_keys)
    assert int(row[1]) == first.get("a").header.version
    assert blobs.fetch(world.store, world.h, row) == b"2"


def test_an_older_disk_never_overwrites_newer_blobs(world: World) -> None:
    """Two processes of one incarnation, as after a copy of the disk was put back, which nothing else has noticed."""
    first = Blobs(talk(world))
    first.put("a", b"1")
    first.node.flush()
    (world.path / "copy").mkdir()
    first.node.hot._env.copy(str(world.path / "copy"))
    first.put("a", b"2")
    first.node.flush()
    first.node.close()
    world.nodes.remove(first.node)
    older = Blobs(world.node("copy"))
    older.put("a", b"other")
    with refused("HISTORY_DIVERGED"):
        older.node.flush()
    assert older.node.head.phase == PHASE_FENCED
    [row] = rules.rows(world.manifest.state_keys)
    assert blobs.fetch(world.store, world.h, row) == b"2"


def test_a_session_taken_over_says_what_may_be_missing_until_it_is_written_over_or_accepted(world: World) -> None:
    first = Blobs(talk(world, "first"))
    kept = first.put("a", b"flushed").header.version
    first.put("b", b"flushed")
    first.node.flush()
    lost = first.put("a", b"lost").header.version
    second = Blobs(world.node("second", "n2"))
    assert second.node.take_over()
    found = second.get("a")
    assert (found.content, found.header.version, found.rung) == (b"flushed", kept, context_pb2.RUNG_PARTIAL)
    [missing] = found.missing
    assert (missing.epoch, missing.after_version, missing.reason) == (1, kept + 1, 1)
    with pytest.raises(NotFound) as absent:
        second.get("never flushed")
    assert absent.value.metadata["missing_epoch"] == "1"
    # No version of the lost epoch is ever given out again.
    assert second.put("a", b"anew").header.version > lost
    assert not second.get("a").missing
    assert second.get("b").missing
    second.node.resume(accept_missing=1)
    assert not second.get("b").missing
    second.node.release()
    third = Blobs(world.node("third", "n3"))
    assert not third.get("b").missing, "it was accepted for good"


def test_a_session_that_only_takes_cloud_writes_has_none_to_miss(world: World) -> None:
    node = world.node()
    policy = turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_CLOUD)
    world.run(node.sessions.create(node.call, session_pb2.CreateSessionRequest(session_id="s", policy=policy)))
    first = Blobs(node)
    assert first.put("a", b"x").header.durability == CLOUD
    assert named(world) == objects(world)


# What is left behind -------------------------------------------------------------------------------------------------


def test_versions_that_were_replaced_go_after_two_minutes(world: World) -> None:
    first = Blobs(talk(world))
    first.put("a", b"1")
    first.put("b", b"1")
    first.node.flush()
    before = objects(world)
    first.put("a", b"2")
    first.delete("b")
    first.node.flush()
    assert objects(world) == before | named(world), "somebody may hold the manifest before"
    world.clock.now_ms += KEPT_MS
    first.node.append(user("t3"))
    first.node.flush()
    assert objects(world) == named(world)
    assert len(objects(world)) == 1
    first.node.append(assistant("t4"))
    first.node.flush()
    assert not compact.replaced(world.manifest)


def test_a_blob_that_is_written_all_the_time_leaves_a_bounded_list_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flushing, "BLOBS_REPLACED_MAX", 3)
    first = Blobs(talk(world))
    for number in range(12):
        first.put("a", b"%d" % number)
        first.node.flush()
    assert len(compact.replaced(world.manifest)) <= 4
    assert len(objects(world)) <= 5


def test_a_reader_whose_object_is_gone_reads_the_newer_one(world: World) -> None:
    first = Blobs(talk(world))
    first.put("a", b"1")
    first.node.flush()
    row = rules.rows(world.manifest.state_keys)[0]
    first.node.release()
    second = Blobs(world.node("other", "n2"))
    done = False

    def on_get(key: str) -> None:
        nonlocal done
        if key == blobs.object_key(world.h, row) and not done:
            # Between the reader's two reads somebody writes over it, and removes what was.
            done = True
            world.store.folder.delete(key)
            third = Blobs(world.node("third", "n3"))
            cold = load(world.store.folder, world.h)
            assert cold is not None
            assert third.node.claims.claim(cold, None, 7)
            content = b"newer"
            sha256 = hashlib.sha256(content).digest()
            asked = hot.Write("a", b"i" * 8, b"d" * 16, content, sha256, "", {}, None)
            third.node.hot.run_blocking(lambda txn: hot.write(txn, world.h, "s", asked, 8, 8, lambda: 8))
            third.node.release()

    world.store.on_get = on_get
    second.node.sessions.ownership.draining = True  # it reads, and claims nothing
    assert second.get("a").content == b"newer"
    assert done


def test_objects_that_no_manifest_came_to_name_are_removed(world: World) -> None:
    first = Blobs(talk(world))
    first.put("a", b"1")

    def on_put(key: str, land: Land) -> str:
        if is_manifest(key):
            raise Killed
        return land()

    world.store.on_put = on_put
    with pytest.raises(Killed):
        first.node.flush()
    world.store.heal()
    assert len(objects(world)) == 1
    first.put("a", b"2")
    first.node.flush()
    assert objects(world) == named(world)


# A node that comes back ---------------------------------------------------------------------------------------------


class Direct:
    """Calls the other node's rescue, as if over the network; remembers what it was offered."""

    def __init__(self, owner: LiveNode | None) -> None:
        self.owner = owner
        self.offered: list[node_pb2.RescueRequest] = []

    async def rescue(self, address: str, request: node_pb2.RescueRequest, timeout_s: float) -> node_pb2.RescueResponse:
        assert self.owner is not None
        self.offered.append(request)
        return await rescues(self.owner).apply(request)


def rescues(node: LiveNode, owner: LiveNode | None = None) -> Rescues:
    return Rescues(node.sessions._parts, node.sessions.ownership, Direct(owner))  # type: ignore[arg-type]


def fenced(world: World, turns: bool) -> tuple[Blobs, Blobs, dict[str, int]]:
    """A node that was taken over with unflushed blobs and knows it, its successor, and the versions acknowledged."""
    first = Blobs(talk(world, "first"))
    for key in ("a", "b", "gone", "both"):
        first.put(key, b"flushed")
    first.node.flush()
    versions = {"a": first.put("a", b"unflushed", write_id="w", labels={"l": "1"}).header.version}
    versions["new"] = first.put("new", b"unflushed").header.version
    first.put("both", b"unflushed")
    first.delete("gone")
    if turns:
        first.node.append(user("t3"))
    second = Blobs(world.node("second", "n2"))
    assert second.node.take_over()
    doubt_all(first.node.hot)
    first.node.flush()
    assert first.node.head.phase == PHASE_FENCED
    return first, second, versions


@pytest.mark.parametrize("turns", [False, True], ids=["blobs", "blobs and turns"])
def test_a_fenced_nodes_blobs_come_back_as_they_were_acknowledged_unless_they_were_written_since(
    world: World, turns: bool
) -> None:
    first, second, versions = fenced(world, turns)
    newer = second.put("both", b"since").header.version
    second.put("c", b"since")
    assert second.get("a").missing
    rescue = rescues(first.node, second.node)
    world.run(rescue.offer(world.h))
    assert rescue.outcomes == {"APPLIED": 1}
    with pytest.raises(AssertionError):
        _ = first.node.head
    due = {"a": b"unflushed", "b": b"flushed", "both": b"since", "c": b"since", "new": b"unflushed"}
    assert second.all() == due
    assert {key: second.get(key).header.version for key in versions} == versions
    assert second.get("both").header.version == newer
    assert not any(second.get(key).missing for key in due)
    again = second.put("a", b"unflushed", write_id="w", labels={"l": "1"})
    assert (again.duplicate, again.header.version) == (True, versions["a"])
    assert second.put("a", b"next", expected_version=versions["a"]).header.version > newer
    second.delete("new")
    # The same offer again, as after an answer that was lost, brings nothing back.
    [offered] = rescue._peers.offered  # type: ignore[attr-defined]
    assert world.run(rescues(second.node).apply(offered)).outcome == node_pb2.RESCUE_OUTCOME_KNOWN
    assert second.all() == {key: content for key, content in due.items() if key != "new"} | {"a": b"next"}
    second.node.release()
    assert named(world) <= objects(world)
    assert Blobs(world.node("third", "n3")).all()["a"] == b"next"


@pytest.mark.parametrize("landed", [True, False], ids=["landed", "lost"])
@pytest.mark.parametrize("failing", [1, 4, 8, 9, 10])
def test_a_fenced_node_takes_a_session_back_with_its_blobs_whatever_ends_it_on_the_way(
    world: World, failing: int, landed: bool
) -> None:
    first, second, versions = fenced(world, True)
    second.put("c", b"since")
    assert second.node.release().released
    puts = 0

    def on_put(key: str, land: Land) -> str:
        nonlocal puts
        puts += 1
        if puts < failing:
            return land()
        if landed:
            land()
        raise Killed

    world.store.on_put = on_put
    with suppress(Killed):
        world.run(rescues(first.node).offer(world.h))
    world.store.heal()
    again = Blobs(world.restart(first.node))
    with suppress(SessiondError):
        again.node.flush()
    world.run(rescues(again.node).offer(world.h))
    due = {"a": b"unflushed", "b": b"flushed", "both": b"unflushed", "c": b"since", "new": b"unflushed"}
    assert again.all() == due
    assert {key: again.get(key).header.version for key in versions} == versions
    assert not any(again.get(key).missing for key in due)
    again.node.release()
    assert named(world) <= objects(world)


def test_a_fenced_node_that_is_asked_for_a_session_nobody_owns_claims_it_with_its_blobs(world: World) -> None:
    first, second, versions = fenced(world, False)
    assert second.node.release().released
    assert first.get("a").missing, "read from the cloud tier, before the claim behind it"
    assert first.get("a").content == b"unflushed"
    assert {key: first.get(key).header.version for key in versions} == versions
    assert not first.get("b").missing
    assert named(world) <= objects(world)


def test_writes_of_an_older_disk_are_not_mixed_with_those_that_went_on_without_it() -> None:
    def ledger(*entries: int, loss: list[list[int]] | None = None) -> rules.Ledger:
        made = rules.Ledger(loss=loss or [])
        for entry in entries:
            made.note(b"%08d" % entry, bytes(16), (1 << 32) + entry, 0)
        return made

    def keys(made: rules.Ledger) -> dict[str, Any]:
        return {"last": made.last, "writes": made.writes, "rows": [], "loss": made.loss}

    rescue = rules.Rescue(1, keys(ledger(1)), keys(ledger(1, 3)))
    assert rescue.is_moot(ledger(1, 2, loss=[[1, 0, 1, 0]])), "write 2 was made under this epoch, and not on this disk"
    assert not rescue.is_moot(ledger(1, loss=[[1, 0, 1, 0]]))
    assert rescue.joined(keys(ledger(1, loss=[[1, 0, 1, 0]])))["writes"] == ledger(1, 3).writes
    assert rescue.joined(keys(ledger(1, loss=[[1, 0, 1, 0]])))["loss"] == []


# Forks ---------------------------------------------------------------------------------------------------------------


def test_a_copy_of_a_sessions_blobs_stands_by_itself(world: World) -> None:
    first = Blobs(talk(world))
    for key in ("b", "a", "c"):
        first.put(key, key.encode())
    first.delete("c")
    first.node.flush()
    parent = world.manifest
    child = replace(parent, h=b"c" * 16, session="child", epoch=7)
    copied = blobs.copy_blobs(world.store, parent, child, lambda key, body: world.store.put(key, body))
    rows = rules.rows(copied)
    assert [(row[0], row[1]) for row in rows] == [("a", (7 << 32) + 2), ("b", (7 << 32) + 1)]
    assert [blobs.fetch(world.store, child.h, row) for row in rows] == [b"a", b"b"]
    assert rules.ledger_of(copied).next_version(7) == (7 << 32) + 3
    assert {blobs.object_key(child.h, row) for row in rows}.isdisjoint(objects(world))


# Older environments --------------------------------------------------------------------------------------------------


def test_an_environment_of_an_older_release_opens_and_reads_as_one_without_blobs(tmp_path: Path) -> None:
    made = World(tmp_path)
    first = talk(made)
    first.release()
    h = made.h
    made.close()
    env = lmdb.open(str(tmp_path / "hot"), max_dbs=16, map_size=1 << 30, lib_version=0)
    with env.begin(write=True) as raw:
        for name in environment.LATER_TABLES:
            raw.drop(env.open_db(name.encode(), raw))
    env.close()
    reader = Reader(tmp_path / "hot")
    with reader.read() as transaction:
        assert hot.read_ledger(transaction, h) is None
        assert list(hot.read_blobs(transaction, h)) == []
        assert transaction.entries("states") == 0
        assert not list(hot.damage(transaction, h))
    reader.close()
    opened = Environment(tmp_path / "hot", 1 << 30, 16, 8)
    assert opened._tables.keys() == set(environment.TABLES)
    opened.close()


# Any order -----------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(["a", "b", "ü" * 128, "a/b", "a\xff"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, st.binary(max_size=40)),
        st.tuples(st.just("delete"), KEYS),
        st.sampled_from([("flush",), ("release",), ("restart",), ("move",), ("turn",), ("two minutes",)]),
    ),
    max_size=25,
)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whatever_happens_between_the_tiers_the_newest_write_is_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, ...]]
) -> None:
    world = World(tmp_path_factory.mktemp("world"))
    try:
        at = Blobs(talk(world))
        due: dict[str, tuple[bytes, int]] = {}
        newest = turns = moves = 0
        for number, step in enumerate(steps):
            match step:
                case ("put", key, content):
                    header = at.put(key, content, expected_version=due.get(key, (b"", 0))[1]).header
                    assert header.version > newest
                    newest = header.version
                    due[key] = content, newest
                case ("delete", key):
                    assert at.delete(key) == (due.pop(key, None) is not None)
                case ("flush",):
                    at.node.flush()
                    assert not at.node.head.is_dirty
                case ("release",):
                    at.node.release()
                case ("restart",):
                    at = Blobs(world.restart(at.node), writes=number * 100)
                case ("move",):
                    at.node.release()
                    moves += 1
                    at = Blobs(world.node(f"hot{moves}", f"n{moves + 1}"))
                case ("turn",):
                    turns += 1
                    at.node.append(user(f"x{turns}"))
                case ("two minutes",):
                    world.clock.now_ms += KEPT_MS
            assert at.all() == {key: content for key, (content, _) in due.items()}
        at.node.release()
        assert named(world) <= objects(world)
        assert {row[0]: blobs.fetch(world.store, world.h, row) for row in rules.rows(world.manifest.state_keys)} == {
            key: content for key, (content, _) in due.items()
        }
    finally:
        world.close()


def test_the_name_of_an_object_is_its_version_and_its_sha256(world: World) -> None:
    first = Blobs(talk(world))
    first.put("a", b"1")
    first.node.flush()
    [row] = rules.rows(world.manifest.state_keys)
    assert objects(world) == {blob_key(world.h, int(row[1]), bytes(row[7]))}
