"""The one interface to object stores: six methods, conditional writes part of it.

It promises that every method makes one attempt and says truthfully what became of it. It never retries, never lists
where a key is known, and never interprets what it stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


class StoreError(Exception):
    """What a store could not do. `key` is the object's key, `detail` the backend's own words."""

    def __init__(self, key: str, detail: str, retry_after_ms: int = 1000) -> None:
        super().__init__(f"{key}: {detail}")
        self.key = key
        # It is put into sentences, and a store often ends its own with a full stop.
        self.detail = detail.rstrip(".")
        self.retry_after_ms = retry_after_ms


class ObjectNotFound(StoreError):
    """Definite: there is no such object, and the store itself is there."""


class PreconditionLost(StoreError):
    """Definite: the condition did not hold (412, or 404 on an If-Match); nothing was written by this attempt."""


class Ambiguous(StoreError):
    """The write may or may not have been applied: timeout, reset, 409, any 5xx."""


class StoreUnavailable(StoreError):
    """A read, list or delete could not be answered; or a write surely never left this process. Waiting can help."""


class StoreDenied(StoreError):
    """Credentials or policy refuse the request (401, 403). Definite."""


class BucketMissing(StoreError):
    """The bucket or the root folder itself is not there. Definite, and never the same as ObjectNotFound."""


class StoreDamaged(StoreError):
    """The object does not match the checksum that the store keeps with it, and reading it again changes nothing."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it was read: its bytes and the etag that a conditional write compares."""

    body: bytes
    etag: str


@dataclass(frozen=True, slots=True)
class Listed:
    """One row of a listing."""

    key: str
    size_bytes: int


class ObjectStore(Protocol):
    """Flat keys of [A-Za-z0-9._/-], immutable or conditionally replaced objects. Methods block; all are thread-safe."""

    url: str

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        """The object, or bytes first_byte..last_byte of it (both included, both or neither given).

        Raises ObjectNotFound, StoreUnavailable, StoreDamaged, StoreDenied, BucketMissing.
        """

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Write the object durably and return its new etag; at most one of the two conditions.

        Raises PreconditionLost, Ambiguous, StoreUnavailable (never sent), StoreDenied, BucketMissing.
        """

    def delete(self, key: str) -> None:
        """Remove the object; absence is success. Raises StoreUnavailable, StoreDenied, BucketMissing."""

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        """Objects under the prefix in ascending key order, after `start_after`, at most `limit`.

        Raises StoreUnavailable, StoreDenied, BucketMissing.
        """

    def clock_ms(self) -> int | None:
        """The store's own clock, in ms since 1970; None if it has told none, or if it is this machine's.

        It may be a second behind, and is as wrong as the store is. It asks nothing of the store.
        """
        return None

    def close(self) -> None:
        """Let go of connections; the store is not used afterwards."""
