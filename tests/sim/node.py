"""One simulated node: a machine with a disk, and the daemon's parts wired on it as `sessiond.daemon` wires them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sessiond.core import envelope
from sessiond.daemon import doubt_all, note_appended, note_resumed, take_node
from sessiond.errors import Corrupt, SessiondError
from sessiond.service.forks import Forks
from sessiond.service.hotpath import HotPath
from sessiond.service.node import CallCounts
from sessiond.service.node import Node as Admin
from sessiond.service.ownership import Ownership, Parts
from sessiond.service.rescue import Rescues
from sessiond.service.router import Router
from sessiond.service.sessions import Sessions
from sessiond.service.states import States
from sessiond.service.watch import Watches
from sessiond.tiers.cloud.bucket import lease_key, open_bucket
from sessiond.tiers.cloud.lease import Lease, last_seen_ms
from sessiond.tiers.cloud.store import ObjectNotFound
from sessiond.tiers.flush import Flusher
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hydrate import Claims, Segments
from sessiond.tiers.hydrate import Node as Identity
from sessiond.tiers.peers import Peers
from sessiond.tiers.steady import SteadyClock
from sessiond.tiers.upkeep import Upkeep
from sessiond.tokens import Tokenizer
from sessiond.transport.peers import Credentials, node_key
from sessiond.v1 import admin_pb2, session_pb2, state_pb2
from tests.sim.bucket import START_MS, Link
from tests.sim.schedule import FiberPool, Host
from tests.sim.wire import ANSWERED, Context, RpcError, SimChannels, SimServer, unreachable

if TYPE_CHECKING:
    from tests.sim.world import World

MAP_BYTES = 256 * 1024**2
TENANT = "default"
WATCHERS_MAX = 100
TOKENIZER = Tokenizer()

Reply = Callable[[Any], None]
Cancel = Callable[[], None]


class Commits:
    """Commits in place of the commit thread: a fiber of the host, after as long as an fsync takes."""

    def __init__(self, host: Host, fsync_us: int) -> None:
        self._host = host
        self._fsync_us = fsync_us
        self._active = False
        self._waiting: list[tuple[threading.Event, Any, int]] = []
        self.hot: Environment | None = None

    def queued(self) -> None:
        if not self._active:
            self._active = True
            self._host.spawn("commit", self._run)

    def _run(self) -> None:
        assert self.hot is not None
        schedule = self._host.schedule
        while self.hot._queue.qsize():
            schedule.sleep_us(1 + int(schedule.rng.random() * self._fsync_us))
            self.hot.commit_next()
            # Those who waited for this commit learn of it: unless the process ends right here.
            schedule.sleep_us(1)
            done = [entry for entry in self._waiting if entry[0].is_set()]
            self._waiting = [entry for entry in self._waiting if not entry[0].is_set()]
            for _, fiber, turn in done:
                schedule.wake(fiber, turn)
        self._active = False

    def wait(self, done: threading.Event) -> None:
        fiber, turn = self._host.schedule.arm()
        self._waiting.append((done, fiber, turn))
        self._host.schedule.park()


@dataclass(frozen=True)
class Disk:
    """A disk, by a name that no other has."""

    name: str
    path: Path


class Machine:
    """A node by its name: at most one daemon on one disk at a time, started and ended by the world."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.daemon: SimDaemon | None = None
        self.disk = world.new_disk(name)
        # (when, number of the newest commit, folder) of each copy of the disk.
        self.copies: list[tuple[int, int, Path]] = []
        self.starts = 0
        self.clock_rate = 1.0 + world.rng.choice((0, 0, 1e-4, -1e-4, 0.05, -0.05))
        self.boot_offset_us = int(world.rng.random() * 1e12)
        self.wall_jump_us = 0

    def start(self) -> None:
        assert self.daemon is None
        self.starts += 1
        schedule = self.world.schedule
        host = Host(schedule, self.name)
        host.disk_name = self.disk.name
        host.clock_rate, host.boot_offset_us = self.clock_rate, self.boot_offset_us
        host.wall_offset_us = START_MS * 1000 - self.boot_offset_us + self.wall_jump_us
        schedule.note(self.name, f"starts on {self.disk.name}")
        self.daemon = SimDaemon(self, host)
        host.spawn("start", self.daemon.start)

    def kill(self) -> None:
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            self.world.schedule.note(self.name, "ends")
            daemon.kill()

    def copy_disk(self) -> None:
        """Somebody takes a copy of the disk as it is."""
        if self.daemon is None or self.daemon.hot is None:
            return
        path = self.world.folder / f"copy-{self.disk.name}-{len(self.copies)}"
        path.mkdir()
        shutil.copyfile(self.disk.path / "data.mdb", path / "data.mdb")
        self.copies.append((self.world.schedule.now_us, self.daemon.hot.transaction_id, path))

    def lose_disk(self) -> None:
        assert self.daemon is None
        self.world.history.disk_lost(self.disk)
        self.world.disks_lost = True
        self.disk = self.world.new_disk(self.name)
        self.copies = []

    def older_copies(self) -> list[tuple[int, Path]]:
        """(when, folder) of copies from before the newest renewal: what a lease can tell from the disk itself."""
        try:
            stored = self.world.direct.get(lease_key(self.name)).body
        except ObjectNotFound:
            return []
        newest = int(envelope.unseal(stored, envelope.KIND_LEASE, self.name)[0]["txn"])
        return [(taken_us, path) for taken_us, commit, path in self.copies if commit < newest]

    def restore_disk(self) -> None:
        """An older copy of the disk is put in its place."""
        assert self.daemon is None
        taken_us, copy = self.world.chaos.choice(self.older_copies())
        self.world.history.disk_lost(self.disk)
        self.world.disks_lost = True
        before, self.disk = self.disk, self.world.new_disk(self.name)
        self.disk.path.mkdir(parents=True)
        shutil.copyfile(copy / "data.mdb", self.disk.path / "data.mdb")
        self.world.history.disk_restored(before, self.disk, taken_us)


