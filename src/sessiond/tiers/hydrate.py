"""Cold sessions: reading them from the cloud tier, and claiming them for this node's hot tier.

It promises one GET for a window that the manifest holds, and that a session is served hot only after its claim is
committed in both tiers. It never reads a clock and never renews a lease.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from sessiond import core
from sessiond.core import blobs as blob_rules
from sessiond.core import envelope, forks, rules
from sessiond.core import manifest as manifests
from sessiond.core import state as states
from sessiond.core.expiry import day_of, expires_ms
from sessiond.core.layout import Header
from sessiond.core.manifest import (
    EPOCH_ROWS_MAX,
    LIFECYCLE_ACTIVE,
    LIFECYCLE_DELETED,
    LOSS_ROWS_MAX,
    Manifest,
)
from sessiond.errors import Conflict, Corrupt, SessiondError, Unavailable
from sessiond.tiers import blobs
from sessiond.tiers.cloud.bucket import Bucket, manifest_key, orphan_key, refusal, segment_key
from sessiond.tiers.cloud.store import (
    Ambiguous,
    ObjectNotFound,
    ObjectStore,
    PreconditionLost,
    StoreError,
)
from sessiond.tiers.hot import blobs as hot_blobs
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hot.rows import (
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASING,
    Head,
    decode_committed,
    encode_committed,
    encode_head,
    head_from_manifest,
    user_key,
    wrap,
)
from sessiond.tiers.retire import put_expiry_row

# Same bytes are sent again this often before an outcome is reported unknown.
ATTEMPTS_MAX = 4
SEGMENT_BYTES_HELD_MAX = 64 * 1024**2
INDEXES_HELD_MAX = 16
# One request to the store; what a session may gather while the store is away is bounded by the map only.
ORPHAN_BYTES_MAX = 1024**3


@dataclass(frozen=True, slots=True)
class Cold:
    """A session as the cloud tier has it at one moment."""

    manifest: Manifest
    etag: str
    # The node's tenure before the manifest was read (`Lease.tenure`).
    tenure: int = 0


@dataclass(frozen=True)
class Node:
    """Who claims: the incarnation of a hot tier, its node's name and the address that peers reach it at."""

    incarnation: bytes
    name: str
    address: str


