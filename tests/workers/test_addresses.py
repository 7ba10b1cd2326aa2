"""Where a daemon listens: a port that its workers share and nobody else gets, and a Unix socket of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import grpc
import pytest

from sessiond.client import Client
from sessiond.config import load
from sessiond.errors import Invalid
from sessiond.testing import HOST, StartFailed, free_port, running_daemon
from sessiond.v1 import admin_pb2
from tests.wire import Wire, user
from tests.workers.test_deaths import until

EACH = pytest.mark.parametrize("workers", [0, 2])


def status(wire: Wire) -> admin_pb2.GetStatusResponse:
    return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)


@EACH
@pytest.mark.parametrize("others", [0, 2])
def test_a_port_that_another_daemon_has_is_refused_and_that_daemon_goes_on(workers: int, others: int) -> None:
    with running_daemon(workers=others) as first:
        with pytest.raises(StartFailed) as refused, running_daemon(port=first.port, workers=workers):
            pass
        assert refused.value.reason == "PORT_IN_USE"
        with closing(Wire(first.address)) as wire:
            assert len(status(wire).workers) == others


def test_a_port_that_something_else_listens_on_is_refused() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(StartFailed) as refused, running_daemon(port=taken.getsockname()[1]):
            pass
    assert refused.value.reason == "PORT_IN_USE"


@EACH
def test_a_daemon_comes_back_on_its_port_at_once_with_other_settings(tmp_path: Path, workers: int) -> None:
    port = free_port()
    for number in (workers, 2 - workers, workers):
        with (
            running_daemon(tmp_path / "data", port=port, workers=number) as daemon,
            closing(Wire(daemon.address)) as wire,
        ):
            wire.create("s")
            wire.append("s", user(f"t{number}", "here"))


def test_port_0_gives_all_workers_the_same_port(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sessiond", "serve", "--listen", f"{HOST}:0", "--workers", "2"]
    options = ["--data-dir", str(tmp_path / "data"), "--map-size-bytes", str(1 << 28)]
    daemon = subprocess.Popen([*command, *options], stderr=subprocess.PIPE)
    try:
        lines = (json.loads(line) for line in daemon.stderr)
        port = next(line["port"] for line in lines if line["event"] == "serving")
        wires = [Wire(f"{HOST}:{port}") for _ in range(32)]
        for wire in wires:
            status(wire)
        workers = status(wires[0]).workers
        for wire in wires:
            wire.close()
        assert len({worker.pid for worker in workers} - {0, daemon.pid}) == 2
    finally:
        daemon.terminate()
        daemon.communicate(timeout=60)
    assert daemon.returncode == 0


# What the second worker does before anything else.
LATE = """
import sys, time
if "sessiond.worker" in sys.orig_argv and sys.orig_argv[-2] == "1":
    time.sleep(1)
