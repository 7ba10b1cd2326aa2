"""The twins give the same bytes and the same refusals, for any input at all.

Both are imported by name, whatever SESSIOND_PURE says.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import random
from typing import Any

import google_crc32c
import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sessiond.core import _kernel, pure
from sessiond.core import state as states
from sessiond.core.layout import (
    HEADER_BYTES,
    KIND_MESSAGE,
    KIND_REWIND,
    KIND_STATE,
    MODE_HYBRID,
    ROLE_USER,
)
from sessiond.errors import Corrupt, SessiondError
from sessiond.v1 import context_pb2
from tests.core.loggen import EXAMPLES, HASH, OTHER_HASH, Log, Say, budgets, logs, random_log, small_logs

NAMES = [name for name in _kernel.__all__ if name != "COMPILED"]
thorough = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def outcome(twin: Any, name: str, args: tuple[Any, ...]) -> Any:
    """What a call gave: its value, also as text so that True is not 1, or its refusal in full."""
    try:
        value = getattr(twin, name)(*args)
    except SessiondError as error:
        return type(error), error.reason, error.message, error.metadata, str(error)
    except Exception as error:
        return type(error), str(error)
    return "value", value, repr(value)


def agree(name: str, *args: Any) -> Any:
    """The one outcome of both twins."""
    readable = outcome(pure, name, args)
    compiled = outcome(_kernel, name, args)
    assert compiled == readable
    return compiled


def agree_or_corrupt(name: str, *args: Any) -> Any:
    """The same, where the input is bytes read back: the only refusal is Corrupt."""
    result = agree(name, *args)
    assert result[0] in ("value", Corrupt), result
    return result


class Cursor:
    """LMDB's cursor over rows that a test made up."""

    def __init__(self, rows: dict[bytes, bytes]) -> None:
        self.rows = rows
        self.keys = sorted(rows)
        self.at = -1

    def key(self) -> bytes:
        return self.keys[self.at] if 0 <= self.at < len(self.keys) else b""

    def value(self) -> bytes:
        return self.rows[self.keys[self.at]] if 0 <= self.at < len(self.keys) else b""

    def _to(self, at: int) -> bool:
        self.at = at if 0 <= at < len(self.keys) else -1
        return self.at >= 0

    def set_range(self, key: bytes) -> bool:
        return self._to(next((at for at, known in enumerate(self.keys) if known >= key), -1))

    def last(self) -> bool:
        return self._to(len(self.keys) - 1)

    def prev(self) -> bool:
        return self._to(self.at - 1)


def standing_at(cursor: Cursor, head_seq: int) -> Cursor:
    """As newest_row leaves it."""
    with contextlib.suppress(Corrupt):
        pure.newest_row(cursor, HASH, head_seq)
    return cursor


def agree_with_cursor(name: str, rows: dict[bytes, bytes], head_seq: int, *args: Any) -> Any:
    """The same of both twins, each with a cursor of its own that stands on the newest row."""
    found = [outcome(twin, name, (standing_at(Cursor(rows), head_seq), *args)) for twin in (pure, _kernel)]
    assert found[0] == found[1]
    assert found[0][0] in ("value", Corrupt), found[0]
    return found[0]


def agree_on_all(stream: bytes, state: bytes) -> None:
    """Every function that takes bytes read back."""
    agree_or_corrupt("scan_frames", HASH, stream)
    agree_or_corrupt("read_frame", HASH, stream, 0)
    agree_or_corrupt("read_frame", HASH, stream, min(len(stream), 500))
    agree_or_corrupt("replay", HASH, state, stream)
    agree_or_corrupt("tool_events", stream[HEADER_BYTES:])
    agree_or_corrupt("derived_offset", stream[HEADER_BYTES:])
    agree_or_corrupt("row_live", stream, 3, 0)
    agree_or_corrupt("row_last", stream)
    agree_or_corrupt("row_checked", HASH, stream)
    agree_or_corrupt("newest_row", Cursor({HASH + bytes(7) + b"\1": stream}), HASH, 3)
    agree_or_corrupt("walk_rows", standing_at(Cursor({HASH + bytes(7) + b"\1": stream}), 3), HASH, 1, 3, 0, 1)
    agree_or_corrupt("join_turn_ids", HASH, [stream], 3, 10)
    agree("seek_turn_ids", stream, [bytes(8)])
    agree_or_corrupt("fit_window", HASH, [stream], 0, 3, 2, MODE_HYBRID, 0, 50, 90, 10, 0)


