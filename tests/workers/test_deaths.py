"""Processes that end or stand still: whichever it is, nothing acknowledged is lost, and the others go on."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.cli import exits
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.hot.environment import LOCK_FREE
from sessiond.v1 import admin_pb2, session_pb2
from sessiond.verify import verify
from tests.crash.test_sigkill_loop import SESSIONS, WRITERS, Load, check, run_loop
from tests.e2e.test_watch import Watch
from tests.fault.syscalls import FSYNC, Control
from tests.wire import Wire, user

WAIT_S = 30.0
# "Killed within two seconds", and what two busy cores add to it.
KILLED_S_MAX = 2.0
SLOTS_AT = 192 + 64


def status(wire: Wire) -> admin_pb2.GetStatusResponse:
    return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=WAIT_S)


def until(holds: Callable[[], object], what: str, seconds: float = WAIT_S) -> float:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"after {seconds} s still not: {what}"
        time.sleep(0.005)
    return time.monotonic() - began


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


def stands_still(pid: int) -> bool:
    """Whether none of its threads runs: one may be in a system call yet that a signal does not break off."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/stat") as file:
                state = file.read().rpartition(") ")[2][0]
        except OSError:  # it has just ended
            continue
        if state not in "TZX":
            return False
    return True


def pids(wire: Wire) -> list[int]:
    """The workers, once there are as many as there should be."""
    until(lambda: all(worker.pid for worker in status(wire).workers), "every worker runs")
    return [worker.pid for worker in status(wire).workers]


def answered(wire: Wire) -> int:
    return sum(worker.appends for worker in status(wire).workers)


