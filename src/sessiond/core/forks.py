"""What a fork shares with the session that it was forked from, and where its own log begins.

A fork's first turns lie in the segments of its parent, whose frames are sealed with the parent's hash and whose chain
is rooted there. It promises that a frame sealed anew is the same turn under the same chain. It never reads a store.

Keys of a manifest's birth that only a fork has: `root`, the hash at the root of its chain; `parent`, the hash of the
session in whose manifest its range is pinned; `forked_chain`, the chain at the turn that it was forked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sessiond import core
from sessiond.core.layout import CRC_END, CRC_OFFSET, Header


def forked_seq(birth: Mapping[str, Any]) -> int:
    """The last turn that a fork shares with its parent; 0 for a session that is no fork."""
    return int(birth.get("forked_seq", 0))


def root_of(birth: Mapping[str, Any], h: bytes) -> bytes:
    """The hash at the root of a session's chain: its own, or that of the first session of a line of forks."""
    return bytes(birth.get("root") or h)


def parent_of(birth: Mapping[str, Any]) -> bytes:
    """The hash of the session in whose manifest a fork's range is pinned; empty for a session that is no fork."""
    return bytes(birth.get("parent") or b"")


def pinned_seq(pins: Iterable[Sequence[Any]]) -> int:
    """The last turn that any fork needs of its parent; 0 if none does."""
    return max((int(pin[3]) for pin in pins), default=0)


def reseal(h: bytes, frames: bytes, headers: Sequence[Header]) -> bytes:
    """The frames of these headers, which were verified, with checksums seeded with another session's hash."""
    seed = core.crc32c(h)
    pieces: list[bytes] = []
    for header in headers:
        front = frames[header.offset : header.offset + CRC_OFFSET]
        rest = frames[header.offset + CRC_END : header.end]
        checksum = core.crc32c(rest, core.crc32c(front, seed))
        pieces += (front, checksum.to_bytes(CRC_END - CRC_OFFSET, "little"), rest)
    return b"".join(pieces)
