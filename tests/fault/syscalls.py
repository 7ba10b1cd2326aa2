"""A daemon whose system calls fail to order: the preloaded library of syscalls.c, and the file that steers it.

The tests change the file while the daemon runs. It never touches another process than the one that it is preloaded
into, and never a file outside the prefix that it was given.
"""

from __future__ import annotations

import atexit
import functools
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

WRITE, FSYNC, READ, ALLOCATION = range(4)
KINDS = {WRITE: "write", FSYNC: "fsync", READ: "read", ALLOCATION: "allocation"}

# Slots and offsets as at the head of syscalls.c.
_MAPPED, _DISK_LIMIT, _DISK_USED, _CLOCK_OFFSET, _CLOCK_FROZEN = range(5)
_ARMED, _ERRNO, _FOR_GOOD, _SEEN, _FAILED, _SIZE_MIN = range(6)
_PREFIX, _OBJECT, _TOLD, _SIZE = 512, 2048, 3072, 4096


@functools.cache
def library() -> Path:
    """The compiled library; gone when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="sessiond-syscalls-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    built = folder / "syscalls.so"
    source = Path(__file__).with_name("syscalls.c")
    command = [os.environ.get("CC", "gcc"), "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([*command, "-o", str(built), str(source), "-ldl", "-pthread"], check=True)
    return built


class Control:
    """The control file of one daemon. Everything takes effect at the daemon's next call."""

    def __init__(self, path: Path, prefix: Path) -> None:
        path.write_bytes(bytes(_SIZE))
        self._path = path
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _SIZE)
        self._text(_PREFIX, str(prefix.resolve()))

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to be steered from here."""
        return {"LD_PRELOAD": str(library()), "SYSCALLS_CONTROL": str(self._path)}

    @property
    def is_mapped(self) -> bool:
        """Whether a process took it."""
        return self._get(_MAPPED) == 1

    def arm(self, kind: int, nth: int, code: int, *, for_good: bool = False) -> None:
        """Fail the nth call of a kind from now on, counted from 1; for good: and every later one."""
        rule = 8 + 8 * kind
        self._set(rule + _ARMED, 0)
        for slot, value in ((_SEEN, 0), (_FAILED, 0), (_ERRNO, code), (_FOR_GOOD, int(for_good))):
            self._set(rule + slot, value)
        self._text(_TOLD, "")
        self._set(rule + _ARMED, nth)

    def count(self, kind: int) -> None:
        """Fail none, and count the calls of a kind from now on."""
        self.arm(kind, 0, 0)

    def disarm(self) -> None:
        """Fail nothing any more; the counts stay."""
        for kind in KINDS:
            self._set(8 + 8 * kind + _ARMED, 0)

    def seen(self, kind: int) -> int:
        """Calls of a kind since it was armed or counted."""
        return self._get(8 + 8 * kind + _SEEN)

    def failed(self, kind: int) -> int:
        """How many of them were failed."""
        return self._get(8 + 8 * kind + _FAILED)

    @property
    def told(self) -> str:
        """The name and path of the call that failed last."""
        return self._map[_TOLD:_SIZE].split(b"\0", 1)[0].decode(errors="replace")

    def starve(self, object_name: str, size_min: int) -> None:
        """Allocations are those of object files with this in their name, or of the one that defines @symbol, of at
        least so many bytes.
        """
        self._text(_OBJECT, "")
        self._set(8 + 8 * ALLOCATION + _SIZE_MIN, size_min)
        self._text(_OBJECT, object_name)

    def limit_disk(self, bytes_more: int | None) -> None:
        """The disk takes so many bytes more; None: as many as there are."""
        self._set(_DISK_LIMIT, 0 if bytes_more is None else max(1, self.disk_used + bytes_more))

    @property
    def disk_used(self) -> int:
        """Bytes that were allocated under the prefix and not given back."""
        return self._get(_DISK_USED)

    def shift_clock(self, offset_s: float) -> None:
        """Let the wall clock be so far off."""
        self._set(_CLOCK_OFFSET, int(offset_s * 1e9))

    def freeze_clock(self, at_ns: int) -> None:
        """Let the wall clock stand still at this time; 0 lets it run again."""
        self._set(_CLOCK_FROZEN, at_ns)

    def _get(self, slot: int) -> int:
        return int(struct.unpack_from("<q", self._map, 8 * slot)[0])

    def _set(self, slot: int, value: int) -> None:
        struct.pack_into("<q", self._map, 8 * slot, value)

    def _text(self, offset: int, text: str) -> None:
        end = {_PREFIX: _OBJECT, _OBJECT: _TOLD, _TOLD: _SIZE}[offset]
        raw = text.encode()
        assert len(raw) < end - offset
        self._map[offset:end] = raw.ljust(end - offset, b"\0")
