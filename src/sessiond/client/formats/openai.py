"""OpenAI chat messages into turns and back: every JSON message that goes in comes out equal.

It never counts tokens (an image's are the caller's to declare, in the part's attachment), never calls OpenAI, and never
repairs a message.

How a message is kept: text, refusals, calls and results as parts; an image or file with a web URI as an attachment;
inline media, audio and unknown parts as opaque items with origin "openai.<type>"; fields without a place as
`extra_json`; and only where all of that does not give the message back equal, the whole of it as `original_json`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sessiond import errors
from sessiond.client.formats import pieces
from sessiond.client.formats.pieces import AnyTurn, JsonObject
from sessiond.v1 import context_pb2, turn_pb2

ROLES: dict[str, turn_pb2.Role] = {
    "system": turn_pb2.ROLE_SYSTEM,
    "developer": turn_pb2.ROLE_DEVELOPER,
    "user": turn_pb2.ROLE_USER,
    "assistant": turn_pb2.ROLE_ASSISTANT,
    "tool": turn_pb2.ROLE_TOOL,
    # Legacy. Such a result has no call id: it goes by the function's name.
    "function": turn_pb2.ROLE_TOOL,
}
ROLE_NAMES: dict[int, str] = {
    turn_pb2.ROLE_SYSTEM: "system",
    turn_pb2.ROLE_DEVELOPER: "developer",
    turn_pb2.ROLE_USER: "user",
    turn_pb2.ROLE_ASSISTANT: "assistant",
    turn_pb2.ROLE_TOOL: "tool",
}
# Audio that an assistant spoke is a field of the message, not a part of its content.
MESSAGE_AUDIO = "openai.message.audio"
PINS_TITLE = "Pinned facts:"
SUMMARY_TITLE = "Summary of the conversation so far:"
# What a failed tool that said nothing is given back as: this format has no field for failure.
SILENT_ERROR = "error"


def message_to_turn(
    msg: JsonObject,
    *,
    turn_id: str,
    status: turn_pb2.TurnStatus = turn_pb2.TURN_STATUS_COMPLETE,
    meta: turn_pb2.TurnMeta | None = None,
    path: str = "message",
) -> turn_pb2.TurnInput:
    """One chat message as a turn to append.

    status: how the message ended; kept for an assistant message only. path: how errors name the message, for example
    messages[3]. Raises Invalid: INVALID_TURN, EMPTY_TURN (nothing but a tool result may be empty) or INVALID_UTF8.
    """
    pieces.expect(msg, dict, path)
    text = pieces.check_json(msg, path)
    role_name = pieces.expect(msg.get("role"), str, f"{path}.role")
    if role_name not in ROLES:
        pieces.invalid(f"{path}.role", f"is {role_name!r}, not one of {', '.join(ROLES)}")
    role = ROLES[role_name]
    message = turn_pb2.Message(source_format=turn_pb2.SOURCE_FORMAT_OPENAI_CHAT)
    kept = ["role", "content"]
    # An empty name could not be told from none.
    if isinstance(msg.get("name"), str) and msg["name"]:
        message.name = msg["name"]
        kept.append("name")
    shape, content = _content_parts(msg, f"{path}.content")
    if role == turn_pb2.ROLE_TOOL:
        call_id = ""
        if role_name == "tool":
            call_id = pieces.expect(msg.get("tool_call_id"), str, f"{path}.tool_call_id")
            kept.append("tool_call_id")
        result = turn_pb2.ToolResult(call_id=call_id, parts=content, content_shape=shape)
        message.parts.add(tool_result=result)
    else:
        message.content_shape = shape
        message.parts.extend(content)
        if role == turn_pb2.ROLE_ASSISTANT:
            kept += _add_assistant_fields(message, msg, path)
        if not message.parts:
            if shape != turn_pb2.CONTENT_SHAPE_STRING:
                pieces.invalid(f"{path}.content", "the message says nothing", "EMPTY_TURN")
            message.parts.add(text="")
    extra = pieces.without(msg, *kept)
    if extra:
        message.extra_json = pieces.dumps(extra)
    turn = turn_pb2.TurnInput(turn_id=turn_id, role=role, message=message, meta=meta)
    if role == turn_pb2.ROLE_ASSISTANT:
        turn.status = status
    pieces.keep_whole_if_unequal(turn, msg, text, _render(turn))
    return turn


def turn_to_message(turn: AnyTurn) -> JsonObject:
    """The one chat message of a turn. Raises Invalid INVALID_TURN where the turn is none, or several."""
    messages = turn_to_messages(turn)
    if len(messages) != 1:
        raise errors.Invalid(
            "INVALID_TURN", f"The turn makes {len(messages)} OpenAI messages, not one.", remedy="Use turn_to_messages."
        )
    return messages[0]


def turn_to_messages(turn: AnyTurn) -> list[JsonObject]:
    """A turn as chat messages, in order.

    One message gives back one, equal to its source if that was of this format. An Anthropic message with tool results
    gives one per result, then one for the rest. A summary gives a system message; other kinds of turn give none. An
    item that only another provider understands is left out of an assistant message, and named in its place elsewhere.
    """
    if turn.HasField("summary"):
        return [_summary(turn)]
    if not turn.HasField("message"):
        return []
    if turn.message.source_format == turn_pb2.SOURCE_FORMAT_OPENAI_CHAT and turn.message.original_json:
        return [pieces.loads(turn.message.original_json, "original_json")]
    return _render(turn)


def context_to_messages(ctx: context_pb2.ActiveContext, *, close_unanswered: str | None = None) -> list[JsonObject]:
    """An active context as the messages of a chat completion, most stable first.

    close_unanswered: the text of a tool result to insert for each call that was never answered although messages
    follow it, which OpenAI refuses; None leaves such calls alone. Raises Invalid INVALID_CONTEXT for a context that
    says only that nothing changed.
    """
    if ctx.not_modified:
        raise errors.Invalid(
            "INVALID_CONTEXT", "The context says that it was not modified.", remedy="Render the context that you hold."
        )
    messages: list[JsonObject] = []
    if ctx.given_instructions:
        messages.append({"role": "system", "content": ctx.given_instructions})
    elif ctx.HasField("instructions"):
        messages += turn_to_messages(ctx.instructions)
    if ctx.pins:
        facts = [f"- {pin.key}: {pin.value}" for pin in ctx.pins]
        messages.append({"role": "system", "content": "\n".join([PINS_TITLE, *facts])})
    for summary in ctx.summaries:
        messages += turn_to_messages(summary)
    turns: list[AnyTurn] = list(ctx.turns)
    if ctx.HasField("new_message"):
        turns.append(turn_pb2.TurnInput(role=turn_pb2.ROLE_USER, message=ctx.new_message))
    if close_unanswered is not None:
        turns = pieces.with_calls_closed(turns, close_unanswered)
    last = turn_to_messages(turns.pop()) if ctx.HasField("new_message") else []
    messages += [message for turn in turns for message in turn_to_messages(turn)]
    if ctx.recalled.text:
        # Not between a call and its results, should the new message hold some.
        results = [message for message in last if message["role"] in ("tool", "function")]
        messages += results
        messages.append({"role": "system", "content": ctx.recalled.text})
        last = last[len(results) :]
    return messages + last


# --- from a message


def _content_parts(msg: JsonObject, path: str) -> tuple[turn_pb2.ContentShape, list[turn_pb2.Part]]:
    if "content" not in msg:
        return turn_pb2.CONTENT_SHAPE_ABSENT, []
    content = msg["content"]
    if content is None:
        return turn_pb2.CONTENT_SHAPE_NULL, []
    if isinstance(content, str):
        return turn_pb2.CONTENT_SHAPE_STRING, [turn_pb2.Part(text=content)] if content else []
    if not isinstance(content, list):
        pieces.invalid(path, "must be a string, a list of parts or null")
    return turn_pb2.CONTENT_SHAPE_LIST, [_content_part(part, f"{path}[{at}]") for at, part in enumerate(content)]


def _content_part(source: JsonObject, path: str) -> turn_pb2.Part:
    pieces.expect(source, dict, path)
    kind = pieces.expect(source.get("type"), str, f"{path}.type")
    body = source.get(kind)
    if kind in ("text", "refusal"):
        pieces.expect(body, str, f"{path}.{kind}")
        part = turn_pb2.Part(text=body) if kind == "text" else turn_pb2.Part(refusal=body)
        extra = pieces.without(source, "type", kind)
    elif kind == "image_url" and isinstance(body, dict) and pieces.is_web_uri(body.get("url")):
        part = turn_pb2.Part(attachment=turn_pb2.Attachment(uri=body["url"], media_type=pieces.ANY_IMAGE))
        extra = _extra_around(source, kind, "url")
    elif kind == "file" and isinstance(body, dict) and pieces.is_web_uri(body.get("file_data")):
        part = turn_pb2.Part(attachment=turn_pb2.Attachment(uri=body["file_data"]))
        extra = _extra_around(source, kind, "file_data")
    else:
        return pieces.opaque(f"openai.{kind}", source)
    if extra:
        part.extra_json = pieces.dumps(extra)
    return part


def _extra_around(source: JsonObject, kind: str, *names: str) -> JsonObject:
    """What is left of a source whose body stands under its kind: fields beside the body, and in it."""
    extra = pieces.without(source, "type", kind)
    inner = pieces.without(source[kind], *names)
    return extra | {kind: inner} if inner else extra


def _add_assistant_fields(message: turn_pb2.Message, msg: JsonObject, path: str) -> list[str]:
    """Add what only an assistant message has, in the order in which it is rendered; return the fields that are kept."""
    kept: list[str] = []
    if isinstance(msg.get("refusal"), str):
        message.parts.add(refusal=msg["refusal"])
        kept.append("refusal")
    if isinstance(msg.get("audio"), dict):
        message.parts.append(pieces.opaque(MESSAGE_AUDIO, msg["audio"]))
        kept.append("audio")
    if msg.get("function_call") is not None:
        call = pieces.expect(msg["function_call"], dict, f"{path}.function_call")
        part = _call(call, "", "arguments", f"{path}.function_call")
        extra = pieces.without(call, "name", "arguments")
        if extra:
            part.extra_json = pieces.dumps(extra)
        message.parts.append(part)
        kept.append("function_call")
    if msg.get("tool_calls"):
        calls = pieces.expect(msg["tool_calls"], list, f"{path}.tool_calls")
        message.parts.extend(_tool_call(call, f"{path}.tool_calls[{at}]") for at, call in enumerate(calls))
        kept.append("tool_calls")
    return kept


def _tool_call(source: JsonObject, path: str) -> turn_pb2.Part:
    pieces.expect(source, dict, path)
    kind = pieces.expect(source.get("type", "function"), str, f"{path}.type")
    call_id = "" if source.get("id") is None else pieces.expect(source["id"], str, f"{path}.id")
    if kind not in ("function", "custom"):
        # A kind of call that came after this was written. It pairs like any other, and the message is kept whole.
        body = pieces.dumps(source.get(kind, {})).decode()
        return turn_pb2.Part(tool_call=turn_pb2.ToolCall(call_id=call_id, name=kind, arguments=body))
    body = pieces.expect(source.get(kind), dict, f"{path}.{kind}")
    arguments = "arguments" if kind == "function" else "input"
    part = _call(body, call_id, arguments, f"{path}.{kind}")
    extra = pieces.without(_extra_around(source, kind, "name", arguments), "id")
    if kind == "custom":
        extra["type"] = kind
    if extra:
        part.extra_json = pieces.dumps(extra)
    return part


def _call(body: JsonObject, call_id: str, arguments_name: str, path: str) -> turn_pb2.Part:
    name = pieces.expect(body.get("name"), str, f"{path}.name")
    arguments = body.get(arguments_name, "")
    if not isinstance(arguments, str):
        # Some servers send the object itself. The tokens are the same; the message is kept whole.
        arguments = pieces.dumps(arguments).decode()
    return turn_pb2.Part(tool_call=turn_pb2.ToolCall(call_id=call_id, name=name, arguments=arguments))


# --- to a message


def _summary(turn: AnyTurn) -> JsonObject:
    return {"role": "system", "content": f"{SUMMARY_TITLE}\n{turn.summary.text}"}


def _render(turn: AnyTurn) -> list[JsonObject]:
    """The messages of a message turn, from its fields alone."""
    message = turn.message
    own = message.source_format == turn_pb2.SOURCE_FORMAT_OPENAI_CHAT
    messages = [
        _render_result(part.tool_result, message.name, own) for part in message.parts if part.HasField("tool_result")
    ]
    rest = [part for part in message.parts if not part.HasField("tool_result")]
    if rest or not messages:
        messages += _render_rest(turn.role, message, rest, own)
    if own and len(messages) == 1:
        pieces.merged(messages[0], message.extra_json)
    return messages


def _render_result(result: turn_pb2.ToolResult, name: str, own: bool) -> JsonObject:
    # Without a call id it is the legacy function's; see ROLES.
    legacy = bool(name) and not result.call_id
    rendered: JsonObject = {"role": "function"} if legacy else {"role": "tool", "tool_call_id": result.call_id}
    if name and (own or legacy):
        rendered["name"] = name
    if own:
        _set_own_content(rendered, result.content_shape, result.parts)
    else:
        texts = [_as_text(part) for part in result.parts]
        if result.is_error and not any(texts):
            texts = [SILENT_ERROR]
        rendered["content"] = _string_or_text_parts(texts)
    return rendered


def _render_rest(role: int, message: turn_pb2.Message, parts: Sequence[turn_pb2.Part], own: bool) -> list[JsonObject]:
    # What is not a result can't stand in a tool message.
    role_name = "user" if role == turn_pb2.ROLE_TOOL else ROLE_NAMES.get(role, "user")
    rendered: JsonObject = {"role": role_name}
    if message.name and message.source_format != turn_pb2.SOURCE_FORMAT_ANTHROPIC:
        rendered["name"] = message.name
    if role_name != "assistant":
        if own:
            _set_own_content(rendered, message.content_shape, parts)
        else:
            rendered["content"] = _foreign_content(parts, role_name)
        return [rendered]
    said, refusals, calls, audio = _assistant_pieces(parts, message.content_shape, own)
    if own:
        _set_own_content(rendered, message.content_shape, said)
    else:
        texts = [part.text for part in said]
        rendered["content"] = _string_or_text_parts(texts) if texts else None
    if refusals:
        rendered["refusal"] = "".join(refusals)
    if audio:
        rendered["audio"] = audio[-1]
    for part in calls:
        call = _render_call(part, own)
        if part.tool_call.call_id:
            rendered.setdefault("tool_calls", []).append(call)
        else:
            rendered["function_call"] = call
    if not own and rendered["content"] is None and len(rendered) == 2 and "name" not in rendered:
        # All of it was another provider's; an empty message would be refused.
        return []
    return [rendered]


def _assistant_pieces(
    parts: Sequence[turn_pb2.Part], shape: int, own: bool
) -> tuple[list[turn_pb2.Part], list[str], list[turn_pb2.Part], list[JsonObject]]:
    """An assistant's parts by the field that they stand in: content, refusal, calls, audio."""
    said: list[turn_pb2.Part] = []
    refusals: list[str] = []
    calls: list[turn_pb2.Part] = []
    audio: list[JsonObject] = []
    in_list = shape == turn_pb2.CONTENT_SHAPE_LIST
    for part in parts:
        kind = part.WhichOneof("kind")
        if kind == "tool_call":
            calls.append(part)
        elif kind == "refusal" and not (own and in_list):
            refusals.append(part.refusal)
        elif kind == "opaque" and own and part.opaque.origin == MESSAGE_AUDIO:
            audio.append(pieces.loads(part.opaque.data, "opaque.data"))
        elif own or kind == "text":
            said.append(part)
        elif kind == "attachment":
            said.append(turn_pb2.Part(text=pieces.stand_in(part)))
    return said, refusals, calls, audio


