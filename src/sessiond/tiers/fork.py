"""Making a fork: the first manifest of a session that begins with another one's turns, and the rows to hold hot.

It promises that a fork says what a fresh log of the same turns would say, and that it copies none of the parent's turns
into the cloud tier: its manifest names the parent's segments. It never writes; whoever calls it has pinned the range.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from sessiond import core
from sessiond.core import forks, rules
from sessiond.core import state as states
from sessiond.core.expiry import expires_ms
from sessiond.core.invariants import turn_id_of
from sessiond.core.layout import FLAG_BOUNDARY, HEADER_BYTES, Header
from sessiond.core.manifest import (
    CHECKPOINTS_MAX,
    EPOCH_ROWS_MAX,
    INLINE_NEWEST_BYTES,
    KEPT_BYTES_MAX,
    LIFECYCLE_ACTIVE,
    SEGMENT_ROWS_MAX,
    TURN_IDS_MAX,
    Manifest,
)
from sessiond.tiers.compact import spill
from sessiond.tiers.hydrate import Node, Rows, Segments


@dataclass(frozen=True, slots=True)
class Fork:
    """A fork that is ready to be made. index: (key, bytes) of the object with its older segment rows, put first."""

    manifest: Manifest
    rows: Rows
    index: tuple[str, bytes] | None


def turn_at(segments: Segments, parent: Manifest, seq: int) -> Header:
    """The header of one turn of a session as the cloud tier has it. Raises Corrupt, Unavailable."""
    frames, _ = segments.between(parent, seq, seq, 1)
    return core.read_frame(parent.h, frames)


def make(segments: Segments, node: Node, parent: Manifest, at: Header, h: bytes, session: str, now_ms: int) -> Fork:
    """The fork of `parent` after the turn `at`, which a segment ends with or holds. Blocks.

    h, session: of the fork. Raises Corrupt where a segment of the parent can't be read, Unavailable.
    """
    epoch = at.epoch + 1
    birth = {
        "created_ms": now_ms,
        # A replay starts from what the parent was created with.
        "metadata": dict(parent.birth.get("metadata", {})),
        "forked_from": parent.session,
        "forked_epoch": at.epoch,
        "forked_seq": at.seq,
        "reset_of": "",
        "root": forks.root_of(parent.birth, parent.h),
        "parent": parent.h,
        "forked_chain": at.chain,
    }
    owned = [list(row) for row in parent.epochs if row[2] <= at.seq and row[0] <= at.epoch]
    fork = Manifest(
        tenant=parent.tenant,
        session=session,
        user=parent.user,
        h=h,
        mutation=1,
        write_id=os.urandom(8),
        epoch=epoch,
        epochs=[*owned, [epoch, node.incarnation, at.seq + 1, 1]][-EPOCH_ROWS_MAX:],
        owner=[node.incarnation, node.name, node.address],
        birth=birth,
        policy=parent.policy,
        head=at.seq,
        head_epoch=at.epoch,
        state=b"",
        checkpoints=[],
        turn_ids=b"",
        segments=_cut_rows(parent, segments.rows(parent), at),
        index=None,
        kept=[],
        kept_bytes=0,
        inline_first=at.seq + 1,
        # What was lost behind the turn that this is forked at was never the fork's.
        loss=[list(row) for row in parent.loss if row[1] < at.seq],
        lifecycle=LIFECYCLE_ACTIVE,
        expires_ms=expires_ms(parent.policy, now_ms, now_ms),
        written_ms=now_ms,
    )
    fork.state, fork.checkpoints = _folded(segments, parent, fork)
    entries, rows = _newest(segments, fork)
    fork.turn_ids = b"".join(entries)
    rows = replace(rows, kept_frames=_kept(segments, fork, rows.first_seq))
    index = spill(fork, fork.segments) if len(fork.segments) > SEGMENT_ROWS_MAX else None
    return Fork(fork, rows, index)


def _cut_rows(parent: Manifest, rows: list[list[Any]], at: Header) -> list[list[Any]]:
    """The parent's segment rows up to a turn, as a fork names them: each with whose it is, the last one cut."""
    shared: list[list[Any]] = []
    for row in rows:
        if row[1] > at.seq:
            break
        named = list(row)
        named[8] = bytes(row[8]) or parent.h
        if row[2] > at.seq:
            named[2], named[5:8], named[10] = at.seq, list(at.cumulative), at.chain
        shared.append(named)
    return shared


def _folded(segments: Segments, parent: Manifest, fork: Manifest) -> tuple[bytes, list[list[Any]]]:
    """(state at the fork, its newest checkpoints): the parent's where it still has them, else a replay."""
    saved: list[list[Any]] = [[int(version), bytes(state)] for version, state in parent.checkpoints]
    saved = [entry for entry in saved if entry[0] & 0xFFFFFFFF <= fork.head]
    state, cursor = states.genesis(forks.root_of(fork.birth, fork.h), fork.birth["metadata"]), 0
    if saved:
        state, cursor = saved[-1][1], saved[-1][0] & 0xFFFFFFFF
    while cursor < fork.head:
        _, cursor_last, frames = segments.covering(fork, cursor + 1)
        begin = 0
        for header in core.scan_frames(fork.h, frames):
            if header.seq <= cursor:
                begin = header.end
            elif header.flags & FLAG_BOUNDARY:
                state, begin = core.replay(fork.h, state, frames[begin : header.end]), header.end
                saved = [*saved, [header.epoch << 32 | header.seq, state]][-CHECKPOINTS_MAX:]
        state, cursor = core.replay(fork.h, state, frames[begin:]), cursor_last
    return state, saved


def _newest(segments: Segments, fork: Manifest) -> tuple[list[bytes], Rows]:
    """(dedupe entries of the last turns under the fork's own hash, the newest turns to hold hot)."""
    first_id = max(1, fork.head - TURN_IDS_MAX + 1)
    entries: list[bytes] = []
    pieces: list[bytes] = []
    size, hot_first, due = 0, fork.head + 1, fork.head
    while due >= first_id or (due and size < INLINE_NEWEST_BYTES and hot_first == due + 1):
        first, _, frames = segments.covering(fork, due)
        for header in reversed(core.scan_frames(fork.h, frames)):
            length = header.end - header.offset
            if header.seq + 1 == hot_first and (size + length <= INLINE_NEWEST_BYTES):
                pieces.append(frames[header.offset : header.end])
                size, hot_first = size + length, header.seq
            if header.seq >= first_id:
                turn_id = turn_id_of(frames[header.offset + HEADER_BYTES : header.end])
                entries.append(rules.turn_id_hash(fork.h, turn_id) + header.digest[:8] + header.seq.to_bytes(8, "big"))
        due = first - 1
    return entries[::-1], Rows(b"", b"".join(reversed(pieces)), hot_first)


def _kept(segments: Segments, fork: Manifest, hot_first: int) -> bytes:
    """The single older turns that every window needs: instructions and summaries, oldest first."""
    state = states.decode(fork.state)
    wanted = [place[0] for place in (state.instructions, *state.summary) if place is not None and place[0] < hot_first]
    pieces: list[bytes] = []
    for seq in sorted(wanted):
        _, _, frames = segments.covering(fork, seq)
        header = next(found for found in core.scan_frames(fork.h, frames) if found.seq == seq)
        if sum(map(len, pieces)) + header.end - header.offset <= KEPT_BYTES_MAX:
            pieces.append(frames[header.offset : header.end])
    return b"".join(pieces)
