"""Workers: how many hot resumes a second one, two and more of them serve, and what a call costs them in CPU.

All daemons stand beside each other and take their turns in every round. On two cores the load generator takes a part of
what a second worker could use, so that calls a second say little there; calls a second of server CPU do.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Load
from sessiond.config import Settings
from sessiond.testing import running_daemon
from sessiond.v1 import context_pb2, session_pb2

CALLERS = 32
# Connections are dealt out to workers by the kernel: enough of them, that each has its share.
CONNECTIONS = 32
SESSIONS, TURNS = 64, 100
# Two workers, the generator and what the daemon does beside serving.
CORES_FOR_TWO = 4


def test_throughput_by_workers(benchmark: Any, ledger: Any, size: Any) -> None:
    if "workers" not in Settings.__struct_fields__:
        pytest.skip("this build has no setting `workers`")
    cores = os.cpu_count() or 1
    # None: one process that does everything.
    counts = [1, 0, 2] + [count for count in (4, 8) if cores >= count + 2]
    names = [f"s{number}" for number in range(SESSIONS)]
    bodies = [wire.resume_request(name) for name in names]
    rounds, calls = size.of(10, 2), size.of(4000, 400)
    with contextlib.ExitStack() as opened:
        daemons = {count: opened.enter_context(running_daemon(workers=count)) for count in counts}
        load = opened.enter_context(Load(CALLERS, CONNECTIONS))
        for daemon in daemons.values():
            with wire.Client(daemon.address) as client:
                talk.make_sessions(client, names, TURNS)
                client.settle()
                context = session_pb2.ResumeSessionResponse.FromString(client.raw(wire.RESUME)(bodies[0])).context
                assert context.receipt.rung == context_pb2.RUNG_HOT
                assert context.tokens.total > 2500

        def run(count: int) -> dict[str, float]:
            before = wire.cpu_s(daemons[count].pid)
            answer = load.run(daemons[count].address, wire.RESUME, calls, bodies)
            spent = wire.cpu_s(daemons[count].pid) - before
            return {
                "calls/s": calls / answer["seconds"],
                "calls/s of server CPU": calls / spent,
                "cores": spent / answer["seconds"],
            }

        mine, facing = ratio.by_blocks(
            benchmark, lambda: {count: run(count) for count in counts[1:]}, lambda: run(1), rounds
        )
    for count in counts[1:]:
        case = f"hot resume, {f'{count} workers' if count else 'one process for all'}, {CALLERS} callers"
        for measure in ("calls/s of server CPU", "calls/s"):
            values = [answer[count][measure] for answer in mine], [answer[measure] for answer in facing]
            promise = ""
            if count == 2:
                promise = "workers cpu" if measure != "calls/s" else "workers calls" if cores >= CORES_FOR_TWO else ""
            made = ledger.add(case, measure, "one worker", "/s", *values, promise)
            benchmark.extra_info[f"{measure}, {count}"] = made.ratio
    for name in ("calls/s", "calls/s of server CPU"):
        series = "sessiond" if name == "calls/s" else "sessiond, a second of server CPU"
        ledger.point("workers", series, 1, [answer[name] for answer in facing])
        for count in counts[2:]:
            ledger.point("workers", series, count, [answer[count][name] for answer in mine])
    busy = (
        [answer["cores"] for answer in facing],
        *([answer[count]["cores"] for answer in mine] for count in counts[1:]),
    )
    ledger.note(
        "workers",
        f"{cores} cores; cores in use by the daemon at the median: "
        + ", ".join(
            f"{count} workers {ratio.percentile(sorted(values), 0.5):.2f}"
            for count, values in zip(counts, busy, strict=True)
        ),
    )
