"""Checks of what callers send, and the work on a turn that needs no lock: its body, its digest, its token counts.

It promises that whatever it refuses names the field and the remedy. It reads no store and changes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from google.protobuf.message import Message as ProtoMessage

from sessiond import core
from sessiond.core import rules, tool_events
from sessiond.core.expiry import TTL_MS_MAX
from sessiond.core.layout import (
    BODY_MESSAGE,
    BODY_MILESTONE,
    BODY_REWIND,
    BODY_SUMMARY,
    BODY_TURN_ID,
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_REWIND,
    KIND_STATE,
    KIND_SUMMARY,
)
from sessiond.errors import Invalid, Unimplemented
from sessiond.tiers.hot.log import FLAGS_MAX, METADATA_BYTES_MAX, METADATA_PAIRS_MAX, PINS_MAX, PreparedTurn
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2, turn_pb2

TURNS_MAX: Final = 256
CHAIN_BYTES: Final = 16
TURN_ID_BYTES_MAX: Final = 128
USER_ID_BYTES_MAX: Final = 256
PARTS_MAX: Final = 1024
LABELS_MAX: Final = 32
LABEL_BYTES_MAX: Final = 1024
PIN_KEY_BYTES_MAX: Final = 64
PIN_VALUE_BYTES_MAX: Final = 2048
MILESTONE_BYTES_MAX: Final = 128
FLAG_BYTES_MAX: Final = 64
CALL_ID_BYTES_MAX: Final = 512
MODE_BYTES_MAX: Final = 128
LAST_EXCHANGES_MAX: Final = 100_000
BUDGET_TOKENS_MAX: Final = 2**31 - 1

_SESSION_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_KINDS: Final = {
    "message": KIND_MESSAGE,
    "summary": KIND_SUMMARY,
    "state": KIND_STATE,
    "milestone": KIND_MILESTONE,
    "rewind": KIND_REWIND,
}
# Where a frame's body has what was said, by the names of a request.
_BODY_FIELDS: Final = {
    "message": BODY_MESSAGE,
    "summary": BODY_SUMMARY,
    "milestone": BODY_MILESTONE,
    "rewind": BODY_REWIND,
}
_ROLES: Final = frozenset(turn_pb2.Role.values()) - {turn_pb2.ROLE_UNSPECIFIED}
_STATUSES: Final = frozenset(turn_pb2.TurnStatus.values())
_ENCODINGS: Final = (turn_pb2.ENCODING_O200K_BASE, turn_pb2.ENCODING_CL100K_BASE)
SLOTS: Final[dict[int, int]] = {turn_pb2.ENCODING_O200K_BASE: 0, turn_pb2.ENCODING_CL100K_BASE: 1}
_ROLES_WITH_STATUS: Final = (turn_pb2.ROLE_ASSISTANT,)
SERVED_STRATEGIES: Final = (turn_pb2.STRATEGY_FULL, turn_pb2.STRATEGY_LAST_N, turn_pb2.STRATEGY_HYBRID)


def invalid(reason: str, field: str, what: str, **metadata: str) -> Invalid:
    """A refusal of one field."""
    return Invalid(reason, f"{field}: {what}.", {"field": field, **metadata}, [(field, what)])


@contextmanager
def _naming(field: str) -> Iterator[None]:
    """What refuses a text without knowing whose it is gets the field's name."""
    try:
        yield
    except Invalid as refused:
        refused.fields = refused.fields or [(field, refused.message)]
        raise


def check_session_id(session_id: str, field: str = "session_id") -> str:
    """The id, if it is one. Raises Invalid INVALID_SESSION_ID."""
    if not _SESSION_ID.fullmatch(session_id):
        size = len(session_id.encode())
        what = "it is missing" if not session_id else f"{size} bytes" if size > 128 else f"{session_id!r} is malformed"
        raise invalid("INVALID_SESSION_ID", field, what)
    return session_id


def check_user_id(user_id: str, field: str = "user_id") -> str:
    """The id, if it is one. Raises Invalid INVALID_USER_ID."""
    if len(user_id.encode()) > USER_ID_BYTES_MAX:
        raise invalid("INVALID_USER_ID", field, f"{len(user_id.encode())} bytes, over the limit of {USER_ID_BYTES_MAX}")
    if not user_id.isprintable():
        raise invalid("INVALID_USER_ID", field, "it has control characters")
    return user_id


