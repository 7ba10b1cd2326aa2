"""A session's log in the hot tier: appending inside a write transaction, reading rows inside a read transaction.

It promises that an append changes everything or nothing, and that every frame it returns was verified. It never waits,
never commits and never talks to the cloud tier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgpack

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.expiry import expires_ms, lifecycle_at
from sessiond.core.layout import (
    BODY_DERIVED,
    CHAIN_OFFSET,
    DIGEST_BYTES,
    ENCODING_SLOTS,
    FLAG_BOUNDARY,
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_REWIND,
    KIND_STATE,
    KIND_SUMMARY,
    ROLE_ASSISTANT,
    ROW_BYTES_MAX,
    Header,
    field_head,
)
from sessiond.core.manifest import (
    CHECKPOINTS_MAX,
    LIFECYCLE_ACTIVE,
    LIFECYCLE_DELETED,
    TURN_ID_ENTRY_BYTES,
    TURN_IDS_MAX,
)
from sessiond.errors import Conflict, Corrupt, Denied, Exhausted, Invalid, NotFound, SessiondError, Unavailable
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.rows import (
    IDS_PER_CHUNK,
    PHASE_DOUBTED,
    PHASE_OWNED,
    PHASE_RELEASED,
    PHASE_RELEASING,
    Head,
    chunk_key,
    decode_head,
    encode_head,
    seq_key,
    unwrap,
    wrap,
)

_U64_MAX: Final = (1 << 64) - 1
_CHUNKS_KEPT: Final = TURN_IDS_MAX // IDS_PER_CHUNK + 1
PINS_BUDGET_TOKENS: Final = 1000
# Clocks that are read one after the other differ by less.
CLOCK_STEP_MS: Final = 1000
# Of a session's whole state, which is in its head row, in every checkpoint and in the manifest.
METADATA_PAIRS_MAX: Final = 64
METADATA_BYTES_MAX: Final = 16 * 1024
FLAGS_MAX: Final = 64
PINS_MAX: Final = 64


class HistoryNeeded(Exception):
    """The rows of these seqs are not hot; fetch them from the cloud tier and try again."""

    def __init__(self, first_seq: int, last_seq: int) -> None:
        super().__init__(f"turns {first_seq} to {last_seq}")
        self.first_seq = first_seq
        self.last_seq = last_seq


@dataclass(slots=True)
class PreparedTurn:
    """A turn that is ready to be appended: everything that needs no lock is done.

    body: fields 20 to 26 as received. events: its tool calls and results. tokens, sources: one per encoding slot.
    pins: {key: tokens per slot} of a state change. summary: (first, last, chain) that it covers. policy: if changed.
    id_field, body_field: where the request names its turn_id and its body, for refusals.
    """

    turn_id: str
    kind: int
    role: int
    status: int
    body: bytes
    digest: bytes
    tokens: tuple[int, int, int]
    sources: tuple[int, int, int]
    events: list[tuple[bool, str]] = field(default_factory=list)
    pins: dict[str, list[int]] = field(default_factory=dict)
    pins_removed: list[str] = field(default_factory=list)
    summary: tuple[int, int, bytes] | None = None
    rewind_to: int | None = None
    policy: dict[str, Any] | None = None
    id_field: str = "turns.turn_id"
    body_field: str = "turns"


@dataclass(slots=True)
class Placed:
    """Where a turn stands in the log. chain: the chain there."""

    turn_id: str
    epoch: int
    seq: int
    time_ms: int
    tokens: tuple[int, int, int]
    duplicate: bool
    chain: bytes


@dataclass(slots=True)
class Appended:
    """What an append did: the turns in the order asked, and the head after it. tenure: the node's when it began.
    places: the state after it, decoded; None where nothing was fresh.
    """

    turns: list[Placed]
    head: Head
    state: bytes
    tenure: int = 0
    places: list[Any] | None = None


def read_head(transaction: Transaction, h: bytes) -> Head | None:
    """The session's head row, or None. Raises Corrupt."""
    value = transaction.get("heads", h)
    return None if value is None else decode_head(h, value)


