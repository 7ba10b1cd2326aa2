"""RESULTS.md from a run's figures: `python -m bench.report FIGURES.json FOLDER` writes it there, and RESULTS.json.

It adds nothing to the figures and leaves nothing out: promises that no figure came for, sides that could not be run and
cases that failed stand there too. It judges a figure by its median and says where the spread includes the limit.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.promises import PROMISES, Promise

Figure = dict[str, Any]
PLOTS = {
    "latency": "A context of 4,000 tokens against the session's length, p50",
    "workers": "Hot resumes a second against workers",
    "rungs": "From the call to the context, by rung of the ladder, p50",
    "soak": "Mixed load over time",
}


def amount(value: float | None, unit: str) -> str:
    """A figure with its unit; seconds in the unit that fits, "x" for a ratio."""
    if value is None:
        return "-"
    if unit == "x":
        return f"{value:,.0f}x" if abs(value) >= 100 else f"{value:.2f}x"
    if unit != "s":
        return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}") + (f" {unit}" if unit else "")
    if abs(value) < 0.01:
        return f"{value * 1e6:,.0f} us"
    return f"{value * 1e3:,.1f} ms" if abs(value) < 1 else f"{value:,.2f} s"


def judged(figure: Figure, promise: Promise) -> tuple[float, float, float, str]:
    """(median, low, high, unit) of what the promise is about: the ratio, or a figure that stands alone."""
    if figure["theirs"] is None:
        return figure["ours"], figure["low"], figure["high"], figure["unit"]
    return figure["ratio"], figure["low"], figure["high"], "x"


def verdict(figure: Figure, promise: Promise) -> str:
    """Whether the promise is reached, as far as the spread lets one say."""
    if not promise.sense:
        return "reported"
    middle, low, high, _ = judged(figure, promise)
    reached = promise.is_reached(middle)
    doubtful = promise.is_reached(low) != promise.is_reached(high)
    return ("reached" if reached else "**not reached**") + (", within the spread" if doubtful else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def promised(figures: list[Figure], promises: dict[str, Promise]) -> list[str]:
    """The table of promises; one line for each figure that is about one."""
    rows = []
    for key, promise in promises.items():
        about = [figure for figure in figures if figure["promise"] == key]
        for figure in about:
            middle, low, high, unit = judged(figure, promise)
            rows.append(
                (
                    promise.what,
                    figure["against"] or promise.against or "-",
                    f"{figure['case']}: {figure['measure']}",
                    promise.asked(),
                    amount(middle, unit),
                    f"{amount(low, unit)} - {amount(high, unit)}",
                    verdict(figure, promise),
                )
            )
        if not about:
            rows.append((promise.what, promise.against or "-", "-", promise.asked(), "-", "-", "not measured here"))
    return table(("what", "against", "case", "to reach", "measured", "spread", "verdict"), rows)


def everything(figures: list[Figure]) -> list[str]:
    """Every figure of the run."""
    rows = []
    for figure in figures:
        unit = "x" if figure["theirs"] is not None else figure["unit"]
        ratio = amount(figure["ratio"], "x") + (" as fast" if figure["faster"] else "")
        rows.append(
            (
                figure["case"],
                figure["measure"],
                amount(figure["ours"], figure["unit"]),
                amount(figure["theirs"], figure["unit"]),
                ratio if figure["theirs"] is not None else "-",
                f"{amount(figure['low'], unit)} - {amount(figure['high'], unit)}",
                str(figure["rounds"]),
                figure["against"] or "-",
            )
        )
    return table(("case", "measure", "ours", "other side", "ratio", "spread", "rounds", "other side is"), rows)


def beaten(figures: list[Figure]) -> list[str]:
    """Peers that were faster than we are."""
    found = [figure for figure in figures if figure["faster"] and figure["ratio"] < 1]
    if not found:
        return ["None in this run."]
    return [
        f"- {figure['against']}: {amount(figure['theirs'], figure['unit'])} against our "
        f"{amount(figure['ours'], figure['unit'])}, {1 / figure['ratio']:.1f} times as fast ({figure['case']})"
        for figure in found
    ]


def load(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def report(content: dict[str, Any], plots: set[str]) -> str:
    """RESULTS.md."""
    machine, figures = content["machine"], content["ratios"]
    lines = [
        "# What a run of the benchmarks measured",
        "",
        "Written by `make bench`; never edited by hand. How each case is made, and how to read the noise, is in",
        "[README.md](README.md); the same figures with every round's value are in [RESULTS.json](RESULTS.json).",
        "",
        f"{content['when']}, commit {content['commit'] or 'unknown'}, "
        f"{'compiled core' if content['compiled'] else '**pure twin of the core**'}. {machine['cpu']}, "
        f"{machine['cores']} cores, kernel {machine['kernel']}, CPython {machine['python']}. Load average "
        f"(1, 5, 15 minutes) {load(machine['load_average_before'])} before, {load(machine['load_average'])} at the "
        "end, the benchmarks themselves included.",
        "",
        f"{content['passed']} cases passed, {len(content['failed'])} failed, {len(content['left_out'])} sides or cases "
        "were not run.",
        "",
    ]
    if content["quick"]:
        lines += ["**A quick run: it shows that the cases work, and its figures mean nothing.**", ""]
    lines += [
        "A ratio is ours by theirs, or, for peers, theirs by ours: how many times as fast we are. It is the median",
        "over the rounds of each round's ratio; the spread is the quartiles over the rounds.",
        "",
        '## DESIGN.md, "What it must reach"',
        "",
        *promised(figures, {key: promise for key, promise in PROMISES.items() if promise.design}),
        "",
        "## Asked beside the table",
        "",
        *promised(figures, {key: promise for key, promise in PROMISES.items() if not promise.design}),
        "",
        "## Peers that are faster",
        "",
        *beaten(figures),
        "",
    ]
    if content["failed"]:
        lines += ["## Failed", "", *(f"- {text.splitlines()[0]}" for text in content["failed"]), ""]
    if content["left_out"]:
        lines += ["## Not run", "", *(f"- {row['case']}: {row['why']}" for row in content["left_out"]), ""]
    for name, title in PLOTS.items():
        if name in plots:
            lines += [f"## {title}", "", f"![{title}](plots/{name}.svg)", ""]
    lines += ["## Every figure", "", *everything(figures), "", "## Notes", ""]
    lines += [f"- **{note['case']}**: {note['text']}" for note in content["notes"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Write the report."""
    if len(arguments) != 2:
        print("usage: python -m bench.report FIGURES.json FOLDER", file=sys.stderr)
        return 2
    source, folder = Path(arguments[0]), Path(arguments[1])
    content = json.loads(source.read_text())
    drawn = {point["plot"] for point in content["points"]} & {path.stem for path in (folder / "plots").glob("*.svg")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "RESULTS.md").write_text(report(content, drawn))
    shutil.copyfile(source, folder / "RESULTS.json")
    print(folder / "RESULTS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
