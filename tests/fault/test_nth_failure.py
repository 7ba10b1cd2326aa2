"""Every nth write, fsync and allocation failing in turn, on each path: an error or a success as documented, no turn
lost or doubled, the same turn_id completes it, and `verify` clean.

The method is SQLite's: the calls of a path are counted, then the path is run again and again, with a later call failing
each time. In CI the calls are sampled evenly; `make torture` fails every one.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.cli import exits
from sessiond.core.manifest import INLINE_TAIL_BYTES_MAX
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.compact import MERGE_SEGMENTS_MIN
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.fault.syscalls import ALLOCATION, FSYNC, KINDS, WRITE, Control
from tests.wire import Refusal, Wire, assistant, refusal, user

NEVER_MS = 3_600_000
WAIT_S = 60
CALL_S = 10.0
# Of the calls of one route, kind and errno; the rest is for `make torture`.
CASES_IN_CI = 3
# More than any route makes.
CALLS_MAX = 400

Act = Callable[["World", str], None]


@dataclass
class World:
    """A daemon whose calls fail to order, and what its sessions must hold. Both tiers are under the prefix."""

    daemon: Daemon
    control: Control
    wire: Wire
    acked: dict[str, list[str]] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    restarts: int = 0
    merged: set[str] = field(default_factory=set)

    def append(self, session: str, *turn_ids: str, cloud: bool = False) -> None:
        turns = [
            (user if number % 2 == 0 else assistant)(turn_id, f"{turn_id} of {session} " * 20)
            for number, turn_id in enumerate(turn_ids)
        ]
        durability = turn_pb2.DURABILITY_CLOUD if cloud else turn_pb2.DURABILITY_EDGE
        self.wire.append(session, *turns, durability=durability)
        known = self.acked.setdefault(session, [])
        known += [turn_id for turn_id in turn_ids if turn_id not in known]

    def flush(self, session: str) -> None:
        answer = self.wire.admin.Flush(admin_pb2.FlushRequest(session_id=session), timeout=CALL_S)
        if answer.failed_sessions:
            raise NotDone(next(iter(answer.failures)))

    def release(self, session: str) -> None:
        answer = self.wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=[session]), timeout=CALL_S)
        if answer.failures:
            raise NotDone(answer.failures[session])

    def delete(self, session: str) -> None:
        self.wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session), timeout=CALL_S)
        self.acked.pop(session, None)
        self.deleted.append(session)

    def status(self) -> admin_pb2.GetStatusResponse:
        return self.wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_S)

    def say(self, session: str, turn_id: str, size_bytes: int) -> None:
        """Append one turn of this size."""
        text = ("a long turn " * (size_bytes // 12 + 1))[:size_bytes]
        request = session_pb2.AppendTurnRequest(session_id=session, turns=[user(turn_id, text)])
        self.wire.sessions.AppendTurn(request, timeout=CALL_S)
        known = self.acked.setdefault(session, [])
        known += [] if turn_id in known else [turn_id]

    def resume(self, session: str) -> None:
        self.wire.resume(session)

    def ids(self, session: str) -> list[str]:
        turns = list(self.wire.turns(session))
        assert [turn.seq for turn in turns] == list(range(1, len(turns) + 1))
        return [turn.turn_id for turn in turns]

    def settle(self, *, crash: bool) -> None:
        """Have a daemon again: one that stopped by itself is started, one that is to crash is killed first."""
        self.control.disarm()
        if crash and self.is_up:
            self.daemon.kill()
        if not self.is_up:
            self.daemon.start()
            self.restarts += 1

    @property
    def is_up(self) -> bool:
        if self.daemon.process is not None and self.daemon.process.poll() is not None:
            self.daemon.process = None
        return self.daemon.process is not None

    def ended(self) -> int:
        """The exit code of a daemon that ends by itself."""
        assert self.daemon.process is not None
        code = self.daemon.process.wait(WAIT_S)
        self.daemon.process = None
        return code


class NotDone(Exception):
    """The reason that AdminService gave for what it could not do to a session."""


@dataclass(frozen=True)
class Route:
    """A path through the daemon. prepare: what comes before the faults. act: what runs into them, and is repeated until
    it is done. cases: how many calls fail in CI. settings: of the daemon.
    """

    name: str
    prepare: Act
    act: Act
    cases: int = CASES_IN_CI
    settings: dict[str, int] = field(default_factory=dict)


def made(world: World, session: str) -> None:
    world.wire.create(session, user_id="ada")


def talked(world: World, session: str) -> None:
    made(world, session)
    world.append(session, "1", "2")


def released(world: World, session: str) -> None:
    talked(world, session)
    world.release(session)


def flushed(world: World) -> None:
    """Wait until the flusher has found by itself what is to be flushed."""
    for _ in range(200):
        if not world.status().hot.dirty_sessions:
            return
        time.sleep(0.02)
    raise NotDone("STORE_UNAVAILABLE")


def segmented(world: World, session: str) -> None:
    """As many segments as are not merged yet."""
    made(world, session)
    for number in range(MERGE_SEGMENTS_MIN - 1):
        world.say(session, f"{number}", INLINE_TAIL_BYTES_MAX)
        flushed(world)


def merge(world: World, session: str) -> None:
    world.say(session, "last", INLINE_TAIL_BYTES_MAX)
    flushed(world)
    world.merged.add(session)
    for number in range(40):
        objects = [path for path in (world.daemon.data_dir / "cloud" / "s").rglob("*") if path.is_file()]
        merged = [path for path in objects if path.stat().st_size > MERGE_SEGMENTS_MIN * INLINE_TAIL_BYTES_MAX]
        if len(merged) >= len(world.merged):
            return
        # A merge that fails holds up no flush: a later one does it.
        world.say(session, f"after-{number}", 10)
        flushed(world)
    raise AssertionError("nothing was merged")


def evict(world: World, session: str) -> None:
    """Release large sessions until the map is so full that some are evicted."""
    before = world.status().upkeep.evicted_sessions
    for number in range(8):
        other = f"{session}-fill-{number}"
        made(world, other)
        world.say(other, "1", 400_000)
        world.say(other, "2", 400_000)
        world.release(other)
        for _ in range(40):
            if world.status().upkeep.evicted_sessions > before:
                return
            time.sleep(0.05)
    raise AssertionError("nothing was evicted")


# One row a route.
ROUTES = (
    Route("append", talked, lambda world, session: world.append(session, "3", "4")),
    Route("flush", talked, World.flush),
    Route("commit", talked, lambda world, session: world.append(session, "3", "4", cloud=True)),
    Route("create", lambda world, session: None, talked),
    Route("hydrate", released, lambda world, session: world.append(session, "3", "4")),
    Route("release", talked, World.release),
    Route("delete", talked, World.delete),
    Route("evict", talked, evict, 1, {"map_size_bytes": 16 * 1024**2, "evict_at_percent": 10}),
    Route("compact", segmented, merge, 1, {"flush_interval_ms": 1, "flush_waiting_ms": 0}),
)

# What may be said while a call fails. Everything that was not done can be repeated.
REASONS = {
    "DISK_FULL",
    "OVERLOADED",
    "HOT_TIER_FAILED",
    "STORE_UNAVAILABLE",
    "COMMIT_UNKNOWN",
    "CLOUD_NOT_COMMITTED",
    "DELETE_NOT_COMMITTED",
}


@contextlib.contextmanager
def world_in(tmp_path: Path, **settings: int) -> Iterator[World]:
    control = Control(tmp_path / "control", tmp_path / "data")
    chosen = {"flush_interval_ms": NEVER_MS, "lease_ms": 600_000, "map_size_bytes": 64 * 1024**2, **settings}
    with running_daemon(tmp_path / "data", env=control.env, **chosen) as daemon:
        world = World(daemon, control, Wire(daemon.address))
        try:
            yield world
            finish(world)
        finally:
            control.disarm()
            world.wire.close()


def finish(world: World) -> None:
    """Every acknowledged turn once and in order, a clean drain, and nothing that violates an invariant."""
    world.settle(crash=True)
    for session, turn_ids in world.acked.items():
        assert world.ids(session) == turn_ids, session
    for session in world.deleted:
        assert refusal(world.resume, session).reason == "SESSION_DELETED"
    assert world.daemon.terminate() == exits.OK
    settings = config.load(None, {}, {"data_dir": str(world.daemon.data_dir), "cloud": world.daemon.cloud})
    assert verify(settings, lambda *_: None) == []


def attempt(world: World, act: Act, session: str) -> str:
    """Run the path into a fault: '' if it went through, else the reason given; GONE where nobody was there to give one,
    gRPC's own status where it answered.
    """
    try:
        act(world, session)
    except NotDone as failed:
        return str(failed)
    except grpc.RpcError as error:
        if any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ()):
            return Refusal(error).reason
        gone = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        return "GONE" if gone else error.code().name
    return ""


def chosen(count: int, cases_max: int | None) -> list[int]:
    """Which of `count` calls to fail, from 1: all, or so many spread over them."""
    if cases_max is None or count <= cases_max:
        return list(range(1, count + 1))
    if cases_max < 3:
        return [(index + 1) * count // (cases_max + 1) for index in range(cases_max)]
    return sorted({1 + index * (count - 1) // (cases_max - 1) for index in range(cases_max)})


def fail_each(world: World, route: Route, kind: int, code: int, cases_max: int | None) -> Counter[str]:
    """Fail one call after the other; how often each outcome was seen."""
    # Each from the start of a process: what a store knows to be durable already, it need not fsync.
    crash = kind == FSYNC and code == errno.EIO
    label = f"{route.name}-{KINDS[kind]}-{errno.errorcode[code]}"
    route.prepare(world, label)
    world.settle(crash=crash)
    world.control.count(kind)
    route.act(world, label)
    count = world.control.seen(kind)
    assert 0 < count <= CALLS_MAX, f"{route.name} makes {count} calls of kind {KINDS[kind]}"
    seen: Counter[str] = Counter()
    numbers = deque(chosen(count, cases_max))
    while numbers:
        number = numbers.popleft()
        session = f"{label}-{number}"
        where = f"{label}, call {number} of {count}"
        world.settle(crash=False)
        route.prepare(world, session)
        world.settle(crash=crash)
        logged = len(world.daemon.log())
        world.control.arm(kind, number, code)
        reason = attempt(world, route.act, session)
        fired = world.control.failed(kind)
        world.control.disarm()
        what = world.control.told
        stopped = "hot_tier_failed" in world.daemon.log()[logged:]
        where = f"{where}, {what or 'nothing'}: {reason or 'done'}"
        assert reason in REASONS | {"", "GONE"}, where
        if fired == 0:
            assert reason == "", where
        if reason in ("HOT_TIER_FAILED", "GONE"):
            assert stopped, where
        if stopped:
            # Only a failed disk ends a daemon, and a full one only where LMDB itself gave up: at its newest meta page.
            assert "data.mdb" in what, where
            assert world.ended() == exits.UNAVAILABLE, where
        else:
            assert world.is_up, where
        seen[reason or "done"] += fired
        # Before anything is asked for again: what was acknowledged while a call failed must be on the disk.
        world.settle(crash=bool(fired and not reason))
        if fired and not reason and session in world.acked:
            assert world.ids(session) == world.acked[session], where
        repeat(world, route, session, code == errno.ENOSPC and kind == WRITE and not stopped, where)
        if not numbers and not sum(seen.values()) and number > 1:
            numbers.append(number // 2)  # the route took fewer calls this time than when they were counted
    return seen


def repeat(world: World, route: Route, session: str, as_it_is: bool, where: str) -> None:
    """What was refused is asked for again, and done. as_it_is: by the daemon as it is, for there is space again."""
    reason = ""
    for _ in range(200):
        reason = attempt(world, route.act, session)
        if not reason:
            break
        # A store that failed is tried again after a pause; one whose fsync failed writes nothing until it is opened
        # anew, and says so.
        waits = ("STORE_UNAVAILABLE", "CLOUD_NOT_COMMITTED", "COMMIT_UNKNOWN", "DELETE_NOT_COMMITTED")
        assert reason in waits, f"{where}; then {reason}"
        if as_it_is:
            time.sleep(0.05)
        else:
            world.settle(crash=True)
    assert not reason, f"{where}; then {reason} for good"
    if session in world.acked:
        assert world.ids(session) == world.acked[session], where


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_any_failing_write_or_fsync_loses_and_doubles_nothing(route: Route, tmp_path: Path) -> None:
    run(route, tmp_path, route.cases)


@pytest.mark.torture
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_every_failing_write_and_fsync_loses_and_doubles_nothing(route: Route, tmp_path: Path) -> None:
    run(route, tmp_path, None)


def run(route: Route, tmp_path: Path, cases_max: int | None) -> None:
    with world_in(tmp_path, **route.settings) as world:
        for kind in (WRITE, FSYNC):
            for code in (errno.ENOSPC, errno.EIO):
                seen = fail_each(world, route, kind, code, cases_max)
                print(f"{route.name}: {KINDS[kind]} {errno.errorcode[code]}: {dict(seen)}")
                assert sum(seen.values()), "no call was failed at all"
        print(f"{route.name}: {world.restarts} restarts, {sum(map(len, world.acked.values()))} acknowledged turns")


# Object files whose allocations fail, and the least size that does: LMDB's own pages and lists; buffers of Python's.
# gRPC aborts where it is given nothing, which counts as a crash.
# The interpreter is a shared library here and an executable there, and sysconfig need not tell which (Debian builds
# both and installs the second): it is where its own allocator is.
STARVED = (("lmdb", 0), ("@PyMem_RawMalloc", 2048), ("cygrpc", 256))


@pytest.mark.parametrize(("object_name", "size_min"), STARVED, ids=["lmdb", "python", "grpc"])
def test_any_failing_allocation_loses_and_doubles_nothing(object_name: str, size_min: int, tmp_path: Path) -> None:
    starve(object_name, size_min, tmp_path, CASES_IN_CI)


@pytest.mark.torture
@pytest.mark.parametrize(("object_name", "size_min"), STARVED, ids=["lmdb", "python", "grpc"])
def test_every_failing_allocation_loses_and_doubles_nothing(object_name: str, size_min: int, tmp_path: Path) -> None:
    starve(object_name, size_min, tmp_path, None)


def starve(object_name: str, size_min: int, tmp_path: Path, cases_max: int | None) -> None:
    with world_in(tmp_path) as world:
        talked(world, "count")
        world.control.starve(object_name, size_min)
        world.control.count(ALLOCATION)
        append_large(world, "count")
        count = world.control.seen(ALLOCATION)
        world.control.starve("", 0)
        assert count, f"{object_name} allocates nothing"
        seen: Counter[str] = Counter()
        for number in chosen(count, cases_max):
            session = f"s{number}"
            talked(world, session)
            world.control.starve(object_name, size_min)
            world.control.arm(ALLOCATION, number, errno.ENOMEM)
            reason = attempt(world, append_large, session)
            fired = world.control.failed(ALLOCATION)
            world.control.disarm()
            world.control.starve("", 0)
            seen[reason or "done"] += fired
            if reason == "GONE":
                # It ended, by a signal or by itself; or it lives and only the connection was given up.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    world.daemon.process.wait(1)
            world.settle(crash=False)
            append_large(world, session)
            assert world.ids(session) == world.acked[session], f"allocation {number} of {count}"
        print(f"{object_name}: {count} allocations, {dict(seen)}, {world.restarts} restarts")
        assert sum(seen.values())


def append_large(world: World, session: str) -> None:
    world.say(session, "3", 14_000)
