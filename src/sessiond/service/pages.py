"""Page tokens: opaque, bound to one query, and checked before they are believed. They hold no content."""

from __future__ import annotations

import base64
import binascii
import hashlib

import msgpack

from sessiond.errors import Invalid

_MAC_BYTES = 8


def seal_page(hash_key: bytes, query: bytes, place: list[int] | list[str]) -> str:
    """A token for the place where the next page of this query starts."""
    packed = msgpack.packb(place)
    assert isinstance(packed, bytes)
    return base64.urlsafe_b64encode(_mac(hash_key, query, packed) + packed).decode()


def open_page(hash_key: bytes, query: bytes, token: str) -> list[int] | list[str]:
    """The place that a token names. Raises Invalid INVALID_PAGE_TOKEN if it is not one of this query's."""
    try:
        raw = base64.urlsafe_b64decode(token.encode("ascii"))
        # Decoding skips what is not of the alphabet: only the very text that was handed out is a token.
        whole = len(raw) > _MAC_BYTES and base64.urlsafe_b64encode(raw).decode() == token
        if whole and _mac(hash_key, query, raw[_MAC_BYTES:]) == raw[:_MAC_BYTES]:
            place = msgpack.unpackb(raw[_MAC_BYTES:])
            if isinstance(place, list):
                return place
    except (ValueError, binascii.Error, UnicodeEncodeError, msgpack.exceptions.UnpackException):
        pass
    what = "it is not a token of this query"
    raise Invalid("INVALID_PAGE_TOKEN", f"The page token is wrong: {what}.", fields=[("page_token", what)])


def _mac(hash_key: bytes, query: bytes, packed: bytes) -> bytes:
    return hashlib.blake2b(query + b"\0" + packed, digest_size=_MAC_BYTES, key=hash_key, person=b"page").digest()