def write_head(transaction: Transaction, h: bytes, head: Head, now_ms: int, waiting: bool | None = None) -> None:
    """Write the head row and keep the dirty table in step with it.

    waiting: whether the newest exchange has no final answer yet; None where this write does not tell.
    """
    transaction.put("heads", h, encode_head(h, head))
    if not head.is_dirty:
        transaction.delete("dirty", h)
        return
    known = transaction.get("dirty", h)
    if known is None:
        transaction.put("dirty", h, encode_dirty(now_ms, bool(waiting)))
    elif waiting is not None and decode_dirty(known)[1] != waiting:
        transaction.put("dirty", h, encode_dirty(decode_dirty(known)[0], waiting))


def encode_dirty(since_ms: int, waiting: bool) -> bytes:
    """A row of the dirty table: since when the cloud tier lacks something, and whether an answer is still to come."""
    return since_ms.to_bytes(8, "big") + (b"\1" if waiting else b"")


def decode_dirty(value: bytes | memoryview) -> tuple[int, bool]:
    """(since ms, waiting) of a row of the dirty table."""
    return int.from_bytes(value[:8], "big"), len(value) > 8


def row_for(transaction: Transaction, h: bytes, seq: int) -> tuple[int, Any] | None:
    """(first seq, frames) of the row that starts at or below seq; None if there is none."""
    return row_at(transaction.cursor("turns"), h, seq)


def row_at(cursor: Any, h: bytes, seq: int) -> tuple[int, Any] | None:
    """The same with a cursor over `turns` that is used again: a window takes several rows."""
    key = seq_key(h, seq)
    if not cursor.set_range(key):
        if not cursor.last():
            return None
    elif cursor.key() == key:
        return seq, cursor.value()
    elif not cursor.prev():
        return None
    found = bytes(cursor.key())
    if found[:16] != h:
        return None
    return int.from_bytes(found[16:], "big"), cursor.value()


def frame_at(transaction: Transaction, h: bytes, seq: int) -> tuple[Header, Any]:
    """(header, buffer) of one turn. Raises HistoryNeeded if it is not hot, Corrupt if it is damaged."""
    row = row_for(transaction, h, seq)
    if row is not None:
        for header in core.scan_frames(h, row[1]):
            if header.seq == seq:
                return header, row[1]
    raise HistoryNeeded(seq, seq)


def frames_between(
    transaction: Transaction, h: bytes, first_seq: int, last_seq: int, bytes_max: int
) -> tuple[bytes, int]:
    """(frames, last seq in them) of consecutive turns from first_seq on, about bytes_max at most but at least one.

    Raises HistoryNeeded if first_seq is not hot, Corrupt if a frame is damaged or the rows have a gap.
    """
    row = row_for(transaction, h, first_seq)
    if row is None:
        raise HistoryNeeded(first_seq, last_seq)
    pieces: list[bytes] = []
    size, due = 0, first_seq
    for _, value in transaction.scan("turns", h, seq_key(h, row[0])):
        headers = core.scan_frames(h, value)
        wanted = [header for header in headers if header.seq >= first_seq and header.seq <= last_seq]
        if not pieces and (not wanted or wanted[0].seq != first_seq):
            raise HistoryNeeded(first_seq, last_seq)
        for header in wanted:
            if header.seq != due:
                # Turns that were kept alone stand before a gap; whoever asked fetches it, or finds that it can't.
                raise HistoryNeeded(due, header.seq - 1)
            if pieces and size + header.end - header.offset > bytes_max:
                return b"".join(pieces), due - 1
            pieces.append(bytes(value[header.offset : header.end]))
            size += header.end - header.offset
            due += 1
        if due > last_seq:
            break
    return b"".join(pieces), due - 1


def newest_frames(
    transaction: Transaction, h: bytes, head_seq: int, first_seq: int, bytes_wanted: int, floor_seq: int
) -> tuple[bytes, int]:
    """(frames, first seq) of the newest turns: all from first_seq on, and older ones down to floor_seq while they fit
    into bytes_wanted. first seq is head_seq + 1 if nothing fits.

    Raises HistoryNeeded if a turn from first_seq on is not hot, Corrupt.
    """
    pieces: list[bytes] = []
    size, due = 0, head_seq
    while due >= max(1, floor_seq):
        row = row_for(transaction, h, due)
        headers = [] if row is None else [header for header in core.scan_frames(h, row[1]) if header.seq <= due]
        if row is None or not headers or headers[-1].seq != due:
            raise HistoryNeeded(first_seq, due)
        for header in reversed(headers):
            length = header.end - header.offset
            if header.seq < first_seq and (size + length > bytes_wanted or header.seq < floor_seq):
                return b"".join(reversed(pieces)), due + 1
            if header.seq != due:
                raise Corrupt("CORRUPT_HOT_ROW", f"Turn {due} of session {h.hex()} is missing from its row.")
            pieces.append(bytes(row[1][header.offset : header.end]))
            size += length
            due -= 1
    return b"".join(reversed(pieces)), due + 1