def check_position(position: turn_pb2.TurnPosition, field: str) -> turn_pb2.TurnPosition:
    """The position, if its chain may be one. Raises Invalid INVALID_CONTEXT."""
    if len(position.chain) not in (0, CHAIN_BYTES):
        what = f"{len(position.chain)} bytes; a chain has {CHAIN_BYTES}, and may be left out"
        raise invalid("INVALID_CONTEXT", f"{field}.chain", what)
    return position


def check_turn_id(turn_id: str, field: str) -> str:
    """The id, if it is one. Raises Invalid INVALID_TURN_ID."""
    size = len(turn_id.encode())
    if not 1 <= size <= TURN_ID_BYTES_MAX:
        what = "it is missing" if not size else f"{size} bytes, over the limit of {TURN_ID_BYTES_MAX}"
        raise invalid("INVALID_TURN_ID", field, what)
    return turn_id


def check_metadata(metadata: dict[str, str], field: str, reason: str = "INVALID_STATE_CHANGE") -> dict[str, str]:
    """The metadata, if it is within its limits."""
    size = sum(len(key.encode()) + len(value.encode()) for key, value in metadata.items())
    if len(metadata) > METADATA_PAIRS_MAX or size > METADATA_BYTES_MAX:
        what = f"{len(metadata)} pairs of {size} bytes; the limits are {METADATA_PAIRS_MAX} and {METADATA_BYTES_MAX}"
        raise invalid(reason, field, what)
    if "" in metadata:
        raise invalid(reason, field, "a key is empty")
    return metadata


def check_policy(policy: turn_pb2.SessionPolicy, field: str = "policy") -> dict[str, Any]:
    """A policy as it is stored: only what was said. Raises Invalid INVALID_POLICY, Unimplemented."""
    if policy.min_durability not in (0, turn_pb2.DURABILITY_EDGE, turn_pb2.DURABILITY_CLOUD):
        raise invalid("INVALID_POLICY", f"{field}.min_durability", f"{policy.min_durability} is no durability")
    if policy.strategy:
        _check_strategy(policy.strategy, f"{field}.strategy", "INVALID_POLICY")
    if policy.encoding not in (0, *_ENCODINGS):
        raise invalid("INVALID_POLICY", f"{field}.encoding", f"{policy.encoding} is no encoding")
    if policy.budget_tokens > BUDGET_TOKENS_MAX:
        raise invalid("INVALID_POLICY", f"{field}.budget_tokens", f"it is above {BUDGET_TOKENS_MAX}")
    names = ("min_durability", "strategy", "encoding", "budget_tokens", "pins_budget_tokens")
    checked: dict[str, Any] = {name: getattr(policy, name) for name in names if getattr(policy, name)}
    expiry = _check_expiry(policy.expiry, f"{field}.expiry")
    if expiry:
        checked["expiry"] = expiry
    return checked


def _check_expiry(expiry: turn_pb2.Expiry, field: str) -> dict[str, int]:
    """An expiry as it is stored, with what was not said filled in; empty for none. Raises Invalid INVALID_POLICY."""
    if expiry.mode not in turn_pb2.ExpiryMode.values():
        raise invalid("INVALID_POLICY", f"{field}.mode", f"{expiry.mode} is no mode")
    if expiry.action not in turn_pb2.ExpiryAction.values():
        raise invalid("INVALID_POLICY", f"{field}.action", f"{expiry.action} is no action")
    if expiry.ttl_ms > TTL_MS_MAX:
        raise invalid("INVALID_POLICY", f"{field}.ttl_ms", f"{expiry.ttl_ms} is above {TTL_MS_MAX}; 0 is for ever")
    if not expiry.ttl_ms:
        if expiry.mode or expiry.action:
            raise invalid("INVALID_POLICY", f"{field}.ttl_ms", "it is 0, so that mode and action mean nothing")
        return {}
    mode = expiry.mode or turn_pb2.EXPIRY_MODE_SLIDING
    return {"ttl_ms": expiry.ttl_ms, "mode": mode, "action": expiry.action or turn_pb2.EXPIRY_ACTION_ARCHIVE}


def policy_proto(policy: dict[str, Any]) -> turn_pb2.SessionPolicy:
    """A stored policy as the wire has it."""
    known = {field.name for field in turn_pb2.SessionPolicy.DESCRIPTOR.fields}
    return turn_pb2.SessionPolicy(**{key: value for key, value in policy.items() if key in known})


