"""Anthropic messages into turns and back: every JSON message that goes in comes out equal.

It never counts tokens (an image's are the caller's to declare, in the part's attachment), never calls Anthropic, and
never sets a cache breakpoint: the receipt says where they belong.

How a message is kept: text, tool_use and tool_result blocks as parts; an image or document with a web URL as an
attachment; every other block as an opaque item with origin "anthropic.<type>"; fields without a place as `extra_json`;
and only where all of that does not give the message back equal, the whole of it as `original_json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from sessiond import errors
from sessiond.client.formats import pieces
from sessiond.client.formats.pieces import AnyTurn, JsonObject
from sessiond.v1 import context_pb2, turn_pb2

ROLES: dict[str, turn_pb2.Role] = {"user": turn_pb2.ROLE_USER, "assistant": turn_pb2.ROLE_ASSISTANT}
INSTRUCTIONS = (turn_pb2.ROLE_SYSTEM, turn_pb2.ROLE_DEVELOPER)
PINS_TITLE = "Pinned facts:"
SUMMARY_TITLE = "Summary of the conversation so far:"
# A window may start with an assistant message; Anthropic wants a user message first.
OPENING_TEXT = "[The conversation began earlier.]"
PDF = "application/pdf"
# What the API takes as a base64 image; any other inline medium is named in text.
IMAGE_MEDIA_TYPES = frozenset({"image/jpeg", "image/png", "image/gif", "image/webp"})


def message_to_turn(
    msg: JsonObject,
    *,
    turn_id: str,
    status: turn_pb2.TurnStatus = turn_pb2.TURN_STATUS_COMPLETE,
    meta: turn_pb2.TurnMeta | None = None,
    path: str = "message",
) -> turn_pb2.TurnInput:
    """One message of the Messages API, sent or received, as a turn to append.

    status: how the message ended; kept for an assistant message only. path: how errors name the message, for example
    messages[3]. Raises Invalid: INVALID_TURN, EMPTY_TURN (nothing but a tool result may be empty) or INVALID_UTF8.
    """
    pieces.expect(msg, dict, path)
    text = pieces.check_json(msg, path)
    role_name = pieces.expect(msg.get("role"), str, f"{path}.role")
    if role_name not in ROLES:
        pieces.invalid(f"{path}.role", f"is {role_name!r}, not user or assistant; see system_to_turn for instructions")
    turn = _turn(ROLES[role_name], msg.get("content"), turn_id, meta, f"{path}.content")
    extra = pieces.without(msg, "role", "content")
    if extra:
        turn.message.extra_json = pieces.dumps(extra)
    if turn.role == turn_pb2.ROLE_ASSISTANT:
        turn.status = status
    pieces.keep_whole_if_unequal(turn, msg, text, [_render_own(turn, role_name)])
    return turn


def system_to_turn(
    system: str | list[JsonObject], *, turn_id: str, meta: turn_pb2.TurnMeta | None = None, path: str = "system"
) -> turn_pb2.TurnInput:
    """The `system` of a request, a string or a list of text blocks, as a turn of instructions.

    Raises Invalid as message_to_turn does.
    """
    pieces.check_json(system, path)
    turn = _turn(turn_pb2.ROLE_SYSTEM, system, turn_id, meta, path)
    for at, part in enumerate(turn.message.parts):
        if not part.HasField("text"):
            pieces.invalid(f"{path}[{at}].type", "must be text")
    return turn


def turn_to_message(turn: AnyTurn) -> JsonObject:
    """The one message of a turn. Raises Invalid INVALID_TURN where it makes none, as instructions and summaries do."""
    messages = turn_to_messages(turn)
    if not messages:
        raise errors.Invalid(
            "INVALID_TURN",
            "The turn makes no Anthropic message.",
            remedy="Give instructions and summaries as `system`.",
        )
    return messages[0]


def turn_to_messages(turn: AnyTurn) -> list[JsonObject]:
    """A turn as at most one message, equal to its source if that was of this format.

    Tool messages become user messages. System and developer turns, and turns that are no message, give none. An item
    that only another provider understands is left out of an assistant message, and named in its place elsewhere.
    """
    if not turn.HasField("message") or turn.role in INSTRUCTIONS:
        return []
    role_name = _role_name(turn)
    if turn.message.source_format == turn_pb2.SOURCE_FORMAT_ANTHROPIC:
        if turn.message.original_json:
            return [pieces.loads(turn.message.original_json, "original_json")]
        return [_render_own(turn, role_name)]
    blocks = _blocks(turn, {})
    return [{"role": role_name, "content": _string_or_blocks(blocks)}] if blocks else []


def context_to_anthropic(ctx: context_pb2.ActiveContext, *, close_unanswered: str | None = None) -> JsonObject:
    """An active context as {"system": text blocks, "messages": ...}, most stable first; "system" only if there is any.

    The messages alternate and start with a user message; neighbours of one role are one message; tool results stand
    first in it. What the API refuses in a request is left out: empty text, fields of a received message beside its
    role and content, and the cache_control of earlier requests. A call id that it would refuse, or that a window holds
    twice, is replaced in the call and its result.

    close_unanswered: the text of a tool result to insert for each call that was never answered although messages
    follow it; None leaves such calls alone, and the API refuses them. Raises Invalid INVALID_CONTEXT for a context
    that says only that nothing changed.
    """
    if ctx.not_modified:
        raise errors.Invalid(
            "INVALID_CONTEXT", "The context says that it was not modified.", remedy="Render the context that you hold."
        )
    turns: list[AnyTurn] = list(ctx.turns)
    if ctx.HasField("new_message"):
        turns.append(turn_pb2.TurnInput(role=turn_pb2.ROLE_USER, message=ctx.new_message))
    if close_unanswered is not None:
        turns = pieces.with_calls_closed(turns, close_unanswered)
    ids = _call_ids(turns)
    rendered = [(_role_name(turn), _blocks(turn, ids.get(at, {}))) for at, turn in enumerate(turns) if _is_said(turn)]
    if ctx.recalled.text:
        # Before the new message; results in that one come first all the same, once both are one user message.
        before = len(rendered) - 1 if ctx.HasField("new_message") else len(rendered)
        rendered.insert(before, ("user", [{"type": "text", "text": ctx.recalled.text}]))
    context: JsonObject = {"messages": _alternating(rendered)}
    system = _system(ctx)
    return {"system": system} | context if system else context


# --- from a message


def _turn(
    role: turn_pb2.Role, content: object, turn_id: str, meta: turn_pb2.TurnMeta | None, path: str
) -> turn_pb2.TurnInput:
    message = turn_pb2.Message(source_format=turn_pb2.SOURCE_FORMAT_ANTHROPIC)
    if isinstance(content, str):
        message.content_shape = turn_pb2.CONTENT_SHAPE_STRING
        message.parts.add(text=content)
    elif content is not None:
        message.content_shape = turn_pb2.CONTENT_SHAPE_LIST
        blocks = pieces.expect(content, list, path)
        message.parts.extend(_part(block, f"{path}[{at}]", inside_result=False) for at, block in enumerate(blocks))
    if not message.parts:
        pieces.invalid(path, "the message says nothing", "EMPTY_TURN")
    return turn_pb2.TurnInput(turn_id=turn_id, role=role, message=message, meta=meta)


def _part(block: JsonObject, path: str, *, inside_result: bool) -> turn_pb2.Part:
    pieces.expect(block, dict, path)
    kind = pieces.expect(block.get("type"), str, f"{path}.type")
    source = block.get("source")
    if kind == "text":
        part = turn_pb2.Part(text=pieces.expect(block.get("text"), str, f"{path}.text"))
        extra = pieces.without(block, "type", "text")
    elif kind == "tool_use" and not inside_result:
        part = turn_pb2.Part(
            tool_call=turn_pb2.ToolCall(
                call_id=pieces.expect(block.get("id"), str, f"{path}.id"),
                name=pieces.expect(block.get("name"), str, f"{path}.name"),
                arguments=pieces.dumps(block.get("input", {})).decode(),
            )
        )
        extra = pieces.without(block, "type", "id", "name", "input")
    elif kind == "tool_result" and not inside_result:
        part, extra = _result_part(block, path)
    elif (
        kind in ("image", "document")
        and isinstance(source, dict)
        and source.get("type") == "url"
        and pieces.is_web_uri(source.get("url"))
    ):
        media_type = pieces.ANY_IMAGE if kind == "image" else PDF
        part = turn_pb2.Part(attachment=turn_pb2.Attachment(uri=source["url"], media_type=media_type))
        extra = pieces.without(block, "type", "source")
        inner = pieces.without(source, "type", "url")
        if inner:
            extra["source"] = inner
    else:
        return pieces.opaque(f"anthropic.{kind}", block)
    if extra:
        part.extra_json = pieces.dumps(extra)
    return part


def _result_part(block: JsonObject, path: str) -> tuple[turn_pb2.Part, JsonObject]:
    content = block.get("content")
    result = turn_pb2.ToolResult(
        call_id=pieces.expect(block.get("tool_use_id"), str, f"{path}.tool_use_id"),
        is_error=block.get("is_error") is True,
        content_shape=turn_pb2.CONTENT_SHAPE_NULL if "content" in block else turn_pb2.CONTENT_SHAPE_ABSENT,
    )
    if isinstance(content, str):
        result.content_shape = turn_pb2.CONTENT_SHAPE_STRING
        if content:
            result.parts.add(text=content)
    elif content is not None:
        result.content_shape = turn_pb2.CONTENT_SHAPE_LIST
        blocks = pieces.expect(content, list, f"{path}.content")
        inner = f"{path}.content"
        result.parts.extend(_part(item, f"{inner}[{at}]", inside_result=True) for at, item in enumerate(blocks))
    extra = pieces.without(block, "type", "tool_use_id", "content")
    if result.is_error:
        del extra["is_error"]
    return turn_pb2.Part(tool_result=result), extra


# --- to a message


def _role_name(turn: AnyTurn) -> str:
    return "assistant" if turn.role == turn_pb2.ROLE_ASSISTANT else "user"


def _is_said(turn: AnyTurn) -> bool:
    return turn.HasField("message") and turn.role not in INSTRUCTIONS


def _render_own(turn: AnyTurn, role_name: str) -> JsonObject:
    """The message of a turn that came from this format, from its fields alone."""
    message = turn.message
    content: str | list[JsonObject]
    if message.content_shape == turn_pb2.CONTENT_SHAPE_STRING:
        content = "".join(part.text for part in message.parts)
    else:
        content = [_own_block(part, part.tool_call.call_id or part.tool_result.call_id) for part in message.parts]
    return pieces.merged({"role": role_name, "content": content}, message.extra_json)


def _own_block(part: turn_pb2.Part, call_id: str) -> JsonObject:
    kind = part.WhichOneof("kind")
    if kind == "opaque":
        return pieces.loads(part.opaque.data, "opaque.data")
    block: JsonObject
    if kind == "tool_call":
        block = _tool_use(part.tool_call, call_id)
    elif kind == "tool_result":
        result = part.tool_result
        block = {"type": "tool_result", "tool_use_id": call_id}
        if result.content_shape == turn_pb2.CONTENT_SHAPE_STRING:
            block["content"] = "".join(inner.text for inner in result.parts)
        elif result.content_shape == turn_pb2.CONTENT_SHAPE_NULL:
            block["content"] = None
        elif result.content_shape != turn_pb2.CONTENT_SHAPE_ABSENT:
            block["content"] = [_own_block(inner, "") for inner in result.parts]
        if result.is_error:
            block["is_error"] = True
    elif kind == "attachment":
        block = _url_block(part.attachment)
    else:
        block = {"type": "text", "text": part.text or part.refusal}
    return pieces.merged(block, part.extra_json)


def _url_block(attachment: turn_pb2.Attachment) -> JsonObject:
    kind = "image" if attachment.media_type.startswith("image/") else "document"
    return {"type": kind, "source": {"type": "url", "url": attachment.uri}}


def _tool_use(call: turn_pb2.ToolCall, call_id: str) -> JsonObject:
    try:
        arguments = json.loads(call.arguments) if call.arguments else {}
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        # Free text of a custom tool, or a stream that broke off: the API takes an object only.
        arguments = {"input": call.arguments}
    return {"type": "tool_use", "id": call_id, "name": call.name, "input": arguments}


def _blocks(turn: AnyTurn, ids: dict[int, str]) -> list[JsonObject]:
    """A turn's blocks as a request may hold them. ids: what stands for the call id of the part at an index."""
    own = turn.message.source_format == turn_pb2.SOURCE_FORMAT_ANTHROPIC
    assistant = turn.role == turn_pb2.ROLE_ASSISTANT
    blocks: list[JsonObject] = []
    for at, part in enumerate(turn.message.parts):
        call_id = ids.get(at) or part.tool_call.call_id or part.tool_result.call_id
        block = _own_block(part, call_id) if own else _foreign_block(part, call_id, assistant=assistant)
        if block is not None:
            blocks.append(block)
    return _acceptable(blocks)


