from collections.abc import Sequence
from typing import Any

from sessiond.core.layout import Header

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

_Buffer = bytes | bytearray | memoryview

COMPILED: bool

def crc32c(data: _Buffer, seed: int = 0) -> int: ...
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
    body: _Buffer,
) -> bytes: ...
def read_frame(session_hash: bytes, buffer: _Buffer, offset: int = 0) -> Header: ...
def scan_frames(session_hash: bytes, buffer: _Buffer) -> list[Header]: ...
def tool_events(body: _Buffer) -> list[tuple[bool, str]]: ...
def derived_offset(body: _Buffer) -> int: ...
def replay(session_hash: bytes, state: _Buffer, frames: _Buffer) -> bytes: ...
def fold(session_hash: bytes, places: list[Any], frames: _Buffer) -> None: ...
def row_checked(session_hash: bytes, row: _Buffer) -> int: ...
def row_last(row: _Buffer) -> int: ...
def row_live(row: _Buffer, target_seq: int, slot: int) -> tuple[int, int]: ...
def newest_row(cursor: Any, session_hash: bytes, head_seq: int) -> tuple[int, Any, int] | None: ...
def walk_rows(
    cursor: Any, session_hash: bytes, floor_seq: int, last_live_seq: int, slot: int, tokens_max: int
) -> tuple[list[Any], int, int]: ...
def fit_window(
    session_hash: bytes,
    rows: Sequence[_Buffer],
    slot: int,
    last_live_seq: int,
    exchange_seq: int,
    mode: int,
    last_exchanges: int,
    tail_tokens: int,
    tail_tokens_exact: int,
    stride_tokens: int,
    since_seq: int,
) -> tuple[Any, ...]: ...
def join_turn_ids(session_hash: bytes, chunks: Sequence[_Buffer], head_seq: int, horizon: int) -> bytes: ...
def seek_turn_ids(entries: _Buffer, id_hashes: Sequence[bytes]) -> list[tuple[int, bytes] | None]: ...
def encode_message(fields: tuple[Any, ...]) -> bytes: ...