def _check_strategy(strategy: int, field: str, reason: str) -> None:
    if strategy in (turn_pb2.STRATEGY_SUMMARY, turn_pb2.STRATEGY_RECALL):
        name = turn_pb2.Strategy.Name(strategy)
        raise Unimplemented(
            "NOT_SERVED_YET",
            f"{name} is part of the contract but not served by this release; use STRATEGY_HYBRID.",
            fields=[(field, f"{name} is not served yet")],
        )
    if strategy not in SERVED_STRATEGIES:
        raise invalid(reason, field, f"{strategy} is no strategy")


class Spec:
    """A checked ContextSpec: every default resolved, everything counted."""

    __slots__ = (
        "budget",
        "encoding",
        "given_instructions",
        "instructions_tokens",
        "key",
        "last_exchanges",
        "new_message",
        "new_tokens",
        "proto",
        "reserve",
        "since",
        "slot",
        "strategy",
    )

    def __init__(
        self,
        proto: context_pb2.ContextSpec,
        policy: dict[str, Any],
        tokenizer: Tokenizer,
        default_budget: int,
        field: str,
    ) -> None:
        """Raises Invalid INVALID_BUDGET or INVALID_CONTEXT, TOKENIZER_FAILED, Unimplemented."""
        self.proto = proto
        self.budget = proto.budget_tokens or int(policy.get("budget_tokens", 0)) or default_budget
        self.reserve = proto.reserve_tokens
        if not 0 < self.budget <= BUDGET_TOKENS_MAX:
            raise invalid(
                "INVALID_BUDGET", f"{field}.budget_tokens", f"{self.budget} is outside 1..{BUDGET_TOKENS_MAX}"
            )
        if self.reserve >= self.budget:
            what = f"{self.reserve} leaves nothing of the budget of {self.budget}"
            raise invalid("INVALID_BUDGET", f"{field}.reserve_tokens", what)
        self.strategy = proto.strategy or int(policy.get("strategy", 0)) or turn_pb2.STRATEGY_HYBRID
        _check_strategy(self.strategy, f"{field}.strategy", "INVALID_CONTEXT")
        self.encoding = proto.encoding or int(policy.get("encoding", 0)) or turn_pb2.ENCODING_O200K_BASE
        if self.encoding not in SLOTS:
            raise invalid("INVALID_CONTEXT", f"{field}.encoding", f"{self.encoding} is no encoding")
        self.slot = SLOTS[self.encoding]
        self.last_exchanges = 0
        if self.strategy == turn_pb2.STRATEGY_LAST_N:
            self.last_exchanges = proto.last_exchanges
            if not 1 <= self.last_exchanges <= LAST_EXCHANGES_MAX:
                what = f"LAST_N needs 1 to {LAST_EXCHANGES_MAX}, not {self.last_exchanges}"
                raise invalid("INVALID_CONTEXT", f"{field}.last_exchanges", what)
        check_position(proto.since, f"{field}.since")
        self.since = proto.since if proto.HasField("since") and proto.since.seq else None
        self.given_instructions = proto.instructions if proto.HasField("instructions") else None
        self.instructions_tokens = 0
        if self.given_instructions is not None:
            with _naming(f"{field}.instructions"):
                self.instructions_tokens = tokenizer.count_summary(self.given_instructions, self.encoding)
        self.new_message = None
        self.new_tokens = 0
        if proto.HasField("new_message"):
            self.new_message = proto.new_message
            _check_message(proto.new_message, turn_pb2.ROLE_USER, f"{field}.new_message", "INVALID_CONTEXT")
            with _naming(f"{field}.new_message"):
                self.new_tokens = tokenizer.count_message(proto.new_message, self.encoding)
        inputs = b"" if self.given_instructions is None else b"\x01" + self.given_instructions.encode()
        if self.new_message is not None:
            inputs += b"\x02" + self.new_message.SerializeToString(deterministic=True)
        numbers = (self.budget, self.reserve, self.strategy, self.encoding, self.last_exchanges)
        self.key = b"".join(number.to_bytes(4, "little") for number in numbers) + inputs


def _check_call_id(call_id: str, field: str, reason: str) -> None:
    # Calls that wait for a result stand in the state, which every append writes.
    if len(call_id.encode()) > CALL_ID_BYTES_MAX:
        raise invalid(reason, field, f"{len(call_id.encode())} bytes, over the limit of {CALL_ID_BYTES_MAX}")


def _check_json(raw: bytes, field: str, reason: str) -> None:
    """Raises Invalid if the bytes are there and are no JSON object: no client could give the message back then."""
    if not raw:
        return
    try:
        if isinstance(json.loads(raw), dict):
            return
    except (ValueError, RecursionError):
        pass
    raise invalid(reason, field, "it is no JSON object")


