"""The promises of client.formats.anthropic: equal round trips, and contexts that the Messages API accepts."""

from __future__ import annotations

import copy
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond import errors
from sessiond.client.formats import anthropic, openai
from sessiond.v1 import context_pb2, turn_pb2
from tests.client.conversations import call_message, conversations, tool_message, user_message

CONVERSATIONS = Path(__file__).resolve().parents[3] / "shared" / "data" / "airline_conversations.jsonl.gz"
Json = dict[str, Any]


def canonical(value: object) -> str:
    """Text that tells 1, 1.0 and true apart, which == does not."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def turn_of(message: Json, **options: Any) -> turn_pb2.TurnInput:
    turn = anthropic.message_to_turn(copy.deepcopy(message), turn_id="t-1", **options)
    # Through the wire, as it will be stored.
    return turn_pb2.TurnInput.FromString(turn.SerializeToString())


def assert_round_trip(message: Json) -> turn_pb2.TurnInput:
    turn = turn_of(message)
    assert canonical(anthropic.turn_to_message(turn)) == canonical(message)
    stored = turn_pb2.Turn(role=turn.role, message=turn.message)
    assert canonical(anthropic.turn_to_messages(stored)) == canonical([message])
    return turn


# --- strategies

texts = st.text(max_size=20)
words = st.text(min_size=1, max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
json_objects = st.dictionaries(words, json_values, max_size=3)
extras = st.builds(
    lambda unknown, known: unknown | known,
    # Keys that the format does not use, so that an extra never changes what a block means.
    st.dictionaries(words.map(lambda key: "x_" + key), json_values, max_size=2),
    st.fixed_dictionaries({}, optional={"cache_control": st.just({"type": "ephemeral"})}),
)
call_ids = st.sampled_from(["toolu_1", "toolu_1", "toolu_2", "call.3"])


def block(kind: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> st.SearchStrategy[Json]:
    body = st.fixed_dictionaries({"type": st.just(kind), **required}, optional=optional or {})
    return st.builds(lambda core, extra: extra | core, body, extras)


sources = st.one_of(
    st.fixed_dictionaries({"type": st.just("url"), "url": st.sampled_from(["https://example.org/a", "s3://b", ""])}),
    st.fixed_dictionaries({"type": st.just("base64"), "media_type": st.just("image/png"), "data": words}),
    st.fixed_dictionaries({"type": st.just("file"), "file_id": words}),
    st.fixed_dictionaries({"type": st.just("url"), "url": st.just("https://example.org/b"), "x": json_values}),
)
text_blocks = block("text", {"text": texts}, {"citations": st.none() | st.lists(json_objects, max_size=1)})
media_blocks = block("image", {"source": sources}) | block("document", {"source": sources}, {"title": texts})
foreign_blocks = st.one_of(
    block("thinking", {"thinking": texts, "signature": texts}),
    block("redacted_thinking", {"data": texts}),
    block("server_tool_use", {"id": words, "name": st.just("web_search"), "input": json_objects}),
    block("web_search_tool_result", {"tool_use_id": words, "content": json_values}),
    block("from_the_future", {"anything": json_values}),
)
tool_uses = block("tool_use", {"id": call_ids, "name": words, "input": json_objects})
tool_results = block(
    "tool_result",
    {"tool_use_id": call_ids},
    {
        "content": texts | st.none() | st.lists(text_blocks | media_blocks | foreign_blocks, max_size=3),
        "is_error": st.booleans(),
    },
)


def message(role: str, blocks: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    body = st.fixed_dictionaries(
        {"role": st.just(role), "content": texts | st.lists(blocks, min_size=1, max_size=4)},
        # What a received message carries.
        optional={"id": words, "type": st.just("message"), "stop_reason": st.none() | words, "usage": json_objects},
    )
    return st.builds(lambda core, extra: extra | core, body, extras)


messages = message("user", text_blocks | media_blocks | tool_results | foreign_blocks) | message(
    "assistant", text_blocks | tool_uses | foreign_blocks
)


# --- round trips


@settings(max_examples=500, deadline=None)
@given(messages)
def test_every_message_comes_out_equal_and_without_keeping_it_twice(source: Json) -> None:
    turn = assert_round_trip(source)
    assert turn.message.original_json == b""
    assert turn.role == anthropic.ROLES[source["role"]]
    assert turn.message.source_format == turn_pb2.SOURCE_FORMAT_ANTHROPIC


@settings(max_examples=300, deadline=None)
@given(messages)
def test_the_same_message_makes_the_same_bytes(source: Json) -> None:
    once, again = turn_of(source), turn_of(source)
    assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def places(value: object) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON tree, the tree itself left out."""
    found: list[tuple[Any, ...]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((key,))
        found += [(key, *rest) for rest in places(inner)]
    return found


@settings(max_examples=800, deadline=None)
@given(source=messages, data=st.data())
def test_a_message_bent_anywhere_comes_out_equal_or_is_refused_by_name(source: Json, data: st.DataObject) -> None:
    bent = copy.deepcopy(source)
    path = data.draw(st.sampled_from(places(bent)))
    target: Any = bent
    for step in path[:-1]:
        target = target[step]
    if data.draw(st.booleans()):
        target[path[-1]] = data.draw(json_values)
    elif isinstance(target, dict):
        del target[path[-1]]
    try:
        given_back = anthropic.turn_to_message(turn_of(bent))
    except errors.Invalid as failure:
        refusal = failure
    else:
        assert canonical(given_back) == canonical(bent)
        return
    assert refusal.reason in ("INVALID_TURN", "EMPTY_TURN")
    assert refusal.fields[0][0].startswith("message.")


@pytest.mark.parametrize(
    "content",
    [
        "hi",
        "",
        [{"type": "text", "text": ""}],
        [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}],
        [{"type": "tool_result", "tool_use_id": "a"}],
        [{"type": "tool_result", "tool_use_id": "a", "content": ""}],
        [{"type": "tool_result", "tool_use_id": "a", "content": []}],
        [{"type": "tool_result", "tool_use_id": "a", "content": None}],
        [{"type": "tool_result", "tool_use_id": "a", "content": "x", "is_error": False}],
        [{"type": "tool_result", "tool_use_id": "a", "content": "x", "is_error": True}],
        [{"type": "tool_result", "tool_use_id": "a", "is_error": 1}],
        [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_use", "id": "b"}]}],
        [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "tool_result", "tool_use_id": "b"}]}],
        [{"type": "tool_use", "id": "a", "name": "f", "input": {}}],
        [{"type": "tool_use", "id": "a", "name": "f", "input": {"b": 1, "a": [1.0, True, None, "é", 2**70]}}],
        [{"type": "image", "source": {"type": "url", "url": "https://example.org/a", "detail": 1}}],
    ],
    ids=canonical,
)
def test_shapes_that_are_easily_mixed_up_come_out_equal(content: Any) -> None:
    assert assert_round_trip({"role": "user", "content": content}).message.original_json == b""


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "tool_use", "id": "a", "name": "f", "input": "free text"}],
        [{"type": "tool_use", "id": "a", "name": "f"}],
    ],
    ids=canonical,
)
def test_a_message_that_no_field_fits_is_kept_whole_and_still_has_its_parts(content: Any) -> None:
    source = {"role": "assistant", "content": content, "id": "msg_1"}
    turn = assert_round_trip(source)
    assert json.loads(turn.message.original_json) == source
    assert turn.message.parts[0].tool_call.name == "f"
    assert not turn.message.extra_json


