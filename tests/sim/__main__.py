"""Replays one seed with a readable trace, or runs as many as time allows. See README.md."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from tests.sim.world import Result, run_seed

# Seeds that CI runs; torture begins behind them.
CI_SEEDS = 2000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="replay this seed and print what happens")
    parser.add_argument("--nodes", type=int, default=None, help="as many nodes instead of what the seed says")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "COUNT"), help="run these and count")
    parser.add_argument("--torture", action="store_true", help="run seeds until the time is up or one fails")
    parser.add_argument("--state", type=Path, help="where torture notes how far it came, to go on there")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long torture runs")
    parser.add_argument("--quiet", action="store_true", help="only what it came to")
    arguments = parser.parse_args()
    if arguments.seed is not None:
        result = run_seed(arguments.seed, arguments.nodes, None if arguments.quiet else print)
        report(result)
        return bool(result.violations)
    if arguments.torture:
        return torture(arguments.state, arguments.minutes, arguments.nodes)
    if arguments.seeds is None:
        parser.error("one of --seed, --seeds and --torture is needed")
    first, count = arguments.seeds
    began_s, bad, acks, steals = time.process_time(), 0, 0, 0
    for seed in range(first, first + count):
        result = run_seed(seed, arguments.nodes)
        acks, steals = acks + result.acks, steals + result.steals
        if result.violations:
            bad += 1
            report(result)
    print(
        f"{count} seeds, {bad} with violations, {(time.process_time() - began_s) / count:.3f} s of a core each;"
        f" {acks} appends acknowledged, {steals} sessions taken from an owner"
    )
    return bool(bad)


def torture(state: Path | None, minutes: float, nodes: int | None) -> int:
    """Go on where the last run stopped, until the time is up. 1 once a seed fails; the others go on."""
    known = json.loads(state.read_text()) if state is not None and state.exists() else {}
    seed, total, failed = int(known.get("next", CI_SEEDS)), int(known.get("total", 0)), list(known.get("failed", []))
    began_s, told_s, first = time.monotonic(), time.monotonic(), seed

    def note() -> None:
        if state is not None:
            beside = state.with_suffix(".new")
            beside.write_text(json.dumps({"next": seed, "total": total, "failed": failed}))
            os.replace(beside, state)

    bad = 0
    while time.monotonic() - began_s < minutes * 60:
        result = run_seed(seed, nodes)
        seed, total = seed + 1, total + 1
        if result.violations:
            bad += 1
            failed.append(result.seed)
            report(result)
        if time.monotonic() - told_s > 30 or result.violations:
            told_s = time.monotonic()
            note()
            print(f"{total} seeds, {seed - first} of them now, {len(failed)} failed", flush=True)
    note()
    print(
        f"{total} seeds, {seed - first} of them now from seed {first} on, {bad} with violations now, failed: {failed}"
    )
    return bool(bad)


def report(result: Result) -> None:
    print(
        f"seed {result.seed}: digest {result.digest}, {result.events} events, {result.virtual_s:.1f} s,"
        f" {result.acks} acks, {result.confirmed} confirmed, {result.steals} steals, {len(result.faults)} faults"
    )
    for invariant, what in result.violations:
        print(f"  {invariant}: {what}")
    if result.violations:
        print(f"  replay: {result.command}")


if __name__ == "__main__":
    sys.exit(main())
