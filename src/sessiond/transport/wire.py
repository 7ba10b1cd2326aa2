"""Requests off the wire and replies onto it. Says which field is wrong where protobuf only says that one is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from sessiond.core.layout import field_head
from sessiond.errors import Invalid

Request = TypeVar("Request", bound=Message)

_DEPTH_MAX = 32


def parse(kind: type[Request], raw: bytes, bytes_max: int) -> Request:
    """A request message. Raises Invalid REQUEST_TOO_LARGE, INVALID_UTF8 or MALFORMED_REQUEST."""
    if len(raw) > bytes_max:
        raise Invalid(
            "REQUEST_TOO_LARGE",
            f"The request has {len(raw)} bytes; the limit is {bytes_max}.",
            {"size_bytes": str(len(raw)), "limit_bytes": str(bytes_max)},
            [("", f"{len(raw)} bytes, over the limit of {bytes_max}")],
        )
    try:
        return kind.FromString(raw)
    except DecodeError as error:
        path = _bad_text(kind.DESCRIPTOR, raw, 0)
        if path is not None:
            raise Invalid(
                "INVALID_UTF8", f"The field {path} is not UTF-8.", {"field": path}, [(path, "not UTF-8")]
            ) from error
        raise Invalid(
            "MALFORMED_REQUEST",
            f"The request is no {kind.DESCRIPTOR.full_name}: {error}.",
            {"message": kind.DESCRIPTOR.full_name},
            [("", "not a message of the published proto")],
        ) from error


def _bad_text(descriptor: Any, raw: bytes, depth: int) -> str | None:
    """Path of the first text field that is not UTF-8; None if there is none or the bytes are no message."""
    by_number = {field.number: field for field in descriptor.fields}
    seen: dict[int, int] = {}
    try:
        for number, payload in _delimited(raw):
            field = by_number.get(number)
            if field is None:
                continue
            index = seen[number] = seen.get(number, -1) + 1
            name = f"{field.name}[{index}]" if field.is_repeated else field.name
            if field.type == FieldDescriptor.TYPE_STRING:
                try:
                    payload.decode()
                except UnicodeDecodeError:
                    return name
            elif field.type == FieldDescriptor.TYPE_MESSAGE and depth < _DEPTH_MAX:
                inner = _bad_text(field.message_type, payload, depth + 1)
                if inner is not None:
                    return f"{name}.{inner}"
    except ValueError:
        return None
    return None


def _delimited(raw: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(raw, at)
        elif wire == 1:
            at += 8
        elif wire == 5:
            at += 4
        elif wire == 2:
            size, at = _varint(raw, at)
            if at + size > len(raw):
                raise ValueError
            yield tag >> 3, raw[at : at + size]
            at += size
        else:
            raise ValueError
        if not tag >> 3 or at > len(raw):
            raise ValueError


def split(kind: type[Message], field: str, raw: bytes, bytes_max: int) -> list[bytes]:
    """The bytes of each message of a repeated field, in order; none of them is parsed. Raises as `parse` does."""
    number = kind.DESCRIPTOR.fields_by_name[field].number
    if len(raw) <= bytes_max:
        try:
            return [payload for found, payload in _delimited(raw) if found == number]
        except ValueError:
            pass  # no message at all, or one with a group of some other contract
    return [item.SerializeToString() for item in getattr(parse(kind, raw, bytes_max), field)]


def text(kind: type[Message], field: str, raw: bytes) -> bytes:
    """A text field's bytes as a parser would find them; empty where it is unset, or where the bytes are no message."""
    number, value = kind.DESCRIPTOR.fields_by_name[field].number, b""
    try:
        for found, payload in _delimited(raw):
            if found == number:
                value = payload
    except ValueError:
        return b""
    return value


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(raw) or shift > 63:
            raise ValueError
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def embed(number: int, payload: bytes) -> bytes:
    """A message field's bytes: tag, length, payload."""
    return field_head(number, len(payload)) + payload


def reply(message: Any) -> bytes:
    """A reply's bytes; bytes pass through."""
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())
