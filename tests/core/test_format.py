"""A frame is protobuf, stands at fixed offsets, and is valid if and only if `layout` says so."""

from __future__ import annotations

import itertools
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond import core
from sessiond.core import layout
from sessiond.core.layout import (
    CRC_END,
    CRC_OFFSET,
    CUMULATIVE_OFFSETS,
    FRAME_BYTES_MAX,
    HEADER_BYTES,
    KIND_OFFSET,
    PREFIX_BYTES,
    ROLE_OFFSET,
    SOURCE_OFFSETS,
    STATUS_OFFSET,
    TOKENS_OFFSETS,
    Header,
)
from sessiond.errors import Corrupt
from sessiond.v1 import context_pb2, turn_pb2
from tests.core.loggen import EXAMPLES, HASH, OTHER_HASH, Log, build_log, logs

EXT = Path(__file__).parents[2] / "ext"
# A row of the table in layout's docstring: offset, bytes, what stands there, its protobuf field.
ROW = re.compile(r"^ +(\d+) +(\d+|L-141) {1,2}(\S.*?) {2,}(\S.*)$", re.M)


def table() -> list[tuple[int, str, str, str]]:
    assert layout.__doc__
    return [(int(offset), size, what, field) for offset, size, what, field in ROW.findall(layout.__doc__)]


def with_checksum(frame: bytes | bytearray, session_hash: bytes = HASH) -> bytes:
    """The frame with the checksum that its other bytes ask for, computed as `layout` describes it."""
    crc = core.crc32c(frame[CRC_END:], core.crc32c(frame[:CRC_OFFSET], core.crc32c(session_hash)))
    return bytes(frame[:CRC_OFFSET]) + crc.to_bytes(4, "little") + bytes(frame[CRC_END:])


def refusal(frame: bytes, offset: int = 0) -> str:
    with pytest.raises(Corrupt) as caught:
        core.read_frame(HASH, frame, offset)
    assert caught.value.reason == "CORRUPT_FRAME"
    return caught.value.message


@pytest.fixture(scope="module")
def log() -> Log:
    return build_log(11, 40, text_bytes=30)


def test_the_table_of_offsets_has_no_gap_and_ends_at_the_body() -> None:
    rows = table()
    assert len(rows) == 17
    for (offset, size, *_), (following, *_) in itertools.pairwise(rows):
        assert offset + int(size) == following
    assert rows[-1][0] == HEADER_BYTES
    assert rows[-1][1] == f"L-{HEADER_BYTES - PREFIX_BYTES}"


def test_the_constants_are_those_of_the_table() -> None:
    width = {"fixed64": 8, "fixed32": 4, "enum": 1, "bytes": 16, "TokenCount": 16}
    found = {}
    for offset, size, what, field in table()[2:-1]:
        kind = re.findall(r"fixed64|fixed32|enum|bytes|TokenCount|likewise", field)
        bytes_of_value = width[kind[0]] if kind and kind[0] in width else 1
        name = re.sub(r"0x\S+|\b16\b|\(.*\)", "", what).strip() or field.split(", ")[1]
        found[name] = offset + int(size) - bytes_of_value
    counts = [found.pop(name) for name in ("o200k_base", "cl100k_base", "one encoding to come")]
    assert found == {
        "seq": layout.SEQ_OFFSET,
        "epoch": layout.EPOCH_OFFSET,
        "append time, ms since 1970": layout.TIME_OFFSET,
        "kind": layout.KIND_OFFSET,
        "role": layout.ROLE_OFFSET,
        "status": layout.STATUS_OFFSET,
        "flags": layout.FLAGS_OFFSET,
        "prev_live_seq": layout.PREV_LIVE_OFFSET,
        "body digest": layout.DIGEST_OFFSET,
        "chain": layout.CHAIN_OFFSET,
        "crc32c": layout.CRC_OFFSET,
    }
    assert tuple(count + 1 for count in counts) == CUMULATIVE_OFFSETS
    assert tuple(count + 10 for count in counts) == TOKENS_OFFSETS
    assert tuple(count + 15 for count in counts) == SOURCE_OFFSETS


