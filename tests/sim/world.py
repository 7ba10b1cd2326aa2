"""One world: nodes over one bucket, devices that talk to them, and what befalls them; everything from one seed."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from sessiond import verify
from sessiond.client.failures import failure_of
from sessiond.core import envelope, invariants, rules
from sessiond.core import state as states
from sessiond.errors import Corrupt
from sessiond.tiers import compact, flush
from sessiond.tiers.cloud import lease as leases
from sessiond.tiers.cloud.bucket import open_bucket
from sessiond.tiers.cloud.store import ObjectNotFound
from sessiond.tiers.hot import environment, log
from sessiond.tiers.hot.rows import PHASE_DOUBTED, PHASE_FENCED, PHASE_RELEASING, decode_head
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from tests.sim.bucket import Direct, Region
from tests.sim.devices import Device
from tests.sim.history import History
from tests.sim.node import TENANT, Disk, Machine, SimDaemon
from tests.sim.schedule import FiberPool, Host, Schedule, Trace
from tests.sim.weather import Weather
from tests.sim.wire import RpcError, too_late, unreachable

SECOND = 1_000_000
REPLIES: dict[str, Any] = {
    "CreateSession": session_pb2.CreateSessionResponse,
    "GetSession": session_pb2.GetSessionResponse,
    "ListSessions": session_pb2.ListSessionsResponse,
    "UpdateSession": session_pb2.UpdateSessionResponse,
    "DeleteSession": session_pb2.DeleteSessionResponse,
    "ListCheckpoints": session_pb2.ListCheckpointsResponse,
    "ResumeSession": session_pb2.ResumeSessionResponse,
    "AppendTurn": session_pb2.AppendTurnResponse,
    "ListOrphans": session_pb2.ListOrphansResponse,
    "ListTurns": session_pb2.ListTurnsResponse,
}
REPLIES |= {"Release": admin_pb2.ReleaseResponse, "Flush": admin_pb2.FlushResponse}


@dataclass
class Knobs:
    """The settings of a world's nodes, and what its devices are up to."""

    nodes: int
    lease_ms: int
    flush_interval_ms: int
    flush_threads: int
    idle_release_ms: int
    evict_at_percent: int
    upkeep_s: float
    group_max: int
    fsync_us: int
    drain_grace_ms: int
    serve_unconfirmed: bool
    # Whether a node that starts can tell if the process before it on its machine is gone.
    sees_processes: bool
    deletes: bool
    sessions: list[str]
    devices: int
    actions: int
    faults_us: int
    # Small limits, so that few and short turns meet them.
    inline_bytes: int
    merge_min: int
    # Whether the hot path answers what it can, as it does in a daemon.
    hot_path: bool = True
    cloud_only: set[str] = field(default_factory=set)
    expiry: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rng: random.Random, nodes: int | None) -> Knobs:
        lease_ms = rng.choice((200, 300, 500, 1000))
        sessions = [f"s{number}" for number in range(rng.choice((1, 1, 1, 2, 3)))]
        knobs = cls(
            nodes=nodes or rng.choice((1, 2, 2, 2, 2, 3, 3)),
            lease_ms=lease_ms,
            flush_interval_ms=rng.choice((200, 1000, 5000)),
            flush_threads=rng.choice((1, 4)),
            idle_release_ms=rng.choice((0, 3000, 20_000)),
            evict_at_percent=rng.choice((0, 80, 80)),
            upkeep_s=rng.choice((0.5, 2.0)),
            group_max=rng.choice((1, 3, 64)),
            fsync_us=rng.choice((100, 2000, 30_000)),
            drain_grace_ms=rng.choice((1000, 5000)),
            serve_unconfirmed=rng.random() < 0.8,
            sees_processes=rng.random() < 0.5,
            deletes=rng.random() < 0.3,
            sessions=sessions,
            devices=rng.choice((1, 2, 2)),
            actions=rng.choice((10, 20, 30)),
            faults_us=rng.choice((5, 8, 15)) * SECOND,
            inline_bytes=rng.choice((400, 1500, 65_536)),
            merge_min=rng.choice((3, 32)),
        )
        for name in sessions:
            if rng.random() < 0.12:
                knobs.cloud_only.add(name)
            if rng.random() < 0.10:
                action = rng.choice((turn_pb2.EXPIRY_ACTION_ARCHIVE, turn_pb2.EXPIRY_ACTION_DELETE))
                mode = rng.choice((turn_pb2.EXPIRY_MODE_SLIDING, turn_pb2.EXPIRY_MODE_FIXED))
                knobs.expiry[name] = turn_pb2.Expiry(ttl_ms=rng.choice((5000, 30_000)), mode=mode, action=action)
        knobs.hot_path = rng.random() < 0.7
        return knobs


