"""The active context: which turns, how many tokens, and the receipt that says from where and what is missing.

It promises that what it returns stays inside the budget by the counting rule, and that it names every turn it leaves
out. It reads through a source that is handed in and never waits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from sessiond import core
from sessiond.core.layout import FIT_MORE, FIT_NOTHING, FIT_OK, FLAG_CUT, FLAG_EXCHANGE, Header
from sessiond.core.manifest import Manifest
from sessiond.core.state import State
from sessiond.errors import Corrupt, Invalid
from sessiond.service.prepare import Spec
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.rows import Head
from sessiond.tiers.hydrate import kept_frame
from sessiond.tokens import CONTEXT_TOKENS
from sessiond.v1 import context_pb2, turn_pb2

# What varies from call to call is charged against this share of the budget first; see DESIGN.md, "Strides".
NEW_MESSAGE_SHARE: Final = 16
STRIDES_PER_BUDGET: Final = 4

_INSTRUCTIONS_TAG: Final = b"\x12"
_SUMMARY_TAG: Final = b"\x2a"


class Source(Protocol):
    """Where frames come from: the hot tier's rows, or a manifest and its segments."""

    def row_for(self, seq: int) -> Any:
        """A buffer of whole frames that holds turn seq. Raises HistoryNeeded."""

    def frame(self, seq: int) -> tuple[Header, Any]:
        """(header, buffer) of one turn. Raises HistoryNeeded, Corrupt."""

    def walk(self, last_live_seq: int, slot: int, tokens_max: int) -> list[Any]:
        """The newest rows, oldest first, until their live messages take more than tokens_max. Raises HistoryNeeded,
        Corrupt.
        """


class HotSource:
    """Rows of the hot tier, inside a read transaction."""

    def __init__(self, transaction: Transaction, h: bytes, head: Head) -> None:
        self._transaction = transaction
        self._h = h
        self._cursor = transaction.cursor("turns")
        self._newest = log.newest_row(self._cursor, h, head)
        self._hot_first = head.hot_first

    def row_for(self, seq: int) -> Any:
        """As Source says."""
        if seq >= self._hot_first:
            # Most windows begin with the newest row, which was looked at already.
            newest = self._newest
            if newest is not None and newest[0] <= seq <= newest[2]:
                return newest[1]
            row = log.row_at(self._cursor, self._h, seq)
            if row is not None:
                return row[1]
        raise log.HistoryNeeded(seq, self._hot_first - 1)

    def frame(self, seq: int) -> tuple[Header, Any]:
        """As Source says."""
        return log.frame_at(self._transaction, self._h, seq)

    def walk(self, last_live_seq: int, slot: int, tokens_max: int) -> list[Any]:
        """As Source says; once, before any row is asked for."""
        rows, target, tokens = core.walk_rows(self._cursor, self._h, self._hot_first, last_live_seq, slot, tokens_max)
        if target and (tokens <= tokens_max or not rows):
            raise log.HistoryNeeded(target, self._hot_first - 1)
        return rows


class ColdSource:
    """A manifest, and the segments that were fetched for it so far."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._fetched: list[tuple[int, int, bytes]] = []

    def add(self, first_seq: int, last_seq: int, frames: bytes) -> None:
        """Frames of a segment, without those that the manifest repeats."""
        end = len(frames)
        if last_seq >= self._manifest.inline_first:
            headers = core.scan_frames(self._manifest.h, frames)
            end = next(header.offset for header in headers if header.seq >= self._manifest.inline_first)
        self._fetched.append((first_seq, last_seq, frames[:end]))

    def row_for(self, seq: int) -> Any:
        """As Source says."""
        if seq >= self._manifest.inline_first:
            return self._manifest.inline_frames
        for first_seq, last_seq, frames in self._fetched:
            if first_seq <= seq <= last_seq:
                return frames
        raise log.HistoryNeeded(seq, self._manifest.inline_first - 1)

    def frame(self, seq: int) -> tuple[Header, Any]:
        """As Source says."""
        kept = kept_frame(self._manifest, seq)
        if kept is not None:
            return kept
        buffer = self.row_for(seq)
        for header in core.scan_frames(self._manifest.h, buffer):
            if header.seq == seq:
                return header, buffer
        raise log.HistoryNeeded(seq, seq)

    def walk(self, last_live_seq: int, slot: int, tokens_max: int) -> list[Any]:
        """As Source says."""
        return walked(self, last_live_seq, slot, tokens_max, 0)[0]


def walked(source: Source, last_live_seq: int, slot: int, tokens_max: int, floor: int) -> tuple[list[Any], bool]:
    """As Source.walk, row by row, and whether it came to turns up to floor. Raises HistoryNeeded, Corrupt."""
    rows: list[Any] = []
    target, gathered = last_live_seq, 0
    while target and (gathered <= tokens_max or not rows):
        if target <= floor:
            return rows, True
        row = source.row_for(target)
        tokens, target = core.row_live(row, target, slot)
        gathered += tokens
        rows.insert(0, row)
    return rows, False


@dataclass(slots=True)
class Standing:
    """What a receipt says besides the window: where the session stands and how it was served.

    unread: ranges of older turns that can't be read for good; they are named in `missing`, too.
    """

    rung: int
    ownership: int
    node: str
    head_seq: int
    cloud_seq: int
    missing: list[context_pb2.MissingRange] = field(default_factory=list)
    stale: bool = False
    notice: str = ""
    reset_of: str = ""
    unread: list[tuple[int, int]] = field(default_factory=list)

    def is_unread(self, seq: int) -> bool:
        """Whether a turn lies in a range that can't be read."""
        return any(first <= seq <= last for first, last in self.unread)


