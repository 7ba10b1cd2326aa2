"""The manifest: the one small object per session that names its owner, epoch, segments and newest checkpoint.

It owns the manifest's fields and their invariants. It never talks to a store; `envelope` owns the bytes around it.

Payload: first the kept frames (turns before the inline ones that a window needs: instructions, summary), then the
inline frames, the longer of the unsealed tail (below INLINE_TAIL_BYTES_MAX) and the newest INLINE_NEWEST_BYTES.

Meta keys (unknown ones are carried along in `extra` and written back):

    v                1
    tenant session user h          whose it is; h is the session's hash, checked against the object's name
    mutation         rises by one with every write of this manifest
    write_id         8 random bytes of this very write: tells a write of ours from another under the same mutation
    epoch epochs     the present epoch; a row [epoch, incarnation, first_seq, last_mutation] per epoch, newest last
    owner            [incarnation, node, address], or nil once released
    birth            {created_ms, metadata, forked_from, forked_epoch, forked_seq, reset_of}; a fork has more (`forks`)
    policy           the policy as the log and CreateSession left it, {} for defaults
    head head_epoch  the newest turn in the cloud tier: this head is cloud_seq
    state            the fold of the log up to head (see `layout`)
    checkpoints      [[version, state], ...], the newest five, newest last
    turn_ids         24 bytes for each of the last turns: turn_id hash (8), body digest's start (8), seq (8, big-endian)
    segments         rows [epoch, first, last, sha256, stored bytes, cumulative x3 at last, origin h, key id, chain at
                     last], ascending. origin h: empty for the session itself; a fork names its parent here, fetches
                     from its segments, and checks their frames with that hash; its own payload holds only its own turns
                     (of such an object the row may name fewer turns than it holds: those up to where it was forked)
    index            [name, first, last, rows] of the object that older rows were moved to, or nil
    kept kept_bytes  seqs of the kept frames, and their bytes in the payload
    inline_first     seq of the first inline frame; head + 1 if there is none
    loss             rows [epoch, after_seq, reason, accepted]: turns acknowledged in that epoch above after_seq may be
                     missing; once accepted (1) only a caller who had such turns acknowledged is told
    lifecycle        1 active, 2 archived, 3 deleted
    expires_ms       0 for never
    written_ms       when it was written, by the writer's clock
    orphans          rows [name, epoch, first, last, sha256] of objects with turns of a fenced node that are in no log
    state_keys       blobs of StateService, {} for none: {last, writes, rows, loss}; see `blobs`
    pins             rows [fork's h, its id, first, last, pinned at ms]: segments of these turns stay as they are, also
                     behind a tombstone, for as long as the fork needs them; it does while it is pinned itself

Rows only grow at their end: a reader takes the places that it knows and carries the others along. The epoch table keeps
its newest EPOCH_ROWS_MAX rows; whether a write landed is told by write_id, never by rows that may be gone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Final

from sessiond.core import envelope
from sessiond.errors import Corrupt

INLINE_TAIL_BYTES_MAX: Final = 64 * 1024
INLINE_NEWEST_BYTES: Final = 32 * 1024
KEPT_BYTES_MAX: Final = 64 * 1024
TURN_IDS_MAX: Final = 1024
TURN_ID_ENTRY_BYTES: Final = 24
CHECKPOINTS_MAX: Final = 5
SEGMENT_ROWS_MAX: Final = 256
SEGMENT_ROWS_KEPT: Final = 64
EPOCH_ROWS_MAX: Final = 128
LOSS_ROWS_MAX: Final = 16
PINS_MAX: Final = 1024

# The reason of a loss row, equal to MissingReason of context.proto: the owner's hot tier is gone.
LOSS_HOT_TIER: Final = 1

LIFECYCLE_ACTIVE: Final = 1
LIFECYCLE_ARCHIVED: Final = 2
LIFECYCLE_DELETED: Final = 3


@dataclass(slots=True)
class Manifest:
    """One manifest, decoded. Fields as in the module's table; `payload` is kept frames, then inline frames."""

    tenant: str
    session: str
    user: str
    h: bytes
    mutation: int
    write_id: bytes
    epoch: int
    epochs: list[list[Any]]
    owner: list[Any] | None
    birth: dict[str, Any]
    policy: dict[str, Any]
    head: int
    head_epoch: int
    state: bytes
    checkpoints: list[list[Any]]
    turn_ids: bytes
    segments: list[list[Any]]
    index: list[Any] | None
    kept: list[int]
    kept_bytes: int
    inline_first: int
    loss: list[list[int]]
    lifecycle: int
    expires_ms: int
    written_ms: int
    state_keys: dict[str, Any] = field(default_factory=dict)
    orphans: list[Any] = field(default_factory=list)
    pins: list[Any] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    payload: bytes = b""

    @property
    def kept_frames(self) -> bytes:
        """The frames of the seqs in `kept`."""
        return self.payload[: self.kept_bytes]

    @property
    def inline_frames(self) -> bytes:
        """The frames from inline_first to head."""
        return self.payload[self.kept_bytes :]

    @property
    def sealed_seq(self) -> int:
        """The last seq that a segment holds."""
        if self.segments:
            return int(self.segments[-1][2])
        return int(self.index[2]) if self.index else 0


_META = [item.name for item in fields(Manifest) if item.name not in ("payload", "extra")]
_LATER = ("state_keys", "orphans", "pins")


def encode_meta(manifest: Manifest) -> dict[str, Any]:
    """The meta map, unknown keys of a newer writer included."""
    meta: dict[str, Any] = {"v": 1}
    meta.update((name, getattr(manifest, name)) for name in _META)
    return {**manifest.extra, **meta}


def decode_meta(meta: dict[str, Any], payload: bytes, name: str) -> Manifest:
    """A manifest from its meta map. Raises Corrupt CORRUPT_MANIFEST if a field is missing or of the wrong type."""
    rest = dict(meta)
    rest.pop("v", None)
    values: dict[str, Any] = {}
    for item in _META:
        if item in rest:
            values[item] = rest.pop(item)
        elif item not in _LATER:
            raise Corrupt("CORRUPT_MANIFEST", f"The manifest {name} lacks {item!r}.", {"object": name})
    manifest = Manifest(**values, extra=rest, payload=payload)
    if not 0 <= manifest.kept_bytes <= len(payload):
        raise Corrupt("CORRUPT_MANIFEST", f"The manifest {name} has kept bytes out of bounds.", {"object": name})
    return manifest


def seal(manifest: Manifest) -> bytes:
    """The object's bytes."""
    return envelope.seal(envelope.KIND_MANIFEST, encode_meta(manifest), manifest.payload)


def unseal(stored: bytes, name: str, h: bytes) -> Manifest:
    """A manifest from its object. h: the hash that its key names. Raises Corrupt."""
    meta, payload = envelope.unseal(stored, envelope.KIND_MANIFEST, name)
    manifest = decode_meta(meta, payload, name)
    if manifest.h != h:
        raise Corrupt("CORRUPT_MANIFEST", f"The manifest {name} is of another session.", {"object": name})
    return manifest
