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
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.promises import PROMISES
from sessiond import core


@dataclass(slots=True)
class Ratio:
    """One figure of one case. theirs, and what hangs on it, is None where there is no other side."""

    case: str
    measure: str
    against: str
    unit: str
    ours: float
    theirs: float | None
    # Median over the rounds, its quartiles, and each round's in the order of the rounds.
    ratio: float | None
    low: float
    high: float
    each: list[float]
    rounds: int
    # Theirs by ours instead of ours by theirs: how many times faster we are.
    faster: bool = False
    # A key of `promises.PROMISES`; empty where nothing is asked.
    promise: str = ""


@dataclass(slots=True)
class Point:
    """One point of a plot: the median over the rounds of one series at x, and its quartiles over the rounds."""

    plot: str
    series: str
    x: float | str
    y: float
    low: float
    high: float


@dataclass(slots=True)
class Ledger:
    """Every figure of a run."""

    quick: bool
    ratios: list[Ratio] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    # Sides and cases that could not be run here, with what is missing and how to get it.
    left_out: list[tuple[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    passed: int = 0
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)

    def add(
        self,
        case: str,
        measure: str,
        against: str,
        unit: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        promise: str = "",
        faster: bool = False,
    ) -> Ratio:
        """A figure from one value per round and side; printed at once."""
        assert not promise or promise in PROMISES, promise
        each = [other / one if faster else one / other for one, other in zip(ours, theirs, strict=True)]
        low, high = quartiles(sorted(each))
        return self._keep(
            Ratio(
                case,
                measure,
                against,
                unit,
                statistics.median(ours),
                statistics.median(theirs),
                statistics.median(each),
                low,
                high,
                each,
                len(each),
                faster,
                promise,
            )
        )

    def alone(self, case: str, measure: str, unit: str, values: Sequence[float], promise: str = "") -> Ratio:
        """A figure without another side, from one value per round; printed at once."""
        assert not promise or promise in PROMISES, promise
        low, high = quartiles(sorted(values))
        middle = statistics.median(values)
        return self._keep(
            Ratio(case, measure, "", unit, middle, None, None, low, high, list(values), len(values), promise=promise)
        )

    def _keep(self, made: Ratio) -> Ratio:
        self.ratios.append(made)
        print(f"\n{made.case}: {line(made)}", end="", flush=True)
        return made

    def point(self, plot: str, series: str, x: float | str, values: Sequence[float]) -> None:
        """A point of a plot, from one value per round."""
        low, high = quartiles(sorted(values))
        self.points.append(Point(plot, series, x, statistics.median(values), low, high))

    def note(self, case: str, text: str) -> None:
        """A figure that is no ratio."""
        self.notes.append((case, text))
        print(f"\n{case}: {text}", end="", flush=True)

    def leave_out(self, case: str, why: str) -> None:
        """A side that could not be run, in one line: what is missing, and how to get it."""
        self.left_out.append((case, why))
        print(f"\n{case}: not run: {why}", end="", flush=True)

    def save(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": commit(),
            "compiled": core.COMPILED,
            "machine": {**machine(), "load_average_before": self.load_before},
            "quick": self.quick,
            "passed": self.passed,
            "failed": self.failed,
            "ratios": [asdict(ratio) for ratio in self.ratios],
            "points": [asdict(point) for point in self.points],
            "notes": [{"case": case, "text": text} for case, text in self.notes],
            "left_out": [{"case": case, "why": why} for case, why in self.left_out],
        }
        # A run that is killed in the middle leaves the figures so far, whole.
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(path)

    def table(self) -> list[str]:
        """The lines of the table."""
        rows = [("case", "measure", "ours", "other side", "ratio", "quartiles", "rounds", "to reach", "against")]
        for ratio in self.ratios:
            scale = shown_as(ratio)
            rows.append(
                (
                    ratio.case,
                    ratio.measure,
                    shown(ratio.ours, ratio.unit),
                    shown(ratio.theirs, ratio.unit) if ratio.theirs is not None else "-",
                    f"{ratio.ratio:.2f}x" if ratio.ratio is not None else "-",
                    f"{scale(ratio.low)} - {scale(ratio.high)}",
                    str(ratio.rounds),
                    PROMISES[ratio.promise].asked() if ratio.promise else "-",
                    ratio.against,
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def shown_as(ratio: Ratio) -> Callable[[float], str]:
    """How the spread of a figure is written."""
    if ratio.theirs is None:
        return lambda value: shown(value, ratio.unit)
    return lambda value: f"{value:.2f}"


def quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile, as measured: no value between two rounds is made up."""
    return ordered[(len(ordered) - 1) // 4], ordered[-1 - (len(ordered) - 1) // 4]


def shown(value: float, unit: str) -> str:
    """A figure with its unit. Seconds are shown in the unit that fits."""
    if unit != "s":
        return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}") + (f" {unit}" if unit else "")
    if abs(value) < 0.01:
        return f"{value * 1e6:,.0f} us"
    return f"{value * 1e3:,.1f} ms" if abs(value) < 1 else f"{value:.2f} s"


def line(ratio: Ratio) -> str:
    """A figure in one line."""
    asked = f"; to reach: {PROMISES[ratio.promise].asked()}" if ratio.promise else ""
    if ratio.theirs is None:
        spread = f"quartiles {shown(ratio.low, ratio.unit)} - {shown(ratio.high, ratio.unit)}"
        return f"{ratio.measure} {shown(ratio.ours, ratio.unit)}, {spread} of {ratio.rounds} rounds{asked}"
    return (
        f"{ratio.measure} {shown(ratio.ours, ratio.unit)} against {shown(ratio.theirs, ratio.unit)} "
        f"({ratio.against}): {ratio.ratio:.2f}x{' as fast' if ratio.faster else ''}, quartiles {ratio.low:.2f} - "
        f"{ratio.high:.2f} of {ratio.rounds} rounds{asked}"
    )


def commit() -> str:
    """The source that ran: the commit's short id, with a + where files differ from it; empty outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, timeout=30)
        # What a run writes by itself is no difference.
        changed = [*git, "status", "--porcelain", "-uno", "--", ":/", ":!/bench/RESULTS*", ":!/bench/plots"]
        differs = subprocess.run(changed, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return name.stdout.strip() + ("+" if differs else "")


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