def resealed(frame: bytes, body: bytes | None = None, **changes: Any) -> bytes:
    """The frame with other contents and a checksum that is right."""
    header = pure.read_frame(HASH, frame)
    values = header._asdict() | changes
    del values["offset"], values["end"]
    return pure.seal_frame(HASH, **values, body=frame[HEADER_BYTES:] if body is None else body)


def split(data: st.DataObject, frames: list[bytes]) -> list[bytes]:
    """Any rows of these frames, an empty one now and then."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(frames)), max_size=6), label="cuts"))
    bounds = [0, *cuts, len(frames)]
    return [b"".join(frames[low:high]) for low, high in itertools.pairwise(bounds)]


# -------------------------------------------------------------------------------------------------------------- whole


def test_both_twins_have_the_same_functions() -> None:
    assert _kernel.COMPILED is True
    assert pure.COMPILED is False
    for name in NAMES:
        assert callable(getattr(pure, name))
        assert callable(getattr(_kernel, name))


@thorough
@given(logs())
def test_twins_agree_on_real_logs(log: Log) -> None:
    agree_on_all(log.stream, log.states[0])
    for frame, body in zip(log.frames, log.bodies, strict=True):
        agree_or_corrupt("tool_events", frame[HEADER_BYTES:])
        offset = agree_or_corrupt("derived_offset", frame[HEADER_BYTES:])[1]
        assert (offset < len(frame) - HEADER_BYTES) == bool(body.derived)
    assert agree_or_corrupt("replay", HASH, log.states[0], log.stream)[1] == log.states[-1]
    for slot in range(3):
        for seq in range(log.seq + 2):
            agree_or_corrupt("row_live", log.stream, seq, slot)


@thorough
@given(small_logs(), st.data())
def test_twins_agree_on_windows(log: Log, data: st.DataObject) -> None:
    places, slot = log.places, data.draw(st.integers(0, 2))
    tail, exact = data.draw(budgets(log, slot))
    args = (
        slot,
        data.draw(st.sampled_from((places[5], places[5], log.seq, log.seq + 1))),
        data.draw(st.sampled_from((places[9], places[9], 0, log.seq))),
        data.draw(st.sampled_from((1, 2, 3, 4, 4, 4))),
        data.draw(st.integers(1, 4)),
        tail,
        exact,
        data.draw(st.one_of(st.just(max(1, tail // 4)), st.integers(1, 40))),
        data.draw(st.integers(0, log.seq + 1)),
    )
    agree_or_corrupt("fit_window", HASH, split(data, log.frames), *args)


@thorough
@given(small_logs(max_turns=12), st.data())
def test_twins_agree_on_windows_over_forged_links(log: Log, data: st.DataObject) -> None:
    """Links to anywhere, flags and counts of any kind, each under a checksum that is right."""
    frames = list(log.frames)
    for index in data.draw(st.lists(st.integers(0, max(0, log.seq - 1)), max_size=4)) if frames else []:
        changes: dict[str, Any] = {"flags": data.draw(st.integers(0, 15))}
        if data.draw(st.booleans()):
            changes["prev_live_seq"] = data.draw(st.integers(0, log.seq + 1))
        if data.draw(st.booleans()):
            changes["cumulative"] = data.draw(st.sampled_from(((0, 0, 0), (9, 9, 9), (2**64 - 1,) * 3)))
        if data.draw(st.booleans()):
            changes["kind"] = data.draw(st.integers(1, 5))
        frames[index] = resealed(frames[index], **changes)
    mode, tail = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 200))
    last = data.draw(st.sampled_from((log.places[5], log.seq)))
    agree_or_corrupt("fit_window", HASH, split(data, frames), 0, last, log.places[9], mode, 2, tail, tail, 20, 0)
    agree_or_corrupt("row_live", b"".join(frames), last, 0)


@thorough
@given(small_logs(), st.data())
def test_twins_agree_on_walks_over_rows(log: Log, data: st.DataObject) -> None:
    """Rows of any sizes, of which some are missing, among rows of other sessions."""
    rows: dict[bytes, bytes] = {OTHER_HASH + (1).to_bytes(8, "big"): b"of another session"}
    first = 1
    for row in split(data, log.frames):
        if data.draw(st.integers(0, 9)) > 0:
            rows[HASH + first.to_bytes(8, "big")] = row
        first += len(pure.scan_frames(HASH, row))
    head = data.draw(st.sampled_from((log.seq, log.seq, max(0, log.seq - 1), log.seq + 1)))
    agree_with_cursor("newest_row", rows, head, HASH, head)
    last = data.draw(st.sampled_from((log.places[5], log.places[5], log.seq)))
    floor, slot = data.draw(st.integers(0, log.seq + 1)), data.draw(st.integers(0, 2))
    walked = agree_with_cursor("walk_rows", rows, log.seq, HASH, floor, last, slot, data.draw(st.integers(0, 60)))
    if walked[0] == "value" and len(rows) > 1 and walked[1][0]:
        # What it gathered is what is there, oldest first, and the window that is cut from it is the same.
        assert all(row in rows.values() for row in walked[1][0])


@thorough
@given(small_logs(), st.data())
def test_a_fold_in_place_is_a_replay(log: Log, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, log.seq))
    for twin in (pure, _kernel):
        places = states.decode_places(log.states[cut])
        assert twin.fold(HASH, places, b"".join(log.frames[cut:])) is None
        assert states.encode_places(places) == log.states[-1]
    assert agree("fold", HASH, (), b"")[0] is TypeError


ENTRIES = st.lists(st.tuples(st.binary(min_size=8, max_size=8), st.binary(min_size=8, max_size=8)), max_size=9)


@thorough
@given(ENTRIES, st.data())
def test_twins_agree_on_turn_ids(entries: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    """Chunks as they are stored; some with a hole, a wrong end, or a flipped bit."""
    first = data.draw(st.sampled_from((1, 1, 5)))
    seqs = [first + index for index in range(len(entries))]
    if seqs and data.draw(st.integers(0, 5)) == 0:
        seqs[data.draw(st.integers(0, len(seqs) - 1))] += 1
    raw = [id_hash + digest + seq.to_bytes(8, "big") for (id_hash, digest), seq in zip(entries, seqs, strict=True)]
    size = data.draw(st.integers(1, 4))
    seed = google_crc32c.value(HASH + b"ids")
    chunks = []
    for at in range(0, len(raw), size):
        payload = b"".join(raw[at : at + size])
        chunk = bytearray(google_crc32c.extend(seed, payload).to_bytes(4, "little") + payload)
        if data.draw(st.integers(0, 20)) == 0:
            chunk[data.draw(st.integers(0, len(chunk) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        chunks.append(bytes(chunk))
    head = data.draw(st.sampled_from((first + len(entries) - 1, first + len(entries) - 1, first + len(entries))))
    asked = [*(id_hash for id_hash, _ in entries), b"not here"]
    joined = agree_or_corrupt("join_turn_ids", HASH, chunks, head, data.draw(st.sampled_from((0, 3, 100))))
    if joined[0] == "value":
        assert joined[1] == b"".join(raw)
        found = agree("seek_turn_ids", joined[1], asked)
        newest = {id_hash: (seq, digest) for (id_hash, digest), seq in zip(entries, seqs, strict=True)}
        assert found[1][: len(entries)] == [newest[id_hash] for id_hash, _ in entries]


FIELDS = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(0, 2**64 - 1),
        st.sampled_from((2**64, -1, 1.5)),
        st.text(max_size=300),
        st.binary(max_size=300),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(st.tuples(st.integers(1, 70), inner), max_size=4).map(
            lambda pairs: tuple(part for pair in pairs for part in pair)
        ),
    ),
    max_leaves=12,
)


@thorough
@given(st.lists(st.tuples(st.integers(-20, 70).filter(bool), FIELDS), max_size=8), st.booleans())
def test_twins_agree_on_messages(pairs: list[tuple[int, Any]], torn: bool) -> None:
    fields = tuple(part for pair in pairs for part in pair)
    agree("encode_message", fields[:-1] if torn else fields)


def test_a_message_is_what_protobuf_makes_of_it() -> None:
    made = context_pb2.Receipt(rung=1, ownership=2, cloud_seq=2**63, stale=True, notice="ü" * 100, node="n")
    made.head.epoch, made.head.seq, made.head.chain = 3, 4, b"c" * 16
    made.verbatim.add(first_seq=1, last_seq=300)
    made.verbatim.add(first_seq=302, last_seq=2**40)
    made.stable_prefix.digest = b"d" * 200
    ranges = [(1, 1, 2, 300), (1, 302, 2, 2**40)]
    head, prefix = (1, 3, 2, 4, 3, b"c" * 16), (1, b"d" * 200, 2, 0)
    fields = (1, 1, 2, 2, 3, ranges, 8, head, 9, 2**63, 11, True, 12, prefix, 15, "ü" * 100, 17, "n")
    assert agree("encode_message", fields)[1] == made.SerializeToString()
    version = context_pb2.CheckpointHeader(version=2**63 + 1, replay_cursor=1)
    assert agree("encode_message", (-1, 2**63 + 1, 2, 1))[1] == version.SerializeToString()


def test_a_link_to_itself_or_forward_is_corrupt() -> None:
    log = Log.of([Say(ROLE_USER, (("text", "hi"),), (1, 1, 0))] * 3)
    for link in (3, 4, 2**64 - 1):
        rows = [*log.frames[:2], resealed(log.frames[2], prev_live_seq=link)]
        result = agree("fit_window", HASH, rows, 0, 3, 3, 1, 0, 9, 9, 0, 0)
        assert "a link points forward" in result[2]
        assert "a link points forward" in agree("row_live", b"".join(rows), 3, 0)[2]


@thorough
@given(st.data())
def test_twins_agree_on_sealing(data: st.DataObject) -> None:
    big = st.one_of(st.integers(0, 5), st.sampled_from((2**32 - 1, 2**32, 2**64 - 1, 2**64, -1, True)))
    digest = st.sampled_from((bytes(16), b"x" * 16, bytes(15), bytearray(16), memoryview(bytes(16))))
    counts = st.one_of(st.tuples(big, big, big), st.lists(big, max_size=4))
    args = [data.draw(big) for _ in range(8)]
    args += [data.draw(counts) for _ in range(3)] + [data.draw(digest), data.draw(digest), data.draw(st.binary())]
    agree("seal_frame", data.draw(digest), *args)


@given(st.binary(max_size=8192), st.integers(0, 2**32 - 1), st.integers(0, 40))
@settings(thorough, max_examples=2 * EXAMPLES)
def test_checksums_are_crc32c(payload: bytes, seed: int, skip: int) -> None:
    wanted = google_crc32c.extend(seed, payload[skip:])
    assert agree("crc32c", memoryview(payload)[skip:], seed)[1] == wanted


def test_checksums_of_every_length_are_crc32c() -> None:
    payload = random.Random(1).randbytes(9000)
    for size in [*range(700), *range(3000, 3200), *range(6100, 6200), 9000]:
        assert _kernel.crc32c(payload[:size]) == google_crc32c.value(payload[:size])
    assert _kernel.crc32c(b"123456789") == 0xE3069283


# ------------------------------------------------------------------------------------------------------------ damaged


@thorough
@given(logs(min_turns=1, max_turns=6), st.data())
def test_twins_agree_on_truncated_input(log: Log, data: st.DataObject) -> None:
    stream = log.stream
    start = data.draw(st.integers(0, min(300, len(stream))))
    stop = data.draw(st.integers(start, len(stream)))
    agree_on_all(stream[start:stop], log.states[0])
    agree_on_all(stream[:stop], log.states[0])


@thorough
@given(logs(min_turns=1, max_turns=6), st.data())
def test_twins_agree_on_flipped_bits(log: Log, data: st.DataObject) -> None:
    stream = bytearray(log.stream)
    for _ in range(data.draw(st.integers(1, 3))):
        if stream:
            bit = data.draw(st.one_of(st.integers(0, 8 * HEADER_BYTES - 1), st.integers(0, 8 * len(stream) - 1)))
            stream[bit // 8 % len(stream)] ^= 1 << bit % 8
    agree_on_all(bytes(stream), log.states[0])


@thorough
@given(st.binary(max_size=1200), st.binary(max_size=200))
@example(b"\x0a" + b"\xff" * 300, b"")
@example(b"\x0a\x8d\x81\x80\x80\x00" + bytes(141), states.genesis(HASH, {}))
@example(b"\x0a\xff\xff\xff\xff\x07" + bytes(141), states.genesis(HASH, {}))
def test_twins_agree_on_garbage(stream: bytes, state: bytes) -> None:
    agree_on_all(stream, state)
    agree_on_all(stream, states.genesis(HASH, {}))


# -------------------------------------------------------------------------- damaged, and sealed as if it were not


def padded_varint(value: int, extra: int) -> bytes:
    """A varint with up to so many bytes more than it needs."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(extra):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


