"""Hot to cloud: writes what the cloud tier lacks, one conditional write per session and round.

It promises that cloud_seq moves only after a definite commit, that a manifest at our epoch which is ahead of our
rows is reported and never overwritten, and that one session has one flusher at a time. It never changes a turn.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from sessiond.core import blobs as blob_rules
from sessiond.core import forks
from sessiond.core import state as states
from sessiond.core.expiry import day_of
from sessiond.core.layout import SEGMENT_BYTES_MAX
from sessiond.core.manifest import (
    CHECKPOINTS_MAX,
    INLINE_NEWEST_BYTES,
    INLINE_TAIL_BYTES_MAX,
    KEPT_BYTES_MAX,
    LIFECYCLE_ACTIVE,
    LIFECYCLE_DELETED,
    SEGMENT_ROWS_MAX,
    TURN_ID_ENTRY_BYTES,
    TURN_IDS_MAX,
    Manifest,
)
from sessiond.errors import Conflict, Corrupt, SessiondError, Unavailable, reason_of
from sessiond.tiers import blobs
from sessiond.tiers.cloud.bucket import Bucket, blob_key, manifest_key, refusal
from sessiond.tiers.cloud.lease import boot_clock_ms
from sessiond.tiers.cloud.store import Ambiguous, ObjectStore, StoreError
from sessiond.tiers.compact import (
    MERGE_SEGMENTS_OVERDUE,
    REPLACED_KEPT_MS,
    mergeable,
    replaced,
    row_key,
    seal,
    spill,
    with_replaced,
)
from sessiond.tiers.hot import blobs as hot_blobs
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hot.rows import (
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASED,
    PHASE_RELEASING,
    Head,
    decode_committed,
    encode_committed,
    user_key,
)
from sessiond.tiers.hydrate import ATTEMPTS_MAX, Cold, Node, Segments, load, put_settled
from sessiond.tiers.pace import Pace
from sessiond.tiers.pins import let_go
from sessiond.tiers.retire import ended, leaves_row, needs_row, put_expiry_row, tombstone

BACKOFF_FIRST_MS = 200
BACKOFF_LAST_MS = 10_000
# What is due is gathered so many sessions at a time, the longest waiting first; the rest waits for the next time.
DUE_MAX = 4096
DUE_LOW = 256
# Segments of one flush after which more than a tail may travel inline.
SEAL_ROUNDS_MAX = 8
# A session may be flushed so often while it waits for an answer, and once more for each interval that goes by.
WAITING_FLUSHES_MAX = 10
WAITING_REFILL_MS = 600_000
# Objects that one flush of a deleted session removes: where somebody waits, and where nobody does.
REMOVED_URGENT_MAX = 64
REMOVED_MAX = 512
# A flush that takes longer than this waits for a store that says nothing.
SILENT_MS = 3000
# Names of replaced objects that a manifest carries at most.
REPLACED_MAX = 512
# Of these so many may be blobs: one that is written again and again is replaced with every flush.
BLOBS_REPLACED_MAX = 64
# Sessions of which something is remembered between two flushes; beyond it everything is forgotten, at little cost.
REMEMBERED_MAX = 65_536
# Parts of the manifest that are noted in its row here, with a change counted in the head, before they are committed.
NOTED = ("orphans", "pins")
# Refusals that speak of the store, not of one session.
_STORE_REASONS = frozenset(("STORE_UNAVAILABLE", "COMMIT_UNKNOWN", "STORE_DENIED"))


@dataclass(slots=True)
class Flushed:
    """What a flush reached."""

    cloud_seq: int
    wrote: bool
    released: bool
    # False: a deletion is committed, and something that it left behind could not be removed yet.
    complete: bool = True


# The pins of a manifest as they are to be, from those that it has.
Repin = Callable[[list[Any]], list[Any]]


@dataclass(slots=True)
class _Wanted:
    """One request for a flush. unused_since_ms: release only if nothing was appended after that time.

    pins: the manifest's rows for forks as they are to be, from rows as they are; None leaves them.
    """

    release: bool
    future: Future[Flushed]
    unused_since_ms: int | None = None
    pins: Repin | None = None


@dataclass(frozen=True, slots=True)
class Backlog:
    """How the flusher stands. failing_ms: since when the store does not answer, 0 if it does."""

    sessions: int
    oldest_ms: int
    in_flight: int
    width: int
    failing_ms: int
    last_error: str
    commits: int
    merges: int


@dataclass(slots=True)
class _Cut:
    """One consistent look at a session's rows: what the next manifest says, without what is on its way in segments.

    blobs: the objects that it needs first; where there are more of them, the manifest is none yet.
    """

    head: Head
    base: Manifest
    manifest: Manifest
    tail: bytes
    tail_last: int
    blobs: blobs.Pending = field(default_factory=blobs.Pending)


class Flusher:
    """Flushes dirty sessions in the background, and named ones on request."""

    def __init__(
        self,
        hot: Environment,
        store: ObjectStore,
        bucket: Bucket,
        node: Node,
        interval_ms: int,
        threads: int,
        clock_ms: Callable[[], int],
        wait: Callable[[float], object] = time.sleep,
        waiting_ms: int = 0,
        tenure: Callable[[], int | None] = lambda: 0,
        boot_ms: Callable[[], int] = boot_clock_ms,
        pools: tuple[Executor, Executor] | None = None,
    ) -> None:
        """interval_ms: how long a finished exchange waits. waiting_ms: how long one without an answer may, at most.
        tenure: how often this node was fenced so far; None while its lease is not held again. pools: what is merely
        due, and what somebody waits for; None for threads of its own.
        """
        self._hot = hot
        self._store = store
        self._bucket = bucket
        self._node = node
        self._interval_ms = interval_ms
        self._waiting_ms = max(interval_ms, waiting_ms)
        self._clock_ms = clock_ms
        self._boot_ms = boot_ms
        self._wait = wait
        self._tenure = tenure
        self._segments = Segments(store)
        self._pace = Pace(threads)
        # Somebody waits for the second: that must not stand behind everything that is merely due.
        self._pool, self._urgent = pools or (
            ThreadPoolExecutor(max_workers=threads, thread_name_prefix="flush"),
            ThreadPoolExecutor(max_workers=threads, thread_name_prefix="flush-now"),
        )
        self._lock = threading.Lock()
        self._running: set[bytes] = set()
        self._began: dict[bytes, int] = {}
        self._background = 0
        self._due: dict[bytes, None] = {}
        self._wanted: dict[bytes, list[_Wanted]] = {}
        self._not_before: dict[bytes, tuple[int, int]] = {}
        self._seen: dict[bytes, tuple[int, int]] = {}
        self._allowance: dict[bytes, tuple[float, int]] = {}
        self._deleted_names: set[str] = set()
        self._sealed: dict[bytes, list[list[Any]]] = {}
        # Objects of blobs whose manifest did not come to stand, by session and version: [sha256, bytes].
        self._placed: dict[bytes, dict[int, list[Any]]] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.last_error = ""
        self.commits = self.merges = 0

    def start(self) -> None:
        """Begin looking for dirty sessions."""
        self._thread = threading.Thread(target=self._loop, name="flusher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop looking; flushes under way are finished."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
        self._pool.shutdown(wait=True)
        self._urgent.shutdown(wait=True)
        with self._lock:
            left = [wanted for waiting in self._wanted.values() for wanted in waiting]
            self._wanted.clear()
        for wanted in left:
            if wanted.future.set_running_or_notify_cancel():
                wanted.future.set_exception(Unavailable("NODE_DRAINING", "The flusher has stopped."))

    def request(self, h: bytes, release: bool = False, pins: Repin | None = None) -> Future[Flushed]:
        """Flush this session now, and release it if asked. The future has the outcome, or the refusal.

        pins: what to make of the manifest's pins; turns that are pinned are sealed into segments first.
        """
        future: Future[Flushed] = Future()
        with self._lock:
            if self._stopping:
                future.set_exception(Unavailable("NODE_DRAINING", "The flusher has stopped."))
                return future
            if self._pace.refuses(self._boot_ms()):
                # Waiting for one more timeout would tell the caller nothing; the backlog tries all the time.
                what = f"The cloud tier does not answer: {self.last_error}."
                future.set_exception(Unavailable("STORE_UNAVAILABLE", what))
                return future
            # A flush under way may have looked before the caller's turn was committed: it takes another.
            self._wanted.setdefault(h, []).append(_Wanted(release, future, pins=pins))
            if h not in self._running:
                self._running.add(h)
                self._urgent.submit(self._run, h)
        return future

    def release_unused(self, h: bytes, unused_since_ms: int) -> Future[Flushed]:
        """Flush and release a session in the background, unless something was appended after that time."""
        future: Future[Flushed] = Future()
        with self._lock:
            if self._stopping:
                future.set_exception(Unavailable("NODE_DRAINING", "The flusher has stopped."))
                return future
            self._wanted.setdefault(h, []).append(_Wanted(True, future, unused_since_ms))
            if h not in self._running:
                self._due[h] = None
        self._feed()
        return future

    def dirty(self) -> tuple[int, int]:
        """(sessions that the cloud tier lacks something of, ms since the oldest became so)."""
        oldest_ms = 0
        with self._hot.read() as transaction:
            count = transaction.entries("dirty")
            for _, value in transaction.scan("dirty", b""):
                since_ms = log.decode_dirty(value)[0]
                oldest_ms = min(oldest_ms or since_ms, since_ms)
        return count, max(0, self._clock_ms() - oldest_ms) if count else 0

    def backlog(self) -> Backlog:
        """How the flusher stands."""
        sessions, oldest_ms = self.dirty()
        boot_ms = self._boot_ms()
        with self._lock:
            in_flight, began = len(self._running), min(self._began.values(), default=boot_ms)
        failing_ms = boot_ms - self._pace.failing_since_ms if self._pace.failing else 0
        if boot_ms - began > SILENT_MS:
            failing_ms = max(failing_ms, boot_ms - began)  # a store that is silent shows before its first timeout
        width = self._pace.width(boot_ms)
        return Backlog(sessions, oldest_ms, in_flight, width, failing_ms, self.last_error, self.commits, self.merges)

    @property
    def failing(self) -> bool:
        """Whether the store is taken to be down."""
        return self._pace.failing

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(min(self._interval_ms, 1000) / 2000)
            self._wake.clear()
            self.tick()

    def tick(self) -> None:
        """Gather what is due, and begin as much of it as the pace allows."""
        try:
            if len(self._due) < DUE_LOW:
                self._collect()
            self._feed()
        except Exception as error:  # whatever it is, the backlog must go on
            self.last_error = reason_of(error)

    def _collect(self) -> None:
        """Gather the sessions that are due, the longest waiting first: none is passed over for ever."""
        now_ms, boot_ms = self._clock_ms(), self._boot_ms()
        catching_up = self._pace.failing or self._pace.catching_up(boot_ms)
        due: list[tuple[int, bytes]] = []
        seen: dict[bytes, tuple[int, int]] = {}
        with self._hot.read() as transaction:
            for key, value in transaction.scan("dirty", b""):
                since_ms, waiting = log.decode_dirty(value)
                # A wall clock that stepped back or stands still must not hold a flush up: what was found dirty once is
                # due after the interval by the clock of the boot as well.
                known = self._seen.get(key)
                found = known if known is not None and known[0] == since_ms else (since_ms, boot_ms)
                if len(seen) < REMEMBERED_MAX:
                    seen[key] = found
                age_ms = max(now_ms - since_ms, boot_ms - found[1])
                if age_ms < self._interval_ms:
                    continue
                if self._not_before.get(key, (0, 0))[0] > boot_ms:
                    continue
                if waiting and age_ms < self._waiting_ms and not catching_up and not self._spend(key, boot_ms):
                    continue
                due.append((since_ms, key))
        self._seen = seen
        with self._lock:
            for _, key in heapq.nsmallest(DUE_MAX, due):
                if key not in self._running:
                    self._due[key] = None

    def _spend(self, h: bytes, boot_ms: int) -> bool:
        """Whether a session that waits for an answer may be flushed already: a few times, then more and more seldom.

        A turn per half minute would cost a PUT each; two of them in one PUT cost half (bench/README.md, "The bill").
        """
        left, at_ms = self._allowance.get(h, (float(WAITING_FLUSHES_MAX), boot_ms))
        left = min(WAITING_FLUSHES_MAX, left + (boot_ms - at_ms) / WAITING_REFILL_MS)
        if len(self._allowance) >= REMEMBERED_MAX:
            self._allowance.clear()
        if left < 1 or h in self._due:
            return h in self._due
        self._allowance[h] = (left - 1, boot_ms)
        return True

    def _feed(self) -> None:
        """Begin as many of the gathered flushes as the pace allows."""
        with self._lock:
            width = self._pace.width(self._boot_ms())
            while self._due and self._background < width and not self._stopping:
                h = next(iter(self._due))
                del self._due[h]
                if h not in self._running:
                    self._running.add(h)
                    self._background += 1
                    self._pool.submit(self._run_background, h)

    def _run_background(self, h: bytes) -> None:
        try:
            self._run(h)
        finally:
            with self._lock:
                self._background -= 1
            self._feed()

    def _run(self, h: bytes) -> None:
        while True:
            with self._lock:
                waiting = self._wanted.pop(h, [])
            urgent = any(wanted.unused_since_ms is None for wanted in waiting)
            release = any(wanted.release and wanted.unused_since_ms is None for wanted in waiting)
            unused_since_ms = None
            if not release and any(wanted.release for wanted in waiting):
                release = True
                unused_since_ms = min(wanted.unused_since_ms or 0 for wanted in waiting if wanted.release)
            outcome: Flushed | BaseException
            with self._lock:
                self._began[h] = self._boot_ms()
            try:
                repins = [wanted.pins for wanted in waiting if wanted.pins is not None]
                outcome = flushed = self.flush(h, release, unused_since_ms, urgent, repins)
                if flushed.wrote and flushed.complete:
                    self._not_before.pop(h, None)
                    self.last_error = ""
            except BaseException as error:  # whoever waits must hear of anything
                outcome = error
                self._note_failure(h, error)
            for wanted in waiting:
                if not wanted.future.set_running_or_notify_cancel():
                    continue
                if isinstance(outcome, BaseException):
                    wanted.future.set_exception(outcome)
                else:
                    wanted.future.set_result(outcome)
            with self._lock:
                self._began.pop(h, None)
                if h not in self._wanted:
                    self._running.discard(h)
                    return

    def _note_failure(self, h: bytes, error: BaseException) -> None:
        self.last_error = reason_of(error)
        if self.last_error in _STORE_REASONS:
            self._pace.failed(h, self._boot_ms())
        # Another session is tried next: this one's fault may be its own.
        self._back_off(h)

    def _back_off(self, h: bytes) -> None:
        backoff_ms = min(BACKOFF_LAST_MS, 2 * self._not_before.get(h, (0, BACKOFF_FIRST_MS // 2))[1])
        if len(self._not_before) >= REMEMBERED_MAX:
            self._not_before.clear()
        self._not_before[h] = (self._boot_ms() + backoff_ms, backoff_ms)

    def _note_commit(self, h: bytes) -> None:
        self.commits += 1
        if self._pace.succeeded(h, self._boot_ms()):
            self._not_before.clear()
            self._wake.set()

    def flush(
        self,
        h: bytes,
        release: bool = False,
        unused_since_ms: int | None = None,
        urgent: bool = True,
        repins: Sequence[Repin] = (),
    ) -> Flushed:
        """Commit this session's newest state to the cloud tier, and release it if asked. Blocks.

        unused_since_ms: release only if nothing was appended after that time. urgent: somebody waits for it. repins:
        what to make of the manifest's pins, one after the other.
        Raises Unavailable, Denied, Corrupt HISTORY_DIVERGED; the session stays dirty then.
        """
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
        if head is not None and head.phase == PHASE_DOUBTED:
            self.settle_doubt(h)
        if head is not None and head.lifecycle == LIFECYCLE_DELETED:
            return self._delete(h, urgent)
        if not release:
            return self._flush(h, False, urgent, repins)
        before = self._move(h, PHASE_OWNED, PHASE_RELEASING, unused_since_ms)
        if before not in (PHASE_OWNED, PHASE_RELEASING):
            return self._flush(h, False, urgent, repins)
        try:
            return self._flush(h, True, urgent, repins)
        except SessiondError as error:
            # Only whoever began a release may take it back, and only if it surely did not land: while nobody knows, or
            # an earlier one may have landed, the row keeps appends out.
            unknown = error.reason == "COMMIT_UNKNOWN" and error.metadata.get("object") == manifest_key(h)
            if before == PHASE_OWNED and not unknown and error.reason != "EPOCH_FENCED":
                self._move(h, PHASE_RELEASING, PHASE_OWNED)
            raise

    def _delete(self, h: bytes, urgent: bool) -> Flushed:
        """Commit a deletion that the rows ask for, then remove what it leaves behind. Again after any failure."""
        flushed = self._flush(h, True, True)
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
        if head is None or head.lifecycle != LIFECYCLE_DELETED:
            return flushed
        if head.phase != PHASE_RELEASED:
            raise Unavailable(
                "EPOCH_FENCED", f"Session {head.session!r} is another node's.", {"session_id": head.session}
            )
        if not head.tombstoned:
            self._entomb(h, head)
        with self._hot.read() as transaction:
            value = transaction.get("manifests", h)
            known = None if value is None else decode_committed(h, value)
        # The tombstone is definite: what nobody can reach any more may go, in the cloud tier and then here.
        try:
            most = REMOVED_URGENT_MAX if urgent else REMOVED_MAX
            if not let_go(self._store, self._bucket, head, h, most, self._clock_ms(), self._wait, known):
                return Flushed(head.cloud_seq, True, True)  # its row stays dirty: the rest goes in the background
        except SessiondError as error:
            # It is deleted all the same; nor does it say anything about the store's other answers.
            self.last_error = error.reason
            self._back_off(h)
            return Flushed(head.cloud_seq, True, True, False)
        if known is None or known.lifecycle != LIFECYCLE_DELETED:
            with suppress(SessiondError):  # the row is a hint: a sweep of its day finds that nothing is left
                cold = load(self._store, h)
                known = cold.manifest if cold is not None else known
        if known is not None and known.lifecycle == LIFECYCLE_DELETED:
            with suppress(StoreError):
                self._store.delete(self._bucket.expiry_key(known.tenant, day_of(known.written_ms), h))
        users = self._users_key(h, head)

        def operation(transaction: Transaction) -> None:
            found = log.read_head(transaction, h)
            if found is not None and found.tombstoned and found.phase == PHASE_RELEASED:
                log.drop_session(transaction, h, users)

        self._hot.run_blocking(operation)
        return Flushed(head.cloud_seq, True, True)

    def _put_expiry_row(self, manifest: Manifest) -> None:
        for attempt in range(ATTEMPTS_MAX):
            try:
                put_expiry_row(self._store, self._bucket, manifest)
                return
            except Ambiguous as error:
                if attempt == ATTEMPTS_MAX - 1:
                    raise refusal(error) from error
                self._wait(0.02 * 2**attempt)
            except StoreError as error:
                raise refusal(error) from error

    def _entomb(self, h: bytes, head: Head) -> None:
        """Write the tombstone of a session that was released before its deletion was committed, or find it there."""
        cold = load(self._store, h)
        if cold is None:
            what = f"Session {head.session!r} has no manifest."
            raise Corrupt("CORRUPT_MANIFEST", what, {"session_id": head.session, "object": manifest_key(h)})
        manifest = cold.manifest
        if manifest.lifecycle != LIFECYCLE_DELETED:
            if manifest.owner is not None and manifest.owner[0] != self._node.incarnation:
                self._fence(h)
                raise Unavailable(
                    "EPOCH_FENCED", f"Session {head.session!r} is another node's.", {"session_id": head.session}
                )
            stone = ended(manifest, self._node.incarnation, LIFECYCLE_DELETED, None, self._clock_ms())
            self._put_expiry_row(stone)
            put_settled(self._store, h, stone, cold.etag, self._wait)
            self._note_commit(h)
            manifest = stone

        def operation(transaction: Transaction) -> None:
            found = log.read_head(transaction, h)
            if found is not None and found.phase == PHASE_RELEASED:
                transaction.put("manifests", h, encode_committed(h, manifest))
                log.mark_deleted(transaction, h, found, self._clock_ms())

        self._hot.run_blocking(operation)

    def _flush(self, h: bytes, release: bool, urgent: bool, repins: Sequence[Repin] = ()) -> Flushed:
        # Segments of an earlier flush whose manifest did not come to stand are there: sealing again what is longer by
        # now would leave one behind with each failure.
        sealed = self._sealed.get(h, [])
        placed = self._placed.get(h, {})
        looks = 0
        while True:
            # A session that is written to without a pause would be sealed for ever: after some rounds what came in
            # meanwhile travels inline, though it is more than a tail should be.
            inline_max = INLINE_TAIL_BYTES_MAX if len(sealed) < SEAL_ROUNDS_MAX else SEGMENT_BYTES_MAX
            # The same holds for blobs.
            blob_bytes_max = blobs.LOOK_BYTES_MAX if looks < SEAL_ROUNDS_MAX else blob_rules.TOTAL_BYTES_MAX
            cut = self._look(h, sealed, placed, release, inline_max, blob_bytes_max, repins)
            if isinstance(cut, Flushed):
                return cut
            if not cut.tail:
                self._put_blobs(h, cut, placed)
                looks += 1
                if not cut.blobs.more:
                    break
                continue
            sealed.append(self._put_segment(cut))
            if len(self._sealed) >= REMEMBERED_MAX:
                self._sealed.clear()
            self._sealed[h] = sealed
        self._note_replaced_blobs(cut)
        self._merge(cut.manifest, urgent)
        if len(cut.manifest.segments) > SEGMENT_ROWS_MAX:
            self._spill(cut.manifest)
        deletes = cut.manifest.lifecycle == LIFECYCLE_DELETED
        if deletes or needs_row(cut.base, cut.manifest):
            # A node that loses its disk right behind the tombstone can't go on with what it should remove.
            self._put_expiry_row(cut.manifest)
        try:
            etag = put_settled(self._store, h, cut.manifest, cut.head.etag, self._wait)
        except Conflict as lost:
            return self._catch_up(h, cut, lost, release, repins)
        self._sealed.pop(h, None)
        self._note_commit(h)
        self._drop_placed(h, cut.manifest)
        self._settle(h, cut.manifest, etag, cut.head.changes, release)
        day = day_of(cut.base.expires_ms)
        if leaves_row(cut.base, cut.manifest) and not (deletes and day == day_of(cut.manifest.written_ms)):
            with suppress(StoreError):  # the row is a hint: a sweep of its day finds that it is none any more
                self._store.delete(self._bucket.expiry_key(cut.base.tenant, day, h))
        self._delete_replaced(cut.manifest)
        return Flushed(cut.manifest.head, True, release)

    def _merge(self, manifest: Manifest, urgent: bool) -> None:
        """Put one large segment in the place of many small ones, if it is time for that."""
        run = mergeable(manifest.segments, forks.pinned_seq(manifest.pins))
        if run is None or (urgent and run[1] - run[0] < MERGE_SEGMENTS_OVERDUE):
            return
        rows = manifest.segments[run[0] : run[1]]
        try:
            frames = b"".join(self._segments.frames(manifest, row) for row in rows)
            key, body, row = seal(manifest, manifest.epoch, frames)
            self._put_immutable(key, body)
        except SessiondError as error:
            # They stay as they are, and turns go on: another flush may merge them, or verify explains why none can.
            self.last_error = error.reason
            return
        now_ms = self._clock_ms()
        gone = [(row_key(manifest, old), now_ms) for old in rows]
        manifest.segments = [*manifest.segments[: run[0]], row, *manifest.segments[run[1] :]]
        # Where nothing can be deleted the list must end somewhere; what falls off it is listed by verify.
        manifest.extra = with_replaced(manifest, (replaced(manifest) + gone)[-REPLACED_MAX:])
        self.merges += 1

    def _delete_replaced(self, manifest: Manifest) -> None:
        """Delete what merges replaced a while ago. The commit just now proved that the session is still ours."""
        now_ms = self._clock_ms()
        gone = replaced(manifest)
        of_blobs = [name for name, _ in gone if name.startswith("b/")]
        # A manifest must not grow with every write of a blob: the oldest go sooner. Whoever reads one then finds it
        # gone, and reads the manifest again.
        early = frozenset(of_blobs[:-BLOBS_REPLACED_MAX])
        for name, at_ms in gone:
            if (now_ms - at_ms >= REPLACED_KEPT_MS or name in early) and name not in self._deleted_names:
                try:
                    self._store.delete(name)
                except StoreError:
                    return
                if len(self._deleted_names) >= REMEMBERED_MAX:
                    self._deleted_names.clear()
                self._deleted_names.add(name)

    def _move(self, h: bytes, before: int, after: int, unused_since_ms: int | None = None) -> int:
        """Move a session from one phase to another, if it is in the first; the phase that it was in, 0 for none."""

        def operation(transaction: Transaction) -> int:
            head = log.read_head(transaction, h)
            if head is None:
                return 0
            found = head.phase
            if found == before:
                if unused_since_ms is not None and head.used_ms > unused_since_ms:
                    return 0
                head.phase = after
                log.write_head(transaction, h, head, self._clock_ms())
            return found

        return self._hot.run_blocking(operation)

    def _look(
        self,
        h: bytes,
        sealed: list[list[Any]],
        placed: dict[int, list[Any]],
        release: bool,
        inline_max: int,
        blob_bytes_max: int,
        repins: Sequence[Repin],
    ) -> _Cut | Flushed:
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is None or head.phase not in (PHASE_OWNED, PHASE_RELEASING):
                released = head is None or head.phase == PHASE_RELEASED
                return Flushed(head.cloud_seq if head else 0, False, released)
            if not head.is_dirty and not release and not sealed and not repins:
                return Flushed(head.cloud_seq, False, False)
            value = transaction.get("manifests", h)
            if value is None:
                raise Corrupt("CORRUPT_HOT_ROW", f"Session {h.hex()} has a head row and no manifest row.")
            base = decode_committed(h, value)
            pins = base.pins
            for repin in repins:
                pins = repin(pins)
            if not head.is_dirty and not release and not sealed and pins == base.pins:
                return Flushed(head.cloud_seq, False, False)
            if head.lifecycle == LIFECYCLE_DELETED:
                stone = tombstone(replace(base, mutation=head.mutation + 1, write_id=os.urandom(8), head=head.head_seq))
                stone.epochs = [*base.epochs[:-1], [*base.epochs[-1][:3], stone.mutation]]
                stone.written_ms = self._clock_ms()
                return _Cut(head, base, stone, b"", head.head_seq)
            if sealed and (sealed[0][0] != head.epoch or sealed[0][1] != base.sealed_seq + 1):
                sealed.clear()  # of an epoch that is over, or in the manifest by now
            segments = [*base.segments, *sealed]
            first_unsealed = (segments[-1][2] if segments else base.sealed_seq) + 1
            tail, tail_last = b"", first_unsealed - 1
            # What forks name lies in segments that end where they were forked.
            pinned_seq = min(forks.pinned_seq(pins), head.head_seq)
            if first_unsealed <= pinned_seq:
                tail, tail_last = log.frames_between(transaction, h, first_unsealed, pinned_seq, SEGMENT_BYTES_MAX)
            elif first_unsealed <= head.head_seq:
                tail, tail_last = log.frames_between(transaction, h, first_unsealed, head.head_seq, SEGMENT_BYTES_MAX)
                if tail_last == head.head_seq and len(tail) < inline_max:
                    tail = b""
            if tail:
                return _Cut(head, base, base, tail, tail_last)
            pending = blobs.pending(transaction, h, base, placed, blob_bytes_max)
            if pending.more:
                return _Cut(head, base, base, b"", tail_last, pending)
            manifest = self._manifest(transaction, h, head, replace(base, pins=pins), segments, release)
            there = {version: [sha256, len(body)] for version, _, body, sha256 in pending.objects}
            manifest.state_keys = blobs.state_keys(transaction, h, base, {**placed, **there})
            return _Cut(head, base, manifest, b"", tail_last, pending)

    def _manifest(
        self, transaction: Transaction, h: bytes, head: Head, base: Manifest, segments: list[list[Any]], release: bool
    ) -> Manifest:
        first_unsealed = (segments[-1][2] if segments else base.sealed_seq) + 1
        # A parent's turns are in the parent's objects only.
        own_first = forks.forked_seq(base.birth) + 1
        inline, inline_first = log.newest_frames(
            transaction, h, head.head_seq, first_unsealed, INLINE_NEWEST_BYTES, max(head.hot_first, own_first)
        )
        state = states.decode(head.state)
        kept: list[int] = []
        pieces: list[bytes] = []
        for place in (state.instructions, *state.summary):
            if place is None or place[0] >= inline_first or place[0] < own_first:
                continue
            try:
                header, buffer = log.frame_at(transaction, h, place[0])
            except log.HistoryNeeded:
                continue  # too large to be kept before, so it is in its segment only
            frame = bytes(buffer[header.offset : header.end])
            if sum(map(len, pieces)) + len(frame) <= KEPT_BYTES_MAX:
                kept.append(place[0])
                pieces.append(frame)
        # Rows are ascending everywhere else, so here too.
        order = sorted(range(len(kept)), key=kept.__getitem__)
        kept_frames = b"".join(pieces[index] for index in order)
        mutation = head.mutation + 1
        return replace(
            base,
            mutation=mutation,
            write_id=os.urandom(8),
            epochs=[*base.epochs[:-1], [*base.epochs[-1][:3], mutation]],
            owner=None if release else [self._node.incarnation, self._node.name, self._node.address],
            policy=head.policy,
            head=head.head_seq,
            head_epoch=state.epoch,
            state=head.state,
            checkpoints=[list(entry) for entry in log.checkpoints(transaction, h, head.saved)][-CHECKPOINTS_MAX:],
            turn_ids=log.turn_ids(transaction, h, head.head_seq)[-TURN_IDS_MAX * TURN_ID_ENTRY_BYTES :],
            segments=segments,
            kept=sorted(kept),
            kept_bytes=len(kept_frames),
            inline_first=inline_first,
            loss=head.loss,
            lifecycle=head.lifecycle,
            expires_ms=head.expires_ms,
            written_ms=self._clock_ms(),
            payload=kept_frames + inline,
            extra=with_replaced(base, [row for row in replaced(base) if row[0] not in self._deleted_names]),
        )

    def _put_segment(self, cut: _Cut) -> list[Any]:
        """Seal the tail into one immutable object and return its row."""
        key, body, row = seal(cut.base, cut.head.epoch, cut.tail)
        self._put_immutable(key, body)
        return row

    def _put_immutable(self, key: str, body: bytes) -> None:
        # The name carries the content's hash, so writing it twice is writing it once.
        for attempt in range(ATTEMPTS_MAX):
            try:
                self._store.put(key, body)
                return
            except Ambiguous as error:
                if attempt == ATTEMPTS_MAX - 1:
                    raise refusal(error) from error
                self._wait(0.02 * 2**attempt)
            except StoreError as error:
                raise refusal(error) from error

    def _put_blobs(self, h: bytes, cut: _Cut, placed: dict[int, list[Any]]) -> None:
        """Write the objects of blobs that the cut's manifest, or a later look's, will name."""
        for version, key, body, sha256 in cut.blobs.objects:
            self._put_immutable(key, body)
            placed[version] = [sha256, len(body)]
            if len(self._placed) >= REMEMBERED_MAX:
                self._placed.clear()
            self._placed[h] = placed

    def _note_replaced_blobs(self, cut: _Cut) -> None:
        """Have the manifest list the objects that it no longer names, to be deleted later."""
        manifest, now_ms = cut.manifest, self._clock_ms()
        if manifest.lifecycle != LIFECYCLE_DELETED:
            gone = [(key, now_ms) for key in blobs.replaced(cut.base, manifest)]
            if gone:
                manifest.extra = with_replaced(manifest, (replaced(manifest) + gone)[-REPLACED_MAX:])

    def _drop_placed(self, h: bytes, manifest: Manifest) -> None:
        """Remove objects of blobs that were written over before any manifest named them; none can any more."""
        placed = self._placed.pop(h, {})
        named = {int(row[1]) for row in blob_rules.rows(manifest.state_keys)}
        for version, (sha256, _) in placed.items():
            if version not in named:
                with suppress(StoreError):  # verify counts it
                    self._store.delete(blob_key(h, version, sha256))

    def _spill(self, manifest: Manifest) -> None:
        """Move the older segment rows into an index object, so that the manifest stays small."""
        before = manifest.index
        self._put_immutable(*spill(manifest, self._segments.rows(manifest)))
        if before is not None:
            gone = (str(before[0]), self._clock_ms())
            manifest.extra = with_replaced(manifest, [*replaced(manifest), gone])

    def _settle(self, h: bytes, manifest: Manifest, etag: str, changes: int, release: bool) -> None:
        """Write down in LMDB what was committed."""

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is None or head.epoch != manifest.epoch or head.mutation >= manifest.mutation:
                return
            head.cloud_seq = manifest.head
            head.mutation = manifest.mutation
            head.etag = etag
            head.changes_flushed = max(head.changes_flushed, changes)
            head.committed_durability = int(manifest.policy.get("min_durability", 0))
            if manifest.lifecycle == LIFECYCLE_DELETED:
                head.tombstoned = True
            if release:
                # Nothing can be appended while a release is on its way; if something was, it is kept for a later claim.
                head.phase = PHASE_RELEASED if head.head_seq == manifest.head else PHASE_FENCED
            kept = manifest
            if head.changes > changes and manifest.lifecycle != LIFECYCLE_DELETED:
                # What was noted since is in the row, and goes out with the next write.
                noted = decode_committed(h, transaction.get("manifests", h))
                kept = replace(manifest, **{name: getattr(noted, name) for name in NOTED})
            transaction.put("manifests", h, encode_committed(h, kept))
            transaction.delete("dirty", h)
            log.write_head(transaction, h, head, self._clock_ms())

        self._hot.run_blocking(operation)

    def _catch_up(self, h: bytes, cut: _Cut, lost: Conflict, release: bool, repins: Sequence[Repin] = ()) -> Flushed:
        """The manifest is not where our rows say. Either an answer of ours was lost, or somebody else is the owner."""
        try:
            found = load(self._store, h)
        except Unavailable as error:
            if not release:
                raise
            # What stands there may be a successor's, behind a release of ours whose answer was lost.
            raise refusal(Ambiguous(manifest_key(h), error.message)) from error
        if found is None:
            raise lost
        theirs, head = found.manifest, cut.head
        if theirs.epoch == head.epoch and theirs.epochs[-1][1] == self._node.incarnation:
            if not self._is_ours(h, theirs, head):
                # An older disk was put back: the manifest counts from here on, and what only the rows have is kept.
                self._fence(h)
                raise Corrupt(
                    "HISTORY_DIVERGED",
                    f"The manifest of session {head.session!r} is at turn {theirs.head} of our epoch {head.epoch};"
                    f" this node's log does not lead there.",
                    {"session_id": head.session},
                )
            if theirs.mutation <= head.mutation:
                return self._flush_over(h, found, head, release, repins)
            # A crash came between the store's answer and our row: take the answer now, then flush the rest.
            same = (theirs.lifecycle, theirs.policy, theirs.loss) == (head.lifecycle, head.policy, head.loss)
            same = same and all(getattr(theirs, name) == getattr(cut.base, name) for name in NOTED)
            same = same and blob_rules.equals(self._ledger(h), theirs.state_keys)
            changes = head.changes if same else head.changes_flushed
            self._settle(h, theirs, found.etag, changes, theirs.owner is None)
            return self._flush(h, release, True, repins)
        if theirs.epoch > head.epoch:
            self._fence(h, theirs.lifecycle == LIFECYCLE_DELETED)
            raise Unavailable(
                "EPOCH_FENCED",
                f"Session {head.session!r} was taken over under epoch {theirs.epoch}.",
                {"session_id": head.session, "epoch": str(theirs.epoch)},
            )
        raise lost

    def _flush_over(self, h: bytes, found: Cold, head: Head, release: bool, repins: Sequence[Repin] = ()) -> Flushed:
        """Our own manifest stands there, no newer than our rows say, and yet the condition did not hold."""
        name = manifest_key(h)
        if found.etag == head.etag:
            what = f"The cloud tier refused a write of {name} whose condition holds."
            raise Unavailable("STORE_UNAVAILABLE", what, {"object": name})
        if found.manifest.mutation < head.mutation:
            raise Corrupt(
                "HISTORY_DIVERGED",
                f"The manifest of session {head.session!r} is older than the one that this node committed.",
                {"session_id": head.session, "object": name},
                remedy=f"Put back the newest sound version of {name}; the turns are safe on the node's disk.",
            )

        def operation(transaction: Transaction) -> None:
            known = log.read_head(transaction, h)
            if known is not None and known.epoch == head.epoch and known.mutation == head.mutation:
                known.etag = found.etag
                log.write_head(transaction, h, known, self._clock_ms())

        # Somebody put the same bytes back, and the store gave them another etag.
        self._hot.run_blocking(operation)
        return self._flush(h, release, True, repins)

    def _is_ours(self, h: bytes, theirs: Manifest, head: Head) -> bool:
        """Whether our log contains the manifest's as a prefix."""
        if theirs.head > head.head_seq:
            return False
        if theirs.lifecycle == LIFECYCLE_DELETED:
            return True  # a tombstone has no state to compare, and under our epoch nobody else can have written it
        if not blob_rules.continues(self._ledger(h), theirs.state_keys):
            return False
        if theirs.head == 0:
            return True
        chain = states.decode(theirs.state).chain
        if theirs.head == head.head_seq:
            return states.decode(head.state).chain == chain
        try:
            with self._hot.read() as transaction:
                header, _ = log.frame_at(transaction, h, theirs.head)
        except log.HistoryNeeded:
            return theirs.head <= head.cloud_seq  # below the hot rows there is only what was read from the cloud tier
        return header.chain == chain

    def _ledger(self, h: bytes) -> blob_rules.Ledger | None:
        with self._hot.read() as transaction:
            return hot_blobs.read_ledger(transaction, h)

    def settle_doubt(self, h: bytes) -> None:
        """Learn whether a doubted session is still ours: by a write of its manifest, and never by reading it alone.

        Whoever takes sessions from a node that was gone reads the manifest, then the node's lease, and then writes. So
        a manifest that was written after the lease was held again can't be taken by anybody who saw it gone before.
        Raises Unavailable, also while the lease is not held, Corrupt, and as the store does; it stays doubted then.
        """
        tenure = self._tenure()
        if tenure is None:
            raise Unavailable("EPOCH_FENCED", "This node was fenced and does not hold its lease again yet.")
        for _ in range(ATTEMPTS_MAX):
            cold = load(self._store, h)
            with self._hot.read() as transaction:
                head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_DOUBTED:
                return
            try:
                if self._settled(h, head, cold, tenure):
                    return
            except Conflict:
                self._wait(0.02)  # somebody wrote it first: a late write of our own, or whoever takes it
        raise Unavailable("EPOCH_FENCED", f"Session {h.hex()} keeps changing.", {"hash": h.hex()})

    def _settled(self, h: bytes, head: Head, cold: Cold | None, tenure: int) -> bool:
        """One attempt to settle a doubt; False if the node was fenced again meanwhile."""
        manifest = cold.manifest if cold is not None else None
        ours = manifest is not None and (manifest.epoch, manifest.epochs[-1][1]) == (head.epoch, self._node.incarnation)
        if cold is None or manifest is None or not ours:
            self._give_up(h, manifest is not None and manifest.lifecycle == LIFECYCLE_DELETED)
            return True
        if manifest.lifecycle == LIFECYCLE_DELETED:
            self._give_up(h, True)
            return True
        if not self._is_ours(h, manifest, head):
            self._give_up(h, False)  # an older disk was put back: what only the rows have is an orphan
            return True
        phase, etag = PHASE_RELEASED, cold.etag
        if manifest.owner is not None:
            mutation = manifest.mutation + 1
            manifest = replace(
                manifest,
                mutation=mutation,
                write_id=os.urandom(8),
                epochs=[*manifest.epochs[:-1], [*manifest.epochs[-1][:3], mutation]],
                owner=[self._node.incarnation, self._node.name, self._node.address],
                written_ms=self._clock_ms(),
            )
            etag = put_settled(self._store, h, manifest, cold.etag, self._wait)
            phase = PHASE_OWNED
        elif manifest.head != head.head_seq or not blob_rules.equals(self._ledger(h), manifest.state_keys):
            phase = PHASE_FENCED  # released, and yet there is more here: an orphan

        def operation(transaction: Transaction) -> bool:
            known = log.read_head(transaction, h)
            if known is None or known.phase != PHASE_DOUBTED:
                return True
            if self._tenure() != tenure:
                return False
            noted = decode_committed(h, transaction.get("manifests", h))
            same = (manifest.lifecycle, manifest.policy, manifest.loss) == (known.lifecycle, known.policy, known.loss)
            same = same and all(getattr(manifest, name) == getattr(noted, name) for name in NOTED)
            same = same and blob_rules.equals(hot_blobs.read_ledger(transaction, h), manifest.state_keys)
            if same or phase == PHASE_RELEASED:
                known.changes_flushed = known.changes
            kept = manifest if same else replace(manifest, **{name: getattr(noted, name) for name in NOTED})
            known.phase, known.cloud_seq, known.mutation, known.etag = phase, manifest.head, manifest.mutation, etag
            known.committed_durability = int(manifest.policy.get("min_durability", 0))
            transaction.put("manifests", h, encode_committed(h, kept))
            log.write_head(transaction, h, known, self._clock_ms())
            if phase != PHASE_OWNED:
                transaction.delete("dirty", h)
            return True

        return self._hot.run_blocking(operation)

    def _give_up(self, h: bytes, deleted: bool) -> None:
        """A doubted session is another's, or gone."""

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_DOUBTED:
                return
            if deleted:
                log.mark_deleted(transaction, h, head, self._clock_ms())
                return
            head.phase = PHASE_FENCED
            if not head.tombstoned and head.lifecycle == LIFECYCLE_DELETED:
                head.lifecycle = LIFECYCLE_ACTIVE  # what was asked for here did not come to pass
            log.write_head(transaction, h, head, self._clock_ms())
            transaction.delete("dirty", h)

        self._hot.run_blocking(operation)

    def _fence(self, h: bytes, deleted: bool = False) -> None:
        """Give up a session that is another's now. deleted: it was deleted there, and so its rows go here."""

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is None or not (head.phase in (PHASE_OWNED, PHASE_RELEASING) or is_pending_deletion(head)):
                return
            if deleted:
                log.mark_deleted(transaction, h, head, self._clock_ms())
                return
            head.phase = PHASE_FENCED
            if not head.tombstoned and head.lifecycle == LIFECYCLE_DELETED:
                head.lifecycle = LIFECYCLE_ACTIVE  # what was asked for here did not come to pass
            log.write_head(transaction, h, head, self._clock_ms())
            transaction.delete("dirty", h)

        self._hot.run_blocking(operation)

    def _users_key(self, h: bytes, head: Head) -> bytes:
        bucket = self._bucket
        return user_key(bucket.tenant_hash(head.tenant), bucket.user_hash(head.tenant, head.user), head.created_ms, h)


def is_pending_deletion(head: Head) -> bool:
    """Whether a deletion was asked for here whose tombstone is not known to stand."""
    return head.phase == PHASE_RELEASED and head.lifecycle == LIFECYCLE_DELETED and not head.tombstoned
