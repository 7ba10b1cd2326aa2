"""Memory, descriptors, map and bucket stay bounded over a day, however many sessions come and go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# After a quarter of the day everything that grows with use has grown.
SETTLED_HOUR = 6
RESIDENT_GROWTH_MAX = 1.15
RESIDENT_SLACK = 16 * 1024**2
DESCRIPTORS_SLACK = 8


def lived(out: Path, sessions: int, map_mib: int, turn_bytes: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.soak.day", "--sessions", str(sessions), "--out", str(out)]
    command += ["--map-mib", str(map_mib), "--turn-bytes", str(turn_bytes)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], timeout=4 * 3600)
    facts: dict[str, Any] = json.loads((out / "samples.json").read_text())
    assert (out / "day.svg").read_text().count("<polyline") == 5
    return facts


def assert_bounded(facts: dict[str, Any]) -> None:
    samples = facts["samples"]
    assert samples[-1]["created"] == facts["sessions"]
    settled = next(sample for sample in samples if sample["hour"] >= SETTLED_HOUR)
    for sample in samples:
        if sample["hour"] >= SETTLED_HOUR:
            assert sample["resident"] <= settled["resident"] * RESIDENT_GROWTH_MAX + RESIDENT_SLACK, sample
            assert sample["descriptors"] <= settled["descriptors"] + DESCRIPTORS_SLACK, sample
        # Eviction begins at 70 % and a step of the day may come on top.
        assert sample["map_used"] <= facts["map"] * 0.85, sample
        assert sample["map_file"] <= facts["map"], sample
        # A manifest, a row by user, perhaps one by day; and what belongs to the node, not to a session.
        assert sample["objects"] <= 3 * sample["created"] + 200, sample
    done = facts["upkeep"]
    assert min(done["released"], done["evicted"], done["archived"], done["deleted"]) > 0, done


def test_a_day_of_sessions_leaves_memory_descriptors_map_and_bucket_bounded(tmp_path: Path) -> None:
    assert_bounded(lived(tmp_path, sessions=1200, map_mib=16, turn_bytes=4000))


@pytest.mark.torture
def test_a_day_of_two_hundred_thousand_sessions_leaves_everything_bounded() -> None:
    out = Path("build/soak")
    assert_bounded(lived(out, sessions=200_000, map_mib=256, turn_bytes=800))
    print(f"plotted in {out / 'day.svg'}")