def test_a_frame_has_the_tags_of_the_table_at_their_offsets(log: Log) -> None:
    for frame in log.frames:
        for offset, _, what, _ in table():
            if what == "0x0A":
                assert frame[offset] == 0x0A
                continue
            tags = bytes(int(tag, 16) for tag in re.findall(r"^(?:0x\w\w ?)*", what)[0].split())
            assert frame[offset : offset + len(tags)] == tags
        for index, slot in enumerate((49, 67, 85)):
            assert frame[slot : slot + 3] == bytes(((0x4A, 0x52, 0x5A)[index], 16, 0x09))
            assert (frame[slot + 11], frame[slot + 16]) == (0x15, 0x18)


def test_the_kernel_has_the_constants_of_layout() -> None:
    text = (EXT / "frame.pxd").read_text()
    constants = {name: int(value, 0) for name, value in re.findall(r"^ +([A-Z_0-9]+) = (\w+)$", text, re.M)}
    slots = {name: constants.pop(name) for name in ("CUMULATIVE_OFFSET", "TOKENS_OFFSET", "SOURCE_OFFSET")}
    stride = constants.pop("SLOT_BYTES")
    assert len(constants) > 40
    assert constants == {name: getattr(layout, name) for name in constants}
    for name, first in slots.items():
        assert tuple(first + stride * slot for slot in range(3)) == getattr(layout, f"{name}S")


