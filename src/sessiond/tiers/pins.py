"""What forks need of a session: the pins in its manifest, and what stays of it behind its tombstone.

It promises that a segment which a fork may still need is never removed, and that the last of them goes with the last
fork. What can't be read counts as needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from sessiond.core import forks
from sessiond.core.manifest import LIFECYCLE_DELETED, Manifest
from sessiond.errors import Conflict, Corrupt, Unavailable
from sessiond.tiers.cloud.bucket import Bucket, manifest_key
from sessiond.tiers.cloud.store import ObjectStore
from sessiond.tiers.hot.rows import Head
from sessiond.tiers.hydrate import ATTEMPTS_MAX, Cold, load, put_settled
from sessiond.tiers.retire import remove_objects

# A pin goes first and its fork second: a pin whose fork is not there may be of one that is being made.
UNUSED_PIN_KEPT_MS: Final = 24 * 3600 * 1000
# Forks of forks of forks: a line of deleted ones is let go of one by one, the rest by whoever comes next.
LINE_MAX: Final = 64


def with_pin(pins: list[Any], pin: list[Any]) -> list[Any]:
    """The pins of a manifest with one more, unless it is there."""
    return pins if any(known[0] == pin[0] and known[3] >= pin[3] for known in pins) else [*pins, pin]


def is_pinned(manifest: Manifest, h: bytes, last: int) -> bool:
    """Whether a manifest pins its turns up to `last` for the fork h."""
    return any(bytes(pin[0]) == h and int(pin[3]) >= last for pin in manifest.pins)


def needed(store: ObjectStore, parent: Manifest, now_ms: int) -> list[Any]:
    """The pins of a manifest that a fork may still need. Raises Unavailable."""
    return [pin for pin in parent.pins if _is_needed(store, parent.h, pin, now_ms)]


def _is_needed(store: ObjectStore, h: bytes, pin: list[Any], now_ms: int) -> bool:
    try:
        found = load(store, bytes(pin[0]))
    except Corrupt:
        return True
    if found is None:
        return bool(now_ms - int(pin[4]) < UNUSED_PIN_KEPT_MS)
    fork = found.manifest
    if forks.parent_of(fork.birth) != h:
        return False  # another session took the id
    # A deleted fork's own forks name the same segments, and are pinned in it only.
    return fork.lifecycle != LIFECYCLE_DELETED or bool(fork.pins)


def let_go(
    store: ObjectStore,
    bucket: Bucket,
    was: Head | Manifest,
    h: bytes,
    objects_max: int,
    now_ms: int,
    wait: Callable[[float], object],
    known: Manifest | None = None,
) -> bool:
    """Remove what a tombstone left behind and no fork needs, here and along the line that it was forked from.

    was: the session, before its tombstone or after. known: the tombstone as this node wrote or read it. Whether
    nothing is left to do now. Raises as the store does.
    """
    if (
        known is not None
        and known.lifecycle == LIFECYCLE_DELETED
        and not known.pins
        and not forks.parent_of(known.birth)
    ):
        return remove_objects(store, bucket, h, was, objects_max)
    # By the tombstone as it stands: this node's rows may be older than a fork that was made elsewhere.
    tombstone = load(store, h)
    if tombstone is None or tombstone.manifest.lifecycle != LIFECYCLE_DELETED:
        what = f"{manifest_key(h)} is no tombstone, so that nothing behind it may go."
        raise Corrupt("CORRUPT_MANIFEST", what, {"object": manifest_key(h)})
    pins = _prune(store, tombstone, now_ms, wait)
    if not remove_objects(store, bucket, h, was, objects_max, forks.pinned_seq(pins)):
        return False
    line = tombstone.manifest
    for _ in range(LINE_MAX):
        parent = forks.parent_of(line.birth)
        found = None if pins or not parent else _deleted(store, parent)
        if found is None:
            break
        line, pins = found.manifest, _prune(store, found, now_ms, wait)
        if not remove_objects(store, bucket, line.h, line, objects_max, forks.pinned_seq(pins)):
            return False
    return True


def _deleted(store: ObjectStore, h: bytes) -> Cold | None:
    """The tombstone of a session; None if it has none that can be read."""
    try:
        found = load(store, h)
    except Corrupt:
        return None
    return found if found is not None and found.manifest.lifecycle == LIFECYCLE_DELETED else None


def _prune(store: ObjectStore, found: Cold, now_ms: int, wait: Callable[[float], object]) -> list[Any]:
    """Take from a tombstone the pins that no fork needs; those that are left."""
    h = found.manifest.h
    for _ in range(ATTEMPTS_MAX):
        pins = needed(store, found.manifest, now_ms)
        if len(pins) == len(found.manifest.pins):
            return pins
        # Its time stays: the index of what is to be looked at goes by it.
        pruned = replace(found.manifest, pins=pins, mutation=found.manifest.mutation + 1, write_id=os.urandom(8))
        try:
            put_settled(store, h, pruned, found.etag, wait)
        except Conflict:
            again = _deleted(store, h)  # another fork was deleted at the same time
            if again is None:
                break
            found = again
            continue
        return pins
    raise Unavailable("STORE_UNAVAILABLE", f"{manifest_key(h)} keeps changing.", {"object": manifest_key(h)})


def is_gone(store: ObjectStore, h: bytes) -> bool:
    """Whether a parent was deleted, so that what can't be read of it never comes back. Raises Unavailable."""
    try:
        found = load(store, h)
    except Corrupt:
        return False
    return found is None or found.manifest.lifecycle == LIFECYCLE_DELETED