# --- what a turn holds


def test_calls_results_and_media_are_parts_that_the_daemon_can_count_and_pair() -> None:
    assistant = turn_of(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"b": 1, "a": "é"}},
            ],
        }
    )
    thinking, call = assistant.message.parts
    assert thinking.opaque.origin == "anthropic.thinking"
    assert json.loads(thinking.opaque.data) == {"type": "thinking", "thinking": "hm", "signature": "s"}
    assert call.tool_call == turn_pb2.ToolCall(call_id="a", name="f", arguments='{"b":1,"a":"é"}')
    assert assistant.status == turn_pb2.TURN_STATUS_COMPLETE

    inner = [{"type": "text", "text": "42"}, {"type": "image", "source": {"type": "url", "url": "https://e.org/i"}}]
    user = turn_of(
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "a", "content": inner, "is_error": True}],
        }
    )
    assert user.role == turn_pb2.ROLE_USER
    assert user.status == turn_pb2.TURN_STATUS_UNSPECIFIED
    result = user.message.parts[0].tool_result
    assert (result.call_id, result.is_error, result.parts[0].text) == ("a", True, "42")
    assert (result.parts[1].attachment.uri, result.parts[1].attachment.media_type) == ("https://e.org/i", "image/*")


@pytest.mark.parametrize(
    ("source", "reason", "path"),
    [
        ("hi", "INVALID_TURN", ""),
        ({"content": "x"}, "INVALID_TURN", ".role"),
        ({"role": "system", "content": "x"}, "INVALID_TURN", ".role"),
        ({"role": "user", "content": 1.5}, "INVALID_TURN", ".content"),
        ({"role": "user"}, "EMPTY_TURN", ".content"),
        ({"role": "user", "content": []}, "EMPTY_TURN", ".content"),
        ({"role": "user", "content": ["x"]}, "INVALID_TURN", ".content[0]"),
        ({"role": "user", "content": [{"type": None}]}, "INVALID_TURN", ".content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "INVALID_TURN", ".content[0].text"),
        ({"role": "user", "content": [{"type": "tool_result"}]}, "INVALID_TURN", ".content[0].tool_use_id"),
        (
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{}]}]},
            "INVALID_TURN",
            ".content[0].content[0].type",
        ),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "a"}]}, "INVALID_TURN", ".content[0].name"),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": 1}]}, "INVALID_TURN", ".content[0].id"),
        ({"role": "user", "content": "\udc00"}, "INVALID_UTF8", ".content"),
    ],
)
def test_a_message_that_can_not_be_right_is_refused_with_its_field(source: Any, reason: str, path: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        anthropic.message_to_turn(source, turn_id="t", path="messages[3]")
    assert caught.value.reason == reason
    assert caught.value.fields[0][0] == f"messages[3]{path}"


# --- instructions


def test_instructions_go_in_as_system_and_come_out_as_system() -> None:
    two = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows: list[tuple[Any, list[str]]] = [("be brief", ["be brief"]), (two, ["a", "b"])]
    for system, texts_out in rows:
        turn = anthropic.system_to_turn(system, turn_id="t")
        assert turn.role == turn_pb2.ROLE_SYSTEM
        context = context_pb2.ActiveContext(instructions=turn_pb2.Turn(role=turn.role, message=turn.message))
        context.new_message.parts.add(text="hi")
        assert anthropic.context_to_anthropic(context) == {
            "system": [{"type": "text", "text": text} for text in texts_out],
            "messages": [{"role": "user", "content": "hi"}],
        }
        with pytest.raises(errors.Invalid, match="no Anthropic message"):
            anthropic.turn_to_message(turn)
    with pytest.raises(errors.Invalid, match="must be text"):
        anthropic.system_to_turn([{"type": "image", "source": {}}], turn_id="t")
    with pytest.raises(errors.Invalid) as caught:
        anthropic.system_to_turn([], turn_id="t")
    assert caught.value.reason == "EMPTY_TURN"


# --- from OpenAI


def from_openai(message: Json) -> list[Json]:
    return anthropic.turn_to_messages(openai.message_to_turn(message, turn_id="t"))


def test_openai_messages_show_in_anthropic() -> None:
    assert from_openai({"role": "user", "content": "hi", "name": "ann"}) == [{"role": "user", "content": "hi"}]
    assert from_openai({"role": "system", "content": "hi"}) == []
    assert from_openai({"role": "developer", "content": "hi"}) == []
    assert from_openai(tool_message("a", "42")) == [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "42"}]}
    ]
    shown = turn_pb2.Part(attachment=turn_pb2.Attachment(uri="https://e.org/i", media_type="image/png"))
    failed = turn_pb2.Part(tool_result=turn_pb2.ToolResult(call_id="a", is_error=True, parts=[shown]))
    image = {"type": "image", "source": {"type": "url", "url": "https://e.org/i"}}
    assert anthropic.turn_to_message(
        turn_pb2.Turn(role=turn_pb2.ROLE_TOOL, message=turn_pb2.Message(parts=[failed]))
    ) == {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "a", "content": [image], "is_error": True}],
    }
    # An assistant message can hold no image.
    said = turn_pb2.Turn(role=turn_pb2.ROLE_ASSISTANT, message=turn_pb2.Message(parts=[shown]))
    assert anthropic.turn_to_message(said)["content"] == "[attachment https://e.org/i]"
    assert from_openai(tool_message("a", "")) == [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a"}]}
    ]
    function = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    broken = {"id": "b", "type": "function", "function": {"name": "f", "arguments": '{"x":'}}
    nothing = {"id": "c", "type": "function", "function": {"name": "f", "arguments": ""}}
    custom = {"id": "d", "type": "custom", "custom": {"name": "g", "input": "free"}}
    assert from_openai(
        {
            "role": "assistant",
            "content": None,
            "refusal": "no",
            "audio": {"id": "x"},
            "tool_calls": [function, broken, nothing, custom],
        }
    ) == [
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "no"},
                {"type": "tool_use", "id": "a", "name": "f", "input": {"x": 1}},
                {"type": "tool_use", "id": "b", "name": "f", "input": {"input": '{"x":'}},
                {"type": "tool_use", "id": "c", "name": "f", "input": {}},
                {"type": "tool_use", "id": "d", "name": "g", "input": {"input": "free"}},
            ],
        }
    ]


