"""Hot to cloud: writes what the cloud tier lacks, one conditional write per session and round.

It promises that cloud_seq moves only after a definite commit, that a manifest at our epoch which is ahead of our
rows is reported and never overwritten, and that one session has one flusher at a time. It never changes a turn.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from sessiond import core
from sessiond.core import envelope
from sessiond.core import state as states
from sessiond.core.layout import SEGMENT_BYTES_MAX
from sessiond.core.manifest import (
    CHECKPOINTS_MAX,
    INLINE_NEWEST_BYTES,
    INLINE_TAIL_BYTES_MAX,
    KEPT_BYTES_MAX,
    SEGMENT_ROWS_KEPT,
    SEGMENT_ROWS_MAX,
    TURN_ID_ENTRY_BYTES,
    TURN_IDS_MAX,
    Manifest,
)
from sessiond.errors import Conflict, Corrupt, SessiondError, Unavailable
from sessiond.tiers.cloud.bucket import refusal, segment_index_key, segment_key
from sessiond.tiers.cloud.lease import boot_clock_ms
from sessiond.tiers.cloud.store import Ambiguous, ObjectStore, StoreError
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
)
from sessiond.tiers.hydrate import ATTEMPTS_MAX, Node, Segments, load, put_settled, revalidate

BACKOFF_FIRST_MS = 200
BACKOFF_LAST_MS = 10_000
# Dirty sessions looked at in one round; the rest wait for the next.
ROUND_SESSIONS_MAX = 4096
# Segments of one flush after which more than a tail may travel inline.
SEAL_ROUNDS_MAX = 8


@dataclass(slots=True)
class Flushed:
    """What a flush reached."""

    cloud_seq: int
    wrote: bool
    released: bool


@dataclass(slots=True)
class _Cut:
    """One consistent look at a session's rows: what the next manifest says, without what is on its way in segments."""

    head: Head
    base: Manifest
    manifest: Manifest
    tail: bytes
    tail_last: int


class Flusher:
    """Flushes dirty sessions in the background, and named ones on request."""

    def __init__(
        self,
        hot: Environment,
        store: ObjectStore,
        node: Node,
        interval_ms: int,
        threads: int,
        clock_ms: Callable[[], int],
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self._hot = hot
        self._store = store
        self._node = node
        self._interval_ms = interval_ms
        self._clock_ms = clock_ms
        self._wait = wait
        self._segments = Segments(store)
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="flush")
        # Somebody waits for these: they must not stand behind everything that is merely due.
        self._urgent = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="flush-now")
        self._lock = threading.Lock()
        self._running: set[bytes] = set()
        self._waiting: dict[bytes, list[tuple[bool, Future[Flushed]]]] = {}
        self._not_before: dict[bytes, tuple[int, int]] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self.last_error = ""

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

    def request(self, h: bytes, release: bool = False) -> Future[Flushed]:
        """Flush this session now, and release it if asked. The future has the outcome, or the refusal."""
        future: Future[Flushed] = Future()
        with self._lock:
            if self._stopping:
                future.set_exception(Unavailable("NODE_DRAINING", "The flusher has stopped."))
                return future
            # A flush under way may have looked before the caller's turn was committed: it takes another.
            self._waiting.setdefault(h, []).append((release, future))
            if h not in self._running:
                self._running.add(h)
                self._urgent.submit(self._run, h)
        return future

    def dirty(self) -> tuple[int, int]:
        """(sessions that the cloud tier lacks something of, ms since the oldest became so)."""
        with self._hot.read() as transaction:
            count = transaction.entries("dirty")
            oldest = min((int.from_bytes(value, "big") for _, value in transaction.scan("dirty", b"")), default=0)
        return count, max(0, self._clock_ms() - oldest) if count else 0

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(min(self._interval_ms, 1000) / 2000)
            try:
                self._round()
            except SessiondError as error:
                self.last_error = error.reason

    def _round(self) -> None:
        now_ms, boot_ms = self._clock_ms(), boot_clock_ms()
        due: list[bytes] = []
        with self._hot.read() as transaction:
            for key, value in transaction.scan("dirty", b""):
                retry_ms = self._not_before.get(key, (0, 0))[0]
                age_ms = now_ms - int.from_bytes(value, "big")
                # A clock that stepped back must not hold a flush up for long.
                if (age_ms >= self._interval_ms or age_ms < -self._interval_ms) and retry_ms <= boot_ms:
                    due.append(key)
                if len(due) >= ROUND_SESSIONS_MAX:
                    break
        with self._lock:
            for h in due:
                if h not in self._running and not self._stopping:
                    self._running.add(h)
                    self._pool.submit(self._run, h)

    def _run(self, h: bytes) -> None:
        while True:
            with self._lock:
                waiting = self._waiting.pop(h, [])
            release = any(wanted for wanted, _ in waiting)
            try:
                outcome: Flushed | BaseException = self.flush(h, release)
                self._not_before.pop(h, None)
                self.last_error = ""
            except BaseException as error:  # whoever waits must hear of anything
                outcome = error
                self._note_failure(h, error)
            for _, future in waiting:
                if not future.set_running_or_notify_cancel():
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
            with self._lock:
                if h not in self._waiting:
                    self._running.discard(h)
                    return

    def _note_failure(self, h: bytes, error: BaseException) -> None:
        self.last_error = error.reason if isinstance(error, SessiondError) else type(error).__name__
        backoff_ms = min(BACKOFF_LAST_MS, 2 * self._not_before.get(h, (0, BACKOFF_FIRST_MS // 2))[1])
        self._not_before[h] = (boot_clock_ms() + backoff_ms, backoff_ms)

    def flush(self, h: bytes, release: bool = False) -> Flushed:
        """Commit this session's newest state to the cloud tier, and release it if asked. Blocks.

        Raises Unavailable, Denied, Corrupt HISTORY_DIVERGED; the session stays dirty then.
        """
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
        if head is not None and head.phase == PHASE_DOUBTED:
            revalidate(self._hot, self._store, self._node, h)
        if not release:
            return self._flush(h, False)
        self._move(h, PHASE_OWNED, PHASE_RELEASING)
        try:
            return self._flush(h, True)
        except SessiondError as error:
            # While nobody knows whether the release landed, the row keeps appends out; otherwise it did not.
            if error.reason not in ("COMMIT_UNKNOWN", "EPOCH_FENCED"):
                self._move(h, PHASE_RELEASING, PHASE_OWNED)
            raise

    def _flush(self, h: bytes, release: bool) -> Flushed:
        sealed: list[list[Any]] = []
        while True:
            # A session that is written to without a pause would be sealed for ever: after some rounds what came in
            # meanwhile travels inline, though it is more than a tail should be.
            inline_max = INLINE_TAIL_BYTES_MAX if len(sealed) < SEAL_ROUNDS_MAX else SEGMENT_BYTES_MAX
            cut = self._look(h, sealed, release, inline_max)
            if isinstance(cut, Flushed):
                return cut
            if not cut.tail:
                break
            sealed.append(self._put_segment(cut))
        if len(cut.manifest.segments) > SEGMENT_ROWS_MAX:
            self._spill(cut.manifest)
        try:
            etag = put_settled(self._store, h, cut.manifest, cut.head.etag, self._wait)
        except Conflict as lost:
            return self._catch_up(h, cut, lost, release)
        self._settle(h, cut.manifest, etag, cut.head.changes, release)
        return Flushed(cut.manifest.head, True, release)

    def _move(self, h: bytes, before: int, after: int) -> None:
        """Move a session from one phase to another, if it is in the first."""

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is not None and head.phase == before:
                head.phase = after
                log.write_head(transaction, h, head, self._clock_ms())

        self._hot.run_blocking(operation)

    def _look(self, h: bytes, sealed: list[list[Any]], release: bool, inline_max: int) -> _Cut | Flushed:
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is None or head.phase not in (PHASE_OWNED, PHASE_RELEASING):
                released = head is None or head.phase == PHASE_RELEASED
                return Flushed(head.cloud_seq if head else 0, False, released)
            if not head.is_dirty and not release and not sealed:
                return Flushed(head.cloud_seq, False, False)
            value = transaction.get("manifests", h)
            if value is None:
                raise Corrupt("CORRUPT_HOT_ROW", f"Session {h.hex()} has a head row and no manifest row.")
            base = decode_committed(h, value)
            segments = [*base.segments, *sealed]
            first_unsealed = (segments[-1][2] if segments else base.sealed_seq) + 1
            tail, tail_last = b"", first_unsealed - 1
            if first_unsealed <= head.head_seq:
                tail, tail_last = log.frames_between(transaction, h, first_unsealed, head.head_seq, SEGMENT_BYTES_MAX)
                if tail_last == head.head_seq and len(tail) < inline_max:
                    tail = b""
            if tail:
                return _Cut(head, base, base, tail, tail_last)
            return _Cut(head, base, self._manifest(transaction, h, head, base, segments, release), b"", tail_last)

    def _manifest(
        self, transaction: Transaction, h: bytes, head: Head, base: Manifest, segments: list[list[Any]], release: bool
    ) -> Manifest:
        first_unsealed = (segments[-1][2] if segments else base.sealed_seq) + 1
        inline, inline_first = log.newest_frames(
            transaction, h, head.head_seq, first_unsealed, INLINE_NEWEST_BYTES, head.hot_first
        )
        state = states.decode(head.state)
        kept: list[int] = []
        pieces: list[bytes] = []
        for place in (state.instructions, *state.summary):
            if place is None or place[0] >= inline_first:
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
            checkpoints=[list(entry) for entry in log.checkpoints(transaction, h)][-CHECKPOINTS_MAX:],
            turn_ids=log.turn_ids(transaction, h)[-TURN_IDS_MAX * TURN_ID_ENTRY_BYTES :],
            segments=segments,
            kept=sorted(kept),
            kept_bytes=len(kept_frames),
            inline_first=inline_first,
            loss=head.loss,
            lifecycle=head.lifecycle,
            expires_ms=head.expires_ms,
            written_ms=self._clock_ms(),
            payload=kept_frames + inline,
        )

    def _put_segment(self, cut: _Cut) -> list[Any]:
        """Seal the tail into one immutable object and return its row."""
        head, base = cut.head, cut.base
        headers = core.scan_frames(base.h, cut.tail)
        first, last = headers[0], headers[-1]
        marks = [
            [header.seq, header.offset, *header.cumulative]
            for before, header in pairwise(headers)
            if before.offset // envelope.CHUNK_BYTES != header.offset // envelope.CHUNK_BYTES
        ]
        meta = {
            "v": 1,
            "tenant": head.tenant,
            "session": head.session,
            "user": head.user,
            "h": base.h,
            "epoch": head.epoch,
            "first": first.seq,
            "last": last.seq,
            "chain": last.chain,
            "marks": marks,
        }
        body = envelope.seal(envelope.KIND_SEGMENT, meta, cut.tail)
        sha256 = hashlib.sha256(body).digest()
        self._put_immutable(segment_key(base.h, head.epoch, first.seq, sha256), body)
        return [head.epoch, first.seq, last.seq, sha256, len(body), *last.cumulative, b"", b"", last.chain]

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

    def _spill(self, manifest: Manifest) -> None:
        """Move the older segment rows into an index object, so that the manifest stays small."""
        rows = self._segments.rows(manifest)
        moved, kept = rows[:-SEGMENT_ROWS_KEPT], rows[-SEGMENT_ROWS_KEPT:]
        meta = {"v": 1, "h": manifest.h, "session": manifest.session, "tenant": manifest.tenant, "rows": moved}
        body = envelope.seal(envelope.KIND_SEGMENT_INDEX, meta)
        name = segment_index_key(manifest.h, manifest.mutation, hashlib.sha256(body).digest())
        self._put_immutable(name, body)
        manifest.index = [name, moved[0][1], moved[-1][2], len(moved)]
        manifest.segments = kept

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
            if release:
                # Nothing can be appended while a release is on its way; if something was, it is kept for a later claim.
                head.phase = PHASE_RELEASED if head.head_seq == manifest.head else PHASE_FENCED
            transaction.put("manifests", h, encode_committed(h, manifest))
            transaction.delete("dirty", h)
            log.write_head(transaction, h, head, self._clock_ms())

        self._hot.run_blocking(operation)

    def _catch_up(self, h: bytes, cut: _Cut, lost: Conflict, release: bool) -> Flushed:
        """The manifest is not where our rows say. Either an answer of ours was lost, or somebody else is the owner."""
        found = load(self._store, h)
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
            # A crash came between the store's answer and our row: take the answer now, then flush the rest.
            self._settle(h, theirs, found.etag, cut.head.changes_flushed, theirs.owner is None)
            return self._flush(h, release)
        if theirs.epoch > head.epoch:
            self._fence(h)
            raise Unavailable(
                "EPOCH_FENCED",
                f"Session {head.session!r} was taken over under epoch {theirs.epoch}.",
                {"session_id": head.session, "epoch": str(theirs.epoch)},
            )
        raise lost

    def _is_ours(self, h: bytes, theirs: Manifest, head: Head) -> bool:
        """Whether our log contains the manifest's as a prefix."""
        if theirs.head > head.head_seq:
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

    def _fence(self, h: bytes) -> None:
        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is not None and head.phase in (PHASE_OWNED, PHASE_RELEASING):
                head.phase = PHASE_FENCED
                log.write_head(transaction, h, head, self._clock_ms())
                transaction.delete("dirty", h)

        self._hot.run_blocking(operation)
