"""What every format needs: JSON bytes that come back equal, field paths in errors, inline media, pairs of calls.

It knows the two formats' names for inline media and nothing else of either, and never changes a turn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sessiond import errors
from sessiond.v1 import turn_pb2

TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}

JsonObject = dict[str, Any]
AnyTurn = turn_pb2.Turn | turn_pb2.TurnInput

# The media type of an image whose format only its bytes tell.
ANY_IMAGE = "image/*"


def invalid(path: str, what: str, reason: str = "INVALID_TURN") -> NoReturn:
    """Raise Invalid about the field at `path`."""
    raise errors.Invalid(reason, f"{path}: {what}.", fields=[(path, what)])


def expect(value: object, kind: type, path: str) -> Any:
    """`value`, if it is of the JSON type `kind`. Raises Invalid INVALID_TURN."""
    if not isinstance(value, kind):
        invalid(path, f"must be {TYPE_NAMES[kind]}, not {TYPE_NAMES.get(type(value), 'a number')}")
    return value


def dumps(value: object) -> bytes:
    """JSON of `value`: compact, keys in their own order, so that the same value always makes the same bytes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def canonical(value: object) -> str:
    """Text that is equal if and only if two values are the same JSON: 1, 1.0 and true are three different ones."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"), sort_keys=True)


def check_json(value: object, path: str) -> str:
    """`canonical(value)`. Raises Invalid: INVALID_UTF8 for a lone surrogate, INVALID_TURN for what is not JSON."""
    try:
        text = canonical(value)
    except (TypeError, ValueError, RecursionError) as failure:
        invalid(path, f"is not a JSON value: {failure}")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            _name_lone_surrogate(value, path)
    return text


def _name_lone_surrogate(value: object, path: str) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as failure:
            invalid(path, f"holds a lone surrogate at character {failure.start}", "INVALID_UTF8")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _name_lone_surrogate(key, f"{path} (a key)")
            _name_lone_surrogate(inner, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            _name_lone_surrogate(inner, f"{path}[{index}]")


def without(source: JsonObject, *names: str) -> JsonObject:
    """The fields of `source` that are not named."""
    return {name: value for name, value in source.items() if name not in names}


def loads(data: bytes, field_name: str) -> JsonObject:
    """The JSON object that a turn keeps in `field_name`. Raises Invalid INVALID_TURN: another client stored it."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as failure:
        invalid(field_name, f"is not JSON: {failure}")
    return expect(value, dict, field_name)  # type: ignore[no-any-return]


def merged(rendered: JsonObject, extra_json: bytes) -> JsonObject:
    """`rendered` with the fields of an `extra_json` laid over it, object into object."""
    if extra_json:
        _lay_over(rendered, loads(extra_json, "extra_json"))
    return rendered


def _lay_over(target: JsonObject, extra: JsonObject) -> None:
    for name, value in extra.items():
        if isinstance(value, dict) and isinstance(target.get(name), dict):
            _lay_over(target[name], value)
        else:
            target[name] = value


def opaque(origin: str, source: object) -> turn_pb2.Part:
    """A part that keeps `source` as JSON, for its own provider only."""
    return turn_pb2.Part(opaque=turn_pb2.OpaqueItem(origin=origin, data=dumps(source)))


def is_web_uri(value: object) -> bool:
    """Whether `value` is a URI that a provider can fetch."""
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def keep_whole_if_unequal(turn: turn_pb2.TurnInput, source: JsonObject, text: str, rendered: list[JsonObject]) -> None:
    """Put the whole source into `original_json` where the turn's fields could not give it back. text: its canonical."""
    if len(rendered) == 1 and canonical(rendered[0]) == text:
        return
    turn.message.original_json = dumps(source)
    # The whole says it all; saying it twice would be stored and sent for the life of the session.
    turn.message.ClearField("extra_json")
    for part in turn.message.parts:
        part.ClearField("extra_json")


@dataclass(frozen=True, slots=True)
class Inline:
    """Media that a message carries in itself. Exactly one of base64 and text is set."""

    media_type: str
    base64: str = ""
    text: str | None = None
    file_name: str = ""