class Segments:
    """Reads segments, each verified by name, envelope and frames; holds the newest few in memory."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._held: OrderedDict[tuple[str, bytes, int], bytes] = OrderedDict()
        self._indexes: OrderedDict[str, list[list[Any]]] = OrderedDict()
        self.held_bytes = 0
        self._lock = threading.Lock()

    def rows(self, manifest: Manifest) -> list[list[Any]]:
        """Every segment row of a manifest, those in its index object included. Raises Corrupt, Unavailable."""
        if manifest.index is None:
            return manifest.segments
        name = str(manifest.index[0])
        with self._lock:
            moved = self._indexes.get(name)
        if moved is None:
            stored = self._object(name, name.rsplit("-", 1)[-1])
            moved = envelope.unseal(stored, envelope.KIND_SEGMENT_INDEX, name)[0]["rows"]
            with self._lock:
                self._indexes[name] = moved
                while len(self._indexes) > INDEXES_HELD_MAX:
                    self._indexes.popitem(last=False)
        return [*moved, *manifest.segments]

    def covering(self, manifest: Manifest, seq: int) -> tuple[int, int, bytes]:
        """(first seq, last seq, frames) of the segment that holds a turn, by the manifest as it is read now if a merge
        has replaced the segment since. Raises Corrupt, Unavailable, NotFound SESSION_DELETED.
        """
        try:
            return self._covering(manifest, seq)
        except Corrupt as error:
            if error.reason != "MISSING_SEGMENT":
                raise
            found = load(self._store, manifest.h)
            if found is None or found.manifest.write_id == manifest.write_id:
                raise
        if found.manifest.lifecycle == LIFECYCLE_DELETED:
            raise log.deleted(manifest.session)
        return self._covering(found.manifest, seq)

    def _covering(self, manifest: Manifest, seq: int) -> tuple[int, int, bytes]:
        row = next((row for row in self.rows(manifest) if row[1] <= seq <= row[2]), None)
        if row is None:
            raise Corrupt(
                "MISSING_SEGMENT",
                f"No segment of session {manifest.session!r} holds turn {seq}.",
                {"seq": str(seq), "session_id": manifest.session},
            )
        return int(row[1]), int(row[2]), self.frames(manifest, row)

    def frames(self, manifest: Manifest, row: list[Any]) -> bytes:
        """The frames of one segment's row, those of a parent sealed anew with this session's hash.

        Raises Corrupt CORRUPT_SEGMENT or MISSING_SEGMENT, Unavailable.
        """
        epoch, first, last, sha256 = int(row[0]), int(row[1]), int(row[2]), bytes(row[3])
        origin = bytes(row[8]) or manifest.h
        name = segment_key(origin, epoch, first, sha256)
        key = name, manifest.h, last
        with self._lock:
            held = self._held.get(key)
            if held is not None:
                self._held.move_to_end(key)
                return held
        meta, payload = envelope.unseal(self._object(name, sha256.hex()), envelope.KIND_SEGMENT, name)
        ends_at = int(meta.get("last", 0))
        if (
            meta.get("h") != origin
            or meta.get("first") != first
            or (ends_at != last and not (row[8] and last < ends_at))
        ):
            raise Corrupt(
                "CORRUPT_SEGMENT", f"The segment {name} holds other turns than its name says.", {"object": name}
            )
        headers = core.scan_frames(origin, payload)
        if [header.seq for header in headers] != list(range(first, ends_at + 1)):
            raise Corrupt("CORRUPT_SEGMENT", f"The segment {name} has a gap.", {"object": name})
        if row[8]:
            headers = headers[: last - first + 1]
            if headers[-1].chain != bytes(row[10]):
                raise Corrupt("CORRUPT_SEGMENT", f"The segment {name} is of another history.", {"object": name})
            payload = forks.reseal(manifest.h, payload, headers)
        with self._lock:
            # Another thread may have fetched it meanwhile; what is held once is counted once.
            self.held_bytes += len(payload) - len(self._held.get(key, b""))
            self._held[key] = payload
            while self.held_bytes > SEGMENT_BYTES_HELD_MAX and len(self._held) > 1:
                self.held_bytes -= len(self._held.popitem(last=False)[1])
        return payload

    def _object(self, name: str, sha256: str) -> bytes:
        try:
            stored = self._store.get(name).body
        except ObjectNotFound as error:
            raise Corrupt("MISSING_SEGMENT", f"The object {name} is gone.", {"object": name}) from error
        except StoreError as error:
            raise refusal(error) from error
        if hashlib.sha256(stored).hexdigest() != sha256:
            raise Corrupt("CORRUPT_SEGMENT", f"The object {name} does not match its name's sha256.", {"object": name})
        return stored

    def between(self, manifest: Manifest, first_seq: int, last_seq: int, bytes_max: int) -> tuple[bytes, int]:
        """(frames, last seq) of consecutive turns from first_seq on, about bytes_max at most but at least one turn."""
        pieces: list[bytes] = []
        size, due = 0, first_seq
        while due <= last_seq:
            if due >= manifest.inline_first:
                buffer = manifest.inline_frames
            else:
                _, _, buffer = self.covering(manifest, due)
            for header in core.scan_frames(manifest.h, buffer):
                if header.seq != due or due > last_seq:
                    continue
                length = header.end - header.offset
                if pieces and size + length > bytes_max:
                    return b"".join(pieces), due - 1
                pieces.append(buffer[header.offset : header.end])
                size += length
                due += 1
        return b"".join(pieces), due - 1


def load(store: ObjectStore, h: bytes) -> Cold | None:
    """The session's manifest by one GET; None if there is definitely none. Raises Corrupt, Unavailable, Denied."""
    name = manifest_key(h)
    try:
        stored = store.get(name)
    except ObjectNotFound:
        return None
    except StoreError as error:
        raise refusal(error) from error
    return Cold(manifests.unseal(stored.body, name, h), stored.etag)


