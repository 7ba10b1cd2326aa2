"""The invariants that can be read off a store, each a named function over one session's view.

It promises one sentence per violation, saying what was found. It reads nothing itself: `sessiond.verify` gathers views.
I8, I10 and I15 speak of replies and of time, and are held by tests over the gRPC port instead.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from sessiond import core
from sessiond.core import blobs, rules
from sessiond.core import state as states
from sessiond.core.layout import (
    BODY_DERIVED,
    BODY_META,
    FLAG_BOUNDARY,
    FLAG_CUT,
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    KIND_MESSAGE,
    KIND_REWIND,
    KIND_SUMMARY,
    MODE_HYBRID,
    ROW_BYTES_MAX,
    SEGMENT_BYTES_MAX,
    Header,
)
from sessiond.core.manifest import (
    CHECKPOINTS_MAX,
    KEPT_BYTES_MAX,
    LIFECYCLE_DELETED,
    SEGMENT_ROWS_MAX,
    TURN_ID_ENTRY_BYTES,
    TURN_IDS_MAX,
    Manifest,
)
from sessiond.errors import SessiondError

WINDOW_BUDGETS: Final = (256, 4000, 16_000)
# Of one invariant and one session; one cause, such as a wrong key, may show at every turn.
EXPLANATIONS_MAX: Final = 5


@dataclass(slots=True)
class Turn:
    """One turn of the log as it was read: its header, and its body with the daemon's field 27."""

    header: Header
    body: bytes


@dataclass(slots=True)
class HotView:
    """What the hot tier says of a session."""

    epoch: int
    owned: bool
    ours: bool
    head_seq: int
    cloud_seq: int
    hot_first: int
    state: bytes
    row_sizes: list[tuple[int, int, int]] = field(default_factory=list)
    checkpoints: list[tuple[int, bytes]] = field(default_factory=list)
    turn_ids: bytes = b""
    is_dirty: bool = False
    has_dirty_row: bool = False
    is_listed: bool = True
    # Its blobs: all together, each by its key, and what the manifest said of them that it committed last.
    ledger: blobs.Ledger | None = None
    blobs: dict[str, blobs.Blob] = field(default_factory=dict)
    blobs_committed: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class View:
    """Everything that was read of one session. `log` is the whole log, oldest first, as far as it could be read.

    unlisted: what an index should say of it and does not. left_over: what a deletion should have removed. root: the
    hash at the root of its chain, where that is not its own.
    """

    h: bytes
    hash_key: bytes
    tenant: str
    session: str
    birth_metadata: dict[str, str]
    log: list[Turn]
    head_seq: int
    state: bytes
    hot: HotView | None
    cloud: Manifest | None
    cloud_checked_seqs: dict[int, bytes] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    root: bytes = b""


def i1_acked_turns_are_there(view: View) -> Iterator[str]:
    """The log reaches the head that was acknowledged, and what is not flushed is noted for the flusher."""
    found = view.log[-1].header.seq if view.log else 0
    if found != view.head_seq and not view.unreadable:
        yield f"the head is turn {view.head_seq} and the log ends at turn {found}"
    hot = view.hot
    if hot is not None and hot.owned and hot.is_dirty and not hot.has_dirty_row:
        yield f"turns {hot.cloud_seq + 1} to {hot.head_seq} are not flushed and no row has the flusher look at them"
    if hot is not None and hot.owned and not hot.is_dirty and not blobs.equals(hot.ledger, hot.blobs_committed):
        yield "blobs were written that are not flushed, and nothing says so"