_NUMBER = st.one_of(
    st.sampled_from((1, 2, 3, 4, 5, 6)), st.integers(20, 27), st.sampled_from((0, 7, 0x1FFFFFFF, 0x20000000, 2**61 - 1))
)
_VALUE = st.one_of(st.integers(0, 40), st.sampled_from((2**32, 2**63, 2**64 - 1, 2**64, 2**69)))
_EXTRA = st.sampled_from((0, 0, 0, 0, 1, 4, 9))


def _field(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """One protobuf field, mostly well made; `inner` is what a length-delimited one holds."""

    def made(number: int, wire: int, value: int, payload: bytes, extra: int, lie: int) -> bytes:
        tag = padded_varint(number << 3 | wire, extra)
        if wire == 0:
            return tag + padded_varint(value, extra)
        if wire == 2:
            return tag + padded_varint(max(0, len(payload) + lie), extra) + payload
        return tag + payload[: {1: 8, 5: 4}.get(wire, 0)]

    wire = st.sampled_from((0, 2, 2, 2, 2, 1, 5, 3))
    lie = st.sampled_from((0,) * 12 + (1, -1, 2**31, 2**63))
    return st.builds(made, _NUMBER, wire, _VALUE, inner, _EXTRA, lie)


_LEAF = st.one_of(st.sampled_from((b"", b"a", b"p", b"\xff\xfe", "é".encode(), b"\xed\xa0\x80")), st.binary(max_size=9))
_FIELDS = st.recursive(_LEAF, lambda inner: st.lists(_field(inner), max_size=4).map(b"".join), max_leaves=12)
_PACKABLE = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 5),
        st.sampled_from((2**64 - 1, 2**63, 1.5, "a", "p", b"a", b"x" * 16, msgpack.ExtType(5, b"x"))),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.sampled_from("apq"), inner, max_size=3)),
    max_leaves=10,
)