def turn_ids(transaction: Transaction, h: bytes, head_seq: int | None = None) -> bytes:
    """The newest turn ids, 24 bytes an entry, in order; at least the last TURN_IDS_MAX if there are as many.

    head_seq: where they must end. Raises Corrupt, also where one is missing: LMDB's pages carry no checksums, and an
    entry that damage hides would let a turn be applied twice.
    """
    entries = b"".join(unwrap(h, "ids", value) for _, value in transaction.scan("ids", h))
    if head_seq is not None:
        count = len(entries) // TURN_ID_ENTRY_BYTES
        first = int.from_bytes(entries[16:24], "big") or 1
        last = int.from_bytes(entries[-8:], "big")
        if (last, last - first + 1) != (head_seq, count) or (first > 1 and count < TURN_IDS_MAX):
            raise Corrupt("CORRUPT_HOT_ROW", f"Turn ids of session {h.hex()} are missing.", {"table": "ids"})
    return entries


def id_chunks(transaction: Transaction, h: bytes) -> list[Any]:
    """The values of a session's chunks of turn ids, ascending."""
    cursor = transaction.cursor("ids")
    if not cursor.set_range(h):
        return []
    chunks: list[Any] = []
    for key, value in cursor.iternext():
        if key[:16] != h:
            break
        chunks.append(value)
    return chunks


def known_ids(transaction: Transaction, h: bytes, head_seq: int, chain: bytes) -> bytes:
    """What `turn_ids` reads; from memory, where this process appended last. chain: that of the head, which proves it.

    Raises Corrupt.
    """
    remembered = transaction.known_ids.get(h) if transaction.known_ids is not None else None
    if remembered is not None and remembered[0] == head_seq and remembered[1] == chain:
        return remembered[2]
    return core.join_turn_ids(h, id_chunks(transaction, h), head_seq, TURN_IDS_MAX)


def find_turn_id(entries: bytes, id_hash: bytes) -> tuple[int, bytes] | None:
    """(seq, start of the digest) of a turn id in such entries, newest first; None if it is not there."""
    at = entries.rfind(id_hash)
    while at >= 0:
        if at % TURN_ID_ENTRY_BYTES == 0:
            return int.from_bytes(entries[at + 16 : at + 24], "big"), entries[at + 8 : at + 16]
        at = entries.rfind(id_hash, 0, at + len(id_hash) - 1)
    return None


def checkpoints(transaction: Transaction, h: bytes, saved: list[int] | None = None) -> list[tuple[int, bytes]]:
    """(version, state) of the stored checkpoints, oldest first. saved: the versions that there must be.

    Raises Corrupt, also where one of them is missing.
    """
    found = [
        (int.from_bytes(key[16:], "big"), unwrap(h, "checkpoints", value))
        for key, value in transaction.scan("checkpoints", h)
    ]
    if saved is not None and [version for version, _ in found] != saved:
        what = f"A checkpoint of session {h.hex()} is missing, or one is there that should not be."
        raise Corrupt("CORRUPT_HOT_ROW", what, {"table": "checkpoints"})
    return found


def check_newest(transaction: Transaction, h: bytes, head: Head) -> None:
    """Raises Corrupt if there are turns behind the head row's newest: then it is an older one that damage brought back.

    LMDB's pages carry no checksums: a pointer with a flipped bit may lead to a page that was given up, whose rows all
    verify. Rows of turns only ever grow, so they tell.
    """
    newest_row(transaction.cursor("turns"), h, head)


def newest_row(cursor: Any, h: bytes, head: Head) -> tuple[int, Any, int] | None:
    """(first seq, frames, last seq) of the row of the newest turns, None if there is none. Raises as check_newest."""
    row = core.newest_row(cursor, h, head.head_seq)
    if row is not None and row[2] > head.head_seq:
        raise Corrupt("CORRUPT_HOT_ROW", f"Session {h.hex()} has turns behind turn {head.head_seq}, its newest.")
    return row


