"""The promises of client.formats.openai: what goes in comes out equal, and what is rendered is what OpenAI accepts."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
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
    turn = openai.message_to_turn(copy.deepcopy(message), turn_id="t-1", **options)
    # Through the wire, as it will be stored.
    return turn_pb2.TurnInput.FromString(turn.SerializeToString())


def assert_round_trip(message: Json) -> turn_pb2.TurnInput:
    turn = turn_of(message)
    assert canonical(openai.turn_to_message(turn)) == canonical(message)
    stored = turn_pb2.Turn(role=turn.role, message=turn.message)
    assert canonical(openai.turn_to_message(stored)) == canonical(message)
    return turn


# --- strategies

texts = st.text(max_size=20)
words = st.text(min_size=1, max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3), max_leaves=6
)
# Keys that no format uses, so that an extra never changes what a message means.
extras = st.dictionaries(words.map(lambda key: "x_" + key), json_values, max_size=2)
call_ids = st.sampled_from(["call_1", "call_1", "call_2", "toolu/3"])


def with_extras(base: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.builds(lambda body, extra: extra | body, base, extras)


def part(kind: str, body: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return with_extras(st.fixed_dictionaries({"type": st.just(kind), kind: body}))


text_parts = part("text", texts)
refusal_parts = part("refusal", texts)
urls = st.sampled_from(
    ["https://example.org/a.png", "HTTP://example.org/b", "data:image/png;base64,AAAA", "", "ftp://x"]
)
image_parts = part(
    "image_url",
    with_extras(st.fixed_dictionaries({"url": urls}, optional={"detail": st.sampled_from(["low", "auto"])})),
)
file_parts = part(
    "file",
    with_extras(st.fixed_dictionaries({}, optional={"file_id": words, "file_data": urls, "filename": words})),
)
audio_parts = part("input_audio", st.fixed_dictionaries({"data": words, "format": st.just("wav")}))
unknown_parts = part("video_url", json_values)
user_content = texts | st.lists(
    text_parts | image_parts | file_parts | audio_parts | unknown_parts, min_size=1, max_size=4
)
function_bodies = with_extras(st.fixed_dictionaries({"name": words, "arguments": texts}))
tool_calls = with_extras(
    st.fixed_dictionaries({"id": call_ids, "type": st.just("function"), "function": function_bodies})
) | with_extras(
    st.fixed_dictionaries(
        {
            "id": call_ids,
            "type": st.just("custom"),
            "custom": with_extras(st.fixed_dictionaries({"name": words, "input": texts})),
        }
    )
)
# What a received message carries although it says nothing.
received_nothing = st.fixed_dictionaries(
    {},
    optional={
        "refusal": st.none(),
        "annotations": st.just([]),
        "audio": st.none(),
        "function_call": st.none(),
        "tool_calls": st.none() | st.just([]),
    },
)
names = st.fixed_dictionaries({}, optional={"name": texts})


def message(role: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> st.SearchStrategy[Json]:
    body = st.fixed_dictionaries({"role": st.just(role), **required}, optional=optional or {})
    return st.builds(lambda core, extra, name: extra | name | core, body, extras, names)


instruction_messages = st.sampled_from(["system", "developer"]).flatmap(
    lambda role: message(role, {"content": texts | st.lists(text_parts, min_size=1, max_size=3)})
)
user_messages = message("user", {"content": user_content})
assistant_messages = st.one_of(
    message("assistant", {"content": texts | st.lists(text_parts | refusal_parts, min_size=1, max_size=3)}),
    message("assistant", {"content": st.none(), "refusal": texts}),
    message(
        "assistant",
        {"tool_calls": st.lists(tool_calls, min_size=1, max_size=3)},
        {"content": texts | st.none() | st.just([]) | st.lists(text_parts, min_size=1, max_size=2)},
    ),
    message("assistant", {"content": st.none(), "function_call": function_bodies}),
    message("assistant", {"content": st.none() | texts, "audio": st.fixed_dictionaries({"id": words})}),
    message("assistant", {"content": words, "annotations": st.lists(json_values, max_size=2)}),
)
received_messages = st.builds(lambda said, nothing: nothing | said, assistant_messages, received_nothing)
tool_messages = st.one_of(
    message("tool", {"tool_call_id": call_ids, "content": texts | st.lists(text_parts, max_size=3)}),
    message("tool", {"tool_call_id": call_ids}, {"content": st.none()}),
    st.fixed_dictionaries({"role": st.just("function"), "name": words, "content": texts | st.none()}),
)
messages = st.one_of(instruction_messages, user_messages, assistant_messages, received_messages, tool_messages)


# --- round trips


@settings(max_examples=500, deadline=None)
@given(messages)
def test_every_message_comes_out_equal_and_without_keeping_it_twice(source: Json) -> None:
    turn = assert_round_trip(source)
    assert turn.message.original_json == b""
    assert turn.role == openai.ROLES[source["role"]]
    assert turn.message.source_format == turn_pb2.SOURCE_FORMAT_OPENAI_CHAT


@settings(max_examples=300, deadline=None)
@given(messages)
def test_the_same_message_makes_the_same_bytes(source: Json) -> None:
    once, again = turn_of(source), turn_of(source)
    assert once.SerializeToString(deterministic=True) == again.SerializeToString(deterministic=True)


def function_call(call_id: str, arguments: object) -> Json:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


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
        given_back = openai.turn_to_message(turn_of(bent))
    except errors.Invalid as failure:
        refusal = failure
    else:
        assert canonical(given_back) == canonical(bent)
        return
    assert refusal.reason in ("INVALID_TURN", "EMPTY_TURN")
    assert refusal.fields[0][0].startswith("message.")


@pytest.mark.parametrize(
    "source",
    [
        {"role": "user", "content": "hi"},
        {"role": "user", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "hi", "name": ""},
        {"role": "user", "content": "hi", "name": None},
        {"role": "user", "content": "hi", "x": {"b": 1, "a": [True, 1, 1.0, None, 2**70]}},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [function_call("a", "")]},
        {"role": "assistant", "content": [], "tool_calls": [function_call("a", "{}")] * 2},
        {"role": "assistant", "content": None, "refusal": "no", "tool_calls": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "assistant", "content": None, "audio": {"id": "audio_1", "transcript": "hi"}, "annotations": []},
        {"role": "assistant", "content": [{"type": "audio", "audio": 1}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{", "x": 1}},
        {"role": "tool", "tool_call_id": "a", "content": []},
        {"role": "tool", "tool_call_id": "a", "content": ""},
        {"role": "tool", "tool_call_id": "a", "content": None},
        {"role": "tool", "tool_call_id": "a"},
        {"role": "tool", "tool_call_id": "", "content": "x"},
        {"role": "tool", "tool_call_id": "a", "name": "f", "content": [{"type": "text", "text": ""}]},
        {"role": "function", "name": "f", "content": None},
        {"role": "developer", "content": "be brief"},
    ],
    ids=canonical,
)  # fmt: skip
def test_shapes_that_are_easily_mixed_up_come_out_equal(source: Json) -> None:
    assert assert_round_trip(source).message.original_json == b""


@pytest.mark.parametrize(
    "source",
    [
        # A refusal both in the list and beside it; ids that are empty or missing; arguments that are no string; a kind
        # of call that nobody knew.
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "a"}], "refusal": "b"},
        {"role": "assistant", "tool_calls": [function_call("", "")]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "assistant", "tool_calls": [function_call("a", {"x": 1})]},
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f"}}]},
        {"role": "assistant", "tool_calls": [{"id": "a", "type": "mcp", "mcp": {"server": "s"}}]},
        {"role": "function", "content": "x"},
        {"role": "tool", "tool_call_id": "", "name": "f", "content": "x"},
    ],
    ids=canonical,
)  # fmt: skip
def test_a_message_that_no_field_fits_is_kept_whole_and_still_has_its_parts(source: Json) -> None:
    turn = assert_round_trip(source)
    assert json.loads(turn.message.original_json) == source
    assert turn.message.parts
    assert not turn.message.extra_json


def test_real_conversations_come_out_equal() -> None:
    if not CONVERSATIONS.exists():
        pytest.skip(f"{CONVERSATIONS} is absent")
    seen = 0
    with gzip.open(CONVERSATIONS, "rt", encoding="utf-8") as lines:
        for line in lines:
            for source in json.loads(line)["messages"]:
                assert assert_round_trip(source).message.original_json == b""
                seen += 1
    assert seen == 5308


# --- what a turn holds


def test_calls_results_and_media_are_parts_that_the_daemon_can_count_and_pair() -> None:
    assistant = turn_of(
        {
            "role": "assistant",
            "content": "look",
            "refusal": "no",
            "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                {"id": "b", "type": "custom", "custom": {"name": "g", "input": "free"}},
            ],
        }
    )
    assert [part.WhichOneof("kind") for part in assistant.message.parts] == [
        "text",
        "refusal",
        "tool_call",
        "tool_call",
    ]
    assert assistant.message.parts[3].tool_call == turn_pb2.ToolCall(call_id="b", name="g", arguments="free")
    assert not assistant.message.parts[2].extra_json
    assert assistant.message.parts[3].extra_json == b'{"type":"custom"}'
    assert assistant.status == turn_pb2.TURN_STATUS_COMPLETE

    tool = turn_of({"role": "tool", "tool_call_id": "a", "content": "42"})
    assert tool.role == turn_pb2.ROLE_TOOL
    assert tool.status == turn_pb2.TURN_STATUS_UNSPECIFIED
    assert tool.message.parts[0].tool_result.call_id == "a"
    assert [part.text for part in tool.message.parts[0].tool_result.parts] == ["42"]
    assert not turn_of({"role": "tool", "tool_call_id": "a", "content": ""}).message.parts[0].tool_result.parts

    function = turn_of({"role": "function", "name": "f", "content": "x"})
    assert (function.role, function.message.name) == (turn_pb2.ROLE_TOOL, "f")
    assert function.message.parts[0].tool_result.call_id == ""

    url = "https://example.org/a.png"
    user = turn_of(
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "HTTPS://EXAMPLE.ORG"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
            ],
        }
    )
    image, shouted, inline, audio = user.message.parts
    assert shouted.attachment.uri == "HTTPS://EXAMPLE.ORG"
    assert (image.attachment.uri, image.attachment.media_type) == (url, "image/*")
    assert json.loads(image.extra_json) == {"image_url": {"detail": "low"}}
    assert inline.opaque.origin == "openai.image_url"
    assert audio.opaque.origin == "openai.input_audio"
    assert json.loads(audio.opaque.data)["input_audio"]["format"] == "wav"


def test_a_media_type_and_tokens_that_the_caller_declares_do_not_change_the_message() -> None:
    source = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a"}}]}
    turn = turn_of(source)
    turn.message.parts[0].attachment.tokens = 85
    turn.message.parts[0].attachment.media_type = "image/png"
    assert openai.turn_to_message(turn) == source


def test_an_interrupted_answer_and_what_the_caller_knows_travel_along() -> None:
    turn = turn_of(
        {"role": "assistant", "content": "wh"},
        status=turn_pb2.TURN_STATUS_INTERRUPTED,
        meta=turn_pb2.TurnMeta(model="m"),
    )
    assert (turn.turn_id, turn.status, turn.meta.model) == ("t-1", turn_pb2.TURN_STATUS_INTERRUPTED, "m")


# --- refusals


@pytest.mark.parametrize(
    ("source", "reason", "path"),
    [
        ([], "INVALID_TURN", ""),
        ({"content": "x"}, "INVALID_TURN", ".role"),
        ({"role": "wizard", "content": "x"}, "INVALID_TURN", ".role"),
        ({"role": "user", "content": 5}, "INVALID_TURN", ".content"),
        ({"role": "user", "content": ["x"]}, "INVALID_TURN", ".content[0]"),
        ({"role": "user", "content": [{"text": "x"}]}, "INVALID_TURN", ".content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, "INVALID_TURN", ".content[0].text"),
        ({"role": "user"}, "EMPTY_TURN", ".content"),
        ({"role": "user", "content": None}, "EMPTY_TURN", ".content"),
        ({"role": "assistant", "content": []}, "EMPTY_TURN", ".content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "EMPTY_TURN", ".content"),
        ({"role": "tool", "content": "x"}, "INVALID_TURN", ".tool_call_id"),
        ({"role": "assistant", "function_call": 1}, "INVALID_TURN", ".function_call"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, "INVALID_TURN", ".tool_calls"),
        ({"role": "assistant", "tool_calls": [1]}, "INVALID_TURN", ".tool_calls[0]"),
        ({"role": "assistant", "tool_calls": [{"id": 1}]}, "INVALID_TURN", ".tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "INVALID_TURN", ".tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "INVALID_TURN", ".tool_calls[0].function.name"),
        ({"role": "user", "content": "a\ud800"}, "INVALID_UTF8", ".content"),
        ({"role": "user", "content": [{"type": "text", "text": "\udfff"}]}, "INVALID_UTF8", ".content[0].text"),
        ({"role": "user", "content": "x", "\ud800": 1}, "INVALID_UTF8", " (a key)"),
        ({"role": "user", "content": "x", "score": float("nan")}, "INVALID_TURN", ""),
        ({"role": "user", "content": "x", "when": object()}, "INVALID_TURN", ""),
    ],
)
def test_a_message_that_can_not_be_right_is_refused_with_its_field(source: Any, reason: str, path: str) -> None:
    with pytest.raises(errors.Invalid) as caught:
        openai.message_to_turn(source, turn_id="t", path="messages[3]")
    assert caught.value.reason == reason
    assert caught.value.fields[0][0] == f"messages[3]{path}"
    assert str(caught.value).startswith(f"messages[3]{path}: ")


def test_json_of_another_client_that_does_not_parse_is_refused_by_name() -> None:
    for field in ("extra_json", "original_json"):
        broken = turn_pb2.Message(source_format=turn_pb2.SOURCE_FORMAT_OPENAI_CHAT, parts=[turn_pb2.Part(text="x")])
        for data in (b"[1]", b"{", b"\xff"):
            setattr(broken, field, data)
            with pytest.raises(errors.Invalid, match=field):
                openai.turn_to_messages(turn_pb2.Turn(role=turn_pb2.ROLE_USER, message=broken))


# --- from Anthropic


def from_anthropic(message: Json) -> list[Json]:
    return openai.turn_to_messages(anthropic.message_to_turn(message, turn_id="t"))


def test_an_anthropic_message_with_several_results_makes_one_tool_message_each() -> None:
    source = {
        "role": "user",
        "content": [
            {"type": "text", "text": "here"},
            {"type": "tool_result", "tool_use_id": "a", "content": "1"},
            {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "2"}], "is_error": True},
            {"type": "tool_result", "tool_use_id": "c", "is_error": True},
            {"type": "tool_result", "tool_use_id": "d"},
        ],
    }
    assert from_anthropic(source) == [
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "2"},
        {"role": "tool", "tool_call_id": "c", "content": "error"},
        {"role": "tool", "tool_call_id": "d", "content": ""},
        {"role": "user", "content": "here"},
    ]
    with pytest.raises(errors.Invalid, match="5 OpenAI messages"):
        openai.turn_to_message(anthropic.message_to_turn(source, turn_id="t"))


def test_anthropic_calls_and_media_show_in_openai() -> None:
    assert from_anthropic(
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "text", "text": "let me see", "citations": None},
                {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"é": [1, 2.0]}},
            ],
        }
    ) == [
        {
            "role": "assistant",
            "content": "let me see",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"é":[1,2.0]}'}}
            ],
        }
    ]
    source = {"type": "base64", "media_type": "image/png", "data": "AA=="}
    assert from_anthropic(
        {
            "role": "user",
            "content": [
                {"type": "image", "source": source},
                {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
                {"type": "document", "source": source | {"media_type": "application/pdf"}, "title": "t.pdf"},
                {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "plain"}},
                {"type": "document", "source": {"type": "url", "url": "https://example.org/a.pdf"}},
                {"type": "search_result", "title": "x"},
            ],
        }
    ) == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
                {"type": "file", "file": {"filename": "t.pdf", "file_data": "data:application/pdf;base64,AA=="}},
                {"type": "text", "text": "plain"},
                {"type": "text", "text": "[attachment https://example.org/a.pdf]"},
                {"type": "text", "text": "[anthropic.search_result left out]"},
            ],
        }
    ]
    assert from_anthropic({"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}) == []


def test_a_turn_that_no_format_made_is_rendered_by_its_parts() -> None:
    def rendered(role: turn_pb2.Role, *parts: turn_pb2.Part, name: str = "") -> list[Json]:
        return openai.turn_to_messages(turn_pb2.Turn(role=role, message=turn_pb2.Message(name=name, parts=parts)))

    text = turn_pb2.Part(text="hi")
    assert rendered(turn_pb2.ROLE_USER, text, name="ann") == [{"role": "user", "name": "ann", "content": "hi"}]
    assert rendered(turn_pb2.ROLE_USER, text, text)[0]["content"] == [{"type": "text", "text": "hi"}] * 2
    call = turn_pb2.Part(tool_call=turn_pb2.ToolCall(call_id="a", name="f", arguments="{}"))
    assert rendered(turn_pb2.ROLE_ASSISTANT, call)[0]["content"] is None
    result = turn_pb2.Part(tool_result=turn_pb2.ToolResult(call_id="a"))
    assert rendered(turn_pb2.ROLE_TOOL, result) == [{"role": "tool", "tool_call_id": "a", "content": ""}]
    # A tool message can hold nothing else; what stands beside the result is not lost.
    stray = turn_pb2.Part(attachment=turn_pb2.Attachment(uri="s3://b/k", alt_text="a scan"))
    assert rendered(turn_pb2.ROLE_TOOL, stray, result)[1] == {
        "role": "user", "content": [{"type": "text", "text": "a scan"}],
    }  # fmt: skip
    assert rendered(turn_pb2.ROLE_ASSISTANT, stray) == [{"role": "assistant", "content": "a scan"}]
    assert openai.turn_to_messages(turn_pb2.Turn(milestone=turn_pb2.Milestone(label="m"))) == []


# --- a whole context


def stored(message: Json, seq: int = 0) -> turn_pb2.Turn:
    turn = turn_of(message)
    return turn_pb2.Turn(seq=seq, role=turn.role, message=turn.message)


def test_a_context_is_rendered_most_stable_part_first() -> None:
    tail = [user_message("q"), call_message("a"), tool_message("a"), {"role": "assistant", "content": "r", "x": 1}]
    context = context_pb2.ActiveContext(
        instructions=stored({"role": "developer", "content": "be brief"}),
        pins=[turn_pb2.PinnedFact(key="name", value="Ann"), turn_pb2.PinnedFact(key="seat", value="4A")],
        summaries=[turn_pb2.Turn(summary=turn_pb2.Summary(text="they met"))],
        turns=[stored(message) for message in tail],
        recalled=context_pb2.RecalledBlock(text="> once"),
        new_message=turn_of(user_message("and now?")).message,
    )
    assert openai.context_to_messages(context) == [
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": "Pinned facts:\n- name: Ann\n- seat: 4A"},
        {"role": "system", "content": "Summary of the conversation so far:\nthey met"},
        *tail,
        {"role": "system", "content": "> once"},
        {"role": "user", "content": "and now?"},
    ]
    context.given_instructions = "be long"
    assert openai.context_to_messages(context)[0] == {"role": "system", "content": "be long"}
    assert openai.context_to_messages(context_pb2.ActiveContext()) == []


def test_recalled_turns_do_not_come_between_a_call_and_its_results() -> None:
    context = context_pb2.ActiveContext(
        turns=[stored(user_message()), stored(call_message("a"))],
        recalled=context_pb2.RecalledBlock(text="> once"),
        new_message=turn_of(tool_message("a")).message,
    )
    assert [message["role"] for message in openai.context_to_messages(context)] == [
        "user", "assistant", "tool", "system",
    ]  # fmt: skip


def test_a_context_that_only_says_unmodified_is_not_an_empty_conversation() -> None:
    with pytest.raises(errors.Invalid) as caught:
        openai.context_to_messages(context_pb2.ActiveContext(not_modified=True))
    assert caught.value.reason == "INVALID_CONTEXT"


def rendered(tail: list[Json], close_unanswered: str | None, new: Json | None = None) -> list[Json]:
    context = context_pb2.ActiveContext(turns=[stored(message) for message in tail])
    if new is not None:
        context.new_message.CopyFrom(turn_of(new).message)
    return openai.context_to_messages(context, close_unanswered=close_unanswered)


def test_unanswered_calls_are_closed_only_on_request_and_only_where_something_follows() -> None:
    tail = [user_message(), call_message("a", "b"), tool_message("b"), user_message("never mind"), call_message("a")]
    assert rendered(tail, None) == tail
    closed = [*tail[:3], tool_message("a", "no answer"), *tail[3:]]
    assert rendered(tail, "no answer") == closed
    # The call at the end may still be answered, unless a new message says otherwise.
    assert rendered(tail, "no answer", user_message()) == [*closed, tool_message("a", "no answer"), user_message()]
    assert rendered(tail, "", user_message())[-2] == tool_message("a", "")


def test_an_answer_closes_the_nearest_call_of_its_id() -> None:
    tail = [user_message(), call_message("a"), call_message("a"), tool_message("a"), user_message()]
    assert rendered(tail, "lost") == [*tail[:2], tool_message("a", "lost"), *tail[2:]]


def test_a_legacy_function_call_is_closed_by_a_function_message() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    answer = {"role": "function", "name": "f", "content": "x"}
    assert rendered([call, answer, call], "lost", user_message()) == [
        call, answer, call, {"role": "function", "name": "f", "content": "lost"}, user_message(),
    ]  # fmt: skip


def assert_acceptable(messages: list[Json]) -> None:
    """What OpenAI checks: calls answered at once, no result without a call, content that the role may have."""
    due: list[str] = []
    for message in messages:
        role = message["role"]
        if role == "tool":
            assert message["tool_call_id"] in due, messages
            due.remove(message["tool_call_id"])
            content = message["content"]
            assert isinstance(content, str) or all(part["type"] == "text" for part in content)
            continue
        assert not due, (messages, due)
        if role == "assistant":
            due = [call["id"] for call in message.get("tool_calls", [])]
            assert message.get("content") is not None or due or "refusal" in message
        else:
            assert role in ("system", "developer", "user")
            assert message["content"] is not None
        if isinstance(message.get("content"), list):
            allowed = {"user": ("text", "image_url", "file", "input_audio"), "assistant": ("text", "refusal")}
            assert all(part["type"] in allowed.get(role, ("text",)) for part in message["content"])


@settings(max_examples=300, deadline=None)
@given(turns=st.sampled_from(["openai", "anthropic", "both"]).flatmap(lambda source: conversations(source)))
def test_any_conversation_of_either_format_renders_to_what_openai_accepts(turns: list[turn_pb2.Turn]) -> None:
    context = context_pb2.ActiveContext(turns=turns, new_message=turn_pb2.Message(parts=[turn_pb2.Part(text="now?")]))
    assert_acceptable(openai.context_to_messages(context, close_unanswered="no answer"))


@settings(max_examples=200, deadline=None)
@given(st.lists(messages, max_size=6))
@example([{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}])
def test_without_closing_the_tail_is_given_back_message_by_message(sources: list[Json]) -> None:
    assert canonical(rendered(sources, None)) == canonical(sources)
