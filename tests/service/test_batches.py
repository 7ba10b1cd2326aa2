"""What a batch does with its items, on a clock of the test's own: order, bounds, deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from sessiond.errors import SessiondError, Unavailable
from sessiond.service import batches
from sessiond.service.batches import Batch, Outcome
from sessiond.service.ownership import Call

# A test that waits for what never comes fails instead of standing still.
PATIENCE_S = 30.0


class Places:
    """A node with so many places left."""

    def __init__(self, free: int) -> None:
        self.free = free

    def widen(self, wanted: int) -> int:
        taken = min(self.free, wanted)
        self.free -= taken
        return taken

    def narrow(self) -> None:
        self.free += 1


class Desk:
    """Answers items one by one when told to, and remembers in which order they came and how many at one time."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.begun: list[bytes] = []
        self.at_once = self.at_once_max = 0
        self.held: dict[bytes, asyncio.Event] = {}
        self.deadlines: set[int | None] = set()
        self.cancelled: list[bytes] = []

    def hold(self, item: bytes) -> None:
        self.held[item] = asyncio.Event()

    async def answer(self, call: Call, item: bytes) -> bytes:
        self.begun.append(item)
        self.deadlines.add(call.deadline_ms)
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        try:
            if item in self.held:
                await self.held[item].wait()
            else:
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled.append(item)
            raise
        finally:
            self.at_once -= 1
        if item.startswith(b"bad"):
            raise Unavailable("NODE_DRAINING", "No.")
        return b"done " + item

    def batch(self, items: list[bytes], deadline_ms: int | None = None) -> Batch:
        return Batch(Call("default", deadline_ms), items, self.answer, lambda: self.now_ms)


