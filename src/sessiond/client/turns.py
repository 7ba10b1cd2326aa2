"""Turns to append, made by hand or from other formats; each gets its turn_id here, once, so that a retry is safe.

Nothing here calls a daemon or counts a token. A turn that was made is sent again as it is, never made again.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, Final, TypedDict, Unpack

from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper

from sessiond.client.formats import anthropic, openai
from sessiond.errors import Invalid
from sessiond.v1 import turn_pb2

Content = str | Iterable[turn_pb2.Part]
ToolCalls = Iterable[turn_pb2.ToolCall | tuple[str, str, str]]
AnyUsage = turn_pb2.Usage | Mapping[str, Any]
# Anything that stands for a turn: what the functions below return, or an OpenAI chat message.
TurnLike = turn_pb2.TurnInput | Mapping[str, Any]
_MILLISECONDS_MAX: Final = 2**32 - 1


class Meta(TypedDict, total=False):
    """What a caller may say about a turn besides its content, by the names of TurnMeta."""

    device_id: str
    model: str
    provider: str
    usage: AnyUsage
    time_to_first_token_ms: int
    created_at_unix_ms: int
    traceparent: str
    labels: Mapping[str, str]


def mint() -> str:
    """A turn_id that nobody has used."""
    return str(uuid.uuid4())


def system(content: Content, *, turn_id: str = "", **meta: Unpack[Meta]) -> turn_pb2.TurnInput:
    """Instructions; the newest system turn of a session is in force."""
    return _message(turn_pb2.ROLE_SYSTEM, content, "", turn_id, meta)


def user(content: Content, *, name: str = "", turn_id: str = "", **meta: Unpack[Meta]) -> turn_pb2.TurnInput:
    """What the person said."""
    return _message(turn_pb2.ROLE_USER, content, name, turn_id, meta)


def assistant(
    content: Content = "",
    *,
    tool_calls: ToolCalls = (),
    status: str | int = "COMPLETE",
    tokens: Mapping[str, int] | None = None,
    name: str = "",
    turn_id: str = "",
    **meta: Unpack[Meta],
) -> turn_pb2.TurnInput:
    """What the model answered.

    tool_calls: ToolCalls, or (call_id, name, arguments as JSON text). status: COMPLETE, INTERRUPTED or CANCELLED.
    tokens: counts of the whole turn that the caller vouches for, by encoding, as in {"o200k_base": 12}.
    """
    turn = _message(turn_pb2.ROLE_ASSISTANT, content, name, turn_id, meta)
    for call in tool_calls:
        if not isinstance(call, turn_pb2.ToolCall):
            call_id, function, arguments = call
            call = turn_pb2.ToolCall(call_id=call_id, name=function, arguments=arguments)
        turn.message.parts.add(tool_call=call)
    turn.status = enum(turn_pb2.TurnStatus, status, "status")  # type: ignore[assignment]
    for encoding, count in (tokens or {}).items():
        turn.supplied_tokens.add(
            encoding=enum(turn_pb2.Encoding, encoding, "tokens"),
            tokens=count,
        )
    return turn


def tool_result(
    call_id: str,
    content: Content = "",
    *,
    is_error: bool = False,
    name: str = "",
    turn_id: str = "",
    **meta: Unpack[Meta],
) -> turn_pb2.TurnInput:
    """A tool's answer to a call; it may be empty."""
    result = turn_pb2.ToolResult(call_id=call_id, parts=_parts(content), is_error=is_error)
    return _message(turn_pb2.ROLE_TOOL, [turn_pb2.Part(tool_result=result)], name, turn_id, meta)


def summary(
    text: str,
    through: turn_pb2.Turn,
    *,
    first_seq: int = 1,
    model: str = "",
    usage: AnyUsage | None = None,
    turn_id: str = "",
) -> turn_pb2.TurnInput:
    """A summary of the turns from first_seq through a turn, as that turn came from the daemon."""
    body = turn_pb2.Summary(
        text=text,
        covered=turn_pb2.SeqRange(first_seq=first_seq, last_seq=through.seq),
        covered_chain=through.chain,
        source=turn_pb2.SUMMARY_SOURCE_GATEWAY,
        model=model,
        usage=usage_proto(usage) if usage is not None else None,
    )
    return turn_pb2.TurnInput(turn_id=turn_id or mint(), summary=body)