def state_at(transaction: Transaction, h: bytes, seq: int, birth_metadata: dict[str, str]) -> bytes:
    """The state after turn `seq`: a replay from the newest checkpoint at or below it, else from the first turn.

    Raises HistoryNeeded if the turns in between are not hot.
    """
    state, cursor = states.genesis(h, birth_metadata), 0
    for version, saved in checkpoints(transaction, h):
        if cursor < version & 0xFFFFFFFF <= seq:
            state, cursor = saved, version & 0xFFFFFFFF
    while cursor < seq:
        frames, cursor = frames_between(transaction, h, cursor + 1, seq, 1 << 20)
        state = core.replay(h, state, frames)
    return state


def deleted(session: str) -> NotFound:
    """The refusal of everything that names a deleted session."""
    return NotFound("SESSION_DELETED", f"Session {session!r} was deleted.", {"session_id": session})


def archived(session: str) -> Denied:
    """The refusal of an append to a session that is read-only."""
    return Denied("SESSION_ARCHIVED", f"Session {session!r} is archived.", {"session_id": session})


def check_writable(head: Head | None, session: str, expiry_ms: Callable[[], int]) -> Head:
    """The head, if this node may append to it. expiry_ms: the clock that expiry is judged by.

    Raises NotFound, Unavailable, Denied.
    """
    if head is None:
        raise NotFound("SESSION_NOT_FOUND", f"There is no session {session!r}.", {"session_id": session})
    if head.phase != PHASE_OWNED:
        raise Unavailable("NOT_OWNER", f"This node does not own session {session!r} now.", {"session_id": session})
    lifecycle = head.lifecycle
    if head.expires_ms:
        lifecycle = lifecycle_at(lifecycle, head.policy, head.expires_ms, expiry_ms())
    if lifecycle == LIFECYCLE_DELETED:
        raise deleted(session)
    if lifecycle != LIFECYCLE_ACTIVE:
        raise archived(session)
    return head


def append(
    transaction: Transaction,
    h: bytes,
    session: str,
    turns: Sequence[PreparedTurn],
    expected: tuple[int, int] | None,
    state_etag: tuple[int, int] | None,
    now_ms: int,
    running_ms: int,
    expiry_ms: Callable[[], int],
    latest_ms: Callable[[], int],
    birth_metadata: Callable[[], dict[str, str]],
    head: Head | None = None,
) -> Appended:
    """Append turns of one session, all or none, inside a write transaction.

    expected: (epoch or 0, seq) of the head that the caller believes in. state_etag: place of the last state turn.
    now_ms: what turns are dated by. running_ms: what idleness goes by. expiry_ms: the clock that expiry is judged by.
    latest_ms: the one that a life is counted from, never behind the other. head: if it was read in this transaction.
    Raises NotFound, Unavailable NOT_OWNER, Conflict (TURN_ID_REUSED, EXPECTED_MISMATCH, STATE_ETAG_MISMATCH), Invalid,
    Exhausted PINS_FULL, HistoryNeeded, Corrupt; nothing is written then.
    """
    head = check_writable(head or read_head(transaction, h), session, expiry_ms)
    places = states.decode_places(head.state)
    placed: list[Placed | None] = []
    fresh: list[PreparedTurn] = []
    hashes: list[bytes] = []
    asked = [rules.turn_id_hash(h, turn.turn_id) for turn in turns]
    entries = known_ids(transaction, h, head.head_seq, places[3])
    known = core.seek_turn_ids(entries, asked)
    for turn, id_hash, found in zip(turns, asked, known, strict=True):
        if found is None:
            placed.append(None)
            fresh.append(turn)
            hashes.append(id_hash)
        else:
            placed.append(_duplicate(transaction, h, turn, *found))
    if not fresh:
        return Appended([item for item in placed if item is not None], head, head.state)

    if expected is not None and (expected[1] != head.head_seq or expected[0] not in (0, places[2])):
        raise Conflict(
            "EXPECTED_MISMATCH",
            f"The head of session {session!r} is turn {head.head_seq} of epoch {places[2]},"
            f" not turn {expected[1]} of epoch {expected[0]}.",
            {"head_seq": str(head.head_seq), "head_epoch": str(places[2]), "expected_seq": str(expected[1])},
            [("expected", f"the head is (epoch {places[2]}, seq {head.head_seq})")],
        )
    if state_etag is not None and list(state_etag) != places[17]:
        raise Conflict(
            "STATE_ETAG_MISMATCH",
            f"The state of session {session!r} was changed at turn {places[17][1]} of epoch {places[17][0]}.",
            {"etag": f"{places[17][0]}-{places[17][1]}"},
            [("etag", "it names an older state")],
        )
    sealed = _Sealed(transaction, h, head, places, now_ms, birth_metadata)
    for turn in fresh:
        sealed.add(turn)
    sealed.running_ms = running_ms
    if head.policy.get("expiry"):
        sealed.latest_ms = latest_ms()
    sealed.write(hashes, fresh, entries)
    queue = iter(sealed.placed)
    return Appended(
        [item if item is not None else next(queue) for item in placed], head, head.state, places=sealed.places
    )


