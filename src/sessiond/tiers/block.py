"""The shared block: one page of memory through which the processes of a node know of each other without a call.

It promises that what the keeper published is read whole or not at all, that a reader who can't read it takes the lease
for lapsed, and that a reader's answer is what stood there at a moment between its call and its return. It never waits
for anybody longer than a hand-over.

Layout, in a memory file that the workers inherit (little-endian):

    0    8  version of what stands; its lowest bit says in which of the two copies
    64      copy 0
    128     copy 1
    192  8  slot of the keeper, 64 bytes apart: one for each process that commits
    256  8  slot of worker 0, and so on: since when, ms by the boot clock, shifted by two; what it does with LMDB's lock

A copy:

    0    8  its version
    8    8  until when the lease is valid, ms by the boot clock; 0 where it is not held, fenced or lost
    16   8  tenure of the lease
    24   4  flags: 1 lost, 2 fenced
    28   4  phase: what the node does, as admin.proto has it; 0 before it has begun
    32   8  the clock that expiry goes by, less the boot clock, ms (signed)
    40   8  the clock that idleness goes by, less the boot clock, ms (signed)
    48   4  CRC32 of the 48 bytes before

A copy is valid if and only if its version is the one at the start and its checksum is right. The keeper writes the copy
that does not stand, then the version: one who is interrupted between the two has said nothing yet, and what was said
before can still be read. A reader that is overtaken twice while it copies finds that version or checksum don't fit, and
reads again; so neither the order in which a processor makes writes visible nor the size of the pieces in which Python
copies them matters.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from sessiond.tiers.cloud.lease import boot_clock_ms
from sessiond.tiers.hot.environment import LOCK_COMMITS, LOCK_FREE, LOCK_HELD, LOCK_WAITS

WORKERS_MAX: Final = 64
# The keeper's own place among the slots; worker n has n + 1.
KEEPER_SLOT: Final = 0
# A reader that is overtaken so often in a row takes the block for damaged.
READS_MAX: Final = 2000
# Whoever asks for the lock lets those have it first who wait already, for so long at most: LMDB's lock is not fair.
HAND_OVER_S: Final = 0.002
_HAND_OVER_LOOK_S: Final = 0.00002

_STATE: Final = struct.Struct("<QqqIIqq")
_SUM: Final = struct.Struct("<I")
_SLOT_BYTES: Final = 64
_COPIES: Final = (64, 128)
_SLOTS: Final = 192
_SIZE_BYTES: Final = _SLOTS + (WORKERS_MAX + 1) * _SLOT_BYTES
_LOST: Final = 1
_FENCED: Final = 2


@dataclass(frozen=True, slots=True)
class Published:
    """What the keeper says. valid_until_ms by the boot clock; the offsets are added to it."""

    valid_until_ms: int = 0
    tenure: int = 0
    lost: bool = False
    fenced: bool = False
    phase: int = 0
    steady_offset_ms: int = 0
    running_offset_ms: int = 0


class Block:
    """The block, mapped. `publish` in the keeper, `read` in the workers, a slot for each."""

    def __init__(self, file: int) -> None:
        """Map the memory file of somebody's `create`."""
        self.file = file
        self._map = mmap.mmap(file, _SIZE_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._lock = threading.Lock()
        self._version = 0
        self._published = Published()

    @classmethod
    def create(cls) -> Block:
        """A block of a new memory file, which whoever is to read it must inherit."""
        file = os.memfd_create("sessiond", os.MFD_CLOEXEC)
        os.ftruncate(file, _SIZE_BYTES)
        block = cls(file)
        block.publish()
        return block

    def publish(self, **changes: int | bool) -> None:
        """Say something new; the rest stays. From any thread of the keeper; in force when this returns."""
        with self._lock:
            said = self._published = replace(self._published, **changes)  # type: ignore[arg-type]
            self._version += 1
            flags = _LOST * said.lost | _FENCED * said.fenced
            state = _STATE.pack(
                self._version,
                said.valid_until_ms,
                said.tenure,
                flags,
                said.phase,
                said.steady_offset_ms,
                said.running_offset_ms,
            )
            start = _COPIES[self._version & 1]
            self._map[start : start + _STATE.size + _SUM.size] = state + _SUM.pack(zlib.crc32(state))
            self._words[0] = self._version

    def fields(self) -> tuple[int, int, int, int, int, int, int] | None:
        """A copy's fields as they were said last, in their order; None where what stands there is damaged."""
        words, block, size = self._words, self._map, _STATE.size
        for _ in range(READS_MAX):
            due = words[0]
            start = _COPIES[due & 1]
            raw = block[start : start + size + 4]
            found = _STATE.unpack_from(raw)
            if found[0] == due and zlib.crc32(raw[:size]) == _SUM.unpack_from(raw, size)[0]:
                return found
        return None

    def read(self) -> Published | None:
        """What was said last; None where what stands there is damaged."""
        found = self.fields()
        if found is None:
            return None
        _, valid_until_ms, tenure, flags, phase, steady, running = found
        return Published(valid_until_ms, tenure, bool(flags & _LOST), bool(flags & _FENCED), phase, steady, running)

    def slot(self, number: int, slots: int = WORKERS_MAX + 1) -> Slot:
        """The slot of one process. slots: how many there are in all."""
        return Slot(self._words, number, slots)

    def locks(self, slots: int) -> list[tuple[int, int]]:
        """(what each of the first slots does with LMDB's lock, since when by the boot clock in ms)."""
        words = [self._words[_word(number)] for number in range(slots)]
        return [(word & 3, word >> 2) for word in words]

    def clear(self, number: int) -> None:
        """Nobody has this slot now."""
        self._words[_word(number)] = 0

    def close(self) -> None:
        """Let go of it; others keep it."""
        self._words.release()
        self._map.close()
        os.close(self.file)


def _word(number: int) -> int:
    return (_SLOTS + number * _SLOT_BYTES) // 8


class Slot:
    """What one process does with LMDB's write lock, for the others to see; `note` is an Environment's `on_lock`."""

    def __init__(self, words: memoryview, number: int, slots: int) -> None:
        self._words = words
        self._mine = _word(number)
        self._others = [_word(other) for other in range(slots) if other != number]
        self.hand_overs = 0

    def note(self, what: int) -> None:
        """Say it, and since when. Whoever asks for the lock while others wait for it lets one of them have it first."""
        words = self._words
        if what == LOCK_WAITS:
            # Not when it is left: those whose commit has just ended are answered first.
            self._hand_over()
        words[self._mine] = boot_clock_ms() << 2 | what if what != LOCK_FREE else 0

    def _hand_over(self) -> None:
        words = self._words
        waiting = [(word, seen) for word in self._others if (seen := words[word]) & 3 == LOCK_WAITS]
        if not waiting:
            return
        self.hand_overs += 1
        ends_s = time.monotonic() + HAND_OVER_S
        while time.monotonic() < ends_s:
            time.sleep(_HAND_OVER_LOOK_S)
            if any(words[word] != seen for word, seen in waiting):
                return


class LeaseView:
    """A worker's view of the node's lease, as the hot path asks for it. Each answer is read anew."""

    def __init__(self, block: Block, clock_ms: Callable[[], int] = boot_clock_ms) -> None:
        self._block = block
        self._clock_ms = clock_ms

    def is_valid(self) -> bool:
        """Whether no other node can have fenced this one."""
        said = self._block.fields()
        return said is not None and not said[3] and self._clock_ms() < said[1]

    @property
    def tenure(self) -> int:
        """The lease's; -1, which is nobody's, where it can't be read. Taken before rows are read, and again after."""
        said = self._block.fields()
        return -1 if said is None else said[2]

    @property
    def lost(self) -> bool:
        """Whether another daemon has the node's name."""
        said = self._block.fields()
        return said is None or bool(said[3] & _LOST)

    def serves(self, phase: int) -> bool:
        """Whether the node is in this phase and holds its name."""
        said = self._block.fields()
        return said is not None and said[4] == phase and not said[3] & _LOST


class ClockView:
    """A worker's view of the clocks that expiry and idleness go by (tiers/steady.py), for a Block's readers."""

    def __init__(self, block: Block, wall_ms: Callable[[], int], boot_ms: Callable[[], int] = boot_clock_ms) -> None:
        self._block = block
        self._wall_ms = wall_ms
        self._boot_ms = boot_ms
        self._offsets = 0, 0

    def _read(self) -> tuple[int, int]:
        said = self._block.read()
        if said is not None:
            self._offsets = said.steady_offset_ms, said.running_offset_ms
        return self._offsets

    def __call__(self) -> int:
        """The time by which a session has certainly expired, if it has."""
        return min(self._wall_ms(), self._read()[0] + self._boot_ms())

    def running_ms(self) -> int:
        """What idleness goes by."""
        return self._read()[1] + self._boot_ms()

    def latest_ms(self) -> int:
        """The time that a life is counted from."""
        return max(self._wall_ms(), self._read()[0] + self._boot_ms())


def is_stuck(what: int, since_ms: int, now_ms: int, stuck_ms: int, stopped: bool) -> bool:
    """Whether a process must be ended so that the others get LMDB's lock.

    One that holds it for stuck_ms without being in a commit is; time in a commit, which ends with the fsync, is the
    disk's and does not count. One that was stopped (SIGSTOP) may have the lock or be about to, whatever it says.
    """
    if what == LOCK_FREE or now_ms - since_ms < stuck_ms:
        return False
    return what == LOCK_HELD or (stopped and what in (LOCK_WAITS, LOCK_COMMITS))