def orphan_frames(store: ObjectStore, h: bytes, row: list[Any]) -> bytes:
    """The turns of an orphan, by its row [name, epoch, first, last, sha256]. Raises Corrupt, and as the store does."""
    return read_orphan(store, h, row)[0]


def read_orphan(store: ObjectStore, h: bytes, row: list[Any]) -> tuple[bytes, bytes]:
    """(turns of an orphan, the incarnation whose rows they were). Raises Corrupt, and as the store does."""
    name, _, first, last, sha256 = row
    try:
        body = store.get(str(name)).body
    except ObjectNotFound as error:
        raise Corrupt("MISSING_SEGMENT", f"The orphan {name} is gone.", {"object": str(name)}) from error
    except StoreError as error:
        raise refusal(error) from error
    if hashlib.sha256(body).digest() != bytes(sha256):
        raise Corrupt("CORRUPT_SEGMENT", f"The orphan {name} does not match its name's sha256.", {"object": str(name)})
    meta, frames = envelope.unseal(body, envelope.KIND_ORPHAN, str(name))
    if [header.seq for header in core.scan_frames(h, frames)] != list(range(int(first), int(last) + 1)):
        what = f"The orphan {name} holds other turns than {first} to {last}."
        raise Corrupt("CORRUPT_SEGMENT", what, {"object": str(name)})
    return frames, bytes(meta.get("incarnation", b""))


def indexed_session(store: ObjectStore, key: str) -> str:
    """The session id that a row of the index by user names; empty where the row can't be read either."""
    try:
        meta, _ = envelope.unseal(store.get(key).body, envelope.KIND_USER_INDEX, key)
    except (StoreError, Corrupt):
        return ""
    return str(meta.get("session", ""))


def kept_frame(manifest: Manifest, seq: int) -> tuple[Header, bytes] | None:
    """(header, buffer) of a turn that the manifest itself holds; None if it does not."""
    buffer = manifest.inline_frames if seq >= manifest.inline_first else manifest.kept_frames
    for header in core.scan_frames(manifest.h, buffer):
        if header.seq == seq:
            return header, buffer
    return None


def put_settled(
    store: ObjectStore, h: bytes, manifest: Manifest, etag: str | None, wait: Callable[[float], object]
) -> str:
    """Commit a manifest by one conditional write and return its etag; DESIGN.md, "Commit".

    etag: None to create. The same bytes are sent again after an ambiguous attempt; they landed if the manifest is this
    very write. Raises Conflict EPOCH_LOST when another write stands there, a later one of a successor included,
    Unavailable COMMIT_UNKNOWN when nobody can tell, and as the store does.
    """
    name, body = manifest_key(h), manifests.seal(manifest)
    ambiguous: StoreError | None = None
    for attempt in range(ATTEMPTS_MAX):
        try:
            return store.put(name, body, if_absent=etag is None, if_match=etag)
        except Ambiguous as error:
            ambiguous = error
            wait(0.02 * 2**attempt)
        except PreconditionLost as error:
            if ambiguous is None:
                raise refusal(error) from error
            found = _look_again(store, h, ambiguous)
            if found is not None and is_write(found.manifest, manifest):
                return found.etag
            raise refusal(error) from error
        except StoreError as error:
            raise refusal(ambiguous or error) from error
    assert ambiguous is not None
    found = _look_again(store, h, ambiguous)
    if found is not None and is_write(found.manifest, manifest):
        return found.etag
    raise refusal(ambiguous)


def _look_again(store: ObjectStore, h: bytes, ambiguous: StoreError) -> Cold | None:
    """What stands there after an ambiguous attempt; if that can't be read either, the outcome stays unknown."""
    try:
        return load(store, h)
    except SessiondError as error:
        raise refusal(ambiguous) from error


def is_write(found: Manifest, sent: Manifest) -> bool:
    """Whether the manifest that was found is this very write."""
    return found.epoch == sent.epoch and found.mutation == sent.mutation and found.write_id == sent.write_id


