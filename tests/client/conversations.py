"""Conversations of the OpenAI format, the Anthropic format, or both, as a session's log may hold them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sessiond.client.formats import anthropic, openai
from sessiond.v1 import turn_pb2

Json = dict[str, Any]


def call_message(*ids: str, content: str | None = None) -> Json:
    calls = [{"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for call_id in ids]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def tool_message(call_id: str, content: str = "ok") -> Json:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def user_message(content: str = "go on") -> Json:
    return {"role": "user", "content": content}


plain_text = st.sampled_from(["hello", "", " ", "né"])


@st.composite
def conversations(draw: st.DrawFn, source: str) -> list[turn_pb2.Turn]:
    """Turns of one format, or of both, as a log may hold them: calls answered at once, in any order, or never."""
    turns: list[turn_pb2.Turn] = []

    def add(openai_message: Json, anthropic_message: Json) -> None:
        own = source if source != "both" else draw(st.sampled_from(["openai", "anthropic"]))
        if own == "openai":
            turn = openai.message_to_turn(openai_message, turn_id="t")
        else:
            turn = anthropic.message_to_turn(anthropic_message, turn_id="t")
        turns.append(turn_pb2.Turn(role=turn.role, message=turn.message))

    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["user", "user", "assistant", "calls"]))
        text = draw(plain_text)
        if kind != "calls":
            add({"role": kind, "content": text}, {"role": kind, "content": [{"type": "text", "text": text}]})
            continue
        ids = draw(st.lists(st.sampled_from(["a", "b", "c.d"]), min_size=1, max_size=3))
        uses = [{"type": "tool_use", "id": call_id, "name": "f", "input": {}} for call_id in ids]
        add(call_message(*ids, content=text), {"role": "assistant", "content": uses})
        answered = draw(st.permutations(ids))[: draw(st.integers(0, len(ids)))]
        if answered and draw(st.booleans()):
            # One Anthropic message answers several, and may say more.
            results: list[Json] = [{"type": "tool_result", "tool_use_id": call_id} for call_id in answered]
            more = draw(st.sampled_from([[], [{"type": "text", "text": "and"}]]))
            turn = anthropic.message_to_turn({"role": "user", "content": more + results}, turn_id="t")
            turns.append(turn_pb2.Turn(role=turn.role, message=turn.message))
        else:
            for call_id in answered:
                result: Json = {"type": "tool_result", "tool_use_id": call_id, "content": text}
                add(tool_message(call_id, text), {"role": "user", "content": [result]})
    return turns
