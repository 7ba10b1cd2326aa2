"""What the demonstration says while it runs: steps, details, progress. rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Screen:
    """Standard output, as a terminal or as a file."""

    def __init__(self) -> None:
        self._steps = 0
        self._console: Any = None
        if sys.stdout.isatty():
            from rich.console import Console

            self._console = Console(highlight=False)

    def title(self, text: str) -> None:
        """The first line."""
        self._print(text, "bold")

    def step(self, text: str) -> None:
        """What happens next."""
        self._steps += 1
        self._print(f"\n{self._steps:2}  {text}", "bold")

    def note(self, text: str) -> None:
        """Something that was seen or measured."""
        self._print(f"    {text}")

    def promise(self, text: str, kept: bool, detail: str) -> None:
        """A promise, kept or not."""
        word = "kept" if kept else "NOT KEPT"
        self._print(f"    {word}: {text}{f' ({detail})' if detail else ''}", "green" if kept else "bold red")

    def line(self, text: str = "") -> None:
        """A line as it is."""
        self._print(text)

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[Callable[[int], object]]:
        """A bar while the block runs, moved on by calling what is handed over; in a file nothing."""
        if self._console is None:
            yield lambda _: None
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = [TextColumn("    {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        with Progress(*columns, console=self._console, transient=True) as shown:
            task = shown.add_task(text, total=total)
            yield lambda count: shown.advance(task, count)

    def _print(self, text: str, style: str | None = None) -> None:
        if self._console is None:
            print(text, flush=True)
        else:
            self._console.print(text, style=style, markup=False, soft_wrap=True)
