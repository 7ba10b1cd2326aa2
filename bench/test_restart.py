"""Restart after SIGKILL: from exec to the first resume that answers, against process start alone.

Process start alone is a Python process that imports the daemon's modules, starts the same server on the port and
answers the first call.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from bench import ratio, talk, wire
from bench.processes import ROOT, bare_command, environment
from sessiond.testing import running_daemon
from sessiond.v1 import context_pb2, session_pb2

TURNS = 4
CALLERS = 48
START_S_MAX = 60.0


def first_answer(process: subprocess.Popen[bytes], address: str, request: bytes, deadline: float) -> bytes:
    """The first reply to the request; asked again while the server is not there or still starting."""
    while process.poll() is None and time.perf_counter() < deadline:
        # A channel of its own each time: one that was refused once waits before it tries again.
        with wire.Client(address) as client, contextlib.suppress(grpc.RpcError):
            reply: bytes = client.channel.unary_unary(wire.RESUME)(request, timeout=deadline - time.perf_counter())
            return reply
        time.sleep(0.002)
    raise RuntimeError(f"{process.args!r} did not answer within {START_S_MAX} s, or ended")


def start_to_answer(command: list[str], env: dict[str, str], address: str, request: bytes) -> tuple[float, bytes]:
    """(seconds from exec to the first answer, the answer); the process is killed afterwards."""
    started = time.perf_counter()
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        reply = first_answer(process, address, request, started + START_S_MAX)
        return time.perf_counter() - started, reply
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("sessions", [500, pytest.param(10_000, marks=pytest.mark.full)])
def test_restart_after_a_kill(benchmark: Any, ledger: Any, size: Any, tmp_path: Path, sessions: int) -> None:
    names = [f"session-{number}" for number in range(sessions)]
    request = wire.resume_request(names[sessions // 2])
    with running_daemon(tmp_path / "data") as daemon:
        populated = time.perf_counter()
        with wire.Client(daemon.address) as client:
            talk.make_sessions(client, names, TURNS, CALLERS)
            populated = time.perf_counter() - populated
            dirty = client.status().hot.dirty_sessions
            reply = client.raw(wire.RESUME)(request)
        # The very same daemon again: what started it, with what it was started with.
        proc = Path(f"/proc/{daemon.pid}")
        command = [part.decode() for part in proc.joinpath("cmdline").read_bytes().split(b"\0")[:-1]]
        env = dict(pair.split("=", 1) for pair in proc.joinpath("environ").read_bytes().decode().split("\0") if pair)
        address = daemon.address
        daemon.kill()

        path = tmp_path / "reply"
        path.write_bytes(reply)
        bare = bare_command(address, path)

        def ours() -> float:
            took, answer = start_to_answer(command, env, address, request)
            context = session_pb2.ResumeSessionResponse.FromString(answer).context
            assert context.receipt.rung == context_pb2.RUNG_HOT
            assert len(context.turns) == TURNS
            return took

        def theirs() -> float:
            took, answer = start_to_answer(bare, environment(), address, request)
            assert answer == reply
            return took

        mine, facing = ratio.by_blocks(benchmark, ours, theirs, size.of(15, 3))
    case = f"restart after SIGKILL, {sessions:,} sessions, folder"
    made = ledger.add(case, "exec to first resume", "process start alone", "s", mine, facing)
    later = sorted(one - other for one, other in zip(mine, facing, strict=True))
    low, high = ratio.quartiles(later)
    files = sum(file.stat().st_blocks * 512 for file in (tmp_path / "data" / "hot").iterdir())
    ledger.note(
        case,
        f"+ {later[len(later) // 2]:.3f} s, quartiles {low:.3f} - {high:.3f} (to reach at 100,000 sessions: + 0.2 s); "
        f"{dirty:,} sessions were dirty when it was killed, populated in {populated:.0f} s, hot tier "
        f"{files / 1e6:.0f} MB",
    )
    benchmark.extra_info["ratio"] = made.ratio
    benchmark.extra_info["later_s"] = later