async def until(condition: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < ends
        await asyncio.sleep(0)


def reasons(outcomes: list[Outcome]) -> list[str]:
    return [outcome.reason if isinstance(outcome, SessiondError) else "" for outcome in outcomes]


def no_shortcut(raw: bytes, tenant: str) -> bytes | None:
    return None


def test_items_of_one_key_go_in_order_and_those_of_others_beside_them() -> None:
    async def run() -> None:
        desk = Desk()
        items = [b"a1", b"b1", b"a2", b"a3", b"b2"]
        desk.hold(b"a1")
        places = Places(100)
        appending = asyncio.ensure_future(desk.batch(items).append([item[:1] for item in items], places))
        await until(lambda: b"b2" in desk.begun)
        assert desk.begun == [b"a1", b"b1", b"b2"]
        desk.held[b"a1"].set()
        assert await appending == [b"done " + item for item in items]
        assert desk.begun[3:] == [b"a2", b"a3"]
        await until(lambda: places.free == 100)

    asyncio.run(run())


def test_a_refused_item_stops_none_not_even_of_its_own_key() -> None:
    async def run() -> None:
        outcomes = await Desk().batch([b"bad1", b"good1", b"bad2", b"good2"]).append([b"k"] * 4, Places(9))
        assert reasons(outcomes) == ["NODE_DRAINING", "", "NODE_DRAINING", ""]
        assert outcomes[1::2] == [b"done good1", b"done good2"]

    asyncio.run(run())


@pytest.mark.parametrize(("free", "expected"), [(0, 1), (5, 6), (1000, 200)])
def test_so_many_items_are_carried_out_at_one_time_as_there_are_places(free: int, expected: int) -> None:
    async def run() -> None:
        desk, places = Desk(), Places(free)
        items = [b"%d" % n for n in range(200)]
        for item in items:
            desk.hold(item)
        resuming = asyncio.ensure_future(desk.batch(items).resume(no_shortcut, places))
        await until(lambda: len(desk.begun) == expected)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(desk.begun) == expected
        for held in desk.held.values():
            held.set()
        assert await resuming == [b"done " + item for item in items]
        assert desk.at_once_max == expected
        await until(lambda: places.free == free)

    asyncio.run(run())


def test_what_the_shortcut_answers_goes_no_other_way() -> None:
    async def run() -> None:
        desk = Desk()

        def shortcut(raw: bytes, tenant: str) -> bytes | None:
            if raw == b"broken":
                raise ValueError(raw)
            return b"short " + raw if raw == b"hot" else None

        outcomes = await desk.batch([b"hot", b"cold", b"broken", b"hot"]).resume(shortcut, Places(9))
        assert outcomes[:2] == [b"short hot", b"done cold"]
        assert isinstance(outcomes[2], ValueError)
        assert outcomes[3] == b"short hot"
        assert desk.begun == [b"cold"]

    asyncio.run(run())


def test_other_calls_get_a_turn_while_the_shortcut_answers() -> None:
    async def run() -> None:
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        def shortcut(raw: bytes, tenant: str) -> bytes | None:
            ends = time.perf_counter() + batches.SLICE_S
            while time.perf_counter() < ends:
                pass
            return raw

        beside = asyncio.ensure_future(other())
        await asyncio.sleep(0)
        before = turns
        await Desk().batch([b"x"] * 20).resume(shortcut, Places(9))
        assert turns - before >= 19 * batches.SLICE_TURNS
        beside.cancel()

    asyncio.run(run())


def test_items_that_were_not_begun_in_time_say_so_and_those_that_were_say_that_it_is_not_known() -> None:
    async def run() -> None:
        desk, places = Desk(), Places(1)
        items = [b"fast", b"slow", b"slow-too", b"late", b"later"]
        desk.hold(b"slow")
        desk.hold(b"slow-too")
        # On a real clock: asyncio waits by its own. What a call needs from then on is left for the reply.
        began = time.monotonic()
        outcomes = await desk.batch(items, deadline_ms=400).resume(no_shortcut, places)
        assert 0.3 < time.monotonic() - began < 2.5
        assert reasons(outcomes) == [""] + ["DEADLINE_TOO_SHORT"] * 4
        told = [str(outcome) for outcome in outcomes]
        assert all("whether it was carried out is not known" in text for text in told[1:3])
        assert all("before this item was begun" in text for text in told[3:])
        assert desk.deadlines == {340}
        assert desk.begun == items[:3]
        # As a single call's is by gRPC.
        await until(lambda: sorted(desk.cancelled) == [b"slow", b"slow-too"])
        await until(lambda: places.free == 1)

    asyncio.run(run())


def test_nothing_is_begun_once_the_time_is_up() -> None:
    async def run() -> None:
        desk = Desk()

        def shortcut(raw: bytes, tenant: str) -> bytes | None:
            if raw == b"first":
                desk.now_ms = 1000
                return raw
            return None

        outcomes = await desk.batch([b"first", b"second"], deadline_ms=900).resume(shortcut, Places(9))
        assert reasons(outcomes) == ["", "DEADLINE_TOO_SHORT"]
        assert "before this item was begun" in str(outcomes[1])
        outcomes = await desk.batch([b"third"], deadline_ms=900).append([b"k"], Places(9))
        assert reasons(outcomes) == ["DEADLINE_TOO_SHORT"]
        assert desk.begun == []

    asyncio.run(run())


def test_a_short_deadline_leaves_most_of_it_to_the_items() -> None:
    async def run() -> None:
        desk = Desk()
        assert await desk.batch([b"x"], deadline_ms=20).append([b"k"], Places(9)) == [b"done x"]
        assert desk.deadlines == {15}

    asyncio.run(run())


def test_a_caller_that_is_gone_leaves_nothing_behind() -> None:
    async def run() -> None:
        desk, places = Desk(), Places(50)
        items = [b"%d" % n for n in range(30)]
        for item in items:
            desk.hold(item)
        going = asyncio.ensure_future(desk.batch(items).append(items, places))
        await until(lambda: len(desk.begun) == 30)
        going.cancel()
        with pytest.raises(asyncio.CancelledError):
            await going
        await until(lambda: len(desk.cancelled) == 30)
        await until(lambda: places.free == 50)

    asyncio.run(run())
