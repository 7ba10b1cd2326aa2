"""Startup, serve, drain: the only place where the parts are wired together."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from sessiond import __version__, core, telemetry
from sessiond.config import Settings
from sessiond.errors import Corrupt, Denied, SessiondError, Unavailable
from sessiond.keeper import Hears, Workers
from sessiond.service.forks import Forks
from sessiond.service.hotpath import HotPath
from sessiond.service.node import CallCounts, Node
from sessiond.service.ownership import Ownership, Parts
from sessiond.service.rescue import Rescues
from sessiond.service.router import Router
from sessiond.service.sessions import Sessions
from sessiond.service.states import States
from sessiond.service.watch import Watches
from sessiond.tiers.block import Block
from sessiond.tiers.cloud.bucket import open_bucket
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.cloud.fit import ensure_fit
from sessiond.tiers.cloud.lease import Lease, boot_clock_ms, last_seen_ms
from sessiond.tiers.cloud.open import open_configured
from sessiond.tiers.flush import Flusher
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hot.log import doubt_owned
from sessiond.tiers.hot.readers import OldReaders
from sessiond.tiers.hot.rows import PHASE_RELEASED, decode_head
from sessiond.tiers.hydrate import Claims, Segments
from sessiond.tiers.hydrate import Node as NodeIdentity
from sessiond.tiers.local_disk import refuse_network
from sessiond.tiers.peers import Owner, Peers
from sessiond.tiers.steady import SteadyClock
from sessiond.tiers.upkeep import Upkeep
from sessiond.tokens import Tokenizer
from sessiond.transport.options import TENANT
from sessiond.transport.peers import Credentials, PeerChannels, node_key
from sessiond.transport.server import Server
from sessiond.v1 import admin_pb2, session_pb2, state_pb2

log = structlog.get_logger("sessiond")

Result = TypeVar("Result")

STORE_THREADS = 32
COUNT_THREADS = 4
STOP_GRACE_S = 2.0
# At the start of a node that has served before, while its bucket does not answer: how often it is asked and told.
AWAITED = frozenset(("STORE_UNAVAILABLE", "COMMIT_UNKNOWN"))
STORE_AWAITED_S = 1.0
WATCH_S = 1.0
# How often workers learn of the clocks that expiry and idleness go by.
PUBLISHED_S = 0.25
# A disk counts as full for so long after it refused a turn.
DISK_FULL_S = 5.0
STORE_TOLD_EVERY = 30
WARM_AFTER_S = 3.0
DOUBTED_PER_COMMIT = 1000


def now_ms() -> int:
    """Milliseconds since 1970 UTC."""
    return time.time_ns() // 1_000_000


class Daemon:
    """One daemon: `run` until it is told to stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._failed: SessiondError | None = None
        self._calls = CallCounts()
        self._conditions: dict[str, Callable[[], bool]] = {}
        self._details: Callable[[], dict[str, Any]] = dict
        self._channels: PeerChannels | None = None
        self._rescuing: asyncio.Task[None] | None = None
        self._workers: Workers | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._old_readers: OldReaders | None = None
        self._holds = False
        self.port = 0
        self.served = False

    async def run(self) -> bool:
        """Start, serve until SIGTERM, SIGINT or a drain that shuts down, drain, stop. Whether the drain was clean.

        Raises SessiondError if it can't start, and if the hot tier failed; whatever was opened is closed then.
        """
        with contextlib.ExitStack() as opened:
            settings = self._settings
            if settings.workers:
                # Before anything is bound in it.
                self._hold(opened)
                self._workers = Workers(settings, private_folder(settings, opened))
                opened.callback(self._workers.close)
            limits = settings.request_bytes_max, settings.concurrent_calls_max, settings.watchers_max
            server = Server(boot_clock_ms, self._calls, *limits)
            try:
                node, lease = await self._start(server, opened)
            except BaseException:
                await self._stop(server, 0)
                raise
            await self._serve(server)
            if self._failed is not None:
                # Nothing is flushed or released: what could be read now may not be what is on the disk.
                node.set_phase(admin_pb2.NODE_PHASE_DRAINING)
                await self._stop(server, STOP_GRACE_S)
                raise self._failed
            clean = await self._drain(node)
            if self._rescuing is not None:
                self._rescuing.cancel()
            await self._stop(server, STOP_GRACE_S)
            if self._channels is not None:
                await self._channels.close()
            await asyncio.to_thread(lease.stop, clean)
        log.info(telemetry.STOPPED, clean=clean)
        return clean

    def _hold(self, opened: contextlib.ExitStack) -> None:
        """Be the only daemon on the data directory, from the first time on that this is called."""
        if not self._holds:
            refuse_network(str(self._settings.hot_dir), "data_dir")
            opened.callback(os.close, hold_data_dir(self._settings))
            self._holds = True

    async def _stop(self, server: Server, grace_s: float) -> None:
        """Take no more calls. Workers first: what they pass on is answered here."""
        if self._publishing is not None:
            self._publishing.cancel()
        if self._workers is not None:
            await self._workers.stop(grace_s)
        await server.stop(grace_s)

    async def _answer(self, server: Server) -> None:
        """Begin answering calls, if it has not begun."""
        await server.start()
        if self._workers is not None:
            await self._workers.start()

    async def _start(self, server: Server, opened: contextlib.ExitStack) -> tuple[Node, Lease]:
        settings = self._settings
        log.info(telemetry.STARTING, version=__version__, node=settings.node, compiled_core=core.COMPILED)
        if self._workers is None:
            self.port = server.bind(settings.listen)
        else:
            server.bind(self._workers.socket)
            self.port = self._workers.port
        if settings.unix_socket:
            server.bind(f"unix:{settings.unix_socket}")
        address = settings.address(self.port)
        tokenizer = Tokenizer()
        tokenizer.verify_vocabularies()
        store = CountingStore(open_configured(settings))
        opened.callback(store.close)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.shut_down.set)
        reach = partial(self._reach, server, settings)
        bucket = await reach(partial(open_bucket, store, bytes.fromhex(settings.hash_key), now_ms()))
        await reach(partial(ensure_fit, store))
        self._hold(opened)
        hot = Environment(settings.hot_dir, settings.map_size_bytes, settings.readers_max, settings.commit_group_max)
        opened.callback(hot.close)
        hot.check_store(bucket.store_id)

        def hot_tier_failed(failure: SessiondError) -> None:
            log.error(telemetry.HOT_TIER_FAILED, reason=failure.reason, message=str(failure))
            self._failed = failure
            if self._workers is not None:
                # From here on they answer nothing by themselves.
                self._workers.block.publish(phase=admin_pb2.NODE_PHASE_DRAINING)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(server.shut_down.set)

        hot.on_failed = hot_tier_failed

        def lease_lost() -> None:
            log.error(telemetry.LEASE_LOST, node=settings.node)
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(server.shut_down.set)

        lease = Lease(
            store,
            settings.node,
            hot.incarnation,
            address,
            settings.lease_ms,
            lease_lost,
            transaction_id=lambda: hot.transaction_id,
            on_fenced=partial(fenced, hot, settings.node),
        )
        if self._workers is not None:
            lease.on_change = partial(publish_lease, self._workers.block, lease)
        await reach(partial(take_node, lease, hot, hot.opened_at))
        # Only now: its commit would make an older copy of the disk look like a newer one to the next start.
        hot.bind_store(bucket.store_id)
        identity = NodeIdentity(hot.incarnation, settings.node, address)
        seen_ms = lease.seen_ms() or (0 if store.clock_ms() else last_seen_ms(store))
        expiry_ms = SteadyClock(now_ms, boot_clock_ms, store.clock_ms, seen_ms)
        lease.seen_ms = expiry_ms
        lease.start()
        opened.callback(lease.stop, False)
        flusher = Flusher(
            hot,
            store,
            bucket,
            identity,
            settings.flush_interval_ms,
            settings.flush_threads,
            now_ms,
            waiting_ms=settings.flush_waiting_ms,
            tenure=lambda: None if lease.fenced else lease.tenure,
        )
        flusher.start()
        opened.callback(flusher.stop)
        claims = Claims(hot, store, bucket, identity, time.sleep, lambda: lease.tenure)
        peers = Peers(store, identity, settings.lease_ms, on_fence=fenced_another)
        opened.callback(claims.close)
        executor = ThreadPoolExecutor(max_workers=STORE_THREADS, thread_name_prefix="store")
        opened.callback(executor.shutdown, wait=True, cancel_futures=True)
        counting = ThreadPoolExecutor(max_workers=COUNT_THREADS, thread_name_prefix="count")
        opened.callback(counting.shutdown, wait=True, cancel_futures=True)
        parts = Parts(
            hot=hot,
            store=store,
            bucket=bucket,
            node=identity,
            lease=lease,
            flusher=flusher,
            claims=claims,
            segments=Segments(store),
            tokenizer=tokenizer,
            executor=executor,
            counting=counting,
            clock_ms=now_ms,
            expiry_ms=expiry_ms,
            latest_ms=expiry_ms.latest_ms,
            running_ms=expiry_ms.running_ms,
            turn_bytes_max=settings.turn_bytes_max,
            default_budget_tokens=settings.default_budget_tokens,
            serve_unconfirmed=settings.serve_unconfirmed,
            peers=peers,
        )
        ownership = Ownership(parts)
        sessions = Sessions(parts, ownership)
        credentials = Credentials(node_key(bytes.fromhex(settings.node_key), bucket.hash_key), identity)
        self._channels = channels = PeerChannels(credentials)
        router = Router(parts, ownership, channels, settings.lease_ms)
        rescues = Rescues(parts, ownership, channels)
        ownership.on_reclaimed = rescues.reclaimed
        watches = Watches(parts, ownership, settings.watchers_max, channels)
        upkeep = Upkeep(
            hot,
            store,
            bucket,
            identity,
            flusher,
            tenants=lambda: [TENANT],
            # Whoever watches a session uses it, though nothing is read.
            resumed_ms=lambda h: expiry_ms.running_ms() if watches.is_watched(h) else ownership.resumed_ms(h),
            clock_ms=now_ms,
            steady_ms=expiry_ms,
            running_ms=expiry_ms.running_ms,
            idle_release_ms=settings.idle_release_ms,
            evict_at_percent=settings.evict_at_percent,
            wait=time.sleep,
            fenced=rescues.note,
            peers=peers,
            holds_lease=lease.is_valid,
        )
        upkeep.start()
        opened.callback(upkeep.stop)
        node = Node(parts, sessions, store, upkeep, __version__, settings.drain_grace_ms, self._calls, router, rescues)
        node.answered_for_others = lambda: server.answered_for_others
        node.watches = watches
        server.hot_path = HotPath(
            hot,
            bucket.hash_key,
            tokenizer,
            lease,
            settings.node,
            default_budget_tokens=settings.default_budget_tokens,
            serve_unconfirmed=settings.serve_unconfirmed,
            turn_bytes_max=settings.turn_bytes_max,
            clock_ms=now_ms,
            expiry_ms=expiry_ms,
            latest_ms=expiry_ms.latest_ms,
            running_ms=expiry_ms.running_ms,
            note_resumed=partial(note_resumed, ownership, router),
            note_appended=partial(note_appended, sessions, router),
            rungs=sessions.rungs,
        )
        server.serve(sessions, node, router, credentials, rescues.apply, hot.incarnation, watches)
        forks, states = Forks(parts, ownership, sessions), States(parts, ownership)
        server.also_serve("ForkSession", session_pb2.ForkSessionRequest, forks.fork)
        server.also_serve("GetState", state_pb2.GetStateRequest, states.get)
        server.also_serve("PutState", state_pb2.PutStateRequest, states.put)
        server.also_serve("DeleteState", state_pb2.DeleteStateRequest, states.delete)
        server.also_serve("ListStates", state_pb2.ListStatesRequest, states.list_states)
        server.also_serve("WarmSession", session_pb2.WarmSessionRequest, sessions.warm)
        sessions.ask = router.ask_to_resume
        self._rescuing = asyncio.create_task(rescues.run())
        self._conditions = {
            telemetry.CLOUD_TIER_AWAY: lambda: not node.cloud_answers,
            telemetry.LEASE_LAPSED: lambda: not lease.is_valid(),
            telemetry.DISK_FULL: lambda: time.monotonic() - hot.disk_full_at_s < DISK_FULL_S,
            telemetry.HOT_TIER_FULL: hot.is_full,
        }
        self._details = lambda: {"error": store.last_error or flusher.last_error}
        self._old_readers = OldReaders(hot, boot_clock_ms)
        node.old_readers = lambda: self._old_readers.old if self._old_readers is not None else []
        if self._workers is not None:
            self._lead(self._workers, hot, node, sessions, router, watches, expiry_ms)
            self._workers.open(hot, bucket.hash_key)
        if owns_nothing(hot) and await asyncio.to_thread(has_company, peers):
            # Nobody waits for this node: what it takes over must not wait for its first counts.
            await asyncio.to_thread(tokenizer.warm)
        if self._workers is not None:
            # Ready once all of them listen: connections stay with whichever took them.
            await self._answer(server)
        node.phase = admin_pb2.NODE_PHASE_SERVING
        await self._answer(server)
        if self._workers is not None:
            self._workers.block.publish(phase=node.phase)
        # Loading the vocabularies holds the interpreter for a quarter of a second that those who reconnect after a
        # restart must not wait for; the first append loads what it needs if it comes earlier.
        warm = threading.Timer(WARM_AFTER_S, tokenizer.warm)
        warm.daemon = True
        warm.start()
        opened.callback(warm.cancel)
        # What was imported stays for good: full collections need not walk it (4 to 12 ms each, bench/README.md).
        gc.freeze()
        self.served = True
        where = {"listen": settings.listen, "port": self.port, "address": address}
        log.info(telemetry.SERVING, **where, cloud=store.url, hot=str(hot.path))
        return node, lease

    def _lead(
        self,
        workers: Workers,
        hot: Environment,
        node: Node,
        sessions: Sessions,
        router: Router,
        watches: Watches,
        steady: SteadyClock,
    ) -> None:
        """Wire this node's state to the processes that answer calls for it."""

        def used(hashes: Collection[bytes]) -> None:
            for h in hashes:
                note_resumed(sessions.ownership, router, h)

        def counted(counts: dict[str, int]) -> None:
            for name, count in counts.items():
                kind, _, what = name.partition(":")
                if kind == "call":
                    self._calls.add(what, "OK", "", count)
                elif kind == "cancelled":
                    self._calls.add(what, "CANCELLED", "", count)
                elif kind == "rung":
                    sessions.rungs[what] += count
                elif kind == "turns":
                    sessions.turns_appended += count

        workers.hears = Hears(watches.changed, used, counted, hot.give_up)
        node.workers, node.worker_group_max = workers.status, workers.group_size_max
        health = node.on_phase

        def on_phase() -> None:
            workers.block.publish(phase=node.phase)
            health()

        node.on_phase = on_phase

        async def publish() -> None:
            while True:
                steady_ms, running_ms = steady.offsets_ms()
                workers.block.publish(steady_offset_ms=steady_ms, running_offset_ms=running_ms)
                await asyncio.sleep(PUBLISHED_S)

        steady_ms, running_ms = steady.offsets_ms()
        workers.block.publish(steady_offset_ms=steady_ms, running_offset_ms=running_ms)
        self._publishing = asyncio.create_task(publish())

    async def _reach(self, server: Server, settings: Settings, work: Callable[[], Result]) -> Result:
        """What asks the store for something at the start. A node that has served before waits for a bucket that does
        not answer, refusing calls as a node that starts: its sessions are on its disk, and whoever supervises it may
        give up on a daemon that ends again and again. A new one is told at once that its settings lead nowhere.
        """
        has_served = settings.cloud.startswith("s3:") and (settings.hot_dir / "data.mdb").exists()
        waits = 0
        while True:
            try:
                return await asyncio.to_thread(work)
            except Unavailable as error:
                if not has_served or error.reason not in AWAITED or server.shut_down.is_set():
                    raise
                server.waits_for = f" and waits for the cloud tier: {error.message.rstrip('.')}"
                if waits == 0:
                    await self._answer(server)
                if waits % STORE_TOLD_EVERY == 0:
                    log.warning(telemetry.STORE_AWAITED, reason=error.reason, message=error.message)
                waits += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.shut_down.wait(), STORE_AWAITED_S)

    async def _serve(self, server: Server) -> None:
        watch = asyncio.create_task(self._watch())
        await server.shut_down.wait()
        watch.cancel()

    async def _watch(self) -> None:
        """Log what begins to be wrong and what is over, each once; callers are told with every reply."""
        wrong: dict[str, int] = {}
        told: set[int] = set()
        while True:
            for name, holds in self._conditions.items():
                if holds() and name not in wrong:
                    wrong[name] = boot_clock_ms()
                    log.warning(name, **self._details())
                elif name in wrong and not holds():
                    log.info(name, over=True, lasted_ms=boot_clock_ms() - wrong.pop(name), **self._details())
            self._watch_readers(told)
            await asyncio.sleep(WATCH_S)

    def _watch_readers(self, told: set[int]) -> None:
        """Log each process once that has a read transaction open for long. told: those that were."""
        if self._old_readers is None or self._failed is not None:
            return
        old = dict(self._old_readers.look())
        for pid, age_ms in old.items():
            if pid not in told:
                log.warning(telemetry.OLD_READER, pid=pid, age_ms=age_ms)
        told.clear()
        told.update(old)

    async def _drain(self, node: Node) -> bool:
        if node.phase == admin_pb2.NODE_PHASE_DRAINED:
            return True
        log.info(telemetry.DRAINING)
        clean = False
        async for progress in node.drain(0):
            if progress.done:
                clean = progress.clean
                log.info(
                    telemetry.DRAINED,
                    clean=clean,
                    released=progress.released_sessions,
                    remaining=progress.remaining_sessions,
                    failures=dict(progress.failures),
                )
        return clean


