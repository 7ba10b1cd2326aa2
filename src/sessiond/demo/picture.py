"""The figures as one SVG of two panels, drawn by hand: tokens per call as a conversation grows, latency per rung.

It needs nothing but the numbers: no plotting library, no font file, no script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape

from sessiond.demo.figures import UNDER_LOAD, Figures, Growth, Latency

WIDTH: Final = 1280
HEIGHT: Final = 650
# Panels as (left, top, right, bottom) of their plotting areas.
TOKENS: Final = (104.0, 158.0, 620.0, 530.0)
TIMES: Final = (900.0, 158.0, 1244.0, 530.0)
INK: Final = "#1c2733"
SOFT: Final = "#5b6875"
GRID: Final = "#e3e8ed"
SAVED: Final = "#dcebf7"
BLUE: Final = "#0b5cad"
# What is said inside the shaded area.
LABEL_WIDTH: Final = 240.0
LABEL_HEIGHT: Final = 64.0
# A curve with more points than this looks the same.
POINTS_MAX: Final = 1000
FONT: Final = "system-ui, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"

_ROWS: Final = {
    "HOT": "rows on the node's disk",
    "CLOUD": "cloud tier, disk empty",
    "PARTIAL": "disk lost before a flush",
}


def draw(figures: Figures) -> str:
    """The whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' role="img" aria-labelledby="t d" font-family="{FONT}" font-size="14" fill="{INK}">',
        f'<title id="t">{escape(_finding(figures))}</title>',
        f'<desc id="d">{escape(_second_line(figures))}</desc>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(24, 44, _finding(figures), size=23, weight=600),
        _text(24, 74, _second_line(figures), size=16, fill=SOFT),
        '<g id="tokens">', *_tokens(figures.growth), "</g>",
        '<g id="latency">', *_latency(figures), "</g>",
        *(_text(24, HEIGHT - 34 + 19 * row, line, size=12, fill=SOFT) for row, line in enumerate(_footnotes(figures))),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def ms_text(value: float) -> str:
    """A time with three digits: 0.87 ms, 12.4 ms, 1.28 s."""
    if value >= 1000:
        return f"{value / 1000:.2f} s" if value < 10_000 else f"{value / 1000:.1f} s"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def _finding(figures: Figures) -> str:
    growth = figures.growth
    return (
        f"{growth.turns:,} turns in a budget of {growth.budget_tokens:,} tokens a call:"
        f" {_percent(growth.share)} of the input tokens of the full transcript"
    )


def _second_line(figures: Figures) -> str:
    killed, rungs = figures.restarts.get(UNDER_LOAD, Latency()), figures.rungs
    return (
        f"After kill -9 it serves again in {ms_text(killed.p50_ms)}; then a session's context takes"
        f" {ms_text(rungs['HOT'].p50_ms)} from the node's disk, {ms_text(rungs['CLOUD'].p50_ms)} from the cloud tier"
        " (medians)"
    )


def _footnotes(figures: Figures) -> Iterator[str]:
    facts = figures.facts
    machine = facts.get("machine", {})
    yield (
        f"sessiond {facts.get('sessiond', '')}, {machine.get('cores', '?')} cores, CPython"
        f" {machine.get('python', '?')}, the cloud tier a folder, {facts.get('started_at', '')[:10]}. Left: o200k_base"
        " tokens as the replies count them; no summaries, so older turns leave the window."
    )
    yield (
        "Right: a new connection, ResumeSession and its reply parsed by the Python client, each session once after the"
        " restart. The first context counts from the start of the process."
    )


# Panel (a) -----------------------------------------------------------------------------------------------------------