def _acceptable(blocks: Iterable[JsonObject]) -> list[JsonObject]:
    """The blocks without what the API refuses: text of nothing but whitespace, and more cache breakpoints than four."""
    kept: list[JsonObject] = []
    for source in blocks:
        block = pieces.without(source, "cache_control")
        if block.get("type") == "text" and not str(block.get("text", "")).strip():
            continue
        if block.get("type") == "tool_result" and isinstance(block.get("content"), list):
            block["content"] = _acceptable(block["content"])
        kept.append(block)
    return kept


def _foreign_block(part: turn_pb2.Part, call_id: str, *, assistant: bool) -> JsonObject | None:
    """A part that came from elsewhere; None where it is another provider's own and an assistant message holds it."""
    kind = part.WhichOneof("kind")
    if kind == "tool_call":
        return _tool_use(part.tool_call, call_id)
    if kind == "tool_result":
        result = part.tool_result
        block: JsonObject = {"type": "tool_result", "tool_use_id": call_id}
        inner = [_foreign_block(item, "", assistant=False) for item in result.parts]
        blocks = [item for item in inner if item is not None]
        if blocks:
            block["content"] = _string_or_blocks(blocks)
        if result.is_error:
            block["is_error"] = True
        return block
    if kind == "attachment" and not assistant and pieces.is_web_uri(part.attachment.uri):
        if part.attachment.media_type.startswith("image/") or part.attachment.media_type == PDF:
            return _url_block(part.attachment)
    elif kind == "opaque":
        media = None if assistant else pieces.inline(part.opaque)
        if media is not None and media.base64 and media.media_type in IMAGE_MEDIA_TYPES | {PDF}:
            source = {"type": "base64", "media_type": media.media_type, "data": media.base64}
            return {"type": "document" if media.media_type == PDF else "image", "source": source}
        if assistant:
            return None
    elif kind in ("text", "refusal"):
        return {"type": "text", "text": part.text or part.refusal}
    return {"type": "text", "text": pieces.stand_in(part)}