def _check_message(message: turn_pb2.Message, role: int, field: str, reason: str = "INVALID_TURN") -> None:
    if len(message.parts) > PARTS_MAX:
        raise invalid(reason, f"{field}.parts", f"{len(message.parts)} parts, over the limit of {PARTS_MAX}")
    for name, raw in (("extra_json", message.extra_json), ("original_json", message.original_json)):
        if raw:
            _check_json(raw, f"{field}.{name}", reason)
    has_content = False
    for index, part in enumerate(message.parts):
        kind = part.WhichOneof("kind")
        if kind == "text" and role != turn_pb2.ROLE_TOOL and not part.extra_json:
            has_content = has_content or bool(part.text)
            continue
        where = f"{field}.parts[{index}]"
        _check_json(part.extra_json, f"{where}.extra_json", reason)
        if kind is None:
            raise invalid(reason, where, "no kind of part is set")
        if kind == "tool_call":
            if role != turn_pb2.ROLE_ASSISTANT:
                raise invalid(reason, f"{where}.tool_call", "only an assistant turn calls tools")
            if not part.tool_call.name:
                raise invalid(reason, f"{where}.tool_call.name", "it is missing")
            _check_call_id(part.tool_call.call_id, f"{where}.tool_call.call_id", reason)
            has_content = True
        elif kind == "tool_result":
            if role not in (turn_pb2.ROLE_TOOL, turn_pb2.ROLE_USER):
                raise invalid(reason, f"{where}.tool_result", "only a tool or user turn answers calls")
            _check_call_id(part.tool_result.call_id, f"{where}.tool_result.call_id", reason)
            for inner, piece in enumerate(part.tool_result.parts):
                if piece.WhichOneof("kind") in (None, "tool_call", "tool_result"):
                    raise invalid(
                        reason, f"{where}.tool_result.parts[{inner}]", "a result holds text, attachments, items"
                    )
            has_content = True
        elif role == turn_pb2.ROLE_TOOL:
            raise invalid(reason, where, "a tool turn holds tool results only")
        elif kind == "attachment":
            if not part.attachment.uri:
                raise invalid(reason, f"{where}.attachment.uri", "it is missing")
            if len(part.attachment.sha256) not in (0, 32):
                raise invalid(reason, f"{where}.attachment.sha256", f"{len(part.attachment.sha256)} bytes, not 32")
            has_content = True
        elif kind == "opaque":
            has_content = has_content or bool(part.opaque.data)
        else:
            has_content = has_content or bool(part.text or part.refusal)
    if not has_content:
        raise invalid("EMPTY_TURN", f"{field}.parts", "there is no content at all")


def _check_meta(meta: turn_pb2.TurnMeta, field: str) -> None:
    """Raises Invalid if there are too many labels, or too long ones."""
    if len(meta.labels) > LABELS_MAX:
        raise invalid("INVALID_TURN", f"{field}.labels", f"{len(meta.labels)} labels, over the limit of {LABELS_MAX}")
    for key, value in meta.labels.items():
        if len(key.encode()) + len(value.encode()) > LABEL_BYTES_MAX:
            raise invalid("INVALID_TURN", f"{field}.labels", f"a label is over the limit of {LABEL_BYTES_MAX} bytes")


