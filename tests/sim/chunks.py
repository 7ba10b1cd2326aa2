"""How the seeds that CI runs are split among tests."""

from __future__ import annotations

from tests.sim.world import run_seed

SEEDS = 2000
CHUNK = 100


def chunks(part: int, parts: int) -> list[range]:
    """The chunks of one of several files: pytest-xdist keeps a file on one worker."""
    firsts = range(0, SEEDS, CHUNK)
    return [range(first, first + CHUNK) for index, first in enumerate(firsts) if index % parts == part]


def name_of(chunk: range) -> str:
    return f"seeds {chunk[0]} to {chunk[-1]}"


def hold(chunk: range) -> None:
    """Run these seeds; the assertion names what broke, and the command that replays it."""
    acks = 0
    for seed in chunk:
        result = run_seed(seed)
        acks += result.acks
        told = "\n".join(f"  {invariant}: {what}" for invariant, what in result.violations)
        assert not result.violations, f"seed {seed} breaks\n{told}\nreplay it: {result.command}"
    assert acks > len(chunk), "hardly anything was acknowledged, so hardly anything was tested"
