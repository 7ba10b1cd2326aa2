"""Conversations of the OpenAI chat format as they occur: parallel calls, results out of order, calls never answered,
and messages of every odd but valid shape.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Json = dict[str, Any]

ODD: list[Json] = [
    {"role": "system", "content": "Be brief."},
    {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
    {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "text", "text": "", "x": None}]},
    {
        "role": "user",
        "name": "ann",
        "content": [{"type": "image_url", "image_url": {"url": "https://e.org/a.png", "detail": "low"}}],
    },
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "?"},
        ],
    },
    {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]},
    {"role": "assistant", "content": None, "refusal": "I can't."},
    {"role": "assistant", "content": "né 🙂 \u0007 \t", "annotations": [], "extra": {"deep": [1, 1.5, True, None]}},
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}],
        "name": "bot",
    },
    {"role": "assistant", "content": "<|endoftext|> is text", "created_at": 1700000000},
    {"role": "user", "content": "late", "created_at": "2024-02-03T04:05:06+01:00"},
    {"content": "keys in another order", "role": "user", "metadata": {"z": 1, "a": 2}},
]


def call(*ids: str, content: Any = None, arguments: str = "{}") -> Json:
    calls = [{"id": one, "type": "function", "function": {"name": "look_up", "arguments": arguments}} for one in ids]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def result(call_id: str, content: Any = "done") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def large(size: int) -> Json:
    """A message of about so many bytes that costs nothing to count: an address is kept, not tokenized."""
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://e.org/" + "x" * size}}]}


def messages(dice: random.Random, exchanges: int) -> list[Json]:
    made: list[Json] = [{"role": "system", "content": "You help."}] if dice.random() < 0.7 else []
    for number in range(exchanges):
        made.append({"role": "user", "content": f"question {number} " + "word " * dice.randrange(30)})
        for _ in range(dice.randrange(3)):
            # Providers use an id again in a later step.
            ids = [f"c{dice.randrange(4)}-{index}" for index in range(dice.randrange(1, 4))]
            made.append(call(*ids, content=dice.choice([None, "", "let me see"]), arguments=f'{{"n": {number}}}'))
            answered = dice.sample(ids, dice.randrange(len(ids) + 1))
            made += [
                result(one, dice.choice(["", "ok", [{"type": "text", "text": "ok"}], "x" * 300])) for one in answered
            ]
        if dice.random() < 0.4:
            made.append(dice.choice(ODD))
        if dice.random() < 0.9:
            made.append({"role": "assistant", "content": f"answer {number}"})
    return made


def conversations(seed: int, count: int, exchanges_max: int = 8) -> list[Json]:
    dice = random.Random(seed)
    made: list[Json] = []
    for number in range(count):
        line: Json = {"id": dice.choice([f"conv-{number}", f"conv {number}/é", f"{'x' * 140}{number}"])}
        if dice.random() < 0.5:
            line["user"] = dice.choice(["ann", "bob"])
        if dice.random() < 0.3:
            line["metadata"] = dice.choice([{"channel": "web"}, {}, {"nested": {"a": 1}}, None])
        if dice.random() < 0.5:
            line["created_at"] = dice.choice([1700000000 + number, 1700000000.25, "2024-05-01T10:00:00Z", "long ago"])
        if dice.random() < 0.2:
            line["tools"] = [{"type": "function", "function": {"name": "look_up"}}]
        line["messages"] = messages(dice, dice.randrange(exchanges_max)) + [dict(odd) for odd in ODD if number == 0]
        made.append(line)
    return made


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def by_id(lines: list[Json]) -> dict[str, Json]:
    found = {str(line["id"]): line for line in lines}
    assert len(found) == len(lines)
    return found