def i2_cloud_seq_is_in_the_cloud(view: View) -> Iterator[str]:
    """What the node counts as committed is in the manifest."""
    if view.hot is None or not view.hot.ours:
        return
    if view.cloud is None:
        if any(f"m/{view.h.hex()}" in text for text in view.unreadable):
            return  # there is one, and I11 says what is wrong with it
        yield "the node owns it and the cloud tier has no manifest of it"
    elif view.cloud.epoch == view.hot.epoch and view.cloud.head < view.hot.cloud_seq:
        yield f"the node counts turn {view.hot.cloud_seq} as committed and the manifest ends at turn {view.cloud.head}"
    elif view.cloud.epoch == view.hot.epoch and blobs.last_of(view.cloud.state_keys) < blobs.last_of(
        view.hot.blobs_committed
    ):
        counted, found = blobs.last_of(view.hot.blobs_committed), blobs.last_of(view.cloud.state_keys)
        yield f"the node counts blobs up to version {counted} as committed and the manifest knows version {found}"


def i3_turn_ids_are_unique(view: View) -> Iterator[str]:
    """No turn_id was applied twice, and the dedupe rows name the turns that they stand for."""
    seen: dict[str, int] = {}
    hashes: dict[int, bytes] = {}
    for turn in view.log:
        name = turn_id_of(turn.body)
        if name in seen and view.head_seq - seen[name] < TURN_IDS_MAX:
            yield f"the turn_id {name!r} stands at turn {seen[name]} and at turn {turn.header.seq}"
        seen[name] = turn.header.seq
        hashes[turn.header.seq] = rules.turn_id_hash(view.h, name) + turn.header.digest[:8]
    for where, entries in (
        ("hot tier", view.hot.turn_ids if view.hot else None),
        ("manifest", view.cloud.turn_ids if view.cloud else None),
    ):
        if entries is None:
            continue
        last = view.cloud.head if view.cloud and where == "manifest" else view.head_seq
        held = set()
        for at in range(0, len(entries), TURN_ID_ENTRY_BYTES):
            seq = int.from_bytes(entries[at + 16 : at + 24], "big")
            held.add(seq)
            if seq in hashes and hashes[seq] != entries[at : at + 16]:
                yield f"the {where}'s dedupe entry of turn {seq} names another turn"
        if view.unreadable:
            continue  # what was not read is not lacking
        lacking = [seq for seq in range(max(1, last - TURN_IDS_MAX + 1), last + 1) if seq not in held]
        if lacking:
            yield f"the {where} lacks the dedupe entries of {len(lacking)} turns, the first of turn {lacking[0]}"


def i4_log_is_gap_free(view: View) -> Iterator[str]:
    """Seqs are dense, the chain is whole, and both tiers tell the same history."""
    chain, due = view.root or view.h, 1
    for turn in view.log:
        header = turn.header
        if header.seq != due:
            yield f"turn {due} is missing before turn {header.seq}"
            return
        due += 1
        body = turn.body[: said_end(turn.body)]
        digest = rules.body_digest(view.hash_key, header.kind, header.role, header.status, body)
        if digest != header.digest and not header.flags & 32:
            yield f"the body of turn {header.seq} does not match its digest"
        if rules.next_chain(chain, header.digest) != header.chain:
            yield f"the chain is broken at turn {header.seq}"
        chain = header.chain
        other = view.cloud_checked_seqs.get(header.seq)
        if other is not None and other != header.chain:
            yield f"turn {header.seq} is another one in the cloud tier"
    if view.cloud is not None:
        rows = view.cloud.segments
        for before, after in pairwise(rows):
            if after[1] != before[2] + 1:
                yield f"the manifest's segments leave a gap between turn {before[2]} and turn {after[1]}"
        sealed = view.cloud.sealed_seq
        if view.cloud.inline_first > sealed + 1:
            yield f"turns {sealed + 1} to {view.cloud.inline_first - 1} are neither in a segment nor in the manifest"
    yield from _blobs_agree(view)


def _blobs_agree(view: View) -> Iterator[str]:
    """The node that owns a session went on from the blobs that the manifest has."""
    hot, cloud = view.hot, view.cloud
    if hot is None or cloud is None or not hot.ours:
        return
    if not blobs.continues(hot.ledger, cloud.state_keys):
        yield "the manifest has writes of blobs that the node which made it does not know"
    committed = {int(row[1]): (str(row[0]), bytes(row[3])) for row in blobs.rows(cloud.state_keys)}
    for key, blob in hot.blobs.items():
        if committed.get(blob.version, (key, blob.sha256)) != (key, blob.sha256):
            yield f"version {blob.version} of the blob {key!r} is another one in the cloud tier"


