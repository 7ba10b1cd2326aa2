"""Many calls in one: each item is answered, or refused, as the same call alone would be, and none spoils another.

It promises that appends to one session are carried out one after the other, in their order; that what a batch holds,
does at one time and replies is bounded; and that it answers before its caller's time is up, saying of each item that
was not begun that it was not. It knows no gRPC, and of what an item asks for only its session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final, Protocol

from sessiond.errors import Exhausted, Invalid, SessiondError, Unavailable
from sessiond.service.ownership import Call
from sessiond.service.sessions import item_error
from sessiond.v1 import session_pb2

# The contract's own limit, of resumes as of appends.
ITEMS_MAX: Final = 256
# So many are begun in one turn of the loop: each checks its request and counts its tokens before it waits for anything.
BEGUN_AT_ONCE: Final = 8
# After so long the loop is given to other calls, for so many turns: one that just came in needs them to be answered.
SLICE_S: Final = 0.002
SLICE_TURNS: Final = 4
# A reply is far below the 64 MiB that the transport takes, and a batch holds it twice for a moment.
REPLY_BYTES_MAX: Final = 32 * 1024**2
# Left of a caller's deadline for putting the reply together and for its way, and for each item that waits for a node or
# the store until its time is up: all of them end at once then. Of a short deadline, this share.
MARGIN_MS: Final = 50
MARGIN_ITEM_MS: Final = 2
MARGIN_SHARE: Final = 4

Outcome = bytes | Exception
# One item by the general way: takes its wire bytes, returns its reply's. Raises as a single call does.
Answer = Callable[[Call, bytes], Awaitable[bytes]]
# One item by a shorter way: takes its wire bytes and the tenant; None where the general way must answer.
Shortcut = Callable[[bytes, str], bytes | None]


class Places(Protocol):
    """How many calls a node answers at one time, items of batches among them."""

    def widen(self, wanted: int) -> int:
        """Take up to so many places, as far as they are free; how many were taken."""
        ...

    def narrow(self) -> None:
        """Give one back."""
        ...


def check_size(count: int, size_bytes: int, bytes_max: int) -> None:
    """Raises Invalid INVALID_BATCH or REQUEST_TOO_LARGE: the batch as a whole is refused, and nothing was done."""
    if size_bytes > bytes_max:
        what = f"{size_bytes} bytes, over the limit of {bytes_max}"
        figures = {"field": "requests", "size_bytes": str(size_bytes), "limit_bytes": str(bytes_max)}
        remedy = "Send fewer requests per call; each by itself may have as many bytes."
        raise Invalid("REQUEST_TOO_LARGE", f"requests: {what}.", figures, [("requests", what)], remedy=remedy)
    if not 1 <= count <= ITEMS_MAX:
        what = f"{count} requests; 1 to {ITEMS_MAX} are needed"
        figures = {"field": "requests", "count": str(count), "limit": str(ITEMS_MAX)}
        raise Invalid("INVALID_BATCH", f"requests: {what}.", figures, [("requests", what)])


def lanes(keys: Sequence[bytes]) -> list[list[int]]:
    """The places of items with the same key, each in order; by the first of each."""
    found: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(key, []).append(place)
    return list(found.values())


def no_room() -> SessiondError:
    """The refusal of an item whose reply has no room beside the others'."""
    what = f"The replies before it fill the {REPLY_BYTES_MAX} bytes that a batch returns."
    return Exhausted("BATCH_REPLY_FULL", what, {"limit_bytes": str(REPLY_BYTES_MAX)})


def shortened(reply: bytes) -> bytes:
    """An append's reply where there is no room: the turns are appended, so it leaves out the context, or the turns of a
    conflict.
    """
    response = session_pb2.AppendTurnResponse.FromString(reply)
    if response.HasField("context"):
        response.ClearField("context")
        response.context_error.CopyFrom(item_error(no_room()))
    if response.conflict.turns:
        del response.conflict.turns[:]
        response.conflict.truncated = True
    return bytes(response.SerializeToString())


