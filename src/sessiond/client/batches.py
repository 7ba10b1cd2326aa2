"""Many calls in few requests: which go together, what became of each, and which are sent again.

It promises that a call in a batch is repeated exactly where it would be repeated alone, that an append is never sent
while an earlier one to the same session has no outcome, and that calls of which one must be sent again hold up no
others. It never sleeps and never sends; the clients do.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import grpc
from google.protobuf.message import Message

from sessiond.client.calls import Call, Calls, ChannelKey, Many
from sessiond.client.failures import Attempts, item_failure
from sessiond.errors import SessiondError
from sessiond.v1 import session_pb2

Reply = TypeVar("Reply")

# The contract's limit, and well below what a daemon takes in one request.
ITEMS_MAX: Final = 256
BYTES_MAX: Final = 4 * 1024**2
# Requests that are on their way at the same time; each reply may have 32 MiB.
SENDINGS_MAX: Final = 8
# The daemon did nothing about these for want of room in its reply, and has room in the next one.
FULL: Final = "BATCH_REPLY_FULL"


@dataclass(slots=True)
class _Waiting(Generic[Reply]):
    """A call without an outcome. ready_s: not to be sent before, by the monotonic clock."""

    place: int
    call: Call[Reply]
    attempts: Attempts
    ready_s: float


@dataclass(slots=True)
class Sending(Generic[Reply]):
    """One request of a round."""

    key: ChannelKey
    method: str
    request: Message
    timeout_s: float
    metadata: tuple[tuple[str, str], ...]
    parts: list[_Waiting[Reply]]


@dataclass(slots=True)
class Round(Generic[Reply]):
    """Requests to send at the same time, after a wait; there are none in a round that only waits."""

    wait_s: float
    sendings: list[Sending[Reply]]


def rounds(calls: Calls, many: Many[Reply]) -> Generator[Round[Reply], Sequence[Any], list[Reply | SessiondError]]:
    """The rounds of many calls, and what became of each. For each round the replies are sent in, or RpcErrors."""
    outcomes: dict[int, Reply | SessiondError] = {}
    waiting: list[_Waiting[Reply]] = []
    for place, call in enumerate(many.calls):
        if isinstance(call, SessiondError):
            outcomes[place] = call
        else:
            waiting.append(_Waiting(place, call, calls.attempts(call), 0.0))
    while waiting:
        chosen = _chosen(waiting, many.serial)
        wait_s = max(0.0, max(part.ready_s for part in chosen) - time.monotonic())
        if wait_s:
            yield Round(wait_s, [])
        sendings = [_sending(key, many.method, parts) for key, parts in _requests(calls, chosen)[:SENDINGS_MAX]]
        replies = yield Round(0.0, sendings)
        for sending, reply in zip(sendings, replies, strict=True):
            for part, answer in zip(sending.parts, _answers(sending, reply), strict=True):
                try:
                    if isinstance(answer, grpc.RpcError):
                        part.ready_s = time.monotonic() + part.attempts.wait_s(answer)
                        continue
                    part.attempts.route.answered()
                    if isinstance(answer, session_pb2.ItemError):
                        failure = item_failure(answer)
                        wait_s = 0.0 if failure.error.reason == FULL else part.attempts.wait_after(failure)
                        part.ready_s = time.monotonic() + wait_s
                        continue
                    outcomes[part.place] = part.call.done(answer)
                except SessiondError as error:
                    outcomes[part.place] = error
        waiting = [part for part in waiting if part.place not in outcomes]
    return [outcomes[place] for place in range(len(many.calls))]


def _chosen(waiting: list[_Waiting[Reply]], serial: bool) -> list[_Waiting[Reply]]:
    """What the next round sends: whatever is due first, and what is due about then."""
    able = waiting
    if serial:
        # The earliest of each session.
        able = list({part.call.session_id: part for part in reversed(waiting)}.values())[::-1]
    now_s = time.monotonic()
    first_s = max(now_s, min(part.ready_s for part in able))
    # Each waits a while by chance: those that wait up to twice as long go with the first, in one request.
    return [part for part in able if part.ready_s - now_s <= 2 * (first_s - now_s)]


def _requests(calls: Calls, chosen: list[_Waiting[Reply]]) -> list[tuple[ChannelKey, list[_Waiting[Reply]]]]:
    """What goes into one request each: calls that go to the same node, as many as it takes."""
    groups: dict[Any, list[list[_Waiting[Reply]]]] = {}
    sizes: dict[Any, int] = {}
    for part in chosen:
        route = part.attempts.route
        # One node, and either all to be told where their session is, or none.
        where = calls.channel_key(route), len(route.metadata)
        size = part.call.request.ByteSize()
        groups.setdefault(where, [])
        if not groups[where] or len(groups[where][-1]) == ITEMS_MAX or sizes[where] + size > BYTES_MAX:
            groups[where].append([])
            sizes[where] = 0
        groups[where][-1].append(part)
        sizes[where] += size
    return [(key, parts) for (key, _), listed in groups.items() for parts in listed]


def _sending(key: ChannelKey, method: str, parts: list[_Waiting[Reply]]) -> Sending[Reply]:
    timeout_s = min(part.attempts.attempt_s() for part in parts)
    metadata = parts[0].attempts.route.metadata
    if len(parts) == 1:
        # Alone, it may also be as large, and its reply, as a call can be.
        return Sending(key, parts[0].call.method, parts[0].call.request, timeout_s, metadata, parts)
    kind: Any = session_pb2.BatchResumeSessionsRequest
    if method == "BatchAppendTurns":
        kind = session_pb2.BatchAppendTurnsRequest
    return Sending(key, method, kind(requests=[part.call.request for part in parts]), timeout_s, metadata, parts)


def _answers(sending: Sending[Any], reply: Any) -> list[Any]:
    """For each part of a request what it was answered: what its single call's reply would be, ItemError or RpcError."""
    if isinstance(reply, grpc.RpcError):
        return [reply] * len(sending.parts)
    if len(sending.parts) == 1:
        return [reply]
    if isinstance(reply, session_pb2.BatchAppendTurnsResponse):
        return [item.error if item.HasField("error") else item.response for item in reply.items]
    # Where an item has its context, ResumeSessionResponse has it, too.
    return [item.error if item.HasField("error") else item for item in reply.items]
