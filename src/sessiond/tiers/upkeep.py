"""What a node does by itself: it releases idle sessions, evicts released ones, and ends those that expired.

It promises that only released sessions are evicted, that nothing expires by a jump of the wall clock, and that a node
with nothing to do asks nothing of the store. It never serves a call and never decides by a read that failed.
"""

from __future__ import annotations

import heapq
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Final

from sessiond.core.expiry import day_of, expired_lifecycle, lifecycle_at
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, LOSS_HOT_TIER, Manifest
from sessiond.core.rules import is_hidden
from sessiond.errors import Conflict, Corrupt, Exhausted, SessiondError, Unavailable, reason_of
from sessiond.tiers.cloud.bucket import Bucket, refusal
from sessiond.tiers.cloud.store import ObjectStore, StoreError
from sessiond.tiers.flush import REMOVED_MAX, Flushed, Flusher
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hot.rows import (
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASED,
    PHASE_RELEASING,
    Head,
    decode_head,
    user_key,
)
from sessiond.tiers.hydrate import Cold, Node, is_stranded, load, put_settled
from sessiond.tiers.peers import GONE, SILENT, Owner, Peers
from sessiond.tiers.pins import let_go
from sessiond.tiers.retire import ended

TICK_S: Final = 0.25
# Head rows looked at in one tick: 200,000 sessions are gone through in 100 s, for 1 % of a core.
SLICE_ROWS: Final = 500
# Releases that are on their way at one time: they must not crowd out the flushes that turns wait for.
RELEASES_MAX: Final = 8
EVICT_BATCH: Final = 256
# Eviction goes on until so much less of the map is in use than where it began.
EVICT_PERCENT: Final = 5
# On a full disk, so much of what is used.
FULL_DISK_PERCENT: Final = 20
# Under pressure a session is released after so little rest.
PRESSED_IDLE_MS: Final = 10_000
# A copy of a session that nobody owns here goes after so long: it may have been deleted elsewhere since.
COPY_KEPT_MS: Final = 86_400_000
# Between two looks through all sessions for something to evict, if the first did not bring enough.
EVICT_PAUSE_TICKS: Final = 8
# Rows of the expiry index that are handled in one tick.
SWEEP_ROWS: Final = 16
SWEEP_RETRY_TICKS: Final = 240
# Rows in a row that can't be seen to, after which the store is left alone for a while.
SWEEP_FAILURES_MAX: Final = 3
LIST_ROWS: Final = 1000
# A use that no session has had yet.
NEVER_MS: Final = (1 << 63) - 1


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
        running_ms: Callable[[], int],
        idle_release_ms: int,
        evict_at_percent: int,
        wait: Callable[[float], object],
        fenced: Callable[[bytes], None] = lambda h: None,
        peers: Peers | None = None,
        holds_lease: Callable[[], bool] = lambda: True,
    ) -> None:
        """resumed_ms: when a session was last read, 0 if that is not known. idle_release_ms: 0 releases none.
        fenced: told of sessions that another node took over, and of claims that nobody asked for since, each time round
        until that is settled. holds_lease: whether this node surely holds its own name.
        """
        self._hot = hot
        self._store = store
        self._bucket = bucket
        self._node = node
        self._flusher = flusher
        self._tenants = tenants
        self._resumed_ms = resumed_ms
        self._clock_ms = clock_ms
        self._steady_ms = steady_ms
        self._running_ms = running_ms
        self._idle_release_ms = idle_release_ms
        self._evict_at = evict_at_percent
        self._wait = wait
        self._fenced = fenced
        self._peers = peers
        self._holds_lease = holds_lease
        self._counts = {PHASE_OWNED: 0, PHASE_FENCED: 0}
        # How many sessions were in these phases when all of them were looked at last.
        self.counts = dict(self._counts)
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
            self.tick()

    def tick(self) -> None:
        """One slice of each duty; what keeps one of them from being done keeps none of the others."""
        for duty in (self._evict, self._look_over, self._end_past_days):
            try:
                duty()
            except Exception as error:  # whatever it is, the next tick comes
                self.last_error = reason_of(error)

    # Idle and expired sessions that this node owns ------------------------------------------------------------------

    def _look_over(self) -> None:
        steady_ms = self._steady_ms()
        expired: list[bytes] = []
        copies: list[tuple[bytes, Head]] = []
        idle: list[tuple[bytes, int]] = []
        doubted: list[bytes] = []
        stale: list[bytes] = []
        for h, head in self._heads(SLICE_ROWS):
            if is_evictable(head) and self._is_unused(h, head, COPY_KEPT_MS):
                stale.append(h)
            if is_evictable(head) and head.lifecycle == LIFECYCLE_ACTIVE and 0 < head.expires_ms <= steady_ms:
                copies.append((h, head))
            if head.phase in self._counts and not is_hidden(head.session):
                self._counts[head.phase] += 1
            rested = head.phase == PHASE_CLAIMING and self._is_unused(h, head, PRESSED_IDLE_MS)
            if head.phase == PHASE_FENCED or is_stranded(head) or rested:
                # The last: a claim whose outcome nobody has asked for since.
                self._fenced(h)
            if head.phase == PHASE_DOUBTED and head.is_dirty:
                # Whoever has it now lacks these turns, and says so until they are brought there.
                doubted.append(h)
                continue
            if head.phase in (PHASE_RELEASING, PHASE_DOUBTED):
                # A release whose outcome was not known, or rows that nobody asked for since the start: settled now.
                if self._is_unused(h, head, PRESSED_IDLE_MS):
                    idle.append((h, head.used_ms))
                continue
            if head.phase != PHASE_OWNED:
                continue
            over = lifecycle_at(head.lifecycle, head.policy, head.expires_ms, steady_ms)
            if head.lifecycle == LIFECYCLE_ACTIVE and over != LIFECYCLE_ACTIVE:
                expired.append(h)
            elif self._idle_release_ms and self._is_unused(h, head, self._idle_release_ms):
                idle.append((h, head.used_ms))
        if not self._place:
            self.counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        if stale:
            self._drop(stale)
        for h in expired:
            self._end(h)
        if self._flusher.failing:
            return
        for h in doubted:
            self._hand(partial(self._flusher.request, h))
        for h, used_ms in idle:
            self._release(h, used_ms)
        for h, head in copies[:SWEEP_ROWS]:
            # Released here, so that in most cases nobody else has it: no need to wait for the end of the day. If
            # somebody has, the copy is of no use; if not, it has ended.
            if self._end_unowned(self._bucket.expiry_key(head.tenant, day_of(head.expires_ms), h)):
                self._drop([h], evicts=False)

    def _is_unused(self, h: bytes, head: Head, for_ms: int) -> bool:
        """Whether nobody appended to the session or read it for so long. A use that lies ahead was by another clock,
        and says nothing: a release too many costs a request, one that never comes costs the map.
        """
        now_ms = self._running_ms()
        used = [at_ms for at_ms in (head.used_ms, self._resumed_ms(h)) if at_ms <= now_ms + for_ms]
        return max(used, default=0) < now_ms - for_ms

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
            self._release(h, NEVER_MS)
        elif over == LIFECYCLE_DELETED:
            self.done.deleted += 1

    def _release(self, h: bytes, unused_since_ms: int) -> None:
        self._hand(lambda: self._flusher.release_unused(h, unused_since_ms))

    def _hand(self, begin: Callable[[], Future[Flushed]]) -> None:
        """Have the flusher see to a session, unless it sees to enough of them already."""
        with self._lock:
            if self._releasing >= RELEASES_MAX:
                return  # the next time round
            self._releasing += 1
        future = begin()

        def done(_: object) -> None:
            with self._lock:
                self._releasing -= 1
                if future.exception() is None and future.result().released and future.result().wrote:
                    self.done.released += 1

        future.add_done_callback(done)

    # Eviction ---------------------------------------------------------------------------------------------------------

    def _evict(self) -> None:
        used, size = self._hot.used_bytes()
        if self._evict_pause > 0:
            self._evict_pause -= 1
            return
        full_disk = self._hot.disk_full
        if used * 100 <= size * self._evict_at and not full_disk:
            return
        # A disk smaller than the map is full before the map is: then a share of what is used goes.
        enough = size * (self._evict_at - EVICT_PERCENT) // 100
        if full_disk:
            enough = min(enough, used * (100 - FULL_DISK_PERCENT) // 100)
        released, owned = self._least_used()
        batch = EVICT_BATCH
        while released:
            try:
                self._drop(released[:batch])
            except Exhausted:
                # A full map has few pages for what makes room in it: less at a time.
                if batch == 1:
                    raise
                batch = max(1, batch // 4)
                continue
            del released[:batch]
            used, size = self._hot.used_bytes()
            if used <= enough:
                self._hot.disk_full = False  # the next turn tells whether it is so
                return
        if not self._flusher.failing:
            for h, used_ms in owned:
                self._release(h, used_ms)
        self._evict_pause = EVICT_PAUSE_TICKS

    def _least_used(self) -> tuple[list[bytes], list[tuple[bytes, int]]]:
        """(released sessions, idle ones that could be released with when they were used), the longest unused first."""
        place, released, owned = b"", list[tuple[int, bytes]](), list[tuple[int, bytes, int]]()
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
                    elif head.phase == PHASE_OWNED and self._is_unused(key, head, PRESSED_IDLE_MS):
                        owned.append((used_ms, key, head.used_ms))
            released = heapq.nsmallest(4 * EVICT_BATCH, released)
            owned = heapq.nsmallest(RELEASES_MAX, owned)
            if not following:
                return [h for _, h in released], [(h, used_ms) for _, h, used_ms in owned]
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
        """Handle the rows of the days before `today`, one at a time. Raises as the store does, at the end if only for
        some of them: they are tried again another time.
        """
        failed: SessiondError | None = None
        in_a_row = 0
        for tenant in self._tenants():
            prefix, start_after = f"x/{self._bucket.tenant_hash(tenant).hex()}/", ""
            while True:
                try:
                    keys = [row.key for row in self._store.list(prefix, start_after, LIST_ROWS)]
                except StoreError as error:
                    raise refusal(error) from error
                # In the order of days: the first that is not over ends it.
                past = [key for key in keys if _day(key) < today]
                for key in past:
                    try:
                        self._end_unowned(key)
                        in_a_row = 0
                    except SessiondError as error:
                        failed, in_a_row = error, in_a_row + 1
                        if in_a_row >= SWEEP_FAILURES_MAX:
                            raise
                    yield
                if len(past) < len(keys) or len(keys) < LIST_ROWS:
                    break
                start_after = keys[-1]
        if failed is not None:
            raise failed

    def _end_unowned(self, key: str) -> bool:
        """See to one row of the expiry index; whether the cloud tier said how things stand, so that a copy of the
        session here is of no more use. Raises as the store does.
        """
        _, _, day, name = key.split("/")
        h = bytes.fromhex(name)
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
        if head is not None and head.phase != PHASE_RELEASED:
            return False  # it is looked over with the others of this node
        try:
            cold = load(self._store, h)
        except Corrupt as error:
            self.last_error = error.reason
            return False  # what can't be read ends nothing
        if cold is not None and cold.manifest.lifecycle == LIFECYCLE_DELETED:
            # Ended, and then cut short: by this row the rest of it is found.
            if not self._let_go(cold.manifest, cold.manifest):
                return False
        elif cold is not None and self._is_due(cold.manifest, int(day, 16)) and not self._retire(cold, head):
            return True  # its owner sees to it, and to the row
        try:
            self._store.delete(key)
        except StoreError as error:
            raise refusal(error) from error
        return True

    def _is_due(self, manifest: Manifest, day: int) -> bool:
        """Whether the row of this day is the session's own; if not, the day has changed since or it has ended."""
        return manifest.lifecycle == LIFECYCLE_ACTIVE and day_of(manifest.expires_ms) == day

    def _retire(self, cold: Cold, head: Head | None) -> bool:
        """End a session that no living node owns; whether its row has done its duty. Raises as the store does."""
        manifest, loss = cold.manifest, None
        if lifecycle_at(LIFECYCLE_ACTIVE, manifest.policy, manifest.expires_ms, self._steady_ms()) == LIFECYCLE_ACTIVE:
            return False
        if manifest.owner is not None:
            if not self._holds_lease():
                return False  # who can't say who it is itself judges nobody
            owner = Owner(bytes(manifest.owner[0]), str(manifest.owner[1]), str(manifest.owner[2]))
            if owner.incarnation == self._node.incarnation or (owner.name != self._node.name and self._lives(owner)):
                return False  # its owner ends it, this node's own claims included
            loss = [manifest.epoch, manifest.head, LOSS_HOT_TIER, 0]
        end = ended(manifest, self._node.incarnation, expired_lifecycle(manifest.policy), loss, self._clock_ms())
        try:
            put_settled(self._store, end.h, end, cold.etag, self._wait)
        except Conflict:
            return False  # somebody came first; what became of it another look will tell
        if end.lifecycle == LIFECYCLE_ARCHIVED:
            self.done.archived += 1
            return True
        self.done.deleted += 1
        if head is not None:
            # The flusher removes what this node holds, and the objects with it.
            self._hot.run_blocking(lambda transaction: _note_deleted(transaction, end.h, self._clock_ms()))
            return True
        return self._let_go(manifest, end)

    def _lives(self, owner: Owner) -> bool:
        """Whether another node sees to what it owns. Raises Unavailable while that is not known, and as the store."""
        if self._peers is None:
            return True
        state = self._peers.verdict(owner).state
        if state == SILENT:
            what = f"Node {owner.name!r} may be gone, or not."
            raise Unavailable("OWNER_UNREACHABLE", what, {"owner_node": owner.name})
        return state != GONE

    def _let_go(self, was: Manifest, tombstone: Manifest) -> bool:
        return let_go(self._store, self._bucket, was, was.h, REMOVED_MAX, self._clock_ms(), self._wait, known=tombstone)


def _day(key: str) -> int:
    """The day of a row of the expiry index; one that never comes for a key that is none of ours."""
    parts = key.split("/")
    try:
        bytes.fromhex(parts[3])
        return int(parts[2], 16) if len(parts) == 4 else sys.maxsize
    except (IndexError, ValueError):
        return sys.maxsize


def is_evictable(head: Head) -> bool:
    """Whether the cloud tier has all of a session and no node owns it here: its rows are only a copy."""
    return head.phase == PHASE_RELEASED and not head.is_dirty


def _note_deleted(transaction: Transaction, h: bytes, now_ms: int) -> None:
    head = log.read_head(transaction, h)
    if head is not None and head.phase == PHASE_RELEASED:
        log.mark_deleted(transaction, h, head, now_ms)
