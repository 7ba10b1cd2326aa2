"""The simulation has teeth: bugs that are planted are caught. A sample here, all of them in torture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.survivors import SURVIVORS
from tests.sim.teeth import BY_HAND, MECHANICAL, TABLE, Mutation, Plant, by_rule, cell, hunt, known, known_seeds

ROOT = Path(__file__).resolve().parents[2]
# Seeds that are tried in CI, besides the one that caught the plant last.
SAMPLE_SEEDS = 40
SAMPLE = {
    "no fence check: manifests are written whatever stands there",
    "acknowledged before the commit",
    "turn_ids are looked up outside the transaction",
    "what a merge replaced is deleted before the epoch is checked",
    "a cold read is served as HOT",
    "an ambiguous write counts as committed",
    "`expected` is not looked at",
}


def name_of(plant: Plant | Mutation) -> str:
    return plant.name


def caught(plant: Plant | Mutation, seeds: int) -> bool:
    first = known_seeds().get(plant.name)
    return hunt(plant, iter([*([first] if first is not None else []), *range(seeds)])).seed is not None


@pytest.mark.parametrize("plant", [plant for plant in BY_HAND if plant.name in SAMPLE], ids=name_of)
def test_a_planted_bug_is_caught(plant: Plant) -> None:
    assert caught(plant, SAMPLE_SEEDS)


@pytest.mark.torture
@pytest.mark.parametrize("plant", [*BY_HAND, *by_rule()], ids=name_of)
def test_every_planted_bug_is_caught_or_explained(plant: Plant | Mutation) -> None:
    if plant.name in SURVIVORS:
        pytest.skip(SURVIVORS[plant.name])
    # A process of its own, for the tests that catch what no seed does run in it.
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim.teeth", "--only", plant.name, "--seeds", "120", "--jobs", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_says_of_every_planted_bug_what_catches_it_or_why_nothing_does() -> None:
    found = known()
    assert list(found) == [plant.name for plant in [*BY_HAND, *by_rule()]], "run python -m tests.sim.teeth --again"
    assert {name for name, verdict in found.items() if not verdict.is_caught} == set(SURVIVORS)
    told = TABLE.read_text()
    assert all(f"| {cell(name)} |" in told for name in found)


def test_every_place_to_plant_a_bug_is_still_there() -> None:
    for plant in BY_HAND:
        with plant.planted():
            pass
    assert len(by_rule()) == MECHANICAL
