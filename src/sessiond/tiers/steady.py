"""The clock that expiry and idleness go by: one that no jump of the wall clock can push forward.

It promises never to be ahead of the wall clock, nor of the store's; where the store has none, nor of the time since the
start. A jump forward therefore ends no session. It never decides what to do with the time.
"""

from __future__ import annotations

from collections.abc import Callable


class SteadyClock:
    """Milliseconds since 1970, late rather than early.

    wall_ms: the wall clock. boot_ms: milliseconds since boot, which no administrator sets. store_ms: the store's clock,
    None where it has none of its own.
    """

    def __init__(
        self, wall_ms: Callable[[], int], boot_ms: Callable[[], int], store_ms: Callable[[], int | None]
    ) -> None:
        self._wall_ms = wall_ms
        self._boot_ms = boot_ms
        self._store_ms = store_ms
        self._start_ms = wall_ms() - boot_ms()

    def __call__(self) -> int:
        """The time by which a session has certainly expired, if it has."""
        store_ms = self._store_ms()
        steady_ms = self._start_ms + self._boot_ms() if store_ms is None else store_ms
        return min(self._wall_ms(), steady_ms)

    def ahead_ms(self) -> int:
        """How far the wall clock is ahead of this one."""
        return self._wall_ms() - self()