def _check_change(change: turn_pb2.StateChange, field: str) -> None:
    names = ("flags", "metadata", "metadata_removed", "pins", "pins_removed")
    if (
        not any(getattr(change, name) for name in names)
        and not change.HasField("mode")
        and not change.HasField("policy")
    ):
        raise invalid("EMPTY_TURN", field, "it changes nothing")
    check_metadata(dict(change.metadata), f"{field}.metadata")
    if len(change.flags) > FLAGS_MAX or "" in change.flags:
        raise invalid("INVALID_STATE_CHANGE", f"{field}.flags", f"more than {FLAGS_MAX} flags, or an empty name")
    if any(len(name.encode()) > FLAG_BYTES_MAX for name in change.flags):
        raise invalid("INVALID_STATE_CHANGE", f"{field}.flags", f"a name is over the limit of {FLAG_BYTES_MAX} bytes")
    if len(change.mode.encode()) > MODE_BYTES_MAX:
        raise invalid("INVALID_STATE_CHANGE", f"{field}.mode", f"over the limit of {MODE_BYTES_MAX} bytes")
    seen = set()
    for index, pin in enumerate(change.pins):
        where = f"{field}.pins[{index}]"
        if not 1 <= len(pin.key.encode()) <= PIN_KEY_BYTES_MAX:
            raise invalid("INVALID_STATE_CHANGE", f"{where}.key", f"1 to {PIN_KEY_BYTES_MAX} bytes are needed")
        if len(pin.value.encode()) > PIN_VALUE_BYTES_MAX:
            raise invalid("INVALID_STATE_CHANGE", f"{where}.value", f"over the limit of {PIN_VALUE_BYTES_MAX} bytes")
        if pin.scope == turn_pb2.PIN_SCOPE_USER:
            raise Unimplemented(
                "NOT_SERVED_YET", "Facts of a user are not served by this release.", fields=[(f"{where}.scope", "")]
            )
        if pin.scope not in turn_pb2.PinScope.values():
            raise invalid("INVALID_STATE_CHANGE", f"{where}.scope", f"{pin.scope} is no scope")
        if pin.key in seen:
            raise invalid("INVALID_STATE_CHANGE", f"{where}.key", f"{pin.key!r} is pinned twice")
        seen.add(pin.key)
    if len(change.pins) > PINS_MAX:
        raise invalid("INVALID_STATE_CHANGE", f"{field}.pins", f"over the limit of {PINS_MAX}")


def _counts(turn: turn_pb2.TurnInput, prefix: str) -> dict[int, int]:
    supplied: dict[int, int] = {}
    for index, count in enumerate(turn.supplied_tokens):
        where = f"{prefix}supplied_tokens[{index}].encoding"
        if count.encoding not in SLOTS:
            raise invalid("INVALID_TURN", where, f"{count.encoding} is no encoding")
        if count.encoding in supplied:
            raise invalid("INVALID_TURN", where, "it is named twice")
        supplied[int(count.encoding)] = count.tokens
    return supplied


def prepare_turn(
    turn: turn_pb2.TurnInput, hash_key: bytes, tokenizer: Tokenizer, bytes_max: int, field: str, body_field: str = ""
) -> PreparedTurn:
    """A turn with everything done that needs no lock. Raises Invalid, naming `field` and what is below it.

    field: empty where the request is the turn itself; body_field then names its body.
    """
    prefix = f"{field}." if field else ""
    check_turn_id(turn.turn_id, f"{prefix}turn_id")
    which = turn.WhichOneof("body")
    if which is None:
        raise invalid("EMPTY_TURN", field, "no body is set: message, summary, state, milestone or rewind")
    where = body_field or f"{prefix}{which}"
    size = turn.ByteSize()
    if size > bytes_max:
        what = f"{size} bytes, over the limit of {bytes_max}"
        raise invalid("TURN_TOO_LARGE", field or where, what, turn_id=turn.turn_id, limit_bytes=str(bytes_max))
    kind = _KINDS[which]
    role, status = turn.role, turn.status
    prepared = PreparedTurn(turn.turn_id, kind, role, 0, b"", b"", (0, 0, 0), (0, 0, 0))
    prepared.id_field, prepared.body_field = f"{prefix}turn_id", where
    supplied = _counts(turn, prefix) if turn.supplied_tokens else {}
    if kind == KIND_MESSAGE:
        if role not in _ROLES:
            raise invalid("INVALID_TURN", f"{prefix}role", "a message needs a role")
        if status not in _STATUSES or (status and role not in _ROLES_WITH_STATUS):
            raise invalid("INVALID_TURN", f"{prefix}status", "only an assistant turn has a status")
        _check_message(turn.message, role, where)
        prepared.status = (status or turn_pb2.TURN_STATUS_COMPLETE) if role in _ROLES_WITH_STATUS else 0
    elif role or status:
        raise invalid("INVALID_TURN", f"{prefix}role", f"a {which} has no role and no status")
    elif kind == KIND_SUMMARY:
        covered = turn.summary.covered
        if not turn.summary.text:
            raise invalid("EMPTY_TURN", f"{where}.text", "it is missing")
        if not 1 <= covered.first_seq <= covered.last_seq:
            raise invalid("INVALID_TURN", f"{where}.covered", "first_seq and last_seq must name turns")
        if len(turn.summary.covered_chain) != CHAIN_BYTES:
            raise invalid(
                "INVALID_TURN",
                f"{where}.covered_chain",
                f"{CHAIN_BYTES} bytes are needed, from the covered turn's chain",
            )
        prepared.summary = (covered.first_seq, covered.last_seq, turn.summary.covered_chain)
    elif kind == KIND_STATE:
        _check_change(turn.state, where)
        if turn.state.HasField("policy"):
            prepared.policy = check_policy(turn.state.policy, f"{where}.policy")
        prepared.pins_removed = list(turn.state.pins_removed)
    elif kind == KIND_MILESTONE:
        if not 1 <= len(turn.milestone.label.encode()) <= MILESTONE_BYTES_MAX:
            raise invalid("INVALID_TURN", f"{where}.label", f"1 to {MILESTONE_BYTES_MAX} bytes are needed")
    else:
        prepared.rewind_to = turn.rewind.to_seq
    if turn.HasField("meta"):
        _check_meta(turn.meta, f"{prefix}meta")

    part: ProtoMessage = getattr(turn, which)
    if kind == KIND_STATE:
        changed = turn_pb2.Turn(turn_id=turn.turn_id, state=turn.state)
        for pin in changed.state.pins:
            pin.ClearField("scope")
            pin.ClearField("set_at")
        prepared.body = changed.SerializeToString(deterministic=True)
    else:
        # A body that is there and says nothing is there all the same.
        said = part.SerializeToString(deterministic=True)
        prepared.body = core.encode_message((BODY_TURN_ID, turn.turn_id, _BODY_FIELDS[which], said or ()))
    # What a caller says about a turn may differ from one try to the next; what the turn says may not.
    prepared.digest = rules.body_digest(hash_key, kind, role, prepared.status, prepared.body)
    if turn.HasField("meta"):
        prepared.body += turn_pb2.Turn(meta=turn.meta).SerializeToString(deterministic=True)
    if kind == KIND_MESSAGE:
        prepared.events = tool_events(prepared.body)
    try:
        _count_turn(prepared, turn, supplied, tokenizer)
    except Invalid as refused:
        refused.fields = refused.fields or [(where, refused.message)]
        raise
    return prepared


