"""A session's blobs in the hot tier: writing them inside a write transaction, reading them inside a read transaction.

It promises that a write changes everything or nothing and is applied once, and that no content is returned for another
version's. It never waits, never commits and never talks to the cloud tier; `environment` has the tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgpack

from sessiond.core import blobs
from sessiond.core.blobs import Blob, Ledger
from sessiond.errors import Conflict, Corrupt, Exhausted
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.rows import PHASE_OWNED, Head, unwrap, wrap

TABLES = ("states", "blobs")


@dataclass(frozen=True, slots=True)
class Write:
    """A write that is ready to be made. content: None deletes. sha256: of the content, empty for a deletion.

    expected: the version to write over, 0 if there must be none, None for whatever is there.
    """

    key: str
    id_hash: bytes
    digest: bytes
    content: bytes | None
    sha256: bytes
    media_type: str
    labels: dict[str, str]
    expected: int | None


@dataclass(slots=True)
class Written:
    """What became of a write. version: that it made, 0 for a deletion that found nothing. head: after it. tenure: the
    node's from before the write.
    """

    version: int
    time_ms: int
    duplicate: bool
    head: Head
    tenure: int = 0


def read_ledger(transaction: Transaction, h: bytes) -> Ledger | None:
    """What is known of all blobs of a session; None if it never had any. Raises Corrupt."""
    value = transaction.get("states", h)
    return None if value is None else ledger_of_row(h, value)


def ledger_of_row(h: bytes, value: Any) -> Ledger:
    """The ledger in a row of the table states. Raises Corrupt."""
    places = _unpacked(h, value)
    return Ledger(int(places[0]), bytes(places[1]), [list(row) for row in places[2]], *map(int, places[3:6]))


def _write_ledger(transaction: Transaction, h: bytes, ledger: Ledger) -> None:
    places = [ledger.last, ledger.writes, ledger.loss, ledger.keys, ledger.content_bytes, ledger.header_bytes]
    transaction.put("states", h, _packed(h, places))


def _packed(h: bytes, places: list[Any]) -> bytes:
    packed = msgpack.packb(places, use_bin_type=True)
    assert isinstance(packed, bytes)
    return wrap(h, "states", packed)


def _unpacked(h: bytes, value: Any) -> list[Any]:
    places = msgpack.unpackb(unwrap(h, "states", value), raw=False, strict_map_key=True)
    assert isinstance(places, list)
    return places


def blob_of_row(h: bytes, value: Any) -> Blob:
    """The blob in a row of the table states. Raises Corrupt."""
    return Blob._make(_unpacked(h, value)[: len(Blob._fields)])


def read_blob(transaction: Transaction, h: bytes, key: str) -> Blob | None:
    """One blob without its content; None if there is none of this key. Raises Corrupt."""
    value = transaction.get("states", h + key.encode())
    return None if value is None else blob_of_row(h, value)


def read_blobs(transaction: Transaction, h: bytes, prefix: str = "", after: str | None = None) -> Iterator[Any]:
    """(key, blob) by the bytes of their keys. after: only keys behind this one. Raises Corrupt."""
    # The ledger's key is the hash alone, and comes first.
    start = h + b"\0" if after is None else h + after.encode() + b"\0"
    for key, value in transaction.scan("states", h + prefix.encode(), start):
        yield key[16:].decode(), blob_of_row(h, value)


def read_content(transaction: Transaction, h: bytes, version: int) -> bytes | None:
    """The content of a version, unchecked (see check_content); None if it is in the cloud tier only."""
    value = transaction.get("blobs", _content_key(h, version))
    return None if value is None else bytes(value)


def check_content(h: bytes, key: str, blob: Blob, content: bytes) -> bytes:
    """The content, if it is the blob's. Raises Corrupt CORRUPT_HOT_ROW."""
    if len(content) != blob.size or hashlib.sha256(content).digest() != blob.sha256:
        what = f"The content of blob {key!r} of session {h.hex()} does not match its sha256."
        raise Corrupt("CORRUPT_HOT_ROW", what, {"table": "blobs", "key": key})
    return content


def _content_key(h: bytes, version: int) -> bytes:
    return h + version.to_bytes(8, "big")