def hold_data_dir(settings: Settings) -> int:
    """Be the only daemon on the data directory; the descriptor that holds it, until it is closed or the process ends.

    Raises Unavailable HOT_TIER_IN_USE, Denied UNWRITABLE_FOLDER.
    """
    path = Path(settings.data_dir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        # The folder itself: no file is left behind, and a kill lets go of it.
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        what = f"The folder {path} can't be used: {error}."
        raise Denied("UNWRITABLE_FOLDER", what, {"path": str(path)}, [("data_dir", str(error))]) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        what = f"Another daemon serves from {path}."
        raise Unavailable("HOT_TIER_IN_USE", what, {"path": str(path)}, [("data_dir", "in use")]) from error
    return descriptor


def note_resumed(ownership: Ownership, router: Router, h: bytes) -> None:
    """A session was read through this node, by a caller of its own."""
    ownership.note_resumed(h)
    router.asked_here(h)


def note_appended(sessions: Sessions, router: Router, h: bytes, turns: int) -> None:
    """Turns were appended through this node, by a caller of its own."""
    sessions.turns_appended += turns
    router.asked_here(h)


def private_folder(settings: Settings, opened: contextlib.ExitStack) -> int:
    """A descriptor of the data directory's folder that only this user can open. Raises Denied UNWRITABLE_FOLDER."""
    path = Path(settings.data_dir).absolute() / "run"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        opened.callback(os.close, descriptor)
        os.fchmod(descriptor, 0o700)
    except OSError as error:
        what = f"The folder {path} can't be used: {error}."
        raise Denied("UNWRITABLE_FOLDER", what, {"path": str(path)}, [("data_dir", str(error))]) from error
    return descriptor


def publish_lease(block: Block, lease: Lease) -> None:
    """Tell the workers how the lease stands."""
    block.publish(valid_until_ms=lease.valid_until_ms, tenure=lease.tenure, lost=lease.lost, fenced=lease.fenced)


def owns_nothing(hot: Environment) -> bool:
    """Whether a hot tier holds no session as its own, as after a drain or on a new disk."""
    with hot.read() as transaction:
        for key, value in transaction.scan("heads", b""):
            try:
                if decode_head(key, value).phase != PHASE_RELEASED:
                    return False
            except Corrupt:
                return False
    return True


def has_company(peers: Peers) -> bool:
    """Whether another node holds a lease of its own; False where the store does not say."""
    try:
        return bool(peers.living())
    except SessiondError:
        return False


def take_node(lease: Lease, hot: Environment, opened_at: int) -> None:
    """Take the node's name, and know before whether the hot tier may believe its rows. opened_at: its newest commit."""

    def believe(holder: dict[str, Any] | None) -> None:
        ours = holder is not None and holder.get("incarnation") == hot.incarnation
        # Another node took this one for gone, and may have taken sessions of it.
        fenced = holder is not None and bool(holder.get("fenced"))
        if ours and holder is not None and int(holder.get("txn", 0)) > opened_at:
            # An older copy of the disk was put back: what it says it owns went on without it.
            lease.rename(hot.mint_incarnation())
            ours = False
        if not ours or fenced:
            # Another hot tier, or none, held this node's name since these rows were written: they may own nothing now.
            doubt_all(hot)

    lease.acquire(believe)


def fenced(hot: Environment, node: str) -> None:
    """Another node took this one for gone while it stood still: what it owned may be another's now."""
    log.warning(telemetry.FENCED, node=node)
    doubt_all(hot)


def fenced_another(owner: Owner) -> None:
    """Another node was taken for gone by this one; its sessions are taken over as they are asked for."""
    log.warning(telemetry.PEER_FENCED, node=owner.name, address=owner.address, incarnation=owner.incarnation.hex())


def doubt_all(hot: Environment) -> None:
    """Have every session that this hot tier holds as owned looked up before it is served."""
    start: bytes | None = b""
    while start is not None:
        start = hot.run_blocking(partial(doubt_owned, start=start, limit=DOUBTED_PER_COMMIT))


def serve(settings: Settings) -> bool:
    """Run a daemon in this process until it is told to stop; whether everything was flushed and released."""
    telemetry.set_up_logs(settings.log_level)
    daemon = Daemon(settings)
    try:
        return asyncio.run(daemon.run())
    except SessiondError as error:
        if not daemon.served:
            log.error(telemetry.START_REFUSED, reason=error.reason, message=str(error))
        raise