def field(number: int, payload: bytes) -> bytes:
    return padded_varint(number << 3 | 2, 0) + padded_varint(len(payload), 0) + payload


@st.composite
def near_states(draw: st.DrawFn, base: list[Any]) -> list[Any]:
    """A state, with a place or an item of a place that may be of the wrong type."""
    places = list(base)
    for _ in range(draw(st.integers(0, 2))):
        index = draw(st.integers(0, len(places) - 1))
        inner = places[index]
        if isinstance(inner, list) and inner and draw(st.booleans()):
            places[index] = list(inner)
            places[index][draw(st.integers(0, len(inner) - 1))] = draw(_PACKABLE)
        else:
            places[index] = draw(_PACKABLE)
    if draw(st.integers(0, 5)) == 0:
        places = places[: draw(st.integers(0, len(places)))]
    elif draw(st.integers(0, 5)) == 0:
        places.append(draw(_PACKABLE))
    return places


@thorough
@given(logs(min_turns=1, max_turns=8), st.data())
def test_twins_agree_on_sealed_garbage(log: Log, data: st.DataObject) -> None:
    """A body of any fields, under a header of any kind and flags, with a checksum that is right."""
    if not log.frames:
        return
    index = data.draw(st.integers(0, log.seq - 1))
    changes: dict[str, Any] = {}
    if data.draw(st.booleans()):
        changes["kind"] = data.draw(st.integers(1, 5))
    if data.draw(st.booleans()):
        changes["role"] = data.draw(st.integers(0, 5))
    changes["flags"] = data.draw(st.sampled_from((8, 16, 24, 26, 128, 255, 0, 2**32 - 1)))
    body = data.draw(st.lists(_field(_FIELDS), max_size=4).map(b"".join))
    frame = resealed(log.frames[index], body, **changes)
    result = agree_or_corrupt("replay", HASH, log.states[index], frame)
    if result[0] == "value":
        agree_or_corrupt("replay", HASH, result[1], b"".join(log.frames[index + 1 :]))
    agree_or_corrupt("tool_events", body)
    agree_or_corrupt("derived_offset", body)