@dataclass
class Result:
    """What a world came to."""

    seed: int
    digest: str
    events: int
    violations: list[tuple[str, str]]
    virtual_s: float
    acks: int
    confirmed: int
    steals: int
    faults: list[str]

    @property
    def command(self) -> str:
        return f"python -m tests.sim --seed {self.seed}"


class World:
    """Everything there is. `run` once."""

    def __init__(self, seed: int, folder: Path, trace: Trace, nodes: int | None = None) -> None:
        self.seed = seed
        self.folder = folder
        # Dice of their own for each concern, so that a change of one leaves the others as they were.
        self.rng = random.Random(f"{seed} devices")
        self.schedule = Schedule(random.Random(f"{seed} schedule"), trace)
        self.entropy = random.Random(f"{seed} entropy")
        self.chaos = random.Random(f"{seed} chaos")
        knobs_rng = random.Random(f"{seed} knobs")
        self.knobs = Knobs.of(knobs_rng, nodes)
        self.weather = Weather.of(random.Random(f"{seed} weather"))
        self.weather.now_us = lambda: self.schedule.now_us
        self.history = History(self.schedule)
        self.region = Region(
            self.schedule, self.weather, knobs_rng.random() < 0.5, knobs_rng.random() < 0.5, {}, self.history
        )
        self.direct = Direct(self.region)
        self.history.fenced = self.fenced
        self._disks = 0
        self.processes: dict[int, SimDaemon] = {}
        self.clients = Host(self.schedule, "clients")
        self.machine_names = [f"n{number}" for number in range(1, self.knobs.nodes + 1)]
        self.machines = {name: Machine(self, name) for name in self.machine_names}
        self.zombies: list[SimDaemon] = []
        # Refusals that what befell this world explains.
        self.forgiven: set[str] = set()
        self.faults: list[str] = []
        self.disks_lost = False
        # Of the duel that goes on: for how many leases somebody is away.
        self._away = 0.0
        self._living = 0

    # What parts of the world ask of it --------------------------------------------------------------------------------

    def new_disk(self, name: str) -> Disk:
        self._disks += 1
        return Disk(f"{name}-{self._disks}", self.folder / f"{name}-{self._disks}")

    def next_process(self, daemon: SimDaemon) -> int:
        number = 10_000_000 + len(self.processes)
        self.processes[number] = daemon
        return number

    def ended(self, daemon: SimDaemon) -> None:
        """A daemon stops because it lost its name; whatever supervises it starts another."""
        if daemon in self.zombies:
            self.zombies.remove(daemon)
            daemon.kill()
            return
        machine = daemon.machine
        if machine.daemon is daemon and daemon.host.alive:
            machine.kill()
            self.schedule.after(1 * SECOND, lambda: machine.start() if machine.daemon is None else None)

    def process_identity(self) -> dict[str, Any]:
        assert self.schedule.current is not None
        host = self.schedule.current.host
        number = next(number for number, daemon in self.processes.items() if daemon.host is host)
        where = host.name
        return {"boot_id": where, "machine_id": where, "pid_namespace": "", "pid": number, "start_ticks": number}

    def is_alive(self, holder: dict[str, Any]) -> bool | None:
        assert self.schedule.current is not None
        if not self.knobs.sees_processes or holder.get("boot_id") != self.schedule.current.host.name:
            return None
        daemon = self.processes.get(int(holder.get("pid", 0)))
        if daemon in self.zombies:
            return None  # on another machine
        return daemon is not None and daemon.host.alive

    # The network ------------------------------------------------------------------------------------------------------

    async def call(self, node: str, method: str, request: Any, timeout_s: float) -> Any:
        """A device's call: the reply, or what our client makes of the failure."""
        answer = await self.call_node(self.clients, node, method, request.SerializeToString(), timeout_s, ())
        if isinstance(answer, RpcError):
            failure = failure_of(answer, node)
            self.schedule.note("clients", f"{method} via {node}: {failure.error.reason}")
            return failure
        return REPLIES[method].FromString(answer)

    async def call_node(
        self, source: Host, target: str, method: str, raw: bytes, timeout_s: float, metadata: Any
    ) -> Any:
        """The bytes that the node at an address answers, or an RpcError."""
        schedule, loop = self.schedule, source.loop
        future = loop.create_future()
        plan = self.weather.call(source.name, target)
        timeout_ms = max(1, int(timeout_s * 1000))
        calls_off: list[Callable[[], None]] = []

        def settle(outcome: Any) -> None:
            if not future.done():
                future.set_result(outcome)

        def back(outcome: Any) -> None:
            if plan.reply is not None:
                schedule.after(plan.reply, lambda: loop.call_soon(settle, outcome))

        def arrive() -> None:
            machine = self.machines.get(target)
            daemon = machine.daemon if machine is not None else None
            if daemon is None:
                back(unreachable(f"nobody listens at {target}"))
            else:
                calls_off.append(daemon.arrive(method, raw, timeout_ms, metadata, back))

        for at in (plan.request, plan.again):
            if at is not None:
                schedule.after(at, arrive)
        timer = loop.call_later(timeout_s, settle, too_late())
        try:
            return await future
        except asyncio.CancelledError:
            for call_off in calls_off:
                schedule.after(self.weather.call_us, call_off)
            raise
        finally:
            timer.cancel()

    # What befalls it --------------------------------------------------------------------------------------------------

    def plan_faults(self) -> None:
        """Put what befalls this world into its future."""
        rng, end_us = self.chaos, self.knobs.faults_us
        duels = self.knobs.nodes > 1 and rng.random() < 0.6
        if duels:
            self.schedule.at(2 * SECOND + int(rng.random() * SECOND), self._duel)
        kinds: list[Callable[[str], str]] = [
            self.crash,
            self.crash,
            self.freeze,
            self.freeze,
            self.strand,
            self.strand,
            self.strand,
            self.cut,
            self.cut,
            self.outage,
            self.outage,
            self.jump,
            self.lose_disk,
            self.copy,
            self.restore,
            self.drain,
            self.drain,
            self.release,
            self.replace,
        ]
        # Where everybody is away nobody takes anything over.
        for _ in range(rng.choice((0, 0, 1, 2) if duels else (0, 2, 4, 6, 9, 12))):
            kind, name = rng.choice(kinds), rng.choice(self.machine_names)
            at_us = 2 * SECOND + int(rng.random() * end_us)
            self.schedule.at(at_us, lambda kind=kind, name=name: self._befall(kind, name))  # type: ignore[misc]

    def _duel(self) -> None:
        """Whoever owns a session is away for longer than the others wait, comes back, and then the next one."""
        if self.weather.calm:
            return
        rng = self.chaos
        present = self.history.sessions[rng.choice(self.knobs.sessions)].present
        owner = str(present.owner[1]) if present is not None and present.owner is not None else ""
        name = owner if owner in self.machines else rng.choice(self.machine_names)
        kind = rng.choice((self.freeze, self.freeze, self.strand, self.strand, self.strand, self.crash, self.replace))
        self._away = 4 + 8 * rng.random()
        self._befall(kind, name)
        away_us, self._away = int(self._away * self.knobs.lease_ms * 1000), 0.0
        self.schedule.after(int(away_us * (0.5 + rng.random())), self._duel)

    def _befall(self, kind: Callable[[str], str], name: str) -> None:
        if self.weather.calm:
            return
        told = kind(name)
        if told:
            self.faults.append(f"{self.schedule.now_us / 1e6:.3f} {name} {told}")
            self.schedule.note("fault", f"{name}: {told}")

    def _pause_us(self) -> int:
        """How long something lasts: from an instant to many leases."""
        if self._away:
            return int(self._away * self.knobs.lease_ms * 1000)
        return int(self.knobs.lease_ms * 1000 * self.chaos.choice((0.2, 0.8, 2, 4, 4, 8)) * (0.5 + self.chaos.random()))

    def _long_us(self) -> int:
        """How long a node is away: mostly for longer than the lease that others wait for."""
        if self._away:
            return int(self._away * self.knobs.lease_ms * 1000)
        return int(self.knobs.lease_ms * 1000 * self.chaos.choice((1, 4, 8, 16, 30)) * (0.5 + self.chaos.random()))

    def _restart(self, name: str, after_us: int) -> None:
        machine = self.machines[name]
        self.schedule.after(after_us, lambda: machine.start() if machine.daemon is None else None)

    def crash(self, name: str) -> str:
        machine = self.machines[name]
        if machine.daemon is None:
            return ""
        machine.kill()
        after_us = self._pause_us()
        self._restart(name, after_us)
        return f"crash, back after {after_us / 1e6:.3f} s"

    def freeze(self, name: str) -> str:
        daemon = self.machines[name].daemon
        if daemon is None or daemon.host.frozen:
            return ""
        after_us = self._long_us()
        daemon.host.freeze()
        self.schedule.after(after_us, lambda: self._thaw(daemon))
        return f"freeze for {after_us / 1e6:.3f} s"

    def _thaw(self, daemon: SimDaemon) -> None:
        if daemon.host.alive and daemon.host.frozen:
            self.schedule.note("fault", f"{daemon.host.name}: thaw")
            daemon.host.thaw()

    def fenced(self, name: str, by: Host) -> None:
        """Another node took this one for gone. Just now is when it may come back, and when the other may be slow."""
        daemon = self.machines[name].daemon if name in self.machines else None
        if self.weather.calm or daemon is None or daemon.host is by:
            return
        if self.chaos.random() < 0.5:
            self.weather.slow[by.name] = self.schedule.now_us + int(self.knobs.lease_ms * 1000 * self.chaos.random())
        if daemon.host.frozen and self.chaos.random() < 0.6:
            self.schedule.after(int(self.chaos.random() * self.knobs.lease_ms * 500), lambda: self._thaw(daemon))
        elif self.chaos.random() < 0.6:
            links = {(name, "store"), ("store", name)}
            self.schedule.after(
                int(self.chaos.random() * self.knobs.lease_ms * 500),
                lambda: self.weather.cut.difference_update(links),
            )

    def cut(self, name: str) -> str:
        others = ["store", "store", "clients", *(other for other in self.machine_names if other != name)]
        other = self.chaos.choice(others)
        links = self.chaos.choice(([(name, other)], [(other, name)], [(name, other), (other, name)]))
        after_us = self._pause_us()
        self.weather.cut.update(links)
        self.schedule.after(after_us, lambda: self.weather.cut.difference_update(links))
        return f"cut {links} for {after_us / 1e6:.3f} s"

    def strand(self, name: str) -> str:
        """A node can't reach the store, and maybe no other node: it serves what it has, and is taken for gone."""
        links = [(name, "store"), ("store", name)]
        if self.chaos.random() < 0.5:
            links += [(name, other) for other in self.machine_names] + [(other, name) for other in self.machine_names]
        if self.chaos.random() < 0.3:
            links += [(name, "clients"), ("clients", name)]
        after_us = self._long_us()
        self.weather.cut.update(links)
        self.schedule.after(after_us, lambda: self.weather.cut.difference_update(links))
        return f"stranded, cut off by {len(links)} links, for {after_us / 1e6:.3f} s"

    def outage(self, name: str) -> str:
        hosts = self.chaos.choice(([name], self.machine_names))
        how = self.chaos.choice(("failed", "failed", "unsent", "deaf", "deaf"))
        # A store may be in order but for some of its keys.
        prefix = self.chaos.choice(("", "", "m/", "m/", "s/", "n/"))
        after_us = self._pause_us()
        for host in hosts:
            self.weather.outage[host] = how, prefix

        def over() -> None:
            for host in hosts:
                self.weather.outage.pop(host, None)

        self.schedule.after(after_us, over)
        return f"the store refuses {hosts} keys {prefix}*: {how}, for {after_us / 1e6:.3f} s"

    def jump(self, name: str) -> str:
        machine = self.machines[name]
        by_s = self.chaos.choice((-3600, -30, -2, 2, 30, 3600, 86_400))
        machine.wall_jump_us += by_s * SECOND
        if machine.daemon is not None:
            machine.daemon.host.wall_offset_us += by_s * SECOND
        return f"wall clock jumps by {by_s} s"

    def lose_disk(self, name: str) -> str:
        machine = self.machines[name]
        if machine.daemon is None:
            return ""
        machine.kill()
        machine.lose_disk()
        after_us = self._pause_us()
        self._restart(name, after_us)
        return f"crash with its disk, back after {after_us / 1e6:.3f} s"

    def copy(self, name: str) -> str:
        self.machines[name].copy_disk()
        return "copy of the disk"

    def restore(self, name: str) -> str:
        machine = self.machines[name]
        if machine.daemon is None or not machine.older_copies():
            machine.copy_disk()
            return "copy of the disk"
        machine.kill()
        machine.restore_disk()
        self.forgiven.add("HISTORY_DIVERGED")
        after_us = self._pause_us()
        self._restart(name, after_us)
        return f"crash, and an old disk, back after {after_us / 1e6:.3f} s"

    def drain(self, name: str) -> str:
        daemon = self.machines[name].daemon
        if daemon is None or not daemon.serving or daemon.stopping or daemon.host.frozen:
            return ""
        daemon.stopping = True
        machine, after_us = self.machines[name], self._pause_us()

        async def stop() -> None:
            clean = await daemon.drain()
            self.schedule.note(name, f"drained, clean: {clean}")
            daemon.serving = False
            await asyncio.wrap_future(FiberPool(daemon.host, "stop", 1).submit(daemon.lease.stop, clean))
            self.schedule.after(1, over)

        def over() -> None:
            if machine.daemon is daemon:
                machine.kill()
                self._restart(name, after_us)

        daemon.host.loop.call_soon(lambda: daemon.host.loop.create_task(stop()))
        return "drain"

    def release(self, name: str) -> str:
        session = self.chaos.choice(self.knobs.sessions)
        request = admin_pb2.ReleaseRequest(session_ids=[session])
        self.clients.loop.call_soon(lambda: self.clients.loop.create_task(self.call(name, "Release", request, 5.0)))
        return f"release of {session}"

    def replace(self, name: str) -> str:
        """The machine stands still, and another takes its name with an empty disk; later the first goes on."""
        machine = self.machines[name]
        daemon = machine.daemon
        if daemon is None or daemon.host.frozen:
            return ""
        daemon.host.freeze()
        self.zombies.append(daemon)
        machine.daemon = None
        machine.lose_disk()
        machine.start()
        after_us = self._pause_us()
        self.schedule.after(after_us, lambda: self._thaw(daemon))
        # Whoever gave its name away sees to it in the end.
        self.schedule.after(after_us + self._pause_us(), lambda: self.ended(daemon))
        return f"stands still, and another machine takes the name; the first goes on after {after_us / 1e6:.3f} s"

    # Its course -------------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        with patched(self):
            try:
                self._run()
            finally:
                self.end()
        violations = [("DEFECT", what) for what in self.schedule.defects] + self.history.violations
        trace = self.schedule.trace
        return Result(
            self.seed,
            trace.digest,
            trace.events,
            violations,
            self.schedule.now_us / 1e6,
            self.history.acks,
            self.history.confirmed,
            self.history.steals,
            self.faults,
        )

    def end(self) -> None:
        """End every process."""
        for daemon in [*self.zombies, *(machine.daemon for machine in self.machines.values())]:
            if daemon is not None:
                daemon.kill()
        self.clients.kill()

    def _run(self) -> None:
        schedule, knobs = self.schedule, self.knobs
        for number, machine in enumerate(self.machines.values()):
            schedule.after(number * 20_000, machine.start)
        self.weather.calm = True
        schedule.run(self._served, 20 * SECOND)
        self.weather.calm = False
        bucket = open_bucket(self.direct, b"", 0)
        devices = []
        for session in knobs.sessions:
            h = rules.session_hash(bucket.hash_key, TENANT, session)
            self.history.add(session, h, session in knobs.expiry)
            devices += [Device(self, f"{session}{'ab'[number]}", session) for number in range(knobs.devices)]
        for device in devices:
            self._task(device.live(device.name.endswith("a"), knobs.actions))
        self.plan_faults()
        schedule.run(lambda: False, 2 * SECOND + knobs.faults_us)
        self._calm()
        if not schedule.run(lambda: self._living == 0, schedule.now_us + 300 * SECOND):
            self.history.broken("I15", "devices do not come to an end")
        self._probe(devices)
        self._come_to_rest()
        self._check(bucket)

    def _served(self) -> bool:
        return all(machine.daemon is not None and machine.daemon.serving for machine in self.machines.values())

    def _task(self, work: Coroutine[Any, Any, Any]) -> None:
        self._living += 1

        async def live() -> None:
            try:
                await work
            except Exception as error:
                self.schedule.defect(self.clients, f"a device failed: {type(error).__name__}: {error}", error)
            finally:
                self._living -= 1

        self.clients.loop.call_soon(lambda: self.clients.loop.create_task(live()))

    def _calm(self) -> None:
        self.schedule.note("fault", "over")
        self.weather.calm = True
        self.weather.cut.clear()
        self.weather.outage.clear()
        self.weather.slow.clear()
        for daemon in self.zombies:
            self._thaw(daemon)
            self.schedule.after(3 * self.knobs.lease_ms * 1000, lambda daemon=daemon: self.ended(daemon))  # type: ignore[misc]
        for machine in self.machines.values():
            if machine.daemon is not None:
                self._thaw(machine.daemon)
            else:
                machine.start()

    def _probe(self, devices: list[Device]) -> None:
        """I15: after faults stop every session is writable again, and within a time that can be named."""
        patience_s = 20.0 + 3 * self.knobs.lease_ms / 1000
        firsts = {device.session: device for device in reversed(devices)}

        async def probe(device: Device) -> None:
            told = self.history.sessions[device.session]
            if told.created_us is None:
                await device.create(patience_s)
            done = await device.append(patience_s)
            refusal = told.ops[-1].reason
            if not done and refusal == "" and told.ops[-1].kind == "conflict":
                done = await device.append(patience_s)
                refusal = told.ops[-1].reason
            ended = refusal in ("SESSION_DELETED", "SESSION_ARCHIVED")
            excused = (ended and (told.expires or self.knobs.deletes)) or refusal == "EXPECTED_MISMATCH"
            if not done and not excused:
                self.history.broken("I15", f"{device.session}: not writable {patience_s:.1f} s after: {refusal}")
            ends_us = self.schedule.now_us + int(patience_s * SECOND)
            while done and not told.expires and not await device.resume(patience_s):
                if self.schedule.now_us < ends_us and not told.ops[-1].reason:
                    await asyncio.sleep(0.5)  # served, and not confirmed yet
                    continue
                self.history.broken("I15", f"{device.session}: written, and not read: {told.ops[-1].reason}")
                break

        for device in firsts.values():
            self._task(probe(device))
        if not self.schedule.run(lambda: self._living == 0, self.schedule.now_us + 200 * SECOND):
            self.history.broken("I15", "probes do not come to an end")

    def _come_to_rest(self) -> None:
        """Let the nodes flush and rescue what they have."""
        deadline_us = self.schedule.now_us + 150 * SECOND
        while self.schedule.now_us < deadline_us:
            if self._rests():
                return
            self.schedule.run(lambda: False, self.schedule.now_us + 1 * SECOND)
        self.history.broken("I15", f"the nodes do not come to rest: {self._unrest()}")

    def _rests(self) -> bool:
        return self._served() and not self._unrest()

    def _unrest(self) -> list[str]:
        found = []
        for told in self.history.sessions.values():
            # What a tombstone leaves behind is swept after it.
            if told.ended and self.schedule.now_us - told.owners[-1][0] < 5 * SECOND:
                found.append(f"{told.name} has ended just now")
        for name, machine in self.machines.items():
            daemon = machine.daemon
            if daemon is None or daemon.hot is None or not daemon.serving:
                found.append(f"{name} does not serve")
                continue
            with daemon.hot.read() as transaction:
                for key, value in transaction.scan("heads", b""):
                    head = decode_head(key, value)
                    unsettled = head.phase in (PHASE_RELEASING, PHASE_FENCED, PHASE_DOUBTED)
                    if self.history.sessions[head.session].expires and head.phase == PHASE_FENCED:
                        continue  # what has expired is not rescued, and goes when its day is swept
                    if head.is_dirty or unsettled:
                        found.append(f"{name} {head.session} phase {head.phase} {head.cloud_seq}/{head.head_seq}")
        return found

    def _is_excused(self, violation: verify.Violation) -> bool:
        """What verify reports and what is known to happen; README.md, "What the checker forgives"."""
        what = violation.explanation
        if any(key in what for key in self.history.stragglers):
            return True
        if violation.invariant != "I13":
            return False
        # A node that had the session once has a copy, until somebody asks it for the session or it needs the room.
        if what == "the hot tier still has rows of it" and len(self.machines) > 1:
            return True
        # Whoever was to sweep up behind a tombstone has lost its disk.
        return self.disks_lost and ("is left" in what or "still names it" in what)

    def _note_rows(self, name: str, hot: Any) -> None:
        with hot.read() as transaction:
            for key, value in transaction.scan("heads", b""):
                head = decode_head(key, value)
                place = f"phase {head.phase} epoch {head.epoch} head {head.head_seq} cloud {head.cloud_seq}"
                self.schedule.note(name, f"has {head.session}: {place} lifecycle {head.lifecycle} claim {head.claim}")

    def _check(self, bucket: Any) -> None:
        on_disks: dict[bytes, set[str]] = {}
        report = verify.Report()
        for machine in self.machines.values():
            daemon = machine.daemon
            if daemon is None or daemon.hot is None:
                continue
            with daemon.hot.read() as transaction:
                for key, value in transaction.scan("turns", b""):
                    turns = invariants.view_turns(key[:16], bytes(value))
                    on_disks.setdefault(key[:16], set()).update(invariants.turn_id_of(turn.body) for turn in turns)
            self._note_rows(machine.name, daemon.hot)
            checker = verify._Checker(self.direct, bucket, daemon.hot, report)  # type: ignore[arg-type]
            for told in self.history.sessions.values():
                checker._check(told.h, checker._objects(told.h))
        in_orphans: dict[bytes, set[str]] = {}
        for told in self.history.sessions.values():
            for row in told.present.orphans if told.present is not None else []:
                try:
                    stored = self.direct.get(str(row[0])).body
                    frames = envelope.unseal(stored, envelope.KIND_ORPHAN, str(row[0]))[1]
                except (ObjectNotFound, Corrupt):
                    continue  # verify says so
                names = {invariants.turn_id_of(turn.body) for turn in invariants.view_turns(told.h, frames)}
                in_orphans.setdefault(told.h, set()).update(names)
        for violation in report.violations:
            if self._is_excused(violation):
                continue
            self.history.broken(violation.invariant, f"{violation.session_id}: {violation.explanation}")
        self.history.check(on_disks, in_orphans)