def test_openai_media_show_in_anthropic() -> None:
    assert from_openai(
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "image_url", "image_url": {"url": "data:image/tiff;base64,AA=="}},
                {"type": "image_url", "image_url": {"url": "data:image/png,broken"}},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AA=="}},
                {"type": "file", "file": {"file_data": "https://example.org/a.pdf"}},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            ],
        }
    )[0]["content"] == [
        {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}},
        {"type": "text", "text": "[openai.image_url left out]"},
        {"type": "text", "text": "[openai.image_url left out]"},
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA=="}},
        {"type": "text", "text": "[attachment https://example.org/a.pdf]"},
        {"type": "text", "text": "[openai.input_audio left out]"},
    ]


# --- a whole context


def stored(turn: turn_pb2.TurnInput) -> turn_pb2.Turn:
    return turn_pb2.Turn(role=turn.role, message=turn.message)


def test_a_context_is_rendered_most_stable_part_first() -> None:
    tail = [user_message("q"), call_message("a"), tool_message("a"), {"role": "assistant", "content": "r"}]
    context = context_pb2.ActiveContext(
        instructions=stored(openai.message_to_turn({"role": "developer", "content": "be brief"}, turn_id="t")),
        pins=[turn_pb2.PinnedFact(key="name", value="Ann"), turn_pb2.PinnedFact(key="seat", value="4A")],
        summaries=[turn_pb2.Turn(summary=turn_pb2.Summary(text="they met"))],
        turns=[stored(openai.message_to_turn(message, turn_id="t")) for message in tail],
        recalled=context_pb2.RecalledBlock(text="> once"),
        new_message=turn_pb2.Message(parts=[turn_pb2.Part(text="and now?")]),
    )
    rendered = anthropic.context_to_anthropic(context)
    assert list(rendered) == ["system", "messages"]
    assert rendered == {
        "system": [
            {"type": "text", "text": "be brief"},
            {"type": "text", "text": "Pinned facts:\n- name: Ann\n- seat: 4A"},
            {"type": "text", "text": "Summary of the conversation so far:\nthey met"},
        ],
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "ok"}]},
            {"role": "assistant", "content": "r"},
            {"role": "user", "content": [{"type": "text", "text": "> once"}, {"type": "text", "text": "and now?"}]},
        ],
    }
    context.given_instructions = "be long"
    assert anthropic.context_to_anthropic(context)["system"][0] == {"type": "text", "text": "be long"}
    assert anthropic.context_to_anthropic(context_pb2.ActiveContext()) == {"messages": []}
    with pytest.raises(errors.Invalid, match="not modified"):
        anthropic.context_to_anthropic(context_pb2.ActiveContext(not_modified=True))


