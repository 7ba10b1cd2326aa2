"""What commands that work on a stopped node share: its tiers, its node name, and folders that are moved aside.

It promises that no daemon serves under the node's name meanwhile. It never deletes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sessiond.config import Settings
from sessiond.daemon import take_node
from sessiond.errors import Unavailable
from sessiond.tiers.cloud.bucket import Bucket, open_bucket, start_refusal
from sessiond.tiers.cloud.lease import Lease
from sessiond.tiers.cloud.open import open_configured
from sessiond.tiers.cloud.store import Listed, ObjectStore, StoreError
from sessiond.tiers.hot.environment import Environment

KEYS_PER_PAGE = 1000


@contextmanager
def cloud_tier(settings: Settings) -> Iterator[tuple[ObjectStore, Bucket]]:
    """The store and its identity, which must be there already. Raises as opening them does."""
    store = open_configured(settings)
    try:
        yield store, open_bucket(store, bytes.fromhex(settings.hash_key), 0, make=False)
    finally:
        store.close()


@contextmanager
def hot_tier(settings: Settings, bucket: Bucket) -> Iterator[Environment]:
    """The node's environment, opened to write, made if there is none. Raises as opening it does."""
    hot = Environment(settings.hot_dir, settings.map_size_bytes, settings.readers_max, settings.commit_group_max)
    try:
        hot.bind_store(bucket.store_id)
        yield hot
    finally:
        hot.close()


@dataclass(frozen=True, slots=True)
class Name:
    """A node's name while it is held. still_held: raises Unavailable EPOCH_FENCED once it is not.

    before: what the holder before had written, where no hot tier is given and there was one.
    """

    still_held: Callable[[], None]
    before: dict[str, Any]


@contextmanager
def node_name(settings: Settings, store: ObjectStore, hot: Environment | None = None) -> Iterator[Name]:
    """Hold the node's name, and release it at the end.

    hot: the hot tier that the name stands for, whose rows are doubted where a daemon's start would doubt them.
    Raises Unavailable NODE_NAME_IN_USE.
    """

    def still_held() -> None:
        if lease.lost:
            raise Unavailable("EPOCH_FENCED", f"Another process took the name of node {settings.node!r}.")

    lease = Lease(
        store,
        settings.node,
        hot.incarnation if hot else os.urandom(16),
        settings.address(),
        settings.lease_ms,
        lambda: None,
        transaction_id=(lambda: hot.transaction_id) if hot else lambda: 0,
    )
    before: dict[str, Any] = {}
    if hot is not None:
        take_node(lease, hot, hot.opened_at)
    else:
        lease.acquire(lambda holder: before.update(holder or {}))
    lease.start()
    try:
        yield Name(still_held, before)
    finally:
        lease.stop(True)


def listed(store: ObjectStore, prefix: str, start_after: str = "") -> Iterator[Listed]:
    """Every object below a prefix, a page at a time. Raises as the store does, as refusals."""
    while True:
        try:
            rows = list(store.list(prefix, start_after, KEYS_PER_PAGE))
        except StoreError as error:
            raise start_refusal(error) from error
        yield from rows
        if len(rows) < KEYS_PER_PAGE:
            return
        start_after = rows[-1].key


def stamp() -> str:
    """The time as it stands in the names of what is moved aside: UTC, to the second."""
    return datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")


def aside_name(hot_dir: Path) -> Path:
    """A name beside the hot tier that nothing has yet."""
    wanted = first = hot_dir.with_name(f"{hot_dir.name}.aside-{stamp()}")
    number = 1
    while wanted.exists():
        number += 1
        wanted = first.with_name(f"{first.name}-{number}")
    return wanted


def move_aside(hot_dir: Path) -> Path:
    """Rename the hot tier's folder, durably; its new name."""
    wanted = aside_name(hot_dir)
    os.rename(hot_dir, wanted)
    settle_folder(hot_dir.parent)
    return wanted


def settle_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