def _tokens(growth: Growth) -> Iterator[str]:
    left, top, right, bottom = TOKENS
    points = _thinned(growth.points)
    x_max = max(1, growth.turns)
    y_top = max([1, *(max(context, transcript) for _, context, transcript in points)])
    y_ticks = _linear_ticks(y_top)
    y_max = y_ticks[-1]

    def x(value: float) -> float:
        return left + (right - left) * value / x_max

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / y_max

    yield _text(
        left - 80, top - 40, "(a) Input tokens per call of the model, as the conversation grows", size=16, weight=600
    )
    for tick in y_ticks:
        yield _line(left, y(tick), right, y(tick), GRID)
        yield _text(left - 10, y(tick) + 5, f"{tick:,}", anchor="end", fill=SOFT)
    for tick in _linear_ticks(x_max, inside=True):
        yield _line(x(tick), bottom, x(tick), bottom + 6, SOFT)
        yield _text(x(tick), bottom + 23, f"{tick:,}", anchor="middle", fill=SOFT)
    full = [(x(turns), y(transcript)) for turns, _, transcript in points]
    context = [(x(turns), y(tokens)) for turns, tokens, _ in points]
    yield f'<path d="{_path([*full, *reversed(context)])}Z" fill="{SAVED}"/>'
    covered = [*context, (context[-1][0], bottom), (context[0][0], bottom)]
    yield f'<path d="{_path(covered)}Z" fill="{BLUE}" opacity="0.35"/>'
    yield f'<path d="{_path(full)}" fill="none" stroke="{INK}" stroke-width="2"/>'
    yield f'<path d="{_path(context)}" fill="none" stroke="{BLUE}" stroke-width="2"/>'
    yield _line(left, bottom, right, bottom, SOFT)
    yield _text((left + right) / 2, bottom + 46, "turns so far", anchor="middle")
    yield _text(0, 0, "tokens of one call", anchor="middle", turned=(left - 84, (top + bottom) / 2))

    _, last_context, last_full = growth.points[-1]
    # Above the line's lower half there is room, whatever the numbers are: a transcript only grows.
    yield _text(left + 18, top + 26, f"full transcript: {last_full:,} at the last call", weight=600)
    yield _text(left + 18, top + 48, f"{growth.transcript_tokens:,} over {len(growth.points):,} calls", fill=SOFT)
    yield _text(left + 18, top + 84, f"resumed context: {last_context:,} at the last call", weight=600, fill=BLUE)
    yield _text(
        left + 18, top + 106, f"{growth.context_tokens:,} over all calls; budget {growth.budget_tokens:,}", fill=SOFT
    )
    saved = growth.transcript_tokens - growth.context_tokens
    # In the shaded area, as far to the right as it goes, if there is room between the curves.
    start = right - LABEL_WIDTH
    above = next((at for over, at in full if over >= start), bottom)
    below = min((at for over, at in context if over >= start), default=bottom)
    if below - above > LABEL_HEIGHT:
        middle = (start + right) / 2, (above + below) / 2
        yield _text(*middle, f"{_short_count(saved)} tokens not sent", anchor="middle", weight=600)
        yield _text(middle[0], middle[1] + 20, f"{_percent(1 - growth.share)} of the whole", anchor="middle", fill=SOFT)