def rewind(to_seq: int, reason: str | int = "EDIT", *, turn_id: str = "") -> turn_pb2.TurnInput:
    """Supersede every turn after to_seq. reason: EDIT, REGENERATE or UNDO."""
    number = enum(turn_pb2.RewindReason, reason, "reason")
    body = turn_pb2.Rewind(to_seq=to_seq, reason=number)  # type: ignore[arg-type]
    return turn_pb2.TurnInput(turn_id=turn_id or mint(), rewind=body)


def milestone(label: str, note: str = "", *, turn_id: str = "") -> turn_pb2.TurnInput:
    """A named point in the conversation, which takes a checkpoint."""
    return turn_pb2.TurnInput(turn_id=turn_id or mint(), milestone=turn_pb2.Milestone(label=label, note=note))


def state_change(
    *,
    flags: Mapping[str, bool] | None = None,
    mode: str | None = None,
    metadata: Mapping[str, str] | None = None,
    metadata_removed: Iterable[str] = (),
    pins: Mapping[str, str] | None = None,
    pins_removed: Iterable[str] = (),
    policy: turn_pb2.SessionPolicy | Mapping[str, Any] | None = None,
    turn_id: str = "",
) -> turn_pb2.TurnInput:
    """A change of the session's state; what is not named stays. A flag set to False is removed, mode "" is cleared."""
    change = turn_pb2.StateChange(
        flags=flags or {},
        mode=mode,
        metadata=metadata or {},
        metadata_removed=metadata_removed,
        pins=[turn_pb2.PinnedFact(key=key, value=value) for key, value in (pins or {}).items()],
        pins_removed=pins_removed,
        policy=policy_proto(policy),
    )
    return turn_pb2.TurnInput(turn_id=turn_id or mint(), state=change)


def from_openai(message: Mapping[str, Any], *, turn_id: str = "", **meta: Unpack[Meta]) -> turn_pb2.TurnInput:
    """An OpenAI chat message, kept without loss. Raises Invalid, naming the field."""
    return openai.message_to_turn(dict(message), turn_id=turn_id or mint(), meta=_meta(meta))


def from_anthropic(message: Mapping[str, Any], *, turn_id: str = "", **meta: Unpack[Meta]) -> turn_pb2.TurnInput:
    """A message of Anthropic's Messages API, kept without loss. Raises Invalid, naming the field."""
    return anthropic.message_to_turn(dict(message), turn_id=turn_id or mint(), meta=_meta(meta))


def again(turn: turn_pb2.Turn) -> turn_pb2.TurnInput:
    """A turn as it came from the daemon, to be appended again under its own turn_id: to the daemon, the same one."""
    made = turn_pb2.TurnInput(turn_id=turn.turn_id, role=turn.role, status=turn.status)
    which = turn.WhichOneof("body")
    if which is not None:
        getattr(made, which).CopyFrom(getattr(turn, which))
    for encoding, count in ((turn_pb2.ENCODING_O200K_BASE, turn.o200k), (turn_pb2.ENCODING_CL100K_BASE, turn.cl100k)):
        if count.source == turn_pb2.TOKEN_SOURCE_SUPPLIED:
            made.supplied_tokens.add(encoding=encoding, tokens=count.tokens)
    made.meta.CopyFrom(turn.meta)
    if not made.meta.created_at_unix_ms:
        # It is appended now and was made then.
        made.meta.created_at_unix_ms = turn.append_time_unix_ms
    return made


def to_turns(turns: TurnLike | Iterable[TurnLike]) -> list[turn_pb2.TurnInput]:
    """Turns as they are sent. A turn without a turn_id is given one in place, so that sending it again is a retry."""
    if isinstance(turns, (turn_pb2.TurnInput, Mapping)):
        turns = [turns]
    made: list[turn_pb2.TurnInput] = []
    for index, turn in enumerate(turns):
        if isinstance(turn, Mapping):
            turn = openai.message_to_turn(dict(turn), turn_id=mint(), path=f"turns[{index}]")
        elif not isinstance(turn, turn_pb2.TurnInput):
            raise TypeError(f"turns[{index}] is a {type(turn).__name__}, not a TurnInput or an OpenAI chat message")
        if not turn.turn_id:
            turn.turn_id = mint()
        made.append(turn)
    return made


