"""Servers of other people that peers need, each a process of its own in a temporary folder on 127.0.0.1.

It promises that each is ended by its process id when its block ends, and by the kernel if this process is killed. Where
a server is not installed it raises `Missing`, which says what to install; nothing is ever installed from here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from sessiond.testing import HOST, free_port

START_S_MAX = 30.0
STOP_S_MAX = 20.0


class Missing(Exception):
    """Something that is not installed on this machine; the text says what, and how to get it."""


def _tied(command: list[str]) -> list[str]:
    """The command, ended by the kernel when this process is; setpriv execs, so the process id stays."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def _await(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the process takes connections on the port."""
    deadline = time.monotonic() + START_S_MAX
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.01)


@contextlib.contextmanager
def _running(command: list[str], folder: Path, port: int, stop: int, user: str | None = None) -> Iterator[None]:
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            _tied(command), stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=folder, user=user,
            env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        )  # fmt: skip
    try:
        _await(process, port, log)
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def binary(name: str, package: str) -> str:
    """The program's path. Raises Missing."""
    found = shutil.which(name)
    if found is None:
        raise Missing(f"{name} is missing; apt install {package}")
    return found


@contextlib.contextmanager
def running_redis(durable: bool) -> Iterator[int]:
    """A Redis; its port. durable: a write is answered once it is fsynced, as an append EDGE is; else as shipped."""
    server = binary("redis-server", "redis-server")
    with tempfile.TemporaryDirectory(prefix="bench-redis-") as name:
        port = free_port()
        command = [server, "--port", str(port), "--bind", HOST, "--dir", name]
        if durable:
            command += ["--appendonly", "yes", "--appendfsync", "always", "--save", ""]
        # SIGKILL: as shipped it would write everything to the folder that is about to go.
        with _running(command, Path(name), port, signal.SIGKILL):
            yield port


def _postgres_folder() -> Path:
    """Where initdb and postgres are. Raises Missing."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(4), reverse=True)
    found = shutil.which("initdb")
    for place in [*([Path(found).parent] if found else []), *places]:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise Missing("PostgreSQL is missing; apt install postgresql")


@contextlib.contextmanager
def running_postgres() -> Iterator[str]:
    """A PostgreSQL as initdb makes it, so that a commit is on the disk; how psycopg connects to it."""
    programs = _postgres_folder()
    user = None
    with tempfile.TemporaryDirectory(prefix="bench-postgres-") as name:
        folder = Path(name)
        if os.geteuid() == 0:
            # It refuses to run as root.
            known = {entry.pw_name for entry in pwd.getpwall()}
            user = "postgres" if "postgres" in known else "nobody"
            shutil.chown(folder, user)
        data, port = folder / "data", free_port()
        made = subprocess.run(
            [programs / "initdb", "-D", data, "-U", "bench", "-A", "trust", "-E", "UTF8", "--locale=C"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, user=user,
            cwd=folder, timeout=120,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(made.stdout[-2000:])
        command = [str(programs / "postgres"), "-D", str(data), "-p", str(port), "-h", HOST, "-k", name]
        with _running(command, folder, port, signal.SIGINT, user):
            yield f"host={HOST} port={port} user=bench dbname=postgres"
