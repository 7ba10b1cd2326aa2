"""What a turn does when it is appended: its flags, its links, its frame. Pure functions of state and turn.

They never look at a clock or a store; what they decide is written into the frame, and `invariants` re-derives it.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

from sessiond.core.layout import (
    FLAG_APPLIES,
    FLAG_BOUNDARY,
    FLAG_CALLS,
    FLAG_CUT,
    FLAG_EXCHANGE,
    FLAG_INSTRUCTIONS,
    FLAG_RESULTS,
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_REWIND,
    KIND_SUMMARY,
    OPEN_CALLS_MAX,
    ROLE_ASSISTANT,
    ROLE_DEVELOPER,
    ROLE_SYSTEM,
    ROLE_USER,
    STATUS_CANCELLED,
    STATUS_INTERRUPTED,
    SUMMARIES_MAX,
)
from sessiond.errors import Exhausted, Invalid

# How ids of sessions begin that callers can't name: theirs begin with a letter or digit.
HIDDEN: Final = "~"


def without_field(message: bytes, number: int) -> bytes:
    """A protobuf message without its length-delimited fields of this number; everything else to the byte."""
    kept, at = bytearray(), 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            _, at = _varint(message, at)
        elif tag & 7 == 2:
            size, at = _varint(message, at)
            at += size
        else:
            at += 8 if tag & 7 == 1 else 4
        if tag != number << 3 | 2:
            kept += message[start:at]
    return bytes(kept)


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
    return value, at


def session_hash(hash_key: bytes, tenant: str, session_id: str) -> bytes:
    """16 bytes that name a session in every key of both tiers. hash_key: 16 to 64 bytes."""
    name = tenant.encode()
    data = len(name).to_bytes(2, "big") + name + session_id.encode()
    return hashlib.blake2b(data, digest_size=16, key=hash_key, person=b"session").digest()


class SessionHasher:
    """session_hash for many sessions of one tenant."""

    def __init__(self, hash_key: bytes, tenant: str) -> None:
        name = tenant.encode()
        prefix = len(name).to_bytes(2, "big") + name
        self._begun = hashlib.blake2b(prefix, digest_size=16, key=hash_key, person=b"session")

    def __call__(self, session_id: str) -> bytes:
        """The session's hash."""
        hasher = self._begun.copy()
        hasher.update(session_id.encode())
        return hasher.digest()


def user_session(user_id: str) -> str:
    """The id of the hidden session that holds what belongs to a user and to no conversation; no caller can send it."""
    return f"{HIDDEN}user/{user_id}"


def is_hidden(session_id: str) -> bool:
    """Whether a session is no conversation: it stands in no index, is never listed and never expires."""
    return session_id.startswith(HIDDEN)


def body_digest(hash_key: bytes, kind: int, role: int, status: int, body: bytes) -> bytes:
    """16 bytes over what was received for a turn; body without the daemon's field 27."""
    return hashlib.blake2b(bytes((kind, role, status)) + body, digest_size=16, key=hash_key).digest()


def next_chain(chain: bytes, digest: bytes) -> bytes:
    """The chain after a turn with this digest."""
    return hashlib.blake2b(chain + digest, digest_size=16).digest()


def turn_id_hash(session_hash_: bytes, turn_id: str) -> bytes:
    """8 bytes that stand for a turn_id in the dedupe rows; a match is confirmed on the turn itself."""
    return hashlib.blake2b(turn_id.encode(), digest_size=8, key=session_hash_).digest()


def is_live(kind: int, role: int) -> bool:
    """Whether a turn is a message that a window may hold."""
    return kind == KIND_MESSAGE and role not in (ROLE_SYSTEM, ROLE_DEVELOPER)


def message_flags(places: list[Any], role: int, status: int, events: list[tuple[bool, str]]) -> int:
    """The flags of a message that would come next. places: the state before it. events: its tool calls and results.

    Raises Invalid TOOL_RESULT_WITHOUT_CALL if a result answers nothing that is open, and Exhausted if too many calls
    are.
    """
    if role in (ROLE_SYSTEM, ROLE_DEVELOPER):
        if events:
            raise Invalid("INVALID_TURN", "A system turn holds a tool call or result.")
        return FLAG_INSTRUCTIONS
    flags = 0
    if any(not is_result for is_result, _ in events):
        flags |= FLAG_CALLS
    if any(is_result for is_result, _ in events):
        flags |= FLAG_RESULTS
    opening = role == ROLE_USER and not flags & FLAG_RESULTS
    open_calls: list[str] = [] if opening else [entry[1] for entry in places[16]]
    was_open = bool(open_calls)
    for is_result, call_id in events:
        if not is_result:
            open_calls.append(call_id)
            continue
        if call_id not in open_calls:
            raise Invalid(
                "TOOL_RESULT_WITHOUT_CALL",
                f"The tool result answers call {call_id!r}, which is not open.",
                metadata={"call_id": call_id},
            )
        # The nearest earlier one: providers repeat ids across steps.
        del open_calls[len(open_calls) - 1 - open_calls[::-1].index(call_id)]
    if len(open_calls) > OPEN_CALLS_MAX:
        raise Exhausted(
            "OVERLOADED",
            f"{len(open_calls)} tool calls would be open at once; the limit is {OPEN_CALLS_MAX}.",
            remedy="Append results, or a user message, before more calls.",
        )
    if opening:
        flags |= FLAG_CUT | FLAG_EXCHANGE
    elif role == ROLE_ASSISTANT and not was_open and not flags & FLAG_RESULTS:
        flags |= FLAG_CUT
    finished = status not in (STATUS_INTERRUPTED, STATUS_CANCELLED)
    if (role == ROLE_ASSISTANT and finished) or (flags & FLAG_RESULTS and not open_calls):
        flags |= FLAG_BOUNDARY
    return flags


def summary_applies(places: list[Any], first: int, last: int, chain_at_last: bytes | None, claimed: bytes) -> bool:
    """Whether a summary that covers first..last takes effect. chain_at_last: the log's chain there, None if unknown."""
    covered = places[11][-1][2] if places[11] else 0
    if not 1 <= first <= last <= places[1] or chain_at_last is None or claimed != chain_at_last:
        return False
    if any(low <= last <= high for low, high in places[20]):
        return False
    if first == 1:
        return last > covered
    return first == covered + 1 and len(places[11]) < SUMMARIES_MAX


def other_flags(kind: int, applies: bool) -> int:
    """The flags of a turn that is no message."""
    if kind == KIND_SUMMARY:
        return FLAG_APPLIES if applies else 0
    return FLAG_BOUNDARY if kind in (KIND_MILESTONE, KIND_REWIND) else 0
