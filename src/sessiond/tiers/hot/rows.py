"""The hot tier's rows: a session's head, and the checks around every value. Never opens a transaction."""

from __future__ import annotations

from typing import Any, Final

import msgpack
import msgspec

from sessiond import core
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_DELETED, Manifest, decode_meta, encode_meta
from sessiond.errors import Corrupt

PHASE_CLAIMING: Final = 1
PHASE_OWNED: Final = 2
PHASE_RELEASING: Final = 3
PHASE_RELEASED: Final = 4
# Another node took the session over; unflushed rows are kept for rescue and never served.
PHASE_FENCED: Final = 5
# This hot tier did not hold its node's lease all along: whether it still owns the session is to be seen.
PHASE_DOUBTED: Final = 6

DURABILITY_EDGE: Final = 1
DURABILITY_CLOUD: Final = 2

IDS_PER_CHUNK: Final = 64

_CRC_BYTES = 4


class Head(msgspec.Struct, array_like=True):
    """One session's head row. New fields are only ever appended, with defaults."""

    tenant: str
    session: str
    user: str
    epoch: int
    phase: int
    head_seq: int
    cloud_seq: int
    mutation: int
    etag: str
    tail_row: int
    hot_first: int
    state: bytes
    policy: dict[str, Any]
    committed_durability: int
    loss: list[list[int]]
    lifecycle: int
    expires_ms: int
    changes: int
    changes_flushed: int
    created_ms: int
    claim: list[Any] | None = None
    # When the newest turn came, or the rows were hydrated: what idle release and eviction go by.
    used_ms: int = 0
    # The exchange, by its first turn, that got its answer last; a second answer to it is no news.
    answered_seq: int = 0
    # The cloud tier is known to have this session's tombstone: only then may its objects go.
    tombstoned: bool = False
    # Versions of the checkpoints that are stored, so that one that is hidden is missed; None in rows of older daemons.
    saved: list[int] | None = None

    @property
    def is_dirty(self) -> bool:
        """Whether the cloud tier lacks something of this session, or has something that a deletion must remove."""
        unflushed = self.head_seq > self.cloud_seq or self.changes > self.changes_flushed
        return unflushed or self.lifecycle == LIFECYCLE_DELETED

    @property
    def min_durability(self) -> int:
        """The least durability at which appends are admitted: a relaxed policy counts only once it is in the cloud."""
        return max(int(self.policy.get("min_durability", 0)), self.committed_durability, DURABILITY_EDGE)


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Head)


def wrap(h: bytes, table: str, payload: bytes) -> bytes:
    """A row's value: checksum, then payload."""
    return core.crc32c(payload, core.crc32c(h + table.encode())).to_bytes(_CRC_BYTES, "little") + payload


def unwrap(h: bytes, table: str, value: bytes | memoryview) -> bytes:
    """The payload of a row. Raises Corrupt CORRUPT_HOT_ROW if its checksum does not match."""
    payload = bytes(value[_CRC_BYTES:])
    if core.crc32c(payload, core.crc32c(h + table.encode())) != int.from_bytes(value[:_CRC_BYTES], "little"):
        raise Corrupt(
            "CORRUPT_HOT_ROW", f"A {table} row of session {h.hex()} does not match its checksum.", {"table": table}
        )
    return payload


def unwrap_text(h: bytes, table: str, value: bytes | memoryview) -> str:
    """The text of a row; empty if its checksum does not match."""
    try:
        return unwrap(h, table, value).decode()
    except (Corrupt, UnicodeDecodeError):
        return ""


def encode_head(h: bytes, head: Head) -> bytes:
    """The head row's value."""
    return wrap(h, "heads", _encoder.encode(head))


def decode_head(h: bytes, value: bytes | memoryview) -> Head:
    """The head row. Raises Corrupt CORRUPT_HOT_ROW."""
    try:
        return _decoder.decode(unwrap(h, "heads", value))
    except msgspec.MsgspecError as error:
        raise Corrupt("CORRUPT_HOT_ROW", f"The head row of session {h.hex()} does not decode: {error}.") from error


def encode_committed(h: bytes, manifest: Manifest) -> bytes:
    """The manifest as last committed, without what the other tables hold: payload, state, checkpoints, turn ids."""
    meta = encode_meta(manifest)
    meta.update(state=b"", checkpoints=[], turn_ids=b"", kept_bytes=0)
    packed = msgpack.packb(meta, use_bin_type=True)
    assert isinstance(packed, bytes)
    return wrap(h, "manifests", packed)


def decode_committed(h: bytes, value: bytes | memoryview | None) -> Manifest:
    """The manifest as last committed. Raises Corrupt, also where the row is missing."""
    if value is None:
        raise Corrupt("CORRUPT_HOT_ROW", f"Session {h.hex()} has a head row and no manifest row.")
    meta = msgpack.unpackb(unwrap(h, "manifests", value), raw=False, strict_map_key=True)
    return decode_meta(meta, b"", h.hex())


def head_from_manifest(manifest: Manifest, etag: str, epoch: int, phase: int) -> Head:
    """The head row of a session that was just read from the cloud tier; nothing of it is in the other tables yet."""
    return Head(
        tenant=manifest.tenant,
        session=manifest.session,
        user=manifest.user,
        epoch=epoch,
        phase=phase,
        head_seq=manifest.head,
        cloud_seq=manifest.head,
        mutation=manifest.mutation,
        etag=etag,
        tail_row=0,
        hot_first=manifest.head + 1,
        state=manifest.state,
        policy=manifest.policy,
        committed_durability=int(manifest.policy.get("min_durability", 0)),
        loss=manifest.loss,
        lifecycle=manifest.lifecycle or LIFECYCLE_ACTIVE,
        expires_ms=manifest.expires_ms,
        changes=0,
        changes_flushed=0,
        created_ms=int(manifest.birth.get("created_ms", 0)),
        used_ms=manifest.written_ms,
    )


def seq_key(h: bytes, seq: int) -> bytes:
    """Key of the row that starts at seq, in turns; of the checkpoint of this version, in checkpoints."""
    return h + seq.to_bytes(8, "big")


def chunk_key(h: bytes, chunk: int) -> bytes:
    """Key of a chunk of turn ids."""
    return h + chunk.to_bytes(4, "big")


def user_key(tenant_hash: bytes, user_hash: bytes, created_ms: int, h: bytes) -> bytes:
    """Key in users: the sessions of a tenant, by user, then by age."""
    return tenant_hash + user_hash + created_ms.to_bytes(8, "big") + h