def write(
    transaction: Transaction,
    h: bytes,
    session: str,
    asked: Write,
    now_ms: int,
    running_ms: int,
    expiry_ms: Callable[[], int],
) -> Written | None:
    """Put or delete a blob inside a write transaction; None if this node does not own the session now.

    now_ms: what the blob is dated by. running_ms: what idleness goes by. expiry_ms: the clock that expiry is judged by.
    Raises NotFound SESSION_DELETED, Denied SESSION_ARCHIVED, Conflict WRITE_ID_REUSED or STATE_VERSION_MISMATCH,
    Exhausted STATE_FULL, Corrupt; nothing is written then.
    """
    head = log.read_head(transaction, h)
    if head is None or head.phase != PHASE_OWNED:
        return None
    log.check_writable(head, session, expiry_ms)
    ledger = read_ledger(transaction, h) or Ledger()
    before = blobs.find_write(ledger.writes, asked.id_hash)
    if before is not None:
        digest, version, time_ms = before
        if digest != asked.digest:
            raise Conflict(
                "WRITE_ID_REUSED",
                f"The write_id was used for version {version} with other content.",
                {"key": asked.key, "version": str(version)},
                [("write_id", f"used for version {version} with other content")],
            )
        return Written(version, time_ms, True, head)
    found = read_blob(transaction, h, asked.key)
    stands = found.version if found is not None else 0
    if asked.expected is not None and asked.expected != stands:
        raise Conflict(
            "STATE_VERSION_MISMATCH",
            f"The blob {asked.key!r} is at version {stands}, not {asked.expected}.",
            {"key": asked.key, "version": str(stands), "expected_version": str(asked.expected)},
            [("expected_version", f"it is at version {stands}")],
        )
    version = 0 if asked.content is None and found is None else ledger.next_version(head.epoch)
    if found is not None:
        ledger.keys -= 1
        ledger.content_bytes -= found.size
        ledger.header_bytes -= found.header_bytes(asked.key)
    if asked.content is not None:
        size = len(asked.content)
        blob = Blob(version, size, asked.sha256, asked.media_type, dict(sorted(asked.labels.items())), now_ms)
        ledger.keys += 1
        ledger.content_bytes += size
        ledger.header_bytes += blob.header_bytes(asked.key)
        _check_room(ledger, asked.key)
        transaction.put("states", h + asked.key.encode(), _packed(h, list(blob)))
        transaction.put("blobs", _content_key(h, version), asked.content)
    elif found is not None:
        transaction.delete("states", h + asked.key.encode())
    if found is not None:
        transaction.delete("blobs", _content_key(h, found.version))
    ledger.note(asked.id_hash, asked.digest, version, now_ms)
    _write_ledger(transaction, h, ledger)
    head.changes += 1
    head.used_ms = max(head.used_ms, running_ms)
    log.write_head(transaction, h, head, now_ms)
    return Written(version, now_ms, False, head)


def _check_room(ledger: Ledger, key: str) -> None:
    for what, found, limit in (
        ("blobs", ledger.keys, blobs.KEYS_MAX),
        ("bytes of content", ledger.content_bytes, blobs.TOTAL_BYTES_MAX),
        ("bytes of keys, media types and labels", ledger.header_bytes, blobs.HEADER_BYTES_MAX),
    ):
        if found > limit:
            raise Exhausted(
                "STATE_FULL",
                f"With {key!r} there would be {found} {what}; the limit is {limit}.",
                {"key": key, "found": str(found), "limit": str(limit)},
                [("key", f"{found} {what} in all, over the limit of {limit}")],
            )


def put_content(transaction: Transaction, h: bytes, key: str, version: int, content: bytes) -> bool:
    """Keep content that was fetched from the cloud tier; False if the blob is another by now, or another node's."""
    head = log.read_head(transaction, h)
    blob = read_blob(transaction, h, key)
    if head is None or head.phase != PHASE_OWNED or blob is None or blob.version != version:
        return False
    transaction.put("blobs", _content_key(h, version), content)
    return True


