"""What a disk may hold after a power cut at any instant of a recorded run, and nothing that it may not hold.

It never assumes more of the filesystem than POSIX and Linux promise, and refuses a trace that it can't judge.

The model, by which an image of an instant is made:

1. A write, a truncation or a change of a name is *durable* once an fsync of its file, for a name of its folder, has
   returned that had begun after the change itself had returned. An fsync that is under way promises nothing yet, and
   one that was already under way when the change returned covers it perhaps or perhaps not. fdatasync counts as fsync,
   because the size is part of what is needed to read the data back.
2. A write to a descriptor opened with O_DSYNC is durable once it has returned: itself, and nothing that was written
   before it. (LMDB writes its meta pages so, after an fdatasync of all others.)
3. Whatever was begun and is not durable is *in flight*: any part of it may be on the disk, the rest not. The parts of
   a write are its sectors of 512 bytes, each whole or not at all, in any order. Of several writes to one sector any
   prefix may have happened: they went through one page of memory, so a later one carries the earlier.
4. The size of a file is not bound to its data: it has any of the values that it had since the last durable one. Data
   beyond it is gone; below it, what no data arrived for reads as zeros. Space that was allocated is size and no data.
5. A name in a folder points at what it pointed at when it was last durable, or at anything since. Each name is on its
   own, also the two names of a rename. What stands in a folder whose own name is not there is not there either.

Not modelled, because no code could survive it: sectors that change without being written, an fsync that lies.
Real filesystems allow fewer outcomes (ext4 and xfs bring a new file's name to the disk with its first fsync), so what
survives all of these survives on them.
"""

from __future__ import annotations

import bisect
import hashlib
import mmap
import os
import random
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

SECTOR: Final = 512
MAGIC: Final = b"CRASHTR1"
HEADER: Final = struct.Struct("<8sQQQ")
RECORD: Final = struct.Struct("<IHHQQQQ")
END, OPEN, WRITE, TRUNCATE, FSYNC, RENAME, UNLINK, MKDIR, ALLOCATE = range(9)
BLIND: Final = {
    1: "the trace is full",
    2: "a second process wrote",
    4: "a file is mapped writable",
    8: "a call was made that the recorder can't follow",
    16: "a relative path was used",
    32: "a descriptor was too high",
}
# Sparse: what is not used takes no room.
TRACE_BYTES: Final = 4 * 1024**3


class TraceRefused(Exception):
    """The trace shows something that the model does not cover: no image made from it would prove anything."""


# Recording -----------------------------------------------------------------------------------------------------------


