"""gRPC statuses back into the errors of `sessiond.errors`, and when a call is tried again.

It promises that only refusals which changed nothing, and lost connections, are tried again: every call carries its
idempotency key, so a repeat is applied once. It never sleeps and never sends; the clients do.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.rpc import error_details_pb2, status_pb2

from sessiond.client.routes import ELSEWHERE, Route
from sessiond.errors import (
    REASONS,
    Conflict,
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    SessiondError,
    Unavailable,
    Unimplemented,
)
from sessiond.v1 import session_pb2

DOMAIN: Final = "sessiond"
DETAILS_KEY: Final = "grpc-status-details-bin"
BACKOFF_FIRST_S: Final = 0.05
BACKOFF_MAX_S: Final = 2.0
# The least that an attempt is given while another server could still be asked.
ATTEMPT_MIN_S: Final = 1.0
# What gRPC says of calls that this side cancelled.
OUR_OWN: Final = frozenset(("Channel closed!", "Channel closed", "Locally cancelled by application!"))
_KINDS: Final[dict[str, type[SessiondError]]] = {
    "INVALID_ARGUMENT": Invalid,
    "OUT_OF_RANGE": Invalid,
    "NOT_FOUND": NotFound,
    "ALREADY_EXISTS": Conflict,
    "ABORTED": Conflict,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": Unavailable,
    "CANCELLED": Unavailable,
    "RESOURCE_EXHAUSTED": Exhausted,
    "PERMISSION_DENIED": Denied,
    "UNAUTHENTICATED": Denied,
    "FAILED_PRECONDITION": Denied,
    "UNIMPLEMENTED": Unimplemented,
}
_CODES: Final = {int(code.value[0]): code.name for code in grpc.StatusCode}


class ClientError(SessiondError):
    """A refusal for a reason that this client has no row for: a newer daemon's, a proxy's, or gRPC's own.

    It is also of the kind that its status stands for, so that `except NotFound` catches it. status: the gRPC status.
    """

    status: str = "UNKNOWN"

    def __post_init__(self) -> None:
        """Believe what the daemon said: there is no row to check it against."""
        Exception.__init__(self, self.reason)


_FOREIGN: Final[dict[type[SessiondError], type[ClientError]]] = {
    kind: type(f"Client{kind.__name__}", (ClientError, kind), {"__doc__": kind.__doc__})
    for kind in {*_KINDS.values(), Corrupt}
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What one attempt ended with. retry: the daemon changed nothing, or a repeat is harmless, and waiting can help."""

    error: SessiondError
    retry: bool


def failure_of(error: Any, server: str) -> Failure:
    """What an RpcError means. server: named where nobody answered."""
    code: grpc.StatusCode = error.code()
    details = _details(error)
    if details is None:
        text = str(error.details() or "").rstrip(".")
        if code is grpc.StatusCode.UNAVAILABLE or (code is grpc.StatusCode.CANCELLED and text not in OUR_OWN):
            # Whoever ends while it answers, cancels: to the caller a lost connection like any other.
            return Failure(Unavailable("SERVER_UNREACHABLE", f"No daemon answers at {server}: {text}."), True)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            message = f"{server} did not answer in time; whether the call was carried out is not known."
            return Failure(Unavailable("DEADLINE_TOO_SHORT", message), False)
        return Failure(make(code.name, code.name, f"The call failed: {text or code.name}."), False)
    info, fields, retry_after_ms, message = details
    metadata = dict(info.metadata)
    remedy = metadata.pop("remedy", "")
    message = message.removesuffix(remedy).rstrip()
    made = make(code.name, info.reason, message, metadata, fields, retry_after_ms, remedy)
    return Failure(made, _is_retried(code.name, retry_after_ms))


def _is_retried(status: str, retry_after_ms: int | None) -> bool:
    return status == "UNAVAILABLE" or (status == "RESOURCE_EXHAUSTED" and retry_after_ms is not None)


def item_failure(item: session_pb2.ItemError) -> Failure:
    """What an item's error means: the same as a single call's."""
    return Failure(item_error(item), _is_retried(_CODES.get(item.code, "UNKNOWN"), item.retry_after_ms or None))