"""


def test_callers_that_come_at_the_start_find_every_worker_even_one_that_is_late(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LATE)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with running_daemon(workers=2, env={"PYTHONPATH": path}) as daemon, ExitStack() as opened:
        wires = [opened.enter_context(closing(Wire(daemon.address))) for _ in range(64)]
        for wire in wires:
            wire.create("s")
        for number in range(5):
            for place, wire in enumerate(wires):
                wire.append("s", user(f"{place}-{number}", "here"))
        with closing(Wire(daemon.address)) as wire:
            # They tell it now and then. A fifth of the connections, where half is to be expected, is no chance.
            until(lambda: sum(each.answered + each.relayed for each in status(wire).workers) >= 5 * 64, "all is told")
            assert min(each.answered + each.relayed for each in status(wire).workers) > 64


@EACH
def test_callers_on_the_same_host_use_a_socket_beside_the_port(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "s.sock"
    with running_daemon(tmp_path / "data", workers=workers, unix_socket=str(path)) as daemon:
        assert stat.S_ISSOCK(path.lstat().st_mode)
        with Client(f"unix:{path}") as client:
            session = client.create_session("by-socket")
            assert session.session_id == "by-socket"
        with closing(Wire(daemon.address)) as tcp, closing(Wire(f"unix:{path}")) as near:
            near.append("by-socket", user("one", "by the socket"))
            tcp.append("by-socket", user("two", "by the port"))
            assert [turn.turn_id for turn in near.turns("by-socket")] == ["one", "two"]
        assert daemon.terminate() == 0
        assert not path.exists() or not answers(path)


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as trial:
        try:
            trial.connect(str(path))
        except OSError:
            return False
    return True


@EACH
def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "s.sock"
    with running_daemon(tmp_path / "data", workers=workers, unix_socket=str(path)) as daemon:
        daemon.kill()
        assert path.exists()
        assert not answers(path)
        daemon.start()
        with closing(Wire(f"unix:{path}")) as wire:
            assert status(wire).phase == admin_pb2.NODE_PHASE_SERVING


@EACH
def test_a_socket_that_somebody_answers_on_is_left_alone(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "s.sock"
    with running_daemon(workers=workers, unix_socket=str(path)) as first:
        with pytest.raises(StartFailed) as refused, running_daemon(workers=workers, unix_socket=str(path)):
            pass
        assert refused.value.reason == "PORT_IN_USE"
        with closing(Wire(f"unix:{path}")) as wire:
            assert Path(status(wire).hot.path).parent == first.data_dir.absolute()


def test_a_file_that_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    path.write_text("something of somebody's")
    with pytest.raises(StartFailed) as refused, running_daemon(unix_socket=str(path)):
        pass
    assert refused.value.reason == "PORT_IN_USE"
    assert path.read_text() == "something of somebody's"


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"unix_socket": "relative.sock"}, "unix_socket"),
        ({"unix_socket": "/" + "x" * 107}, "unix_socket"),
        ({"workers": 65}, "workers"),
        ({"workers": -1}, "workers"),
        ({"workers": 1, "listen": "unix:/run/s.sock"}, "workers"),
    ],
)
def test_settings_that_can_not_be_are_refused_by_name(settings: dict, field: str) -> None:
    with pytest.raises(Invalid, match=field) as refused:
        load(None, {}, settings)
    assert refused.value.reason == "INVALID_CONFIG"


def test_the_path_of_a_socket_may_have_107_bytes() -> None:
    assert load(None, {}, {"unix_socket": "/" + "x" * 106}).unix_socket


def test_a_deep_data_folder_is_no_limit_and_the_keepers_socket_is_its_users_own(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["a-folder-with-a-long-name"] * 6)
    deep.mkdir(parents=True)
    with running_daemon(deep / "data") as daemon, closing(Wire(daemon.address)) as wire:
        assert len(status(wire).workers) == 2
        assert stat.S_IMODE((deep / "data" / "run").stat().st_mode) == 0o700


def test_a_signal_to_the_whole_group_is_the_keepers_to_follow() -> None:
    """Ctrl-C in a terminal reaches every process of the group."""
    with running_daemon() as daemon, closing(Wire(daemon.address)) as wire:
        wire.create("s")
        wire.append("s", user("t", "hello"))
        pid = daemon.pid
        process, daemon.process = daemon.process, None
        os.killpg(pid, signal.SIGINT)
        assert process.wait(60) == 0
        assert not re.search("worker_gone|worker_killed", daemon.log())
        with pytest.raises(grpc.RpcError):
            wire.append("s", user("t2", "hello"))


def test_a_daemon_is_started_again_the_moment_its_keeper_is_killed(tmp_path: Path) -> None:
    """Its workers may not have ended yet."""
    with running_daemon(tmp_path / "data", port=free_port()) as daemon:
        for number in range(3):
            with closing(Wire(daemon.address)) as wire:
                wire.create("s")
                wire.append("s", user(f"t{number}", "hello"))
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.process.wait()
            daemon.process = None
            daemon.start()
        with closing(Wire(daemon.address)) as wire:
            assert [turn.turn_id for turn in wire.turns("s")] == ["t0", "t1", "t2"]
