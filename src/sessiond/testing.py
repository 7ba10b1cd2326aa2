"""A real daemon on a free port, for tests: the one of this package, as a process of its own. PYTEST_DONT_REWRITE

It promises that a daemon is serving when it is handed over, and that whatever was started here is gone when the block
ends, whichever way it ends. It never imports the daemon, never waits by sleeping, and never signals a process that it
did not start.

    with running_daemon(flush_interval_ms=50) as daemon, Client(daemon.address) as client:
        ...

A pytest suite gets the fixture `sessiond_daemon` with `pytest_plugins = ["sessiond.testing"]` in its conftest.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sessiond.v1 import admin_pb2, admin_pb2_grpc

# Below 32,768, where Linux begins to hand out ports to outgoing connections: a port that was free stays so, also
# while the daemon restarts.
PORTS: Final = range(31_000, 32_768)
HOST: Final = "127.0.0.1"
STARTS_MAX: Final = 8
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0
# The daemon's default is meant for a machine of its own.
MAP_SIZE_BYTES: Final = 1024**3
READINESS: Final = "readiness"
LOG_TAIL_BYTES: Final = 4096
# Settings of every daemon that is started here, unless it is given others.
DEFAULTS: Final[dict[str, str | int | bool]] = {"map_size_bytes": MAP_SIZE_BYTES}
_CHANNEL_OPTIONS: Final = [
    # A daemon that is not there yet is asked again soon, whatever another channel of this process has seen.
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]

Setting = str | int | bool


class StartFailed(RuntimeError):
    """The daemon ended, or was not ready in time. reason: as in docs/errors.md, empty where it gave none."""

    def __init__(self, message: str, reason: str, exit_code: int | None, log: str) -> None:
        super().__init__(f"{message} {log[-LOG_TAIL_BYTES:]}".rstrip())
        self.reason = reason
        self.exit_code = exit_code
        self.log = log


class Daemon:
    """One daemon, its disk and its port. Made by `running_daemon`; every stop and start keeps address and settings."""

    def __init__(
        self, folder: Path, data_dir: Path, cloud: str, port: int, env: Mapping[str, str], settings: dict[str, Setting]
    ) -> None:
        self.data_dir = data_dir
        self.cloud = cloud or f"file://{data_dir.absolute() / 'cloud'}"
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        self._port = port
        self._port_is_given = port != 0
        self._env = dict(env)
        self._settings: dict[str, Setting] = {**DEFAULTS, **settings}

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return self._port

    @property
    def address(self) -> str:
        """HOST:PORT, as clients take it; the same after a restart."""
        return f"{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """The process id. Raises RuntimeError while it is stopped."""
        return self._running().pid

    @property
    def log_path(self) -> Path:
        """The file with everything that it wrote to standard error and output, restarts included."""
        return self._folder / "daemon.log"

    def log(self) -> str:
        """Everything that it wrote so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it serves. Raises StartFailed; then nothing is running."""
        if self.process is not None:
            raise RuntimeError(f"The daemon is running already, as process {self.process.pid}.")
        for attempt in range(STARTS_MAX):
            fixed = self._port_is_given or (self._port != 0 and attempt == 0)
            if not fixed:
                self._port = free_port()
            try:
                self._start(timeout_s)
            except StartFailed as failure:
                # Somebody else took the port between the look and the start; another address is not ours to change.
                taken = failure.reason == "PORT_IN_USE" and self.address in failure.log
                if not taken or self._port_is_given or attempt == STARTS_MAX - 1:
                    raise
            else:
                return

    def kill(self) -> None:
        """SIGKILL, and wait: what a crash of the process leaves behind."""
        process = self._running()
        _signal(process, signal.SIGKILL)
        process.wait()
        self.process = None

    def terminate(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, so that it drains, and wait; its exit code. Raises subprocess.TimeoutExpired; it goes on then."""
        process = self._running()
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout_s)
        self.process = None
        return code

    def restart(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it again on its data, its port and its cloud tier; if it is running, it drains first."""
        if self.process is not None:
            self.terminate()
        self.start(timeout_s)

    def lose_hot_tier(self) -> None:
        """Delete the hot tier, as the loss of the node's disk does. Raises RuntimeError while it is running."""
        if self.process is not None:
            raise RuntimeError("Stop the daemon before its hot tier is deleted.")
        shutil.rmtree(self.data_dir / "hot")

    def stop(self) -> None:
        """End it in any case: SIGTERM, then SIGKILL if it takes too long. Does nothing if it is stopped."""
        if self.process is None:
            return
        try:
            self.terminate()
        except BaseException:
            self.kill()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            raise RuntimeError("The daemon is stopped.")
        return self.process

    def _start(self, timeout_s: float) -> None:
        config = self._folder / "sessiond.toml"
        settings = {
            "data_dir": str(self.data_dir.absolute()),
            "cloud": self.cloud,
            "listen": self.address,
            **self._settings,
        }
        config.write_text("".join(f"{key} = {_toml(value)}\n" for key, value in settings.items()))
        logged = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sessiond", "serve", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(self._env),
                # A group of its own: a Ctrl-C meant for the tests must not end it before they do.
                start_new_session=True,
            )
        self.process = process
        try:
            serving = _wait_until_ready(process, self.address, self.data_dir.absolute() / "hot", timeout_s)
        except BaseException:
            self.kill()
            raise
        if not serving:
            code = process.poll()
            self.kill()
            written = self.log_path.read_bytes()[logged:].decode(errors="replace")
            what = "was not ready in time" if code is None else f"ended with exit code {code}"
            raise StartFailed(f"The daemon {what}.", _reason(written), code, written)