@thorough
@given(logs(min_turns=1, max_turns=8), st.data())
def test_twins_agree_on_sealed_bit_flips(log: Log, data: st.DataObject) -> None:
    """Real bodies with a few bits or bytes wrong, and a checksum that is right."""
    kinds = [index for index, header in enumerate(log.headers) if header.kind != KIND_MESSAGE or header.flags & 24]
    if not log.frames:
        return
    index = data.draw(st.sampled_from(kinds or list(range(log.seq))))
    body = bytearray(log.frames[index][HEADER_BYTES:])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body)))
        change = data.draw(st.integers(0, 3))
        if change == 0:
            body[at:at] = data.draw(st.binary(min_size=1, max_size=3))
        elif change == 1:
            del body[at : at + data.draw(st.integers(1, 4))]
        elif at < len(body):
            body[at] ^= 1 << data.draw(st.integers(0, 7))
    frame = resealed(log.frames[index], bytes(body))
    agree_or_corrupt("replay", HASH, log.states[index], frame)
    agree_or_corrupt("tool_events", body)
    agree_or_corrupt("derived_offset", body)


@thorough
@given(logs(max_turns=6), st.data())
def test_twins_agree_on_what_a_rewind_restores(log: Log, data: st.DataObject) -> None:
    log.do(Say(ROLE_USER, (("text", "again"),), (1, 1, 0)))
    places = data.draw(near_states(log.places))
    derived = [places[place] if place < len(places) else None for place in states.RESTORED_PLACES]
    derived = derived[: data.draw(st.sampled_from((13, 13, 13, 12, 0)))] + data.draw(st.sampled_from(([], [1])))
    to_seq = data.draw(st.integers(0, log.seq))
    body = field(25, b"\x08" + padded_varint(to_seq, 0)) + field(27, msgpack.packb(derived))
    frame = resealed(log.frames[-1], body, kind=KIND_REWIND, role=0, flags=4, tokens=(0, 0, 0))
    header = pure.read_frame(HASH, log.frames[-1])
    before = tuple(states.decode_places(log.states[-2])[4])
    frame = resealed(frame, cumulative=before)
    result = agree_or_corrupt("replay", HASH, log.states[-2], frame)
    if result[0] == "value":
        following = resealed(log.frames[-1], seq=header.seq + 1, prev_live_seq=states.decode(result[1]).last_live_seq)
        agree_or_corrupt("replay", HASH, result[1], following)


