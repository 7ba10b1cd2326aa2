"""Planted bugs that nothing caught, and why that is no gap: told in TEETH.md."""

from __future__ import annotations

SURVIVORS: dict[str, str] = {
    "one more in Sessions._mark_deleted: `1`": (
        "the same daemon: how far `changes` rises says nothing, only that it does, and it is compared with itself"
    ),
    "off by one in Flusher._look: `len(tail) < inline_max`": (
        "the same promise: a tail of exactly the limit may stand in the manifest or in a segment"
    ),
}
