"""Prove that a store keeps conditional writes: of several at once exactly one wins, and a stale one never does.

It never leaves its objects behind where it can delete them, and never calls a store unfit that merely did not answer.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from sessiond import errors
from sessiond.tiers.cloud.store import Ambiguous, ObjectStore, PreconditionLost, StoreDenied, StoreError

# A store may answer 409 to all who come at once and ask them to try again; three rounds of only that are its habit.
ROUNDS_MAX = 3

# Writes its argument to one key under one condition, and returns the new etag.
_Write = Callable[[bytes], str]


def probe(store: ObjectStore, attempts_concurrent: int = 8) -> None:
    """Try conditional writes on fresh keys under probe/; about 5 + 2 * attempts_concurrent requests.

    Raises Invalid STORE_UNFIT with what was seen, or the StoreError that kept it from finding out.
    """
    stem = f"probe/{secrets.token_hex(16)}"
    keys: list[str] = []

    def fresh() -> str:
        keys.append(f"{stem}-{len(keys)}")
        return keys[-1]

    def creation() -> tuple[str, _Write]:
        key = fresh()
        return key, lambda body: store.put(key, body, if_absent=True)

    def replacement() -> tuple[str, _Write]:
        key = fresh()
        etag = store.put(key, b"to be replaced")
        return key, lambda body: store.put(key, body, if_match=etag)

    try:
        _read_back(store, fresh())
        _contest(store, "If-None-Match: *", creation, attempts_concurrent)
        key, write_stale = _contest(store, "If-Match", replacement, attempts_concurrent)
        etag = store.get(key).etag
        _must_lose(store, "If-Match with a stale etag", write_stale)
        _must_lose(store, "If-None-Match: * on what exists", lambda body: store.put(key, body, if_absent=True))
        if store.get(key).etag != etag:
            raise _unfit(store, "a write that was refused changed the object all the same")
        store.delete(key)
        _must_lose(store, "If-Match on a deleted object", lambda body: store.put(key, body, if_match=etag))
    finally:
        for key in keys:
            with suppress(StoreError):
                store.delete(key)


@dataclass
class _Seen:
    """What the attempts at one write were told."""

    won: list[tuple[bytes, str]] = field(default_factory=list)
    lost: int = 0
    unclear: list[Ambiguous] = field(default_factory=list)
    refused: list[StoreDenied] = field(default_factory=list)

    def __str__(self) -> str:
        words = f"{len(self.won)} won, {self.lost} lost, {len(self.unclear)} unclear, {len(self.refused)} refused"
        last = [*self.unclear, *self.refused][-1:]
        return f"{words} ({last[0].detail})" if last else words


def _contest(
    store: ObjectStore, condition: str, begin: Callable[[], tuple[str, _Write]], attempts: int
) -> tuple[str, _Write]:
    """Let `attempts` threads write at once until one has won; the key it won, and the write, which is stale by now."""
    for _ in range(ROUNDS_MAX):
        key, write = begin()
        seen = _race(write, attempts)
        told = f"of {attempts} concurrent writes with {condition} {seen}"
        # The unconditional writes before this were let in, so it is the condition that is refused.
        if len(seen.won) > 1 or seen.refused or not (seen.won or seen.unclear):
            raise _unfit(store, f"{told}; exactly one must win")
        if seen.won:
            stored = store.get(key)
            if (stored.body, stored.etag) != seen.won[0]:
                raise _unfit(store, f"{told}, but what was read back is not what the winner wrote")
            return key, write
    # If the store as a whole is failing, this says so as a StoreError.
    store.put(key, b"unconditional")
    raise _unfit(store, f"{told}, {ROUNDS_MAX} times in a row; a condition never gets a definite answer")


def _race(write: _Write, attempts: int) -> _Seen:
    seen = _Seen()
    start = threading.Barrier(attempts)
    counting = threading.Lock()

    def attempt(number: int) -> None:
        body = f"written by attempt {number}".encode()
        start.wait()
        try:
            seen.won.append((body, write(body)))
        except PreconditionLost:
            with counting:
                seen.lost += 1
        except Ambiguous as error:
            seen.unclear.append(error)
        except StoreDenied as error:
            seen.refused.append(error)

    with ThreadPoolExecutor(attempts) as threads:
        for attempted in [threads.submit(attempt, number) for number in range(attempts)]:
            attempted.result()
    return seen


def _read_back(store: ObjectStore, key: str) -> None:
    body = secrets.token_bytes(1000)
    etag = store.put(key, body)
    stored = store.get(key)
    if stored.body != body:
        raise _unfit(store, f"{len(stored.body)} bytes were read back that are not the {len(body)} bytes written")
    if stored.etag != etag:
        raise _unfit(store, f"the put returned the etag {etag} and the get {stored.etag}")


def _must_lose(store: ObjectStore, condition: str, write: _Write) -> None:
    with suppress(PreconditionLost):
        write(b"must not be written")
        raise _unfit(store, f"a write with {condition} was accepted")


def _unfit(store: ObjectStore, seen: str) -> errors.Invalid:
    message = f"The store {store.url} does not keep conditional writes: {seen}."
    return errors.Invalid("STORE_UNFIT", message, {"cloud": store.url, "seen": seen})
