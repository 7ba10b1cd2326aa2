"""How fast the backlog goes to the cloud tier: all threads while it answers, one try at a time while it does not.

It promises that a store that is down or throttles sees one request at a time, that the first answer opens the way again
at once, and that a fault of one session is not taken for the store's. It starts no thread and reads no clock.
"""

from __future__ import annotations

import threading
from typing import Final

# So many failures in a row mean the store, not one request; of so many sessions, with certainty.
FAILURES_MIN: Final = 6
SESSIONS_MIN: Final = 3
SUSPECTS_MAX: Final = 4096
BACKOFF_FIRST_MS: Final = 250
BACKOFF_LAST_MS: Final = 2000
# After the store came back nothing of the backlog waits for company.
CATCH_UP_MS: Final = 60_000


class Pace:
    """How many flushes may be under way. Times are milliseconds since boot, handed in."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._width = threads
        self._failures = 0
        self._failing: set[bytes] = set()
        # They failed while others did not: their fault is their own until they succeed.
        self._suspects: set[bytes] = set()
        self._not_before_ms = 0
        self._catch_up_until_ms = 0
        self._lock = threading.Lock()
        self.failing_since_ms = 0

    def width(self, now_ms: int) -> int:
        """How many background flushes may be under way now."""
        with self._lock:
            return 0 if now_ms < self._not_before_ms else self._width

    @property
    def failing(self) -> bool:
        """Whether the store is taken to be down."""
        return self._failures >= FAILURES_MIN or len(self._failing) >= SESSIONS_MIN

    def refuses(self, now_ms: int) -> bool:
        """Whether a flush that somebody waits for would be in vain: the store is down, and was tried just now."""
        with self._lock:
            return len(self._failing) >= SESSIONS_MIN and now_ms < self._not_before_ms

    def catching_up(self, now_ms: int) -> bool:
        """Whether the store came back a short while ago."""
        return now_ms < self._catch_up_until_ms

    def succeeded(self, h: bytes, now_ms: int) -> bool:
        """Note a session's commit; whether it was the first after an outage."""
        with self._lock:
            recovered = self.failing
            if len(self._suspects) >= SUSPECTS_MAX:
                self._suspects.clear()
            self._suspects |= self._failing
            self._suspects.discard(h)
            self._failures, self._not_before_ms, self.failing_since_ms = 0, 0, 0
            self._failing.clear()
            self._width = min(self._threads, self._width + 1)
            if recovered:
                self._width = self._threads
                self._catch_up_until_ms = now_ms + CATCH_UP_MS
            return recovered

    def failed(self, h: bytes, now_ms: int) -> None:
        """Note that the store did not answer for a session, throttled, or refused the credentials."""
        with self._lock:
            if h in self._suspects:
                return
            self._failures += 1
            if len(self._failing) < SESSIONS_MIN:
                self._failing.add(h)
            self._width = 1
            self.failing_since_ms = self.failing_since_ms or now_ms
            if self.failing:
                doublings = min(max(0, self._failures - FAILURES_MIN), 8)
                self._not_before_ms = now_ms + min(BACKOFF_LAST_MS, BACKOFF_FIRST_MS << doublings)