def _thinned(points: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    step = max(1, math.ceil(len(points) / POINTS_MAX))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


# Panel (b) -----------------------------------------------------------------------------------------------------------


def _latency(figures: Figures) -> Iterator[str]:
    left, top, right, bottom = TIMES
    rows = [(name, _ROWS.get(name, ""), latency) for name, latency in figures.rungs.items() if latency.samples_ms]
    rungs = len(rows)
    if UNDER_LOAD in figures.restarts:
        rows.append(("restart to serving", UNDER_LOAD, figures.restarts[UNDER_LOAD]))
    rows += [("restart to first context", found, latency) for found, latency in figures.first_contexts.items()]
    low = min((latency.p50_ms for _, _, latency in rows), default=1.0)
    high = max((latency.high_ms for _, _, latency in rows), default=1.0)
    first, last = math.floor(math.log10(low * 0.95)), math.ceil(math.log10(high * 1.05))

    def x(value: float) -> float:
        return left + (right - left) * (math.log10(value) - first) / (last - first)

    yield _text(left - 236, top - 40, "(b) Recovery latency: reconnect to context, and restarts", size=16, weight=600)
    for power in range(first, last + 1):
        yield _line(x(10.0**power), top, x(10.0**power), bottom, GRID)
        yield _text(x(10.0**power), bottom + 23, _power(power), anchor="middle", fill=SOFT)
        for digit in range(2, 10) if power < last else ():
            yield _line(x(digit * 10.0**power), bottom, x(digit * 10.0**power), bottom + 4, SOFT)
    yield _line(left, bottom, right, bottom, SOFT)
    yield _text((left + right) / 2, bottom + 46, "milliseconds, logarithmic", anchor="middle")
    step = (bottom - top) / max(1, len(rows))
    yield _line(left - 236, top + step * rungs, right, top + step * rungs, SOFT)
    for index, (name, what, latency) in enumerate(rows):
        middle = top + step * (index + 0.5)
        yield _text(left - 16, middle - 3, name, anchor="end", weight=600)
        count = len(latency.samples_ms)
        often = "once" if count == 1 else f"{count} times"
        yield _text(left - 16, middle + 14, f"{what}; {often}", anchor="end", size=12, fill=SOFT)
        yield from _dots(x, latency, middle, right)
    yield from _legend(left, top - 10, any(not latency.has_p95 for _, _, latency in rows))


def _dots(x: Callable[[float], float], latency: Latency, middle: float, right: float) -> Iterator[str]:
    low, high = x(latency.p50_ms), x(latency.high_ms)
    yield _line(low, middle, high, middle, BLUE, 3)
    yield f'<circle cx="{high:.1f}" cy="{middle:.1f}" r="6" fill="#ffffff" stroke="{BLUE}" stroke-width="2.5"/>'
    yield f'<circle cx="{low:.1f}" cy="{middle:.1f}" r="6" fill="{BLUE}"/>'
    told = f"{_bare(latency.p50_ms)} / {_bare(latency.high_ms)}"
    if len(latency.samples_ms) == 1:
        told = _bare(latency.p50_ms)
    if high + 14 + 9 * len(told) < right:
        yield _text(high + 13, middle + 5, told)
    else:
        yield _text(low - 13, middle + 5, told, anchor="end")


def _legend(left: float, top: float, has_worst: bool) -> Iterator[str]:
    yield f'<circle cx="{left + 6:.1f}" cy="{top - 4:.1f}" r="5" fill="{BLUE}"/>'
    yield _text(left + 17, top, "p50", size=12, fill=SOFT)
    yield f'<circle cx="{left + 60:.1f}" cy="{top - 4:.1f}" r="5" fill="#ffffff" stroke="{BLUE}" stroke-width="2.5"/>'
    rare = " (the worst where there are fewer than 20)" if has_worst else ""
    yield _text(left + 71, top, f"p95{rare}", size=12, fill=SOFT)


# Shapes --------------------------------------------------------------------------------------------------------------


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 14,
    weight: int = 400,
    fill: str = INK,
    turned: tuple[float, float] | None = None,
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    if turned is not None:
        place = f'transform="translate({turned[0]:.1f} {turned[1]:.1f}) rotate(-90)"'
    return (
        f'<text {place} text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{fill}">'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: int = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


# Numbers -------------------------------------------------------------------------------------------------------------


def _linear_ticks(top: int, inside: bool = False) -> list[int]:
    """About five round numbers from 0 on; the last at or above the top, or at or below it where inside."""
    raw = max(1.0, top / 5)
    power = 10 ** math.floor(math.log10(raw))
    step = max(1, int(next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)))
    count = top // step if inside else math.ceil(top / step)
    return [step * number for number in range(count + 1)]


def _power(power: int) -> str:
    return f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"


def _bare(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _short_count(count: int) -> str:
    for limit, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:,}"