def build_recorder(folder: Path) -> Path:
    """The recorder, compiled."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    assert compiler, "the recorder of writes needs a C compiler, as the core does"
    library = folder / "recorder.so"
    source = Path(__file__).with_name("recorder.c")
    flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*compiler.split(), *flags, "-o", str(library), str(source), "-ldl", "-pthread"], check=True)
    return library


class Recording:
    """A trace that a process with `env` writes while it runs. Everything below `folder` is recorded."""

    def __init__(self, trace: Path, folder: Path, recorder: Path) -> None:
        with trace.open("wb") as file:
            file.truncate(TRACE_BYTES)
            file.seek(0)
            file.write(HEADER.pack(MAGIC, HEADER.size, 0, 0))
        with trace.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), HEADER.size, mmap.MAP_SHARED, mmap.PROT_READ)
        self.path = trace
        self.env = {
            "LD_PRELOAD": str(recorder),
            "CRASH_TRACE_FILE": str(trace),
            "CRASH_TRACE_FOLDER": str(folder.resolve()),
        }

    def position(self) -> int:
        """Where the trace ends now: whatever has returned before this call stands before it."""
        return int.from_bytes(self._map[8:16], "little")


@dataclass(slots=True, eq=False)
class Operation:
    """One call of the recorded process. begin, end: its places in the order of events; end is None while it runs."""

    kind: int
    durable: bool
    file: int
    offset: int
    data: memoryview
    begin: int
    end: int | None = None
    result: int = 0
    opened: int = 0

    @property
    def paths(self) -> list[str]:
        return [os.fsdecode(part) for part in bytes(self.data).split(b"\0")]


@dataclass(slots=True)
class Trace:
    """Events in their order, (operation, whether it is its end), and where in the file each ends."""

    folder: str
    events: list[tuple[Operation, bool]]
    ends: list[int]

    def instant(self, position: int) -> int:
        """How many events stand before a position of the file."""
        return bisect.bisect_right(self.ends, position)


def read_trace(path: Path, folder: str) -> Trace:
    """The trace of a run. Raises TraceRefused if the recorder could not see everything."""
    with path.open("rb") as file:
        raw = memoryview(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ))
    magic, end, _, blind = HEADER.unpack_from(raw)
    if magic != MAGIC or blind:
        raise TraceRefused(f"{path}: {[why for bit, why in BLIND.items() if blind & bit]}")
    at = HEADER.size
    running: dict[int, Operation] = {}
    trace = Trace(folder, [], [])
    while at < end:
        size, kind, durable, number, file_number, offset, length = RECORD.unpack_from(raw, at)
        data = raw[at + RECORD.size : at + RECORD.size + length]
        at += size
        index = len(trace.events)
        if kind == END:
            operation = running.pop(number)
            operation.end = index
            operation.result = offset - (1 << 64) if offset >> 63 else offset
            operation.opened = file_number
        else:
            operation = running[number] = Operation(kind, bool(durable), file_number, offset, data, index)
        trace.events.append((operation, kind == END))
        trace.ends.append(at)
    return trace


# The disk at an instant ----------------------------------------------------------------------------------------------


class Body:
    """One file: what is durable of it, and what is in flight, oldest first."""

    __slots__ = ("digest", "durable", "durable_size", "number", "pending", "version")

    def __init__(self, number: int) -> None:
        self.number = number
        # Without the zeros up to its size that nothing was written to.
        self.durable = bytearray()
        self.durable_size = 0
        self.pending: list[Operation] = []
        # Counts the changes of `durable`, so that (number, version, choice) names an image of this file.
        self.version = 0
        self.digest: tuple[int, bytes] | None = None

    def settle(self, covered: set[Operation]) -> None:
        """These are durable now."""
        left: list[Operation] = []
        for operation in self.pending:
            if operation not in covered:
                left.append(operation)
                continue
            if any(_overlap(earlier, operation) for earlier in left):
                raise TraceRefused("a durable write covers sectors of an earlier one that is still in flight")
            _apply(self.durable, operation)
            self.durable_size = _size_after(self.durable_size, operation)
        self.pending = left
        self.version += 1

    def size(self) -> int:
        """How large it is for a reader while the machine runs."""
        size = self.durable_size
        for operation in self.pending:
            size = _size_after(size, operation)
        return size

    def latest(self) -> bytes:
        """What a reader sees of it while the machine runs: everything arrived."""
        content = bytearray(self.durable)
        for operation in self.pending:
            _apply(content, operation)
        return bytes(content.ljust(self.size(), b"\0"))

    def content_digest(self) -> bytes:
        """blake2b of the durable bytes, reckoned once per version."""
        if self.digest is None or self.digest[0] != self.version:
            self.digest = (self.version, hashlib.blake2b(self.durable, digest_size=16).digest())
        return self.digest[1]


Target = Body | str | None  # a file, the path of a folder, or nothing


@dataclass(slots=True)
class Name:
    """One name in a folder: what it durably points at, and what it was pointed at since."""

    durable: Target = None
    pending: list[tuple[Operation, Target]] = field(default_factory=list)

    @property
    def visible(self) -> Target:
        return self.pending[-1][1] if self.pending else self.durable


@dataclass(slots=True)
class Choice:
    """An image of one file: which sectors of each write in flight arrived, and how large the file is."""

    body: Body
    masks: tuple[int, ...] = ()
    size: int = -1

    @property
    def key(self) -> tuple[int, int, tuple[int, ...], int]:
        """Equal keys are equal bytes."""
        return self.body.number, self.body.version, self.masks, self.size

    def bytes(self) -> bytes:
        """The bytes of the image."""
        content, size = self._content()
        return bytes(content.ljust(size, b"\0"))

    def lay(self, path: Path) -> None:
        """Write the image to a new file; the zeros at its end take no space and no time."""
        content, size = self._content()
        with path.open("wb") as file:
            file.write(content)
            file.truncate(size)

    def _content(self) -> tuple[bytearray, int]:
        """(what is not all zeros up to the end, the size)."""
        if self.size < 0:
            return self.body.durable, self.body.durable_size
        content = bytearray(self.body.durable)
        newest: dict[int, int] = {}
        for index, (operation, mask) in enumerate(zip(self.body.pending, self.masks, strict=True)):
            first = operation.offset // SECTOR
            while mask:
                low = mask & -mask
                newest[first + low.bit_length() - 1] = index
                mask ^= low
        for index, operation in enumerate(self.body.pending):
            if operation.kind == TRUNCATE:
                if newest.get(operation.offset // SECTOR, -1) >= index:
                    del content[operation.offset :]
                continue
            offset, data = operation.offset, operation.data
            first = offset // SECTOR
            for sector in range(first, first + _sectors(operation)):
                if newest.get(sector, -1) >= index:
                    start, stop = max(offset, sector * SECTOR), min(offset + len(data), (sector + 1) * SECTOR)
                    if len(content) < start:
                        content.extend(bytes(start - len(content)))
                    content[start:stop] = data[start - offset : stop - offset]
        del content[self.size :]
        return content, self.size


class Disk:
    """The recorded folder after the first `now` events."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.now = 0
        self.folders: dict[str, dict[str, Name]] = {trace.folder: {}}
        self._unsettled: dict[str, set[str]] = {}
        self._open: dict[int, Target] = {}
        self._bodies = 0

    def advance(self, instant: int) -> None:
        """Go on to a later instant."""
        while self.now < instant:
            operation, is_end = self.trace.events[self.now]
            self.now += 1
            if is_end:
                self._end(operation)
            else:
                self._begin(operation)

    def name(self, path: str) -> Name:
        """The entry of a path, made if it was never used."""
        folder, _, name = path.rpartition("/")
        return self.folders.setdefault(folder, {}).setdefault(name, Name())

    def _point(self, path: str, operation: Operation, target: Target) -> None:
        self.name(path).pending.append((operation, target))
        folder, _, name = path.rpartition("/")
        self._unsettled.setdefault(folder, set()).add(name)

    def _body(self, operation: Operation) -> Body:
        target = self._open[operation.file]
        if not isinstance(target, Body):
            raise TraceRefused("bytes were written to what is no file")
        return target

    def _begin(self, operation: Operation) -> None:
        if operation.kind == OPEN:
            (path,) = operation.paths
            if operation.offset & os.O_CREAT and self.name(path).visible is None:
                self._bodies += 1
                self._point(path, operation, Body(self._bodies))
        elif operation.kind == MKDIR:
            (path,) = operation.paths
            if path != self.trace.folder and self.name(path).visible is None:
                self._point(path, operation, path)
        elif operation.kind == UNLINK:
            (path,) = operation.paths
            self._point(path, operation, None)
        elif operation.kind == RENAME:
            before, after = operation.paths
            moved = self.name(before).visible
            if not isinstance(moved, Body):
                raise TraceRefused(f"{before} was renamed and is no file")
            self._point(after, operation, moved)
            self._point(before, operation, None)
        elif operation.kind in (WRITE, TRUNCATE, ALLOCATE):
            body = self._body(operation)
            if operation.kind == TRUNCATE and operation.offset >= body.size():
                operation.kind = ALLOCATE  # it makes the file longer, which takes nothing away
            body.pending.append(operation)

    def _end(self, operation: Operation) -> None:
        if operation.kind == OPEN and operation.result == 0:
            (path,) = operation.paths
            is_folder = bool(operation.offset & os.O_DIRECTORY)
            self._open[operation.opened] = path if is_folder else self.name(path).visible
        elif operation.kind in (OPEN, MKDIR, UNLINK, RENAME):
            if operation.result < 0:
                for path in operation.paths:
                    name = self.name(path)
                    name.pending = [row for row in name.pending if row[0] is not operation]
        elif operation.kind == FSYNC:
            if operation.result != 0:
                raise TraceRefused("an fsync failed")
            self._fsync(operation)
        else:
            wanted = len(operation.data) if operation.kind == WRITE else 0
            if operation.result != wanted:
                raise TraceRefused(f"a write of {wanted} bytes came back with {operation.result}")
            if operation.durable:
                self._body(operation).settle({operation})

    def _fsync(self, fsync: Operation) -> None:
        target = self._open[fsync.file]
        if isinstance(target, Body):
            target.settle({row for row in target.pending if row.end is not None and row.end < fsync.begin})
            return
        assert isinstance(target, str)
        unsettled = self._unsettled.get(target, set())
        for name in list(unsettled):
            entry = self.folders[target][name]
            covered = [at for at, (row, _) in enumerate(entry.pending) if row.end is not None and row.end < fsync.begin]
            if covered:
                entry.durable = entry.pending[covered[-1]][1]
                del entry.pending[: covered[-1] + 1]
            if not entry.pending:
                unsettled.discard(name)

    # Images

    def pick_name(self, name: Name, rng: random.Random) -> Target:
        """What a name points at in an image."""
        if not name.pending:
            return name.durable
        at = rng.choice((0, len(name.pending), rng.randint(0, len(name.pending))))
        return name.pending[at - 1][1] if at else name.durable

    def pick_path(self, path: str, rng: random.Random) -> Target:
        """What a path leads to in an image; every name on the way is drawn."""
        at, target = self.trace.folder, None
        for part in path.removeprefix(at + "/").split("/"):
            entry = self.folders.get(at, {}).get(part)
            target = self.pick_name(entry, rng) if entry else None
            if target is None:
                return None
            at = f"{at}/{part}"
        return target

    def pick_tree(
        self, path: str, rng: random.Random, without: tuple[str, ...] = (), prefix: str = ""
    ) -> dict[str, Body]:
        """Every file below a folder in an image, by its path from there."""
        found: dict[str, Body] = {}
        for name, entry in self.folders.get(path, {}).items():
            if name in without:
                continue
            target = self.pick_name(entry, rng)
            if isinstance(target, Body):
                found[prefix + name] = target
            elif target is not None:
                found.update(self.pick_tree(target, rng, without, f"{prefix}{name}/"))
        return found

    def visible_files(self, path: str) -> dict[str, bytes | None]:
        """Every file below a folder as a reader sees it; None where a call was cut off at the run's end."""
        found: dict[str, bytes | None] = {}
        for name, entry in self.folders.get(path, {}).items():
            target = entry.visible
            if any(row.end is None for row, _ in entry.pending):
                found[f"{path}/{name}"] = None
            elif isinstance(target, Body):
                cut_off = any(row.end is None for row in target.pending)
                found[f"{path}/{name}"] = None if cut_off else target.latest()
            elif target is not None:
                found.update(self.visible_files(target))
        return found

    def pick_bytes(self, body: Body, rng: random.Random) -> Choice:
        """An image of a file."""
        pending = body.pending
        if not pending:
            return Choice(body)
        masks = _masks([_sectors(row) for row in pending], rng)
        sizes = [body.durable_size]
        for row in pending:
            sizes.append(_size_after(sizes[-1], row))
        if any(row.kind == TRUNCATE for row in pending):
            if max(sizes) > SECTOR:
                raise TraceRefused("a file of more than one sector was truncated")
            size = rng.choice(sizes)
        else:
            reached = [at for at, mask in enumerate(masks) if mask]
            # Mostly as large as what arrived; else any size that it had.
            size = sizes[reached[-1] + 1 if reached else 0] if rng.random() < 0.7 else rng.choice(sizes)
        return Choice(body, masks, size)


