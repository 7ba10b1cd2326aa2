"""Every invariant holds in every world: half of the seeds, the other half is in a file of its own."""

from __future__ import annotations

import pytest

from tests.sim.chunks import chunks, hold, name_of


@pytest.mark.parametrize("chunk", chunks(0, 2), ids=name_of)
def test_every_invariant_holds_in_every_world(chunk: range) -> None:
    hold(chunk)
