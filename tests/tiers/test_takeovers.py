"""Sessions that change hands while answers are late or lost: no reply leaves out what was acknowledged before it.

Real nodes in this process, over a folder that answers as a test tells it to (test_commits.py).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sessiond.service.ownership import OwnedElsewhere
from sessiond.tiers.cloud.store import Ambiguous, Stored, StoreUnavailable
from sessiond.tiers.hot.rows import PHASE_FENCED, PHASE_RELEASING
from sessiond.tiers.hydrate import Segments
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.tiers.test_commits import PATIENCE_S, Land, S, World, is_manifest, refused, talk, user


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world of one session."""
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def test_a_release_that_may_have_landed_is_not_taken_back_while_its_manifest_cannot_be_read(world: World) -> None:
    first, second = talk(world, "first", "n1"), world.node("second", "n2")
    puts: list[str] = []
    gets: list[str] = []

    def on_put(key: str, land: Land) -> str:
        if not is_manifest(key) or puts:
            return land()
        puts.append(key)
        land()
        # The release stands, its answer is lost, and another node takes what nobody owns.
        assert second.take_over()
        second.append(user("t3", "only the second node has heard of this"))
        raise Ambiguous(key, "timeout")

    def on_get(key: str) -> None:
        if is_manifest(key) and puts:
            gets.append(key)
            if len(gets) > 1:
                raise StoreUnavailable(key, "down")

    world.store.on_put, world.store.on_get = on_put, on_get
    with refused("COMMIT_UNKNOWN"):
        first.release()
    assert len(gets) == 2
    # What it has is not the whole log any more: it must not be served as if it were.
    assert first.head.phase == PHASE_RELEASING
    world.store.heal()
    with refused("EPOCH_FENCED"):
        first.release()
    assert first.head.phase == PHASE_FENCED
    world.check()


def test_a_resume_after_an_append_elsewhere_does_not_share_a_read_from_before_it(world: World) -> None:
    first, second = talk(world, "first", "n1"), world.node("second", "n2")
    assert first.release().released
    read, go_on = threading.Event(), threading.Event()
    get = world.store.get

    def slow(key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        found = get(key, first_byte, last_byte)
        if is_manifest(key) and not read.is_set():
            read.set()
            assert go_on.wait(PATIENCE_S)
        return found

    spec = context_pb2.ContextSpec(budget_tokens=1000)
    request = session_pb2.ResumeSessionRequest(session_id=S, read_only=True, context=spec)

    async def scenario() -> context_pb2.ActiveContext:
        early = asyncio.ensure_future(second.sessions.resume(second.call, request))
        await asyncio.to_thread(read.wait, PATIENCE_S)
        await first.appending(user("t3"))
        late = asyncio.ensure_future(second.sessions.resume(second.call, request))
        await asyncio.sleep(0)
        go_on.set()
        before = context_pb2.ActiveContext.FromString(await early)
        with pytest.raises(OwnedElsewhere):
            await late
        return before

    world.store.get = slow  # type: ignore[method-assign]
    assert [turn.turn_id for turn in world.run(scenario()).turns] == ["t1", "t2"]


def test_a_segment_that_two_readers_fetch_at_once_is_counted_once(world: World) -> None:
    node = talk(world)
    node.append(*(user(f"large-{n}", "x" * 40_000) for n in range(3)))
    node.flush()
    manifest = world.manifest
    assert manifest.segments
    segments, both = Segments(world.store), threading.Barrier(2, timeout=PATIENCE_S)
    get = world.store.get

    def met(key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        both.wait()
        return get(key, first_byte, last_byte)

    world.store.get = met  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as readers:
        found = list(readers.map(lambda _: segments.frames(manifest, manifest.segments[0]), range(2)))
    assert found[0] == found[1]
    assert segments.held_bytes == len(found[0])


def test_what_a_caller_had_acknowledged_behind_the_end_of_the_log_is_named(world: World) -> None:
    node = talk(world)
    head = node.head
    behind = turn_pb2.TurnPosition(epoch=head.epoch, seq=head.head_seq + 3, chain=b"c" * 16)
    context = node.resume(highest_acked=behind)
    missing = [(gap.epoch, gap.first_seq, gap.last_seq) for gap in context.receipt.missing]
    assert missing == [(head.epoch, head.head_seq + 1, head.head_seq + 3)]
    assert (context.receipt.rung, context.receipt.stale) == (context_pb2.RUNG_PARTIAL, True)
    # Another turn stands where this caller had one acknowledged.
    other = turn_pb2.TurnPosition(epoch=head.epoch, seq=head.head_seq, chain=b"c" * 16)
    context = node.resume(highest_acked=other)
    assert [(gap.first_seq, gap.last_seq) for gap in context.receipt.missing] == [(head.head_seq, head.head_seq)]
    assert context.receipt.rung == context_pb2.RUNG_PARTIAL
    # What one more caller is told is not what the next one is.
    assert not node.resume().receipt.missing


def test_what_was_lost_stays_possible_until_it_is_accepted_and_then_is_told_to_whoever_had_it(world: World) -> None:
    first = talk(world)
    first.flush()
    head = first.head
    other = world.node("other", "n2")
    assert other.take_over()
    had = turn_pb2.TurnPosition(epoch=head.epoch, seq=head.head_seq + 1, chain=b"c" * 16)

    def told(**fields: turn_pb2.TurnPosition) -> list[tuple[int, int, bool]]:
        missing = other.resume(**fields).receipt.missing
        return [(gap.first_seq, gap.last_seq, gap.possible_only) for gap in missing]

    may_be, is_lost = (head.head_seq + 1, 0, True), (head.head_seq + 1, head.head_seq + 1, False)
    assert told() == [may_be]
    assert told(highest_acked=had) == [may_be, is_lost]
    other.resume(accept_missing=head.epoch)
    assert told() == []
    assert told(highest_acked=had) == [is_lost]