def item_error(item: session_pb2.ItemError) -> SessiondError:
    """The error of one item, or of one part of a reply."""
    status = _CODES.get(item.code, "UNKNOWN")
    metadata = dict(item.metadata)
    row = REASONS.get(item.reason)
    remedy = metadata.pop("remedy", "") or (row.remedy if row else "")
    message = item.message.removesuffix(remedy).rstrip()
    fields = [(metadata["field"], message)] if "field" in metadata else []
    return make(status, item.reason, message, metadata, fields, item.retry_after_ms or None, remedy)


def make(
    status: str,
    reason: str,
    message: str,
    metadata: dict[str, str] | None = None,
    fields: list[tuple[str, str]] | None = None,
    retry_after_ms: int | None = None,
    remedy: str = "",
) -> SessiondError:
    """The error of a reason: its own kind where this release knows it, else a ClientError of the status's kind."""
    arguments = (reason, message, metadata or {}, fields or [], retry_after_ms, remedy)
    row = REASONS.get(reason)
    if row is not None:
        return row.kind(*arguments)
    foreign = _FOREIGN[_KINDS.get(status, Corrupt)](*arguments)
    foreign.status = status
    return foreign


def _details(
    error: Any,
) -> tuple[error_details_pb2.ErrorInfo, list[tuple[str, str]], int | None, str] | None:
    """(ErrorInfo, field violations, retry_after_ms, message) of our own domain; None for any other refusal."""
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except ValueError:
            return None
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        retry_after_ms = None
        for detail in status.details:
            detail.Unpack(info)
            detail.Unpack(bad)
            if detail.Unpack(retry):
                retry_after_ms = retry.retry_delay.ToMilliseconds()
        if info.domain != DOMAIN:
            return None
        fields = [(violation.field, violation.description) for violation in bad.field_violations]
        return info, fields, retry_after_ms, status.message
    return None


class Attempts:
    """The attempts at one call: where each goes, how long it may take, and how long to wait before the next."""

    def __init__(self, server: str, timeout_s: float, retry_s: float | None, route: Route) -> None:
        self.route = route
        self._server = server
        self._ends = time.monotonic() + timeout_s
        self._retry_s = retry_s
        self._retry_ends: float | None = None
        self._backoff_s = BACKOFF_FIRST_S
        self._seen: SessiondError | None = None
        self._cut_short = False

    def attempt_s(self) -> float:
        """How long the next attempt may take: a node that stands still must leave time to ask another one."""
        left_s = max(0.001, self._ends - time.monotonic())
        self._cut_short = self.route.more and left_s > ATTEMPT_MIN_S
        return max(ATTEMPT_MIN_S, left_s / 2) if self._cut_short else left_s

    def wait_s(self, error: grpc.RpcError) -> float:
        """How long to wait before the call is tried again, where `route` now says. Raises SessiondError where it is
        not.
        """
        return self.wait_after(failure_of(error, self._server), error)

    def wait_after(self, failure: Failure, error: BaseException | None = None) -> float:
        """As wait_s, of a failure that was told otherwise, by an item of a batch. error: its cause, if there is one."""
        now = time.monotonic()
        reason = failure.error.reason
        if self.route.redirected(failure.error):
            return 0.0
        if self._cut_short and reason == "DEADLINE_TOO_SHORT":
            reason = "SERVER_UNREACHABLE"
        elif not failure.retry:
            # An attempt that ran out of what time was left says less than what the one before it heard.
            if self._seen is not None and failure.error.reason == "DEADLINE_TOO_SHORT":
                raise self._seen from error
            raise failure.error from error
        self._seen = failure.error
        if self._retry_ends is None:
            self._retry_ends = self._ends if self._retry_s is None else min(self._ends, now + self._retry_s)
        wait_s = 0.0
        if not self.route.moved(reason):
            if reason != "SERVER_UNREACHABLE" and not (self.route.several and reason in ELSEWHERE):
                wait_s = (failure.error.retry_after_ms or 0) / 1000
            wait_s += self._backoff_s * random.uniform(0.5, 1.0)
            self._backoff_s = min(self._backoff_s * 2, BACKOFF_MAX_S)
        if now + wait_s >= self._retry_ends:
            raise failure.error from error
        return wait_s