def first_manifest(
    node: Node,
    tenant: str,
    session: str,
    user: str,
    h: bytes,
    birth: dict[str, Any],
    policy: dict[str, Any],
    now_ms: int,
) -> Manifest:
    """The manifest of a session that has no turns yet, owned by this node under epoch 1."""
    return Manifest(
        tenant=tenant,
        session=session,
        user=user,
        h=h,
        mutation=1,
        write_id=os.urandom(8),
        epoch=1,
        epochs=[[1, node.incarnation, 1, 1]],
        owner=[node.incarnation, node.name, node.address],
        birth=birth,
        policy=policy,
        head=0,
        head_epoch=0,
        state=states.genesis(h, birth["metadata"]),
        checkpoints=[],
        turn_ids=b"",
        segments=[],
        index=None,
        kept=[],
        kept_bytes=0,
        inline_first=1,
        loss=[],
        lifecycle=LIFECYCLE_ACTIVE,
        expires_ms=expires_ms(policy, int(birth["created_ms"]), now_ms),
        written_ms=now_ms,
    )


@dataclass(frozen=True, slots=True)
class Rows:
    """Turns to hold hot: single ones (kept_frames), and consecutive ones from first_seq to the head (frames)."""

    kept_frames: bytes
    frames: bytes
    first_seq: int