def _duplicate(transaction: Transaction, h: bytes, turn: PreparedTurn, seq: int, digest_start: bytes) -> Placed:
    # The dedupe row knows the digest's start: enough to refuse without the turn, which may not be hot.
    header = frame_at(transaction, h, seq)[0] if digest_start == turn.digest[:8] else None
    if header is None or header.digest != turn.digest:
        raise Conflict(
            "TURN_ID_REUSED",
            f"The turn_id {turn.turn_id!r} was used for turn {seq} with other content.",
            {"turn_id": turn.turn_id, "seq": str(seq)},
            [(turn.id_field, f"used for turn {seq} with other content")],
        )
    return Placed(turn.turn_id, header.epoch, seq, header.time_ms, header.tokens, True, header.chain)


class _Sealed:
    """The frames of one append as they are made, before any of them is written."""

    def __init__(
        self,
        transaction: Transaction,
        h: bytes,
        head: Head,
        places: list[Any],
        now_ms: int,
        birth_metadata: Callable[[], dict[str, str]],
    ) -> None:
        self.transaction = transaction
        self.h = h
        self.head = head
        self.places = places
        # A clock that steps back must not reorder a log.
        self.time_ms = max(now_ms, places[21])
        self.birth_metadata = birth_metadata
        self.placed: list[Placed] = []
        self.frames: list[bytes] = []
        self.boundaries: list[tuple[int, bytes]] = []
        self.waiting: bool | None = None
        self.latest_ms = self.running_ms = 0

    def add(self, turn: PreparedTurn) -> None:
        """Seal one turn after the ones before it. Raises Invalid, Exhausted, HistoryNeeded."""
        places = self.places
        seq = places[1] + 1
        derived = b""
        if turn.kind == KIND_MESSAGE:
            try:
                flags = rules.message_flags(places, turn.role, turn.status, turn.events)
            except SessiondError as refused:
                refused.metadata["turn_id"] = turn.turn_id
                refused.fields = [(f"{turn.body_field}.parts", refused.message)]
                raise
        else:
            applies = turn.summary is not None and rules.summary_applies(
                places, turn.summary[0], turn.summary[1], self._chain_at(turn.summary[1]), turn.summary[2]
            )
            flags = rules.other_flags(turn.kind, applies)
            if turn.kind == KIND_REWIND:
                derived = self._restored(turn)
            elif turn.kind == KIND_STATE and turn.pins:
                derived = msgpack.packb(turn.pins, use_bin_type=True)
                self._check_pins(turn)
            elif turn.kind == KIND_SUMMARY and turn.summary is None:
                what = "The summary does not say what it covers."
                raise Invalid("INVALID_TURN", what, fields=[(f"{turn.body_field}.covered", what)])
        body = turn.body
        if derived:
            body += field_head(BODY_DERIVED, len(derived)) + derived
        live = rules.is_live(turn.kind, turn.role)
        cumulative = [places[4][slot] + (turn.tokens[slot] if live else 0) for slot in range(ENCODING_SLOTS)]
        if max(cumulative) > _U64_MAX:
            raise Exhausted("OVERLOADED", "The session's token column is full.")
        chain = rules.next_chain(places[3], turn.digest)
        frame = core.seal_frame(
            self.h,
            seq,
            self.head.epoch,
            self.time_ms,
            turn.kind,
            turn.role,
            turn.status,
            flags,
            places[5],
            cumulative,
            turn.tokens,
            turn.sources,
            turn.digest,
            chain,
            body,
        )
        core.fold(self.h, places, frame)
        if turn.kind == KIND_STATE:
            self._check_state(turn)
        self.frames.append(frame)
        self.placed.append(Placed(turn.turn_id, self.head.epoch, seq, self.time_ms, turn.tokens, False, chain))
        if flags & FLAG_BOUNDARY:
            self.boundaries.append((self.head.epoch << 32 | seq, states.encode_places(places)))
        if live:
            answers = turn.role == ROLE_ASSISTANT and bool(flags & FLAG_BOUNDARY) and not self.places[16]
            exchange_seq = self.places[9]
            self.waiting = not answers or exchange_seq == self.head.answered_seq
            if answers:
                self.head.answered_seq = exchange_seq
        elif turn.kind == KIND_MILESTONE:
            self.waiting = False
        if turn.policy is not None:
            self.head.policy = turn.policy
            self.head.changes += 1

    def _chain_at(self, seq: int) -> bytes | None:
        if not 1 <= seq <= self.places[1]:
            return None
        if seq > self.head.head_seq:
            frame = self.frames[seq - self.head.head_seq - 1]
            return frame[CHAIN_OFFSET : CHAIN_OFFSET + DIGEST_BYTES]
        return frame_at(self.transaction, self.h, seq)[0].chain

    def _restored(self, turn: PreparedTurn) -> bytes:
        places, to_seq = self.places, turn.rewind_to or 0
        if to_seq > places[1] or any(low <= to_seq <= high for low, high in places[20]):
            raise Invalid(
                "INVALID_REWIND",
                f"Turn {to_seq} is not in force: the head is turn {places[1]}.",
                {"to_seq": str(to_seq), "head_seq": str(places[1])},
                [(f"{turn.body_field}.to_seq", "not a turn that is in force")],
            )
        if to_seq > self.head.head_seq:
            base = self.head.state
            joined = b"".join(self.frames[: to_seq - self.head.head_seq])
            return states.restored_bytes(states.decode_places(core.replay(self.h, base, joined)))
        base = state_at(self.transaction, self.h, to_seq, self.birth_metadata())
        return states.restored_bytes(states.decode_places(base))

    def _check_pins(self, turn: PreparedTurn) -> None:
        pins = {key: value[3:] for key, value in self.places[12].items() if key not in turn.pins_removed}
        pins.update(turn.pins)
        limit = int(self.head.policy.get("pins_budget_tokens") or PINS_BUDGET_TOKENS)
        total = max(sum(counts[slot] for counts in pins.values()) for slot in range(ENCODING_SLOTS))
        if total > limit:
            raise Exhausted(
                "PINS_FULL",
                f"The pinned facts would take {total} tokens; the limit is {limit}.",
                {"tokens": str(total), "limit": str(limit)},
                [(f"{turn.body_field}.pins", f"{total} tokens in all, over the limit of {limit}")],
            )

    def _check_state(self, turn: PreparedTurn) -> None:
        """One change is bounded when it is prepared; many of them must not add up to more."""
        pins, flags, metadata = self.places[12], self.places[13], self.places[15]
        size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
        for name, found, limit in (
            ("pins", len(pins), PINS_MAX),
            ("flags", len(flags), FLAGS_MAX),
            ("metadata", len(metadata), METADATA_PAIRS_MAX),
            ("metadata bytes", size, METADATA_BYTES_MAX),
        ):
            if found > limit:
                what = f"the session would have {found} {name}; the limit is {limit}"
                field = f"{turn.body_field}.{name.split()[0]}"
                raise Invalid("INVALID_STATE_CHANGE", f"{field}: {what}.", {"field": field}, [(field, what)])

    def write(self, hashes: Sequence[bytes], turns: Sequence[PreparedTurn], ids: bytes) -> None:
        """Put everything into the transaction: rows, ids, checkpoints, head. ids: the entries that there are."""
        head, h, transaction = self.head, self.h, self.transaction
        first_seq = head.head_seq + 1
        append_rows(transaction, h, head, first_seq, self.frames)
        entries = [
            id_hash + turn.digest[:8] + (first_seq + index).to_bytes(8, "big")
            for index, (id_hash, turn) in enumerate(zip(hashes, turns, strict=True))
        ]
        kept = append_ids(transaction, h, first_seq, ids, entries)
        head.head_seq += len(self.frames)
        transaction.remember_ids(h, head.head_seq, self.places[3], kept)
        # At a boundary the state is the checkpoint's.
        ends = self.boundaries and self.boundaries[-1][0] & 0xFFFFFFFF == head.head_seq
        head.state = self.boundaries[-1][1] if ends else states.encode_places(self.places)
        head.used_ms = self.running_ms
        # A wall clock that was set back must not take from what the session has to live.
        behind = self.latest_ms - self.time_ms >= CLOCK_STEP_MS
        head.expires_ms = expires_ms(head.policy, head.created_ms, self.latest_ms if behind else self.time_ms)
        head.saved = write_checkpoints(transaction, h, self.boundaries, head.saved) or head.saved
        write_head(transaction, h, head, self.time_ms, self.waiting)


