"""The same server under h2load, a load generator that nobody here wrote: does `bench/load.py` tell the truth?

h2load posts one body, framed as gRPC has it, over as many connections and streams as our generator. It is written in C
and takes less CPU a call, so that the server has more of two cores; what must agree is the ratio to the bare handler.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Load, running_bare
from bench.servers import Missing, binary
from sessiond.testing import running_daemon
from sessiond.v1 import context_pb2, session_pb2

CALLERS, CONNECTIONS = 16, 4
RUN_S_MAX = 120


def h2load(program: str, address: str, body: Path, calls: int, reply_bytes: int) -> float:
    """Calls a second. Every one must have come back whole: h2load itself knows nothing of gRPC's status."""
    done = subprocess.run(
        [
            program, f"--requests={calls}", f"--clients={CONNECTIONS}",
            f"--max-concurrent-streams={CALLERS // CONNECTIONS}", "--threads=1", "--window-bits=30",
            "--connection-window-bits=30", f"--data={body}", "--header=content-type: application/grpc",
            "--header=te: trailers", f"http://{address}{wire.RESUME}",
        ],
        capture_output=True, text=True, timeout=RUN_S_MAX, check=True,
    ).stdout  # fmt: skip
    counts = re.search(r"(\d+) total, \d+ started, \d+ done, (\d+) succeeded", done)
    came = re.search(r"\((\d+)\) data", done)
    speed = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", done)
    assert counts is not None, done
    assert came is not None, done
    assert speed is not None, done
    assert (int(counts[1]), int(counts[2])) == (calls, calls), done
    # An error would be trailers without a message.
    assert int(came[1]) == calls * (reply_bytes + 5), done
    return float(speed[1])


def test_both_generators(benchmark: Any, ledger: Any, size: Any, tmp_path: Path) -> None:
    try:
        program = binary("h2load", "nghttp2-client")
    except Missing as missing:
        pytest.skip(str(missing))
    request = wire.resume_request("s")
    body = tmp_path / "body"
    body.write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
    calls, rounds = size.of(4000, 400), size.of(8, 2)
    with running_daemon() as daemon, wire.Client(daemon.address) as client:
        talk.make_session(client, "s", 1000)
        client.settle()
        reply = client.raw(wire.RESUME)(request)
        context = session_pb2.ResumeSessionResponse.FromString(reply).context
        assert context.receipt.rung == context_pb2.RUNG_HOT
        with running_bare(reply) as bare, Load(CALLERS, CONNECTIONS) as load:

            def ours(address: str) -> float:
                answer = load.run(address, wire.RESUME, calls, [request])
                return answer["calls"] / answer["seconds"]

            def side(address: str) -> dict[str, float]:
                return {"h2load": h2load(program, address, body, calls, len(reply)), "load": ours(address)}

            mine, facing = ratio.by_blocks(benchmark, lambda: side(daemon.address), lambda: side(bare.address), rounds)
    case = f"hot resume, 1,000 turns, {CALLERS} callers"
    for name, told in (("h2load", "by h2load"), ("load", "by bench/load.py, beside h2load")):
        values = [[answer[name] for answer in side] for side in (mine, facing)]
        ledger.add(case, f"calls/s, {told}", "bare handler, same bytes", "/s", values[0], values[1])
    for side, name in ((mine, "sessiond"), (facing, "bare handler")):
        made = ledger.add(
            f"{name}, {CALLERS} callers", "calls/s by h2load", "bench/load.py, same server", "/s",
            [answer["h2load"] for answer in side], [answer["load"] for answer in side],
        )  # fmt: skip
        benchmark.extra_info[name] = made.ratio