@given(logs(min_turns=1))
@settings(max_examples=EXAMPLES // 2, deadline=None)
def test_concatenated_frames_are_an_active_context_field_for_field(log: Log) -> None:
    parsed = context_pb2.ActiveContext.FromString(log.stream)
    assert len(parsed.turns) == len(log.frames)
    for turn, header, body, frame in zip(parsed.turns, log.headers, log.bodies, log.frames, strict=True):
        _equal(turn, header)
        assert turn.crc32c == struct.unpack_from("<I", frame, CRC_OFFSET)[0]
        alone = turn_pb2.Turn.FromString(frame[PREFIX_BYTES:])
        assert alone == turn
        for field in list(turn.DESCRIPTOR.fields)[:14]:
            assert field.number <= 18
            turn.ClearField(field.name)
        assert turn == body


def _equal(turn: turn_pb2.Turn, header: Header) -> None:
    assert (turn.seq, turn.epoch, turn.append_time_unix_ms) == (header.seq, header.epoch, header.time_ms)
    assert (turn.kind, turn.role, turn.status, turn.flags) == (header.kind, header.role, header.status, header.flags)
    assert turn.prev_live_seq == header.prev_live_seq
    counts = (turn.o200k, turn.cl100k, turn.spare_encoding)
    assert tuple(count.cumulative for count in counts) == header.cumulative
    assert tuple(count.tokens for count in counts) == header.tokens
    assert tuple(count.source for count in counts) == header.sources
    assert (turn.body_digest, turn.chain) == (header.digest, header.chain)


def test_the_checksum_is_what_layout_says(log: Log) -> None:
    for frame in log.frames:
        assert with_checksum(frame) == frame


def test_every_single_bit_flip_is_detected(log: Log) -> None:
    frame, following = min(log.frames, key=len), log.frames[-1]
    assert len(frame) < 200
    for bit in range(8 * len(frame)):
        spoilt = bytearray(frame)
        spoilt[bit // 8] ^= 1 << bit % 8
        refusal(bytes(spoilt))
        refusal(bytes(spoilt) + following)
        refusal(b"front" + bytes(spoilt) + following * 3, 5)


def test_every_truncation_is_detected(log: Log) -> None:
    for frame in (min(log.frames, key=len), max(log.frames, key=len)):
        for size in range(len(frame)):
            assert refusal(frame[:size]).endswith(("it is cut short.", "its length is out of bounds."))
        with pytest.raises(Corrupt):
            core.scan_frames(HASH, frame + frame[:-1])


def test_a_frame_of_another_session_is_refused(log: Log) -> None:
    for frame in log.frames:
        with pytest.raises(Corrupt, match="its checksum does not match"):
            core.read_frame(OTHER_HASH, frame)
    with pytest.raises(Corrupt, match="at byte 0 is damaged: its checksum"):
        core.scan_frames(OTHER_HASH, log.stream)


def test_a_scan_finds_every_frame_where_it_lies(log: Log) -> None:
    offset = 0
    for header, frame in zip(core.scan_frames(HASH, log.stream), log.frames, strict=True):
        assert (header.offset, header.end) == (offset, offset + len(frame))
        assert core.read_frame(HASH, log.stream, offset) == header
        offset = header.end
    assert core.scan_frames(HASH, b"") == []


def test_a_length_may_be_believed_only_within_the_buffer(log: Log) -> None:
    frame = log.frames[0]
    for length in (0, 140, len(frame) - PREFIX_BYTES + 1, FRAME_BYTES_MAX, FRAME_BYTES_MAX + 1, 2**31 - 1):
        padded = bytes((length >> 7 * index & 0x7F) | (0x80 if index < 4 else 0) for index in range(5))
        assert "its length is out of bounds" in refusal(with_checksum(frame[:1] + padded + frame[6:]))
    for malformed in (b"\x8d\x81\x80\x80\x08", b"\x8d\x01\x80\x80\x00", b"\x8d\x81\x80\x80\x80"):
        assert "its length is malformed" in refusal(frame[:1] + malformed + frame[6:])


@pytest.mark.parametrize(
    ("at", "allowed"),
    [(KIND_OFFSET, range(1, 6)), (ROLE_OFFSET, range(6)), (STATUS_OFFSET, range(4))]
    + [(offset, range(3)) for offset in SOURCE_OFFSETS],
)
def test_enums_are_checked_even_under_a_right_checksum(log: Log, at: int, allowed: range) -> None:
    for value in range(256):
        frame = with_checksum(log.frames[0][:at] + bytes((value,)) + log.frames[0][at + 1 :])
        if value in allowed:
            core.read_frame(HASH, frame)
        else:
            assert "an enum is out of range" in refusal(frame)


def test_tags_are_checked_even_under_a_right_checksum(log: Log) -> None:
    tags = [6, 15, 20, 29, 31, 33, 35, 40, 103, 104, 105, 122, 123, 124, 141, 142]
    tags += [slot + place for slot in (49, 67, 85) for place in (0, 1, 2, 11, 16)]
    for at in tags:
        frame = bytearray(log.frames[0])
        frame[at] ^= 0x80
        assert "a header tag is wrong" in refusal(with_checksum(frame))
    free = set(range(PREFIX_BYTES, CRC_OFFSET)) - set(tags) - {30, 32, 34, *SOURCE_OFFSETS}
    for at in free:
        frame = bytearray(log.frames[0])
        frame[at] ^= 0x80
        core.read_frame(HASH, with_checksum(frame))


@given(st.binary(max_size=300))
@settings(max_examples=EXAMPLES, deadline=None)
def test_what_was_sealed_is_read_again(body: bytes) -> None:
    values = (2**64 - 1, 2**32 - 1, 2**63, 5, 5, 3, 2**32 - 1, 2**64 - 2)
    counts = ((2**64 - 1, 0, 1), (2**32 - 1, 0, 2), (0, 1, 2))
    frame = core.seal_frame(HASH, *values, *counts, b"d" * 16, b"c" * 16, body)
    assert core.read_frame(HASH, frame) == Header(0, len(frame), *values, *counts, b"d" * 16, b"c" * 16)
    assert frame[HEADER_BYTES:] == body


def test_a_body_above_the_limit_is_not_sealed() -> None:
    fits = FRAME_BYTES_MAX - (HEADER_BYTES - PREFIX_BYTES)
    fields = (1, 1, 1, 1, 2, 0, 0, 0, (0, 0, 0), (0, 0, 0), (0, 0, 0), bytes(16), bytes(16))
    frame = core.seal_frame(HASH, *fields, bytes(fits))
    assert core.read_frame(HASH, frame).end == len(frame) == FRAME_BYTES_MAX + PREFIX_BYTES
    with pytest.raises(ValueError, match="does not fit a frame"):
        core.seal_frame(HASH, *fields, bytes(fits + 1))


def test_derived_offset_parts_what_was_received_from_what_was_derived() -> None:
    kinds, log = set(), build_log(1, 400, text_bytes=30)
    for frame, header, body in zip(log.frames, log.headers, log.bodies, strict=True):
        offset = core.derived_offset(frame[HEADER_BYTES:])
        received = turn_pb2.Turn.FromString(frame[HEADER_BYTES : HEADER_BYTES + offset])
        assert not received.derived
        received.derived = body.derived
        assert received == body
        if body.derived:
            kinds.add(header.kind)
    assert kinds == {layout.KIND_REWIND, layout.KIND_STATE}