@thorough
@given(_PACKABLE, st.sampled_from(("p", "", "é")))
def test_twins_agree_on_what_a_pin_costs(counts: Any, key: str) -> None:
    log = Log()
    log.do(Say(ROLE_USER, (("text", "hi"),), (1, 1, 0)))
    body = field(23, field(5, field(1, key.encode()) + field(2, b"a fact")))
    for derived in (counts, {key: counts}, {key: [counts, 1, 2]}, {"other": [1, 2, 3]}):
        sealed = body + field(27, msgpack.packb(derived))
        frame = resealed(
            log.frames[0], sealed, kind=KIND_STATE, role=0, flags=0, tokens=(0, 0, 0), cumulative=(0, 0, 0)
        )
        agree_or_corrupt("replay", HASH, log.states[0], frame)


@thorough
@given(logs(max_turns=6), st.data())
def test_twins_agree_on_malformed_states(log: Log, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, log.seq))
    state = msgpack.packb(data.draw(near_states(states.decode_places(log.states[index]))))
    if data.draw(st.booleans()):
        state = bytearray(state)
        state[data.draw(st.integers(0, len(state) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    agree_or_corrupt("replay", HASH, state, b"".join(log.frames[index:]))


def test_states_that_nest_too_deep_are_corrupt() -> None:
    deep = b"\x91" * 1000 + b"\x01"
    for state in (b"\xdc\x00\x16" + deep + b"\xc0" * 21, b"\x91" * 2000, b"\xdd\xff\xff\xff\xff", b"\xc1"):
        assert agree("replay", HASH, state, b"")[0] is Corrupt
    derived = field(25, b"") + field(27, b"\x91" * 3000 + b"\x01")
    log = Log.of([Say(ROLE_USER, (("text", "hi"),), (0, 0, 0))])
    frame = resealed(log.frames[0], derived, kind=KIND_REWIND, role=0, flags=0)
    assert agree("replay", HASH, log.states[0], frame)[1] == "CORRUPT_FRAME"


# ---------------------------------------------------------------------------------------------- the ends of the numbers


def test_a_token_column_above_64_bits_does_not_add_up() -> None:
    last = 2**64 - 1
    log = Log(cumulative=(last - 3, 0, 0))
    log.do(Say(ROLE_USER, (("text", "hi"),), (3, 0, 0)))
    assert log.headers[0].cumulative[0] == last
    for total in (0, 1, last):
        frame = resealed(log.frames[0], seq=2, prev_live_seq=1, tokens=(2, 0, 0), cumulative=(total, 0, 0))
        result = agree("replay", HASH, log.states[1], frame)
        assert "does not add up" in result[2]


@pytest.mark.parametrize("place", [6, 7, 8])
def test_counters_above_64_bits_do_not_add_up(place: int) -> None:
    log = Log.of([Say(ROLE_USER, (("text", "hi"),), (3, 3, 3))])
    for value in (2**64 - 1, 2**64 - 2, 2**64 - 4):
        places = states.decode_places(log.states[0])
        places[place] = [0, value, 0] if place == 7 else value
        result = agree("replay", HASH, states.encode_places(places), log.frames[0])
        expected_overflow = value + (3 if place == 7 else 1) >= 2**64
        assert (result[0] is Corrupt) == expected_overflow


def test_no_turn_follows_the_last_seq_of_all() -> None:
    log = Log.of([Say(ROLE_USER, (("text", "hi"),), (0, 0, 0))])
    places = states.decode_places(log.states[0])
    places[1] = 2**64 - 1
    for seq in (0, 1, 2**64 - 1):
        result = agree("replay", HASH, states.encode_places(places), resealed(log.frames[0], seq=seq))
        assert "where 18446744073709551616 is due" in result[2]


# ----------------------------------------------------------------------------------------------------------- arguments


def _buffers(content: bytes) -> list[Any]:
    mapped = memoryview(bytearray(b"front" + content + b"back"))[5 : 5 + len(content)].toreadonly()
    return [content, bytearray(content), memoryview(content), mapped]


def test_twins_take_any_contiguous_buffer() -> None:
    frames, _, folded = random_log(7, 12)
    stream = b"".join(frames)
    expected = [agree(name, *args) for name, args in _calls(stream, folded[0])]
    for buffer in _buffers(stream):
        for kind_of_state in _buffers(folded[0]):
            found = [agree(name, *args) for name, args in _calls(buffer, kind_of_state)]
            assert found == expected
    words = array.array("I", bytes(400))
    assert agree("crc32c", words)[1] == google_crc32c.value(bytes(400))
    assert agree("crc32c", memoryview(words).cast("B").cast("B", (20, 20)))[1] == google_crc32c.value(bytes(400))
    assert agree("crc32c", array.array("d"))[1] == 0


def _calls(stream: Any, state: Any) -> list[tuple[str, tuple[Any, ...]]]:
    return [
        ("crc32c", (stream,)),
        ("scan_frames", (HASH, stream)),
        ("read_frame", (memoryview(HASH), stream)),
        ("replay", (bytearray(HASH), state, stream)),
        ("row_live", (stream, 5, 1)),
        ("fit_window", (HASH, [stream], 0, 5, 0, MODE_HYBRID, 0, 10**6, 10**6, 10, 0)),
        ("fit_window", (HASH, (stream,), 0, 5, 0, MODE_HYBRID, 0, 10**6, 10**6, 10, 0)),
    ]


@pytest.mark.parametrize(
    "junk",
    [None, "text", 5, [1, 2], memoryview(bytes(40))[::2]],
    ids=["None", "text", "number", "list", "strided"],
)
def test_twins_refuse_what_is_no_buffer(junk: Any) -> None:
    frames, _, folded = random_log(7, 3)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        *_calls(junk, folded[0]),
        ("replay", (HASH, junk, frames[0])),
        ("replay", (junk, folded[0], frames[0])),
        ("scan_frames", (junk, frames[0])),
        ("fit_window", (junk, [frames[0]], 0, 1, 0, MODE_HYBRID, 0, 1, 1, 1, 0)),
        ("fit_window", (HASH, [frames[0], junk], 0, 1, 0, MODE_HYBRID, 0, 1, 1, 1, 0)),
        ("tool_events", (junk,)),
        ("derived_offset", (junk,)),
    ]
    for name, args in calls:
        assert agree(name, *args)[0] in (TypeError, BufferError)
    assert agree("fit_window", HASH, 5, 0, 1, 0, MODE_HYBRID, 0, 1, 1, 1, 0)[0] is TypeError


@pytest.mark.parametrize("size", [0, 15, 17])
def test_twins_refuse_a_hash_of_another_length(size: int) -> None:
    frames, _, folded = random_log(7, 1)
    for name, args in (
        ("read_frame", (bytes(size), frames[0])),
        ("scan_frames", (bytes(size), b"")),
        ("replay", (bytes(size), folded[0], b"")),
        ("fit_window", (bytes(size), [], 0, 0, 0, MODE_HYBRID, 0, 1, 1, 1, 0)),
    ):
        assert agree(name, *args) == (ValueError, "a session's hash is 16 bytes")


@pytest.mark.parametrize("value", [-1, 2**64, 1.0, "1", None, True, pytest.param(10**5000, id="too long to print")])
def test_twins_agree_on_numbers_out_of_range(value: Any) -> None:
    frames, _, _ = random_log(7, 3)
    fine: list[Any] = [HASH, [b"".join(frames)], 0, 3, 2, MODE_HYBRID, 1, 9, 9, 9, 0]
    for position in range(2, 11):
        result = agree("fit_window", *fine[:position], value, *fine[position + 1 :])
        assert value is True or result[0] in (ValueError, TypeError)
    for position in range(1, 9):
        sealing: list[Any] = [HASH, 1, 1, 1, 1, 1, 1, 1, 0, (0, 0, 0), (0, 0, 0), (0, 0, 0), bytes(16), bytes(16), b""]
        result = agree("seal_frame", *sealing[:position], value, *sealing[position + 1 :])
        assert value is True or result[0] in (OverflowError, TypeError)
    for name, args in (
        ("read_frame", (HASH, frames[0], value)),
        ("row_live", (frames[0], value, 0)),
        ("row_live", (frames[0], 1, value)),
        ("crc32c", (b"", value)),
    ):
        assert value is True or agree(name, *args)[0] in (ValueError, TypeError)


@pytest.mark.parametrize(
    ("position", "value", "refused"),
    [(5, 0, "mode"), (5, 5, "mode"), (2, 3, "slot"), (9, 0, "stride_tokens"), (8, 8, "tail_tokens_exact")],
)
def test_windows_refuse_what_has_no_meaning(position: int, value: int, refused: str) -> None:
    fine: list[Any] = [HASH, [], 0, 0, 0, MODE_HYBRID, 0, 9, 9, 9, 0]
    assert agree("fit_window", *fine)[0] == "value"
    fine[position] = value
    result = agree("fit_window", *fine)
    assert result[0] is ValueError
    assert result[1].startswith(f"{refused} is {value}, not within ")


def test_last_n_needs_an_n() -> None:
    assert agree("fit_window", HASH, [], 0, 0, 0, 2, 0, 9, 9, 0, 0)[0] is ValueError
    assert agree("fit_window", HASH, [], 0, 0, 0, 2, 1, 9, 9, 0, 0)[0] == "value"


def test_no_buffer_outlives_a_call() -> None:
    frames, _, folded = random_log(3, 4)
    stream = bytearray(b"".join(frames))
    spoilt = bytearray(stream)
    spoilt[200] ^= 1
    for twin in (pure, _kernel):
        for buffer in (stream, spoilt):
            for call in (
                lambda b, t=twin: t.scan_frames(HASH, b),
                lambda b, t=twin: t.replay(HASH, folded[0], b),
                lambda b, t=twin: t.read_frame(OTHER_HASH, b),
                lambda b, t=twin: t.fit_window(HASH, [b, b], 0, 4, 1, 1, 0, 10**6, 10**6, 0, 0),
                lambda b, t=twin: t.row_live(b, 9, 0),
                lambda b, t=twin: t.tool_events(b),
                lambda b, t=twin: t.derived_offset(b),
                lambda b, t=twin: t.crc32c(b),
            ):
                try:
                    call(buffer)
                except Corrupt:
                    buffer.append(0)  # BufferError while a view is held
                    del buffer[-1]
                else:
                    buffer.append(0)
                    del buffer[-1]


def test_sealed_frames_are_the_same_bytes_for_every_body_length() -> None:
    fields = (1, 2, 3, 1, 2, 1, 3, 0, [1, 2, 3], (4, 5, 6), (0, 1, 2), b"d" * 16, b"c" * 16)
    for size in [*range(300), 4000, 16383, 16384, 70000]:
        frame = agree("seal_frame", HASH, *fields, bytes(size))[1]
        assert len(frame) == HEADER_BYTES + size
        assert agree("read_frame", HASH, frame)[1].end == HEADER_BYTES + size
