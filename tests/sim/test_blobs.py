"""Blobs in simulated worlds: no write is lost, doubled or read out of order, whatever befalls the nodes."""

from __future__ import annotations

import pytest

from tests.sim.blobs import run_seed

SEEDS_PER_TEST = 12


@pytest.mark.parametrize("first", [0, 12, 24, 36])
def test_blobs_keep_their_promises_in_every_world(first: int) -> None:
    broken: list[str] = []
    for seed in range(first, first + SEEDS_PER_TEST):
        # What else may be found in these worlds is for the seeds of tests/sim that are about it.
        found = [f"{invariant} {what}" for invariant, what in run_seed(seed).violations if "blob" in what]
        if found:
            broken += [*found, f"replay it: python -m tests.sim.blobs --seed {seed}"]
    assert not broken, "\n".join(broken)
