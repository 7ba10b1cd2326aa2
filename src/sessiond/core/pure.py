"""The readable twin of the compiled core: frames, replay, windows, in plain Python.

It promises the same bytes and the same errors as `_kernel`, for any input. It never reads a file or a clock and holds
no buffer longer than a call.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import google_crc32c
import msgpack

from sessiond.core.layout import (
    BODY_DERIVED,
    BODY_MESSAGE,
    BODY_MILESTONE,
    BODY_REWIND,
    BODY_STATE,
    BODY_SUMMARY,
    CRC_END,
    CRC_OFFSET,
    ENCODING_SLOTS,
    FIT_MORE,
    FIT_NOTHING,
    FIT_OK,
    FLAG_APPLIES,
    FLAG_BOUNDARY,
    FLAG_CALLS,
    FLAG_CUT,
    FLAG_EXCHANGE,
    FLAG_RESULTS,
    FRAME_BYTES_MAX,
    FRAME_TAG,
    HEADER_BYTES,
    HEADER_STRUCT,
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_REWIND,
    KIND_STATE,
    KIND_SUMMARY,
    MODE_FULL,
    MODE_HYBRID,
    MODE_LAST_N,
    MODE_SUMMARY,
    PREFIX_BYTES,
    ROLE_DEVELOPER,
    ROLE_SYSTEM,
    ROLE_USER,
    RULE_VERSION,
    SUPERSEDED_RANGES_MAX,
    Header,
    corrupt_frame,
    newer_rule,
)
from sessiond.core.state import RESTORED_PLACES, decode_places, encode_places
from sessiond.errors import Corrupt

Buffer = bytes | bytearray | memoryview

COMPILED = False

_MASK_32 = (1 << 32) - 1
_MASK_64 = (1 << 64) - 1
_HASH_BYTES = 16


def _view(buffer: Buffer) -> memoryview:
    """Any contiguous buffer as flat bytes, without a copy."""
    try:
        view = memoryview(buffer)
    except TypeError:
        raise TypeError(f"a bytes-like object is required, not '{type(buffer).__name__}'") from None
    if not view.c_contiguous:
        raise BufferError("memoryview: underlying buffer is not C-contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _owned(buffer: Buffer) -> bytes:
    """The buffer's bytes, ours for as long as we like; bytes themselves are not copied."""
    return buffer if type(buffer) is bytes else bytes(_view(buffer))


def _owned_hash(session_hash: bytes) -> bytes:
    owned = _owned(session_hash)
    if len(owned) != _HASH_BYTES:
        raise ValueError("a session's hash is 16 bytes")
    return owned


def _within(name: str, value: int, low: int, high: int) -> int:
    """An argument as an int that is within its range; ValueError if it is not."""
    number = operator.index(value)
    if not low <= number <= high:
        raise ValueError(f"{name} is {number}, not within {low} to {high}")
    return number


def crc32c(data: Buffer, seed: int = 0) -> int:
    """CRC32C (Castagnoli) of the bytes, continued from `seed`."""
    return int(google_crc32c.extend(_within("seed", seed, 0, _MASK_32), _owned(data)))


def _frame_crc(session_hash: bytes, buffer: Buffer, offset: int, end: int) -> int:
    seed = google_crc32c.value(session_hash)
    seed = google_crc32c.extend(seed, bytes(buffer[offset : offset + CRC_OFFSET]))
    return int(google_crc32c.extend(seed, bytes(buffer[offset + CRC_END : end])))