class Breaks:
    """When long work on the loop lets other calls have it."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()

    async def give_way(self) -> None:
        """Let other calls have the loop, if this one had it for long."""
        if time.perf_counter() - self._began_s > SLICE_S:
            for _ in range(SLICE_TURNS):
                await asyncio.sleep(0)
            self._began_s = time.perf_counter()


class Batch:
    """One batch, on its way once."""

    def __init__(self, call: Call, items: Sequence[bytes], answer: Answer, clock_ms: Callable[[], int]) -> None:
        """clock_ms: by which the call's deadline is."""
        self._items = items
        self._answer = answer
        self._clock_ms = clock_ms
        self._ends_ms: int | None = None
        if call.deadline_ms is not None:
            left_ms = call.deadline_ms - clock_ms()
            margin_ms = MARGIN_MS + MARGIN_ITEM_MS * len(items)
            self._ends_ms = call.deadline_ms - min(margin_ms, max(0, left_ms) // MARGIN_SHARE)
        self._call = replace(call, deadline_ms=self._ends_ms)
        self._outcomes: list[Outcome | None] = [None] * len(items)
        self._begun = [False] * len(items)
        self._reply_bytes = 0
        self._full = False
        # Appends, which are carried out whatever room there is for their replies.
        self._writes = False
        self._breaks = Breaks()

    async def resume(self, shortcut: Shortcut, places: Places) -> list[Outcome]:
        """The outcomes of resumes, in order. The shortcut is tried for all, then the general way for what is left."""
        left: list[list[int]] = []
        for place, raw in enumerate(self._items):
            if self._is_over():
                break
            if self._full:
                self._outcomes[place] = no_room()
                continue
            try:
                reply = shortcut(raw, self._call.tenant)
            except Exception as error:
                self._outcomes[place] = error
                continue
            if reply is None:
                left.append([place])
                continue
            self._keep(place, reply)
            await self._breaks.give_way()
        await self._spread(left, places)
        return self._told()

    async def append(self, keys: Sequence[bytes], places: Places) -> list[Outcome]:
        """The outcomes of appends, in order. keys: each item's session."""
        self._writes = True
        await self._spread(lanes(keys), places)
        return self._told()

    async def _spread(self, found: list[list[int]], places: Places) -> None:
        """Carry out lanes of items beside each other, those of one lane one after the other."""
        if not found:
            return
        # One place is the batch's own. All lanes at once, where there are places: what waits for a node that says
        # nothing must not keep the others from being begun.
        width = 1 + places.widen(len(found) - 1)
        following = iter(found)
        workers = []
        try:
            for number in range(width):
                workers.append(asyncio.ensure_future(self._work(following)))
                if number:
                    workers[-1].add_done_callback(lambda _: places.narrow())
                if number % BEGUN_AT_ONCE == BEGUN_AT_ONCE - 1:
                    await asyncio.sleep(0)
            left_s = None if self._ends_ms is None else max(0, self._ends_ms - self._clock_ms()) / 1000
            await asyncio.wait(workers, timeout=left_s)
        finally:
            for worker in workers:
                worker.cancel()
            for _ in range(len(workers), width):
                places.narrow()
        for worker in workers:
            if worker.done() and not worker.cancelled():
                worker.result()

    async def _work(self, following: Iterator[list[int]]) -> None:
        for lane in following:
            for place in lane:
                if self._is_over():
                    return
                if self._full and not self._writes:
                    self._outcomes[place] = no_room()
                    continue
                self._begun[place] = True
                try:
                    reply = await self._answer(self._call, self._items[place])
                except Exception as error:
                    self._outcomes[place] = error
                else:
                    self._keep(place, reply)
                await self._breaks.give_way()

    def _keep(self, place: int, reply: bytes) -> None:
        if self._reply_bytes and self._reply_bytes + len(reply) > REPLY_BYTES_MAX:
            self._full = True
            if not self._writes:
                self._outcomes[place] = no_room()
                return
            reply = shortened(reply)
        self._reply_bytes += len(reply)
        self._outcomes[place] = reply

    def _is_over(self) -> bool:
        return self._ends_ms is not None and self._clock_ms() >= self._ends_ms

    def _told(self) -> list[Outcome]:
        return [
            self._out_of_time(place) if outcome is None else outcome for place, outcome in enumerate(self._outcomes)
        ]

    def _out_of_time(self, place: int) -> SessiondError:
        if not self._begun[place]:
            return Unavailable("DEADLINE_TOO_SHORT", "The batch's time was up before this item was begun.")
        what = "The batch's time was up before this item was answered; whether it was carried out is not known."
        return Unavailable("DEADLINE_TOO_SHORT", what)
