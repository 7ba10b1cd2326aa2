"""What a bucket is called by: its identity in bucket.json, and the keys of every kind of object.

It promises that a daemon with another hash key, or of an older format, never starts on a bucket, and that a bucket with
sessions is never given a new key. It lists only where bucket.json is not found.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, Final

from sessiond.errors import Conflict, Corrupt, Denied, Invalid, NotFound, SessiondError, Unavailable
from sessiond.tiers.cloud.store import (
    Ambiguous,
    BucketMissing,
    ObjectNotFound,
    ObjectStore,
    PreconditionLost,
    StoreDamaged,
    StoreDenied,
    StoreError,
)

FORMAT_VERSION: Final = 1
BUCKET_KEY: Final = "bucket.json"
RESTORE: Final = f"Restore {BUCKET_KEY} from a backup: it holds the key of every name."


@dataclass(frozen=True)
class Bucket:
    """A bucket's identity. store_id: 16 bytes. hash_key: 32 bytes or as configured."""

    store_id: bytes
    hash_key: bytes

    def user_hash(self, tenant: str, user: str) -> bytes:
        """16 bytes that stand for a user of a tenant in keys."""
        data = len(tenant.encode()).to_bytes(2, "big") + tenant.encode() + user.encode()
        return hashlib.blake2b(data, digest_size=16, key=self.hash_key, person=b"user").digest()

    def tenant_hash(self, tenant: str) -> bytes:
        """16 bytes that stand for a tenant in keys."""
        return hashlib.blake2b(tenant.encode(), digest_size=16, key=self.hash_key, person=b"tenant").digest()

    def user_prefix(self, tenant: str, user: str | None) -> str:
        """Prefix of the index by user; of the whole tenant without a user."""
        prefix = f"u/{self.tenant_hash(tenant).hex()}/"
        return prefix if user is None else f"{prefix}{self.user_hash(tenant, user).hex()}/"

    def user_index_key(self, tenant: str, user: str, created_ms: int, h: bytes) -> str:
        """Key of a session's row in the index by user; ascending by creation within a user."""
        return f"{self.user_prefix(tenant, user)}{created_ms:012x}-{h.hex()}"

    def users_key(self, tenant: str, user: str, created_ms: int, h: bytes) -> bytes:
        """Key of a session's row in the hot tier's index by user."""
        return self.tenant_hash(tenant) + self.user_hash(tenant, user) + created_ms.to_bytes(8, "big") + h

    def expiry_key(self, tenant: str, day: int, h: bytes) -> str:
        """Key of the row that says that a session expires on a day, counted from 1970."""
        return f"x/{self.tenant_hash(tenant).hex()}/{day:08x}/{h.hex()}"


def manifest_key(h: bytes) -> str:
    """Key of a session's manifest."""
    return f"m/{h.hex()}"


def segment_key(h: bytes, epoch: int, first_seq: int, sha256: bytes) -> str:
    """Key of an immutable segment; names are never used again."""
    return f"s/{h.hex()}/{epoch:08x}-{first_seq:016x}-{sha256.hex()}"


def segment_index_key(h: bytes, mutation: int, sha256: bytes) -> str:
    """Key of the object that a manifest's older segment rows were moved to."""
    return f"s/{h.hex()}/index-{mutation:016x}-{sha256.hex()}"


def orphan_key(h: bytes, epoch: int, first_seq: int, sha256: bytes) -> str:
    """Key of turns that a fenced node had acknowledged and that are in no log."""
    return f"o/{h.hex()}/{epoch:08x}-{first_seq:016x}-{sha256.hex()}"


def blob_key(h: bytes, version: int, sha256: bytes) -> str:
    """Key of one version of a blob; names are never used again."""
    return f"b/{h.hex()}/{version:016x}-{sha256.hex()}"


# What the first part of a key says of the object; see DESIGN.md, "The cloud tier and ownership".
KINDS: Final = {
    BUCKET_KEY: "bucket",
    "m": "manifest",
    "s": "segment",
    "o": "orphan",
    "b": "blob",
    "u": "user",
    "n": "lease",
    "x": "expiry",
    "k": "key",
    "probe": "probe",
}


def object_kind(key: str) -> str:
    """What kind of object has this key, as an operator's rules may name it; `other` if it is none of ours."""
    first, _, rest = key.partition("/")
    if first == "s" and rest.partition("/")[2].startswith("index-"):
        return "index"
    return KINDS.get(first, "other")


def lease_key(node: str) -> str:
    """Key of a node's lease."""
    return f"n/{node}"


# Credentials are renewed by people, or by a side-car in its own time.
DENIED_RETRY_MS: Final = 5_000


def refusal(error: StoreError) -> SessiondError:
    """What a store's error means to whoever asked for a session."""
    where = {"object": error.key, "detail": error.detail}
    if isinstance(error, StoreDenied):
        # It is the node that is refused and not the caller, who may try again once an operator has mended it.
        return Unavailable(
            "STORE_UNAVAILABLE",
            f"The cloud tier refuses this node access to {error.key}: {error.detail}.",
            where,
            retry_after_ms=DENIED_RETRY_MS,
            remedy="The operator of the node has to renew its credentials or mend the bucket's policy; then try again.",
        )
    if isinstance(error, StoreDamaged):
        about = object_kind(error.key)
        reason = "CORRUPT_SEGMENT" if about in ("segment", "index", "orphan") else "CORRUPT_MANIFEST"
        reason = "CORRUPT_BLOB" if about == "blob" else reason
        what = f"The object {error.key} is damaged: {error.detail}."
        return Corrupt(reason, what, where, remedy=RESTORE if error.key == BUCKET_KEY else "")
    if isinstance(error, BucketMissing):
        return Unavailable("STORE_UNAVAILABLE", f"The bucket itself is missing: {error.detail}.", where)
    if isinstance(error, Ambiguous):
        return Unavailable("COMMIT_UNKNOWN", f"The write of {error.key} has no known outcome: {error.detail}.", where)
    if isinstance(error, PreconditionLost):
        return Conflict("EPOCH_LOST", f"Another writer changed {error.key} first.", where)
    return Unavailable(
        "STORE_UNAVAILABLE",
        f"The cloud tier did not answer for {error.key}: {error.detail}.",
        where,
        retry_after_ms=error.retry_after_ms,
    )


