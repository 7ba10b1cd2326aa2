"""That `make profile` works: it reaches into the daemon's rooms, and would rot unseen."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from bench.processes import ROOT, environment

RUN_S_MAX = 120


def test_the_profile_of_a_resume_and_an_append(benchmark: Any) -> None:
    def run() -> str:
        command = [sys.executable, "-m", "bench.where", "--quick"]
        done = subprocess.run(
            command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=RUN_S_MAX, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = benchmark.pedantic(run, rounds=1, iterations=1)
    for title in ("hot resume, 1,000 turns", "append EDGE of", "hot resume: cProfile", "loop's thread: cProfile"):
        assert title in told