def test_what_a_received_message_carries_is_not_sent_back() -> None:
    cached = {"type": "ephemeral"}
    received = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [
            {"type": "text", "text": "hi", "cache_control": cached},
            {"type": "text", "text": " "},
            {"type": "tool_use", "id": "a", "name": "f", "input": {}, "cache_control": cached},
        ],
        "stop_reason": "tool_use",
    }
    answer = {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "a",
                "content": [{"type": "text", "text": "x", "cache_control": cached}],
            }
        ],
    }
    context = context_pb2.ActiveContext(turns=[stored(turn_of(received)), stored(turn_of(answer))])
    assert anthropic.context_to_anthropic(context)["messages"] == [
        {"role": "user", "content": anthropic.OPENING_TEXT},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "hi"}, {"type": "tool_use", "id": "a", "name": "f", "input": {}}],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "x"}]}],
        },
    ]


def test_repeated_and_odd_call_ids_are_told_apart_in_calls_and_results() -> None:
    tail = [
        user_message("q"), call_message("a", "b.c"), tool_message("b.c", "1"), tool_message("a", "2"),
        call_message("a", "a"), tool_message("a", "3"), tool_message("a", "4"),
    ]  # fmt: skip
    context = context_pb2.ActiveContext(turns=[stored(openai.message_to_turn(one, turn_id="t")) for one in tail])
    rendered = anthropic.context_to_anthropic(context)["messages"]
    assert [block["id"] for message in rendered[1::2] for block in message["content"]] == ["a", "b_c", "a_2", "a_3"]
    assert [(block["tool_use_id"], block["content"]) for message in rendered[2::2] for block in message["content"]] == [
        ("b_c", "1"), ("a", "2"), ("a_3", "3"), ("a_2", "4"),
    ]  # fmt: skip


def test_unanswered_calls_are_closed_only_on_request() -> None:
    tail = [user_message("q"), call_message("a", "b"), tool_message("b"), user_message("never mind")]
    context = context_pb2.ActiveContext(turns=[stored(openai.message_to_turn(one, turn_id="t")) for one in tail])
    result = {"type": "tool_result", "tool_use_id": "b", "content": "ok"}
    text = {"type": "text", "text": "never mind"}
    assert anthropic.context_to_anthropic(context)["messages"][2]["content"] == [result, text]
    assert anthropic.context_to_anthropic(context, close_unanswered="")["messages"][2]["content"] == [
        result,
        {"type": "tool_result", "tool_use_id": "a", "content": ""},
        text,
    ]
    closed = anthropic.context_to_anthropic(context, close_unanswered="no answer")
    assert closed["messages"][2]["content"] == [
        result,
        {"type": "tool_result", "tool_use_id": "a", "content": "no answer"},
        text,
    ]


def assert_acceptable(messages: list[Json]) -> None:
    """What the API checks: users first, then in turn; results first and due; ids plain and unique; no void text."""
    seen: set[str] = set()
    due: set[str] = set()
    for at, message in enumerate(messages):
        assert set(message) == {"role", "content"}
        assert message["role"] == ("user", "assistant")[at % 2], messages
        content = message["content"]
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        assert blocks
        kinds = [block["type"] for block in blocks]
        assert kinds == sorted(kinds, key=lambda kind: kind != "tool_result"), messages
        assert all(block["text"].strip() for block in blocks if block["type"] == "text")
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        assert sorted(answered) == sorted(due), messages
        due = {block["id"] for block in blocks if block["type"] == "tool_use"}
        assert len(due) == kinds.count("tool_use")
        assert not due & seen
        assert all(re.fullmatch(r"[a-zA-Z0-9_-]+", call_id) for call_id in due)
        seen |= due
        assert not due or message["role"] == "assistant"
        assert all(isinstance(block["input"], dict) for block in blocks if block["type"] == "tool_use")


@settings(max_examples=300, deadline=None)
@given(turns=st.sampled_from(["openai", "anthropic", "both"]).flatmap(lambda source: conversations(source)))
def test_any_conversation_of_either_format_renders_to_what_anthropic_accepts(turns: list[turn_pb2.Turn]) -> None:
    context = context_pb2.ActiveContext(turns=turns, new_message=turn_pb2.Message(parts=[turn_pb2.Part(text="now?")]))
    assert_acceptable(anthropic.context_to_anthropic(context, close_unanswered="no answer")["messages"])


def test_real_conversations_go_to_anthropic_and_back() -> None:
    if not CONVERSATIONS.exists():
        pytest.skip(f"{CONVERSATIONS} is absent")
    seen = 0
    with gzip.open(CONVERSATIONS, "rt", encoding="utf-8") as lines:
        for line in lines:
            source = json.loads(line)["messages"]
            turns = [stored(openai.message_to_turn(one, turn_id="t")) for one in source]
            context = context_pb2.ActiveContext(instructions=turns[0], turns=turns[1:])
            rendered = anthropic.context_to_anthropic(context, close_unanswered="no answer")
            assert rendered["system"] == [{"type": "text", "text": source[0]["content"]}]
            assert_acceptable(rendered["messages"])
            for message in rendered["messages"]:
                assert_round_trip(message)
                seen += 1
    assert seen == 5108