def _set_own_content(rendered: JsonObject, shape: int, parts: Sequence[turn_pb2.Part]) -> None:
    """Set the content as the source wrote it, from parts that came from this format."""
    if shape == turn_pb2.CONTENT_SHAPE_NULL:
        rendered["content"] = None
    elif shape == turn_pb2.CONTENT_SHAPE_LIST:
        rendered["content"] = [_render_own_part(part) for part in parts]
    elif shape != turn_pb2.CONTENT_SHAPE_ABSENT:
        rendered["content"] = "".join(_as_text(part) for part in parts)


def _render_own_part(part: turn_pb2.Part) -> JsonObject:
    kind = part.WhichOneof("kind")
    if kind == "opaque":
        return pieces.loads(part.opaque.data, "opaque.data")
    rendered: JsonObject
    if kind == "attachment" and part.attachment.media_type.startswith("image/"):
        rendered = {"type": "image_url", "image_url": {"url": part.attachment.uri}}
    elif kind == "attachment":
        rendered = {"type": "file", "file": {"file_data": part.attachment.uri}}
    elif kind == "refusal":
        rendered = {"type": "refusal", "refusal": part.refusal}
    else:
        rendered = {"type": "text", "text": part.text}
    return pieces.merged(rendered, part.extra_json)


def _render_call(part: turn_pb2.Part, own: bool) -> JsonObject:
    call = part.tool_call
    function: JsonObject = {"name": call.name, "arguments": call.arguments}
    extra = pieces.loads(part.extra_json, "extra_json") if own and part.extra_json else {}
    if not call.call_id:
        return function | extra
    if extra.get("type") == "custom":
        rendered: JsonObject = {"id": call.call_id, "type": "custom"}
        rendered["custom"] = {"name": call.name, "input": call.arguments}
    else:
        rendered = {"id": call.call_id, "type": "function", "function": function}
    return pieces.merged(rendered, part.extra_json) if extra else rendered


