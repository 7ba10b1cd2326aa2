"""The fold of a log: its fields, its first value, its bytes. Never touches a frame; `layout` owns the places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgpack
import msgspec

from sessiond.core.layout import RULE_VERSION
from sessiond.errors import Corrupt


class State(NamedTuple):
    """A decoded state, place by place as `layout` lists them."""

    rule: int
    cursor: int
    epoch: int
    chain: bytes
    cumulative: list[int]
    last_live_seq: int
    live_messages: int
    live_tokens: list[int]
    exchanges: int
    exchange_seq: int
    instructions: list[int] | None
    summary: list[list[int]]
    pins: dict[str, list[Any]]
    flags: dict[str, bool]
    mode: str
    metadata: dict[str, str]
    open_calls: list[list[Any]]
    state_at: list[int]
    boundary: list[int]
    milestone: list[Any] | None
    superseded: list[list[int]]
    time_ms: int


PLACES = len(State._fields)
# What a rewind puts back, as it was after the turn that it rewinds to.
RESTORED_PLACES = (5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 19)


def genesis(session_hash: bytes, metadata: Mapping[str, str]) -> bytes:
    """The state before turn 1: nothing but the metadata that the session was created with."""
    return encode_places(
        [RULE_VERSION, 0, 0, session_hash, [0, 0, 0], 0, 0, [0, 0, 0], 0, 0, None, [], {}, {}, ""]
        + [dict(metadata), [], [0, 0], [0, 0, 0], None, [], 0]
    )


def encode_places(places: list[Any]) -> bytes:
    """The state's bytes; maps go out in ascending key order, so that equal states are equal bytes."""
    for place in (12, 13, 15):
        places[place] = dict(sorted(places[place].items()))
    packed = msgpack.packb(places, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def decode_places(raw: bytes | memoryview) -> list[Any]:
    """The state as a list of places. Raises Corrupt if it is not one, or of a rule this release does not know."""
    try:
        places = msgpack.unpackb(raw, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, UnicodeDecodeError) as error:
        raise Corrupt("CORRUPT_HOT_ROW", f"A state does not decode: {error}.") from error
    if not isinstance(places, list) or len(places) < PLACES:
        raise Corrupt("CORRUPT_HOT_ROW", "A state has too few places.")
    if places[0] != RULE_VERSION:
        raise Corrupt(
            "NEWER_FORMAT", f"A state was made by replay rule {places[0]}; this release knows {RULE_VERSION}."
        )
    return places


def decode(raw: bytes | memoryview) -> State:
    """The state with names. Raises as decode_places does."""
    try:
        state = _decoder.decode(raw)
    except msgspec.MsgspecError:
        # Of a later release, which has more places; or damaged, which is said in the words of decode_places.
        return State(*decode_places(raw)[:PLACES])
    return state if state.rule == RULE_VERSION else State(*decode_places(raw)[:PLACES])


_decoder = msgspec.msgpack.Decoder(State)


def restored_bytes(places: list[Any]) -> bytes:
    """What a rewind to this state carries in its frame."""
    packed = msgpack.packb([places[place] for place in RESTORED_PLACES], use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed
