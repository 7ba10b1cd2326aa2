"""What a node does by itself: it releases idle sessions, evicts released ones, and ends those that expired.

It promises that only released sessions are evicted, that nothing expires by a jump of the wall clock, and that a node
with nothing to do asks nothing of the store. It never serves a call and never decides by a read that failed.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from sessiond.core.expiry import day_of, lifecycle_at
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, LOSS_HOT_TIER, Manifest
from sessiond.errors import Corrupt, SessiondError, reason_of
from sessiond.tiers.cloud.bucket import Bucket, refusal
from sessiond.tiers.cloud.store import ObjectStore, StoreError
from sessiond.tiers.flush import Flusher
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hot.rows import PHASE_OWNED, PHASE_RELEASED, Head, decode_head, user_key
from sessiond.tiers.hydrate import Cold, Node, load, put_settled
from sessiond.tiers.retire import remove_objects, retire

TICK_S: Final = 0.25
# Head rows looked at in one tick: 200,000 sessions are gone through in 100 s, for 1 % of a core.
SLICE_ROWS: Final = 500
# Releases that are on their way at one time: they must not crowd out the flushes that turns wait for.
RELEASES_MAX: Final = 8
EVICT_BATCH: Final = 256
# Eviction goes on until so much less of the map is in use than where it began.
EVICT_PERCENT: Final = 5
# Under pressure a session is released after so little rest.
PRESSED_IDLE_MS: Final = 10_000
# Between two looks through all sessions for something to evict, if the first did not bring enough.
EVICT_PAUSE_TICKS: Final = 8
# Rows of the expiry index that are handled in one tick.
SWEEP_ROWS: Final = 16
SWEEP_RETRY_TICKS: Final = 240
LIST_ROWS: Final = 1000


@dataclass(slots=True)
class Done:
    """What was done since the start."""

    released: int = 0
    evicted: int = 0
    archived: int = 0
    deleted: int = 0


class Upkeep:
    """Goes through the node's sessions in slices, for ever; `tick` does one."""

    def __init__(
        self,
        hot: Environment,
        store: ObjectStore,
        bucket: Bucket,
        node: Node,
        flusher: Flusher,
        tenants: Callable[[], list[str]],
        resumed_ms: Callable[[bytes], int],
        clock_ms: Callable[[], int],
        steady_ms: Callable[[], int],
        idle_release_ms: int,
        evict_at_percent: int,
        wait: Callable[[float], object],
    ) -> None:
        """resumed_ms: when a session was last read, 0 if that is not known. idle_release_ms: 0 releases none."""
        self._hot = hot
        self._store = store
        self._bucket = bucket
        self._node = node
        self._flusher = flusher
        self._tenants = tenants
        self._resumed_ms = resumed_ms
        self._clock_ms = clock_ms
        self._steady_ms = steady_ms
        self._idle_release_ms = idle_release_ms
        self._evict_at = evict_at_percent
        self._wait = wait
        self._place = b""
        self._releasing = 0
        self._evict_pause = 0
        self._swept_day = -1
        self._sweep: Iterator[None] | None = None
        self._sweep_pause = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self.done = Done()
        self.last_error = ""

    def start(self) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._loop, name="upkeep", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the tick under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _loop(self) -> None:
        while not self._stop.wait(TICK_S):
            try:
                self.tick()
            except Exception as error:  # whatever it is, the next tick comes
                self.last_error = reason_of(error)

    def tick(self) -> None:
        """One slice of each duty. Raises as the hot tier does."""
        self._look_over()
        self._evict()
        self._end_past_days()

    # Idle and expired sessions that this node owns ------------------------------------------------------------------

    def _look_over(self) -> None:
        steady_ms = self._steady_ms()
        idle_before_ms = steady_ms - self._idle_release_ms if self._idle_release_ms else -1
        expired: list[bytes] = []
        copies: list[tuple[bytes, Head]] = []
        idle: list[bytes] = []
        for h, head in self._heads(SLICE_ROWS):
            if is_evictable(head) and head.lifecycle == LIFECYCLE_ACTIVE and 0 < head.expires_ms <= steady_ms:
                copies.append((h, head))
            if head.phase != PHASE_OWNED:
                continue
            over = lifecycle_at(head.lifecycle, head.policy, head.expires_ms, steady_ms)
            if head.lifecycle == LIFECYCLE_ACTIVE and over != LIFECYCLE_ACTIVE:
                expired.append(h)
            elif max(head.used_ms, self._resumed_ms(h)) < idle_before_ms and head.lifecycle != LIFECYCLE_DELETED:
                idle.append(h)
        for h in expired:
            self._end(h)
        if self._flusher.failing:
            return
        for h in idle:
            self._release(h, idle_before_ms)
        for h, head in copies[:SWEEP_ROWS]:
            # Released here, so that in most cases nobody else has it: no need to wait for the end of the day. If
            # somebody has, the copy is of no use; if not, it has ended.
            self._end_unowned(self._bucket.expiry_key(head.tenant, day_of(head.expires_ms), h))
            self._drop([h], evicts=False)

    def _heads(self, rows: int) -> list[tuple[bytes, Head]]:
        """The next head rows, from where the last slice ended; begins anew at the end."""
        found: list[tuple[bytes, Head]] = []
        with self._hot.read() as transaction:
            count = 0
            for key, value in transaction.scan("heads", b"", self._place):
                if count == rows:
                    self._place = key
                    return found
                count += 1
                try:
                    found.append((key, decode_head(key, value)))
                except Corrupt:
                    continue  # it says so to whoever asks for it, and to verify
        self._place = b""
        return found

    def _end(self, h: bytes) -> None:
        """Archive or delete an expired session of ours: noted here, then committed by the flusher."""
        steady_ms = self._steady_ms()

        def operation(transaction: Transaction) -> int:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_OWNED or head.lifecycle != LIFECYCLE_ACTIVE:
                return 0
            over = lifecycle_at(head.lifecycle, head.policy, head.expires_ms, steady_ms)
            if over == LIFECYCLE_ACTIVE:
                return 0  # an append came first
            head.lifecycle = over
            head.changes += 1
            log.write_head(transaction, h, head, self._clock_ms(), False)
            return over

        over = self._hot.run_blocking(operation)
        if over == LIFECYCLE_ARCHIVED:
            self.done.archived += 1
            self._release(h, self._clock_ms())
        elif over == LIFECYCLE_DELETED:
            self.done.deleted += 1

    def _release(self, h: bytes, unused_since_ms: int) -> None:
        with self._lock:
            if self._releasing >= RELEASES_MAX:
                return  # the next time round
            self._releasing += 1
        future = self._flusher.release_unused(h, unused_since_ms)

        def done(_: object) -> None:
            with self._lock:
                self._releasing -= 1
                if future.exception() is None and future.result().released:
                    self.done.released += 1

        future.add_done_callback(done)

    # Eviction ---------------------------------------------------------------------------------------------------------

    def _evict(self) -> None:
        used, size = self._hot.used_bytes()
        if self._evict_pause > 0:
            self._evict_pause -= 1
            return
        if used * 100 <= size * self._evict_at:
            return
        released, owned = self._least_used()
        for start in range(0, len(released), EVICT_BATCH):
            self._drop(released[start : start + EVICT_BATCH])
            used, size = self._hot.used_bytes()
            if used * 100 <= size * (self._evict_at - EVICT_PERCENT):
                return
        pressed_ms = self._steady_ms() - PRESSED_IDLE_MS
        if not self._flusher.failing:
            for h in owned:
                self._release(h, pressed_ms)
        self._evict_pause = EVICT_PAUSE_TICKS

    def _least_used(self) -> tuple[list[bytes], list[bytes]]:
        """(released sessions, idle sessions that could be released), those first that were used least recently."""
        place, released, owned = b"", list[tuple[int, bytes]](), list[tuple[int, bytes]]()
        pressed_ms = self._steady_ms() - PRESSED_IDLE_MS
        while True:
            rows = 0
            with self._hot.read() as transaction:
                following = b""
                for key, value in transaction.scan("heads", b"", place):
                    if rows == LIST_ROWS:
                        following = key
                        break
                    rows += 1
                    try:
                        head = decode_head(key, value)
                    except Corrupt:
                        continue
                    used_ms = max(head.used_ms, self._resumed_ms(key))
                    if is_evictable(head):
                        released.append((used_ms, key))
                    elif head.phase == PHASE_OWNED and used_ms < pressed_ms:
                        owned.append((used_ms, key))
            released = heapq.nsmallest(4 * EVICT_BATCH, released)
            owned = heapq.nsmallest(RELEASES_MAX, owned)
            if not following:
                return [h for _, h in released], [h for _, h in owned]
            place = following

    def _drop(self, hashes: list[bytes], evicts: bool = True) -> None:
        def operation(transaction: Transaction) -> int:
            dropped = 0
            for h in hashes:
                head = log.read_head(transaction, h)
                if head is None or not is_evictable(head):
                    continue  # claimed meanwhile
                tenant = self._bucket.tenant_hash(head.tenant)
                user = self._bucket.user_hash(head.tenant, head.user)
                log.drop_session(transaction, h, user_key(tenant, user, head.created_ms, h))
                dropped += 1
            return dropped

        dropped = self._hot.run_blocking(operation)
        self.done.evicted += dropped if evicts else 0

    # Expired sessions that nobody owns --------------------------------------------------------------------------------

    def _end_past_days(self) -> None:
        """Go through the expiry index once a day and at the start, some rows in a tick."""
        if self._sweep_pause > 0:
            self._sweep_pause -= 1
            return
        today = day_of(self._steady_ms())
        if self._sweep is None:
            if today <= self._swept_day:
                return
            self._sweep = self._sweeping(today)
        try:
            for _ in range(SWEEP_ROWS):
                if next(self._sweep, self) is self:
                    self._sweep, self._swept_day = None, today
                    return
        except SessiondError as error:
            self.last_error = error.reason
            self._sweep, self._sweep_pause = None, SWEEP_RETRY_TICKS

    def _sweeping(self, today: int) -> Iterator[None]:
        """Handle the rows of the days before `today`, one at a time. Raises as the store does."""
        for tenant in self._tenants():
            prefix, start_after = f"x/{self._bucket.tenant_hash(tenant).hex()}/", ""
            while True:
                try:
                    keys = [row.key for row in self._store.list(prefix, start_after, LIST_ROWS)]
                except StoreError as error:
                    raise refusal(error) from error
                # In the order of days: the first that is not over ends it.
                past = [key for key in keys if int(key.split("/")[2], 16) < today]
                for key in past:
                    self._end_unowned(key)
                    yield
                if len(past) < len(keys) or len(keys) < LIST_ROWS:
                    break
                start_after = keys[-1]

    def _end_unowned(self, key: str) -> None:
        _, _, day, name = key.split("/")
        h = bytes.fromhex(name)
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
        if head is not None and head.phase != PHASE_RELEASED:
            return  # it is looked over with the others of this node
        try:
            cold = load(self._store, h)
        except Corrupt as error:
            self.last_error = error.reason
            return  # what can't be read ends nothing
        if cold is not None and self._is_due(cold.manifest, int(day, 16)) and not self._retire(cold, head):
            return
        try:
            self._store.delete(key)
        except StoreError as error:
            raise refusal(error) from error

    def _is_due(self, manifest: Manifest, day: int) -> bool:
        """Whether the row of this day is the session's own; if not, the day has changed since or it has ended."""
        return manifest.lifecycle == LIFECYCLE_ACTIVE and day_of(manifest.expires_ms) == day

    def _retire(self, cold: Cold, head: Head | None) -> bool:
        """End a session that no living node owns; whether its row has done its duty."""
        manifest, loss = cold.manifest, None
        if manifest.owner is not None:
            if manifest.owner[1] != self._node.name:
                return False  # its owner ends it
            loss = [manifest.epoch, manifest.head, LOSS_HOT_TIER, 0]

        def commit(ended: Manifest) -> str:
            return put_settled(self._store, ended.h, ended, cold.etag, self._wait)

        ended = retire(manifest, self._node.incarnation, loss, self._steady_ms(), self._clock_ms(), commit)
        if ended is None:
            return False
        if ended.lifecycle == LIFECYCLE_ARCHIVED:
            self.done.archived += 1
            return True
        self.done.deleted += 1
        if head is not None:
            # The flusher removes what this node holds, and the objects with it.
            self._hot.run_blocking(lambda transaction: _note_deleted(transaction, ended.h, self._clock_ms()))
        else:
            remove_objects(self._store, self._bucket, ended.h, manifest)
        return True


def is_evictable(head: Head) -> bool:
    """Whether the cloud tier has all of a session and no node owns it here: its rows are only a copy."""
    return head.phase == PHASE_RELEASED and not head.is_dirty


def _note_deleted(transaction: Transaction, h: bytes, now_ms: int) -> None:
    head = log.read_head(transaction, h)
    if head is not None and head.phase == PHASE_RELEASED:
        log.mark_deleted(transaction, h, head, now_ms)