class Claims:
    """Makes sessions, and takes unowned ones, for this node: intent in LMDB, conditional write, rows in LMDB."""

    def __init__(
        self,
        hot: Environment,
        store: ObjectStore,
        bucket: Bucket,
        node: Node,
        wait: Callable[[float], object],
        tenure: Callable[[], int] = lambda: 0,
        pool: Executor | None = None,
    ) -> None:
        """tenure: how often this node was fenced so far. A claim that was under way across a fence is in doubt."""
        self._hot = hot
        self._store = store
        self._bucket = bucket
        self._node = node
        self._wait = wait
        self._tenure = tenure
        # The index by user and the first manifest are in flight at the same time; see DESIGN.md, "Objects".
        self._pool = pool or ThreadPoolExecutor(max_workers=16, thread_name_prefix="index")

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=True)

    def create(self, manifest: Manifest, rows: Rows | None = None) -> bool:
        """Make a session; False if the cloud tier has one of this name already. Both objects are definite on return.

        rows: turns to hold hot that the manifest does not. Raises Unavailable, Denied, Corrupt; the session then does
        not exist, or a repeated call finishes it.
        """
        h = manifest.h
        tenure: int | None = self._tenure()
        intent = head_from_manifest(manifest, "", manifest.epoch, PHASE_CLAIMING)

        def remember(transaction: Transaction) -> bool:
            known = log.read_head(transaction, h)
            if known is not None and (known.phase != PHASE_CLAIMING or known.claim is not None):
                return False
            if known is None:
                transaction.put("heads", h, encode_head(h, intent))
            return True

        if not self._hot.run_blocking(remember, weight_bytes=1):
            return False
        index = self._pool.submit(self._put_index_rows, manifest)
        try:
            try:
                etag = put_settled(self._store, h, manifest, None, self._wait)
            except Conflict:
                found = load(self._store, h)
                if found is None:
                    # Taken, and not there: the store contradicts itself, and that is not "somebody has this name".
                    what = f"The cloud tier refused to make {manifest_key(h)} as if it were there, and has none."
                    raise Unavailable("STORE_UNAVAILABLE", what, {"object": manifest_key(h)}) from None
                mine = found.manifest.mutation == 1 and self._owns(found.manifest)
                if not mine:
                    self.forget(h)
                    index.result()
                    self._drop_stray_index(manifest, found.manifest)
                    return False
                # Our own earlier attempt, whose answer was lost; what it wrote is what counts, and may lack its index.
                manifest, etag, tenure, rows = found.manifest, found.etag, None, None
                try:
                    self._put_index_rows(manifest)
                except StoreError as error:
                    raise refusal(error) from error
        finally:
            try:
                index.result()
            except StoreError as error:
                raise refusal(error) from error
        if not self._settle(manifest, etag, tenure, rows):
            self._drop_late_index(manifest)
        return True

    def _drop_late_index(self, manifest: Manifest) -> None:
        """Take back rows of the indexes that came to stand after somebody had found the session and deleted it."""
        with suppress(StoreError, SessiondError):
            found = load(self._store, manifest.h)
            if found is not None and found.manifest.lifecycle == LIFECYCLE_DELETED:
                self._store.delete(self._index_key(manifest))
                if manifest.expires_ms:
                    day = day_of(manifest.expires_ms)
                    self._store.delete(self._bucket.expiry_key(manifest.tenant, day, manifest.h))

    def put_object(self, key: str, body: bytes) -> None:
        """Put an object whose name carries its content's hash. Raises as the store does."""
        try:
            self._put_settled(lambda: self._store.put(key, body))
        except StoreError as error:
            raise refusal(error) from error

    def _owns(self, manifest: Manifest) -> bool:
        return manifest.owner is not None and manifest.owner[0] == self._node.incarnation

    def _drop_stray_index(self, manifest: Manifest, found: Manifest) -> None:
        """Take back the row of a creation that came second; a listing would pass over it, and pay for it, for ever."""
        ours = self._index_key(manifest)
        if ours != self._index_key(found) and not rules.is_hidden(manifest.session):
            with suppress(StoreError):
                self._store.delete(ours)

    def _index_key(self, manifest: Manifest) -> str:
        created_ms = int(manifest.birth["created_ms"])
        return self._bucket.user_index_key(manifest.tenant, manifest.user, created_ms, manifest.h)

    def _put_user_index(self, manifest: Manifest) -> None:
        created_ms, key = int(manifest.birth["created_ms"]), self._index_key(manifest)
        meta = {
            "v": 1,
            "tenant": manifest.tenant,
            "user": manifest.user,
            "session": manifest.session,
            "h": manifest.h,
            "created_ms": created_ms,
        }
        body = envelope.seal(envelope.KIND_USER_INDEX, meta)
        self._put_settled(lambda: self._store.put(key, body))

    def _put_index_rows(self, manifest: Manifest) -> None:
        """The rows that name a new session: by its user, and by the day on which it expires."""
        if rules.is_hidden(manifest.session):
            return
        self._put_user_index(manifest)
        if manifest.expires_ms:
            self._put_settled(lambda: put_expiry_row(self._store, self._bucket, manifest))

    def _put_settled(self, put: Callable[[], object]) -> None:
        """Send the same bytes again while nobody can tell whether they landed."""
        for attempt in range(ATTEMPTS_MAX):
            try:
                put()
                return
            except Ambiguous:
                if attempt == ATTEMPTS_MAX - 1:
                    raise
                self._wait(0.02 * 2**attempt)

    def claim(self, cold: Cold, loss: list[int] | None, now_ms: int) -> bool:
        """Take a session that no live node owns; False if another was first or this node holds it already.

        loss: a row to add because its last owner was lost with its hot tier. Raises as the store does.
        """
        old, tenure = cold.manifest, cold.tenure
        h, epoch = old.h, old.epoch + 1
        if old.mutation == 1:
            # Its creation may have been cut short before the rows that name it, by a crash that took the disk as well.
            try:
                self._put_index_rows(old)
            except StoreError as error:
                raise refusal(error) from error
        orphan, rescue = self.put_orphan(h), self.put_fenced_blobs(h)
        state_keys = blob_rules.with_loss(old.state_keys, loss)
        owned = list(old.epochs)
        if owned:
            owned[-1] = [*owned[-1][:3], old.mutation]
        manifest = replace(
            old,
            mutation=old.mutation + 1,
            write_id=os.urandom(8),
            epoch=epoch,
            epochs=[*owned, [epoch, self._node.incarnation, old.head + 1, old.mutation + 1]][-EPOCH_ROWS_MAX:],
            owner=[self._node.incarnation, self._node.name, self._node.address],
            loss=bounded_loss([*old.loss, *([loss] if loss else [])]),
            orphans=[*old.orphans, *([orphan] if orphan else [])],
            state_keys=rescue.joined(state_keys) if rescue is not None else state_keys,
            written_ms=now_ms,
        )

        def remember(transaction: Transaction) -> bool:
            known = log.read_head(transaction, h)
            if known is not None and known.phase in (PHASE_OWNED, PHASE_RELEASING, PHASE_DOUBTED):
                return False
            if known is not None and known.head_seq > known.cloud_seq and not orphan:
                return False  # what this node alone has is never given up
            intent = known or head_from_manifest(old, cold.etag, old.epoch, PHASE_CLAIMING)
            # The third place: these rows hold acknowledged turns or blobs that are nowhere else, until it is settled.
            intent.claim = [epoch, self._node.incarnation, int(orphan is not None or rescue is not None)]
            intent.phase = PHASE_CLAIMING
            transaction.put("heads", h, encode_head(h, intent))
            return True

        if not self._hot.run_blocking(remember):
            return False
        try:
            etag = put_settled(self._store, h, manifest, cold.etag, self._wait)
        except Conflict:
            self.forget(h)
            return False
        self._settle(manifest, etag, tenure)
        return True

    def put_fenced_blobs(self, h: bytes) -> blob_rules.Rescue | None:
        """Bring the content of blobs that only a fenced hot tier has into the cloud tier; None if there are none.

        Raises Unavailable, Corrupt, and as the store does.
        """
        placed: dict[int, list[Any]] = {}
        while True:
            with self._hot.read() as transaction:
                known = log.read_head(transaction, h)
                value = transaction.get("manifests", h)
                if known is None or value is None:
                    return None
                if known.phase != PHASE_FENCED and not is_stranded(known):
                    return None
                base = decode_committed(h, value)
                if blob_rules.equals(hot_blobs.read_ledger(transaction, h), base.state_keys):
                    return None
                pending = blobs.pending(transaction, h, base, placed, blobs.LOOK_BYTES_MAX)
                if not pending.objects:
                    after = blobs.state_keys(transaction, h, base, placed)
                    return blob_rules.Rescue(known.epoch, base.state_keys, after)
            for version, key, body, sha256 in pending.objects:
                self.put_object(key, body)
                placed[version] = [sha256, len(body)]

    def put_orphan(self, h: bytes) -> list[Any] | None:
        """Bring the turns that only a fenced hot tier has into the cloud tier; their row for the manifest, or None.

        Raises Unavailable, Corrupt, and as the store does.
        """
        with self._hot.read() as transaction:
            known = log.read_head(transaction, h)
            if known is None or known.head_seq <= known.cloud_seq or not is_stranded(known):
                return None
            first = known.cloud_seq + 1
            frames, last = log.frames_between(transaction, h, first, known.head_seq, ORPHAN_BYTES_MAX)
        if last < known.head_seq:
            return None  # more than one object holds: kept on the node
        meta = {
            "v": 1,
            "tenant": known.tenant,
            "session": known.session,
            "user": known.user,
            "h": h,
            "epoch": known.epoch,
            "incarnation": self._node.incarnation,
            "first": first,
            "last": last,
        }
        body = envelope.seal(envelope.KIND_ORPHAN, meta, frames)
        sha256 = hashlib.sha256(body).digest()
        key = orphan_key(h, known.epoch, first, sha256)
        try:
            self._store.put(key, body)
        except StoreError as error:
            raise refusal(error) from error
        return [key, known.epoch, first, last, sha256]

    def _settle(self, manifest: Manifest, etag: str, tenure: int | None, rows: Rows | None = None) -> bool:
        """Make the hot tier hold a session that the cloud tier says is ours; False if it knows better by now.

        tenure: the node's when its claim was sent; None for a claim that was sent nobody knows when. If the node was
        fenced since, somebody may have looked at this manifest and be about to take the session: it is in doubt.
        """
        h = manifest.h
        head = head_from_manifest(manifest, etag, manifest.epoch, PHASE_DOUBTED)
        held = rows or Rows(manifest.kept_frames, manifest.inline_frames, manifest.inline_first)

        def operation(transaction: Transaction) -> bool:
            if tenure == self._tenure():
                head.phase = PHASE_OWNED
            known = log.read_head(transaction, h)
            # Only over the intent that this claim left: whatever came in between knows more.
            if known is None or not is_claim_of(known, manifest):
                return False
            log.replace_rows(
                transaction,
                h,
                head,
                held.kept_frames,
                held.frames,
                held.first_seq,
                manifest.turn_ids,
                manifest.checkpoints,
            )
            hot_blobs.hydrate(transaction, h, manifest.state_keys)
            transaction.put("manifests", h, encode_committed(h, manifest))
            log.write_head(transaction, h, head, manifest.written_ms)
            if rules.is_hidden(manifest.session):
                return True
            tenant = self._bucket.tenant_hash(manifest.tenant)
            user = self._bucket.user_hash(manifest.tenant, manifest.user)
            key = user_key(tenant, user, head.created_ms, h)
            transaction.put("users", key, wrap(h, "users", manifest.session.encode()))
            return True

        # Never of no weight: what is left of a full disk is for flush, release and evict.
        return self._hot.run_blocking(operation, weight_bytes=1 + len(held.kept_frames) + len(held.frames))

    def resume_claim(self, cold: Cold, head: Head) -> bool:
        """Finish a claim that a crash cut short after its write had landed; whether it had."""
        manifest = cold.manifest
        if manifest.owner is None or manifest.owner[0] != self._node.incarnation:
            return False
        if not is_claim_of(head, manifest):
            return False
        if head.claim is None:
            # A creation: its rows in the indexes may be missing still.
            try:
                self._put_index_rows(manifest)
            except StoreError as error:
                raise refusal(error) from error
        self._settle(manifest, cold.etag, None)
        return True

    def note_deleted(self, h: bytes) -> None:
        """The cloud tier has a tombstone of this session: what this node still holds of it goes, too."""

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            # A deletion that was only asked for here is not yet the one that stands there.
            if head is not None and not (head.lifecycle == LIFECYCLE_DELETED and head.tombstoned):
                log.mark_deleted(transaction, h, head, head.used_ms)

        self._hot.run_blocking(operation)

    def forget(self, h: bytes) -> None:
        """Drop a claim that was lost, and the rows behind it: the cloud tier has the truth."""

        def operation(transaction: Transaction) -> None:
            known = log.read_head(transaction, h)
            if known is not None and known.phase == PHASE_CLAIMING and has_orphans(known):
                known.phase, known.claim = PHASE_FENCED, None
                transaction.put("heads", h, encode_head(h, known))
            elif known is not None and known.phase == PHASE_CLAIMING:
                log.drop_rows(transaction, h)
                transaction.delete("heads", h)
                transaction.delete("dirty", h)

        self._hot.run_blocking(operation)


