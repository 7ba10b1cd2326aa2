"""Blobs beside a session: what the hot tier and the manifest say of them, and the rules for their versions and writes.

It owns the fields of the manifest's `state_keys` and promises that a version is never given out twice. No I/O.

    last     the newest version that was given out, deletions included; it never falls
    writes   the last WRITES_MAX writes, oldest first, 40 bytes each: write_id hash (8), digest of what was asked (16),
             version (8, big-endian; 0 for a deletion that found nothing), when, in ms since 1970 (8, big-endian)
    rows     [key, version, size, sha256 of the content, media type, labels, updated ms, sha256 of the object, its
             stored bytes], ascending by the bytes of their keys; the content is in the object b/<h>/<version>-<sha256>
    loss     rows [epoch, after_version, reason, accepted]: writes acknowledged in that epoch above after_version may
             be missing; once accepted (1) nobody is told

version = max(epoch << 32, last) + 1: an epoch under which acknowledged writes were lost with a hot tier is over, so
none of its versions comes again. Unknown keys of the map, and places behind those above, are carried along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from sessiond.core.manifest import LOSS_ROWS_MAX

CONTENT_BYTES_MAX: Final = 3 * 1024**2
KEY_BYTES_MAX: Final = 256
# Of one session, or of one user.
KEYS_MAX: Final = 128
TOTAL_BYTES_MAX: Final = 64 * 1024**2
# Of all keys, media types and labels together: they travel in every manifest.
HEADER_BYTES_MAX: Final = 64 * 1024
# With what stands beside them, so many fit into one page of the hot tier.
WRITES_MAX: Final = 96
WRITE_BYTES: Final = 40


class Blob(NamedTuple):
    """One blob without its content. sha256: of the content."""

    version: int
    size: int
    sha256: bytes
    media_type: str
    labels: dict[str, str]
    updated_ms: int

    def header_bytes(self, key: str) -> int:
        """What it adds to a manifest, by which HEADER_BYTES_MAX is meant."""
        labels = sum(len(name.encode()) + len(value.encode()) for name, value in self.labels.items())
        return len(key.encode()) + len(self.media_type.encode()) + labels


@dataclass(slots=True)
class Ledger:
    """What is known of all blobs of a session together. Fields as in the module's table; then sums over its rows."""

    last: int = 0
    writes: bytes = b""
    loss: list[list[int]] = field(default_factory=list)
    keys: int = 0
    content_bytes: int = 0
    header_bytes: int = 0

    def next_version(self, epoch: int) -> int:
        """The version of the next write under this epoch."""
        return max(epoch << 32, self.last) + 1

    def note(self, id_hash: bytes, digest: bytes, version: int, now_ms: int) -> None:
        """Remember a write; the oldest is forgotten."""
        entry = id_hash + digest + version.to_bytes(8, "big") + now_ms.to_bytes(8, "big")
        self.writes = (self.writes + entry)[-WRITES_MAX * WRITE_BYTES :]
        self.last = max(self.last, version)


def write_id_hash(h: bytes, write_id: str) -> bytes:
    """8 bytes that stand for a write_id; a match is confirmed by the digest."""
    return hashlib.blake2b(write_id.encode(), digest_size=8, key=h, person=b"write").digest()


def write_digest(hash_key: bytes, key: str, sha256: bytes, media_type: str, labels: Mapping[str, str]) -> bytes:
    """16 bytes over what a write asks for. sha256: of the content; empty for a deletion."""
    digest = hashlib.blake2b(digest_size=16, key=hash_key, person=b"write")
    for text in (key, media_type, *(text for pair in sorted(labels.items()) for text in pair)):
        digest.update(len(text.encode()).to_bytes(4, "big") + text.encode())
    digest.update(sha256)
    return digest.digest()


def find_write(writes: bytes, id_hash: bytes) -> tuple[bytes, int, int] | None:
    """(digest, version, time ms) of a write in such entries, newest first; None if it is not among them."""
    at = writes.rfind(id_hash)
    while at >= 0:
        if at % WRITE_BYTES == 0:
            entry = writes[at : at + WRITE_BYTES]
            return entry[8:24], int.from_bytes(entry[24:32], "big"), int.from_bytes(entry[32:40], "big")
        at = writes.rfind(id_hash, 0, at + len(id_hash) - 1)
    return None


def rows(state_keys: Mapping[str, Any]) -> list[list[Any]]:
    """The rows of a manifest's blobs."""
    return list(state_keys.get("rows", ()))


def blob_of(row: list[Any]) -> Blob:
    """The blob that a manifest's row names."""
    return Blob(int(row[1]), int(row[2]), bytes(row[3]), str(row[4]), dict(row[5]), int(row[6]))


def ledger_of(state_keys: Mapping[str, Any]) -> Ledger:
    """What a manifest says of all blobs together."""
    found = Ledger(
        int(state_keys.get("last", 0)),
        bytes(state_keys.get("writes", b"")),
        [list(row) for row in state_keys.get("loss", ())],
    )
    for row in rows(state_keys):
        found.keys += 1
        found.content_bytes += int(row[2])
        found.header_bytes += blob_of(row).header_bytes(str(row[0]))
    return found