def no_sleep(seconds: float) -> None:
    raise RuntimeError("something in the world wants to wait by a real clock")


@contextmanager
def patched(world: World) -> Iterator[None]:
    """The places where the daemon's code would reach out of the world."""
    append = log.append

    def noted(transaction: Any, h: bytes, *rest: Any) -> Any:
        head = log.read_head(transaction, h)
        done = append(transaction, h, *rest)
        fresh = [(turn.turn_id, turn.epoch, turn.seq, turn.chain) for turn in done.turns if not turn.duplicate]
        if fresh and head is not None and world.schedule.current is not None:
            world.history.appended(world.schedule.current.host, h, states.decode(head.state).chain, fresh)
        return done

    knobs = world.knobs
    places = [
        (os, "urandom", lambda size: world.entropy.randbytes(size)),
        (time, "sleep", no_sleep),
        (leases, "process_identity", world.process_identity),
        (leases, "is_alive", world.is_alive),
        (environment, "RESERVE_STEP_BYTES", 256 * 1024),
        (environment, "RESERVE_KEPT_BYTES", 64 * 1024),
        (flush, "INLINE_TAIL_BYTES_MAX", knobs.inline_bytes),
        (flush, "INLINE_NEWEST_BYTES", min(32 * 1024, knobs.inline_bytes)),
        (flush, "REPLACED_KEPT_MS", 20_000),
        (compact, "MERGE_SEGMENTS_MIN", knobs.merge_min),
        (compact, "MERGE_SEGMENTS_OVERDUE", knobs.merge_min + 2),
        (flush, "MERGE_SEGMENTS_OVERDUE", knobs.merge_min + 2),
        (verify, "READ_AGAIN_MAX", 1),
        (log, "append", noted),
    ]
    collects = gc.isenabled()
    gc.disable()
    try:
        with contextlib.ExitStack() as stack:
            for where, name, what in places:
                stack.enter_context(mock.patch.object(where, name, what))
            yield
    finally:
        if collects:
            gc.enable()


def run_seed(seed: int, nodes: int | None = None, keep: Callable[[str], None] | None = None) -> Result:
    """Run one world in a folder of its own, and remove it."""
    shm = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="sim-", dir=shm if shm.is_dir() and os.access(shm, os.W_OK) else None))
    try:
        return World(seed, folder, Trace(keep), nodes).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
