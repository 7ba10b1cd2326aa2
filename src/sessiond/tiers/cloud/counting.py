"""A store that counts what goes through it: requests and bytes by kind and outcome, and whether the store answers.

It never changes a request, a reply or an error.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sessiond.tiers.cloud.store import (
    Ambiguous,
    BucketMissing,
    Listed,
    ObjectNotFound,
    ObjectStore,
    PreconditionLost,
    Stored,
    StoreDamaged,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)

OK = "ok"
OUTCOMES: dict[type[StoreError], str] = {
    ObjectNotFound: "not_found",
    PreconditionLost: "lost",
    Ambiguous: "ambiguous",
    StoreUnavailable: "unavailable",
    StoreDamaged: "damaged",
    StoreDenied: "denied",
    BucketMissing: "bucket_missing",
}
# What an object is by the first part of its key.
OBJECTS = {
    "m": "manifest",
    "s": "segment",
    "o": "orphan",
    "b": "blob",
    "u": "user_index",
    "x": "expiry",
    "n": "lease",
    "bucket.json": "bucket",
    "probe": "probe",
}
# The store is there and does its work: it had the object, or said definitely how things stand with it.
_ANSWERS = (OK, "not_found", "lost")


class _Request:
    """One request under way; `transferred_bytes` is set by whoever makes it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.transferred_bytes = 0


class CountingStore(ObjectStore):
    """A store around another one. A listing counts as one request, when it is exhausted, left or failed.

    Bytes are bodies: of a put those handed over, whatever became of them; of a get those received.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], tuple[int, int]] = {}
        self._objects: Counter[tuple[str, str]] = Counter()
        self._begun = 0
        self._newest = 0
        self._reachable = True
        self._last_error = ""
        self.url = store.url

    @property
    def reachable(self) -> bool:
        """Whether the newest request was answered about the object itself; True before the first one."""
        return self._reachable

    @property
    def last_error(self) -> str:
        """Why the newest request was not, or ''."""
        return self._last_error

    def snapshot(self) -> list[tuple[str, str, int, int]]:
        """Rows of (kind, outcome, requests, bytes) since the start, ordered by kind and outcome."""
        with self._lock:
            return [(*name, *figures) for name, figures in sorted(self._counts.items())]

    def objects(self) -> list[tuple[str, str, int]]:
        """Rows of (kind, what the object is, requests) since the start, ordered by kind and object."""
        with self._lock:
            return [(*name, count) for name, count in sorted(self._objects.items())]

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        """Counted as `get`."""
        with self._counted("get", key) as request:
            stored = self._store.get(key, first_byte, last_byte)
            request.transferred_bytes = len(stored.body)
            return stored

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Counted as `put`."""
        with self._counted("put", key) as request:
            request.transferred_bytes = len(body)
            return self._store.put(key, body, if_absent=if_absent, if_match=if_match)

    def delete(self, key: str) -> None:
        """Counted as `delete`."""
        with self._counted("delete", key):
            self._store.delete(key)

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        """Counted as `list`."""
        rows = self._store.list(prefix, start_after, limit)
        return self._counted_rows(rows, prefix)

    def _counted_rows(self, rows: Iterator[Listed], prefix: str) -> Iterator[Listed]:
        with self._counted("list", prefix):
            yield from rows

    def clock_ms(self) -> int | None:
        """The clock of the store inside; no request, so not counted."""
        return self._store.clock_ms()

    def close(self) -> None:
        """Close the store inside; the counts stay readable."""
        self._store.close()

    @contextmanager
    def _counted(self, kind: str, key: str) -> Iterator[_Request]:
        with self._lock:
            self._begun += 1
            self._objects[kind, OBJECTS.get(key.split("/", 1)[0], "other")] += 1
            request = _Request(self._begun)
        try:
            yield request
        except StoreError as error:
            self._count(kind, OUTCOMES[type(error)], request, str(error))
            raise
        except GeneratorExit:
            self._count(kind, OK, request, "")  # a listing that its reader had enough of
            raise
        self._count(kind, OK, request, "")

    def _count(self, kind: str, outcome: str, request: _Request, error: str) -> None:
        with self._lock:
            requests, total_bytes = self._counts.get((kind, outcome), (0, 0))
            self._counts[kind, outcome] = requests + 1, total_bytes + request.transferred_bytes
            # Newest by when it began: a timeout that ends late says nothing of how the store is now.
            if request.number > self._newest:
                self._newest = request.number
                self._reachable = outcome in _ANSWERS
                self._last_error = "" if self._reachable else error