def append_rows(transaction: Transaction, h: bytes, head: Head, first_seq: int, frames: Sequence[bytes]) -> None:
    """Add frames behind the tail row, starting new rows where they no longer fit; moves head.tail_row and hot_first."""
    row, row_seq = b"", 0
    if head.tail_row:
        row_seq = head.tail_row
        row = bytes(transaction.get("turns", seq_key(h, row_seq)) or b"")
        # Nothing is acknowledged behind a damaged turn: it could never be flushed.
        if not row or core.row_checked(h, row) != first_seq - 1:
            raise Corrupt(
                "CORRUPT_HOT_ROW", f"The newest row of session {h.hex()} does not end at turn {first_seq - 1}."
            )
    elif head.hot_first > first_seq or head.hot_first == 0:
        head.hot_first = first_seq
    changed = False
    for index, frame in enumerate(frames):
        if row and len(row) + len(frame) > ROW_BYTES_MAX:
            if changed:
                transaction.put("turns", seq_key(h, row_seq), row)
            row = b""
        if not row:
            row_seq = first_seq + index
        row += frame
        changed = True
    if changed:
        transaction.put("turns", seq_key(h, row_seq), row)
    head.tail_row = row_seq


def append_ids(transaction: Transaction, h: bytes, first_seq: int, ids: bytes, entries: Sequence[bytes]) -> bytes:
    """Add the turn ids of consecutive turns to the entries that there are, and drop chunks that lie wholly behind the
    horizon; the entries that there are then.
    """
    last_seq = first_seq + len(entries) - 1
    ids += b"".join(entries)
    oldest, newest = (first_seq - 1) // IDS_PER_CHUNK, (last_seq - 1) // IDS_PER_CHUNK
    for chunk in range(oldest, newest + 1):
        start = max(0, len(ids) - (last_seq - chunk * IDS_PER_CHUNK) * TURN_ID_ENTRY_BYTES)
        end = len(ids) - max(0, last_seq - (chunk + 1) * IDS_PER_CHUNK) * TURN_ID_ENTRY_BYTES
        transaction.put("ids", chunk_key(h, chunk), wrap(h, "ids", ids[start:end]))
    first_kept = newest - _CHUNKS_KEPT
    if first_kept > 0 and newest * IDS_PER_CHUNK + 1 >= first_seq:
        # A chunk was begun: only then can an old one have fallen behind the horizon.
        newest_before = (first_seq - 2) // IDS_PER_CHUNK
        for chunk in range(max(0, newest_before - _CHUNKS_KEPT), first_kept):
            transaction.delete("ids", chunk_key(h, chunk))
        ids = ids[-(last_seq - first_kept * IDS_PER_CHUNK) * TURN_ID_ENTRY_BYTES :]
    return ids


