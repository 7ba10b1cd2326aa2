"""From exec to the first answer of a process, and from exec to readiness; the process is killed afterwards.

It promises that a process that does not answer, or ends, ends the run, and that its children end with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bench import wire
from bench.processes import ROOT
from sessiond.testing import READINESS

START_S_MAX = 60.0
PAUSE_S = 0.002


@contextlib.contextmanager
def _started(command: list[str], env: dict[str, str]) -> Iterator[tuple[subprocess.Popen[bytes], float]]:
    """The process in a group of its own, and when it was started; its group is killed."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process, started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def start_to_answer(command: list[str], env: dict[str, str], address: str, request: bytes) -> tuple[float, bytes]:
    """(seconds from exec to the first answer to the request, the answer); asked again while it is still starting."""
    with _started(command, env) as (process, started):
        deadline = started + START_S_MAX
        while process.poll() is None and time.perf_counter() < deadline:
            # A channel of its own each time: one that was refused once waits before it tries again.
            with wire.Client(address) as client, contextlib.suppress(grpc.RpcError):
                reply: bytes = client.channel.unary_unary(wire.RESUME)(request, timeout=deadline - time.perf_counter())
                return time.perf_counter() - started, reply
            time.sleep(PAUSE_S)
    raise RuntimeError(f"the process did not answer within {START_S_MAX} s, or ended")


def start_to_serving(command: list[str], env: dict[str, str], address: str) -> float:
    """Seconds from exec until its health service says that it is ready."""
    with _started(command, env) as (process, started):
        deadline = started + START_S_MAX
        asked = health_pb2.HealthCheckRequest(service=READINESS)
        while process.poll() is None and time.perf_counter() < deadline:
            with wire.Client(address) as client, contextlib.suppress(grpc.RpcError):
                answer = health_pb2_grpc.HealthStub(client.channel).Check(asked, timeout=wire.TIMEOUT_S)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return time.perf_counter() - started
            time.sleep(PAUSE_S)
    raise RuntimeError(f"the process was not ready within {START_S_MAX} s, or ended")