def _check_value(hash_key: bytes) -> str:
    return hashlib.blake2b(b"check", digest_size=16, key=hash_key, person=b"hash key").hexdigest()


def _checksum(fields: dict[str, Any]) -> str:
    rest = {key: value for key, value in fields.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_bucket(store: ObjectStore, configured_key: bytes, now_ms: int, *, make: bool = True) -> Bucket:
    """The bucket's identity, made once if there is none. configured_key: empty to use or make the bucket's own.
    make: False refuses with NotFound instead of making one.

    Raises Invalid WRONG_HASH_KEY, Corrupt NEWER_FORMAT or CORRUPT_MANIFEST, and as the store does.
    """
    answer = ""
    for attempt in range(3):
        try:
            stored = store.get(BUCKET_KEY).body
        except ObjectNotFound:
            kept = _any_session(store)
            if kept and attempt == 0:
                continue  # another daemon may have founded it between the two looks
            if kept:
                raise Corrupt(
                    "CORRUPT_MANIFEST",
                    f"{BUCKET_KEY} is missing in {store.url}, which holds sessions, {kept} for one.",
                    {"object": BUCKET_KEY, "store": store.url},
                    remedy=RESTORE,
                ) from None
            if not make:
                raise NotFound("BUCKET_NOT_FOUND", f"There is no {BUCKET_KEY} in {store.url}.") from None
            hash_key = configured_key or os.urandom(32)
            fields: dict[str, Any] = {
                "format": FORMAT_VERSION,
                "store_id": os.urandom(16).hex(),
                "hash_key": None if configured_key else hash_key.hex(),
                "hash_key_check": _check_value(hash_key),
                "created_unix_ms": now_ms,
            }
            fields["checksum"] = _checksum(fields)
            try:
                store.put(BUCKET_KEY, json.dumps(fields, indent=1).encode() + b"\n", if_absent=True)
            except (PreconditionLost, Ambiguous) as error:
                answer = error.detail  # whoever won, the next read tells
            except StoreError as error:
                raise start_refusal(error) from error
            continue
        except StoreError as error:
            raise start_refusal(error) from error
        return _parse(stored, configured_key, store.url)
    raise Unavailable(
        "STORE_UNAVAILABLE",
        f"{BUCKET_KEY} of {store.url} could neither be read nor made; the store's last answer: {answer}.",
        {"object": BUCKET_KEY, "store": store.url, "detail": answer},
    )


def _any_session(store: ObjectStore) -> str:
    """The key of some object of a session; empty if there is none."""
    try:
        return next((row.key for prefix in ("m/", "s/") for row in store.list(prefix, limit=1)), "")
    except StoreError as error:
        raise start_refusal(error) from error


def start_refusal(error: StoreError) -> SessiondError:
    """What a store's error means to whoever starts on it, and could not go on."""
    if isinstance(error, StoreDenied):
        where = {"object": error.key, "detail": error.detail}
        return Denied("STORE_DENIED", f"The cloud tier refuses access to {error.key}: {error.detail}.", where)
    if isinstance(error, BucketMissing):
        return NotFound("BUCKET_NOT_FOUND", f"There is no such bucket: {error.detail}.", {"detail": error.detail})
    return refusal(error)


def check_bytes(stored: bytes, url: str) -> None:
    """Check the bytes of a bucket.json, without its hash key. Raises Corrupt NEWER_FORMAT or CORRUPT_MANIFEST."""
    _fields(stored, url)


def _fields(stored: bytes, url: str) -> tuple[bytes, bytes, str]:
    """(store_id, hash key kept in it, check value of the hash key)."""
    where = {"object": BUCKET_KEY, "store": url}
    try:
        fields = json.loads(stored)
        version, checksum = int(fields["format"]), str(fields["checksum"])
        if version <= FORMAT_VERSION and _checksum(fields) != checksum:
            raise ValueError("its checksum does not match")
        store_id = bytes.fromhex(fields["store_id"])
        kept_key = bytes.fromhex(fields["hash_key"] or "")
        check = str(fields["hash_key_check"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        what = f"The object {BUCKET_KEY} of {url} is damaged: {error}."
        raise Corrupt("CORRUPT_MANIFEST", what, where, remedy=RESTORE) from error
    if version > FORMAT_VERSION:
        raise Corrupt(
            "NEWER_FORMAT", f"The bucket {url} has format {version}; this release reads {FORMAT_VERSION}.", where
        )
    return store_id, kept_key, check


def _parse(stored: bytes, configured_key: bytes, url: str) -> Bucket:
    store_id, kept_key, check = _fields(stored, url)
    hash_key = configured_key or kept_key
    if not hash_key or _check_value(hash_key) != check:
        what = "needs a hash_key in the configuration" if not hash_key else "was made with another hash key"
        where = {"object": BUCKET_KEY, "store": url}
        raise Invalid("WRONG_HASH_KEY", f"The bucket {url} {what}.", where, [("hash_key", what)])
    return Bucket(store_id, hash_key)
