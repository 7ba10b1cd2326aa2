"""The conversations that are shown: the project's own sample set, or the files that were named. It changes neither."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import sessiond
from sessiond.cli.lines import Conversation, Source, session_id_of
from sessiond.demo import season

KEPT: Final = Path(sessiond.__file__).parent / "data" / "conversations.jsonl"
# A conversation shorter than this shows nothing of growth: all of them, one after the other, do.
GROWING_TURNS_MIN: Final = 300


@dataclass(frozen=True, slots=True)
class Expected:
    """One conversation as it must come back. place: FILE:LINE."""

    session_id: str
    place: str
    count: int
    digest: bytes


def lines() -> Iterator[str]:
    """The sample set, one conversation a line: those kept in the package, then the long one."""
    yield from KEPT.read_text(encoding="utf-8").splitlines()
    yield json.dumps(season.conversation(), ensure_ascii=False)


def digest(messages: Sequence[Any]) -> bytes:
    """The same for equal messages in the same order."""
    text = json.dumps(messages, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def expected(paths: Iterable[str]) -> list[Expected]:
    """What files hold, malformed lines left out; of lines with the same id the longest, which continues the others.

    Raises Invalid INVALID_INPUT_FILE if a file can't be read.
    """
    wanted: dict[str, Expected] = {}
    for found in _read(paths):
        session_id, count = session_id_of("", found.key), len(found.messages)
        if count and (session_id not in wanted or count >= wanted[session_id].count):
            wanted[session_id] = Expected(session_id, found.place, count, digest(found.messages))
    return list(wanted.values())


def growing(paths: Iterable[str], places: Container[str], turns_max: int) -> list[dict[str, Any]]:
    """The messages of a conversation that grows: the longest one; if that is short, all of them one after the other.

    places: the lines to take, as FILE:LINE.
    """
    longest: list[Any] = []
    chain: list[Any] = []
    for found in _read(paths):
        if found.place not in places:
            continue
        longest = max(longest, found.messages, key=len)
        chain += found.messages[: turns_max - len(chain)]
    return longest[:turns_max] if len(longest) >= min(GROWING_TURNS_MIN, turns_max) else chain


def _read(paths: Iterable[str]) -> Iterator[Conversation]:
    for path in paths:
        source = Source(path)
        try:
            yield from (found for found in source if isinstance(found, Conversation))
        finally:
            source.close()
