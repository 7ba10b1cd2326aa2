"""Blobs in the cloud tier: one immutable object for each version that a manifest names.

It promises that content which was read is the content that was written, and that an object stands before the manifest
that names it. It never decides which version is the newest: the owner's rows do, and after them the manifest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sessiond.core import blobs as rules
from sessiond.core import envelope
from sessiond.core.blobs import Blob
from sessiond.core.manifest import Manifest
from sessiond.errors import Corrupt
from sessiond.tiers.cloud.bucket import blob_key, refusal
from sessiond.tiers.cloud.store import ObjectNotFound, ObjectStore, StoreError
from sessiond.tiers.hot import blobs as hot
from sessiond.tiers.hot.environment import Transaction

# Content that one look at a session's rows takes into memory.
LOOK_BYTES_MAX: Final = 8 * 1024**2


@dataclass(slots=True)
class Pending:
    """What the cloud tier lacks of a session's blobs, as one look found it.

    objects: (version, key, bytes, sha256 of the bytes) of the next ones. more: there are others after these.
    """

    objects: list[tuple[int, str, bytes, bytes]] = field(default_factory=list)
    more: bool = False


def seal(whose: Manifest, key: str, blob: Blob, content: bytes) -> tuple[str, bytes, bytes]:
    """(key, bytes, their sha256) of the object of one version; the same bytes for the same version at any time."""
    meta = {
        "v": 1,
        "tenant": whose.tenant,
        "session": whose.session,
        "user": whose.user,
        "h": whose.h,
        "key": key,
        "version": blob.version,
        "sha256": blob.sha256,
    }
    body = envelope.seal(envelope.KIND_STATE_BLOB, meta, content)
    sha256 = hashlib.sha256(body).digest()
    return blob_key(whose.h, blob.version, sha256), body, sha256


def object_key(h: bytes, row: list[Any]) -> str:
    """The key of the object of a manifest's row."""
    return blob_key(h, int(row[1]), bytes(row[7]))


def fetch(store: ObjectStore, h: bytes, row: list[Any]) -> bytes:
    """The content that a manifest's row names. Raises Corrupt CORRUPT_BLOB or MISSING_BLOB, and as the store does."""
    name, blob = object_key(h, row), rules.blob_of(row)
    try:
        stored = store.get(name).body
    except ObjectNotFound as error:
        raise Corrupt("MISSING_BLOB", f"The object {name} is gone.", {"object": name, "key": str(row[0])}) from error
    except StoreError as error:
        raise refusal(error) from error
    if hashlib.sha256(stored).digest() != bytes(row[7]):
        raise Corrupt("CORRUPT_BLOB", f"The object {name} does not match its name's sha256.", {"object": name})
    meta, content = envelope.unseal(stored, envelope.KIND_STATE_BLOB, name)
    same = (meta.get("h"), meta.get("key"), meta.get("version")) == (h, row[0], blob.version)
    if not same or len(content) != blob.size or hashlib.sha256(content).digest() != blob.sha256:
        raise Corrupt("CORRUPT_BLOB", f"The object {name} holds another blob than its name says.", {"object": name})
    return content


def pending(
    transaction: Transaction, h: bytes, base: Manifest, placed: Mapping[int, list[Any]], bytes_max: int
) -> Pending:
    """The objects that the next manifest needs and that are not there: neither named by `base`, the manifest as last
    committed, nor in `placed`. About bytes_max of content, but at least one. Raises Corrupt.
    """
    found, size = Pending(), 0
    committed = {str(row[0]): int(row[1]) for row in rules.rows(base.state_keys)}
    for key, blob in hot.read_blobs(transaction, h):
        if committed.get(key) == blob.version or blob.version in placed:
            continue
        if found.objects and size + blob.size > bytes_max:
            found.more = True
            break
        content = hot.read_content(transaction, h, blob.version)
        if content is None:
            what = f"The content of blob {key!r} of session {base.session!r} is neither hot nor in the cloud tier."
            raise Corrupt("CORRUPT_HOT_ROW", what, {"table": "blobs", "key": key})
        name, body, sha256 = seal(base, key, blob, hot.check_content(h, key, blob, content))
        found.objects.append((blob.version, name, body, sha256))
        size += blob.size
    return found


def state_keys(transaction: Transaction, h: bytes, base: Manifest, placed: Mapping[int, list[Any]]) -> dict[str, Any]:
    """What the next manifest says of the blobs. placed: by version, [sha256, bytes] of objects that `base` lacks."""
    ledger = hot.read_ledger(transaction, h)
    if ledger is None:
        return base.state_keys
    before = {str(row[0]): row for row in rules.rows(base.state_keys)}
    rows: list[list[Any]] = []
    for key, blob in hot.read_blobs(transaction, h):
        row = before.get(key)
        if row is not None and int(row[1]) == blob.version:
            rows.append(row)
        else:
            rows.append([key, *blob, *placed[blob.version]])
    return {**base.state_keys, "last": ledger.last, "writes": ledger.writes, "rows": rows, "loss": ledger.loss}


def replaced(before: Manifest, after: Manifest) -> list[str]:
    """Keys of the objects that `before` names and `after` does not."""
    kept = {object_key(after.h, row) for row in rules.rows(after.state_keys)}
    return [name for row in rules.rows(before.state_keys) if (name := object_key(before.h, row)) not in kept]


def copy_blobs(
    store: ObjectStore, parent: Manifest, child: Manifest, put: Callable[[str, bytes], object]
) -> dict[str, Any]:
    """What the manifest of a fork says of its blobs: those that the parent's manifest names, in objects of its own.

    put: writes an immutable object, definite on return. The versions are new and under the child's epoch, in the order
    of the parent's; what may be missing from the parent may be missing here. Raises Corrupt MISSING_BLOB or
    CORRUPT_BLOB (also where the parent went on meanwhile: read its manifest again), and as the store does.
    """
    if not parent.state_keys:
        return {}
    ledger = rules.Ledger()
    rows: list[list[Any]] = []
    for row in sorted(rules.rows(parent.state_keys), key=lambda row: int(row[1])):
        content = fetch(store, parent.h, row)
        ledger.last = ledger.next_version(child.epoch)
        blob = rules.blob_of(row)._replace(version=ledger.last)
        name, body, sha256 = seal(child, str(row[0]), blob, content)
        put(name, body)
        rows.append([row[0], *blob, sha256, len(body)])
    # A loss is told by the epoch of the version, and these versions are of the child's.
    loss = [[child.epoch, ledger.last, lost[2], 0] for lost in rules.may_lack(parent.state_keys.get("loss", []))[:1]]
    rows.sort(key=lambda row: str(row[0]).encode())
    return {"last": ledger.last, "writes": b"", "rows": rows, "loss": loss}
