"""The hot tier's file before anybody maps it: who has it open, and whether its size and meta pages can be right.

LMDB checks next to nothing of what it maps. It never opens the environment, and reads a few hundred bytes at most.
"""

from __future__ import annotations

import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sessiond.errors import Corrupt, Unavailable

DATA_FILE: Final = "data.mdb"
LOCK_FILE: Final = "lock.mdb"
PAGE_BYTES: Final = 4096
READ_AGAIN_MAX: Final = 4
READ_AGAIN_WAIT_S: Final = 0.005
# LMDB 0.9, 64 bit: page header (pgno, pad, flags, lower, upper), then MDB_meta. Only what is compared is named.
_META: Final = struct.Struct("<QHHHH" + "IIQQ" + "IHHQQQQQ" + "IHHQQQQQ" + "QQ")
_MAGIC: Final = 0xBEEFC0DE
_META_PAGE: Final = 0x08
_NO_PAGE: Final = 2**64 - 1


def in_use(hot_dir: Path) -> bool:
    """Whether some process has the environment open. Asked only by a process that has not."""
    with alone(hot_dir) as is_alone:
        return not is_alone


@contextmanager
def alone(hot_dir: Path) -> Iterator[bool]:
    """Whether this process is the only one, asked by the lock that LMDB itself takes: a write lock on byte 0."""
    try:
        descriptor = os.open(hot_dir / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield True
        return
    except PermissionError:
        yield False
        return
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 0)
        except (BlockingIOError, PermissionError):
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def require_unused(hot_dir: Path) -> None:
    """Raises Unavailable HOT_TIER_IN_USE while some process has the environment open."""
    if hot_dir.exists() and in_use(hot_dir):
        raise Unavailable("HOT_TIER_IN_USE", f"A process has the hot tier in {hot_dir} open.", {"path": str(hot_dir)})


def file_damage(hot_dir: Path) -> str:
    """What is wrong with the meta pages, of which one is believed when the file is mapped; empty if nothing is.

    Raises OSError if the file can't be read.
    """
    found = ""
    for attempt in range(READ_AGAIN_MAX):
        if attempt:
            time.sleep(READ_AGAIN_WAIT_S)  # a live daemon may have committed between the two pages
        found = _file_damage(hot_dir / DATA_FILE)
        if not found:
            return ""
    return found


def _file_damage(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        raw = os.pread(file.fileno(), 2 * PAGE_BYTES, 0)
        if len(raw) < _META.size:
            return f"{path} has {len(raw)} bytes, less than one page"
        page_bytes = _META.unpack_from(raw)[9]
        if page_bytes not in (4096, 8192, 16384, 32768, 65536):
            return f"{path} names a page of {page_bytes} bytes"
        second = raw[page_bytes : page_bytes + _META.size] or os.pread(file.fileno(), _META.size, page_bytes)
    if len(second) < _META.size:
        return f"{path} has less than two pages"
    numbers, outside = [], []
    for place, page in enumerate((raw[: _META.size], second)):
        values = _META.unpack(page)
        if (values[0], values[2], values[5], values[6], values[9]) != (place, _META_PAGE, _MAGIC, 1, page_bytes):
            return f"meta page {place} of {path} is damaged"
        last_page, number = values[25], values[26]
        if number and number % 2 != place:
            return f"meta page {place} of {path} carries transaction {number}, which belongs to the other"
        outside.append(any(root != _NO_PAGE and not 2 <= root <= last_page for root in (values[16], values[24])))
        numbers.append(number)
    # Commits take turns, so the two are always one apart: anything else would bring older rows back.
    if abs(numbers[0] - numbers[1]) > 1:
        return f"the meta pages of {path} carry the transactions {numbers[0]} and {numbers[1]}"
    # The newer one is believed. The other may be what LMDB made of a commit whose last write failed: it takes number
    # and size back, and leaves the roots (mdb_env_write_meta).
    newest = numbers.index(max(numbers))
    if outside[newest]:
        return f"meta page {newest} of {path} leads outside of its file"
    return ""


def check_file(hot_dir: Path) -> None:
    """Raises Corrupt CORRUPT_HOT_ROW if the meta pages can't be believed; does nothing where there is no file."""
    try:
        damage = file_damage(hot_dir)
    except OSError:
        return  # opening it says better what is wrong
    if damage:
        raise Corrupt("CORRUPT_HOT_ROW", f"The hot tier in {hot_dir} is damaged: {damage}.", {"path": str(hot_dir)})
