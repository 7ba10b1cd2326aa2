# cython: language_level=3, binding=True, wraparound=False, cdivision=True
"""The compiled twin of `sessiond.core.pure`: frames, replay, windows, with one crossing into C per call.

It promises the same bytes and the same errors as the readable twin, for any input. It never reads a file or a clock
and holds no buffer longer than a call.
"""

# The rules of this file.
#
#  1. pure.py is the specification, down to the order of the checks: whatever differs is a defect here, and
#     tests/core/test_twins.py looks for it.
#  2. A public function takes its buffers by `take` and gives them back in a `finally`. What it returns is owned.
#  3. Only `frame_end` believes a length that was read from a buffer, and only `next_field` one from a body; both
#     compare it with what is there before anything behind it is read. Offsets below HEADER_BYTES of a frame that passed
#     `frame_end` are free to read; there is no other read of a buffer.
#  4. The GIL is never released, so an exported buffer can't be resized under us. What it holds may still change where
#     Python code runs in between (msgpack, a refusal's text): so a bound is never derived twice.
#  5. No Python object is made per turn in fit_window and row_live, nor in replay for a message without tool calls or
#     results.
#  6. Arithmetic that could pass 64 bits says what happens then. Python's integers don't wrap, and neither twin does.
#  7. Slow paths (refusals, state changes, summaries, milestones, rewinds, tool calls) are written for reading.

import sys

import msgpack

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_SIZE
from cpython.mem cimport PyMem_Free, PyMem_Malloc, PyMem_Realloc
from cpython.number cimport PyNumber_Index
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport UINT64_MAX, uint8_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove

from crc32c cimport crc32c_init, crc32c_raw, crc32c_raw_two
from frame cimport (
    BODY_DERIVED,
    BODY_MESSAGE,
    BODY_MILESTONE,
    BODY_REWIND,
    BODY_STATE,
    BODY_SUMMARY,
    CHAIN_OFFSET,
    CRC_END,
    CRC_OFFSET,
    CUMULATIVE_OFFSET,
    DIGEST_BYTES,
    DIGEST_OFFSET,
    ENCODING_SLOTS,
    EPOCH_OFFSET,
    FIT_MORE,
    FIT_NOTHING,
    FIT_OK,
    FLAG_APPLIES,
    FLAG_BOUNDARY,
    FLAG_CALLS,
    FLAG_CUT,
    FLAG_EXCHANGE,
    FLAG_RESULTS,
    FLAGS_OFFSET,
    FRAME_BYTES_MAX,
    FRAME_TAG,
    HEADER_BYTES,
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_OFFSET,
    KIND_STATE,
    KIND_SUMMARY,
    MODE_FULL,
    MODE_HYBRID,
    MODE_LAST_N,
    MODE_SUMMARY,
    PREFIX_BYTES,
    PREV_LIVE_OFFSET,
    ROLE_DEVELOPER,
    ROLE_OFFSET,
    ROLE_SYSTEM,
    ROLE_USER,
    SEQ_OFFSET,
    SLOT_BYTES,
    SOURCE_OFFSET,
    STATUS_OFFSET,
    SUPERSEDED_RANGES_MAX,
    TIME_OFFSET,
    TOKENS_OFFSET,
    c_assert,
    frame_enums_right,
    frame_init,
    frame_tags_right,
    frame_template,
    load_u32,
    load_u64,
    store_u32,
    store_u64,
)

from sessiond.core.layout import Header, corrupt_frame, newer_rule
from sessiond.core.state import RESTORED_PLACES, decode_places, encode_places
from sessiond.errors import Corrupt

__all__ = [
    "COMPILED",
    "crc32c",
    "derived_offset",
    "encode_message",
    "fit_window",
    "fold",
    "join_turn_ids",
    "newest_row",
    "read_frame",
    "replay",
    "row_checked",
    "row_last",
    "row_live",
    "scan_frames",
    "seal_frame",
    "seek_turn_ids",
    "tool_events",
    "walk_rows",
]

COMPILED = True

cdef enum:
    _HASH_BYTES = 16
    _PLACES = 22

cdef object _MAX_SIZE = sys.maxsize
cdef object _UnpackException = msgpack.exceptions.UnpackException
cdef object _unpackb = msgpack.unpackb
cdef object _new_tuple = tuple.__new__
cdef tuple _RESTORED_PLACES = tuple(RESTORED_PLACES)

crc32c_init()
frame_init()


# ---------------------------------------------------------------------------------------------- arguments and buffers


cdef inline int take(object buffer, Py_buffer* view) except -1:
    """The buffer's bytes as C sees them; whoever calls gives them back."""
    return PyObject_GetBuffer(buffer, view, PyBUF_SIMPLE)


cdef inline const uint8_t* start_of(const Py_buffer* view) noexcept:
    return <const uint8_t*>view.buf