def i5_epochs_rise(view: View) -> Iterator[str]:
    """Epochs never fall along the log, and the manifest's table agrees with it."""
    for before, after in pairwise(view.log):
        if after.header.epoch < before.header.epoch:
            yield f"the epoch falls from {before.header.epoch} to {after.header.epoch} at turn {after.header.seq}"
    if view.cloud is None:
        return
    epochs = [row[0] for row in view.cloud.epochs]
    if epochs != sorted(set(epochs)) or (epochs and epochs[-1] != view.cloud.epoch):
        yield f"the manifest's epochs are {epochs} and its epoch is {view.cloud.epoch}"
    # A parent's segment may have been sealed under any later epoch of the parent.
    late = [row for row in view.cloud.segments if row[0] > view.cloud.epoch and not row[8]]
    if late:
        yield f"the segment of turns {late[0][1]} to {late[0][2]} is of epoch {late[0][0]}, after the manifest's"
    for row in blobs.rows(view.cloud.state_keys):
        if int(row[1]) >> 32 > view.cloud.epoch:
            yield f"the blob {row[0]!r} is of epoch {int(row[1]) >> 32}, after the manifest's"
    begins = sorted((int(row[2]), int(row[0])) for row in view.cloud.epochs)
    firsts = {epoch: first for first, epoch in begins}
    for turn in view.log:
        seq, epoch = turn.header.seq, turn.header.epoch
        if seq > view.cloud.head:
            break
        place = bisect_right(begins, (seq, 1 << 32)) - 1
        if place >= 0 and epoch < begins[place][1]:
            yield f"turn {seq} is of epoch {epoch}, and epoch {begins[place][1]} began at turn {begins[place][0]}"
        if seq < firsts.get(epoch, 0):
            yield f"turn {seq} is of epoch {epoch}, which began at turn {firsts[epoch]}"


def i6_fenced_nodes_own_nothing(view: View) -> Iterator[str]:
    """A node whose epoch is below the manifest's holds no session as its own."""
    if view.hot is None or view.cloud is None or not view.hot.owned:
        return
    if view.hot.epoch < view.cloud.epoch:
        yield f"the node holds it under epoch {view.hot.epoch} and the manifest is at epoch {view.cloud.epoch}"
    elif view.hot.epoch == view.cloud.epoch and not view.hot.ours:
        yield f"the node holds it under epoch {view.hot.epoch}, which the manifest gives to another incarnation"


def i7_versions_rise(view: View) -> Iterator[str]:
    """Stored checkpoints have rising versions, each that of its own content; no blob has another one's version."""
    for where, saved in checkpoint_lists(view):
        versions = [version for version, _ in saved]
        if versions != sorted(set(versions)):
            yield f"the {where}'s checkpoint versions do not rise: {versions}"
        for version, content in saved:
            state = states.decode(content)
            if state.boundary[0] << 32 | state.boundary[1] != version or state.cursor != version & 0xFFFFFFFF:
                yield f"the {where}'s checkpoint {version} holds another version"
    for where, last, given in blob_lists(view):
        if len(given) != len(set(given)):
            yield f"the {where} gives the same version to several blobs"
        if given and max(given) > last:
            yield f"the {where} has a blob of version {max(given)}, and the newest that was given out is {last}"


def i9_listings_are_whole(view: View) -> Iterator[str]:
    """Every index that should name the session does: a listing would lack it without saying so."""
    yield from view.unlisted
    if view.hot is not None and view.hot.owned and not view.hot.is_listed:
        yield "the hot tier's list of its user's sessions lacks it"


def i11_bytes_verify(view: View) -> Iterator[str]:
    """Every byte that was read verified."""
    yield from view.unreadable


