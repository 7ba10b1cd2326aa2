"""Batches off the wire and onto it: bytes of items in, bytes of their outcomes out, and no message is built per item.

It promises that an item's reply is the very bytes that a single call would have returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import grpc

from sessiond.core.layout import field_head
from sessiond.errors import SessiondError
from sessiond.service.batches import Answer, Batch, Outcome, Places, Shortcut, check_size
from sessiond.service.node import CallCounts
from sessiond.service.ownership import Call
from sessiond.transport.status import item_error
from sessiond.transport.wire import split, text
from sessiond.v1 import session_pb2

RESUMES: Final = "BatchResumeSessions"
APPENDS: Final = "BatchAppendTurns"
# The calls that their items are.
ITEMS: Final = {RESUMES: "ResumeSession", APPENDS: "AppendTurn"}
CODES: Final = {int(code.value[0]): code.name for code in grpc.StatusCode}
_ERROR: Final = session_pb2.BatchAppendTurnsItem.DESCRIPTOR.fields_by_name["error"].number


class Batched:
    """BatchResumeSessions and BatchAppendTurns."""

    def __init__(
        self,
        answer: Callable[[str], Answer],
        internal: Callable[[str, Exception], SessiondError],
        resume_one: Shortcut,
        places: Places,
        calls: CallCounts,
        clock_ms: Callable[[], int],
        request_bytes_max: int,
    ) -> None:
        """answer: the way of a single call, by its name. internal: what to say of an error that nobody foresaw."""
        self._answer = answer
        self._internal = internal
        self._resume_one = resume_one
        self._places = places
        self._calls = calls
        self._clock_ms = clock_ms
        self._request_bytes_max = request_bytes_max

    async def resume(self, call: Call, raw: bytes) -> bytes:
        """BatchResumeSessionsResponse's wire bytes. Raises Invalid for the batch as a whole."""
        check_size(1, len(raw), self._request_bytes_max)
        items = split(session_pb2.BatchResumeSessionsRequest, "requests", raw, self._request_bytes_max)
        check_size(len(items), len(raw), self._request_bytes_max)
        batch = Batch(call, items, self._answer(ITEMS[RESUMES]), self._clock_ms)
        # An item has its context where ResumeSessionResponse has it: that reply is the item.
        return self._joined(RESUMES, await batch.resume(self._resume_one, self._places), False)

    async def append(self, call: Call, raw: bytes) -> bytes:
        """BatchAppendTurnsResponse's wire bytes. Raises Invalid for the batch as a whole."""
        check_size(1, len(raw), self._request_bytes_max)
        items = split(session_pb2.BatchAppendTurnsRequest, "requests", raw, self._request_bytes_max)
        check_size(len(items), len(raw), self._request_bytes_max)
        batch = Batch(call, items, self._answer(ITEMS[APPENDS]), self._clock_ms)
        keys = [text(session_pb2.AppendTurnRequest, "session_id", item) for item in items]
        return self._joined(APPENDS, await batch.append(keys, self._places), True)

    def _joined(self, name: str, outcomes: list[Outcome], wraps: bool) -> bytes:
        pieces: list[bytes] = []
        answered = 0
        for outcome in outcomes:
            if isinstance(outcome, bytes):
                answered += 1
                inner = field_head(1, len(outcome)) if wraps else b""
            else:
                outcome = self._refused(name, outcome)
                inner = field_head(_ERROR, len(outcome))
            pieces += (field_head(1, len(inner) + len(outcome)), inner, outcome)
        if answered:
            self._calls.add(_counted(name), "OK", "", answered)
        return b"".join(pieces)

    def _refused(self, name: str, error: Exception) -> bytes:
        refusal = error if isinstance(error, SessiondError) else self._internal(ITEMS[name], error)
        item = item_error(refusal)
        self._calls.add(_counted(name), CODES[item.code], item.reason)
        return bytes(item.SerializeToString())


def _counted(name: str) -> str:
    """Under which items are counted beside the calls that they came in."""
    return f"{name}/item"
