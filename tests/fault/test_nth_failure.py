"""Every nth write, fsync and allocation failing in turn, on each path: an error or a success as documented, no turn
lost or doubled, the same turn_id completes it, and `verify` clean.

The method is SQLite's: the calls of a path are counted, then the path is run again and again, with a later call failing
each time. In CI the calls are sampled evenly; `make torture` fails every one.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.cli import exits
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.fault.syscalls import ALLOCATION, FSYNC, KINDS, WRITE, Control
from tests.wire import Refusal, Wire, assistant, user

NEVER_MS = 3_600_000
WAIT_S = 60
CALL_S = 10.0
# Of the calls of one path, kind and errno; the rest is for `make torture`.
CASES_IN_CI = 5
# More than any path has.
CALLS_MAX = 64

Act = Callable[["World", str], None]


@dataclass
class World:
    """A daemon whose calls fail to order, and what its sessions must hold. Both tiers are under the prefix."""

    daemon: Daemon
    control: Control
    wire: Wire
    acked: dict[str, list[str]] = field(default_factory=dict)
    restarts: int = 0

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
            raise FlushFailed(next(iter(answer.failures)))

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


class FlushFailed(Exception):
    """The reason why AdminService.Flush could not flush a session."""


@dataclass(frozen=True)
class Route:
    """A path through the daemon. prepare: what comes before the faults. act: what runs into them, and is repeated
    until it is done. released: whether the sessions must be released in between.
    """

    name: str
    prepare: Act
    act: Act
    released: bool = False


def made(world: World, session: str) -> None:
    world.wire.create(session, user_id="ada")


def talked(world: World, session: str) -> None:
    made(world, session)
    world.append(session, "1", "2")


# One row a path.
PATHS = (
    Route("append", talked, lambda world, session: world.append(session, "3", "4")),
    Route("flush", talked, World.flush),
    Route("commit", talked, lambda world, session: world.append(session, "3", "4", cloud=True)),
    Route("create", lambda world, session: None, talked),
    Route("hydrate", talked, lambda world, session: world.append(session, "3", "4"), released=True),
)

# What may be said while a call fails. Everything that was not done can be repeated.
REASONS = {
    "DISK_FULL",
    "OVERLOADED",
    "HOT_TIER_FAILED",
    "STORE_UNAVAILABLE",
    "COMMIT_UNKNOWN",
    "CLOUD_NOT_COMMITTED",
    "NOT_OWNER",
}


@contextlib.contextmanager
def world_in(tmp_path: Path) -> Iterator[World]:
    control = Control(tmp_path / "control", tmp_path / "data")
    settings = {"flush_interval_ms": NEVER_MS, "lease_ms": 600_000, "map_size_bytes": 64 * 1024**2}
    with running_daemon(tmp_path / "data", env=control.env, **settings) as daemon:
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
        assert world.ids(session) == turn_ids
    assert world.daemon.terminate() == exits.OK
    settings = config.load(None, {}, {"data_dir": str(world.daemon.data_dir), "cloud": world.daemon.cloud})
    assert verify(settings, lambda *_: None) == []


def attempt(world: World, act: Act, session: str) -> str:
    """Run the path into a fault: '' if it went through, else the reason given; GONE where nobody was there to give one,
    gRPC's own status where it answered.
    """
    try:
        act(world, session)
    except FlushFailed as failed:
        return str(failed)
    except grpc.RpcError as error:
        if any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ()):
            return Refusal(error).reason
        gone = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        return "GONE" if gone else error.code().name
    return ""


def prepared(world: World, path: Route, sessions: list[str]) -> None:
    for session in sessions:
        path.prepare(world, session)
    if path.released:
        assert world.daemon.terminate() == exits.OK
        world.daemon.start()


def fail_each(world: World, path: Route, kind: int, code: int, cases_max: int | None) -> Counter[str]:
    """Fail one call after the other; how often each outcome was seen."""
    # Each from the start of a process: what a store knows to be durable already, it need not fsync.
    crash = kind == FSYNC and code == errno.EIO
    label = f"{path.name}-{KINDS[kind]}-{code}"
    sessions = [f"{label}-{index}" for index in range(min(CALLS_MAX, cases_max or CALLS_MAX) + 1)]
    prepared(world, path, sessions)
    world.settle(crash=crash)
    world.control.count(kind)
    path.act(world, sessions[0])
    count = world.control.seen(kind)
    assert 0 < count <= CALLS_MAX, f"{path.name} makes {count} calls of kind {KINDS[kind]}"
    numbers = list(range(1, count + 1))
    if cases_max is not None and count > cases_max:
        numbers = sorted({1 + index * (count - 1) // (cases_max - 1) for index in range(cases_max)})
    seen: Counter[str] = Counter()
    for session, number in zip(sessions[1:], numbers, strict=False):
        where = f"{label}, call {number} of {count}"
        world.settle(crash=crash)
        logged = len(world.daemon.log())
        world.control.arm(kind, number, code)
        reason = attempt(world, path.act, session)
        stopped = "hot_tier_failed" in world.daemon.log()[logged:]
        fired = world.control.failed(kind)
        world.control.disarm()
        what = world.control.told
        assert reason in REASONS | {"", "GONE"}, f"{where}: {reason} after {what}"
        if fired == 0:
            assert reason == "", f"{where}: {reason}, and nothing had failed"
        assert stopped == (reason in ("HOT_TIER_FAILED", "GONE")) or reason == "CLOUD_NOT_COMMITTED", where
        if stopped:
            # Only a failed disk ends a daemon, and a full one only where LMDB itself gave up: at its newest meta page.
            assert "data.mdb" in what, f"{where}: it ended after {what}"
            assert world.ended() == exits.UNAVAILABLE, where
        elif code == errno.ENOSPC and kind == WRITE:
            # Nobody restarts anything where there is space again.
            assert world.is_up, f"{where}: it ended after {what}"
        seen[reason or "done"] += fired
        repeat(world, path, session, f"{where}, after {what}")
    return seen


def repeat(world: World, path: Route, session: str, where: str) -> None:
    """What was refused is asked for again, and done."""
    if not world.is_up:
        world.settle(crash=False)
    reason = attempt(world, path.act, session)
    if reason:
        # A store whose fsync failed writes nothing until it is opened anew, and says so.
        assert reason in ("STORE_UNAVAILABLE", "CLOUD_NOT_COMMITTED", "COMMIT_UNKNOWN"), f"{where}: {reason}"
        world.settle(crash=True)
        path.act(world, session)
    if session in world.acked:
        assert world.ids(session) == world.acked[session], where


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_any_failing_write_or_fsync_loses_and_doubles_nothing(path: Route, tmp_path: Path) -> None:
    run(path, tmp_path, CASES_IN_CI)


@pytest.mark.torture
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_failing_write_and_fsync_loses_and_doubles_nothing(path: Route, tmp_path: Path) -> None:
    run(path, tmp_path, None)


def run(path: Route, tmp_path: Path, cases_max: int | None) -> None:
    with world_in(tmp_path) as world:
        for kind in (WRITE, FSYNC):
            for code in (errno.ENOSPC, errno.EIO):
                seen = fail_each(world, path, kind, code, cases_max)
                print(f"{path.name}: {KINDS[kind]} {errno.errorcode[code]}: {dict(seen)}")
                assert sum(seen.values()), "no call was failed at all"
        print(f"{path.name}: {world.restarts} restarts, {sum(map(len, world.acked.values()))} acknowledged turns")


# Object files whose allocations fail, and the least size that does: LMDB's own pages and lists; buffers of Python's.
# gRPC aborts where it is given nothing, which counts as a crash.
STARVED = (("lmdb", 0), ("libpython", 2048), ("cygrpc", 256))


@pytest.mark.parametrize(("object_name", "size_min"), STARVED, ids=[name for name, _ in STARVED])
def test_any_failing_allocation_loses_and_doubles_nothing(object_name: str, size_min: int, tmp_path: Path) -> None:
    starve(object_name, size_min, tmp_path, CASES_IN_CI)


@pytest.mark.torture
@pytest.mark.parametrize(("object_name", "size_min"), STARVED, ids=[name for name, _ in STARVED])
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
        numbers = list(range(1, count + 1))
        if cases_max is not None and count > cases_max:
            numbers = sorted({1 + index * (count - 1) // (cases_max - 1) for index in range(cases_max)})
        seen: Counter[str] = Counter()
        for number in numbers:
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
    turn = user("3", "a longer text " * 1000)
    world.wire.sessions.AppendTurn(session_pb2.AppendTurnRequest(session_id=session, turns=[turn]), timeout=CALL_S)
    known = world.acked[session]
    known += ["3"] if "3" not in known else []
