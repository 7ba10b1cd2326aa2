"""`sessiond repair`: moves what is damaged aside, so that the rest works again, and says what it moved.

It promises that a durable copy exists before anything is removed, that what is sound is left alone, and that manifests,
segments, orphans and blobs are never touched: those have no other source, so they are only named, with what to do.

1. A hot tier that can't be trusted as a whole: its folder is renamed to `hot.aside-<UTC>`.
2. A session whose rows are damaged: all of them go into one file `data_dir/aside/<UTC>-<hash>.rows`, then out of LMDB.
   Where the head row is sound and nothing was unflushed, it stays as that of a released session: nothing is missing.
   Otherwise the next resume takes the session from the cloud tier and says PARTIAL.
3. Rows of the indexes in the cloud tier, and the lease object of this node: copied to `aside/<key>`, then made again
   from the manifest, or removed.

A file of rows is an envelope of kind 9 (see core/envelope.py). Its meta names the session and when it was moved, its
payload is a MessagePack map: table -> [[key, value], ...], exactly as they stood in LMDB. `sessiond dump` reads it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgpack

from sessiond import core, offline
from sessiond.config import Settings
from sessiond.core import blobs as blob_rules
from sessiond.core import envelope, rules
from sessiond.core import state as states
from sessiond.core.expiry import day_of
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_DELETED, Manifest
from sessiond.errors import Corrupt, SessiondError, Unavailable
from sessiond.tiers.blobs import fetch, object_key
from sessiond.tiers.cloud.bucket import Bucket, lease_key, manifest_key, start_refusal
from sessiond.tiers.cloud.lease import STANDSTILL_LEASES
from sessiond.tiers.cloud.store import ObjectNotFound, ObjectStore, StoreError
from sessiond.tiers.hot import log
from sessiond.tiers.hot.datafile import require_unused
from sessiond.tiers.hot.environment import Environment, Reader, Transaction
from sessiond.tiers.hot.rows import PHASE_RELEASED, Head, decode_head, wrap
from sessiond.tiers.hot.survey import SESSION_TABLES, Survey, next_frame, survey
from sessiond.tiers.hydrate import Segments, load

# Of one file of rows; an envelope holds 128 MiB.
ROWS_FILE_BYTES_MAX: Final = 64 * 1024**2
# What lies under these in the cloud tier can be made from manifests, or from a daemon's start.
DERIVED: Final = {"u/": envelope.KIND_USER_INDEX, "x/": envelope.KIND_EXPIRY}


@dataclass(slots=True)
class Moved:
    """One thing that was moved aside, or would be. what: hot tier, session, index row, lease."""

    what: str
    name: str
    damage: str
    to: str
    unflushed: list[str] = field(default_factory=list)
    then: str = ""


@dataclass(slots=True)
class Hurt:
    """Something damaged that has no other source and is left where it is."""

    name: str
    damage: str
    remedy: str


@dataclass(slots=True)
class Report:
    """What a repair did. looked: sessions in the hot tier, manifests in the cloud tier."""

    dry_run: bool
    moved: list[Moved] = field(default_factory=list)
    hurt: list[Hurt] = field(default_factory=list)
    looked: dict[str, int] = field(default_factory=lambda: {"hot_sessions": 0, "manifests": 0, "index_rows": 0})


def repair(settings: Settings, dry_run: bool, told: Callable[[str], None] = lambda line: None) -> Report:
    """Repair a stopped node's hot tier, and what of the cloud tier can be made again. told: progress in words.

    Raises Unavailable HOT_TIER_IN_USE or NODE_NAME_IN_USE, Corrupt NEWER_FORMAT, and as the store does.
    """
    report = Report(dry_run)
    require_unused(settings.hot_dir)
    with offline.cloud_tier(settings) as (store, bucket):
        _Cloud(store, bucket, report, told, dry_run).mend_lease(settings)
        _repair_hot(settings, store, bucket, report, told, dry_run)
        _Cloud(store, bucket, report, told, dry_run).mend()
    return report


# The hot tier ---------------------------------------------------------------------------------------------------------


def _repair_hot(
    settings: Settings,
    store: ObjectStore,
    bucket: Bucket,
    report: Report,
    told: Callable[[str], None],
    dry_run: bool,
) -> None:
    hot_dir = settings.hot_dir
    if not (hot_dir / "data.mdb").exists():
        return
    found = survey(hot_dir, lambda sessions: told(f"looked at {sessions} sessions of the hot tier"))
    report.looked["hot_sessions"] = found.sessions
    if found.unusable:
        report.moved.append(_move_hot(settings, store, found, dry_run))
    elif (found.damaged or found.index) and dry_run:
        _plan_rows(hot_dir, found, report)
    elif found.damaged or found.index:
        with (
            offline.hot_tier(settings, bucket) as hot,
            offline.node_name(settings, store, hot) as name,
        ):
            aside = _Aside(hot, store, settings.hot_dir.parent / "aside")
            for h in [*found.damaged, *dict.fromkeys(key[-16:] for key in found.index)]:
                name.still_held()
                damage = found.damaged.get(h, [])
                report.moved.append(aside.move(h, damage) if damage else aside.move_index(h))


def _move_hot(settings: Settings, store: ObjectStore, found: Survey, dry_run: bool) -> Moved:
    then = (
        "The next start makes a new hot tier. Sessions that this node owned come back from the cloud tier and say"
        " PARTIAL; what had not been flushed is in the folder."
    )
    if dry_run:
        to = offline.aside_name(settings.hot_dir)
    else:
        with offline.node_name(settings, store):
            to = offline.move_aside(settings.hot_dir)
    return Moved("hot tier", str(settings.hot_dir), found.unusable, str(to), then=then)


def _plan_rows(hot_dir: Path, found: Survey, report: Report) -> None:
    """What `_Aside` would do."""
    reader = Reader(hot_dir)
    try:
        with reader.read() as transaction:
            for h, damage in found.damaged.items():
                head = _head(transaction, h)
                name = head.session if head else h.hex()
                lost = _unflushed(rows_of(transaction, h), h, head.cloud_seq if head else 0)
                to = str(hot_dir.parent / "aside" / f"<UTC>-{h.hex()}.rows")
                report.moved.append(Moved("session", name, "; ".join(damage), to, lost))
            for key in found.index:
                if key[-16:] not in found.damaged:
                    to = str(hot_dir.parent / "aside" / f"<UTC>-{key[-16:].hex()}.rows")
                    report.moved.append(Moved("index row", key.hex(), "its checksum does not match", to))
    finally:
        reader.close()


def _head(transaction: Transaction, h: bytes) -> Head | None:
    value = transaction.get("heads", h) if len(h) == 16 else None
    with suppress(Corrupt):
        return None if value is None else decode_head(h, value)
    return None


def rows_of(transaction: Transaction, h: bytes) -> dict[str, list[tuple[bytes, bytes]]]:
    """Every row of a session as it stands, by table."""
    rows = {
        table: [(key, bytes(value)) for key, value in transaction.scan(table, h) if key[:16] == h]
        for table in SESSION_TABLES
    }
    rows["users"] = [(key, bytes(value)) for key, value in transaction.scan("users", b"") if key.endswith(h)]
    return {table: found for table, found in rows.items() if found}


def _unflushed(rows: dict[str, list[tuple[bytes, bytes]]], h: bytes, cloud_seq: int) -> list[str]:
    """The turns above cloud_seq that verify still, those behind damage in their row too."""
    seqs: set[int] = set()
    for _, value in rows.get("turns", ()):
        offset: int | None = next_frame(h, value, 0)
        while offset is not None:
            header = core.read_frame(h, value, offset)
            if header.seq > cloud_seq:
                seqs.add(header.seq)
            offset = next_frame(h, value, header.end)
    return [str(seq) for seq in sorted(seqs)]


class _Aside:
    """Moves rows of one environment into files."""

    def __init__(self, hot: Environment, store: ObjectStore, folder: Path) -> None:
        self._hot = hot
        self._store = store
        self._folder = folder

    def move(self, h: bytes, damage: list[str]) -> Moved:
        """Write all rows of a session into a file, then take them out of LMDB."""
        with self._hot.read() as transaction:
            head = _head(transaction, h)
            rows = rows_of(transaction, h)
        cloud_seq = head.cloud_seq if head else self._cloud_seq(h)
        unflushed = _unflushed(rows, h, cloud_seq)
        to = self._write(h, head.session if head else "", rows)
        # A head row that verifies and whose turns are all in the cloud tier proves that nothing is missing.
        whole = head is not None and not unflushed and self._needs_nothing(h, head)

        def operation(transaction: Transaction) -> None:
            for table, found in rows.items():
                for key, _ in found:
                    transaction.delete(table, key)
            if whole and head is not None:
                head.phase, head.tail_row, head.hot_first, head.claim = PHASE_RELEASED, 0, head.head_seq + 1, None
                # Of a deletion that is not over yet, the flusher removes the rest.
                log.write_head(transaction, h, head, time.time_ns() // 1_000_000)

        self._hot.run_blocking(operation)
        if whole and head is not None and head.lifecycle == LIFECYCLE_DELETED:
            then = "It is deleted; the next start removes what is left of it."
        elif whole:
            then = "The next resume takes it from the cloud tier, which has all of it."
        elif unflushed:
            then = (
                f"The next resume takes it from the cloud tier and says PARTIAL. The turns {_ranges(unflushed)} were"
                f" acknowledged and are in no log: sessiond dump --bodies {to} shows them; append them again."
            )
        else:
            then = "The next resume takes it from the cloud tier and says PARTIAL."
        return Moved("session", head.session if head else h.hex(), "; ".join(damage), to, unflushed, then)

    def move_index(self, h: bytes) -> Moved:
        """The same for a session whose row in `users` alone is damaged; it is written again from the head row."""
        with self._hot.read() as transaction:
            head = _head(transaction, h)
            rows = {"users": [(k, bytes(v)) for k, v in transaction.scan("users", b"") if k.endswith(h)]}
        to = self._write(h, head.session if head else "", rows)

        def operation(transaction: Transaction) -> None:
            for key, _ in rows["users"]:
                transaction.delete("users", key)
                if head is not None:
                    transaction.put("users", key, wrap(h, "users", head.session.encode()))

        self._hot.run_blocking(operation)
        then = "It was written again." if head is not None else "It had no session."
        return Moved("index row", head.session if head else h.hex(), "its checksum does not match", to, then=then)

    def _cloud_seq(self, h: bytes) -> int:
        try:
            cold = load(self._store, h)
        except SessiondError:
            return 0
        return cold.manifest.head if cold else 0

    def _needs_nothing(self, h: bytes, head: Head) -> bool:
        """Whether the cloud tier surely has all of a session: the manifest there is the one that the head row knows."""
        if head.lifecycle == LIFECYCLE_DELETED:
            return True
        if head.is_dirty or head.head_seq != head.cloud_seq:
            return False
        try:
            cold = load(self._store, h)
        except SessiondError:
            return False
        if cold is None or cold.manifest.epoch != head.epoch or cold.manifest.head != head.head_seq:
            return False
        return head.head_seq == 0 or states.decode(cold.manifest.state).chain == states.decode(head.state).chain

    def _write(self, h: bytes, session: str, rows: dict[str, list[tuple[bytes, bytes]]]) -> str:
        """The durable file of rows; several where one would be too large."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        offline.settle_folder(self._folder.parent)
        stem = f"{offline.stamp()}-{h.hex()}"
        paths: list[str] = []
        for part in _parts(rows):
            meta = {"v": 1, "h": h, "session": session, "moved_ms": time.time_ns() // 1_000_000}
            packed = msgpack.packb(part, use_bin_type=True)
            assert isinstance(packed, bytes)
            path, number = self._folder / f"{stem}.rows", 1
            while path.exists():
                number += 1
                path = path.with_name(f"{stem}-{number}.rows")
            with open(path, "xb") as file:
                file.write(envelope.seal(envelope.KIND_ROWS, meta, packed))
                file.flush()
                os.fsync(file.fileno())
            paths.append(str(path))
        offline.settle_folder(self._folder)
        return " ".join(paths)


def _parts(rows: dict[str, list[tuple[bytes, bytes]]]) -> Iterator[dict[str, list[tuple[bytes, bytes]]]]:
    part: dict[str, list[tuple[bytes, bytes]]] = {}
    size = 0
    for table, found in rows.items():
        for row in found:
            if size and size + len(row[1]) > ROWS_FILE_BYTES_MAX:
                yield part
                part, size = {}, 0
            part.setdefault(table, []).append(row)
            size += len(row[0]) + len(row[1])
    yield part


def _ranges(seqs: list[str]) -> str:
    numbers = [int(seq) for seq in seqs]
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} to {numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(seqs)


# The cloud tier -------------------------------------------------------------------------------------------------------


def user_index_object(manifest: Manifest) -> bytes:
    """The bytes of a session's row in the index by user, as its creation wrote them."""
    meta = {
        "v": 1,
        "tenant": manifest.tenant,
        "user": manifest.user,
        "session": manifest.session,
        "h": manifest.h,
        "created_ms": int(manifest.birth["created_ms"]),
    }
    return envelope.seal(envelope.KIND_USER_INDEX, meta)


def expiry_object(manifest: Manifest) -> bytes:
    """The bytes of a session's row in the index of what expires, as its owner writes them."""
    meta = {
        "v": 1,
        "tenant": manifest.tenant,
        "session": manifest.session,
        "h": manifest.h,
        "day": day_of(manifest.expires_ms),
    }
    return envelope.seal(envelope.KIND_EXPIRY, meta)


class _Cloud:
    """Mends what can be made again in one bucket, and names what can't."""

    def __init__(
        self, store: ObjectStore, bucket: Bucket, report: Report, told: Callable[[str], None], dry_run: bool
    ) -> None:
        self._store = store
        self._bucket = bucket
        self._report = report
        self._told = told
        self._dry_run = dry_run
        self._segments = Segments(store)
        self._told_at = time.monotonic()

    def mend_lease(self, settings: Settings) -> None:
        """A lease object of this node that does not verify, once it stood still for long enough."""
        key = lease_key(settings.node)
        etag, damage, since = "", "", 0.0
        while True:
            try:
                stored = self._store.get(key)
            except ObjectNotFound:
                return
            except StoreError as error:
                raise start_refusal(error) from error
            try:
                envelope.unseal(stored.body, envelope.KIND_LEASE, key)
                return
            except Corrupt as error:
                if error.reason == "NEWER_FORMAT":
                    raise
                damage = error.message
            if stored.etag != etag:
                etag, since = stored.etag, time.monotonic()
                self._told(f"waiting whether anybody renews {key}")
            elif time.monotonic() - since > STANDSTILL_LEASES * settings.lease_ms / 1000:
                break
            time.sleep(settings.lease_ms / 4000)
        self._move("lease", key, stored.body, damage, "The next start makes a new one.")

    def mend(self) -> None:
        """Look at every manifest, what it names, and the indexes."""
        for row in offline.listed(self._store, "m/"):
            self._report.looked["manifests"] += 1
            self._progress()
            try:
                h = bytes.fromhex(row.key[2:])
            except ValueError:
                continue
            self._mend_session(h)
        for prefix, kind in DERIVED.items():
            for row in offline.listed(self._store, prefix):
                self._report.looked["index_rows"] += 1
                self._progress()
                self._mend_index(row.key, kind)

    def _progress(self) -> None:
        if time.monotonic() - self._told_at > 1:
            self._told_at = time.monotonic()
            looked = self._report.looked
            self._told(f"looked at {looked['manifests']} manifests and {looked['index_rows']} rows of the indexes")

    def _mend_session(self, h: bytes) -> None:
        try:
            cold = load(self._store, h)
        except Corrupt as error:
            self._hurt(manifest_key(h), error, "Restore an older version of this object, or a backup of it.")
            return
        if cold is None or cold.manifest.lifecycle == LIFECYCLE_DELETED:
            return
        manifest = cold.manifest
        for key, body in self._index_rows(manifest).items():
            try:
                self._store.get(key)
            except ObjectNotFound:
                then = "It was made again from the manifest."
                self._report.moved.append(Moved("index row", key, "it is missing", "", then=then))
                if not self._dry_run:
                    self._put(key, body)
            except StoreError as error:
                raise start_refusal(error) from error
        try:
            for row in self._segments.rows(manifest):
                try:
                    self._segments.frames(manifest, row)
                except Corrupt as error:
                    self._hurt_object(error, manifest)
        except Corrupt as error:
            self._hurt_object(error, manifest)
        self._look_at_blobs(manifest)

    def _look_at_blobs(self, manifest: Manifest) -> None:
        for row in blob_rules.rows(manifest.state_keys):
            try:
                fetch(self._store, manifest.h, row)
            except Corrupt as error:
                remedy = (
                    f"Restore this object from an older version or a backup, or write the blob {row[0]!r} of session"
                    f" {manifest.session!r} again; everything else of it can be read."
                )
                self._hurt(object_key(manifest.h, row), error, remedy)

    def _hurt_object(self, error: Corrupt, manifest: Manifest) -> None:
        remedy = (
            f"Restore this object from an older version or a backup; until then the old turns of session"
            f" {manifest.session!r} that it holds can't be read, and everything newer can."
        )
        self._hurt(error.metadata.get("object", manifest_key(manifest.h)), error, remedy)

    def _hurt(self, name: str, error: Corrupt, remedy: str) -> None:
        if error.reason == "NEWER_FORMAT":
            remedy = error.remedy
        self._report.hurt.append(Hurt(name, error.message, remedy))

    def _mend_index(self, key: str, kind: int) -> None:
        try:
            body = self._store.get(key).body
        except ObjectNotFound:
            return  # removed since it was listed
        except StoreError as error:
            raise start_refusal(error) from error
        try:
            envelope.unseal(body, kind, key)
            return
        except Corrupt as error:
            if error.reason == "NEWER_FORMAT":
                return
            damage = error
        try:
            fresh = self._derived(key)
        except Corrupt:
            self._hurt(key, damage, "Restore the session's manifest first, then run this again: it is made from that.")
            return
        then = "It was made again from the manifest." if fresh else "It names no session that needs it."
        self._move("index row", key, body, damage.message, then, fresh)

    def _index_rows(self, manifest: Manifest) -> dict[str, bytes]:
        """The rows of the indexes that a session must have, by key."""
        if rules.is_hidden(manifest.session):
            return {}
        created_ms = int(manifest.birth["created_ms"])
        by_user = self._bucket.user_index_key(manifest.tenant, manifest.user, created_ms, manifest.h)
        rows = {by_user: user_index_object(manifest)}
        if manifest.expires_ms and manifest.lifecycle == LIFECYCLE_ACTIVE:
            day = day_of(manifest.expires_ms)
            rows[self._bucket.expiry_key(manifest.tenant, day, manifest.h)] = expiry_object(manifest)
        return rows

    def _derived(self, key: str) -> bytes | None:
        """What should stand at a key of an index; None if no session is to be found by it. Raises as `load` does."""
        try:
            h = bytes.fromhex(key.rsplit("/", 1)[-1].rsplit("-", 1)[-1])
        except ValueError:
            return None
        cold = load(self._store, h)
        if cold is None or cold.manifest.lifecycle == LIFECYCLE_DELETED:
            return None
        return self._index_rows(cold.manifest).get(key)

    def _move(self, what: str, key: str, body: bytes, damage: str, then: str, fresh: bytes | None = None) -> None:
        """Copy an object to aside/, then replace or remove it."""
        to = f"aside/{key}"
        self._report.moved.append(Moved(what, key, damage, to, then=then))
        if self._dry_run:
            return
        self._put(to, body)
        if fresh is not None:
            self._put(key, fresh)
            return
        try:
            self._store.delete(key)
        except StoreError as error:
            raise start_refusal(error) from error

    def _put(self, key: str, body: bytes) -> None:
        try:
            self._store.put(key, body)
            if self._store.get(key).body != body:
                raise Unavailable("STORE_UNAVAILABLE", f"The cloud tier gave back other bytes for {key} than it took.")
        except StoreError as error:
            raise start_refusal(error) from error
