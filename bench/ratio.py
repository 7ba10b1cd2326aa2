"""Ratios: two sides measured in one run, in rounds that take turns, and the table at the end.

It promises that both sides of a round stand within milliseconds to seconds of each other, that a ratio is the median
over the rounds of that round's ratio, and that its spread is printed beside it. It never judges a figure.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Ratio:
    """One figure of one case."""

    case: str
    measure: str
    against: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int
    # What DESIGN.md, "What it must reach", asks of this ratio; empty where it asks nothing.
    reach: str = ""


@dataclass(slots=True)
class Ledger:
    """Every figure of a run."""

    quick: bool
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)

    def add(
        self,
        case: str,
        measure: str,
        against: str,
        unit: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        reach: str = "",
    ) -> Ratio:
        """A figure from one value per round and side; printed at once."""
        each = sorted(one / other for one, other in zip(ours, theirs, strict=True))
        low, high = quartiles(each)
        made = Ratio(
            case,
            measure,
            against,
            unit,
            statistics.median(ours),
            statistics.median(theirs),
            statistics.median(each),
            low,
            high,
            len(each),
            reach,
        )
        self.ratios.append(made)
        print(f"\n{case}: {line(made)}", end="", flush=True)
        return made

    def note(self, case: str, text: str) -> None:
        """A figure that is no ratio."""
        self.notes.append((case, text))
        print(f"\n{case}: {text}", end="", flush=True)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
            "quick": self.quick,
            "ratios": [asdict(ratio) for ratio in self.ratios],
            "notes": [{"case": case, "text": text} for case, text in self.notes],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    def table(self) -> list[str]:
        """The lines of the table."""
        rows = [("case", "measure", "ours", "other side", "ratio", "quartiles", "rounds", "to reach", "against")]
        rows += [
            (
                ratio.case,
                ratio.measure,
                shown(ratio.ours, ratio.unit),
                shown(ratio.theirs, ratio.unit),
                f"{ratio.ratio:.2f}x",
                f"{ratio.low:.2f} - {ratio.high:.2f}",
                str(ratio.rounds),
                ratio.reach or "-",
                ratio.against,
            )
            for ratio in self.ratios
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile, as measured: no value between two rounds is made up."""
    return ordered[(len(ordered) - 1) // 4], ordered[-1 - (len(ordered) - 1) // 4]


def shown(value: float, unit: str) -> str:
    """A figure with its unit. Seconds are shown in the unit that fits."""
    if unit != "s":
        return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.2f} {unit}"
    if value < 0.01:
        return f"{value * 1e6:,.0f} us"
    return f"{value * 1e3:,.1f} ms" if value < 1 else f"{value:.2f} s"


def line(ratio: Ratio) -> str:
    """A figure in one line."""
    reach = f"; to reach: {ratio.reach}" if ratio.reach else ""
    return (
        f"{ratio.measure} {shown(ratio.ours, ratio.unit)} against {shown(ratio.theirs, ratio.unit)} "
        f"({ratio.against}): {ratio.ratio:.2f}x, quartiles {ratio.low:.2f} - {ratio.high:.2f} "
        f"of {ratio.rounds} rounds{reach}"
    )


def machine() -> dict[str, Any]:
    """What it ran on."""
    model = platform.machine()
    for text in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if text.startswith("model name"):
            model = text.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest measured value that so large a share does not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


def by_calls(
    benchmark: Any, ours: Callable[[], object], theirs: Callable[[], object], rounds: int, calls: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of each call, sorted, by round, of either side: a block of calls of ours, a block of theirs, and so on.

    pytest-benchmark times our side, per call; the other side runs in its teardown, which it does after every round.
    """
    mine: list[list[float]] = []
    other: list[list[float]] = []
    block: list[float] = []

    def call() -> None:
        started = time.perf_counter()
        ours()
        block.append(time.perf_counter() - started)

    def turn_over() -> None:
        nonlocal block
        facing: list[float] = []
        for _ in range(len(block)):
            started = time.perf_counter()
            theirs()
            facing.append(time.perf_counter() - started)
        if len(block) == calls:
            mine.append(sorted(block))
            other.append(sorted(facing))
        block = []

    with paused_gc():
        benchmark.pedantic(call, teardown=turn_over, rounds=rounds, warmup_rounds=1, iterations=calls)
    return mine[1 : rounds + 1], other[1 : rounds + 1]


def by_blocks(
    benchmark: Any, ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, warmup_rounds: int = 1
) -> tuple[list[Any], list[Any]]:
    """What either side returned, by round; for sides that measure themselves."""
    mine: list[Any] = []
    other: list[Any] = []
    benchmark.pedantic(
        lambda: mine.append(ours()),
        teardown=lambda: other.append(theirs()),
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        iterations=1,
    )
    return mine[warmup_rounds:], other[warmup_rounds:]


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """No garbage collection of this process inside."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
