"""The limits of the machine: a full map, a full disk, no descriptors left, a failed disk, a file cut under its map.

Each ends in the documented state, loses nothing that was acknowledged, and goes on by itself or says what to do.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sessiond import config
from sessiond.cli import exits
from sessiond.errors import Corrupt, Exhausted, SessiondError, Unavailable
from sessiond.testing import Daemon, StartFailed, running_daemon
from sessiond.tiers.hot import environment
from sessiond.tiers.hot.environment import Environment, Reader, Transaction
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.cli.command import ROOT
from tests.cli.command import environment as clean_environment
from tests.fault.syscalls import FSYNC, READ, WRITE, Control
from tests.wire import HOT, Refusal, Wire, assistant, refusal, user

NEVER_MS = 3_600_000
LEASE_MS = 600_000
# More than any turn here has.
BUDGET = 1_000_000
WAIT_S = 60


@pytest.fixture
def control(tmp_path: Path) -> Control:
    return Control(tmp_path / "control", tmp_path / "data")


@contextlib.contextmanager
def serving(tmp_path: Path, control: Control | None, **settings: int) -> Iterator[tuple[Daemon, Wire]]:
    """A daemon whose calls can be failed; flushes and renews its lease only when it is told to."""
    chosen = {"flush_interval_ms": NEVER_MS, "lease_ms": LEASE_MS, "map_size_bytes": 64 * 1024**2, **settings}
    with (
        running_daemon(tmp_path / "data", env=control.env if control else {}, **chosen) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        yield daemon, wire


def ids(wire: Wire, session: str) -> list[str]:
    """The turn_ids of a session's log, which has no gap."""
    turns = list(wire.turns(session))
    assert [turn.seq for turn in turns] == list(range(1, len(turns) + 1))
    return [turn.turn_id for turn in turns]


def violations(daemon: Daemon) -> list:
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    return verify(settings, lambda *_: None)


def until(holds: Callable[[], bool], what: str) -> None:
    """Wait until it holds, at most WAIT_S."""
    done, deadline = threading.Event(), WAIT_S
    for _ in range(deadline * 50):
        if holds():
            return
        done.wait(0.02)
    raise AssertionError(f"not within {deadline} s: {what}")


