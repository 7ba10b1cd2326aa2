"""Numbers as the contract holds them: what does not fit is refused as wrong usage."""

from __future__ import annotations

from typing import Final

import click

# A seq, or a blob's version.
UINT64: Final = click.IntRange(min=0, max=2**64 - 1)
UINT64_FROM_1: Final = click.IntRange(min=1, max=2**64 - 1)
# An epoch.
UINT32: Final = click.IntRange(min=0, max=2**32 - 1)
