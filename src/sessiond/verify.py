"""`sessiond verify`: gathers one view per session from both tiers and runs every invariant over it.

It only reads, so it is safe beside a live daemon: what looks wrong is read again before it is reported. It holds one
session and some pages of keys at a time, whatever the bucket's size. It never mends.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from sessiond.config import Settings
from sessiond.core import blobs as blob_rules
from sessiond.core import envelope, forks, invariants, rules
from sessiond.core.expiry import day_of
from sessiond.core.invariants import HotView, View
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, Manifest
from sessiond.errors import Corrupt, NotFound, SessiondError
from sessiond.tiers.blobs import fetch, object_key
from sessiond.tiers.cloud.bucket import Bucket, manifest_key, open_bucket, start_refusal
from sessiond.tiers.cloud.fit import PASSED_KEY
from sessiond.tiers.cloud.open import open_configured
from sessiond.tiers.cloud.store import Listed, ObjectNotFound, ObjectStore, StoreError
from sessiond.tiers.compact import replaced, row_key
from sessiond.tiers.hot import blobs, log
from sessiond.tiers.hot.environment import Reader
from sessiond.tiers.hot.rows import (
    PHASE_OWNED,
    PHASE_RELEASED,
    PHASE_RELEASING,
    Head,
    decode_committed,
    decode_head,
    user_key,
)
from sessiond.tiers.hot.survey import hashes, session_damage, survey
from sessiond.tiers.hydrate import Segments, load
from sessiond.tiers.pins import is_pinned
from sessiond.tiers.retire import first_seq_of

READ_AGAIN_MAX = 3
READ_AGAIN_WAIT_S = 0.3
KEYS_PER_PAGE = 1000
HASHES_PER_READ = 500


@dataclass(frozen=True, slots=True)
class Violation:
    """One invariant that one session breaks. session_id: its hash in hexadecimal where the id can't be read; empty
    for what belongs to no session.
    """

    invariant: str
    session_id: str
    explanation: str


@dataclass(slots=True)
class Report:
    """What was found. garbage: (objects, bytes) that no manifest names; a crash leaves them, and they harm nothing."""

    checked: int = 0
    archived: int = 0
    deleted: int = 0
    garbage: tuple[int, int] = (0, 0)
    violations: list[Violation] = field(default_factory=list)

    def add(self, name: str, found: list[tuple[str, str]]) -> None:
        """Note what is wrong with a session."""
        self.violations += [Violation(invariant, name, explanation) for invariant, explanation in found]


def verify(
    settings: Settings,
    progress: Callable[[int, int], None],
    session: str | None = None,
    tenant: str = "default",
    report: Report | None = None,
) -> list[Violation]:
    """Check every session of a node's hot tier and of its cloud tier, or one; the report's violations.

    progress: called with (sessions checked, bytes that no manifest names). report: where what was found is counted.
    Raises as opening either tier does, and NotFound if the one session is in neither.
    """
    report = report or Report()
    with contextlib.ExitStack() as opened:
        store = open_configured(settings)
        opened.callback(store.close)
        hot: Reader | None = None
        if (settings.hot_dir / "data.mdb").exists():
            # First by a process of its own: LMDB may crash on a damaged page.
            unusable = survey(settings.hot_dir).unusable
            if unusable:
                report.add("", [("I11", f"the hot tier in {settings.hot_dir} can't be trusted: {unusable}")])
            else:
                hot = Reader(settings.hot_dir)
                opened.callback(hot.close)
        bucket = open_bucket(store, bytes.fromhex(settings.hash_key), 0, make=False)
        checker = _Checker(store, bucket, hot, report)
        if session is not None:
            checker.one(rules.session_hash(bucket.hash_key, tenant, session), session)
            progress(report.checked, report.garbage[1])
        else:
            for checked in checker.all():
                progress(checked, report.garbage[1])
            checker.rest()
    return report.violations


def read_orphan(h: bytes, row: list[Any], body: bytes) -> bytes:
    """The frames of an orphan by its manifest's row [name, epoch, first, last, sha256]. Raises Corrupt."""
    name, _, first, last, sha256 = row
    if hashlib.sha256(body).digest() != bytes(sha256):
        raise Corrupt("CORRUPT_SEGMENT", f"The orphan {name} does not match its name's sha256.", {"object": str(name)})
    frames = envelope.unseal(body, envelope.KIND_ORPHAN, str(name))[1]
    if [turn.header.seq for turn in invariants.view_turns(h, frames)] != list(range(first, last + 1)):
        what = f"The orphan {name} holds other turns than {first} to {last}."
        raise Corrupt("CORRUPT_SEGMENT", what, {"object": str(name)})
    return frames


