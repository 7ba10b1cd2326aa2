"""SVG plots of a run's points: `python -m bench.plots FIGURES.json FOLDER` writes FOLDER/<plot>.svg.

The same figures give the same bytes: no date and no random ids are in them. It runs in the environment of the peers,
which has matplotlib, and imports nothing of the daemon. A plot that has no points in this run is removed, so that none
is left of another run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "sessiond",
        # Text stays text: small, and searchable.
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
    }
)

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

Point = dict[str, Any]
OURS = "#b2182b"
# Distinct also in grey, for they differ in marker as well.
OTHERS = ["#2166ac", "#4393c3", "#67a9cf", "#1b7837", "#5aae61", "#a6611a", "#c28c3c", "#762a83", "#9970ab", "#666666"]
MARKERS = "osv^D<>pXh"
METADATA = {"Date": None, "Creator": None}


def series_of(points: list[Point]) -> dict[str, list[Point]]:
    """Points by series, in the order in which series came."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point["series"], []).append(point)
    return found


def draw_lines(axes: Any, points: list[Point], scale: float) -> None:
    """Each series as a line with its quartiles as bars."""
    for place, (name, row) in enumerate(series_of(points).items()):
        ours = name.startswith("sessiond")
        row = sorted(row, key=lambda point: point["x"])
        y = [point["y"] * scale for point in row]
        errors = [
            [(point["y"] - point["low"]) * scale for point in row],
            [(point["high"] - point["y"]) * scale for point in row],
        ]
        axes.errorbar(
            [point["x"] for point in row],
            y,
            yerr=errors,
            label=name,
            color=OURS if ours else OTHERS[place % len(OTHERS)],
            marker=MARKERS[place % len(MARKERS)],
            linewidth=2 if ours else 1,
            markersize=4,
            capsize=2,
            zorder=3 if ours else 2,
        )


def plain(value: float, _: Any) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def latency(points: list[Point]) -> Any:
    """Latency against session length, both logarithmic."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8))
    draw_lines(axes, points, 1e6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = sorted({point["x"] for point in points})
    axes.set_xticks(sizes, [f"{size:,.0f}" for size in sizes])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("turns of the session")
    axes.set_ylabel("us to a context of 4,000 tokens, p50")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def workers(points: list[Point]) -> Any:
    """Throughput against workers, from zero."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    draw_lines(axes, points, 1.0)
    counts = sorted({point["x"] for point in points})
    axes.set_xticks(counts, [f"{count:.0f}" for count in counts])
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_xlabel("workers")
    axes.set_ylabel("hot resumes")
    axes.legend(loc="best", fontsize=8)
    return figure


def rungs(points: list[Point]) -> Any:
    """Latency by rung, logarithmic, HOT first. Dots: a bar would begin nowhere on such an axis."""
    points = sorted(points, key=lambda point: point["x"] != "HOT")[::-1]
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(points) + 1.0))
    x = [point["y"] * 1e3 for point in points]
    errors = [
        [(point["y"] - point["low"]) * 1e3 for point in points],
        [(point["high"] - point["y"]) * 1e3 for point in points],
    ]
    places = range(len(points))
    axes.errorbar(x, places, xerr=errors, fmt="o", color=OURS, capsize=3)
    for place, value in zip(places, x, strict=True):
        axes.annotate(f"{value:,.2f} ms", (value, place), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yticks(list(places), [point["x"] for point in points])
    axes.set_ylim(-0.6, len(points) - 0.3)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ms from the call to the context, p50")
    return figure


def soak(points: list[Point]) -> Any:
    """One panel a series, over minutes."""
    rows = series_of(points)
    figure, panels = plt.subplots(len(rows), 1, figsize=(8, 1.5 * len(rows) + 0.6), sharex=True, squeeze=False)
    for place, (name, row) in enumerate(rows.items()):
        axes = panels[place][0]
        axes.plot([point["x"] for point in row], [point["y"] for point in row], color=OURS, linewidth=1.2)
        axes.set_ylim(bottom=0)
        axes.set_title(name, loc="left", fontsize=8)
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
    panels[-1][0].set_xlabel("minutes")
    figure.subplots_adjust(hspace=0.55)
    return figure


DRAWN: dict[str, Callable[[list[Point]], Any]] = {"latency": latency, "workers": workers, "rungs": rungs, "soak": soak}


def main(arguments: list[str]) -> int:
    """Draw every plot that has points."""
    if len(arguments) != 2:
        print("usage: python -m bench.plots FIGURES.json FOLDER", file=sys.stderr)
        return 2
    points = json.loads(Path(arguments[0]).read_text())["points"]
    folder = Path(arguments[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWN.items():
        path = folder / f"{name}.svg"
        mine = [point for point in points if point["plot"] == name]
        if not mine:
            path.unlink(missing_ok=True)
            continue
        figure = draw(mine)
        figure.savefig(path, metadata=METADATA, bbox_inches="tight")
        plt.close(figure)
        # matplotlib leaves spaces at the ends of lines, which git calls errors.
        path.write_text("".join(f"{line.rstrip()}\n" for line in path.read_text().splitlines()))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
