"""The real conversations beside the project, as turns; made here by hand, independently of the client's converters."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.v1 import turn_pb2

PATH = Path(__file__).resolve().parents[2] / "shared" / "data" / "airline_conversations.jsonl.gz"
ROLES = {
    "system": turn_pb2.ROLE_SYSTEM,
    "user": turn_pb2.ROLE_USER,
    "assistant": turn_pb2.ROLE_ASSISTANT,
    "tool": turn_pb2.ROLE_TOOL,
}

needs_airline = pytest.mark.skipif(not PATH.exists(), reason=f"{PATH.name} is not beside the project")


def conversations() -> list[tuple[str, list[dict]]]:
    with gzip.open(PATH, "rt", encoding="utf-8") as lines:
        return [(line["id"], line["messages"]) for line in map(json.loads, lines)]


def to_turn(turn_id: str, message: dict) -> turn_pb2.TurnInput:
    turn = turn_pb2.TurnInput(turn_id=turn_id, role=ROLES[message["role"]])
    content = message.get("content")
    if message["role"] == "tool":
        result = turn.message.parts.add().tool_result
        result.call_id = message["tool_call_id"]
        if content:
            result.parts.add(text=content)
        return turn
    if content:
        turn.message.parts.add(text=content)
    for call in message.get("tool_calls") or ():
        turn.message.parts.add(
            tool_call=turn_pb2.ToolCall(
                call_id=call["id"], name=call["function"]["name"], arguments=call["function"]["arguments"]
            )
        )
    return turn


def chained(limit: int | None = None) -> Iterator[turn_pb2.TurnInput]:
    """All conversations as one log, in file order."""
    number = 0
    for _, messages in conversations():
        for message in messages:
            if limit is not None and number >= limit:
                return
            number += 1
            yield to_turn(f"m{number}", message)
