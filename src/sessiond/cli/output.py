"""What commands print: JSON for programs, tables for people. rich is loaded only where a terminal shows a table."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

LAST_COLUMN_MIN: Final = 20
TERMINAL_EVERY_S: Final = 0.5
LINES_EVERY_S: Final = 5.0


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, ensure_ascii=False, indent=2))


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it: the proto's field names, numbers as numbers, enums by name, bytes as hexadecimal.

    Fields that are not set and empty bytes are left out; numbers, texts and flags outside a oneof have their zero.
    """
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            values[field.name] = dict(sorted(value.items()))
        elif field.is_repeated:
            values[field.name] = [_scalar(field, item) for item in value]
        elif message.HasField(field.name) if field.has_presence else value != b"":
            values[field.name] = _scalar(field, value)
    return values


def _scalar(field: Any, value: Any) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return plain(value)
    if field.type == FieldDescriptor.TYPE_ENUM:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known else value
    if field.type == FieldDescriptor.TYPE_BYTES:
        return value.decode(errors="replace") if field.name.endswith("_json") else value.hex()
    return value


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = (), title: str = "") -> None:
    """A table on standard output; on a narrow terminal its last column gives way. right: columns of numbers."""
    cells = [[printable(str(cell)) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich_table(columns, cells, right, title)
    else:
        _plain_table(columns, cells, right, title)


def _rich_table(columns: Sequence[str], cells: list[list[str]], right: Sequence[str], title: str) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        drawn.add_column(column, justify="right" if column in right else "left", no_wrap=True)
    # Two cells of padding and one of rule a column.
    widths = [max(cell_len(cell) for cell in column) + 3 for column in zip(columns, *cells, strict=True)]
    left = max(Console().width - sum(widths[:-1]) - 3, LAST_COLUMN_MIN)
    for row in cells:
        last = Text(row[-1])
        last.truncate(left, overflow="ellipsis")
        drawn.add_row(*(Text(cell) for cell in row[:-1]), last)
    # Ids and numbers are never cut: rather let the terminal wrap.
    Console(highlight=False, width=max(Console().width, sum(widths[:-1]) + left + 3)).print(drawn)


def _plain_table(columns: Sequence[str], cells: list[list[str]], right: Sequence[str], title: str) -> None:
    if title:
        print(title)
    widths = [max([len(column), *(len(row[at]) for row in cells)]) for at, column in enumerate(columns)]
    for row in [list(columns), *cells]:
        padded = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ]
        print("  ".join(padded).rstrip())


def facts(rows: Iterable[tuple[str, object]]) -> None:
    """Names and values, one a line, values aligned."""
    shown = [(name, printable(str(value))) for name, value in rows]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        print(f"{name.ljust(width)}  {value}".rstrip())


def printable(text: str) -> str:
    """The text in one line, without characters that would move the cursor or colour the terminal."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") else c for c in text)


def start_of(text: str, characters_max: int = 60) -> str:
    """The text's start in one line, with an ellipsis if there is more."""
    flat = " ".join(printable(text).split())
    return flat if len(flat) <= characters_max else flat[: characters_max - 1] + "…"


def time_text(unix_ms: int) -> str:
    """A time as people read it, UTC; '-' for none."""
    if not unix_ms:
        return "-"
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return f"{unix_ms} ms"


def bytes_text(count: int) -> str:
    """A size as people read it."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def yes_no(value: object) -> object:
    """A flag as people read it; anything else as it is."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else value


def enum_text(names: Any, value: int, prefix: str) -> str:
    """An enum's value without its prefix, in lower case. names: the enum's type."""
    try:
        return str(names.Name(value)).removeprefix(prefix).lower()
    except ValueError:
        return str(value)


class Progress:
    """How far a long command has come, on standard error: one moving line on a terminal, nothing elsewhere.

    lines: a line every few seconds elsewhere as well.
    """

    def __init__(self, lines: bool = False) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._lines = lines
        self._shown_at = 0.0
        self._width = 0

    def __call__(self, line: str) -> None:
        """Show where things stand, unless the last one was shown just now."""
        every_s = TERMINAL_EVERY_S if self._on_terminal else LINES_EVERY_S
        if not (self._on_terminal or self._lines) or time.monotonic() - self._shown_at < every_s:
            return
        self._shown_at = time.monotonic()
        text = printable(line)
        if self._on_terminal:
            print(f"\r{text.ljust(self._width)}", end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def done(self) -> None:
        """End the moving line."""
        if self._width:
            print(file=sys.stderr, flush=True)
            self._width = 0