def missing_ranges(loss: list[list[int]]) -> list[context_pb2.MissingRange]:
    """What may be missing, by the rows of a loss table that nobody has accepted."""
    return [
        context_pb2.MissingRange(
            first_seq=after_seq + 1,
            last_seq=0,
            epoch=epoch,
            reason=reason,  # type: ignore[arg-type]
            possible_only=True,
        )
        for epoch, after_seq, reason, accepted in (row[:4] for row in loss)
        if not accepted
    ]


def head_position(state: State) -> turn_pb2.TurnPosition:
    """The newest turn, with the chain that proves the log up to it."""
    return turn_pb2.TurnPosition(epoch=state.epoch, seq=state.cursor, chain=state.chain if state.cursor else b"")


def holds(source: Source, state: State, position: turn_pb2.TurnPosition) -> bool | None:
    """Whether the log holds this very turn: by its chain, else by its epoch; None where the position can't tell.

    Raises HistoryNeeded if the turn has to be fetched first.
    """
    if position.seq > state.cursor:
        return False
    if not position.chain and not position.epoch:
        return None
    header, _ = source.frame(position.seq)
    return header.chain == position.chain if position.chain else header.epoch == position.epoch


def checkpoint_header(state: State) -> context_pb2.CheckpointHeader | None:
    """The header of the newest checkpoint that a state knows; None if none was taken."""
    fields = _checkpoint(state)
    return None if fields is None else context_pb2.CheckpointHeader.FromString(core.encode_message(fields))


def _checkpoint(state: State) -> tuple[Any, ...] | None:
    """The same as fields to encode; core.encode_message says how."""
    epoch, seq, time_ms = state.boundary
    if not seq:
        return None
    covered = state.summary[-1][2] if state.summary else 0
    return (
        *(-1, epoch << 32 | seq, 2, seq, 3, epoch),
        *(4, (1, 1, 2, covered) if covered else None),
        *(5, covered + 1),
        *(6, state.instructions[0] if state.instructions else 0),
        *(7, state.exchanges, 8, state.rule),
        *(9, state.chain if state.cursor == seq else b""),
        *(10, time_ms),
        *(11, state.milestone[1] if state.milestone else ""),
    )


def state_etag(state: State) -> str:
    """Names the state: the (epoch, seq) of the newest turn that changed it."""
    return f"{state.state_at[0]}-{state.state_at[1]}"


def state_proto(state: State) -> context_pb2.SessionState:
    """Flags, mode and metadata as the wire has them."""
    return context_pb2.SessionState(flags=state.flags, mode=state.mode, metadata=state.metadata, etag=state_etag(state))


def _state(state: State) -> Any:
    """The state's message, to encode: as fields, or as bytes where it has maps."""
    if state.flags or state.metadata:
        return state_proto(state).SerializeToString(deterministic=True)
    return (2, state.mode, 4, state_etag(state))


def pin_protos(state: State) -> list[turn_pb2.PinnedFact]:
    """The pinned facts as the wire has them, by key."""
    return [
        turn_pb2.PinnedFact(
            key=key,
            value=value[0],
            scope=turn_pb2.PIN_SCOPE_SESSION,
            set_at=turn_pb2.TurnPosition(epoch=value[1], seq=value[2]),
        )
        for key, value in state.pins.items()
    ]


def _etag(state: State, spec: Spec, standing: Standing) -> str:
    digest = hashlib.blake2b(state.chain + state.boundary[1].to_bytes(8, "little") + spec.key, digest_size=12)
    for missing in standing.missing:
        digest.update(missing.SerializeToString(deterministic=True))
    return digest.hexdigest()


