"""Errors to statuses: one google.rpc.Status per refusal, with exactly one ErrorInfo. Logs nothing."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from sessiond.errors import REASONS, SessiondError
from sessiond.service.router import Refused
from sessiond.v1 import session_pb2

DOMAIN: Final = "sessiond"
DETAILS_KEY: Final = "grpc-status-details-bin"
# Trailers hold about 8 KiB in all, and the message twice: percent-encoded, where a byte can take three, and in the
# details, where three bytes take four. What a caller sent must not push the details out, nor the remedy.
_MESSAGE_BYTES_MAX: Final = 512
_VALUE_BYTES_MAX: Final = 256
_VALUES_BYTES_MAX: Final = 2048


def status_code(error: SessiondError) -> grpc.StatusCode:
    """The gRPC status of a refusal."""
    return grpc.StatusCode[REASONS[error.reason].status]


def status_proto(error: SessiondError) -> status_pb2.Status:
    """The whole refusal: code, sentence with remedy, ErrorInfo, and BadRequest or RetryInfo where they help."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"remedy": error.remedy})
    details = [info]
    room = _VALUES_BYTES_MAX
    if error.fields:
        bad = error_details_pb2.BadRequest()
        for field, description in error.fields:
            room -= bad.field_violations.add(field=_cut(field), description=_cut(description)).ByteSize()
            if room < 0:
                break
        details.append(bad)
    for key, value in error.metadata.items():
        shown = _cut(value)
        room -= len(key.encode()) + len(shown.encode())
        if room < 0:
            break
        info.metadata[key] = shown
    if error.retry_after_ms:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = []
    for detail in details:
        item = any_pb2.Any()
        item.Pack(detail)
        packed.append(item)
    code = status_code(error).value[0]
    message = f"{_cut(error.message, _MESSAGE_BYTES_MAX)} {error.remedy}".strip()
    return status_pb2.Status(code=code, message=message, details=packed)


def item_error(error: SessiondError) -> session_pb2.ItemError:
    """The refusal of one item of a batch, in the words of a single call's; also where another node said it."""
    status = status_pb2.Status.FromString(error.status) if isinstance(error, Refused) else status_proto(error)
    item = session_pb2.ItemError(code=status.code, message=status.message)
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            item.reason = info.reason
            item.metadata.update(info.metadata)
        elif detail.Unpack(retry):
            item.retry_after_ms = retry.retry_delay.ToMilliseconds()
    return item


def _cut(text: str, bytes_max: int = _VALUE_BYTES_MAX) -> str:
    raw = text.encode(errors="replace")
    return (raw if len(raw) <= bytes_max else raw[: bytes_max - 3] + "…".encode()).decode(errors="ignore")
