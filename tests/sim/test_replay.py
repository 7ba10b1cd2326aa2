"""A seed replays exactly, in another process and under another hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def digest(seed: int, hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--quiet"],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert f"seed {seed}: digest " in done.stdout, done.stdout + done.stderr
    return done.stdout.split("digest ")[1].split(",")[0]


@pytest.mark.parametrize("seed", [3, 21, 54, 111])
def test_a_seed_replays_exactly_in_another_process(seed: int) -> None:
    assert digest(seed, "1") == digest(seed, "2")