def _choose(
    source: Source, h: bytes, state: State, spec: Spec, tail: int, exact: int, since_seq: int, floor: int
) -> tuple[Any, ...]:
    """As core.fit_window answers. floor: turns up to this one can't be read; a window that needs one starts above."""
    stride = max(1, (spec.budget - spec.reserve) // STRIDES_PER_BUDGET)
    if floor:
        rows, stopped = walked(source, state.last_live_seq, spec.slot, exact, floor)
        if stopped:
            return _choose_above(rows, h, state, spec, exact, since_seq, floor)
    else:
        rows = source.walk(state.last_live_seq, spec.slot, exact)
    while True:
        fit = core.fit_window(
            h,
            rows,
            spec.slot,
            state.last_live_seq,
            state.exchange_seq,
            spec.strategy,
            spec.last_exchanges,
            tail,
            exact,
            stride,
            since_seq,
        )
        if fit[0] != FIT_MORE:
            return fit
        if fit[1] <= floor:
            return _choose_above(rows, h, state, spec, exact, since_seq, floor)
        # The next legal cut may lie in an older row.
        rows.insert(0, source.row_for(fit[1]))


def _choose_above(
    rows: list[Any], h: bytes, state: State, spec: Spec, exact: int, since_seq: int, floor: int
) -> tuple[Any, ...]:
    """The window where what is older can't be read: from the earliest legal cut above it that fits.

    Raises Corrupt MISSING_SEGMENT if there is no legal cut above.
    """
    known: dict[int, tuple[Header, Any]] = {}
    for row in rows:
        known.update((header.seq, (header, row)) for header in core.scan_frames(h, row))
    walked: list[tuple[Header, Any]] = []
    cuts: list[tuple[int, int]] = []
    target, tokens, exchanges = state.last_live_seq, 0, 0
    while target > floor and target in known:
        header, row = known[target]
        walked.append((header, row))
        tokens += header.tokens[spec.slot]
        if header.flags & FLAG_CUT:
            cuts.append((len(walked), tokens))
        exchanges += bool(header.flags & FLAG_EXCHANGE)
        if spec.strategy == turn_pb2.STRATEGY_LAST_N and exchanges == spec.last_exchanges:
            break
        target = header.prev_live_seq
    if not cuts:
        what = f"The newest part of the conversation begins in turns up to {floor}, which can't be read."
        raise Corrupt("MISSING_SEGMENT", what, {"seq": str(floor)})
    fitting = [cut for cut in cuts if cut[1] <= exact]
    if not fitting:
        return FIT_NOTHING, cuts[0][1]
    count, tokens = fitting[-1]
    kept = walked[:count][::-1]
    pieces = [bytes(row[header.offset : header.end]) for header, row in kept if header.seq > since_seq]
    ranges: list[tuple[int, int]] = []
    for header, _ in kept:
        joins = bool(ranges) and ranges[-1][1] == header.seq - 1
        ranges[-1 if joins else len(ranges) :] = [(ranges[-1][0] if joins else header.seq, header.seq)]
    first, last = kept[0][0], kept[-1][0]
    return FIT_OK, first.seq, tokens, count, b"".join(pieces), ranges, first.prev_live_seq, last.chain


def build(source: Source, h: bytes, state: State, spec: Spec, standing: Standing) -> bytes:
    """The ActiveContext's wire bytes.

    Raises as build_pieces does.
    """
    return b"".join(build_pieces(source, h, state, spec, standing))


def build_pieces(source: Source, h: bytes, state: State, spec: Spec, standing: Standing) -> list[bytes]:
    """The same in pieces, for whoever puts something in front.

    Raises Invalid BUDGET_TOO_SMALL if not even the newest legal cut fits, HistoryNeeded, Corrupt.
    """
    etag = _etag(state, spec, standing)
    if spec.proto.context_etag and spec.proto.context_etag == etag:
        return [core.encode_message((12, etag, 13, True, 16, _receipt(state, standing, (), (), (), None)))]

    slot, hybrid = spec.slot, spec.strategy == turn_pb2.STRATEGY_HYBRID
    floor = max((last for _, last in standing.unread), default=0)
    instructions = state.instructions if spec.given_instructions is None else None
    if instructions and standing.is_unread(instructions[0]):
        instructions = None
    instructions_tokens = spec.instructions_tokens if instructions is None else instructions[1 + slot]
    pins_tokens = sum(value[3 + slot] for value in state.pins.values())
    summary = state.summary if hybrid and not any(standing.is_unread(row[0]) for row in state.summary) else []
    summary_tokens = sum(row[3 + slot] for row in summary)
    usable = spec.budget - spec.reserve
    fixed = CONTEXT_TOKENS + instructions_tokens + pins_tokens + summary_tokens
    exact = usable - fixed - spec.new_tokens
    tail = usable - fixed - max(spec.new_tokens, usable // NEW_MESSAGE_SHARE) if hybrid else exact
    if exact < 0:
        # What must be there leaves nothing for a tail; the minimum that is named has room for the newest one.
        fit = _choose(source, h, state, spec, 0, 0, 0, floor)
        raise _too_small(spec, spec.reserve + fixed + spec.new_tokens + (fit[1] if fit[0] == FIT_NOTHING else 0))
    since_seq = 0
    if spec.since is not None and not standing.is_unread(spec.since.seq):
        since_seq = spec.since.seq if holds(source, state, spec.since) is not False else 0
    fit = _choose(source, h, state, spec, max(0, tail), exact, since_seq, floor)
    if fit[0] == FIT_NOTHING:
        raise _too_small(spec, spec.reserve + fixed + spec.new_tokens + fit[1])
    _, first_seq, tail_tokens, messages, frames, ranges, before_seq, last_chain = fit

    pieces = [frames]
    prefix = hashlib.blake2b(first_seq.to_bytes(8, "little") + last_chain, digest_size=16)
    if instructions:
        header, buffer = source.frame(instructions[0])
        pieces += (_INSTRUCTIONS_TAG, bytes(buffer[header.offset + 1 : header.end]))
        prefix.update(header.chain)
    elif spec.given_instructions is not None:
        prefix.update(spec.given_instructions.encode())
    if not before_seq:
        # Every message in force is in the tail: a summary would only say it twice.
        summary, summary_tokens = [], 0
    covered = summary[-1][2] if summary else 0
    for row in summary:
        header, buffer = source.frame(row[0])
        pieces += (_SUMMARY_TAG, bytes(buffer[header.offset + 1 : header.end]))
        prefix.update(header.chain)
    left_out: list[tuple[int, int]] = []
    if before_seq > covered:
        # The instructions are shown wherever they stand.
        shown = instructions[0] if instructions else 0
        left_out = [(covered + 1, min(before_seq, shown - 1)), (max(covered, shown) + 1, before_seq)]
        for first, last in standing.unread:
            left_out = [
                part for low, high in left_out for part in ((low, min(high, first - 1)), (max(low, last + 1), high))
            ]
        left_out = [part for part in left_out if part[0] <= part[1]]
    pins = [pin.SerializeToString(deterministic=True) for pin in pin_protos(state)] if state.pins else []
    for pin in pins:
        prefix.update(pin)
    fixed = CONTEXT_TOKENS + instructions_tokens + pins_tokens + summary_tokens
    stable = (1, prefix.digest(), 2, fixed + tail_tokens, 3, messages)
    summarised = [(1, covered)] if summary else []
    rest = (
        *(3, spec.given_instructions, 4, pins),
        *(7, None if spec.new_message is None else spec.new_message.SerializeToString()),
        8,
        (
            *(1, instructions_tokens, 2, pins_tokens, 3, summary_tokens, 4, tail_tokens),
            *(6, spec.new_tokens, 7, CONTEXT_TOKENS, 8, fixed + tail_tokens + spec.new_tokens),
            *(9, spec.budget, 10, spec.reserve, 11, state.live_tokens[slot] + instructions_tokens),
        ),
        *(9, spec.encoding, 10, spec.strategy, 11, _checkpoint(state), 12, etag, 14, since_seq > 0),
        *(15, (1, first_seq, 2, state.last_live_seq) if first_seq else None),
        *(16, _receipt(state, standing, ranges, summarised, left_out, stable)),
        *(17, _state(state)),
    )
    pieces.append(core.encode_message(rest))
    return pieces


def _receipt(
    state: State,
    standing: Standing,
    verbatim: Sequence[tuple[int, int]],
    summarised: Sequence[tuple[int, int]],
    omitted: Sequence[tuple[int, int]],
    stable: tuple[Any, ...] | None,
) -> tuple[Any, ...]:
    """The receipt, as fields to encode. stable: of the stable prefix."""
    return (
        *(1, standing.rung, 2, standing.ownership),
        *(3, [(1, low, 2, high) for low, high in verbatim]),
        *(4, [(1, low, 2, high) for low, high in summarised]),
        *(6, [(1, low, 2, high) for low, high in omitted]),
        *(7, [missing.SerializeToString() for missing in standing.missing]),
        *(8, (1, state.epoch, 2, state.cursor, 3, state.chain if state.cursor else b"")),
        *(9, standing.cloud_seq, 11, standing.stale, 12, stable),
        *(15, standing.notice, 16, standing.reset_of, 17, standing.node),
    )


def _too_small(spec: Spec, minimum: int) -> Invalid:
    return Invalid(
        "BUDGET_TOO_SMALL",
        f"The newest part of the conversation needs a budget of {minimum} tokens; {spec.budget} were given.",
        {"minimum_budget_tokens": str(minimum), "budget_tokens": str(spec.budget)},
        [("context.budget_tokens", f"{spec.budget} is below the minimum of {minimum}")],
    )