def _size_after(size: int, operation: Operation) -> int:
    """How large a file of this size is after the operation."""
    if operation.kind == TRUNCATE:
        return operation.offset
    return max(size, operation.offset + len(operation.data))


def _sectors(operation: Operation) -> int:
    """How many sectors a write touches; a truncation counts as one, an allocation as none."""
    if operation.kind == TRUNCATE:
        return 1
    if not operation.data:
        return 0
    return (operation.offset + len(operation.data) - 1) // SECTOR - operation.offset // SECTOR + 1


def _overlap(one: Operation, other: Operation) -> bool:
    if TRUNCATE in (one.kind, other.kind):
        return True
    if not (_sectors(one) and _sectors(other)):
        return False
    first, second = one.offset // SECTOR, other.offset // SECTOR
    return first < second + _sectors(other) and second < first + _sectors(one)


def _apply(content: bytearray, operation: Operation) -> None:
    if operation.kind == TRUNCATE:
        del content[operation.offset :]
    if operation.kind != WRITE:
        return
    if len(content) < operation.offset:
        content.extend(bytes(operation.offset - len(content)))
    content[operation.offset : operation.offset + len(operation.data)] = operation.data


def _masks(counts: list[int], rng: random.Random) -> tuple[int, ...]:
    """Which sectors of each write arrived: nothing, all, whole writes, or torn ones, from one sector to all but one."""
    full = [(1 << count) - 1 for count in counts]
    how = rng.randrange(8)
    if how == 0:
        return tuple(0 for _ in full)
    if how == 1:
        return tuple(full)
    if how == 2:  # the newest alone, as when the last write overtook all others
        return tuple([0] * (len(full) - 1) + full[-1:])
    if how == 3:
        share = rng.random()
        return tuple(mask if rng.random() < share else 0 for mask in full)
    if how in (4, 5):  # one sector alone, or all but one
        at = rng.randrange(max(1, sum(counts)))
        one = []
        for count in counts:
            one.append(1 << at if 0 <= at < count else 0)
            at -= count
        return tuple(one if how == 4 else (mask & ~bit for mask, bit in zip(full, one, strict=True)))
    share = rng.choice((1, 2, 3))
    torn = []
    for count in counts:
        bits = rng.getrandbits(count) if count else 0
        if share == 2 and count:
            bits &= rng.getrandbits(count)
        if share == 3 and count:
            bits |= rng.getrandbits(count)
        torn.append(bits)
    return tuple(torn)
