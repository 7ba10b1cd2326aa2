"""Bytes and rules: frames, replay, windows, the cloud tier's envelope. No I/O, no clock, no logging.

The names below come from the compiled core. A missing extension is an error, never a silent fallback; SESSIOND_PURE=1
asks for the readable twin. COMPILED says which of the two is in use.
"""

from __future__ import annotations

import os

if os.environ.get("SESSIOND_PURE") == "1":
    from sessiond.core.pure import (
        COMPILED,
        crc32c,
        derived_offset,
        encode_message,
        fit_window,
        fold,
        join_turn_ids,
        newest_row,
        read_frame,
        replay,
        row_checked,
        row_last,
        row_live,
        scan_frames,
        seal_frame,
        seek_turn_ids,
        tool_events,
        walk_rows,
    )
else:
    from sessiond.core._kernel import (
        COMPILED,
        crc32c,
        derived_offset,
        encode_message,
        fit_window,
        fold,
        join_turn_ids,
        newest_row,
        read_frame,
        replay,
        row_checked,
        row_last,
        row_live,
        scan_frames,
        seal_frame,
        seek_turn_ids,
        tool_events,
        walk_rows,
    )

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
