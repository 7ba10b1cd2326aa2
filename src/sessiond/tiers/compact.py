"""Segments: sealing turns into one, and merging many small ones into one large one.

It promises that a merged segment holds the very frames of those that it replaces. It never deletes: what was replaced
stays readable for as long as somebody may hold the manifest that names it, and `flush` removes it after that.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import Any, Final

from sessiond import core
from sessiond.core import envelope
from sessiond.core.layout import SEGMENT_BYTES_MAX
from sessiond.core.manifest import SEGMENT_ROWS_KEPT, Manifest
from sessiond.tiers.cloud.bucket import segment_index_key, segment_key

# A segment below this is small. A tail is sealed from 64 KiB on, so that most are.
SMALL_BYTES_MAX: Final = 1024**2
# So many small neighbours are merged when a flush has the time, and so many in any case.
MERGE_SEGMENTS_MIN: Final = 32
MERGE_SEGMENTS_OVERDUE: Final = 48
# What a merge replaced is deleted so long after it: no reader works with one manifest for as long as this, and one that
# does finds the object gone and reads the manifest again.
REPLACED_KEPT_MS: Final = 2 * 60 * 1000
# The manifest's key, unknown to older writers, which carry it along: rows [name, replaced at ms], the name without
# s/<hash>/, or b/ and the name without b/<hash>/.
REPLACED_KEY: Final = "replaced"


def seal(whose: Manifest, epoch: int, frames: bytes) -> tuple[str, bytes, list[Any]]:
    """(key, object bytes, manifest row) of a segment with these frames, written under this epoch. Raises Corrupt."""
    headers = core.scan_frames(whose.h, frames)
    first, last = headers[0], headers[-1]
    marks = [
        [header.seq, header.offset, *header.cumulative]
        for before, header in pairwise(headers)
        if before.offset // envelope.CHUNK_BYTES != header.offset // envelope.CHUNK_BYTES
    ]
    meta = {
        "v": 1,
        "tenant": whose.tenant,
        "session": whose.session,
        "user": whose.user,
        "h": whose.h,
        "epoch": epoch,
        "first": first.seq,
        "last": last.seq,
        "chain": last.chain,
        "marks": marks,
    }
    body = envelope.seal(envelope.KIND_SEGMENT, meta, frames)
    sha256 = hashlib.sha256(body).digest()
    row = [epoch, first.seq, last.seq, sha256, len(body), *last.cumulative, b"", b"", last.chain]
    return segment_key(whose.h, epoch, first.seq, sha256), body, row


def mergeable(rows: list[list[Any]], pinned_seq: int = 0) -> tuple[int, int] | None:
    """(start, stop) of the longest run of small neighbours that fit into one segment; None if it is not worth it.

    Rows of a parent's segments stay as they are: a fork does not own them. So do those up to pinned_seq: forks name
    them.
    """
    best: tuple[int, int] | None = None
    start = size_bytes = 0
    for stop, row in enumerate(rows, 1):
        if row[4] >= SMALL_BYTES_MAX or row[8] or row[1] <= pinned_seq:
            start, size_bytes = stop, 0
            continue
        size_bytes += row[4]
        while size_bytes > SEGMENT_BYTES_MAX:
            size_bytes -= rows[start][4]
            start += 1
        if best is None or stop - start > best[1] - best[0]:
            best = start, stop
    return best if best is not None and best[1] - best[0] >= MERGE_SEGMENTS_MIN else None


def spill(manifest: Manifest, rows: list[list[Any]]) -> tuple[str, bytes]:
    """Have a manifest name its newest rows only; (key, bytes) of the object with the older ones, to be put first."""
    moved, kept = rows[:-SEGMENT_ROWS_KEPT], rows[-SEGMENT_ROWS_KEPT:]
    meta = {"v": 1, "h": manifest.h, "session": manifest.session, "tenant": manifest.tenant, "rows": moved}
    body = envelope.seal(envelope.KIND_SEGMENT_INDEX, meta)
    name = segment_index_key(manifest.h, manifest.mutation, hashlib.sha256(body).digest())
    manifest.index = [name, moved[0][1], moved[-1][2], len(moved)]
    manifest.segments = kept
    return name, body


def row_key(manifest: Manifest, row: list[Any]) -> str:
    """The object's key of a segment row."""
    return segment_key(bytes(row[8]) or manifest.h, int(row[0]), int(row[1]), bytes(row[3]))


def replaced(manifest: Manifest) -> list[tuple[str, int]]:
    """(key, replaced at ms) of the objects that a merge, a newer index or a newer version of a blob replaced and that
    are to be deleted.
    """
    rows = [(name.rpartition("/"), int(at_ms)) for name, at_ms in manifest.extra.get(REPLACED_KEY, [])]
    return [(f"{first or 's'}/{manifest.h.hex()}/{name}", at_ms) for (first, _, name), at_ms in rows]


def with_replaced(manifest: Manifest, rows: list[tuple[str, int]]) -> dict[str, Any]:
    """What else a manifest carries, with these rows as what is to be deleted."""
    rest = {key: value for key, value in manifest.extra.items() if key != REPLACED_KEY}
    if rows:
        parts = [(*key.split("/"), at_ms) for key, at_ms in rows]
        rest[REPLACED_KEY] = [[name if first == "s" else f"{first}/{name}", at_ms] for first, _, name, at_ms in parts]
    return rest