cdef bytes owned(object buffer):
    """The buffer's bytes, ours for as long as we like; bytes themselves are not copied."""
    cdef Py_buffer view
    if type(buffer) is bytes:
        return <bytes>buffer
    take(buffer, &view)
    try:
        return PyBytes_FromStringAndSize(<const char*>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


cdef int hash_state(object session_hash, uint32_t* state) except -1:
    """The checksum's raw state after the session's hash, from which every frame's goes on."""
    cdef Py_buffer view
    take(session_hash, &view)
    try:
        if view.len != _HASH_BYTES:
            raise ValueError("a session's hash is 16 bytes")
        state[0] = crc32c_raw(0xFFFFFFFF, start_of(&view), _HASH_BYTES)
    finally:
        PyBuffer_Release(&view)
    return 0


cdef uint64_t within(str name, object value, uint64_t low, uint64_t high) except? 0xFFFFFFFFFFFFFFFF:
    """An argument as an integer that is within its range; ValueError if it is not."""
    cdef uint64_t number = 0
    cdef bint fits = True
    if type(value) is not int:
        value = PyNumber_Index(value)
    try:
        number = value
    except OverflowError:
        fits = False
    if not fits or number < low or number > high:
        raise ValueError(f"{name} is {value}, not within {low} to {high}")
    return number


# -------------------------------------------------------------------------------------------------------------- frames


cdef inline Py_ssize_t frame_end(const uint8_t* base, Py_ssize_t offset, Py_ssize_t size) except -1:
    """Rule 1 of a valid frame: where the frame at `offset` ends, which is within `size`."""
    cdef const uint8_t* at
    cdef Py_ssize_t length
    if size - offset < HEADER_BYTES:
        raise corrupt_frame(offset, "it is cut short")
    at = base + offset
    if at[0] != FRAME_TAG:
        raise corrupt_frame(offset, "it has no frame tag")
    if not at[1] & at[2] & at[3] & at[4] & 0x80 or at[5] >= 0x08:
        raise corrupt_frame(offset, "its length is malformed")
    length = (
        <Py_ssize_t>(at[1] & 0x7F) | <Py_ssize_t>(at[2] & 0x7F) << 7 | <Py_ssize_t>(at[3] & 0x7F) << 14
        | <Py_ssize_t>(at[4] & 0x7F) << 21 | <Py_ssize_t>at[5] << 28
    )
    if length > FRAME_BYTES_MAX or length < HEADER_BYTES - PREFIX_BYTES or size - offset - PREFIX_BYTES < length:
        raise corrupt_frame(offset, "its length is out of bounds")
    return offset + PREFIX_BYTES + length


cdef inline uint32_t frame_crc(uint32_t state, const uint8_t* at, Py_ssize_t size) noexcept:
    c_assert(size >= HEADER_BYTES)
    return ~crc32c_raw_two(state, at, CRC_OFFSET, at + CRC_END, size - CRC_END)


cdef inline int check_frame(uint32_t state, const uint8_t* base, Py_ssize_t offset, Py_ssize_t end) except -1:
    """Rules 2 to 4 of a valid frame."""
    cdef const uint8_t* at = base + offset
    if not frame_tags_right(at):
        raise corrupt_frame(offset, "a header tag is wrong")
    if not frame_enums_right(at):
        raise corrupt_frame(offset, "an enum is out of range")
    if frame_crc(state, at, end - offset) != load_u32(at + CRC_OFFSET):
        raise corrupt_frame(offset, "its checksum does not match")
    return 0


cdef object header_of(const uint8_t* base, Py_ssize_t offset, Py_ssize_t end):
    """A checked frame's fixed fields."""
    cdef const uint8_t* at = base + offset
    cdef const uint8_t* totals = at + CUMULATIVE_OFFSET
    cdef const uint8_t* counts = at + TOKENS_OFFSET
    cdef const uint8_t* sources = at + SOURCE_OFFSET
    return _new_tuple(Header, (
        offset,
        end,
        load_u64(at + SEQ_OFFSET),
        load_u32(at + EPOCH_OFFSET),
        load_u64(at + TIME_OFFSET),
        at[KIND_OFFSET],
        at[ROLE_OFFSET],
        at[STATUS_OFFSET],
        load_u32(at + FLAGS_OFFSET),
        load_u64(at + PREV_LIVE_OFFSET),
        (load_u64(totals), load_u64(totals + SLOT_BYTES), load_u64(totals + 2 * SLOT_BYTES)),
        (load_u32(counts), load_u32(counts + SLOT_BYTES), load_u32(counts + 2 * SLOT_BYTES)),
        (sources[0], sources[SLOT_BYTES], sources[2 * SLOT_BYTES]),
        PyBytes_FromStringAndSize(<const char*>at + DIGEST_OFFSET, DIGEST_BYTES),
        PyBytes_FromStringAndSize(<const char*>at + CHAIN_OFFSET, DIGEST_BYTES),
    ))


def crc32c(data, seed=0):
    """CRC32C (Castagnoli) of the bytes, continued from `seed`."""
    cdef Py_buffer view
    cdef uint32_t state = ~<uint32_t>within("seed", seed, 0, 0xFFFFFFFF)
    take(data, &view)
    try:
        return <uint32_t>~crc32c_raw(state, start_of(&view), view.len)
    finally:
        PyBuffer_Release(&view)


def seal_frame(
    session_hash, seq, epoch, time_ms, kind, role, status, flags, prev_live_seq, cumulative, tokens, sources, digest,
    chain, body,
):
    """One turn as a frame. digest, chain: 16 bytes each. cumulative, tokens, sources: one per encoding slot.

    Raises OverflowError or ValueError if a value does not fit its field.
    """
    cdef Py_buffer[4] views
    cdef int taken = 0
    cdef uint32_t state
    cdef Py_ssize_t size, length
    cdef uint8_t* at
    cdef bytes frame
    try:
        for part in (session_hash, digest, chain, body):
            take(part, &views[taken])
            taken += 1
        if views[0].len != _HASH_BYTES or views[1].len != DIGEST_BYTES or views[2].len != DIGEST_BYTES:
            raise ValueError("hash, digest and chain are 16 bytes each")
        size = views[3].len
        length = HEADER_BYTES - PREFIX_BYTES + size
        if length > FRAME_BYTES_MAX:
            raise ValueError(f"a body of {size} bytes does not fit a frame")
        if not len(cumulative) == len(tokens) == len(sources) == ENCODING_SLOTS:
            raise ValueError("cumulative, tokens and sources have one value per encoding slot")
        frame = PyBytes_FromStringAndSize(NULL, HEADER_BYTES + size)
        at = <uint8_t*>PyBytes_AS_STRING(frame)
        memcpy(at, frame_template, HEADER_BYTES)
        at[1] = length & 0x7F | 0x80
        at[2] = length >> 7 & 0x7F | 0x80
        at[3] = length >> 14 & 0x7F | 0x80
        at[4] = length >> 21 & 0x7F | 0x80
        at[5] = length >> 28 & 0x7F
        try:
            store_u64(at + SEQ_OFFSET, within("seq", seq, 0, UINT64_MAX))
            store_u32(at + EPOCH_OFFSET, within("epoch", epoch, 0, 0xFFFFFFFF))
            store_u64(at + TIME_OFFSET, within("time_ms", time_ms, 0, UINT64_MAX))
            at[KIND_OFFSET] = within("kind", kind, 1, 5)
            at[ROLE_OFFSET] = within("role", role, 0, 5)
            at[STATUS_OFFSET] = within("status", status, 0, 3)
            store_u32(at + FLAGS_OFFSET, within("flags", flags, 0, 0xFFFFFFFF))
            store_u64(at + PREV_LIVE_OFFSET, within("prev_live_seq", prev_live_seq, 0, UINT64_MAX))
            fill_counts(at, cumulative, tokens, sources)
        except ValueError as error:
            raise OverflowError(str(error)) from None
        memcpy(at + DIGEST_OFFSET, views[1].buf, DIGEST_BYTES)
        memcpy(at + CHAIN_OFFSET, views[2].buf, DIGEST_BYTES)
        if size:
            memcpy(at + HEADER_BYTES, views[3].buf, size)
        state = crc32c_raw(0xFFFFFFFF, start_of(&views[0]), _HASH_BYTES)
        store_u32(at + CRC_OFFSET, frame_crc(state, at, HEADER_BYTES + size))
        return frame
    finally:
        while taken:
            taken -= 1
            PyBuffer_Release(&views[taken])


cdef int fill_counts(uint8_t* at, object cumulative, object tokens, object sources) except -1:
    cdef Py_ssize_t slot, shift
    for slot in range(ENCODING_SLOTS):
        shift = slot * SLOT_BYTES
        store_u64(at + CUMULATIVE_OFFSET + shift, within("cumulative", cumulative[slot], 0, UINT64_MAX))
        store_u32(at + TOKENS_OFFSET + shift, within("tokens", tokens[slot], 0, 0xFFFFFFFF))
        at[SOURCE_OFFSET + shift] = within("sources", sources[slot], 0, 2)
    return 0


def read_frame(session_hash, buffer, offset=0):
    """The frame at `offset`, checked by every rule of `layout`. Raises Corrupt."""
    cdef Py_buffer view
    cdef uint32_t state
    cdef Py_ssize_t start, end
    hash_state(session_hash, &state)
    take(buffer, &view)
    try:
        start = within("offset", offset, 0, _MAX_SIZE)
        end = frame_end(start_of(&view), start, view.len)
        check_frame(state, start_of(&view), start, end)
        return header_of(start_of(&view), start, end)
    finally:
        PyBuffer_Release(&view)


def scan_frames(session_hash, buffer):
    """Every frame of a row or segment, each checked; the buffer must end with a frame. Raises Corrupt."""
    cdef Py_buffer view
    cdef uint32_t state
    cdef Py_ssize_t offset = 0, end
    cdef list headers = []
    hash_state(session_hash, &state)
    take(buffer, &view)
    try:
        while offset < view.len:
            end = frame_end(start_of(&view), offset, view.len)
            check_frame(state, start_of(&view), offset, end)
            headers.append(header_of(start_of(&view), offset, end))
            offset = end
    finally:
        PyBuffer_Release(&view)
    return headers


# -------------------------------------------------------------------------------------------------------------- bodies


cdef struct Field:
    uint64_t number
    int wire
    # Of a varint.
    uint64_t value
    # Of the payload, in the buffer; start == end for a varint.
    Py_ssize_t start
    Py_ssize_t end


cdef bint next_varint(const uint8_t* base, Py_ssize_t* offset, Py_ssize_t end, uint64_t* value) noexcept:
    """Whether there was a varint: at most 10 bytes, not necessarily the fewest, bits above the 64th dropped."""
    cdef int shift = 0
    cdef uint8_t byte
    value[0] = 0
    while offset[0] < end and shift <= 63:
        byte = base[offset[0]]
        offset[0] += 1
        value[0] |= <uint64_t>(byte & 0x7F) << shift
        if byte < 0x80:
            return True
        shift += 7
    return False


cdef bint next_field(const uint8_t* base, Py_ssize_t* offset, Py_ssize_t end, Field* field) except -1:
    """Whether there was another field before `end`; ValueError if it is torn."""
    cdef uint64_t tag, size
    if offset[0] >= end:
        return False
    if not next_varint(base, offset, end, &tag):
        raise ValueError
    field.number = tag >> 3
    field.wire = tag & 7
    field.value = 0
    if field.number == 0 or field.number > 0x1FFFFFFF:
        raise ValueError
    if field.wire == 0:
        if not next_varint(base, offset, end, &field.value):
            raise ValueError
        size = 0
    elif field.wire == 2:
        if not next_varint(base, offset, end, &size):
            raise ValueError
    elif field.wire == 1:
        size = 8
    elif field.wire == 5:
        size = 4
    else:
        raise ValueError
    if size > <uint64_t>(end - offset[0]):
        raise ValueError
    field.start = offset[0]
    offset[0] += <Py_ssize_t>size
    field.end = offset[0]
    c_assert(field.end <= end)
    return True


cdef inline str text_of(const uint8_t* base, const Field* field):
    """The payload as text; UnicodeDecodeError, which is a ValueError, if it is not UTF-8."""
    return PyUnicode_DecodeUTF8(<const char*>base + field.start, field.end - field.start, "strict")


cdef list message_events(const uint8_t* base, Py_ssize_t offset, Py_ssize_t end):
    """(is a result, call id) of every tool call and result of the body from `offset` to `end`."""
    cdef Field message, part, item, inner
    cdef Py_ssize_t in_message, in_part, in_item
    cdef list events = []
    cdef str call_id
    while next_field(base, &offset, end, &message):
        if message.number != BODY_MESSAGE or message.wire != 2:
            continue
        in_message = message.start
        while next_field(base, &in_message, message.end, &part):
            if part.number != 2 or part.wire != 2:
                continue
            in_part = part.start
            while next_field(base, &in_part, part.end, &item):
                if (item.number != 3 and item.number != 4) or item.wire != 2:
                    continue
                call_id = ""
                in_item = item.start
                while next_field(base, &in_item, item.end, &inner):
                    if inner.number == 1 and inner.wire == 2:
                        call_id = text_of(base, &inner)
                events.append((item.number == 4, call_id))
        break
    return events


def tool_events(body):
    """(is a result, call id) of every tool call and result in a turn's body, in order. Raises Corrupt."""
    cdef Py_buffer view
    take(body, &view)
    try:
        return message_events(start_of(&view), 0, view.len)
    except ValueError:
        raise corrupt_frame(0, "its body does not parse") from None
    finally:
        PyBuffer_Release(&view)


def derived_offset(body):
    """Where the daemon's own field 27 starts in a body; len(body) if there is none. Raises Corrupt."""
    cdef Py_buffer view
    cdef Py_ssize_t offset = 0, before = 0
    cdef Field field
    take(body, &view)
    try:
        while next_field(start_of(&view), &offset, view.len, &field):
            if field.number == BODY_DERIVED and field.wire == 2:
                return before
            before = offset
        return view.len
    except ValueError:
        raise corrupt_frame(0, "its body does not parse") from None
    finally:
        PyBuffer_Release(&view)


# --------------------------------------------------------------------------------------------------------------- state


cdef bint is_count(object value) except -1:
    cdef uint64_t _
    if type(value) is not int:
        return False
    try:
        _ = value
    except OverflowError:
        return False
    return True


cdef bint is_counts(object value, Py_ssize_t number) except -1:
    """Whether a value is a list of exactly so many counts."""
    if type(value) is not list or PyList_GET_SIZE(value) != number:
        return False
    for item in <list>value:
        if not is_count(item):
            return False
    return True


cdef bint is_count_and_text(object value) except -1:
    if type(value) is not list or PyList_GET_SIZE(value) != 2:
        return False
    return is_count((<list>value)[0]) and type((<list>value)[1]) is str


cdef bint is_pin(object value) except -1:
    if type(value) is not list or PyList_GET_SIZE(value) != 6 or type((<list>value)[0]) is not str:
        return False
    return is_counts((<list>value)[1:], 5)


cdef bint is_place(Py_ssize_t place, object value) except -1:
    """Whether a value is what `layout` says of this place of a state."""
    if place in (0, 1, 2, 5, 6, 8, 9, 21):
        return is_count(value)
    if place == 3:
        return type(value) is bytes and len(<bytes>value) == _HASH_BYTES
    if place in (4, 7, 18):
        return is_counts(value, 3)
    if place == 10:
        return value is None or is_counts(value, 4)
    if place in (12, 13, 15):
        if type(value) is not dict:
            return False
        for key, item in (<dict>value).items():
            if type(key) is not str:
                return False
            if place == 12 and not is_pin(item):
                return False
            if place == 13 and type(item) is not bool:
                return False
            if place == 15 and type(item) is not str:
                return False
        return True
    if place == 14:
        return type(value) is str
    if place in (11, 16, 20):
        if type(value) is not list:
            return False
        for item in <list>value:
            if not (is_count_and_text(item) if place == 16 else is_counts(item, 6 if place == 11 else 2)):
                return False
        return True
    if place == 17:
        return is_counts(value, 2)
    return value is None or is_count_and_text(value)


cdef Py_ssize_t malformed_place(list places) except -2:
    """The first place of a state that does not hold what `layout` says; -1 if all do."""
    cdef Py_ssize_t place
    for place in range(_PLACES):
        if not is_place(place, places[place]):
            return place
    return -1


cdef struct Fold:
    # The places of a state that a plain message changes, and whether places 10 and 18 changed.
    uint64_t cursor
    uint64_t epoch
    uint64_t time_ms
    uint64_t[3] cumulative
    uint64_t last_live
    uint64_t live_messages
    uint64_t[3] live
    uint64_t exchanges
    uint64_t exchange_seq
    uint64_t[4] instructions
    uint64_t[3] boundary
    uint8_t[16] chain
    bint instructed
    bint bounded


cdef int load_fold(Fold* fold, list places) except -1:
    cdef Py_ssize_t slot
    cdef list cumulative = places[4], live = places[7]
    fold.cursor, fold.epoch, fold.time_ms = places[1], places[2], places[21]
    memcpy(fold.chain, PyBytes_AS_STRING(places[3]), DIGEST_BYTES)
    for slot in range(ENCODING_SLOTS):
        fold.cumulative[slot] = cumulative[slot]
        fold.live[slot] = live[slot]
    fold.last_live, fold.live_messages = places[5], places[6]
    fold.exchanges, fold.exchange_seq = places[8], places[9]
    fold.instructed = fold.bounded = False
    return 0


cdef int store_fold(Fold* fold, list places) except -1:
    places[1], places[2], places[21] = fold.cursor, fold.epoch, fold.time_ms
    places[3] = PyBytes_FromStringAndSize(<const char*>fold.chain, DIGEST_BYTES)
    places[4] = [fold.cumulative[0], fold.cumulative[1], fold.cumulative[2]]
    places[5], places[6] = fold.last_live, fold.live_messages
    places[7] = [fold.live[0], fold.live[1], fold.live[2]]
    places[8], places[9] = fold.exchanges, fold.exchange_seq
    if fold.instructed:
        places[10] = [fold.instructions[0], fold.instructions[1], fold.instructions[2], fold.instructions[3]]
    if fold.bounded:
        places[18] = [fold.boundary[0], fold.boundary[1], fold.boundary[2]]
    fold.instructed = fold.bounded = False
    return 0


cdef tuple map_entry(const uint8_t* base, const Field* entry):
    """A protobuf map entry as (key, text value, bool value)."""
    cdef Field item
    cdef Py_ssize_t offset = entry.start
    cdef str key = "", text = ""
    cdef bint truth = False
    while next_field(base, &offset, entry.end, &item):
        if item.number == 1 and item.wire == 2:
            key = text_of(base, &item)
        elif item.number == 2 and item.wire == 2:
            text = text_of(base, &item)
        elif item.number == 2 and item.wire == 0:
            truth = item.value != 0
    return key, text, truth


cdef int apply_state(
    list places, const uint8_t* base, const Field* body, object derived, object epoch, object seq
) except -1:
    cdef dict pins = places[12], flags = places[13], metadata = places[15]
    cdef Field field
    cdef Py_ssize_t offset = body.start
    cdef str key, text
    cdef bint truth
    if derived is not None and type(derived) is not dict:
        raise ValueError
    while next_field(base, &offset, body.end, &field):
        if field.wire != 2:
            continue
        if field.number == 1:
            key, text, truth = map_entry(base, &field)
            if truth:
                flags[key] = True
            else:
                flags.pop(key, None)
        elif field.number == 2:
            places[14] = text_of(base, &field)
        elif field.number == 3:
            key, text, truth = map_entry(base, &field)
            metadata[key] = text
        elif field.number == 4:
            metadata.pop(text_of(base, &field), None)
        elif field.number == 5:
            key, text, truth = map_entry(base, &field)
            counts = (<dict>derived).get(key) if derived else None
            if not is_counts(counts, ENCODING_SLOTS):
                raise ValueError
            pins[key] = [text, epoch, seq] + <list>counts
        elif field.number == 6:
            pins.pop(text_of(base, &field), None)
    places[17] = [epoch, seq]
    return 0


cdef int apply_summary(
    list places, const uint8_t* base, const Field* body, object seq, const uint8_t* counts
) except -1:
    cdef Field field, inner
    cdef Py_ssize_t offset = body.start, in_range
    cdef uint64_t first = 0, last = 0
    while next_field(base, &offset, body.end, &field):
        if field.number != 2 or field.wire != 2:
            continue
        in_range = field.start
        while next_field(base, &in_range, field.end, &inner):
            if inner.number == 1 and inner.wire == 0:
                first = inner.value
            elif inner.number == 2 and inner.wire == 0:
                last = inner.value
    cdef list row = [
        seq, first, last, load_u32(counts), load_u32(counts + SLOT_BYTES), load_u32(counts + 2 * SLOT_BYTES)
    ]
    # One that starts over stands for all before it; one that extends stands beside them.
    places[11] = [row] if first == 1 else <list>places[11] + [row]
    return 0


cdef int apply_milestone(list places, const uint8_t* base, const Field* body, object seq) except -1:
    cdef Field field
    cdef Py_ssize_t offset = body.start
    cdef str label = ""
    while next_field(base, &offset, body.end, &field):
        if field.number == 1 and field.wire == 2:
            label = text_of(base, &field)
    places[19] = [seq, label]
    return 0


cdef int apply_rewind(
    list places, const uint8_t* base, const Field* body, object derived, object epoch, uint64_t seq
) except -1:
    cdef Field field
    cdef Py_ssize_t offset = body.start, index
    cdef uint64_t to_seq = 0
    cdef list ranges
    while next_field(base, &offset, body.end, &field):
        if field.number == 1 and field.wire == 0:
            to_seq = field.value
    if type(derived) is not list or PyList_GET_SIZE(derived) < len(_RESTORED_PLACES) or to_seq >= seq:
        raise ValueError
    for index in range(len(_RESTORED_PLACES)):
        places[_RESTORED_PLACES[index]] = (<list>derived)[index]
    if malformed_place(places) >= 0:
        raise ValueError
    places[17] = [epoch, seq]
    ranges = [pair for pair in <list>places[20] if pair[0] <= to_seq]
    if to_seq + 1 < seq:
        ranges.append([to_seq + 1, seq - 1])
    if PyList_GET_SIZE(ranges) > SUPERSEDED_RANGES_MAX:
        ranges = ranges[PyList_GET_SIZE(ranges) - SUPERSEDED_RANGES_MAX:]
    places[20] = ranges
    return 0


cdef int apply_body(list places, const uint8_t* base, Py_ssize_t frame, Py_ssize_t end) except -1:
    """What a turn of any kind but a message does to the state; ValueError if its body does not parse."""
    cdef const uint8_t* at = base + frame
    cdef Py_ssize_t offset = frame + HEADER_BYTES
    cdef uint8_t kind = at[KIND_OFFSET]
    cdef uint64_t seq = load_u64(at + SEQ_OFFSET), wanted
    cdef object epoch = load_u32(at + EPOCH_OFFSET), derived = None
    cdef Field field, body
    if kind == KIND_SUMMARY:
        wanted = BODY_SUMMARY
    elif kind == KIND_STATE:
        wanted = BODY_STATE
    elif kind == KIND_MILESTONE:
        wanted = BODY_MILESTONE
    else:
        wanted = BODY_REWIND
    body.start = body.end = -1
    while next_field(base, &offset, end, &field):
        if field.wire != 2:
            continue
        if field.number == wanted:
            body = field
        elif field.number == BODY_DERIVED:
            packed = PyBytes_FromStringAndSize(<const char*>base + field.start, field.end - field.start)
            derived = _unpackb(packed, raw=False, strict_map_key=True)
    if body.start < 0:
        raise ValueError
    if kind == KIND_STATE:
        return apply_state(places, base, &body, derived, epoch, seq)
    if kind == KIND_SUMMARY:
        if not load_u32(at + FLAGS_OFFSET) & FLAG_APPLIES:
            return 0
        return apply_summary(places, base, &body, seq, at + TOKENS_OFFSET)
    if kind == KIND_MILESTONE:
        return apply_milestone(places, base, &body, seq)
    return apply_rewind(places, base, &body, derived, epoch, seq)


cdef int apply_events(list open_calls, list events, uint64_t seq) except -1:
    """Opens calls and closes them: a result pairs with the nearest earlier unanswered call of its id."""
    cdef Py_ssize_t index
    cdef str call_id
    cdef bint is_result
    for is_result, call_id in events:
        if not is_result:
            open_calls.append([seq, call_id])
            continue
        for index in range(PyList_GET_SIZE(open_calls) - 1, -1, -1):
            if (<list>open_calls[index])[1] == call_id:
                del open_calls[index]
                break
    return 0


cdef int fold_frames(uint32_t state, list places, const uint8_t* base, Py_ssize_t size) except -1:
    cdef Fold fold
    cdef list open_calls = places[16]
    cdef Py_ssize_t offset = 0, end, slot
    cdef const uint8_t* at
    cdef uint64_t seq, own, total
    cdef uint32_t flags
    cdef uint8_t kind, role
    cdef bint is_live, too_many
    load_fold(&fold, places)
    while offset < size:
        end = frame_end(base, offset, size)
        check_frame(state, base, offset, end)
        at = base + offset
        seq = load_u64(at + SEQ_OFFSET)
        kind, role, flags = at[KIND_OFFSET], at[ROLE_OFFSET], load_u32(at + FLAGS_OFFSET)
        if seq == 0 or seq - 1 != fold.cursor:
            raise corrupt_frame(offset, f"its seq is {seq} where {<object>fold.cursor + 1} is due")
        if flags >> 24 != 0:  # rule 1 is 0 there
            raise newer_rule(offset, flags)
        is_live = kind == KIND_MESSAGE and role != ROLE_SYSTEM and role != ROLE_DEVELOPER
        if load_u64(at + PREV_LIVE_OFFSET) != fold.last_live:
            raise corrupt_frame(offset, "it links to another message than the newest in force")
        for slot in range(ENCODING_SLOTS):
            own = load_u32(at + TOKENS_OFFSET + slot * SLOT_BYTES) if is_live else 0
            total = fold.cumulative[slot] + own
            if total < own or load_u64(at + CUMULATIVE_OFFSET + slot * SLOT_BYTES) != total:
                raise corrupt_frame(offset, "its token column does not add up")
            fold.cumulative[slot] = total
        if is_live:
            if role == ROLE_USER and not flags & FLAG_RESULTS and PyList_GET_SIZE(open_calls):
                open_calls.clear()
            if flags & (FLAG_CALLS | FLAG_RESULTS):
                try:
                    apply_events(open_calls, message_events(base, offset + HEADER_BYTES, end), seq)
                except ValueError:
                    raise corrupt_frame(offset, "its body does not parse") from None
            too_many = False
            if flags & FLAG_EXCHANGE:
                fold.exchanges += 1
                too_many = fold.exchanges == 0
                fold.exchange_seq = seq
            fold.last_live = seq
            fold.live_messages += 1
            too_many = too_many or fold.live_messages == 0
            for slot in range(ENCODING_SLOTS):
                own = load_u32(at + TOKENS_OFFSET + slot * SLOT_BYTES)
                fold.live[slot] += own
                too_many = too_many or fold.live[slot] < own
            if too_many:
                raise corrupt_frame(offset, "its token column does not add up")
        elif kind == KIND_MESSAGE:
            fold.instructions[0] = seq
            for slot in range(ENCODING_SLOTS):
                fold.instructions[slot + 1] = load_u32(at + TOKENS_OFFSET + slot * SLOT_BYTES)
            fold.instructed = True
        else:
            store_fold(&fold, places)
            try:
                apply_body(places, base, offset, end)
            except (ValueError, _UnpackException):
                raise corrupt_frame(offset, "its body does not parse") from None
            load_fold(&fold, places)
            open_calls = places[16]
        fold.cursor, fold.epoch, fold.time_ms = seq, load_u32(at + EPOCH_OFFSET), load_u64(at + TIME_OFFSET)
        memcpy(fold.chain, at + CHAIN_OFFSET, DIGEST_BYTES)
        if flags & FLAG_BOUNDARY:
            fold.boundary[0], fold.boundary[1], fold.boundary[2] = fold.epoch, seq, fold.time_ms
            fold.bounded = True
        offset = end
    store_fold(&fold, places)
    return 0


def replay(session_hash, state, frames):
    """Fold consecutive frames into a state: checkpoint = replay(checkpoint, turns after its cursor).

    The first frame must be the one after the state's replay cursor. Returns the new state's bytes. Raises Corrupt if a
    frame is damaged or the log has a gap, and NEWER_FORMAT for a state of an unknown rule.
    """
    cdef Py_buffer view
    cdef uint32_t crc
    cdef list places
    cdef bytes packed
    cdef Py_ssize_t malformed
    hash_state(session_hash, &crc)
    packed = owned(state)
    take(frames, &view)
    try:
        try:
            places = decode_places(packed)
        except RecursionError:  # its message repeats a rule that is nested too deep to be printed
            raise Corrupt("CORRUPT_HOT_ROW", "A state nests too deep.") from None
        malformed = malformed_place(places)
        if malformed >= 0:
            raise Corrupt("CORRUPT_HOT_ROW", f"Place {malformed} of a state is malformed.")
        fold_frames(crc, places, start_of(&view), view.len)
    finally:
        PyBuffer_Release(&view)
    return encode_places(places)


def fold(session_hash, places, frames):
    """The same on the places of a decoded state, which change where they stand; states.encode_places gives its bytes.

    Raises as replay does; the places are of no use then.
    """
    cdef Py_buffer view
    cdef uint32_t crc
    cdef Py_ssize_t malformed
    if type(places) is not list:
        raise TypeError("a state's places are a list")
    hash_state(session_hash, &crc)
    take(frames, &view)
    try:
        malformed = malformed_place(places)
        if malformed >= 0:
            raise Corrupt("CORRUPT_HOT_ROW", f"Place {malformed} of a state is malformed.")
        fold_frames(crc, places, start_of(&view), view.len)
    finally:
        PyBuffer_Release(&view)


# ------------------------------------------------------------------------------------------------------------- windows


cdef struct Entry:
    # One frame of the rows, and what the walk over the live messages learned of it.
    const uint8_t* base
    Py_ssize_t offset
    Py_ssize_t end
    uint64_t seq
    uint64_t suffix
    uint64_t before
    uint32_t flags


cdef Py_ssize_t index_row(
    const uint8_t* base, Py_ssize_t size, Entry* entries, Py_ssize_t count, Py_ssize_t room
) except -1:
    """Adds a row's frames to the entries, which ascend; returns how many there are then. Checks no more than that."""
    cdef Py_ssize_t offset = 0, end
    cdef uint64_t seq
    while offset < size:
        end = frame_end(base, offset, size)
        seq = load_u64(base + offset + SEQ_OFFSET)
        if seq <= (entries[count - 1].seq if count else 0):
            raise corrupt_frame(offset, "its row is out of order")
        c_assert(count < room)
        entries[count].base = base
        entries[count].offset = offset
        entries[count].end = end
        entries[count].seq = seq
        count += 1
        offset = end
    return count


def row_last(row):
    """The seq of a row's last frame, by a cheap look at fixed offsets. Raises Corrupt where lengths do not add up."""
    cdef Py_buffer view
    cdef Py_ssize_t offset = 0, start = 0
    take(row, &view)
    try:
        if not view.len:
            raise corrupt_frame(0, "its row is empty")
        while offset < view.len:
            start = offset
            offset = frame_end(start_of(&view), offset, view.len)
        return load_u64(start_of(&view) + start + SEQ_OFFSET)
    finally:
        PyBuffer_Release(&view)


def row_checked(session_hash, row):
    """The seq of a row's last frame, every frame checked by every rule of `layout`. Raises Corrupt."""
    cdef Py_buffer view
    cdef uint32_t state
    cdef Py_ssize_t offset = 0, start = 0, end
    hash_state(session_hash, &state)
    take(row, &view)
    try:
        if not view.len:
            raise corrupt_frame(0, "its row is empty")
        while offset < view.len:
            end = frame_end(start_of(&view), offset, view.len)
            check_frame(state, start_of(&view), offset, end)
            start, offset = offset, end
        return load_u64(start_of(&view) + start + SEQ_OFFSET)
    finally:
        PyBuffer_Release(&view)


def row_live(row, target_seq, slot):
    """(tokens of the live messages of this row from `target_seq` down, the live seq to look for next).

    A cheap look at fixed offsets, to learn how many rows a window needs; `fit_window` does the checking. Raises Corrupt
    where the row's lengths do not add up or it does not hold target_seq.
    """
    cdef Py_buffer view
    cdef Entry* entries = NULL
    cdef Py_ssize_t index, room
    cdef uint64_t target, link, tokens = 0
    cdef Py_ssize_t shift
    cdef const uint8_t* at
    cdef bint found = False
    take(row, &view)
    try:
        target = within("target_seq", target_seq, 0, UINT64_MAX)
        shift = within("slot", slot, 0, ENCODING_SLOTS - 1) * SLOT_BYTES
        room = view.len // HEADER_BYTES + 1
        entries = <Entry*>PyMem_Malloc(room * sizeof(Entry))
        if entries is NULL:
            raise MemoryError
        index = index_row(start_of(&view), view.len, entries, 0, room) - 1
        while True:
            while index >= 0 and entries[index].seq > target:
                index -= 1
            if index < 0 or entries[index].seq != target:
                break
            at = entries[index].base + entries[index].offset
            link = load_u64(at + PREV_LIVE_OFFSET)
            if link >= target:
                raise corrupt_frame(0, "a link points forward")
            tokens += load_u32(at + TOKENS_OFFSET + shift)
            target = link
            found = True
        if not found:
            raise corrupt_frame(0, f"its row lacks turn {target}")
        return tokens, target
    finally:
        PyMem_Free(entries)
        PyBuffer_Release(&view)


cdef bint row_key(object cursor, const uint8_t* h, uint64_t* first) except -1:
    """Whether the cursor stands on a row of this session; its first seq. A key is the hash, then the seq big-endian."""
    cdef Py_buffer view
    cdef object key = cursor.key()
    take(key, &view)
    try:
        if view.len != _HASH_BYTES + 8 or memcmp(view.buf, h, _HASH_BYTES) != 0:
            return False
        first[0] = big_u64(start_of(&view) + _HASH_BYTES)
        return True
    finally:
        PyBuffer_Release(&view)


cdef bint seek_row(object cursor, const uint8_t* h, uint64_t seq, uint64_t* first) except -1:
    """Put the cursor on the session's row that starts at or below seq; whether there is one."""
    cdef bytes key = PyBytes_FromStringAndSize(NULL, _HASH_BYTES + 8)
    cdef uint8_t* at = <uint8_t*>PyBytes_AS_STRING(key)
    cdef int index
    memcpy(at, h, _HASH_BYTES)
    for index in range(8):
        at[_HASH_BYTES + index] = seq >> (56 - 8 * index) & 0xFF
    if cursor.set_range(key):
        if row_key(cursor, h, first) and first[0] == seq:
            return True
        if not cursor.prev():
            return False
    elif not cursor.last():
        return False
    return row_key(cursor, h, first)


def newest_row(cursor, session_hash, head_seq):
    """(first seq, frames, last seq) of the row that holds a session's newest turns; None if it has no rows.

    cursor: over the rows of turns, by hash and seq; it stands on that row then. last seq may lie behind head_seq: the
    caller says what that means. Raises Corrupt where the row's lengths do not add up.
    """
    cdef Py_buffer view
    cdef uint64_t first = 0, head = within("head_seq", head_seq, 0, UINT64_MAX - 1)
    cdef object row
    take(session_hash, &view)
    try:
        if view.len != _HASH_BYTES:
            raise ValueError("a session's hash is 16 bytes")
        if not seek_row(cursor, start_of(&view), head + 1, &first):
            return None
    finally:
        PyBuffer_Release(&view)
    row = cursor.value()
    return first, row, row_last(row)


def walk_rows(cursor, session_hash, floor_seq, last_live_seq, slot, tokens_max):
    """The rows that a window takes: ([buffers, oldest first], the live seq to go on at, 0 at the log's start, tokens).

    cursor: as newest_row left it. It goes along the live messages until they take more than tokens_max, or lie below
    floor_seq: rows from there on are whole, and nothing before is here. Raises Corrupt as row_live does.
    """
    cdef Py_buffer view
    cdef uint64_t first = 0, target, floor, gathered = 0, most
    cdef list rows = []
    cdef object row, counted
    cdef bint here
    target = within("last_live_seq", last_live_seq, 0, UINT64_MAX)
    floor = within("floor_seq", floor_seq, 0, UINT64_MAX)
    most = within("tokens_max", tokens_max, 0, UINT64_MAX)
    take(session_hash, &view)
    try:
        if view.len != _HASH_BYTES:
            raise ValueError("a session's hash is 16 bytes")
        here = target != 0 and target >= floor and row_key(cursor, start_of(&view), &first)
        while target and target >= floor and (gathered <= most or not rows):
            # Mostly it is the row before.
            if rows:
                here = cursor.prev() and row_key(cursor, start_of(&view), &first)
            if not here or first > target:
                if not seek_row(cursor, start_of(&view), target, &first):
                    break
            row = cursor.value()
            counted = row_live(row, target, slot)
            gathered += <uint64_t>counted[0]
            target = counted[1]
            rows.append(row)
    finally:
        PyBuffer_Release(&view)
    rows.reverse()
    return rows, target, gathered


cdef bytes copy_window(const Entry* entries, Py_ssize_t first, Py_ssize_t count, uint64_t since_seq):
    """The kept frames after `since_seq` as one bytes; neighbours in a row are copied at one go."""
    cdef Py_ssize_t index, size = 0, length
    cdef const Entry* entry
    cdef const uint8_t* run
    cdef uint8_t* to
    cdef bytes frames
    while first < count and entries[first].seq <= since_seq:
        first += 1
    for index in range(first, count):
        size += entries[index].end - entries[index].offset
    frames = PyBytes_FromStringAndSize(NULL, size)
    to = <uint8_t*>PyBytes_AS_STRING(frames)
    index = first
    while index < count:
        entry = &entries[index]
        run = entry.base + entry.offset
        length = entry.end - entry.offset
        index += 1
        while index < count and entries[index].base == entry.base and entries[index].offset == entries[index - 1].end:
            length += entries[index].end - entries[index].offset
            index += 1
        c_assert(length <= size)
        memcpy(to, run, length)
        to += length
        size -= length
    c_assert(size == 0)
    return frames


cdef list ranges_of(const Entry* entries, Py_ssize_t first, Py_ssize_t count):
    """(first, last) of consecutive seqs."""
    cdef list ranges = []
    cdef uint64_t start = entries[first].seq
    cdef Py_ssize_t index
    for index in range(first + 1, count):
        if entries[index].seq - 1 != entries[index - 1].seq:
            ranges.append((start, entries[index - 1].seq))
            start = entries[index].seq
    ranges.append((start, entries[count - 1].seq))
    return ranges


cdef struct Wish:
    Py_ssize_t shift
    uint64_t last_live_seq
    uint64_t exchange_seq
    uint64_t mode
    # 0 for as many as fit.
    uint64_t exchanges
    uint64_t tail_tokens
    uint64_t tail_tokens_exact
    uint64_t stride_tokens
    uint64_t since_seq


cdef Py_ssize_t chosen_cut(
    const Entry* entries, Py_ssize_t first, Py_ssize_t count, const Wish* wish, bint whole
) noexcept:
    """Where among the walked messages, oldest first, the window starts; -1 if no legal cut fits."""
    cdef Py_ssize_t index, earliest = -1, predecessor = -1
    cdef bint first_of_all, crossed, strides = wish.mode == MODE_HYBRID
    for index in range(first, count):
        if not entries[index].flags & FLAG_CUT:
            continue
        if strides and entries[index].suffix <= wish.tail_tokens:
            # With the whole log walked, the first cut of all is where multiple 0 lands; otherwise the first cut walked
            # is known not to fit and only serves as the predecessor of the next one.
            first_of_all = whole and predecessor < 0
            crossed = predecessor >= 0 and (
                entries[index].before // wish.stride_tokens > entries[predecessor].before // wish.stride_tokens
            )
            if first_of_all or crossed:
                if entries[index].seq <= wish.exchange_seq or first_of_all:
                    return index
                strides = False
        if earliest < 0 and entries[index].suffix <= wish.tail_tokens_exact:
            earliest = index
        if earliest >= 0 and not strides:
            break
        predecessor = index
    return earliest


cdef tuple fit(uint32_t state, Entry* entries, Py_ssize_t count, const Wish* wish):
    cdef Py_ssize_t index = count - 1, walked = count, chosen
    cdef Entry entry
    cdef const uint8_t* at
    cdef uint64_t target = wish.last_live_seq, suffix = 0, exchanges = 0, link, own, total, newest_cut = 0
    cdef uint32_t flags
    cdef bint any_cut = False
    # Newest to oldest. The walked messages are gathered at the end of the entries: of index + 1 entries not yet looked
    # at, none is overwritten, as at most one is added for each that is passed.
    while target:
        while index >= 0 and entries[index].seq > target:
            index -= 1
        if index < 0 or entries[index].seq != target:
            if index < 0:
                return FIT_MORE, target
            raise corrupt_frame(0, f"its row lacks turn {target}")
        entry = entries[index]
        at = entry.base + entry.offset
        check_frame(state, entry.base, entry.offset, entry.end)
        if at[KIND_OFFSET] != KIND_MESSAGE or at[ROLE_OFFSET] == ROLE_SYSTEM or at[ROLE_OFFSET] == ROLE_DEVELOPER:
            raise corrupt_frame(entry.offset, "a link leads to no message")
        link = load_u64(at + PREV_LIVE_OFFSET)
        if link >= target:
            raise corrupt_frame(entry.offset, "a link points forward")
        own = load_u32(at + TOKENS_OFFSET + wish.shift)
        total = load_u64(at + CUMULATIVE_OFFSET + wish.shift)
        if total < own:
            raise corrupt_frame(entry.offset, "its token column does not add up")
        flags = load_u32(at + FLAGS_OFFSET)
        # Below 2**64: each adds less than 2**32, and there are fewer than 2**32 frames in any memory.
        suffix += own
        entry.suffix = suffix
        entry.before = total - own
        entry.flags = flags
        walked -= 1
        c_assert(walked >= index)
        entries[walked] = entry
        index -= 1
        if flags & FLAG_CUT:
            if not any_cut:
                any_cut = True
                newest_cut = suffix
            if suffix > wish.tail_tokens_exact:
                break
            if flags & FLAG_EXCHANGE:
                exchanges += 1
                if exchanges == wish.exchanges:
                    break
        target = link
    if not any_cut:
        raise corrupt_frame(0, "its log has no place where a window may start")
    chosen = chosen_cut(entries, walked, count, wish, target == 0)
    if chosen < 0:
        return FIT_NOTHING, newest_cut
    at = entries[count - 1].base + entries[count - 1].offset
    return (
        FIT_OK,
        entries[chosen].seq,
        entries[chosen].suffix,
        count - chosen,
        copy_window(entries, chosen, count, wish.since_seq),
        ranges_of(entries, chosen, count),
        load_u64(entries[chosen].base + entries[chosen].offset + PREV_LIVE_OFFSET),
        PyBytes_FromStringAndSize(<const char*>at + CHAIN_OFFSET, DIGEST_BYTES),
    )


def fit_window(
    session_hash, rows, slot, last_live_seq, exchange_seq, mode, last_exchanges, tail_tokens, tail_tokens_exact,
    stride_tokens, since_seq,
):
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
    cdef Wish wish
    cdef Py_buffer* views = NULL
    cdef Entry* entries = NULL
    cdef Py_ssize_t taken = 0, count = 0, index, room = 0
    cdef uint32_t state
    cdef tuple buffers
    hash_state(session_hash, &state)
    wish.shift = within("slot", slot, 0, ENCODING_SLOTS - 1) * SLOT_BYTES
    wish.last_live_seq = within("last_live_seq", last_live_seq, 0, UINT64_MAX)
    wish.exchange_seq = within("exchange_seq", exchange_seq, 0, UINT64_MAX)
    wish.mode = within("mode", mode, MODE_FULL, MODE_HYBRID)
    wish.exchanges = within("last_exchanges", last_exchanges, 1 if wish.mode == MODE_LAST_N else 0, UINT64_MAX)
    if wish.mode != MODE_LAST_N:
        wish.exchanges = 1 if wish.mode == MODE_SUMMARY else 0
    wish.tail_tokens = within("tail_tokens", tail_tokens, 0, UINT64_MAX)
    wish.tail_tokens_exact = within("tail_tokens_exact", tail_tokens_exact, wish.tail_tokens, UINT64_MAX)
    wish.stride_tokens = within("stride_tokens", stride_tokens, 1 if wish.mode == MODE_HYBRID else 0, UINT64_MAX)
    wish.since_seq = within("since_seq", since_seq, 0, UINT64_MAX)
    if wish.last_live_seq == 0:
        return FIT_OK, 0, 0, 0, b"", [], 0, b""
    buffers = tuple(rows)
    try:
        views = <Py_buffer*>PyMem_Malloc((len(buffers) + 1) * sizeof(Py_buffer))
        if views is NULL:
            raise MemoryError
        while taken < len(buffers):
            take(buffers[taken], &views[taken])
            room += views[taken].len // HEADER_BYTES
            taken += 1
        entries = <Entry*>PyMem_Malloc((room + 1) * sizeof(Entry))
        if entries is NULL:
            raise MemoryError
        for index in range(taken):
            count = index_row(start_of(&views[index]), views[index].len, entries, count, room)
        return fit(state, entries, count, &wish)
    finally:
        PyMem_Free(entries)
        while taken:
            taken -= 1
            PyBuffer_Release(&views[taken])
        PyMem_Free(views)


# ------------------------------------------------------------------------------------------------------------ turn ids


def join_turn_ids(session_hash, chunks, head_seq, horizon):
    """The entries of a session's turn ids as one bytes: 24 each (hash of the id, start of the digest, seq big-endian).

    chunks: values of the `ids` table, ascending: checksum, then entries. They must end at head_seq without a gap, and
    reach back to turn 1 or over `horizon` entries. Raises Corrupt where one is damaged or missing: a turn could be
    applied twice.
    """
    cdef Py_buffer view
    cdef uint32_t seed
    cdef Py_ssize_t offset, count = 0
    cdef uint64_t first = 1, last = 0, head = within("head_seq", head_seq, 0, UINT64_MAX)
    cdef uint64_t least = within("horizon", horizon, 0, UINT64_MAX)
    cdef list pieces = []
    hash_state(session_hash, &seed)
    seed = crc32c_raw(seed, <const uint8_t*>b"ids", 3)
    for chunk in chunks:
        take(chunk, &view)
        try:
            if view.len < 4 or (view.len - 4) % 24:
                raise damaged_ids(session_hash)
            if <uint32_t>~crc32c_raw(seed, start_of(&view) + 4, view.len - 4) != load_u32(start_of(&view)):
                raise damaged_ids(session_hash)
            offset = 4
            while offset < view.len:
                last = big_u64(start_of(&view) + offset + 16)
                if not count:
                    first = last
                count += 1
                offset += 24
            pieces.append(PyBytes_FromStringAndSize(<const char*>view.buf + 4, view.len - 4))
        finally:
            PyBuffer_Release(&view)
    if last != head or last + 1 - first != <uint64_t>count or (first > 1 and <uint64_t>count < least):
        raise missing_ids(session_hash)
    return b"".join(pieces)


def seek_turn_ids(entries, id_hashes):
    """Where turn ids stand, the newest of each: [(seq, start of the digest) or None] for each of `id_hashes`.

    entries: as join_turn_ids gives them. A hash is 8 bytes. Raises ValueError for what are none.
    """
    cdef Py_buffer view
    cdef Py_buffer wanted
    cdef const uint8_t* at
    cdef uint64_t key
    cdef Py_ssize_t offset
    cdef list places = []
    take(entries, &view)
    try:
        if view.len % 24:
            raise ValueError("an entry is 24 bytes")
        for id_hash in id_hashes:
            take(id_hash, &wanted)
            try:
                if wanted.len != 8:
                    raise ValueError("a turn id's hash is 8 bytes")
                key = load_u64(start_of(&wanted))
            finally:
                PyBuffer_Release(&wanted)
            place = None
            offset = view.len
            while offset:
                offset -= 24
                at = start_of(&view) + offset
                if load_u64(at) == key:
                    place = (big_u64(at + 16), PyBytes_FromStringAndSize(<const char*>at + 8, 8))
                    break
            places.append(place)
    finally:
        PyBuffer_Release(&view)
    return places


cdef inline uint64_t big_u64(const uint8_t* at) noexcept:
    cdef uint64_t value = 0
    cdef int index
    for index in range(8):
        value = value << 8 | at[index]
    return value


cdef object damaged_ids(object session_hash):
    what = f"A ids row of session {bytes(session_hash).hex()} does not match its checksum."
    return Corrupt("CORRUPT_HOT_ROW", what, {"table": "ids"})


cdef object missing_ids(object session_hash):
    what = f"Turn ids of session {bytes(session_hash).hex()} are missing."
    return Corrupt("CORRUPT_HOT_ROW", what, {"table": "ids"})


# ------------------------------------------------------------------------------------------------------------ messages


cdef struct Out:
    uint8_t* at
    Py_ssize_t size
    Py_ssize_t room


cdef int grow(Out* out, Py_ssize_t more) except -1:
    """Room for so many bytes more."""
    cdef Py_ssize_t room
    cdef uint8_t* fresh
    if out.size + more <= out.room:
        return 0
    room = 2 * out.room + more
    fresh = <uint8_t*>PyMem_Realloc(out.at, room)
    if fresh is NULL:
        raise MemoryError
    out.at, out.room = fresh, room
    return 0


cdef inline int put_varint(Out* out, uint64_t value) except -1:
    grow(out, 10)
    while value > 0x7F:
        out.at[out.size] = value & 0x7F | 0x80
        out.size += 1
        value >>= 7
    out.at[out.size] = value
    out.size += 1
    return 0


cdef inline int varint_bytes(uint64_t value) noexcept:
    cdef int size = 1
    while value > 0x7F:
        size += 1
        value >>= 7
    return size


cdef int put_payload(Out* out, uint64_t number, const char* payload, Py_ssize_t size) except -1:
    put_varint(out, number << 3 | 2)
    put_varint(out, size)
    grow(out, size)
    memcpy(out.at + out.size, payload, size)
    out.size += size
    return 0


cdef int put_message(Out* out, uint64_t number, tuple fields) except -1:
    """A message within a message: its length is known once it is written, and most take one byte for it."""
    cdef Py_ssize_t start, size, more
    put_varint(out, number << 3 | 2)
    grow(out, 1)
    out.size += 1
    start = out.size
    put_fields(out, fields)
    size = out.size - start
    more = varint_bytes(size) - 1
    if more:
        grow(out, more)
        memmove(out.at + start + more, out.at + start, size)
    out.size = start - 1
    put_varint(out, size)
    out.size += size
    return 0


cdef int put_field(Out* out, object number, object value) except -1:
    cdef long long numbered
    cdef uint64_t tag, plain
    cdef bytes text
    cdef Py_ssize_t index
    if value is None or value is False:
        return 0
    numbered = number
    if numbered < 0:
        plain = within("fixed64", value, 0, UINT64_MAX)
        if plain:
            put_varint(out, <uint64_t>(-numbered) << 3 | 1)
            grow(out, 8)
            store_u64(out.at + out.size, plain)
            out.size += 8
        return 0
    tag = numbered
    kind = type(value)
    if kind is int or kind is bool:
        plain = within("varint", value, 0, UINT64_MAX)
        if plain:
            put_varint(out, tag << 3)
            put_varint(out, plain)
    elif kind is tuple:
        put_message(out, tag, <tuple>value)
    elif kind is bytes or kind is str:
        text = <bytes>value if kind is bytes else (<str>value).encode()
        if PyBytes_GET_SIZE(text):
            put_payload(out, tag, PyBytes_AS_STRING(text), PyBytes_GET_SIZE(text))
    elif kind is list:
        for index in range(PyList_GET_SIZE(value)):
            put_field(out, number, (<list>value)[index])
    else:
        raise TypeError(f"a field is {kind.__name__}")
    return 0


cdef int put_fields(Out* out, tuple fields) except -1:
    cdef Py_ssize_t index, count = len(fields)
    if count % 2:
        raise ValueError("fields are numbers and values in turn")
    for index in range(0, count, 2):
        put_field(out, fields[index], fields[index + 1])
    return 0


def encode_message(fields):
    """A protobuf message's bytes. fields: a tuple of field numbers and values in turn, in the order of the numbers.

    An int is a varint, under a negative number a fixed64 of the field without its sign; bytes and str are what they
    are; a tuple is a message, a list a field that is repeated. None, 0, False and what is empty are left out, a
    message that is a tuple never. Raises TypeError, ValueError or OverflowError for what no field takes.
    """
    cdef Out out
    out.size, out.room = 0, 512
    out.at = <uint8_t*>PyMem_Malloc(out.room)
    if out.at is NULL:
        raise MemoryError
    try:
        put_fields(&out, fields)
        return PyBytes_FromStringAndSize(<const char*>out.at, out.size)
    finally:
        PyMem_Free(out.at)