@contextlib.contextmanager
def under_load(daemon: Daemon, seed: int) -> Iterator[Load]:
    """Sixteen writers that go on over everything; what they were told is checked at the end."""
    with contextlib.closing(Wire(daemon.address)) as wire:
        for index in range(SESSIONS):
            wire.create(f"s{index}", user_id="u")
        load = Load(daemon.address, seed)
        threads = [threading.Thread(target=load.run, args=(writer,)) for writer in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            yield load
            load.wait_for(load.acks + 50)
        finally:
            load.stop.set()
            for thread in threads:
                thread.join()
        assert not load.failures, load.failures
        check(wire, load)
    assert daemon.terminate() == 0
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    assert verify(settings, lambda *_: None) == []


def test_workers_killed_under_load_lose_and_double_nothing_and_are_replaced() -> None:
    rng = random.Random(20261120)
    with running_daemon(flush_interval_ms=50) as daemon, under_load(daemon, 1) as load:
        keeper = daemon.pid
        for number in range(8):
            load.wait_for(load.acks + rng.randint(1, 80))
            victim = rng.choice(alive(keeper))
            os.kill(victim, signal.SIGKILL)
            until(lambda victim=victim: not runs(victim), "it is gone")
            until(lambda number=number: daemon.log().count('"worker_serves"') == 3 + number, "another one serves")
        assert daemon.pid == keeper
        assert runs(keeper)
        assert daemon.log().count('"worker_gone"') == 8
        with contextlib.closing(Wire(daemon.address)) as wire:
            assert sum(worker.restarts for worker in status(wire).workers) == 8
            until(lambda: answered(wire) > 0, "workers append by themselves")


def alive(keeper: int) -> list[int]:
    """The workers of a keeper that have not ended."""
    with open(f"/proc/{keeper}/task/{keeper}/children") as file:
        children = [int(pid) for pid in file.read().split()]
    return [pid for pid in children if runs(pid) and b"sessiond.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_kills_of_all_processes_at_once_lose_and_double_nothing() -> None:
    run_loop(kills=5, seed=20261120)


def test_a_killed_keeper_takes_its_workers_with_it_and_nothing_that_was_acknowledged() -> None:
    rng = random.Random(7)
    with running_daemon(flush_interval_ms=50) as daemon, under_load(daemon, 2) as load:
        for _ in range(4):
            load.wait_for(load.acks + rng.randint(1, 120))
            workers = alive(daemon.pid)
            assert len(workers) == 2
            # The keeper alone, not its group.
            os.kill(daemon.pid, signal.SIGKILL)
            until(lambda workers=workers: not any(map(runs, workers)), "the workers end with it", 2.0)
            daemon.process.wait()
            daemon.process = None
            daemon.start()


def connections(pid: int, port: int) -> set[str]:
    """The accepted connections on a port that a process holds, by inode."""
    on_port = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            row = line.split()
            if row[1].endswith(f":{port:04X}") and row[3] == "01":
                on_port.add(f"socket:[{row[9]}]")
    folder = Path(f"/proc/{pid}/fd")
    found = set()
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(folder / name))
    return found & on_port


def of_each(daemon: Daemon, opened: contextlib.ExitStack) -> dict[int, list[Wire]]:
    """Connections to both workers, by pid. The session s is there, and hot."""
    wires: dict[int, list[Wire]] = {}
    asking = opened.enter_context(contextlib.closing(Wire(daemon.address)))
    asking.create("s")
    workers = pids(asking)
    for _ in range(64):
        before = {pid: connections(pid, daemon.port) for pid in workers}
        wire = opened.enter_context(contextlib.closing(Wire(daemon.address)))
        wire.resume("s")
        (its,) = [pid for pid in workers if connections(pid, daemon.port) - before[pid]]
        wires.setdefault(its, []).append(wire)
        if len(wires) == 2:
            return wires
    raise AssertionError("64 connections all came to one of two workers")


def test_callers_of_the_other_worker_hear_nothing_of_a_death() -> None:
    with running_daemon() as daemon, contextlib.ExitStack() as opened:
        wires = of_each(daemon, opened)
        dead, spared = wires
        os.kill(dead, signal.SIGKILL)
        for number in range(50):
            for place, wire in enumerate(wires[spared]):
                wire.append("s", user(f"after-{place}-{number}", "goes on"))
        assert len(list(wires[spared][0].turns("s"))) == 50 * len(wires[spared])


class Slots:
    """The words of the shared block that say what each worker does with LMDB's lock, as the keeper sees them."""

    def __init__(self, keeper: int) -> None:
        folder = Path(f"/proc/{keeper}/fd")
        # Python's map of it has a descriptor of its own.
        name = next(name for name in os.listdir(folder) if os.readlink(folder / name).startswith("/memfd:sessiond"))
        self._file = os.open(folder / name, os.O_RDONLY)

    def __enter__(self) -> Slots:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def what(self, worker: int) -> int:
        return struct.unpack("<Q", os.pread(self._file, 8, SLOTS_AT + 64 * worker))[0] & 3


def test_a_worker_that_stands_still_with_the_write_lock_is_ended_within_two_seconds() -> None:
    with running_daemon() as daemon, under_load(daemon, 3) as load:
        with Slots(daemon.pid) as slots:
            load.wait_for(200)
            with contextlib.closing(Wire(daemon.address)) as wire:
                number, victim = 0, pids(wire)[0]
                # Until it has opened the hot tier it takes no lock.
                until(lambda: status(wire).workers[number].appends > 10, "it appends by itself")
            for _ in range(2000):
                os.kill(victim, signal.SIGSTOP)
                # It may go on for a moment yet, and give the lock back.
                until(lambda: stands_still(victim), "every thread of it has stopped")
                if slots.what(number) != LOCK_FREE:
                    break
                os.kill(victim, signal.SIGCONT)
                time.sleep(random.uniform(0, 0.003))
            else:
                pytest.fail("it was never caught with the lock")
            took_s = until(lambda: not runs(victim), "it is ended")
            assert took_s < KILLED_S_MAX
        load.wait_for(load.acks + 100)
        assert '"worker_killed"' in daemon.log()


def test_watchers_hear_every_turn_once_and_in_order_whichever_worker_appended_it() -> None:
    turns = 60
    with running_daemon() as daemon, contextlib.ExitStack() as opened:
        both = [each[0] for each in of_each(daemon, opened).values()]
        wires = both * 4
        watches = [Watch(wire, "s") for wire in wires[:4]]

        def write(number: int) -> None:
            for turn in range(turns):
                wires[number].append("s", user(f"{number}-{turn}", f"turn {turn} of {number}"))

        writers = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for writer in writers:
            writer.start()
        for watch in watches:
            watch.until_seq(8 * turns)
        for writer in writers:
            writer.join()
        stored = [turn.turn_id for turn in wires[0].turns("s")]
        assert len(stored) == len(set(stored)) == 8 * turns
        for watch in watches:
            assert [turn.turn_id for turn in watch.log] == stored
            watch.close()
        until(lambda: min(worker.appends for worker in status(wires[0]).workers) > 0, "both appended")


def test_the_flush_interval_holds_for_what_workers_append() -> None:
    settings = {"flush_interval_ms": 100, "flush_waiting_ms": 100}
    with running_daemon(**settings) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.create("s")
        get = session_pb2.GetSessionRequest(session_id="s")
        wire.append("s", user("first", "hello"))
        before = answered(wire)
        for number in range(5):
            reply = wire.append("s", user(f"t{number}", "hello"))
            took_s = until(
                lambda reply=reply: wire.sessions.GetSession(get).session.cloud_seq >= reply.head.seq,
                "it is flushed",
            )
            assert took_s < 5
        assert answered(wire) > before


def test_a_failed_fsync_in_a_worker_ends_every_process_of_the_node(tmp_path: Path) -> None:
    control = Control(tmp_path / "control", tmp_path / "data" / "hot")
    settings = {"flush_interval_ms": 3_600_000, "lease_ms": 60_000}
    with (
        running_daemon(tmp_path / "data", env=control.env, **settings) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        wire.create("s")
        for number in range(20):
            wire.append("s", user(f"t{number}", "hello"))
        until(lambda: answered(wire) >= 10, "workers append by themselves")
        workers = pids(wire)
        control.arm(FSYNC, 1, errno.EIO)
        with pytest.raises(grpc.RpcError) as refused:
            wire.append("s", user("into-the-dark", "hello"))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        process, daemon.process = daemon.process, None
        assert process.wait(WAIT_S) == exits.UNAVAILABLE
        until(lambda: not any(map(runs, workers)), "no worker is left")
        assert control.failed(FSYNC) == 1
        assert "drained" not in daemon.log()
        daemon.start()
        assert [turn.turn_id for turn in wire.turns("s")][:20] == [f"t{number}" for number in range(20)]