def seal_frame(
    session_hash: bytes,
    seq: int,
    epoch: int,
    time_ms: int,
    kind: int,
    role: int,
    status: int,
    flags: int,
    prev_live_seq: int,
    cumulative: Sequence[int],
    tokens: Sequence[int],
    sources: Sequence[int],
    digest: bytes,
    chain: bytes,
    body: Buffer,
) -> bytes:
    """One turn as a frame. digest, chain: 16 bytes each. cumulative, tokens, sources: one per encoding slot.

    Raises OverflowError or ValueError if a value does not fit its field.
    """
    hash_bytes, digest_bytes, chain_bytes, content = _owned(session_hash), _owned(digest), _owned(chain), _owned(body)
    if not len(hash_bytes) == len(digest_bytes) == len(chain_bytes) == _HASH_BYTES:
        raise ValueError("hash, digest and chain are 16 bytes each")
    length = HEADER_BYTES - PREFIX_BYTES + len(content)
    if length > FRAME_BYTES_MAX:
        raise ValueError(f"a body of {len(content)} bytes does not fit a frame")
    if not len(cumulative) == len(tokens) == len(sources) == ENCODING_SLOTS:
        raise ValueError("cumulative, tokens and sources have one value per encoding slot")
    padded = bytes(
        [
            length & 0x7F | 0x80,
            length >> 7 & 0x7F | 0x80,
            length >> 14 & 0x7F | 0x80,
            length >> 21 & 0x7F | 0x80,
            length >> 28 & 0x7F,
        ]
    )
    try:
        fixed = [
            *(FRAME_TAG, padded),
            *(0x09, _within("seq", seq, 0, _MASK_64)),
            *(0x15, _within("epoch", epoch, 0, _MASK_32)),
            *(0x19, _within("time_ms", time_ms, 0, _MASK_64)),
            *(0x20, _within("kind", kind, 1, 5)),
            *(0x28, _within("role", role, 0, 5)),
            *(0x30, _within("status", status, 0, 3)),
            *(0x3D, _within("flags", flags, 0, _MASK_32)),
            *(0x41, _within("prev_live_seq", prev_live_seq, 0, _MASK_64)),
        ]
        for slot in range(ENCODING_SLOTS):
            fixed += [(0x4A, 0x52, 0x5A)[slot], 16]
            fixed += [0x09, _within("cumulative", cumulative[slot], 0, _MASK_64)]
            fixed += [0x15, _within("tokens", tokens[slot], 0, _MASK_32)]
            fixed += [0x18, _within("sources", sources[slot], 0, 2)]
    except ValueError as error:
        raise OverflowError(str(error)) from None
    fixed += [0x82, 0x01, 16, digest_bytes, 0x8A, 0x01, 16, chain_bytes, 0x95, 0x01, 0]
    frame = HEADER_STRUCT.pack(*fixed) + content
    crc = _frame_crc(hash_bytes, frame, 0, len(frame))
    return frame[:CRC_OFFSET] + crc.to_bytes(4, "little") + frame[CRC_END:]


def _frame_end(buffer: Buffer, offset: int) -> int:
    """Rule 1: where the frame at `offset` ends."""
    size = len(buffer)
    if size - offset < HEADER_BYTES:
        raise corrupt_frame(offset, "it is cut short")
    if buffer[offset] != FRAME_TAG:
        raise corrupt_frame(offset, "it has no frame tag")
    length = 0
    for index in range(5):
        byte = buffer[offset + 1 + index]
        if byte < 0x80 if index < 4 else byte >= 0x08:
            raise corrupt_frame(offset, "its length is malformed")
        length |= (byte & 0x7F) << 7 * index
    if length > FRAME_BYTES_MAX or length < HEADER_BYTES - PREFIX_BYTES or size - offset - PREFIX_BYTES < length:
        raise corrupt_frame(offset, "its length is out of bounds")
    return offset + PREFIX_BYTES + length


def read_frame(session_hash: bytes, buffer: Buffer, offset: int = 0) -> Header:
    """The frame at `offset`, checked by every rule of `layout`. Raises Corrupt."""
    hash_bytes = _owned_hash(session_hash)
    with _view(buffer) as view:
        return _read_frame(hash_bytes, view, _within("offset", offset, 0, sys.maxsize))


def _read_frame(session_hash: bytes, buffer: Buffer, offset: int) -> Header:
    end = _frame_end(buffer, offset)
    fields = HEADER_STRUCT.unpack_from(buffer, offset)
    fixed_tags = fields[2:18:2]
    if fixed_tags != (0x09, 0x15, 0x19, 0x20, 0x28, 0x30, 0x3D, 0x41):
        raise corrupt_frame(offset, "a header tag is wrong")
    kind, role, status = fields[9], fields[11], fields[13]
    cumulative, tokens, sources = [], [], []
    for slot in range(ENCODING_SLOTS):
        start = 18 + 8 * slot
        tag, size, tag_cumulative, total, tag_tokens, own, tag_source, source = fields[start : start + 8]
        if (tag, size, tag_cumulative, tag_tokens, tag_source) != ((0x4A, 0x52, 0x5A)[slot], 16, 0x09, 0x15, 0x18):
            raise corrupt_frame(offset, "a header tag is wrong")
        cumulative.append(total)
        tokens.append(own)
        sources.append(source)
    (d1, d2, d3, digest, c1, c2, c3, chain, x1, x2, crc) = fields[42:]
    if (d1, d2, d3, c1, c2, c3, x1, x2) != (0x82, 0x01, 16, 0x8A, 0x01, 16, 0x95, 0x01):
        raise corrupt_frame(offset, "a header tag is wrong")
    if not 1 <= kind <= 5 or role > 5 or status > 3 or max(sources) > 2:
        raise corrupt_frame(offset, "an enum is out of range")
    if _frame_crc(session_hash, buffer, offset, end) != crc:
        raise corrupt_frame(offset, "its checksum does not match")
    return Header(
        offset,
        end,
        fields[3],
        fields[5],
        fields[7],
        kind,
        role,
        status,
        fields[15],
        fields[17],
        (cumulative[0], cumulative[1], cumulative[2]),
        (tokens[0], tokens[1], tokens[2]),
        (sources[0], sources[1], sources[2]),
        digest,
        chain,
    )


