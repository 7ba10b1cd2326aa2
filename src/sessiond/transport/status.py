"""Errors to statuses: one google.rpc.Status per refusal, with exactly one ErrorInfo. Logs nothing."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from sessiond.errors import REASONS, SessiondError

DOMAIN: Final = "sessiond"
DETAILS_KEY: Final = "grpc-status-details-bin"
# Trailers hold about 8 KiB in all; what a caller sent must not push the details out.
_TEXT_MAX = 1024


def status_code(error: SessiondError) -> grpc.StatusCode:
    """The gRPC status of a refusal."""
    return grpc.StatusCode[REASONS[error.reason].status]


def status_proto(error: SessiondError) -> status_pb2.Status:
    """The whole refusal: code, sentence with remedy, ErrorInfo, and BadRequest or RetryInfo where they help."""
    metadata = {key: value[:_TEXT_MAX] for key, value in list(error.metadata.items())[:16]}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
    info.metadata["remedy"] = error.remedy
    details = [info]
    if error.fields:
        bad = error_details_pb2.BadRequest()
        for field, description in error.fields[:16]:
            bad.field_violations.add(field=field[:_TEXT_MAX], description=description[:_TEXT_MAX])
        details.append(bad)
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
    return status_pb2.Status(code=code, message=str(error)[: 2 * _TEXT_MAX], details=packed)
