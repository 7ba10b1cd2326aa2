"""The sample set is the project's own, holds what it promises, and goes through import and export without a loss."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sessiond
from sessiond.cli import lines as formats
from sessiond.client.formats import anthropic, openai
from sessiond.demo import sample, season
from sessiond.tokens import Tokenizer
from sessiond.v1 import session_pb2, turn_pb2

DATA = Path(sessiond.__file__).parent / "data"
BYTES_MAX = 600_000
LINES = [json.loads(line) for line in sample.lines()]
KEPT, LONG = LINES[:-1], LINES[-1]
IDS = [line["id"] for line in LINES]


def call_ids(message: dict[str, Any]) -> list[str]:
    return [call["id"] for call in message.get("tool_calls") or ()]


def rounds(messages: list[dict[str, Any]]) -> Iterator[tuple[list[str], list[str], str]]:
    """(ids called, ids answered, role of what follows) for each assistant message with calls."""
    for at, message in enumerate(messages):
        if not call_ids(message):
            continue
        answered = []
        end = at + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            answered.append(messages[end]["tool_call_id"])
            end += 1
        yield call_ids(message), answered, messages[end]["role"] if end < len(messages) else ""


def count(holds: Any) -> int:
    """How many of the kept conversations hold something."""
    return sum(1 for line in KEPT if holds(line["messages"]))


def scripts(text: str) -> set[str]:
    return {unicodedata.name(c, "?").partition(" ")[0] for c in text if c.isalpha()}


def test_there_are_at_least_twenty_conversations_and_one_of_two_thousand_turns():
    assert len(KEPT) >= 20
    assert len(LONG["messages"]) == 2000
    assert len(set(IDS)) == len(IDS)


def test_what_is_kept_in_the_package_is_small():
    assert sum(file.stat().st_size for file in DATA.iterdir()) < BYTES_MAX


def test_calls_are_parallel_answered_out_of_order_and_never():
    assert count(lambda messages: any(len(called) > 1 for called, _, _ in rounds(messages))) >= 5
    assert count(lambda messages: any(len(called) > 3 for called, _, _ in rounds(messages))) >= 2
    assert count(lambda m: any(sorted(a) == sorted(c) and a != c for c, a, _ in rounds(m))) >= 5
    closed = count(lambda m: any(len(a) < len(c) and then == "user" for c, a, then in rounds(m)))
    assert closed >= 3
    assert count(lambda m: any(len(a) < len(c) and then == "" for c, a, then in rounds(m))) >= 1


def test_call_ids_are_repeated_within_one_message_and_across_messages():
    def repeated(messages: list[dict[str, Any]]) -> bool:
        return max(Counter(name for message in messages for name in set(call_ids(message))).values(), default=0) > 1

    assert count(repeated) >= 3
    assert count(lambda m: any(len(set(called)) < len(called) for called, _, _ in rounds(m))) >= 1


def test_there_are_empty_results_several_instructions_and_contents_of_several_parts():
    assert count(lambda m: any(x["role"] == "tool" and x["content"] == "" for x in m)) >= 3
    assert count(lambda m: sum(x["role"] == "system" for x in m) > 1) >= 3
    assert count(lambda m: any(x["role"] == "developer" for x in m)) >= 1
    for role in ("user", "assistant", "tool"):
        assert count(lambda m, r=role: any(x["role"] == r and isinstance(x["content"], list) for x in m)) >= 1
    assert count(lambda m: any("image_url" in json.dumps(x["content"]) for x in m)) >= 2
    assert count(lambda m: any(x.get("refusal") for x in m)) >= 1
    assert count(lambda m: len({x["name"] for x in m if "name" in x}) > 2) >= 1


def test_people_write_in_several_scripts():
    found = set().union(*(scripts(json.dumps(line, ensure_ascii=False)) for line in KEPT))
    assert {"LATIN", "CYRILLIC", "ARABIC", "DEVANAGARI", "CJK", "HIRAGANA"} <= found


def test_lines_carry_users_metadata_and_times_in_more_than_one_notation():
    assert all(line["user"] for line in LINES)
    assert sum("metadata" in line for line in LINES) >= 15
    assert {type(line[name]) for line in KEPT for name in ("created_at", "created") if name in line} == {str, int}


@pytest.mark.parametrize("line", LINES, ids=IDS)
def test_a_line_comes_back_equal(line):
    read = formats.parse(json.dumps(line, ensure_ascii=False).encode(), "sample:1", "sample-1")
    session_id = formats.session_id_of("", read.key)
    messages = []
    for at, message in enumerate(read.messages):
        sent = openai.message_to_turn(message, turn_id=f"t{at}")
        # As it comes from the daemon: the same body, in a turn.
        turn = turn_pb2.Turn(seq=at + 1, turn_id=sent.turn_id, role=sent.role, message=sent.message)
        messages.append(openai.turn_to_message(turn))
    session = session_pb2.Session(session_id=session_id, user_id=read.user)
    session.state.metadata.update(formats.session_metadata(read, session_id))
    assert json.loads(formats.line_of(session, messages)) == line
    assert read.dropped == []


@pytest.mark.parametrize("line", LINES, ids=IDS)
def test_every_turn_has_a_form_for_the_other_provider(line):
    for message in line["messages"]:
        sent = openai.message_to_turn(message, turn_id="t")
        turn = turn_pb2.Turn(role=sent.role, message=sent.message)
        if turn.role not in (turn_pb2.ROLE_SYSTEM, turn_pb2.ROLE_DEVELOPER):
            assert anthropic.turn_to_messages(turn)


def test_the_long_conversation_is_the_same_for_the_same_seed():
    assert season.conversation() == LONG
    assert season.conversation(seed=1)["messages"] != LONG["messages"]


@pytest.mark.parametrize("turns", [3, 5, 6, 7, 8, 9, 10, 61, 300, 999])
def test_the_long_conversation_has_the_length_that_was_asked_for(turns):
    assert len(season.conversation(turns)["messages"]) == turns


def test_the_long_conversation_is_varied_and_its_turns_are_of_realistic_length():
    texts = [json.dumps(message, ensure_ascii=False, sort_keys=True) for message in LONG["messages"]]
    assert len(set(texts)) > 0.95 * len(texts)
    tokenizer = Tokenizer()
    sizes = [
        tokenizer.count_message(openai.message_to_turn(message, turn_id="t").message, turn_pb2.ENCODING_O200K_BASE)
        for message in LONG["messages"]
    ]
    assert max(sizes) <= 160
    assert min(sizes) >= 10
    assert 45 <= sum(sizes) / len(sizes) <= 100
    assert sum(size >= 30 for size in sizes) > 0.75 * len(sizes)


def test_the_long_conversation_answers_every_call_and_some_out_of_order():
    found = list(rounds(LONG["messages"]))
    assert len(found) > 200
    assert all(sorted(answered) == sorted(called) for called, answered, _ in found)
    assert any(answered != called for called, answered, _ in found)
    assert sum(len(called) > 1 for called, _, _ in found) > 50