def _count_turn(
    prepared: PreparedTurn, turn: turn_pb2.TurnInput, supplied: dict[int, int], tokenizer: Tokenizer
) -> None:
    tokens, sources = [0, 0, 0], [0, 0, 0]
    pins: dict[str, list[int]] = {}
    if prepared.kind == KIND_STATE:
        pins = {pin.key: [0, 0, 0] for pin in turn.state.pins}
    for encoding, slot in SLOTS.items():
        for pin in turn.state.pins if pins else ():
            pins[pin.key][slot] = tokenizer.count_pin(pin.key, pin.value, encoding)
        if prepared.kind == KIND_MESSAGE and encoding in supplied:
            tokens[slot], sources[slot] = supplied[encoding], turn_pb2.TOKEN_SOURCE_SUPPLIED
            continue
        if prepared.kind == KIND_MESSAGE:
            tokens[slot] = tokenizer.count_message(turn.message, encoding)
        elif prepared.kind == KIND_SUMMARY:
            tokens[slot] = supplied.get(encoding) or tokenizer.count_summary(turn.summary.text, encoding)
        else:
            tokens[slot] = sum(counts[slot] for counts in pins.values())
        sources[slot] = turn_pb2.TOKEN_SOURCE_COUNTED
    if max(tokens) > BUDGET_TOKENS_MAX:
        what = f"{max(tokens)} tokens; no budget is above {BUDGET_TOKENS_MAX}"
        raise invalid("INVALID_TURN", prepared.body_field, what, turn_id=prepared.turn_id)
    prepared.tokens = (tokens[0], tokens[1], tokens[2])
    prepared.sources = (sources[0], sources[1], sources[2])
    prepared.pins = pins


def prepare_turns(
    turns: Sequence[turn_pb2.TurnInput], hash_key: bytes, tokenizer: Tokenizer, bytes_max: int, field: str = "turns"
) -> list[PreparedTurn]:
    """Every turn of an append. Raises Invalid; also where two turns of one call share a turn_id."""
    if not 1 <= len(turns) <= TURNS_MAX:
        raise invalid("NO_TURNS", field, f"{len(turns)} turns; 1 to {TURNS_MAX} are needed")
    prepared = [
        prepare_turn(turn, hash_key, tokenizer, bytes_max, f"{field}[{index}]") for index, turn in enumerate(turns)
    ]
    seen: set[str] = set()
    for index, turn in enumerate(prepared):
        if turn.turn_id in seen:
            raise invalid("INVALID_TURN_ID", f"{field}[{index}].turn_id", f"{turn.turn_id!r} stands twice in one call")
        seen.add(turn.turn_id)
    return prepared