def _string_or_blocks(blocks: list[JsonObject]) -> str | list[JsonObject]:
    if len(blocks) == 1 and set(blocks[0]) == {"type", "text"}:
        return str(blocks[0]["text"])
    return blocks


def _call_ids(turns: Sequence[AnyTurn]) -> dict[int, dict[int, str]]:
    """Per turn and part, a call id that the API takes: letters, digits, _ and -, no two calls of a request alike."""
    calls: dict[pieces.Place, str] = {}
    used: set[str] = set()
    ids: dict[int, dict[int, str]] = {}
    answers = pieces.paired(turns).call_of
    for at, turn in enumerate(turns):
        for index, part in enumerate(turn.message.parts):
            if part.HasField("tool_call"):
                plain = re.sub(r"[^a-zA-Z0-9_-]", "_", part.tool_call.call_id) or "call"
                unique, n = plain, 1
                while unique in used:
                    n += 1
                    unique = f"{plain}_{n}"
                used.add(unique)
                calls[at, index] = unique
                ids.setdefault(at, {})[index] = unique
            elif (at, index) in answers:
                ids.setdefault(at, {})[index] = calls[answers[at, index]]
    return ids


def _alternating(rendered: Iterable[tuple[str, list[JsonObject]]]) -> list[JsonObject]:
    groups: list[tuple[str, list[JsonObject]]] = []
    for role_name, blocks in rendered:
        if not blocks:
            continue
        if not groups and role_name != "user":
            groups.append(("user", [{"type": "text", "text": OPENING_TEXT}]))
        if groups and groups[-1][0] == role_name:
            groups[-1][1].extend(blocks)
        else:
            groups.append((role_name, list(blocks)))
    return [
        {
            "role": role_name,
            # Stable, so that results and the rest each keep their order.
            "content": _string_or_blocks(sorted(blocks, key=lambda block: block["type"] != "tool_result")),
        }
        for role_name, blocks in groups
    ]


def _system(ctx: context_pb2.ActiveContext) -> list[JsonObject]:
    texts: list[str] = []
    if ctx.given_instructions:
        texts.append(ctx.given_instructions)
    elif ctx.HasField("instructions"):
        texts += [block["text"] for block in _blocks(ctx.instructions, {}) if block["type"] == "text"]
    if ctx.pins:
        texts.append("\n".join([PINS_TITLE, *(f"- {pin.key}: {pin.value}" for pin in ctx.pins)]))
    texts += [f"{SUMMARY_TITLE}\n{turn.summary.text}" for turn in ctx.summaries]
    return [{"type": "text", "text": text} for text in texts if text.strip()]