def i12_nothing_crosses(view: View) -> Iterator[str]:
    """The session's hash is that of its tenant and id."""
    if rules.session_hash(view.hash_key, view.tenant, view.session) != view.h:
        yield f"its keys belong to another tenant or session than {view.tenant!r} and {view.session!r}"


def i13_deleted_stay_deleted(view: View) -> Iterator[str]:
    """Nothing is left of a deleted session but its tombstone."""
    yield from view.left_over
    cloud = view.cloud
    if cloud is None or cloud.lifecycle != LIFECYCLE_DELETED:
        return
    if cloud.owner is not None:
        yield "its tombstone has an owner"
    if cloud.segments or cloud.index or cloud.orphans or cloud.payload or cloud.state or cloud.checkpoints:
        yield "its tombstone still has turns, segments or a state"
    if cloud.state_keys:
        yield "its tombstone still names blobs"


def i14_sizes_are_bounded(view: View) -> Iterator[str]:
    """Rows, checkpoints, dedupe entries and manifests stay within their named limits."""
    if view.hot is not None:
        for first_seq, size, frames in view.hot.row_sizes:
            if size > ROW_BYTES_MAX and frames > 1:
                yield f"the row of turn {first_seq} has {size} bytes in {frames} frames"
        if len(view.hot.turn_ids) > 2 * TURN_IDS_MAX * TURN_ID_ENTRY_BYTES:
            yield f"the dedupe rows have {len(view.hot.turn_ids)} bytes"
    for where, saved in checkpoint_lists(view):
        if len(saved) > CHECKPOINTS_MAX:
            yield f"the {where} keeps {len(saved)} checkpoints"
    if view.cloud is not None:
        if len(view.cloud.segments) > SEGMENT_ROWS_MAX:
            yield f"the manifest lists {len(view.cloud.segments)} segments"
        if (
            len(view.cloud.inline_frames) > SEGMENT_BYTES_MAX + FRAME_BYTES_MAX
            or view.cloud.kept_bytes > KEPT_BYTES_MAX
        ):
            yield f"the manifest carries {len(view.cloud.payload)} bytes of turns"
    for where, ledger in (
        ("hot tier", view.hot.ledger if view.hot is not None else None),
        ("manifest", blobs.ledger_of(view.cloud.state_keys) if view.cloud is not None else None),
    ):
        if ledger is None:
            continue
        if ledger.keys > blobs.KEYS_MAX or ledger.content_bytes > blobs.TOTAL_BYTES_MAX:
            yield f"the {where} has {ledger.keys} blobs of {ledger.content_bytes} bytes"
        if ledger.header_bytes > blobs.HEADER_BYTES_MAX:
            yield f"the {where} has {ledger.header_bytes} bytes of keys, media types and labels"
        if len(ledger.writes) > blobs.WRITES_MAX * blobs.WRITE_BYTES or len(ledger.writes) % blobs.WRITE_BYTES:
            yield f"the {where} remembers {len(ledger.writes)} bytes of writes"


