"""A partition that drops packets without a word: where the machine allows network namespaces, else by links alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import sessiond
from tests.cluster.namespaces import RUN_S_MAX, are_allowed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not are_allowed(), reason="this machine allows no network namespaces; test_links.py has the rest")
def test_a_node_whose_packets_vanish_keeps_its_sessions_while_its_lease_moves(tmp_path: Path) -> None:
    # The package that this test imported, wherever it is run from.
    path = str(Path(sessiond.__file__).resolve().parents[1])
    run = subprocess.run(
        ["unshare", "-rn", sys.executable, "-m", "tests.cluster.namespaces", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
    )
    logs = "".join(f"{log.name}: {log.read_text()[-1500:]}\n" for log in sorted(tmp_path.glob("*.log")))
    assert run.returncode == 0, f"{run.stdout[-3000:]}{run.stderr[-3000:]}{logs}"