def claimed_epoch(head: Head) -> int:
    """The epoch that a claim on its way is for; a creation's is the row's own."""
    return int(head.claim[0]) if head.claim else head.epoch


def is_claim_of(head: Head, manifest: Manifest) -> bool:
    """Whether a manifest of this incarnation is what the claim on its way would have written.

    A creation may have been begun twice, as a session and as a fork: whichever stands there is the session's first.
    """
    if head.phase != PHASE_CLAIMING:
        return False
    return manifest.mutation == 1 if head.claim is None else int(head.claim[0]) == manifest.epoch


def has_orphans(head: Head) -> bool:
    """Whether a claim on its way goes over rows with acknowledged turns that no log has."""
    return bool(head.claim and len(head.claim) > 2 and head.claim[2])


def is_stranded(head: Head) -> bool:
    """Whether these rows may have acknowledged turns or blobs that only a rescue brings into the cloud tier: those of a
    fenced session, or behind a claim over one whose outcome nobody has heard of.
    """
    if head.phase == PHASE_FENCED:
        return head.head_seq > head.cloud_seq or head.changes > head.changes_flushed
    return head.phase == PHASE_CLAIMING and has_orphans(head)


def bounded_loss(rows: list[list[int]]) -> list[list[int]]:
    """At most LOSS_ROWS_MAX rows; accepted ones go first, for somebody has been told."""
    while len(rows) > LOSS_ROWS_MAX:
        oldest = next((row for row in rows if row[3]), rows[0])
        rows = [row for row in rows if row is not oldest]
    return rows