def scan_frames(session_hash: bytes, buffer: Buffer) -> list[Header]:
    """Every frame of a row or segment, each checked; the buffer must end with a frame. Raises Corrupt."""
    headers: list[Header] = []
    hash_bytes, content = _owned_hash(session_hash), _owned(buffer)
    offset, size = 0, len(content)
    while offset < size:
        header = _read_frame(hash_bytes, content, offset)
        headers.append(header)
        offset = header.end
    return headers


def _varint(buffer: Buffer, offset: int, end: int) -> tuple[int, int]:
    """A varint and where it ends: at most 10 bytes, not necessarily the fewest, bits above the 64th dropped."""
    value = shift = 0
    while True:
        if offset >= end or shift > 63:
            raise ValueError
        byte = buffer[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _MASK_64, offset
        shift += 7


def _fields(buffer: Buffer, offset: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(field number, wire type, value of a varint, start and end of the payload) of each field; ValueError if torn."""
    while offset < end:
        tag, offset = _varint(buffer, offset, end)
        number, wire = tag >> 3, tag & 7
        if number == 0 or number > 0x1FFFFFFF:
            raise ValueError
        if wire == 0:
            value, offset = _varint(buffer, offset, end)
            yield number, wire, value, offset, offset
        elif wire == 2:
            size, offset = _varint(buffer, offset, end)
            if size > end - offset:
                raise ValueError
            yield number, wire, 0, offset, offset + size
            offset += size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            if size > end - offset:
                raise ValueError
            yield number, wire, 0, offset, offset + size
            offset += size
        else:
            raise ValueError


def _text(buffer: Buffer, start: int, end: int) -> str:
    return bytes(buffer[start:end]).decode("utf-8")  # UnicodeDecodeError is a ValueError


def _tool_events(buffer: Buffer, start: int, end: int) -> list[tuple[bool, str]]:
    """(is a result, call id) of every tool call and result in a message, in order."""
    events: list[tuple[bool, str]] = []
    for number, wire, _, part_start, part_end in _fields(buffer, start, end):
        if number != 2 or wire != 2:
            continue
        for kind, kind_wire, _, item_start, item_end in _fields(buffer, part_start, part_end):
            if kind not in (3, 4) or kind_wire != 2:
                continue
            call_id = ""
            for item, item_wire, _, text_start, text_end in _fields(buffer, item_start, item_end):
                if item == 1 and item_wire == 2:
                    call_id = _text(buffer, text_start, text_end)
            events.append((kind == 4, call_id))
    return events


def _message_events(buffer: Buffer, start: int, end: int) -> list[tuple[bool, str]]:
    for number, wire, _, item_start, item_end in _fields(buffer, start, end):
        if number == BODY_MESSAGE and wire == 2:
            return _tool_events(buffer, item_start, item_end)
    return []


def tool_events(body: Buffer) -> list[tuple[bool, str]]:
    """(is a result, call id) of every tool call and result in a turn's body, in order. Raises Corrupt."""
    content = _owned(body)
    try:
        return _message_events(content, 0, len(content))
    except ValueError:
        raise corrupt_frame(0, "its body does not parse") from None


def derived_offset(body: Buffer) -> int:
    """Where the daemon's own field 27 starts in a body; len(body) if there is none. Raises Corrupt."""
    content = _owned(body)
    try:
        before = 0
        for number, wire, _, _, end in _fields(content, 0, len(content)):
            if number == BODY_DERIVED and wire == 2:
                return before
            before = end
    except ValueError:
        raise corrupt_frame(0, "its body does not parse") from None
    return len(content)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MASK_64


def _is_text(value: Any) -> bool:
    return type(value) is str


def _list_of(*items: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is a list with exactly these items."""

    def is_right(value: Any) -> bool:
        if type(value) is not list or len(value) != len(items):
            return False
        return all(is_item(item) for is_item, item in zip(items, value, strict=True))

    return is_right


def _counts(number: int) -> Callable[[Any], bool]:
    return _list_of(*[_is_count] * number)


def _every(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(is_one, value))


def _or_nil(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_one(value)


def _map_of(is_one: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is dict and all(_is_text(key) and is_one(item) for key, item in value.items())


# What stands in each place of a state, in the order of `layout`; a place beyond these is not ours to judge.
_SHAPES: Final[tuple[Callable[[Any], bool], ...]] = (
    *(_is_count, _is_count, _is_count),
    lambda value: type(value) is bytes and len(value) == _HASH_BYTES,
    *(_counts(3), _is_count, _is_count, _counts(3), _is_count, _is_count),
    *(_or_nil(_counts(4)), _every(_counts(6))),
    _map_of(_list_of(_is_text, *[_is_count] * 5)),
    _map_of(lambda value: type(value) is bool),
    *(_is_text, _map_of(_is_text), _every(_list_of(_is_count, _is_text)), _counts(2), _counts(3)),
    *(_or_nil(_list_of(_is_count, _is_text)), _every(_counts(2)), _is_count),
)


_THREE_COUNTS: Final = _counts(ENCODING_SLOTS)


def _malformed_place(places: list[Any]) -> int:
    """The first place of a state that does not hold what `layout` says; -1 if all do."""
    for index, is_right in enumerate(_SHAPES):
        if not is_right(places[index]):
            return index
    return -1


def _map_entry(buffer: Buffer, start: int, end: int) -> tuple[str, str, bool]:
    """A protobuf map entry as (key, text value, bool value)."""
    key, text, truth = "", "", False
    for number, wire, value, item_start, item_end in _fields(buffer, start, end):
        if number == 1 and wire == 2:
            key = _text(buffer, item_start, item_end)
        elif number == 2 and wire == 2:
            text = _text(buffer, item_start, item_end)
        elif number == 2 and wire == 0:
            truth = value != 0
    return key, text, truth


def _apply_state(places: list[Any], buffer: Buffer, start: int, end: int, derived: Any, epoch: int, seq: int) -> None:
    flags, metadata, pins = places[13], places[15], places[12]
    if derived is not None and not isinstance(derived, dict):
        raise ValueError
    for number, wire, _, item_start, item_end in _fields(buffer, start, end):
        if wire != 2:
            continue
        if number == 1:
            key, _, truth = _map_entry(buffer, item_start, item_end)
            if truth:
                flags[key] = True
            else:
                flags.pop(key, None)
        elif number == 2:
            places[14] = _text(buffer, item_start, item_end)
        elif number == 3:
            key, text, _ = _map_entry(buffer, item_start, item_end)
            metadata[key] = text
        elif number == 4:
            metadata.pop(_text(buffer, item_start, item_end), None)
        elif number == 5:
            key, text, _ = _map_entry(buffer, item_start, item_end)
            counts: Any = derived.get(key) if derived else None
            if not _THREE_COUNTS(counts):
                raise ValueError
            pins[key] = [text, epoch, seq] + counts
        elif number == 6:
            pins.pop(_text(buffer, item_start, item_end), None)


def _apply_body(places: list[Any], buffer: Buffer, header: Header) -> None:
    """What a turn of any kind but a plain message does to the state; ValueError if its body does not parse."""
    kind, seq = header.kind, header.seq
    wanted = {
        KIND_SUMMARY: BODY_SUMMARY,
        KIND_STATE: BODY_STATE,
        KIND_MILESTONE: BODY_MILESTONE,
        KIND_REWIND: BODY_REWIND,
    }[kind]
    start = end = -1
    derived: Any = None
    for number, wire, _, item_start, item_end in _fields(buffer, header.offset + HEADER_BYTES, header.end):
        if wire != 2:
            continue
        if number == wanted:
            start, end = item_start, item_end
        elif number == BODY_DERIVED:
            derived = msgpack.unpackb(bytes(buffer[item_start:item_end]), raw=False, strict_map_key=True)
    if start < 0:
        raise ValueError
    if kind == KIND_STATE:
        _apply_state(places, buffer, start, end, derived, header.epoch, seq)
        places[17] = [header.epoch, seq]
    elif kind == KIND_SUMMARY:
        if header.flags & FLAG_APPLIES:
            first = last = 0
            for number, wire, _, item_start, item_end in _fields(buffer, start, end):
                if number == 2 and wire == 2:
                    for inner, inner_wire, value, _, _ in _fields(buffer, item_start, item_end):
                        if inner == 1 and inner_wire == 0:
                            first = value
                        elif inner == 2 and inner_wire == 0:
                            last = value
            row = [seq, first, last, *header.tokens]
            # One that starts over stands for all before it; one that extends stands beside them.
            places[11] = [row] if first == 1 else [*places[11], row]
    elif kind == KIND_MILESTONE:
        label = ""
        for number, wire, _, item_start, item_end in _fields(buffer, start, end):
            if number == 1 and wire == 2:
                label = _text(buffer, item_start, item_end)
        places[19] = [seq, label]
    else:
        to_seq = 0
        for number, wire, value, _, _ in _fields(buffer, start, end):
            if number == 1 and wire == 0:
                to_seq = value
        if not isinstance(derived, list) or len(derived) < len(RESTORED_PLACES) or to_seq >= seq:
            raise ValueError
        for index, place in enumerate(RESTORED_PLACES):
            places[place] = derived[index]
        if _malformed_place(places) >= 0:
            raise ValueError
        places[17] = [header.epoch, seq]
        ranges = [pair for pair in places[20] if pair[0] <= to_seq]
        if to_seq + 1 < seq:
            ranges.append([to_seq + 1, seq - 1])
        places[20] = ranges[-SUPERSEDED_RANGES_MAX:]


def replay(session_hash: bytes, state: Buffer, frames: Buffer) -> bytes:
    """Fold consecutive frames into a state: checkpoint = replay(checkpoint, turns after its cursor).

    The first frame must be the one after the state's replay cursor. Returns the new state's bytes. Raises Corrupt if a
    frame is damaged or the log has a gap, and NEWER_FORMAT for a state of an unknown rule.
    """
    hash_bytes, packed, content = _owned_hash(session_hash), _owned(state), _owned(frames)
    try:
        places = decode_places(packed)
    except RecursionError:  # its message repeats a rule that is nested too deep to be printed
        raise Corrupt("CORRUPT_HOT_ROW", "A state nests too deep.") from None
    fold(hash_bytes, places, content)
    return encode_places(places)


def fold(session_hash: bytes, places: list[Any], frames: Buffer) -> None:
    """The same on the places of a decoded state, which change where they stand; states.encode_places gives its bytes.

    Raises as replay does; the places are of no use then.
    """
    if type(places) is not list:
        raise TypeError("a state's places are a list")
    hash_bytes, content = _owned_hash(session_hash), _owned(frames)
    malformed = _malformed_place(places)
    if malformed >= 0:
        raise Corrupt("CORRUPT_HOT_ROW", f"Place {malformed} of a state is malformed.")
    cumulative, live, open_calls = places[4], places[7], places[16]
    offset, size = 0, len(content)
    while offset < size:
        header = _read_frame(hash_bytes, content, offset)
        seq, kind, role, flags = header.seq, header.kind, header.role, header.flags
        if seq != places[1] + 1:
            raise corrupt_frame(offset, f"its seq is {seq} where {places[1] + 1} is due")
        if flags >> 24 != RULE_VERSION - 1:
            raise newer_rule(offset, flags)
        is_live = kind == KIND_MESSAGE and role not in (ROLE_SYSTEM, ROLE_DEVELOPER)
        if header.prev_live_seq != places[5]:
            raise corrupt_frame(offset, "it links to another message than the newest in force")
        for slot in range(ENCODING_SLOTS):
            cumulative[slot] += header.tokens[slot] if is_live else 0
            if header.cumulative[slot] != cumulative[slot]:
                raise corrupt_frame(offset, "its token column does not add up")
        body = offset + HEADER_BYTES
        try:
            if is_live:
                if role == ROLE_USER and not flags & FLAG_RESULTS:
                    open_calls.clear()
                if flags & (FLAG_CALLS | FLAG_RESULTS):
                    for is_result, call_id in _message_events(content, body, header.end):
                        if not is_result:
                            open_calls.append([seq, call_id])
                            continue
                        for index in range(len(open_calls) - 1, -1, -1):
                            if open_calls[index][1] == call_id:
                                del open_calls[index]
                                break
                if flags & FLAG_EXCHANGE:
                    places[8] += 1
                    places[9] = seq
                places[5] = seq
                places[6] += 1
                for slot in range(ENCODING_SLOTS):
                    live[slot] += header.tokens[slot]
                if max(places[6], places[8], *live) > _MASK_64:
                    raise corrupt_frame(offset, "its token column does not add up")
            elif kind == KIND_MESSAGE:
                places[10] = [seq, *header.tokens]
            else:
                _apply_body(places, content, header)
                live, open_calls = places[7], places[16]
        except (ValueError, msgpack.exceptions.UnpackException):
            raise corrupt_frame(offset, "its body does not parse") from None
        if flags & FLAG_BOUNDARY:
            places[18] = [header.epoch, seq, header.time_ms]
        places[1], places[2], places[3], places[21] = seq, header.epoch, header.chain, header.time_ms
        offset = header.end


def row_checked(session_hash: bytes, row: Buffer) -> int:
    """The seq of a row's last frame, every frame checked by every rule of `layout`. Raises Corrupt."""
    hash_bytes, content = _owned_hash(session_hash), _owned(row)
    if not content:
        raise corrupt_frame(0, "its row is empty")
    offset = seq = 0
    while offset < len(content):
        header = _read_frame(hash_bytes, content, offset)
        seq, offset = header.seq, header.end
    return seq


def row_last(row: Buffer) -> int:
    """The seq of a row's last frame, by a cheap look at fixed offsets. Raises Corrupt where lengths do not add up."""
    content = _owned(row)
    if not content:
        raise corrupt_frame(0, "its row is empty")
    offset = start = 0
    while offset < len(content):
        start, offset = offset, _frame_end(content, offset)
    return int(HEADER_STRUCT.unpack_from(content, start)[3])


def row_live(row: Buffer, target_seq: int, slot: int) -> tuple[int, int]:
    """(tokens of the live messages of this row from `target_seq` down, the live seq to look for next).

    A cheap look at fixed offsets, to learn how many rows a window needs; `fit_window` does the checking. Raises Corrupt
    where the row's lengths do not add up or it does not hold target_seq.
    """
    content = _owned(row)
    _within("target_seq", target_seq, 0, _MASK_64)
    _within("slot", slot, 0, ENCODING_SLOTS - 1)
    links: dict[int, tuple[int, int]] = {}
    offset, size, previous = 0, len(content), 0
    while offset < size:
        end = _frame_end(content, offset)
        fields = HEADER_STRUCT.unpack_from(content, offset)
        seq = fields[3]
        if seq <= previous:
            raise corrupt_frame(offset, "its row is out of order")
        links[seq] = (fields[23 + 8 * slot], fields[17])
        offset, previous = end, seq
    tokens = 0
    if target_seq not in links:
        raise corrupt_frame(0, f"its row lacks turn {target_seq}")
    while target_seq in links:
        own, link = links[target_seq]
        if link >= target_seq:
            raise corrupt_frame(0, "a link points forward")
        tokens += own
        target_seq = link
    return tokens, target_seq


def _row_key(cursor: Any, session_hash: bytes) -> int | None:
    key = bytes(cursor.key())
    if len(key) != _HASH_BYTES + 8 or key[:_HASH_BYTES] != session_hash:
        return None
    return int.from_bytes(key[_HASH_BYTES:], "big")


def _seek_row(cursor: Any, session_hash: bytes, seq: int) -> int | None:
    """Put the cursor on the session's row that starts at or below seq; where that one starts."""
    if cursor.set_range(session_hash + seq.to_bytes(8, "big")):
        if _row_key(cursor, session_hash) == seq:
            return seq
        if not cursor.prev():
            return None
    elif not cursor.last():
        return None
    return _row_key(cursor, session_hash)


def newest_row(cursor: Any, session_hash: bytes, head_seq: int) -> tuple[int, Any, int] | None:
    """(first seq, frames, last seq) of the row that holds a session's newest turns; None if it has no rows.

    cursor: over the rows of turns, by hash and seq; it stands on that row then. last seq may lie behind head_seq: the
    caller says what that means. Raises Corrupt where the row's lengths do not add up.
    """
    head = _within("head_seq", head_seq, 0, _MASK_64 - 1)
    first = _seek_row(cursor, _owned_hash(session_hash), head + 1)
    if first is None:
        return None
    row = cursor.value()
    return first, row, row_last(row)


def walk_rows(
    cursor: Any, session_hash: bytes, floor_seq: int, last_live_seq: int, slot: int, tokens_max: int
) -> tuple[list[Any], int, int]:
    """The rows that a window takes: ([buffers, oldest first], the live seq to go on at, 0 at the log's start, tokens).

    cursor: as newest_row left it. It goes along the live messages until they take more than tokens_max, or lie below
    floor_seq: rows from there on are whole, and nothing before is here. Raises Corrupt as row_live does.
    """
    target = _within("last_live_seq", last_live_seq, 0, _MASK_64)
    floor = _within("floor_seq", floor_seq, 0, _MASK_64)
    most = _within("tokens_max", tokens_max, 0, _MASK_64)
    owner = _owned_hash(session_hash)
    rows: list[Any] = []
    gathered = 0
    while target and target >= floor and (gathered <= most or not rows):
        if _seek_row(cursor, owner, target) is None:
            break
        row = cursor.value()
        tokens, target = row_live(row, target, slot)
        gathered += tokens
        rows.insert(0, row)
    return rows, target, gathered


def fit_window(
    session_hash: bytes,
    rows: Sequence[Buffer],
    slot: int,
    last_live_seq: int,
    exchange_seq: int,
    mode: int,
    last_exchanges: int,
    tail_tokens: int,
    tail_tokens_exact: int,
    stride_tokens: int,
    since_seq: int,
) -> tuple[Any, ...]:
    """Choose the window and copy its frames.

    rows: buffers of whole frames, ascending. slot: encoding slot. last_live_seq: where the live messages end.
    exchange_seq: start of the newest exchange, 0 if none. tail_tokens: what the tail may take after the share kept
    for what varies; tail_tokens_exact: after what it really is, never less. since_seq: leave out frames up to it.

    Returns one of
      (FIT_OK, first_seq, tokens, messages, frames, ranges, prev_live_seq of the first, chain of the last); ranges is a
        list of (first, last) of consecutive seqs; for an empty window first_seq is 0 and the chain is empty;
      (FIT_MORE, seq): rows that hold turn `seq`, and older ones, are needed;
      (FIT_NOTHING, tokens): not even the newest legal cut fits; it would take this many.
    Raises Corrupt if a frame of the window is damaged or missing within a row, ValueError for a mode, slot or number
    out of its range. Rule: DESIGN.md, "Strides without state"; MODE_SUMMARY keeps the newest exchange.
    """
    hash_bytes = _owned_hash(session_hash)
    slot = _within("slot", slot, 0, ENCODING_SLOTS - 1)
    last_live_seq = _within("last_live_seq", last_live_seq, 0, _MASK_64)
    exchange_seq = _within("exchange_seq", exchange_seq, 0, _MASK_64)
    mode = _within("mode", mode, MODE_FULL, MODE_HYBRID)
    last_exchanges = _within("last_exchanges", last_exchanges, 1 if mode == MODE_LAST_N else 0, _MASK_64)
    tail_tokens = _within("tail_tokens", tail_tokens, 0, _MASK_64)
    tail_tokens_exact = _within("tail_tokens_exact", tail_tokens_exact, tail_tokens, _MASK_64)
    stride_tokens = _within("stride_tokens", stride_tokens, 1 if mode == MODE_HYBRID else 0, _MASK_64)
    since_seq = _within("since_seq", since_seq, 0, _MASK_64)
    if last_live_seq == 0:
        return (FIT_OK, 0, 0, 0, b"", [], 0, b"")
    exchanges_kept = {MODE_LAST_N: last_exchanges, MODE_SUMMARY: 1}.get(mode, 0)

    places: dict[int, tuple[bytes, int]] = {}
    previous = lowest = 0
    for row in [_owned(row) for row in rows]:
        offset, size = 0, len(row)
        while offset < size:
            end = _frame_end(row, offset)
            seq = HEADER_STRUCT.unpack_from(row, offset)[3]
            if seq <= previous:
                raise corrupt_frame(offset, "its row is out of order")
            previous = seq
            lowest = lowest or seq
            places[seq] = (row, offset)
            offset = end

    # Newest to oldest: (seq, suffix tokens, tokens before it, flags, header, row)
    walked: list[tuple[int, int, int, int, Header, bytes]] = []
    target, suffix, exchanges = last_live_seq, 0, 0
    while target:
        if target not in places:
            if lowest == 0 or target < lowest:
                return (FIT_MORE, target)
            raise corrupt_frame(0, f"its row lacks turn {target}")
        row, offset = places[target]
        header = _read_frame(hash_bytes, row, offset)
        if header.kind != KIND_MESSAGE or header.role in (ROLE_SYSTEM, ROLE_DEVELOPER):
            raise corrupt_frame(offset, "a link leads to no message")
        if header.prev_live_seq >= target:
            raise corrupt_frame(offset, "a link points forward")
        own = header.tokens[slot]
        if header.cumulative[slot] < own:
            raise corrupt_frame(offset, "its token column does not add up")
        suffix += own
        walked.append((target, suffix, header.cumulative[slot] - own, header.flags, header, row))
        if header.flags & FLAG_CUT:
            if suffix > tail_tokens_exact:
                break
            if header.flags & FLAG_EXCHANGE:
                exchanges += 1
                if exchanges == exchanges_kept:
                    break
        target = header.prev_live_seq

    cuts = [entry for entry in reversed(walked) if entry[3] & FLAG_CUT]
    if not cuts:
        raise corrupt_frame(0, "its log has no place where a window may start")
    chosen = None
    if mode == MODE_HYBRID:
        # With the whole log walked, the first cut of all is where multiple 0 lands; otherwise the first cut walked
        # is known not to fit and only serves as the predecessor of the next one.
        for index, (seq, total, before, _, _, _) in enumerate(cuts):
            first_of_all = index == 0 and target == 0
            crossed = index > 0 and before // stride_tokens > cuts[index - 1][2] // stride_tokens
            if (first_of_all or crossed) and total <= tail_tokens:
                if seq <= exchange_seq or first_of_all:
                    chosen = seq
                break
    if chosen is None:
        chosen = next((seq for seq, total, _, _, _, _ in cuts if total <= tail_tokens_exact), None)
    if chosen is None:
        return (FIT_NOTHING, cuts[-1][1])

    pieces: list[bytes] = []
    ranges: list[tuple[int, int]] = []
    kept = [entry for entry in reversed(walked) if entry[0] >= chosen]
    for seq, _, _, _, header, row in kept:
        if ranges and ranges[-1][1] == seq - 1:
            ranges[-1] = (ranges[-1][0], seq)
        else:
            ranges.append((seq, seq))
        if seq > since_seq:
            pieces.append(row[header.offset : header.end])
    first = kept[0]
    return (
        FIT_OK,
        chosen,
        first[1],
        len(kept),
        b"".join(pieces),
        ranges,
        first[4].prev_live_seq,
        kept[-1][4].chain,
    )


def join_turn_ids(session_hash: bytes, chunks: Sequence[Buffer], head_seq: int, horizon: int) -> bytes:
    """The entries of a session's turn ids as one bytes: 24 each (hash of the id, start of the digest, seq big-endian).

    chunks: values of the `ids` table, ascending: checksum, then entries. They must end at head_seq without a gap, and
    reach back to turn 1 or over `horizon` entries. Raises Corrupt where one is damaged or missing: a turn could be
    applied twice.
    """
    _within("head_seq", head_seq, 0, _MASK_64)
    _within("horizon", horizon, 0, _MASK_64)
    owner = _owned_hash(session_hash)
    seed = google_crc32c.value(owner + b"ids")
    joined = b""
    for chunk in chunks:
        content = _owned(chunk)
        entries = content[4:]
        crc = int(google_crc32c.extend(seed, entries)).to_bytes(4, "little")
        if len(content) < 4 or len(entries) % 24 or crc != content[:4]:
            what = f"A ids row of session {owner.hex()} does not match its checksum."
            raise Corrupt("CORRUPT_HOT_ROW", what, {"table": "ids"})
        joined += entries
    count = len(joined) // 24
    first = int.from_bytes(joined[16:24], "big") if count else 1
    last = int.from_bytes(joined[-8:], "big") if count else 0
    if last != head_seq or (last + 1 - first) & _MASK_64 != count or (first > 1 and count < horizon):
        raise Corrupt("CORRUPT_HOT_ROW", f"Turn ids of session {owner.hex()} are missing.", {"table": "ids"})
    return joined


def seek_turn_ids(entries: Buffer, id_hashes: Sequence[bytes]) -> list[tuple[int, bytes] | None]:
    """Where turn ids stand, the newest of each: [(seq, start of the digest) or None] for each of `id_hashes`.

    entries: as join_turn_ids gives them. A hash is 8 bytes. Raises ValueError for what are none.
    """
    content = _owned(entries)
    if len(content) % 24:
        raise ValueError("an entry is 24 bytes")
    wanted = [_owned(id_hash) for id_hash in id_hashes]
    if any(len(id_hash) != 8 for id_hash in wanted):
        raise ValueError("a turn id's hash is 8 bytes")
    places = {
        content[at : at + 8]: (int.from_bytes(content[at + 16 : at + 24], "big"), content[at + 8 : at + 16])
        for at in range(0, len(content), 24)
    }
    return [places.get(id_hash) for id_hash in wanted]


def _encoded_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _encoded(number: int, value: Any) -> bytes:
    if value is None or value is False:
        return b""
    if number < 0:
        plain = _within("fixed64", value, 0, _MASK_64)
        return _encoded_varint(-number << 3 | 1) + plain.to_bytes(8, "little") if plain else b""
    kind = type(value)
    if kind is int or kind is bool:
        plain = _within("varint", value, 0, _MASK_64)
        return _encoded_varint(number << 3) + _encoded_varint(plain) if plain else b""
    if kind is list:
        return b"".join(_encoded(number, item) for item in value)
    if kind is tuple:
        payload = encode_message(value)
    elif kind is bytes or kind is str:
        payload = value if kind is bytes else value.encode()
        if not payload:
            return b""
    else:
        raise TypeError(f"a field is {kind.__name__}")
    return _encoded_varint(number << 3 | 2) + _encoded_varint(len(payload)) + payload


def encode_message(fields: tuple[Any, ...]) -> bytes:
    """A protobuf message's bytes. fields: a tuple of field numbers and values in turn, in the order of the numbers.

    An int is a varint, under a negative number a fixed64 of the field without its sign; bytes and str are what they
    are; a tuple is a message, a list a field that is repeated. None, 0, False and what is empty are left out, a
    message that is a tuple never. Raises TypeError, ValueError or OverflowError for what no field takes.
    """
    if len(fields) % 2:
        raise ValueError("fields are numbers and values in turn")
    return b"".join(_encoded(number, value) for number, value in zip(fields[::2], fields[1::2], strict=True))