def inline(item: turn_pb2.OpaqueItem) -> Inline | None:
    """The media of an opaque item of either format, so that the other can show it; None where it holds none."""
    provider, _, kind = item.origin.partition(".")
    if (provider, kind) not in {
        ("openai", "image_url"),
        ("openai", "file"),
        ("anthropic", "image"),
        ("anthropic", "document"),
    }:
        return None
    try:
        body = json.loads(item.data)
        if provider == "openai":
            if kind == "image_url":
                return _from_data_uri(body["image_url"]["url"], "")
            return _from_data_uri(body["file"]["file_data"], body["file"].get("filename") or "")
        source = body["source"]
        name = body.get("title") or ""
        if source["type"] == "base64":
            found = Inline(source["media_type"], base64=source["data"], file_name=name)
        elif source["type"] == "text":
            found = Inline("text/plain", text=source["data"], file_name=name)
        else:
            return None
    except (ValueError, KeyError, TypeError, AttributeError):
        # Stored by somebody else under our names; it passes through its own format and shows in no other.
        return None
    return found if isinstance(found.text or found.base64, str) and isinstance(found.media_type, str) else None


def _from_data_uri(uri: str, file_name: str) -> Inline | None:
    head, _, data = uri.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        return None
    return Inline(head.removeprefix("data:").removesuffix(";base64"), base64=data, file_name=file_name)


def stand_in(part: turn_pb2.Part) -> str:
    """Text for what can't be shown where it stands: an attachment's own text, else what it is."""
    if part.WhichOneof("kind") == "attachment":
        return part.attachment.alt_text or f"[attachment {part.attachment.uri}]"
    return f"[{part.opaque.origin} left out]"


# A part's place: index of its turn, index of the part in it.
Place = tuple[int, int]


@dataclass(slots=True)
class Pairs:
    """Which result answers which call, by the log's own rule."""

    call_of: dict[Place, Place] = field(default_factory=dict)
    unanswered: list[Place] = field(default_factory=list)


def paired(turns: Sequence[AnyTurn]) -> Pairs:
    """Pair each result with the nearest earlier unanswered call of its id; a user message without results ends them."""
    pairs = Pairs()
    open_calls: list[tuple[str, Place]] = []
    for at, turn in enumerate(turns):
        if turn.role == turn_pb2.ROLE_USER and not any(part.HasField("tool_result") for part in turn.message.parts):
            pairs.unanswered += [place for _, place in open_calls]
            open_calls.clear()
        for index, part in enumerate(turn.message.parts):
            if part.HasField("tool_call"):
                open_calls.append((part.tool_call.call_id, (at, index)))
            elif part.HasField("tool_result"):
                for back in range(len(open_calls) - 1, -1, -1):
                    if open_calls[back][0] == part.tool_result.call_id:
                        pairs.call_of[at, index] = open_calls.pop(back)[1]
                        break
    pairs.unanswered += [place for _, place in open_calls]
    pairs.unanswered.sort()
    return pairs


def with_calls_closed(turns: Sequence[AnyTurn], text: str) -> list[AnyTurn]:
    """The turns, with a result of `text` for each call that is never answered though other messages follow it.

    Such a result comes after the results that there are and before the first message that is more than results. Calls
    after which nothing else comes stay open: their tools may still be running. A result that comes late, after another
    assistant message, stays where it is.
    """
    unanswered: dict[int, list[turn_pb2.ToolCall]] = {}
    for at, index in paired(turns).unanswered:
        unanswered.setdefault(at, []).append(turns[at].message.parts[index].tool_call)
    closed: list[AnyTurn] = []
    pending: list[turn_pb2.ToolCall] = []
    for at, turn in enumerate(turns):
        if pending and not all(part.HasField("tool_result") for part in turn.message.parts):
            closed += [_result(call, text) for call in pending]
            pending = []
        closed.append(turn)
        pending += unanswered.get(at, [])
    return closed


def _result(call: turn_pb2.ToolCall, text: str) -> turn_pb2.TurnInput:
    result = turn_pb2.ToolResult(call_id=call.call_id, parts=[turn_pb2.Part(text=text)])
    # The legacy function call of OpenAI has no id; its result goes by the function's name.
    name = "" if call.call_id else call.name
    message = turn_pb2.Message(name=name, parts=[turn_pb2.Part(tool_result=result)])
    return turn_pb2.TurnInput(role=turn_pb2.ROLE_TOOL, message=message)