def _foreign_content(parts: Sequence[turn_pb2.Part], role_name: str) -> str | list[JsonObject]:
    if role_name != "user" or all(part.HasField("text") for part in parts):
        return _string_or_text_parts([_as_text(part) for part in parts])
    return [_foreign_part(part) for part in parts]


def _foreign_part(part: turn_pb2.Part) -> JsonObject:
    """A part of a user message that came from elsewhere, where an image may stand."""
    if part.HasField("attachment"):
        attachment = part.attachment
        if attachment.media_type.startswith("image/") and pieces.is_web_uri(attachment.uri):
            return {"type": "image_url", "image_url": {"url": attachment.uri}}
    elif part.HasField("opaque"):
        media = pieces.inline(part.opaque)
        if media and media.base64:
            uri = f"data:{media.media_type};base64,{media.base64}"
            if media.media_type.startswith("image/"):
                return {"type": "image_url", "image_url": {"url": uri}}
            # OpenAI refuses a file without a name.
            return {"type": "file", "file": {"filename": media.file_name or "document.pdf", "file_data": uri}}
    return {"type": "text", "text": _as_text(part)}


def _as_text(part: turn_pb2.Part) -> str:
    kind = part.WhichOneof("kind")
    if kind == "text":
        return part.text
    if kind == "refusal":
        return part.refusal
    if kind == "opaque":
        media = pieces.inline(part.opaque)
        if media and media.text is not None:
            return media.text
    return pieces.stand_in(part)


def _string_or_text_parts(texts: list[str]) -> str | list[JsonObject]:
    if len(texts) > 1:
        return [{"type": "text", "text": text} for text in texts]
    return "".join(texts)