def last_of(state_keys: Mapping[str, Any]) -> int:
    """The newest version that a manifest knows of."""
    return int(state_keys.get("last", 0))


def continues(ours: Ledger | None, state_keys: Mapping[str, Any]) -> bool:
    """Whether a ledger is the manifest's, or one that went on from it: for rows that claim to have written it."""
    ours = ours or Ledger()
    theirs = bytes(state_keys.get("writes", b""))[-WRITE_BYTES:]
    if ours.last < last_of(state_keys):
        return False
    if not theirs or len(ours.writes) == WRITES_MAX * WRITE_BYTES:
        return True
    return any(ours.writes[at : at + WRITE_BYTES] == theirs for at in range(0, len(ours.writes), WRITE_BYTES))


def equals(ours: Ledger | None, state_keys: Mapping[str, Any]) -> bool:
    """Whether a manifest says all that a ledger does."""
    ours, theirs = ours or Ledger(), ledger_of(state_keys)
    return (ours.last, ours.writes, ours.loss) == (theirs.last, theirs.writes, theirs.loss)


def with_loss(state_keys: Mapping[str, Any], loss: list[int] | None) -> dict[str, Any]:
    """The same after its owner was lost. loss: the row of turns that goes with it; None if nothing can be missing."""
    if loss is None:
        return dict(state_keys)
    kept = [list(row) for row in state_keys.get("loss", ())]
    kept.append([loss[0], last_of(state_keys), loss[2], 0])
    while len(kept) > LOSS_ROWS_MAX:
        kept.remove(next((row for row in kept if row[3]), kept[0]))
    return {**state_keys, "loss": kept}


@dataclass(frozen=True, slots=True)
class Rescue:
    """Blobs of a fenced node, as manifests say it. epoch: under which it wrote. before: what it committed last. after:
    what its rows say, their objects in the cloud tier.
    """

    epoch: int
    before: dict[str, Any]
    after: dict[str, Any]

    def is_moot(self, ours: Ledger) -> bool:
        """Whether nothing is to be taken: these writes came to us before, or are of an older disk that was put back."""
        theirs, known = _entries(bytes(self.after.get("writes", b""))), _entries(ours.writes)
        if theirs and theirs[-1] in known:
            return True
        # Of its epoch there is nothing but what itself wrote.
        if any(int.from_bytes(entry[24:32], "big") >> 32 == self.epoch for entry in known if entry not in theirs):
            return True
        missed = any(row[0] == self.epoch for row in ours.loss)
        return not missed and len(known) == WRITES_MAX

    def taken(self, versions: Mapping[str, int]) -> list[tuple[str, list[Any] | None]]:
        """(key, row, or None for a deletion) of what the fenced node wrote over versions that still stand with us.

        versions: ours, by key. What was written since stays: it was written over whatever was lost.
        """
        before = {str(row[0]): row for row in rows(self.before)}
        after = {str(row[0]): row for row in rows(self.after)}
        found: list[tuple[str, list[Any] | None]] = []
        for key in sorted({*before, *after}, key=str.encode):
            was, wrote = (int(side[key][1]) if key in side else 0 for side in (before, after))
            if wrote != was and versions.get(key, 0) == was:
                found.append((key, after.get(key)))
        return found

    def join(self, ours: Ledger) -> None:
        """Have a ledger know of the fenced node's writes, in their order before what was written since."""
        theirs, known = _entries(bytes(self.after.get("writes", b""))), _entries(ours.writes)
        shared = [entry for entry in known if entry in theirs]
        fresh = [entry for entry in theirs if entry not in known]
        since = [entry for entry in known if entry not in theirs]
        ours.writes = b"".join([*shared, *fresh, *since])[-WRITES_MAX * WRITE_BYTES :]
        ours.last = max(ours.last, last_of(self.after))
        ours.loss = [row for row in ours.loss if row[0] != self.epoch]

    def joined(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        """What a manifest says of its blobs with the fenced node's among them."""
        ledger = ledger_of(ours)
        if self.is_moot(ledger):
            return dict(ours)
        standing = {str(row[0]): row for row in rows(ours)}
        for key, row in self.taken({key: int(row[1]) for key, row in standing.items()}):
            if row is None:
                standing.pop(key, None)
            else:
                standing[key] = row
        self.join(ledger)
        kept = sorted(standing.values(), key=lambda row: str(row[0]).encode())
        return {**ours, "last": ledger.last, "writes": ledger.writes, "rows": kept, "loss": ledger.loss}


def _entries(writes: bytes) -> list[bytes]:
    return [writes[at : at + WRITE_BYTES] for at in range(0, len(writes), WRITE_BYTES)]


def may_lack(loss: list[list[int]], version: int = 0) -> list[list[int]]:
    """The losses that a caller must be told of. version: of the blob that is spoken of; 0 for all blobs together.

    What was written under a later epoch was written over whatever was lost.
    """
    return [row for row in loss if not row[3] and version >> 32 <= row[0]]
