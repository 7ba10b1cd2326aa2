"""The clock that expiry and idleness go by: one that no jump of the wall clock can push forward.

It promises never to be ahead of the wall clock, nor of the store's; where the store has none, nor of the time since the
start. A jump forward therefore ends no session. It never decides what to do with the time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

# A node that was away for longer than this, by its own wall clock, may only have a clock that is wrong after a boot:
# for so long it goes on from when it was last seen. Time servers need minutes, operators somewhat longer.
DOUBT_MS: Final = 3_600_000


class SteadyClock:
    """Milliseconds since 1970, late rather than early.

    wall_ms: the wall clock. boot_ms: milliseconds since boot, which no administrator sets. store_ms: the store's clock,
    None where it has none of its own. seen_ms: when this node was last seen alive, 0 if that is not known.
    """

    def __init__(
        self,
        wall_ms: Callable[[], int],
        boot_ms: Callable[[], int],
        store_ms: Callable[[], int | None],
        seen_ms: int = 0,
    ) -> None:
        self._wall_ms = wall_ms
        self._boot_ms = boot_ms
        self._store_ms = store_ms
        start_ms, booted_ms = wall_ms(), boot_ms()
        doubted = seen_ms > 0 and start_ms - seen_ms > DOUBT_MS
        self._offset_ms = (seen_ms if doubted else start_ms) - booted_ms
        self._doubted_until_ms = booted_ms + DOUBT_MS if doubted else 0

    def __call__(self) -> int:
        """The time by which a session has certainly expired, if it has."""
        wall_ms, steady_ms = self._wall_ms(), self._store_ms()
        if steady_ms is None:
            boot_ms = self._boot_ms()
            if self._doubted_until_ms and boot_ms >= self._doubted_until_ms:
                # Nobody corrected the clock: the node was away for as long as it says.
                self._offset_ms, self._doubted_until_ms = wall_ms - boot_ms, 0
            steady_ms = self._offset_ms + boot_ms
        return min(wall_ms, steady_ms)

    def offsets_ms(self) -> tuple[int, int]:
        """(what expiry goes by, what idleness goes by), each less the boot clock, for other processes of this node.

        The wall clock is not in them: whoever has them takes the earlier of the two, or the later.
        """
        self()
        store_ms, boot_ms = self._store_ms(), self._boot_ms()
        return self._offset_ms if store_ms is None else store_ms - boot_ms, self._offset_ms

    def running_ms(self) -> int:
        """The time since the start, added to the time that it was then: what idleness goes by, whatever is set."""
        return self._offset_ms + self._boot_ms()

    def latest_ms(self) -> int:
        """The time that a life is counted from: not behind, where the wall clock was set back for a while."""
        store_ms = self._store_ms()
        return max(self._wall_ms(), self._offset_ms + self._boot_ms() if store_ms is None else store_ms)