def to_message(message: str | Mapping[str, Any] | turn_pb2.Message) -> turn_pb2.Message:
    """A user's message that is not appended: text, an OpenAI chat message, or a Message."""
    if isinstance(message, turn_pb2.Message):
        return message
    if isinstance(message, str):
        return turn_pb2.Message(parts=[turn_pb2.Part(text=message)])
    return openai.message_to_turn(dict(message), turn_id="", path="new_message").message


def policy_proto(policy: turn_pb2.SessionPolicy | Mapping[str, Any] | None) -> turn_pb2.SessionPolicy | None:
    """A policy from the names of its fields; enums by name or number."""
    if policy is None or isinstance(policy, turn_pb2.SessionPolicy):
        return policy
    values = dict(policy)
    for name, kind in (
        ("min_durability", turn_pb2.Durability),
        ("strategy", turn_pb2.Strategy),
        ("encoding", turn_pb2.Encoding),
    ):
        if name in values:
            values[name] = enum(kind, values[name], f"policy.{name}")
    if isinstance(values.get("expiry"), Mapping):
        expiry = dict(values["expiry"])
        if "mode" in expiry:
            expiry["mode"] = enum(turn_pb2.ExpiryMode, expiry["mode"], "policy.expiry.mode")
        if "action" in expiry:
            expiry["action"] = enum(turn_pb2.ExpiryAction, expiry["action"], "policy.expiry.action")
        values["expiry"] = expiry
    try:
        return turn_pb2.SessionPolicy(**values)
    except (TypeError, ValueError) as failure:
        raise Invalid("INVALID_POLICY", f"policy: {failure}.", fields=[("policy", str(failure))]) from failure


def usage_proto(usage: AnyUsage) -> turn_pb2.Usage:
    """What a call used, by the names of Usage, of an OpenAI completion or of an Anthropic message."""
    if isinstance(usage, turn_pb2.Usage):
        return usage
    cached = _number(usage, "cached_tokens") or _number(usage.get("prompt_tokens_details"), "cached_tokens")
    prompt = _number(usage, "prompt_tokens")
    if "input_tokens" in usage:
        # Anthropic's input_tokens are those that the cache neither gave nor took.
        cached = _number(usage, "cache_read_input_tokens")
        prompt = _number(usage, "input_tokens") + cached + _number(usage, "cache_creation_input_tokens")
    return turn_pb2.Usage(
        prompt_tokens=prompt,
        cached_tokens=cached,
        output_tokens=_number(usage, "output_tokens") or _number(usage, "completion_tokens"),
        cost_usd_micros=_number(usage, "cost_usd_micros"),
    )


def enum(kind: EnumTypeWrapper, value: str | int, field: str) -> int:
    """The number of an enum's value, given its number or its name with or without the enum's own prefix.

    Raises Invalid INVALID_CONTEXT.
    """
    if isinstance(value, int):
        return value
    prefix = str(kind.Name(0)).removesuffix("UNSPECIFIED")
    for name, number in kind.items():
        if value.upper() in (name, str(name).removeprefix(prefix)):
            return int(number)
    names = ", ".join(str(name).removeprefix(prefix) for name in kind.keys()[1:])
    what = f"{value!r} is none of {names}"
    raise Invalid("INVALID_CONTEXT", f"{field}: {what}.", fields=[(field, what)])


def _number(usage: Any, name: str) -> int:
    return int(usage.get(name) or 0) if isinstance(usage, Mapping) else 0


def _message(role: turn_pb2.Role, content: Content, name: str, turn_id: str, meta: Meta) -> turn_pb2.TurnInput:
    message = turn_pb2.Message(name=name, parts=_parts(content))
    return turn_pb2.TurnInput(turn_id=turn_id or mint(), role=role, message=message, meta=_meta(meta))


def _parts(content: Content) -> list[turn_pb2.Part]:
    if isinstance(content, str):
        return [turn_pb2.Part(text=content)] if content else []
    return list(content)


def _meta(meta: Meta) -> turn_pb2.TurnMeta | None:
    if not meta:
        return None
    values: dict[str, Any] = dict(meta)
    if "usage" in values:
        values["usage"] = usage_proto(values["usage"])
    if "time_to_first_token_ms" in values:
        values["time_to_first_token_ms"] = min(int(values["time_to_first_token_ms"]), _MILLISECONDS_MAX)
    return turn_pb2.TurnMeta(**values)
