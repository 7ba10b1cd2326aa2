"""What AdminService's calls mean on one node: status, flush, drain. A clean drain leaves nothing behind.

It never stops the process; `daemon` does, when a drain asked for it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final

from sessiond import core
from sessiond.core import rules
from sessiond.errors import REASONS, SessiondError, reason_of
from sessiond.service.ownership import Call, Parts
from sessiond.service.prepare import check_session_id
from sessiond.service.rescue import Rescues
from sessiond.service.router import Router
from sessiond.service.sessions import Sessions
from sessiond.service.watch import Watches
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.flush import Flushed
from sessiond.tiers.hot import log
from sessiond.tiers.hot.rows import (
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASING,
    decode_head,
)
from sessiond.tiers.hydrate import is_stranded
from sessiond.tiers.upkeep import Upkeep
from sessiond.v1 import admin_pb2, session_pb2

DRAIN_IN_FLIGHT_MAX: Final = 64
PROGRESS_EVERY_MS: Final = 250


@dataclass
class CallCounts:
    """Calls by method, status and reason."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, method: str, status: str, reason: str, count: int = 1) -> None:
        """Count one call, or so many items of one."""
        self.counts[(method, status, reason)] += count


def resident_bytes() -> int:
    """Resident memory of this process."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


class Node:
    """AdminService, without the wire."""

    def __init__(
        self,
        parts: Parts,
        sessions: Sessions,
        store: CountingStore,
        upkeep: Upkeep,
        version: str,
        grace_ms: int,
        calls: CallCounts,
        router: Router | None = None,
        rescues: Rescues | None = None,
    ) -> None:
        self._router = router
        self._rescues = rescues
        self.answered_for_others: Callable[[], int] = lambda: 0
        self.watches: Watches | None = None
        # The processes that answer calls beside this one, and read transactions that are old: (pid, ms).
        self.workers: Callable[[], list[admin_pb2.WorkerStatus]] = list
        self.worker_group_max: Callable[[], int] = lambda: 0
        self.old_readers: Callable[[], list[tuple[int, int]]] = list
        self._parts = parts
        self._sessions = sessions
        self._store = store
        self._upkeep = upkeep
        self._version = version
        self._grace_ms = grace_ms
        self._calls = calls
        self._started_ms = parts.clock_ms()
        self.phase = admin_pb2.NODE_PHASE_STARTING
        self.on_phase: Callable[[], None] = lambda: None

    @property
    def cloud_answers(self) -> bool:
        """Whether the cloud tier answers, as far as is known."""
        return self._store.reachable and not self._parts.flusher.failing

    def set_phase(self, phase: admin_pb2.NodePhase) -> None:
        """Move on, and let health know."""
        self.phase = phase
        self.on_phase()

    async def status(self) -> admin_pb2.GetStatusResponse:
        """What the node is doing."""
        parts = self._parts
        used, size = parts.hot.used_bytes()
        backlog, done = parts.flusher.backlog(), self._upkeep.done
        with parts.hot.read() as transaction:
            # One row for each conversation; what belongs to users has none.
            sessions = transaction.entries("users")
        workers = self.workers()
        cloud = admin_pb2.CloudTierStatus(
            url=parts.store.url,
            store_id=parts.bucket.store_id,
            reachable=self._store.reachable,
            last_error=self._store.last_error or parts.flusher.last_error,
            lease_valid=parts.lease.is_valid(),
        )
        for kind, outcome, count, moved in self._store.snapshot():
            cloud.requests.add(kind=kind, outcome=outcome, count=count, bytes=moved)
        for kind, about, count in self._store.objects():
            cloud.objects.add(kind=kind, object=about, count=count)
        response = admin_pb2.GetStatusResponse(
            version=self._version,
            node=parts.node.name,
            incarnation=parts.node.incarnation,
            phase=self.phase,
            started_at_unix_ms=self._started_ms,
            compiled_core=core.COMPILED,
            hot=admin_pb2.HotTierStatus(
                sessions=sessions,
                map_used_bytes=used,
                map_size_bytes=size,
                dirty_sessions=backlog.sessions,
                oldest_dirty_ms=backlog.oldest_ms,
                path=str(parts.hot.path),
                readers=parts.hot.readers(),
            ),
            cloud=cloud,
            group_commit=admin_pb2.GroupCommitStatus(
                commits=parts.hot.commits + sum(worker.commits for worker in workers),
                appends=parts.hot.appends + sum(worker.appends for worker in workers),
                group_max=max(parts.hot.group_size_max, self.worker_group_max()),
            ),
            workers=workers,
            resident_bytes=resident_bytes(),
            turns_appended=self._sessions.turns_appended,
            flush=admin_pb2.FlushStatus(
                in_flight=backlog.in_flight,
                width=backlog.width,
                failing_ms=backlog.failing_ms,
                last_error=backlog.last_error,
                commits=backlog.commits,
                merges=backlog.merges,
            ),
            upkeep=admin_pb2.UpkeepStatus(
                released_sessions=done.released,
                evicted_sessions=done.evicted,
                archived_sessions=done.archived,
                deleted_sessions=done.deleted,
                clock_ahead_ms=parts.clock_ms() - parts.expiry_ms(),
                last_error=self._upkeep.last_error,
            ),
        )
        for pid, age_ms in self.old_readers():
            response.old_readers.add(pid=pid, age_ms=age_ms)
        self._tell_ownership(response.ownership)
        for (method, status, reason), count in sorted(self._calls.counts.items()):
            response.calls.add(method=method, status=status, reason=reason, count=count)
        for rung, count in self._sessions.rungs.items():
            response.rungs.add(rung=rung, count=count)
        return response

    def _tell_ownership(self, told: admin_pb2.OwnershipStatus) -> None:
        moves, counts = self._sessions.ownership.moves, self._upkeep.counts
        told.owned_sessions, told.fenced_sessions = counts[PHASE_OWNED], counts[PHASE_FENCED]
        told.claims, told.steals = moves.claims - moves.steals, moves.steals
        told.fenced = self._parts.lease.fences
        told.answered_for_others = self.answered_for_others()
        told.watchers = self.watches.count if self.watches is not None else 0
        if self._router is not None:
            for (node, outcome), count in sorted(self._router.counts.items()):
                told.forwarded.add(node=node, outcome=outcome, count=count)
        if self._rescues is not None:
            told.rescues.update(self._rescues.outcomes)

    async def flush(self, call: Call, request: admin_pb2.FlushRequest) -> admin_pb2.FlushResponse:
        """Write everything that the cloud tier lacks, and wait for it."""
        if request.session_id:
            await self._sessions.get(call, session_pb2.GetSessionRequest(session_id=request.session_id))
            wanted = [rules.session_hash(self._parts.bucket.hash_key, call.tenant, request.session_id)]
        else:
            with self._parts.hot.read() as transaction:
                wanted = [bytes(key) for key, _ in transaction.scan("dirty", b"")]
        response = admin_pb2.FlushResponse()
        failures: Counter[str] = Counter()
        for start in range(0, len(wanted), DRAIN_IN_FLIGHT_MAX):
            batch = wanted[start : start + DRAIN_IN_FLIGHT_MAX]
            outcomes = await asyncio.gather(
                *(asyncio.wrap_future(self._parts.flusher.request(h)) for h in batch), return_exceptions=True
            )
            for outcome in outcomes:
                if isinstance(outcome, BaseException):
                    failures[reason_of(outcome)] += 1
                elif outcome.wrote:
                    response.flushed_sessions += 1
        response.failed_sessions = sum(failures.values())
        response.failures.update(failures)
        return response

    async def release(self, call: Call, request: admin_pb2.ReleaseRequest) -> admin_pb2.ReleaseResponse:
        """Flush and release named sessions that this node holds; one that nobody owns counts as released."""
        response = admin_pb2.ReleaseResponse()
        for session_id in request.session_ids:
            h = rules.session_hash(self._parts.bucket.hash_key, call.tenant, check_session_id(session_id))
            try:
                if not self._is_held(h):
                    # Raises where another node owns it, or nobody ever had it.
                    await self._sessions.get(call, session_pb2.GetSessionRequest(session_id=session_id))
                done = await asyncio.wrap_future(self._parts.flusher.request(h, release=True))
            except SessiondError as error:
                response.failures[session_id] = error.reason
                continue
            if done.released:
                response.released_sessions += 1
            else:
                response.failures[session_id] = "NOT_OWNER"
        return response

    def _is_held(self, h: bytes) -> bool:
        with self._parts.hot.read() as transaction:
            head = log.read_head(transaction, h)
        return head is not None and head.phase in (PHASE_OWNED, PHASE_RELEASING, PHASE_DOUBTED, PHASE_CLAIMING)

    def _held(self) -> tuple[list[bytes], list[bytes]]:
        """(sessions that are to be released, those with acknowledged turns that only a rescue brings elsewhere)."""
        owned: list[bytes] = []
        stranded: list[bytes] = []
        with self._parts.hot.read() as transaction:
            for key, value in transaction.scan("heads", b""):
                try:
                    head = decode_head(key, value)
                    if head.phase in (PHASE_OWNED, PHASE_RELEASING, PHASE_DOUBTED):
                        owned.append(key)
                    elif is_stranded(head):
                        stranded.append(key)
                    elif head.phase == PHASE_CLAIMING and self._rescues is not None:
                        self._rescues.note(key)  # it may have landed: then it is owned, and released with the others
                except SessiondError:
                    owned.append(key)  # a damaged row can't be released: the drain must say so
        return owned, stranded

    async def drain(self, grace_ms: int) -> AsyncIterator[admin_pb2.DrainResponse]:
        """Refuse new work, then flush and release every session; the last progress says how it ended."""
        parts = self._parts
        if self._router is not None:
            # Before anything is refused: what this node gives up is sent on to them.
            await self._router.find_successors()
        self._sessions.ownership.draining = True
        if self.watches is not None:
            self.watches.drain()
        if self.phase != admin_pb2.NODE_PHASE_DRAINED:
            self.set_phase(admin_pb2.NODE_PHASE_DRAINING)
        deadline_ms = parts.boot_ms() + (grace_ms or self._grace_ms)
        # A claim on its way would own a session after the drain had looked.
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(
                self._sessions.ownership.settle(), max(0.001, (deadline_ms - parts.boot_ms()) / 1000)
            )
        progress = admin_pb2.DrainResponse()
        seen: Counter[str] = Counter()
        while True:
            if self._rescues is not None:
                for offered in self._held()[1]:
                    self._rescues.note(offered)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._rescues.settle(), max(0.001, (deadline_ms - parts.boot_ms()) / 1000))
            owned, stranded = self._held()
            failures: Counter[str] = Counter()
            progress.remaining_sessions = len(owned) + len(stranded)
            if stranded:
                failures["UNFLUSHED_TURNS"] = len(stranded)
            reported_ms = 0
            in_flight: set[asyncio.Future[Flushed]] = set()
            queue = iter(owned)
            pending = True
            while pending or in_flight:
                while pending and len(in_flight) < DRAIN_IN_FLIGHT_MAX and parts.boot_ms() < deadline_ms:
                    h = next(queue, None)
                    if h is None:
                        pending = False
                        break
                    in_flight.add(asyncio.wrap_future(parts.flusher.request(h, release=True)))
                if not in_flight:
                    break
                timeout = max(0.0, (deadline_ms - parts.boot_ms()) / 1000)
                done, in_flight = await asyncio.wait(in_flight, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    for future in in_flight:
                        future.cancel()
                    failures["DEADLINE_TOO_SHORT"] += len(in_flight)
                    break
                for future in done:
                    error = future.exception()
                    if error is not None:
                        failures[reason_of(error)] += 1
                    elif not future.result().released:
                        # Another node owns it, and acknowledged turns of it are on this node only.
                        failures["UNFLUSHED_TURNS"] += 1
                    else:
                        progress.released_sessions += 1
                        progress.remaining_sessions -= 1
                if parts.boot_ms() - reported_ms >= PROGRESS_EVERY_MS:
                    reported_ms = parts.boot_ms()
                    yield progress
            # The last round may have had no time to try; what the round before met still stands.
            seen = failures or seen
            progress.failed_sessions = sum(seen.values())
            progress.failures.clear()
            progress.failures.update(seen)
            owned, stranded = self._held()
            left = len(owned) + len(stranded)
            progress.remaining_sessions = left
            # Whoever owns what was offered may be on its way back.
            hopeless = bool(failures) and not any(
                REASONS[reason].retry_after_ms or reason == "UNFLUSHED_TURNS"
                for reason in failures
                if reason in REASONS
            )
            if not left or hopeless or parts.boot_ms() >= deadline_ms:
                progress.done = True
                progress.clean = not left
                if not left:
                    self.set_phase(admin_pb2.NODE_PHASE_DRAINED)
                yield progress
                return
            await asyncio.sleep(min(0.2, max(0.0, (deadline_ms - parts.boot_ms()) / 1000)))