class SimDaemon:
    """A daemon's process on a machine."""

    def __init__(self, machine: Machine, host: Host) -> None:
        self.machine = machine
        self.world = machine.world
        self.host = host
        self.disk = machine.disk
        self.serving = False
        self.stopping = False
        self.hot: Environment | None = None
        self.link = Link(self.world.region, host)
        self.counts = CallCounts()
        self.server = SimServer(host, self.counts)
        self._calls: dict[int, Reply] = {}
        self._call_numbers = 0
        # What tells this process from any other: see tiers/cloud/lease.py.
        self.process = self.world.next_process(self)

    # Starting, as daemon._start does ----------------------------------------------------------------------------------

    def start(self) -> None:
        try:
            self._start()
        except SessiondError as error:
            self.host.schedule.note(self.host.name, f"start refused: {error.reason}")
            if isinstance(error, Corrupt):
                self.host.schedule.defect(self.host, f"start refused: {error.reason} {error.message}", error)
            self.host.schedule.after(1, lambda: self.world.ended(self))

    def _start(self) -> None:
        world, host, schedule, link = self.world, self.host, self.host.schedule, self.link
        knobs = world.knobs
        bucket = open_bucket(link, b"", host.wall_ms())
        commits = Commits(host, knobs.fsync_us)
        self.hot = hot = Environment(self.disk.path, MAP_BYTES, 126, knobs.group_max, commits)
        commits.hot = hot
        hot.check_store(bucket.store_id)
        name, address = self.machine.name, self.machine.name
        lease = Lease(
            link,
            name,
            hot.incarnation,
            address,
            knobs.lease_ms,
            self._lease_lost,
            wait=schedule.sleep,
            clock_ms=host.boot_ms,
            transaction_id=lambda: hot.transaction_id,
            on_fenced=partial(doubt_all, hot),
        )
        take_node(lease, hot, hot.opened_at)
        hot.bind_store(bucket.store_id)
        identity = Identity(hot.incarnation, name, address)
        seen_ms = lease.seen_ms() or (0 if link.clock_ms() else last_seen_ms(link))
        expiry_ms = SteadyClock(host.wall_ms, host.boot_ms, link.clock_ms, seen_ms)
        lease.seen_ms = expiry_ms
        flusher = Flusher(
            hot,
            link,
            bucket,
            identity,
            knobs.flush_interval_ms,
            knobs.flush_threads,
            host.wall_ms,
            schedule.sleep,
            waiting_ms=knobs.flush_interval_ms * 4,
            tenure=lambda: None if lease.fenced else lease.tenure,
            boot_ms=host.boot_ms,
            pools=(FiberPool(host, "flush", knobs.flush_threads), FiberPool(host, "flush-now", knobs.flush_threads)),
        )
        claims = Claims(hot, link, bucket, identity, schedule.sleep, lambda: lease.tenure, FiberPool(host, "index", 16))
        peers = Peers(link, identity, knobs.lease_ms, host.boot_ms)
        parts = Parts(
            hot=hot,
            store=link,
            bucket=bucket,
            node=identity,
            lease=lease,
            flusher=flusher,
            claims=claims,
            segments=Segments(link),
            tokenizer=TOKENIZER,
            executor=FiberPool(host, "store", 32),
            counting=FiberPool(host, "count", 4),
            clock_ms=host.wall_ms,
            expiry_ms=expiry_ms,
            latest_ms=expiry_ms.latest_ms,
            running_ms=expiry_ms.running_ms,
            turn_bytes_max=1 << 20,
            default_budget_tokens=4000,
            serve_unconfirmed=knobs.serve_unconfirmed,
            peers=peers,
            boot_ms=host.boot_ms,
        )
        ownership = Ownership(parts)
        self.sessions = Sessions(parts, ownership)
        credentials = Credentials(node_key(b"", bucket.hash_key), identity)
        channels = SimChannels(world, host, credentials)
        router = Router(parts, ownership, channels, knobs.lease_ms)
        rescues = Rescues(parts, ownership, channels)
        watches = Watches(parts, ownership, WATCHERS_MAX, channels)
        # A set of hashes has another order in every process.
        tell = hot.on_commit
        hot.on_commit = lambda changed: tell(sorted(changed))
        upkeep = Upkeep(
            hot,
            link,
            bucket,
            identity,
            flusher,
            tenants=lambda: [TENANT],
            resumed_ms=lambda h: expiry_ms.running_ms() if watches.is_watched(h) else ownership.resumed_ms(h),
            clock_ms=host.wall_ms,
            steady_ms=expiry_ms,
            running_ms=expiry_ms.running_ms,
            idle_release_ms=knobs.idle_release_ms,
            evict_at_percent=knobs.evict_at_percent,
            wait=schedule.sleep,
            fenced=rescues.note,
            peers=peers,
        )
        self.admin = Admin(
            parts,
            self.sessions,
            link,  # type: ignore[arg-type]
            upkeep,
            "sim",
            knobs.drain_grace_ms,
            self.counts,
            router,
            rescues,
        )
        self.admin.watches = watches
        if knobs.hot_path:
            self.server.hot_path = HotPath(
                hot,
                bucket.hash_key,
                TOKENIZER,
                lease,
                name,
                default_budget_tokens=parts.default_budget_tokens,
                serve_unconfirmed=parts.serve_unconfirmed,
                turn_bytes_max=parts.turn_bytes_max,
                clock_ms=host.wall_ms,
                expiry_ms=expiry_ms,
                latest_ms=expiry_ms.latest_ms,
                running_ms=expiry_ms.running_ms,
                note_resumed=partial(note_resumed, ownership, router),
                note_appended=partial(note_appended, self.sessions, router),
                rungs=self.sessions.rungs,
            )
        self.server.serve(self.sessions, self.admin, router, credentials, rescues.apply, hot.incarnation, watches)
        forks, states = Forks(parts, ownership, self.sessions), States(parts, ownership)
        self.server.also_serve("ForkSession", session_pb2.ForkSessionRequest, forks.fork)
        self.server.also_serve("GetState", state_pb2.GetStateRequest, states.get)
        self.server.also_serve("PutState", state_pb2.PutStateRequest, states.put)
        self.server.also_serve("DeleteState", state_pb2.DeleteStateRequest, states.delete)
        self.server.also_serve("ListStates", state_pb2.ListStatesRequest, states.list_states)
        self.server.also_serve("WarmSession", session_pb2.WarmSessionRequest, self.sessions.warm)
        self.sessions.ask = router.ask_to_resume
        self.lease, self.flusher, self.bucket = lease, flusher, bucket
        host.spawn("lease", partial(self._every, knobs.lease_ms / 3000, self._renew))
        host.spawn("flusher", partial(self._every, knobs.flush_interval_ms / 2000, flusher.tick))
        host.spawn("upkeep", partial(self._every, knobs.upkeep_s, upkeep.tick))
        host.loop.call_soon(lambda: host.loop.create_task(rescues.run()))
        self.admin.phase = admin_pb2.NODE_PHASE_SERVING
        self.serving = True
        schedule.note(host.name, f"serves as {hot.incarnation.hex()[:8]}")

    def _every(self, seconds: float, work: Callable[[], object]) -> None:
        while not self.stopping:
            self.host.schedule.sleep(seconds)
            work()

    def _renew(self) -> None:
        was = self.lease.is_valid()
        self.lease.renew()
        if self.lease.lost:
            self._lease_lost()
            self.host.schedule.sleep(1e6)
        if self.lease.is_valid() != was:
            self.host.schedule.note(self.host.name, f"lease valid: {self.lease.is_valid()}")

    def _lease_lost(self) -> None:
        self.host.schedule.note(self.host.name, "lost its name")
        self.serving = False
        # The daemon stops; its supervisor starts another, which waits for the name.
        self.host.schedule.after(1, lambda: self.world.ended(self))

    def kill(self) -> None:
        self.serving = False
        self.host.kill()
        for reply in list(self._calls.values()):
            reply(unreachable("connection reset"))
        self._calls.clear()
        if self.hot is not None:
            self.hot._release()
            self.hot = None

    # Serving ----------------------------------------------------------------------------------------------------------

    def arrive(self, method: str, request: bytes, timeout_ms: int, metadata: Any, reply: Reply) -> Cancel:
        """A call has come over the network; what is answered goes to `reply`, once. Returns what calls it off."""
        self._call_numbers += 1
        number = self._call_numbers
        self._calls[number] = reply
        tasks: list[Any] = []

        def answer(outcome: Any) -> None:
            if self._calls.pop(number, None) is not None:
                reply(outcome)

        def begin() -> None:
            context = Context(self.host, timeout_ms, metadata)
            tasks.append(self.host.loop.create_task(self._serve(method, request, context, answer)))

        def cancel() -> None:
            # Its caller's time is up, or has gone: gRPC calls the handler off.
            if self._calls.pop(number, None) is not None:
                for task in tasks:
                    self.host.loop.call_soon(task.cancel)

        self.host.loop.call_soon(begin)
        self.world.schedule.after(timeout_ms * 1000, cancel)
        return cancel

    async def _serve(self, method: str, raw: bytes, context: Context, answer: Reply) -> None:
        ANSWERED.set(method)
        try:
            reply = await self.server.handler(method)(raw, context)
        except RpcError as error:
            self.host.schedule.note(self.host.name, f"{method} refused: {error.code().name}: {error.details()}")
            answer(error)
        else:
            answer(reply)

    async def drain(self) -> bool:
        clean = False
        async for progress in self.admin.drain(0):
            clean = bool(progress.done and progress.clean)
        return clean