def write_checkpoints(
    transaction: Transaction, h: bytes, boundaries: Sequence[tuple[int, bytes]], saved: list[int] | None
) -> list[int]:
    """Add checkpoints and keep the newest CHECKPOINTS_MAX; the versions of all, none if nothing was added. saved: the
    versions that there are, None if nobody wrote them down.
    """
    if not boundaries:
        return []
    if saved is None:
        saved = [int.from_bytes(key[16:], "big") for key, _ in transaction.scan("checkpoints", h)]
    versions = [*saved, *(version for version, _ in boundaries)]
    kept = versions[-CHECKPOINTS_MAX:]
    for version, state in boundaries[-CHECKPOINTS_MAX:]:
        transaction.put("checkpoints", seq_key(h, version), wrap(h, "checkpoints", state))
    for version in saved[: len(versions) - len(kept)]:
        transaction.delete("checkpoints", seq_key(h, version))
    return kept


def replace_rows(
    transaction: Transaction,
    h: bytes,
    head: Head,
    kept_frames: bytes,
    inline_frames: bytes,
    inline_first: int,
    ids: bytes,
    saved: Sequence[Sequence[Any]],
) -> None:
    """Make the tables hold a session as the cloud tier has it, instead of whatever they held: hydration.

    kept_frames: single turns before inline_first that a window needs. ids: entries as in the manifest's turn_ids.
    """
    drop_rows(transaction, h)
    head.tail_row, head.hot_first = 0, inline_first
    for header in core.scan_frames(h, kept_frames):
        transaction.put("turns", seq_key(h, header.seq), kept_frames[header.offset : header.end])
    frames = [inline_frames[header.offset : header.end] for header in core.scan_frames(h, inline_frames)]
    append_rows(transaction, h, head, inline_first, frames)
    by_chunk: dict[int, list[bytes]] = {}
    for at in range(0, len(ids), TURN_ID_ENTRY_BYTES):
        entry = ids[at : at + TURN_ID_ENTRY_BYTES]
        by_chunk.setdefault((int.from_bytes(entry[16:], "big") - 1) // IDS_PER_CHUNK, []).append(entry)
    for chunk, entries in by_chunk.items():
        transaction.put("ids", chunk_key(h, chunk), wrap(h, "ids", b"".join(entries)))
    head.saved = sorted(int(version) for version, _ in saved)
    for version, state in saved:
        transaction.put("checkpoints", seq_key(h, version), wrap(h, "checkpoints", state))


def backfill_rows(transaction: Transaction, h: bytes, frames: bytes, first_seq: int) -> bool:
    """Add older turns, fetched from the cloud tier, in front of the hot ones; False if they no longer join them."""
    head = read_head(transaction, h)
    headers = core.scan_frames(h, frames)
    if (
        head is None
        or not headers
        or headers[0].seq != first_seq
        or not first_seq < head.hot_first <= headers[-1].seq + 1
    ):
        return False
    wanted = [header for header in headers if header.seq < head.hot_first]
    stale = [key for key, _ in transaction.scan("turns", h) if int.from_bytes(key[16:], "big") < head.hot_first]
    for key in stale:
        if int.from_bytes(key[16:], "big") >= first_seq:
            transaction.delete("turns", key)
    row, row_seq = b"", 0
    for header in wanted:
        frame = frames[header.offset : header.end]
        if row and len(row) + len(frame) > ROW_BYTES_MAX:
            transaction.put("turns", seq_key(h, row_seq), row)
            row = b""
        if not row:
            row_seq = header.seq
        row += frame
    if row:
        transaction.put("turns", seq_key(h, row_seq), row)
    head.hot_first = first_seq
    transaction.put("heads", h, encode_head(h, head))
    return True


def keep_frame(transaction: Transaction, h: bytes, seq: int, frame: bytes) -> None:
    """Keep a single older turn, fetched from the cloud tier, alone in front of the hot ones."""
    head = read_head(transaction, h)
    if head is not None and seq < head.hot_first:
        transaction.put("turns", seq_key(h, seq), frame)


def doubt_owned(transaction: Transaction, start: bytes, limit: int) -> bytes | None:
    """Doubt every session held as owned, a batch from key `start` on; the key to go on at, or None."""
    batch: list[tuple[bytes, Head]] = []
    following: bytes | None = None
    for key, value in transaction.scan("heads", b"", start):
        if len(batch) == limit:
            following = key
            break
        try:
            head = decode_head(key, value)
        except Corrupt:
            continue  # one damaged row must not keep the node down; its session says so when it is asked for
        if head.phase in (PHASE_OWNED, PHASE_RELEASING):
            batch.append((key, head))
    for key, head in batch:
        head.phase = PHASE_DOUBTED
        transaction.put("heads", key, encode_head(key, head))
    return following


def drop_rows(transaction: Transaction, h: bytes) -> None:
    """Remove every row of a session but its head."""
    for table in ("turns", "ids", "checkpoints", "manifests", "states", "blobs"):
        for key in [key for key, _ in transaction.scan(table, h)]:
            transaction.delete(table, key)


def mark_deleted(transaction: Transaction, h: bytes, head: Head, now_ms: int) -> None:
    """Note that a session is deleted in the cloud tier for good; the flusher removes what is left of it."""
    head.lifecycle, head.phase, head.claim, head.tombstoned = LIFECYCLE_DELETED, PHASE_RELEASED, None, True
    write_head(transaction, h, head, now_ms)


def drop_session(transaction: Transaction, h: bytes, users_key: bytes) -> None:
    """Remove every row of a session, its head, and its place among its user's sessions."""
    drop_rows(transaction, h)
    transaction.delete("heads", h)
    transaction.delete("dirty", h)
    transaction.delete("users", users_key)