def take_rescued(
    transaction: Transaction, h: bytes, rescue: blobs.Rescue, contents: Mapping[int, bytes], now_ms: int
) -> bool:
    """Put what a fenced node had acknowledged into the rows of a session that this node owns; whether there was any.

    contents: by version. Versions and times stay as they were acknowledged. Where there is no room, or a content is not
    at hand, nothing is taken, and what may be missing is still said. Raises Corrupt.
    """
    head = log.read_head(transaction, h)
    assert head is not None
    ledger = read_ledger(transaction, h) or Ledger()
    if rescue.is_moot(ledger):
        return False
    standing = dict(read_blobs(transaction, h))
    taken = rescue.taken({key: blob.version for key, blob in standing.items()})
    after = dict(standing)
    for key, row in taken:
        after.pop(key, None)
        if row is not None:
            after[key] = blobs.blob_of(row)
    ledger.keys, ledger.content_bytes = len(after), sum(blob.size for blob in after.values())
    ledger.header_bytes = sum(blob.header_bytes(key) for key, blob in after.items())
    if ledger.keys > blobs.KEYS_MAX or ledger.content_bytes > blobs.TOTAL_BYTES_MAX:
        return False
    if ledger.header_bytes > blobs.HEADER_BYTES_MAX or any(row and int(row[1]) not in contents for _, row in taken):
        return False
    for key, row in taken:
        if key in standing:
            transaction.delete("states", h + key.encode())
            transaction.delete("blobs", _content_key(h, standing[key].version))
        if row is not None:
            blob = blobs.blob_of(row)
            transaction.put("states", h + key.encode(), _packed(h, list(blob)))
            transaction.put("blobs", _content_key(h, blob.version), contents[blob.version])
    rescue.join(ledger)
    _write_ledger(transaction, h, ledger)
    head.changes += 1
    log.write_head(transaction, h, head, now_ms)
    return bool(taken)


def hydrate(transaction: Transaction, h: bytes, state_keys: Mapping[str, Any]) -> None:
    """Make the rows say what a manifest says of a session's blobs, without their content. Rows before are gone."""
    if not state_keys:
        return
    _write_ledger(transaction, h, blobs.ledger_of(state_keys))
    for row in blobs.rows(state_keys):
        transaction.put("states", h + str(row[0]).encode(), _packed(h, list(blobs.blob_of(row))))


def accept_loss(transaction: Transaction, h: bytes, settled: Callable[[list[int]], bool]) -> bool:
    """Go on without writes that may be missing; whether that changed anything."""
    ledger = read_ledger(transaction, h)
    if ledger is None or not any(settled(row) and not row[3] for row in ledger.loss):
        return False
    ledger.loss = [[*row[:3], 1] if settled(row) else row for row in ledger.loss]
    _write_ledger(transaction, h, ledger)
    return True


def damage(transaction: Transaction, h: bytes) -> Iterator[str]:
    """What is wrong with the rows of a session's blobs, each as a sentence."""
    try:
        ledger = read_ledger(transaction, h)
    except Corrupt as error:
        yield error.message
        return
    versions: set[int] = set()
    keys = content_bytes = header_bytes = 0
    for key, value in transaction.scan("states", h, h + b"\0"):
        name = key[16:].decode(errors="replace")
        try:
            blob = blob_of_row(h, value)
        except (Corrupt, TypeError, ValueError) as error:
            yield error.message if isinstance(error, Corrupt) else f"the row of blob {name!r} does not decode"
            continue
        keys, content_bytes = keys + 1, content_bytes + blob.size
        header_bytes += blob.header_bytes(name)
        if blob.version in versions or ledger is None or blob.version > ledger.last:
            yield f"the blob {name!r} has version {blob.version}, which was not given to it"
        versions.add(blob.version)
        content = read_content(transaction, h, blob.version)
        if content is not None:
            try:
                check_content(h, name, blob, content)
            except Corrupt as error:
                yield error.message
    counted = (ledger.keys, ledger.content_bytes, ledger.header_bytes) if ledger is not None else (0, 0, 0)
    if counted != (keys, content_bytes, header_bytes):
        yield f"{counted[0]} blobs of {counted[1]} bytes are counted, and there are {keys} of {content_bytes}"
    for key, _ in transaction.scan("blobs", h):
        if int.from_bytes(key[16:], "big") not in versions:
            yield f"there is content of version {int.from_bytes(key[16:], 'big')}, which no blob has"
