"""Read transactions that stay open while commits go on: they keep pages from being used again, and the file grows.

It promises to name one only if it was there all the time. It looks at LMDB's table of readers, which every process of
the node has its rows in, and never ends anybody's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

OLD_MS: Final = 5000


class HasReaders(Protocol):
    """An environment."""

    @property
    def transaction_id(self) -> int:
        """The number of the newest commit."""
        ...

    def reader_rows(self) -> list[tuple[int, str, int]]:
        """(pid, thread, number of the commit that it sees) of every open read transaction, of any process."""
        ...


class OldReaders:
    """Those that are old, as of the newest `look`; one look a second or so."""

    def __init__(self, hot: HasReaders, boot_ms: Callable[[], int]) -> None:
        self._hot = hot
        self._boot_ms = boot_ms
        self._seen: dict[tuple[int, str, int], int] = {}
        self.old: list[tuple[int, int]] = []

    def look(self) -> list[tuple[int, int]]:
        """(pid, ms since it was first seen behind) of each that is older than OLD_MS."""
        newest, now_ms = self._hot.transaction_id, self._boot_ms()
        # A transaction begins at the newest commit: one that is behind it has been open since, and is the same one for
        # as long as it sees the same commit.
        behind = [row for row in self._hot.reader_rows() if row[2] < newest]
        self._seen = {row: self._seen.get(row, now_ms) for row in behind}
        self.old = [(row[0], now_ms - since) for row, since in self._seen.items() if now_ms - since > OLD_MS]
        return self.old