@dataclass(slots=True)
class _Objects:
    """A session's objects beside its manifest, as they were listed."""

    segments: list[Listed] = field(default_factory=list)
    orphans: list[Listed] = field(default_factory=list)
    blobs: list[Listed] = field(default_factory=list)

    def all(self) -> list[Listed]:
        """All of them."""
        return [*self.segments, *self.orphans, *self.blobs]


class _Checker:
    def __init__(self, store: ObjectStore, bucket: Bucket, hot: Reader | None, report: Report | None = None) -> None:
        self._store = store
        self._bucket = bucket
        self._hot = hot
        self._report = report or Report()
        self._segments = Segments(store)
        # Of the session that was looked at last: its lifecycle, and (objects, bytes) that its manifest does not name.
        self._lifecycle = 0
        self._stray = (0, 0)

    def one(self, h: bytes, session: str) -> None:
        """Check one session. Raises NotFound if it is nowhere."""
        if not self._check(h, self._objects(h)):
            raise NotFound("SESSION_NOT_FOUND", f"There is no session {session!r}.", {"session_id": session})

    def all(self) -> Iterator[int]:
        """Check every session, in the order of their hashes; how many were checked so far, after each."""
        for h, objects in self._sessions():
            self._check(h, objects)
            yield self._report.checked

    # Going through both tiers ---------------------------------------------------------------------------------------

    def _sessions(self) -> Iterator[tuple[bytes, _Objects]]:
        """Every session that has anything anywhere, once. All sources come in the order of hashes."""
        nothing: list[Listed] = []
        sources = (
            ((h, 0, nothing) for h in self._hot_hashes()),
            ((h, 1, nothing) for h, _ in self._grouped("m/")),
            ((h, 2, rows) for h, rows in self._grouped("s/")),
            ((h, 3, rows) for h, rows in self._grouped("o/")),
            ((h, 4, rows) for h, rows in self._grouped("b/")),
        )
        for h, found in groupby(heapq.merge(*sources, key=lambda row: row[0]), key=lambda row: row[0]):
            objects = _Objects()
            for _, source, rows in found:
                if source == 2:
                    objects.segments += rows
                elif source == 3:
                    objects.orphans += rows
                elif source == 4:
                    objects.blobs += rows
            yield h, objects

    def _hot_hashes(self) -> Iterator[bytes]:
        """Every session with rows, some at a time: a long read would keep a daemon from using pages again."""
        start: bytes | None = b""
        while self._hot is not None and start is not None:
            batch: list[bytes] = []
            following: bytes | None = None
            with self._hot.read() as transaction:
                for h in hashes(transaction, start):
                    if len(batch) == HASHES_PER_READ:
                        following = h
                        break
                    batch.append(h)
            yield from batch
            start = following

    def _grouped(self, prefix: str) -> Iterator[tuple[bytes, list[Listed]]]:
        """The objects under a prefix by session: those of one are next to one another."""
        for name, rows in groupby(self._listed(prefix), key=lambda row: row.key.split("/")[1]):
            with contextlib.suppress(ValueError):
                yield bytes.fromhex(name), list(rows)

    def _listed(self, prefix: str) -> Iterator[Listed]:
        start_after = ""
        while True:
            try:
                rows = list(self._store.list(prefix, start_after, KEYS_PER_PAGE))
            except StoreError as error:
                raise start_refusal(error) from error
            yield from rows
            if len(rows) < KEYS_PER_PAGE:
                return
            start_after = rows[-1].key

    def _objects(self, h: bytes) -> _Objects:
        return _Objects(*(list(self._listed(f"{first}/{h.hex()}/")) for first in "sob"))

    def _get(self, key: str) -> bytes | None:
        try:
            return self._store.get(key).body
        except ObjectNotFound:
            return None
        except StoreError as error:
            raise start_refusal(error) from error

    # One session ----------------------------------------------------------------------------------------------------

    def _check(self, h: bytes, objects: _Objects) -> bool:
        """Check one session; whether there is anything of it."""
        name: str | None = None
        violations: list[tuple[str, str]] = []
        for attempt in range(READ_AGAIN_MAX):
            name, violations = self._check_once(h, objects)
            if not violations:
                break
            # Between the reads of the two tiers a live daemon may have moved on; what stays wrong is wrong.
            if attempt + 1 < READ_AGAIN_MAX:
                time.sleep(READ_AGAIN_WAIT_S)
                objects = self._objects(h)
        report = self._report
        report.checked += not rules.is_hidden(name or "")
        report.add(name or h.hex(), violations)
        report.archived += self._lifecycle == LIFECYCLE_ARCHIVED
        report.deleted += self._lifecycle == LIFECYCLE_DELETED
        report.garbage = (report.garbage[0] + self._stray[0], report.garbage[1] + self._stray[1])
        return name is not None or bool(violations)

    def _check_once(self, h: bytes, objects: _Objects | None = None) -> tuple[str | None, list[tuple[str, str]]]:
        """(session id, violations) of one look; the id is None if the session is nowhere. objects: listed if None."""
        objects = objects or self._objects(h)
        unreadable: list[str] = []
        self._lifecycle, self._stray = 0, (0, 0)
        head, hot, hot_frames, base = self._read_hot(h, unreadable)
        cloud: Manifest | None = None
        try:
            cold = load(self._store, h)
            cloud = cold.manifest if cold else None
            self._lifecycle = cloud.lifecycle if cloud else 0
        except Corrupt as error:
            unreadable.append(error.message)
        if hot is None:
            # Released, fenced or half claimed: the cloud tier has the truth.
            left, head = head, None
        else:
            left = None
        if cloud is None and head is None:
            if unreadable:
                return None, [("I11", text) for text in unreadable]
            broken = [("I2", text) for text in self._without_manifest(left, objects)]
            return left.session if left and broken else None, broken
        if cloud is not None and cloud.lifecycle == LIFECYCLE_DELETED:
            return self._check_deleted(h, cloud, head or left, objects, unreadable)
        pieces: list[bytes] = []
        checked: dict[int, bytes] = {}
        unlisted: list[str] = []
        if cloud is not None:
            self._read_cloud(cloud, unreadable, pieces, checked)
            self._read_orphans(cloud, unreadable)
            self._read_blobs(cloud, unreadable)
            self._count(cloud, objects)
            unlisted = [*self._unlisted(cloud, unreadable), *self._unpinned(cloud, unreadable)]
        turns = [turn for piece in pieces for turn in self._turns(h, piece, unreadable)]
        for turn in turns:
            checked[turn.header.seq] = turn.header.chain
        if hot is not None:
            first = hot.hot_first
            turns = [turn for turn in turns if turn.header.seq < first]
            turns += [turn for turn in self._turns(h, hot_frames, unreadable) if turn.header.seq >= first]
        if hot is not None and cloud is not None:
            owner = cloud.owner[0] if cloud.owner else b""
            if not owner and head is not None and head.phase == PHASE_RELEASING:
                # A crash came between the store's answer to a release and our row: whose release was it?
                owner = cloud.epochs[-1][1]
            hot.ours = bool(cloud.epoch == hot.epoch and self._hot and owner == self._hot.incarnation)
        manifest = cloud or base
        assert manifest is not None or head is not None
        view = View(
            h=h,
            hash_key=self._bucket.hash_key,
            tenant=head.tenant if head else manifest.tenant if manifest else "",
            session=head.session if head else manifest.session if manifest else "",
            birth_metadata=dict(manifest.birth.get("metadata", {})) if manifest else {},
            log=turns,
            head_seq=head.head_seq if head else manifest.head if manifest else 0,
            state=head.state if head else manifest.state if manifest else b"",
            hot=hot,
            cloud=cloud,
            cloud_checked_seqs=checked,
            unreadable=list(dict.fromkeys(unreadable)),
            unlisted=unlisted,
            root=forks.root_of(manifest.birth, h) if manifest else b"",
        )
        return view.session, list(invariants.check(view))

    def _check_deleted(
        self, h: bytes, tombstone: Manifest, head: Head | None, objects: _Objects, unreadable: list[str]
    ) -> tuple[str | None, list[tuple[str, str]]]:
        """A tombstone stays for ever, and nothing else does, once the node that deleted it has swept."""
        left_over: list[str] = []
        # A head row that says so is on the flusher's list: it removes everything, and itself last.
        if head is None or head.lifecycle != LIFECYCLE_DELETED:
            # What forks name stays for as long as they do.
            pinned_seq = forks.pinned_seq(tombstone.pins)
            left = [row.key for row in objects.all() if not 0 < first_seq_of(row.key) <= pinned_seq]
            left_over += [f"the object {key} is left" for key in left]
            key = self._user_key(tombstone)
            if self._get(key) is not None:
                left_over.append(f"the index by user still names it: {key}")
            # What this node had released before another one deleted the session is a copy that nobody is served from:
            # it goes when the session is asked for here, or when room is needed.
            copy = head is not None and head.phase == PHASE_RELEASED and not head.is_dirty
            if not copy and (head is not None or self._has_rows(h)):
                left_over.append("the hot tier still has rows of it")
        view = View(
            h=h,
            hash_key=self._bucket.hash_key,
            tenant=tombstone.tenant,
            session=tombstone.session,
            birth_metadata={},
            log=[],
            head_seq=tombstone.head,
            state=b"",
            hot=None,
            cloud=tombstone,
            unreadable=unreadable,
            left_over=left_over,
        )
        return view.session, list(invariants.check(view))

    def _has_rows(self, h: bytes) -> bool:
        if self._hot is None:
            return False
        with self._hot.read() as transaction:
            return next(hashes(transaction, h), b"") == h

    def _without_manifest(self, left: Head | None, objects: _Objects) -> Iterator[str]:
        """What should not be where there is no manifest. left: the head row of a session that the node does not own.

        A row in the index by user may stand alone: a creation that was never acknowledged.
        """
        if left is not None and left.phase == PHASE_RELEASED and left.head_seq > 0:
            yield f"the node released it at turn {left.head_seq} and the cloud tier has no manifest of it"
        if objects.segments:
            yield "the cloud tier has segments without a manifest"
        if objects.blobs:
            yield "the cloud tier has blobs without a manifest"

    def _turns(self, h: bytes, frames: bytes, unreadable: list[str]) -> list[invariants.Turn]:
        try:
            return invariants.view_turns(h, frames)
        except Corrupt as error:
            unreadable.append(error.message)
            return []

    def _read_hot(self, h: bytes, unreadable: list[str]) -> tuple[Head | None, HotView | None, bytes, Manifest | None]:
        if self._hot is None:
            return None, None, b"", None
        with self._hot.read() as transaction:
            if next(hashes(transaction, h), b"") != h:
                return None, None, b"", None
            wrong, head = session_damage(transaction, h)
            unreadable += wrong
            if head is None or head.phase not in (PHASE_OWNED, PHASE_RELEASING):
                return head, None, b"", None
            view = HotView(head.epoch, True, True, head.head_seq, head.cloud_seq, head.hot_first, head.state)
            view.is_dirty, view.has_dirty_row = head.is_dirty, transaction.get("dirty", h) is not None
            tenant, user = self._bucket.tenant_hash(head.tenant), self._bucket.user_hash(head.tenant, head.user)
            listed = transaction.get("users", user_key(tenant, user, head.created_ms, h))
            view.is_listed = listed is not None or rules.is_hidden(head.session)
            base: Manifest | None = None
            pieces: list[bytes] = []
            try:
                for key, value in transaction.scan("turns", h):
                    row = bytes(value)
                    first_seq = int.from_bytes(key[16:], "big")
                    view.row_sizes.append((first_seq, len(row), len(invariants.view_turns(h, row))))
                    if first_seq >= head.hot_first:
                        pieces.append(row)
                view.checkpoints = log.checkpoints(transaction, h)
                view.turn_ids = log.turn_ids(transaction, h)
                stored = transaction.get("manifests", h)
                base = decode_committed(h, stored) if stored is not None else None
                view.ledger, view.blobs = blobs.read_ledger(transaction, h), dict(blobs.read_blobs(transaction, h))
                view.blobs_committed = base.state_keys if base is not None else {}
            except SessiondError as error:
                # Most of it was told above, by row.
                if not wrong:
                    unreadable.append(error.message)
            return head, view, b"".join(pieces), base

    def _read_cloud(
        self, manifest: Manifest, unreadable: list[str], pieces: list[bytes], checked: dict[int, bytes]
    ) -> None:
        try:
            for turn in invariants.view_turns(manifest.h, manifest.payload):
                checked[turn.header.seq] = turn.header.chain
            inline_from = manifest.inline_first
            for row in self._segments.rows(manifest):
                frames = self._segments.frames(manifest, row)
                turns = invariants.view_turns(manifest.h, frames)
                for turn in turns:
                    checked[turn.header.seq] = turn.header.chain
                cut = next((turn.header.offset for turn in turns if turn.header.seq >= inline_from), len(frames))
                pieces.append(frames[:cut])
            pieces.append(manifest.inline_frames)
        except SessiondError as error:
            unreadable.append(error.message)

    def _read_orphans(self, manifest: Manifest, unreadable: list[str]) -> None:
        """Turns of a fenced node that the manifest lists: acknowledged, in no log, and nowhere else."""
        for row in manifest.orphans:
            body = self._get(str(row[0]))
            if body is None:
                unreadable.append(f"the orphan {row[0]} with turns {row[2]} to {row[3]} of epoch {row[1]} is gone")
                continue
            try:
                read_orphan(manifest.h, row, body)
            except Corrupt as error:
                unreadable.append(error.message)

    def _read_blobs(self, manifest: Manifest, unreadable: list[str]) -> None:
        """The objects of all blobs that the manifest names."""
        for row in blob_rules.rows(manifest.state_keys):
            try:
                fetch(self._store, manifest.h, row)
            except Corrupt as error:
                unreadable.append(error.message)

    def _count(self, manifest: Manifest, objects: _Objects) -> None:
        """Objects of a session that its manifest does not name: a crash came between object and manifest."""
        try:
            named = {row_key(manifest, row) for row in self._segments.rows(manifest)}
        except SessiondError:
            return  # told already; what can't be read names nothing
        named |= {str(row[0]) for row in manifest.orphans} | {str(row[0]) for row in replaced(manifest)}
        named |= {object_key(manifest.h, row) for row in blob_rules.rows(manifest.state_keys)}
        if manifest.index is not None:
            named.add(str(manifest.index[0]))
        stray = [row for row in objects.all() if row.key not in named]
        self._stray = (len(stray), sum(row.size_bytes for row in stray))

    def _user_key(self, manifest: Manifest) -> str:
        created_ms = int(manifest.birth.get("created_ms", 0))
        return self._bucket.user_index_key(manifest.tenant, manifest.user, created_ms, manifest.h)

    def _unlisted(self, manifest: Manifest, unreadable: list[str]) -> Iterator[str]:
        """Rows of the indexes that this manifest needs."""
        if rules.is_hidden(manifest.session):
            return
        wanted = [(self._user_key(manifest), envelope.KIND_USER_INDEX, "the index by user lacks it")]
        if manifest.expires_ms and manifest.lifecycle == LIFECYCLE_ACTIVE:
            day = day_of(manifest.expires_ms)
            key = self._bucket.expiry_key(manifest.tenant, day, manifest.h)
            wanted.append((key, envelope.KIND_EXPIRY, f"the index of what expires lacks it on day {day}"))
        for key, kind, lacking in wanted:
            body = self._get(key)
            if body is None:
                # The first manifest and its rows are in flight at once: a crash may have come between, before the
                # creation was acknowledged.
                if manifest.mutation > 1:
                    yield f"{lacking}: {key}"
                continue
            try:
                meta = envelope.unseal(body, kind, key)[0]
            except Corrupt as error:
                unreadable.append(error.message)
                continue
            if (meta.get("h"), meta.get("session")) != (manifest.h, manifest.session):
                yield f"the row {key} names another session"

    def _unpinned(self, fork: Manifest, unreadable: list[str]) -> Iterator[str]:
        """A fork whose parent does not know that its segments are needed."""
        parent, seq = forks.parent_of(fork.birth), forks.forked_seq(fork.birth)
        if not parent:
            return
        try:
            found = load(self._store, parent)
        except Corrupt as error:
            unreadable.append(f"the manifest of its parent: {error.message}")
            return
        if found is None or not is_pinned(found.manifest, fork.h, seq):
            yield f"its parent's manifest does not pin turns 1 to {seq} for it: {manifest_key(parent)}"

    # What belongs to no session -------------------------------------------------------------------------------------

    def rest(self) -> None:
        """Leases, the probe's mark, and rows of the expiry index whose session is deleted."""
        for row in self._listed("n/"):
            body = self._get(row.key)
            try:
                if body is not None:
                    envelope.unseal(body, envelope.KIND_LEASE, row.key)
            except Corrupt as error:
                self._report.add("", [("I11", error.message)])
        mark = self._get(PASSED_KEY)
        if mark not in (None, b"1\n"):
            self._report.add("", [("I11", f"the object {PASSED_KEY} is damaged")])
        for row in self._listed("x/"):
            for attempt in range(READ_AGAIN_MAX):
                told = self._stale_expiry(row.key)
                if told is None or attempt + 1 == READ_AGAIN_MAX:
                    break
                time.sleep(READ_AGAIN_WAIT_S)
            if told is not None:
                self._report.add(told[0], [told[1]])

    def _stale_expiry(self, key: str) -> tuple[str, tuple[str, str]] | None:
        """What is wrong with a row of the expiry index, if it is there: (session, (invariant, explanation))."""
        body = self._get(key)
        if body is None:
            return None
        name = key.rsplit("/", 1)[-1]
        try:
            envelope.unseal(body, envelope.KIND_EXPIRY, key)
            cold = load(self._store, bytes.fromhex(name))
        except Corrupt as error:
            return name, ("I11", error.message)
        except ValueError:
            return name, ("I11", f"the object {key} has no name of a row")
        if cold is None or cold.manifest.lifecycle != LIFECYCLE_DELETED:
            return None
        with contextlib.suppress(SessiondError):
            head = self._head(cold.manifest.h)
            if head is not None and head.lifecycle == LIFECYCLE_DELETED:
                return None  # the sweep is on its way
        return cold.manifest.session, ("I13", f"the index of what expires still names it: {key}")

    def _head(self, h: bytes) -> Head | None:
        if self._hot is None:
            return None
        with self._hot.read() as transaction:
            value = transaction.get("heads", h)
            return None if value is None else decode_head(h, value)