def i16_windows_fit(view: View) -> Iterator[str]:
    """Windows at some budgets stay inside them by stored counts and start at a legal cut."""
    if view.unreadable or not view.log:
        return
    state = states.decode(view.state)
    rows = [core_frame(view, turn) for turn in view.log]
    by_seq = {turn.header.seq: turn.header for turn in view.log}
    for slot in range(2):
        for budget in WINDOW_BUDGETS:
            fit = core.fit_window(
                view.h,
                rows,
                slot,
                state.last_live_seq,
                state.exchange_seq,
                MODE_HYBRID,
                0,
                budget - budget // 16,
                budget,
                max(1, budget // 4),
                0,
            )
            if fit[0] != 0 or not fit[1]:
                continue
            seqs = [seq for low, high in fit[5] for seq in range(low, high + 1)]
            total = sum(by_seq[seq].tokens[slot] for seq in seqs)
            if total > budget or total != fit[2]:
                yield f"a window of {budget} tokens holds {total}, counted as {fit[2]}"
            if not by_seq[fit[1]].flags & FLAG_CUT:
                yield f"a window of {budget} tokens starts at turn {fit[1]}, which is no legal cut"


def i17_checkpoint_is_a_replay(view: View) -> Iterator[str]:
    """State and checkpoints equal a replay of the whole log, and what each turn's flags say follows from it."""
    if view.unreadable:
        return
    wanted = {
        version & 0xFFFFFFFF: (where, content) for where, saved in checkpoint_lists(view) for version, content in saved
    }
    cloud = view.cloud if view.hot is not None else None
    state = states.genesis(view.root or view.h, view.birth_metadata)
    chains: dict[int, bytes] = {}
    history: dict[int, bytes] = {0: state}
    keeps = {rewind_target(turn.body) for turn in view.log if turn.header.kind == KIND_REWIND}
    for turn in view.log:
        places = states.decode_places(state)
        yield from _rederive(view, turn, places, chains, history)
        state = core.replay(view.h, state, core_frame(view, turn))
        seq = turn.header.seq
        chains[seq] = turn.header.chain
        if seq in keeps:
            history[seq] = state
        if turn.header.flags & FLAG_BOUNDARY and seq in wanted and wanted[seq][1] != state:
            yield f"the {wanted[seq][0]}'s checkpoint at turn {seq} is not what a replay gives"
        if cloud is not None and seq == cloud.head and cloud.state != state:
            yield f"the manifest's state at turn {seq} is not what a replay gives"
    if state != view.state:
        yield f"the state at turn {view.head_seq} is not what a replay of {len(view.log)} turns gives"


def _rederive(
    view: View, turn: Turn, places: list[Any], chains: dict[int, bytes], history: dict[int, bytes]
) -> Iterator[str]:
    header = turn.header
    try:
        if header.kind == KIND_MESSAGE:
            flags = rules.message_flags(places, header.role, header.status, core.tool_events(turn.body))
        elif header.kind == KIND_SUMMARY:
            first, last, claimed = summary_range(turn.body)
            flags = rules.other_flags(
                header.kind, rules.summary_applies(places, first, last, chains.get(last), claimed)
            )
        else:
            flags = rules.other_flags(header.kind, False)
    except SessiondError as error:
        yield f"turn {header.seq} could not have been appended: {error.message}"
        return
    if flags | 32 != header.flags | 32:
        yield f"turn {header.seq} has flags {header.flags} where {flags} follow from the log"
    if header.kind == KIND_REWIND:
        target = rewind_target(turn.body)
        base = history.get(target)
        if base is None or states.restored_bytes(states.decode_places(base)) != field_bytes(turn.body, BODY_DERIVED):
            yield f"the rewind at turn {header.seq} restores another state than turn {target} had"


def checkpoint_lists(view: View) -> list[tuple[str, list[tuple[int, bytes]]]]:
    """(where, [(version, content)]) of every stored list of checkpoints."""
    lists = []
    if view.hot is not None:
        lists.append(("hot tier", view.hot.checkpoints))
    if view.cloud is not None:
        lists.append(("manifest", [(int(version), bytes(content)) for version, content in view.cloud.checkpoints]))
    return lists


def blob_lists(view: View) -> list[tuple[str, int, list[int]]]:
    """(where, newest version given out, versions of the blobs) of every stored list of blobs."""
    lists = []
    if view.hot is not None:
        last = view.hot.ledger.last if view.hot.ledger is not None else 0
        lists.append(("hot tier", last, [blob.version for blob in view.hot.blobs.values()]))
    if view.cloud is not None:
        keys = view.cloud.state_keys
        lists.append(("manifest", blobs.last_of(keys), [int(row[1]) for row in blobs.rows(keys)]))
    return lists


def core_frame(view: View, turn: Turn) -> bytes:
    """The turn's frame again; sealing is deterministic, so it is the frame that was read."""
    header = turn.header
    return core.seal_frame(
        view.h,
        header.seq,
        header.epoch,
        header.time_ms,
        header.kind,
        header.role,
        header.status,
        header.flags,
        header.prev_live_seq,
        header.cumulative,
        header.tokens,
        header.sources,
        header.digest,
        header.chain,
        turn.body,
    )


def field_bytes(body: bytes, number: int) -> bytes:
    """The last length-delimited field of this number in a message; empty if there is none."""
    found, at = b"", 0
    while at < len(body):
        tag, at = _varint(body, at)
        if tag & 7 == 2:
            size, at = _varint(body, at)
            if tag >> 3 == number:
                found = body[at : at + size]
            at += size
        elif tag & 7 == 0:
            _, at = _varint(body, at)
        else:
            at += 8 if tag & 7 == 1 else 4
    return found


def said_end(body: bytes) -> int:
    """Where fields 20 to 25 of a body end, which its digest covers."""
    at = 0
    while at < len(body):
        start = at
        tag, at = _varint(body, at)
        if tag >> 3 >= BODY_META:
            return start
        if tag & 7 == 2:
            size, at = _varint(body, at)
            at += size
        elif tag & 7 == 0:
            _, at = _varint(body, at)
        else:
            at += 8 if tag & 7 == 1 else 4
    return len(body)


def _number(message: bytes, number: int) -> int:
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            if tag >> 3 == number:
                return value
        elif tag & 7 == 2:
            size, at = _varint(message, at)
            at += size
        else:
            at += 8 if tag & 7 == 1 else 4
    return 0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at


def turn_id_of(body: bytes) -> str:
    """The turn_id in a turn's body."""
    return field_bytes(body, 20).decode("utf-8", "replace")


def rewind_target(body: bytes) -> int:
    """The seq that a rewind goes back to."""
    return _number(field_bytes(body, 25), 1)


def summary_range(body: bytes) -> tuple[int, int, bytes]:
    """(first, last, chain) that a summary covers."""
    summary = field_bytes(body, 22)
    covered = field_bytes(summary, 2)
    return _number(covered, 1), _number(covered, 2), field_bytes(summary, 3)


def view_turns(h: bytes, frames: bytes) -> list[Turn]:
    """Verified turns of a buffer of frames. Raises Corrupt."""
    return [Turn(header, frames[header.offset + HEADER_BYTES : header.end]) for header in core.scan_frames(h, frames)]


INVARIANTS: Final[dict[str, Callable[[View], Iterator[str]]]] = {
    "I1": i1_acked_turns_are_there,
    "I2": i2_cloud_seq_is_in_the_cloud,
    "I3": i3_turn_ids_are_unique,
    "I4": i4_log_is_gap_free,
    "I5": i5_epochs_rise,
    "I6": i6_fenced_nodes_own_nothing,
    "I7": i7_versions_rise,
    "I9": i9_listings_are_whole,
    "I11": i11_bytes_verify,
    "I12": i12_nothing_crosses,
    "I13": i13_deleted_stay_deleted,
    "I14": i14_sizes_are_bounded,
    "I16": i16_windows_fit,
    "I17": i17_checkpoint_is_a_replay,
}


# What can be said of a session that is deleted: there is no log any more.
OF_DELETED: Final = ("I11", "I12", "I13")


def check(view: View) -> Iterator[tuple[str, str]]:
    """(invariant, what was found) for the violations in a view; the first few of each invariant, and how many more."""
    deleted = view.cloud is not None and view.cloud.lifecycle == LIFECYCLE_DELETED
    for name, invariant in INVARIANTS.items():
        if deleted and name not in OF_DELETED:
            continue
        told = 0
        try:
            for found in invariant(view):
                told += 1
                if told <= EXPLANATIONS_MAX:
                    yield name, found
        except SessiondError as error:
            yield "I11", f"{name} could not be checked: {error.message}"
        if told > EXPLANATIONS_MAX:
            yield name, f"and {told - EXPLANATIONS_MAX:,} more"