def words(size_bytes: int) -> str:
    """A text of this size that is counted fast."""
    return ("what is full stays full " * (size_bytes // 24 + 1))[:size_bytes]


def fill(wire: Wire, session: str, *turn_bytes: int) -> tuple[list[str], Refusal]:
    """Append turns of a size until one is refused, then of the next size: those acknowledged, and the last refusal."""
    acked: list[str] = []
    refused: Refusal | None = None
    for size in turn_bytes:
        for number in range(5000):
            turn = user(f"{session}-{size}-{number}", words(size))
            try:
                wire.append(session, turn)
            except grpc.RpcError as error:
                refused = Refusal(error)
                break
            acked.append(turn.turn_id)
        else:
            raise AssertionError(f"5000 turns of {size} bytes were all taken")
    assert refused is not None
    return acked, refused


# The map ---------------------------------------------------------------------------------------------------------


def test_a_map_at_85_percent_refuses_appends_and_keeps_resumes_and_flushes_going(tmp_path: Path) -> None:
    with serving(tmp_path, None, map_size_bytes=16 * 1024**2) as (daemon, wire):
        wire.create("a")
        acked, refused = fill(wire, "a", 60_000)
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "HOT_TIER_FULL")
        assert refused.retry_ms == 5000
        used, size = int(refused.metadata["used_bytes"]), int(refused.metadata["map_size_bytes"])
        assert environment.MAP_USED_MAX < used / size < 1
        assert wire.resume("a", BUDGET).receipt.rung == HOT
        # Other sessions are refused as well, and the refused turn left nothing behind.
        wire.create("b")
        assert refusal(wire.append, "b", user("1", "hello")).reason == "HOT_TIER_FULL"
        assert ids(wire, "a") == acked
        flushed = wire.admin.Flush(admin_pb2.FlushRequest())
        assert (flushed.failed_sessions, dict(flushed.failures)) == (0, {})
        status = wire.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert status.hot.dirty_sessions == 0
        assert status.hot.map_used_bytes > environment.MAP_USED_MAX * status.hot.map_size_bytes
        assert daemon.terminate() == exits.OK
        assert violations(daemon) == []


def fill_environment(hot: Environment, rows: int) -> None:
    def operation(transaction: Transaction) -> None:
        for number in range(rows):
            transaction.put("turns", number.to_bytes(4, "big"), bytes(4000))

    hot.run_blocking(operation, 4000 * rows)


def empty_environment(hot: Environment) -> None:
    def operation(transaction: Transaction) -> None:
        for key in [key for key, _ in transaction.scan("turns", b"")]:
            transaction.delete("turns", key)

    hot.run_blocking(operation)


def test_used_bytes_falls_when_rows_are_deleted_and_appends_go_on(tmp_path: Path) -> None:
    hot = Environment(tmp_path / "hot", 16 * 1024**2, 64, 8)
    try:
        before = hot.used_bytes()[0]
        for _ in range(2):
            fill_environment(hot, 3500)
            assert hot.is_full()
            full = hot.used_bytes()[0]
            assert full > 3500 * 4000
            empty_environment(hot)
            assert not hot.is_full()
            # What remains is the list of the pages that are free.
            assert hot.used_bytes()[0] < before + 256 * 1024
            # LMDB gives pages away again one commit after nobody can see them.
            fill_environment(hot, 1)
    finally:
        hot.close()


def test_pages_that_a_reader_holds_are_not_taken_for_room_that_could_be_written(tmp_path: Path) -> None:
    hot = Environment(tmp_path / "hot", 16 * 1024**2, 64, 8)
    try:
        fill_environment(hot, 3500)
        with hot.read() as transaction:
            empty_environment(hot)
            with pytest.raises(Exhausted) as refused:
                fill_environment(hot, 3500)
            assert refused.value.reason == "HOT_TIER_FULL"
            assert transaction.entries("turns") == 3500
        fill_environment(hot, 1)
        fill_environment(hot, 3500)
    finally:
        hot.close()


# The disk is full ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn_bytes", [100, 3000, 200_000])
def test_a_full_disk_refuses_appends_serves_resumes_and_goes_on_once_there_is_space(
    tmp_path: Path, control: Control, turn_bytes: int
) -> None:
    with serving(tmp_path, control) as (daemon, wire):
        wire.create("a")
        wire.append("a", user("first", "hello"), assistant("second", "hi"))
        control.limit_disk(200_000)
        acked, refused = fill(wire, "a", 200_000, turn_bytes)
        assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert refused.retry_ms == 5000
        assert "Free space" in refused.metadata["remedy"]
        context = wire.resume("a", BUDGET)
        assert context.receipt.rung == HOT
        assert context.receipt.ownership == context_pb2.OWNERSHIP_CONFIRMED
        pid = daemon.pid
        refused_again = refusal(wire.append, "a", user("late", words(turn_bytes)))
        assert refused_again.reason == "DISK_FULL"
        control.limit_disk(None)
        assert wire.append("a", user("late", words(turn_bytes))).outcome
        assert (daemon.pid, daemon.process and daemon.process.poll()) == (pid, None)
        daemon.kill()
        daemon.restart()
        expected = ["first", "second", *acked, "late"]
        assert ids(wire, "a") == expected
        assert wire.append("a", user("late", words(turn_bytes))).turns[0].duplicate
        assert daemon.terminate() == exits.OK
        assert violations(daemon) == []


def test_a_full_disk_leaves_room_to_flush_what_is_on_it(tmp_path: Path) -> None:
    # The cloud tier is elsewhere: only the hot tier's disk is full.
    data = tmp_path / "data"
    control = Control(tmp_path / "control", data)
    cloud = (tmp_path / "elsewhere").as_uri()
    with (
        running_daemon(
            data, cloud, env=control.env, flush_interval_ms=NEVER_MS, lease_ms=LEASE_MS, map_size_bytes=64 * 1024**2
        ) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        sessions = [f"s{number}" for number in range(20)]
        for session in sessions:
            wire.create(session)
            wire.append(session, user("1", "hello"), assistant("2", "x" * 3000))
        control.limit_disk(0)
        acked, refused = fill(wire, "s0", 200_000, 3000, 4)
        assert refused.reason == "DISK_FULL"
        flushed = wire.admin.Flush(admin_pb2.FlushRequest())
        assert (flushed.flushed_sessions, flushed.failed_sessions, dict(flushed.failures)) == (len(sessions), 0, {})
        assert refusal(wire.append, "s1", user("3", "more")).reason == "DISK_FULL"
        assert wire.resume("s0", BUDGET).receipt.cloud_seq == len(acked) + 2
        # A drain releases them all: that needs no space either.
        assert daemon.terminate() == exits.OK
        assert violations(daemon) == []


def test_a_restart_on_a_full_disk_says_so_and_starts_once_there_is_space(tmp_path: Path, control: Control) -> None:
    with serving(tmp_path, control) as (daemon, wire):
        wire.create("a")
        wire.append("a", user("1", "hello"), assistant("2", "hi"))
        control.limit_disk(256 * 1024)
        acked, refused = fill(wire, "a", 200_000, 3000)
        assert refused.reason == "DISK_FULL"
        daemon.kill()
        # The cloud tier is on the same disk, and a node needs its lease there.
        with pytest.raises(StartFailed) as refused_start:
            daemon.start()
        assert (refused_start.value.reason, refused_start.value.exit_code) == ("STORE_UNAVAILABLE", exits.UNAVAILABLE)
        assert "is full" in refused_start.value.log
        control.limit_disk(None)
        daemon.start()
        assert ids(wire, "a") == ["1", "2", *acked]
        assert wire.append("a", user("3", "on")).turns[0].position.seq == len(acked) + 3


def test_a_disk_smaller_than_the_map_makes_room_by_itself(tmp_path: Path, control: Control) -> None:
    """The cloud tier is elsewhere; the map is hardly used, and the node's own released sessions fill the disk."""
    sessions, text = 60, words(200_000)
    (tmp_path / "cloud").mkdir()
    with (
        running_daemon(
            tmp_path / "data",
            f"file://{tmp_path / 'cloud'}",
            env=control.env,
            map_size_bytes=1024**3,
            flush_interval_ms=20,
            idle_release_ms=200,
        ) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        control.limit_disk(6 * 1024**2)
        refusals = 0
        reasons: set[str] = set()

        def taken(session: str) -> bool:
            nonlocal refusals
            try:
                wire.append(session, user("q", text), assistant("a", "hi"))
            except grpc.RpcError as error:
                reasons.add(Refusal(error).reason)
                refusals += 1
                return False
            return True

        for number in range(sessions):
            until(lambda name=f"s{number}": wire.create(name) and taken(name), "there is room again")
        status = wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)
        assert refusals
        assert reasons == {"DISK_FULL"}
        assert status.upkeep.evicted_sessions > 0
        assert status.hot.map_used_bytes < status.hot.map_size_bytes // 10
        for number in range(sessions):
            assert [turn.turn_id for turn in wire.resume(f"s{number}", BUDGET).turns] == ["q", "a"]
        until(lambda: '"event": "disk_full"' in daemon.log(), "the log tells it")


def test_a_second_daemon_on_the_same_folder_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    with serving(tmp_path, None) as (daemon, wire):
        wire.create("a")
        with pytest.raises(StartFailed) as refused, running_daemon(daemon.data_dir, node_name="another"):
            pass
        assert (refused.value.reason, refused.value.exit_code) == ("HOT_TIER_IN_USE", exits.UNAVAILABLE)
        assert wire.append("a", user("1", "hi")).head.seq == 1
        daemon.kill()
        daemon.start()
        assert ids(wire, "a") == ["1"]


# The disk fails --------------------------------------------------------------------------------------------------


def ended(daemon: Daemon) -> int:
    """The exit code of a daemon that ends by itself."""
    assert daemon.process is not None
    code = daemon.process.wait(WAIT_S)
    daemon.process = None
    return code


def events(log: str) -> list[str]:
    return [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("kind", "nth"), [(WRITE, 1), (FSYNC, 1), (WRITE, 3)], ids=["write", "fsync", "meta"])
def test_eio_stops_the_node_at_once_with_the_documented_exit_code_and_loses_nothing(
    tmp_path: Path, control: Control, kind: int, nth: int
) -> None:
    with serving(tmp_path, control) as (daemon, wire):
        wire.create("a")
        acked = ["1", "2"]
        wire.append("a", user("1", "hello"), assistant("2", "hi"))
        updates = health_pb2_grpc.HealthStub(wire.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
        assert next(updates).status == health_pb2.HealthCheckResponse.SERVING
        logged = len(daemon.log())
        control.arm(kind, nth, errno.EIO, for_good=True)
        refused = refusal(wire.append, "a", user("3", "into a failing disk"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "HOT_TIER_FAILED")
        assert "data.mdb" in control.told
        assert next(updates).status == health_pb2.HealthCheckResponse.NOT_SERVING
        updates.cancel()
        assert ended(daemon) == exits.UNAVAILABLE
        said = daemon.log()[logged:]
        assert events(said) == ["hot_tier_failed"]  # it neither drained nor retried
        assert re.search(r"^sessiond: HOT_TIER_FAILED: The disk of .* failed: ", said, re.MULTILINE)
        # Nobody can start on it while it fails; nothing was written over it meanwhile.
        with pytest.raises(StartFailed) as refused_start:
            daemon.start()
        assert refused_start.value.reason in ("HOT_TIER_FAILED", "STORE_UNAVAILABLE")
        control.disarm()
        daemon.start()
        found = ids(wire, "a")
        assert found[:2] == acked
        reply = wire.append("a", user("3", "into a failing disk"))
        assert ids(wire, "a") == ["1", "2", "3"]
        assert reply.turns[0].duplicate == (len(found) == 3)
        assert daemon.terminate() == exits.OK
        assert violations(daemon) == []


def test_one_failed_fsync_is_never_followed_by_another_try(tmp_path: Path, control: Control) -> None:
    """The second fsync would succeed: the kernel has dropped the pages."""
    with serving(tmp_path, control) as (daemon, wire):
        wire.create("a")
        control.arm(FSYNC, 1, errno.EIO)
        requests = [session_pb2.AppendTurnRequest(session_id="a", turns=[user(f"{n}", "hello")]) for n in range(20)]
        calls = [wire.sessions.AppendTurn.future(request, timeout=WAIT_S) for request in requests]
        for call in calls:
            # Those that it no longer came to are cancelled; neither says that anything was appended.
            assert call.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        assert ended(daemon) == exits.UNAVAILABLE
        # One fsync of the hot tier's failed; of its folder and file none came after it.
        assert control.failed(FSYNC) == 1
        assert "data.mdb" in control.told
        daemon.start()
        assert ids(wire, "a") == []


def test_a_disk_that_can_not_be_read_refuses_the_start_and_says_so(tmp_path: Path, control: Control) -> None:
    with serving(tmp_path, control) as (daemon, wire):
        wire.create("a")
        wire.append("a", user("1", "hello"))
        daemon.kill()
        hot = Control(tmp_path / "control", tmp_path / "data" / "hot")
        hot.arm(READ, 1, errno.EIO, for_good=True)
        with pytest.raises(StartFailed) as refused:
            daemon.start()
        assert (refused.value.reason, refused.value.exit_code) == ("HOT_TIER_FAILED", exits.UNAVAILABLE)
        hot.disarm()
        daemon.start()
        assert ids(wire, "a") == ["1"]


def test_a_disk_that_takes_no_writes_refuses_the_start_before_anything_is_served(tmp_path: Path) -> None:
    """What a killed process left behind may be visible and not on the disk: a start commits once, and so finds out."""
    control = Control(tmp_path / "control", tmp_path / "data" / "hot")
    with serving(tmp_path, control) as (daemon, wire):
        wire.create("a")
        wire.append("a", user("1", "hello"))
        daemon.kill()
        control.arm(FSYNC, 1, errno.EIO)
        with pytest.raises(StartFailed) as refused:
            daemon.start()
        assert (refused.value.reason, refused.value.exit_code) == ("HOT_TIER_FAILED", exits.UNAVAILABLE)
        control.disarm()
        daemon.start()
        assert ids(wire, "a") == ["1"]


# The file is cut -------------------------------------------------------------------------------------------------


def test_a_cut_file_is_refused_at_the_start_and_by_every_reader(tmp_path: Path) -> None:
    with serving(tmp_path, None) as (daemon, wire):
        wire.create("a")
        wire.append("a", user("1", "x" * 20_000), durability=turn_pb2.DURABILITY_CLOUD)
        daemon.kill()
        file = daemon.data_dir / "hot" / "data.mdb"
        whole = file.read_bytes()
        os.truncate(file, 5 * 4096)
        with pytest.raises(StartFailed) as refused:
            daemon.start()
        assert (refused.value.reason, refused.value.exit_code) == ("HOT_TIER_TRUNCATED", exits.CORRUPT)
        assert "sessiond repair" in refused.value.log
        with pytest.raises(Corrupt) as unread:
            Reader(daemon.data_dir / "hot")
        assert unread.value.reason == "HOT_TIER_TRUNCATED"
        assert file.stat().st_size == 5 * 4096, "a refused start must not write"
        # Restored, it is what it was; without it, what the cloud tier has.
        file.write_bytes(whole)
        daemon.start()
        assert ids(wire, "a") == ["1"]
        daemon.kill()
        (daemon.data_dir / "hot").rename(tmp_path / "aside")
        daemon.start()
        assert ids(wire, "a") == ["1"]


def test_a_file_cut_under_its_map_ends_the_process_tells_where_and_is_refused_afterwards(tmp_path: Path) -> None:
    with serving(tmp_path, None) as (daemon, wire):
        for number in range(50):
            wire.create(f"s{number}")
            wire.append(f"s{number}", user("1", "x" * 3000))
        wire.admin.Flush(admin_pb2.FlushRequest())
        file = daemon.data_dir / "hot" / "data.mdb"
        os.truncate(file, 2 * 4096)
        with pytest.raises(grpc.RpcError) as failed:
            wire.resume("s0", BUDGET)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ended(daemon) == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in daemon.log()
        with pytest.raises(StartFailed) as refused:
            daemon.start()
        assert refused.value.reason == "HOT_TIER_TRUNCATED"
        (daemon.data_dir / "hot").rename(tmp_path / "aside")
        daemon.start()
        for number in range(50):
            assert ids(wire, f"s{number}") == ["1"]


def test_a_file_cut_under_its_map_is_not_written_to(tmp_path: Path) -> None:
    """A write would make it as long as before, with a hole where turns were, and nobody could tell."""
    hot = Environment(tmp_path / "hot", 16 * 1024**2, 64, 8)
    failures: list[SessiondError] = []
    hot.on_failed = failures.append
    try:
        fill_environment(hot, 100)
        os.truncate(tmp_path / "hot" / "data.mdb", 10 * 4096)
        for _ in range(2):
            with pytest.raises(Corrupt) as refused:
                fill_environment(hot, 1)
            assert refused.value.reason == "HOT_TIER_TRUNCATED"
        with pytest.raises(Corrupt), hot.read():
            pass
        assert [failure.reason for failure in failures] == ["HOT_TIER_TRUNCATED"]
        assert (tmp_path / "hot" / "data.mdb").stat().st_size == 10 * 4096
    finally:
        hot.close()


# Descriptors and memory ------------------------------------------------------------------------------------------


def descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def test_without_descriptors_connected_callers_go_on_and_new_ones_get_in_once_some_are_closed(tmp_path: Path) -> None:
    with serving(tmp_path, None) as (daemon, wire):
        wire.create("a")
        wire.append("a", user("0", "hello"), assistant("0a", "hi"))
        others = [Wire(daemon.address) for _ in range(8)]
        for other in others:
            other.resume("a")
        pid = daemon.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (descriptors(daemon), hard))
        late = Wire(daemon.address)
        try:
            request = session_pb2.ResumeSessionRequest(session_id="a")
            request.context.budget_tokens = BUDGET
            waiting = late.sessions.ResumeSession.future(request, timeout=WAIT_S, wait_for_ready=True)
            for number in range(1, 30):
                assert wire.append("a", user(f"{number}", "on")).turns[0].position.seq == number + 2
                assert wire.resume("a", BUDGET).receipt.rung == HOT
            # The store's files can't be opened: what needs it says so, and nothing is acknowledged as CLOUD.
            refused = refusal(wire.append, "a", user("cloud", "x"), durability=turn_pb2.DURABILITY_CLOUD)
            assert refused.reason == "CLOUD_NOT_COMMITTED"
            assert not waiting.done()
            for other in others:
                other.close()
            assert waiting.result().context.receipt.rung == HOT
            assert wire.append("a", user("cloud", "x"), durability=turn_pb2.DURABILITY_CLOUD).turns[0].duplicate
            assert daemon.pid == pid
        finally:
            late.close()
        assert daemon.terminate() == exits.OK
        assert violations(daemon) == []


def test_the_daemon_takes_as_many_descriptors_as_it_may(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with running_daemon(tmp_path / "data") as daemon:
            assert resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


OPEN_WITHOUT_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
from sessiond.errors import SessiondError
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.hot.environment import Environment
path = Path(sys.argv[1])
FolderStore(path / "cloud").close()
Environment(path / "hot", 1 << 24, 64, 8).close()
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) - 1,) * 2)
for open_it in (lambda: Environment(path / "hot", 1 << 24, 64, 8), lambda: FolderStore(path / "cloud")):
    try:
        open_it()
    except SessiondError as error:
        print(error.reason)
"""


def test_a_tier_that_finds_no_descriptor_names_the_limit_to_raise(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_DESCRIPTORS, str(tmp_path)],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert ran.stdout.split() == ["TOO_MANY_FILES", "TOO_MANY_FILES"], ran.stderr


def test_a_disk_that_fails_tells_once_and_answers_reads_and_writes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot = Environment(tmp_path / "hot", 16 * 1024**2, 64, 8)
    failures: list[SessiondError] = []
    hot.on_failed = failures.append

    def broken(transaction: Transaction) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    try:
        for _ in range(2):
            with pytest.raises(Unavailable) as refused:
                hot.run_blocking(broken)
            assert refused.value.reason == "HOT_TIER_FAILED"
        with pytest.raises(Unavailable), hot.read():
            pass
        assert len(failures) == 1
    finally:
        hot.close()
    shutil.rmtree(tmp_path / "hot")
