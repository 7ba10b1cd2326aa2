"""Planted bugs that no seed catches, and why that is so: told in TEETH.md."""

from __future__ import annotations

SURVIVORS: dict[str, str] = {}