def free_port() -> int:
    """A port that nobody listens on. It stays free for as long as nobody else picks it: retry on PORT_IN_USE."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((HOST, port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"No port from {PORTS.start} to {PORTS.stop - 1} is free.")


@contextlib.contextmanager
def running_daemon(
    data_dir: str | os.PathLike[str] | None = None,
    cloud: str | None = None,
    port: int = 0,
    env: Mapping[str, str] | None = None,
    **settings: Setting,
) -> Iterator[Daemon]:
    """A daemon that serves, stopped when the block ends. Raises StartFailed.

    data_dir: kept afterwards if given, else a temporary folder. cloud: a URL as `--cloud` takes it, else a folder in
    data_dir. port: 0 finds a free one. env: variables added to this process's, SESSIOND_ settings of which are left
    out. settings: keys of sessiond.toml.
    """
    with tempfile.TemporaryDirectory(prefix="sessiond-") as name:
        folder = Path(name)
        data = Path(data_dir) if data_dir is not None else folder / "data"
        daemon = Daemon(folder, data, cloud or "", port, env or {}, settings)
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.stop()


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    kept = ("SESSIOND_PURE", "SESSIOND_DEBUG")
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SESSIOND_") or name in kept
    }
    # The daemon of the package that this test imported, wherever it is run from.
    root = Path(__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), path] if path else [str(root)])
    environment.update(added)
    return environment


def _toml(value: Setting) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else json.dumps(value, ensure_ascii=False)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the daemon's whole group: it leads one, and may have workers."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, hot_dir: Path, timeout_s: float) -> bool:
    """Whether this very process serves; False if it ended or took too long."""
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        updates = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=READINESS), timeout=timeout_s, wait_for_ready=True
        )

        def cancel_at_its_end() -> None:
            process.wait()
            updates.cancel()

        # Ends with the daemon; a test that stops its daemons leaves none behind.
        threading.Thread(target=cancel_at_its_end, name=f"sessiond-{process.pid}", daemon=True).start()
        try:
            for update in updates:
                if update.status == health_pb2.HealthCheckResponse.SERVING:
                    break
            else:
                return False
            status = admin_pb2_grpc.AdminServiceStub(channel).GetStatus(admin_pb2.GetStatusRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
        finally:
            updates.cancel()
        # Another daemon may hold the port, and ours be about to say so.
        if Path(status.hot.path) == hot_dir:
            return True
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        return False


def _reason(log: str) -> str:
    """The reason that a daemon gave for not starting, as the command line tells it."""
    told = re.findall(r"^sessiond: ([A-Z][A-Z0-9_]+): ", log, re.MULTILINE)
    return str(told[-1]) if told else ""


if "pytest" in sys.modules:
    import pytest

    @pytest.fixture
    def sessiond_daemon() -> Iterator[Daemon]:
        """A daemon of the test's own, on a temporary folder; flushes often."""
        with running_daemon(flush_interval_ms=50) as daemon:
            yield daemon
