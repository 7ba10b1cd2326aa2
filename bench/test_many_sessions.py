"""A node with 100,000 hot sessions: 15,000 of them live, and the restart after SIGKILL with all of them.

The hot tier is on the disk; the cloud tier is a folder in memory where that can be had, because 100,000 manifests with
an fsync each would take longer than everything else here. Neither side of a ratio waits for it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Load, bare_command, environment
from bench.restarts import start_to_answer, start_to_serving
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, session_pb2

MEMORY = Path("/dev/shm")
SESSIONS, LIVE, FEW = 100_000, 15_000, 150
TURNS, TURN_BYTES = 4, 200
CALLERS, CONNECTIONS = 64, 16
DAY_MS = 86_400_000
# Nothing is to be evicted.
MAP_BYTES = 4 * 1024**3


@pytest.fixture(scope="module")
def names(size: Any) -> list[str]:
    return [f"session-{number:06d}" for number in range(size.of(SESSIONS, 600))]


@pytest.fixture(scope="module")
def daemon(names: list[str], ledger: Any) -> Iterator[Daemon]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-many-", dir=MEMORY if MEMORY.is_dir() else None) as cloud,
        # Sessions that nobody asks for are not let go while the others are measured.
        running_daemon(
            cloud=Path(cloud, "cloud").as_uri(), idle_release_ms=DAY_MS, map_size_bytes=MAP_BYTES
        ) as running,
    ):
        began = time.perf_counter()
        with Load(CALLERS, CONNECTIONS) as load:
            load.make(running.address, names, TURNS, TURN_BYTES)
        took = time.perf_counter() - began
        with wire.Client(running.address) as client:
            assert client.status().hot.sessions == len(names)
            # The generator counts an answered batch, whatever came of its items.
            for name in names[:: max(1, len(names) // 500)]:
                request = session_pb2.GetSessionRequest(session_id=name)
                assert client.sessions.GetSession(request, timeout=wire.TIMEOUT_S).session.head.seq == TURNS
            ledger.note(f"{len(names):,} sessions", f"made in {took:.0f} s, {len(names) / took:,.0f} a second")
        yield running


def test_live_sessions(benchmark: Any, ledger: Any, size: Any, daemon: Daemon, names: list[str]) -> None:
    live, few = size.of(LIVE, 300), size.of(FEW, 30)
    rounds, calls = size.of(4, 2), size.of(LIVE, 300)
    kinds = {
        "resume": (wire.RESUME, [wire.resume_request(name) for name in names[:live]]),
        "append": (
            wire.APPEND,
            [wire.append_request(name, talk.turn(1)).SerializeToString() for name in names[:live]],
        ),
    }
    at = {"resume": [-1] * live, "append": [raw.index(b"turn-") + len(b"turn-") for raw in kinds["append"][1]]}
    with wire.Client(daemon.address) as client, Load(CALLERS, CONNECTIONS) as load:
        first = session_pb2.ResumeSessionResponse.FromString(client.raw(wire.RESUME)(kinds["resume"][1][-1])).context
        assert (first.receipt.rung, len(first.turns)) == (context_pb2.RUNG_HOT, TURNS)

        def side(count: int) -> dict[str, dict[str, float]]:
            answers = {}
            for kind, (path, bodies) in kinds.items():
                number = calls if kind == "resume" else calls // 5
                before = wire.cpu_s(daemon.pid)
                answers[kind] = load.run(daemon.address, path, number, bodies[:count], at[kind][:count], each=True)
                answers[kind]["cpu_s"] = (wire.cpu_s(daemon.pid) - before) / number
                answers[kind]["per_s"] = number / answers[kind]["seconds"]
            return answers

        mine, facing = ratio.by_blocks(benchmark, lambda: side(live), lambda: side(few), rounds)
        memory = wire.anonymous_bytes(daemon.pid)
        status = client.status()
    assert status.hot.sessions == len(names)
    for kind in kinds:
        case = f"{live:,} live sessions of {len(names):,} on one node, {kind}"
        for measure, key, unit in (("calls/s", "per_s", "/s"), ("server CPU a call", "cpu_s", "s"),
                                   ("p50", "p50_s", "s"), ("p99", "p99_s", "s")):  # fmt: skip
            values = [[answer[kind][key] for answer in one] for one in (mine, facing)]
            promise = "many sessions" if measure == "p50" else ""
            made = ledger.add(case, measure, f"the same calls to {few} of them", unit, values[0], values[1], promise)
            benchmark.extra_info[f"{kind} {measure}"] = made.ratio
    ledger.note(
        f"{live:,} live sessions of {len(names):,} on one node",
        f"resident memory without the map {', '.join(f'{one / 1e6:.0f} MB' for one in memory)} (each process)",
    )


def test_restart_after_a_kill(
    benchmark: Any, ledger: Any, size: Any, daemon: Daemon, names: list[str], tmp_path: Path
) -> None:
    request = wire.resume_request(names[-1])
    with wire.Client(daemon.address) as client:
        reply = client.raw(wire.RESUME)(request)
        dirty = client.status().hot.dirty_sessions
    # The very same daemon again: what started it, with what it was started with.
    proc = Path(f"/proc/{daemon.pid}")
    command = [part.decode() for part in proc.joinpath("cmdline").read_bytes().split(b"\0")[:-1]]
    env = dict(pair.split("=", 1) for pair in proc.joinpath("environ").read_bytes().decode().split("\0") if pair)
    address = daemon.address
    daemon.kill()
    path = tmp_path / "reply"
    path.write_bytes(reply)
    bare = bare_command(address, path)
    serving: list[float] = []

    def ours() -> float:
        took, answer = start_to_answer(command, env, address, request)
        context = session_pb2.ResumeSessionResponse.FromString(answer).context
        assert context.receipt.rung == context_pb2.RUNG_HOT
        assert len(context.turns) == TURNS
        serving.append(start_to_serving(command, env, address))
        return took

    def theirs() -> float:
        took, answer = start_to_answer(bare, environment(), address, request)
        assert answer == reply
        return took

    rounds = size.of(15, 2)
    mine, facing = ratio.by_blocks(benchmark, ours, theirs, rounds)
    case = f"restart after SIGKILL, {len(names):,} hot sessions, folder"
    made = ledger.add(case, "exec to first resume", "process start alone", "s", mine, facing)
    later = [one - other for one, other in zip(mine, facing, strict=True)]
    # A promise about 100,000 is not measured with fewer.
    whole = len(names) == SESSIONS
    ledger.alone(case, "seconds more than process start alone", "s", later, "restart" if whole else "")
    ledger.alone(case, "exec to ready, by health", "s", serving[-rounds:], "serving" if whole else "")
    files = sum(file.stat().st_blocks * 512 for file in (daemon.data_dir / "hot").iterdir())
    ledger.note(case, f"{dirty:,} sessions were dirty when it was killed, hot tier {files / 1e6:.0f} MB")
    benchmark.extra_info["ratio"] = made.ratio
    benchmark.extra_info["later_s"] = later
