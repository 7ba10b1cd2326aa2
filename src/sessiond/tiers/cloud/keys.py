"""What an object's key and a range may look like, the same for every backend.

It never knows what a key names, and it never repairs one: a bad key is a defect of the caller.
"""

from __future__ import annotations

import re

# S3 allows 1,024 bytes, of which a bucket's prefix has a quarter. 255 is Linux's limit on a file name (NAME_MAX).
KEY_BYTES_MAX = 768
PREFIX_BYTES_MAX = 255
COMPONENT_BYTES_MAX = 255

COMPONENT = re.compile(r"[A-Za-z0-9._-]+")

_KEY = re.compile(r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)*")
_PREFIX = re.compile(r"(?:[A-Za-z0-9._-]+/)*[A-Za-z0-9._-]*")


def check_key(key: str) -> None:
    """Raise ValueError unless the key is relative, of [A-Za-z0-9._/-], without empty, '.' or '..' components."""
    _check(_KEY, key)


def check_prefix(prefix: str) -> None:
    """Raise ValueError unless the prefix can be the beginning of a key: '', 'm/' and 'm/ab' are fine."""
    _check(_PREFIX, prefix)


def check_bucket_prefix(prefix: str) -> None:
    """Raise ValueError unless all keys may stand below this one, a slash between them."""
    check_key(prefix)
    if len(prefix) > PREFIX_BYTES_MAX:
        raise ValueError(f"not a prefix of a bucket, over {PREFIX_BYTES_MAX} bytes: {prefix[:80]!r}")


def check_range(first_byte: int | None, last_byte: int | None) -> slice | None:
    """The slice for bytes first_byte..last_byte, both included; None for all. Raises ValueError for half a range."""
    if first_byte is None and last_byte is None:
        return None
    if first_byte is None or last_byte is None or not 0 <= first_byte <= last_byte:
        raise ValueError(f"not a range of bytes: {first_byte}..{last_byte}")
    return slice(first_byte, last_byte + 1)


def _check(pattern: re.Pattern[str], key: str) -> None:
    # A leading dot is refused although S3 allows it: the folder store keeps its own files under such names.
    if len(key) > KEY_BYTES_MAX or key.startswith(".") or not pattern.fullmatch(key):
        raise ValueError(f"not a key of an object store: {key[:80]!r}")
    if any(part in (".", "..") or len(part) > COMPONENT_BYTES_MAX for part in key.split("/")):
        raise ValueError(f"not a key of an object store: {key[:80]!r}")
