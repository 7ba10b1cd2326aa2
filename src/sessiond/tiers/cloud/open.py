"""Turn the setting `cloud` into an object store: file:///folder or s3://bucket/prefix.

It never connects and never probes; a bad setting is an Invalid that says how to write it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from sessiond import errors
from sessiond.config import Settings
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.keys import PREFIX_BYTES_MAX, check_bucket_prefix
from sessiond.tiers.cloud.s3 import CONNECT_TIMEOUT_MS, READ_TIMEOUT_MS, S3Store
from sessiond.tiers.cloud.store import ObjectStore

_FORMS = "Write file:///an/absolute/folder or s3://bucket/prefix."
# Wider than what AWS allows today: older buckets and other stores have upper case and underscores.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


def open_configured(settings: Settings, url: str = "") -> ObjectStore:
    """The store that the settings name, or another one opened as they say. Raises as open_store does."""
    return open_store(
        url or settings.cloud_url,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        path_style=settings.s3_path_style,
        checksum=settings.s3_checksum,
        tags=settings.object_tags,
        sse=settings.s3_sse,
        kms_key=settings.s3_kms_key,
        connect_timeout_ms=settings.store_connect_timeout_ms,
        read_timeout_ms=settings.store_read_timeout_ms,
    )


def open_store(
    url: str,
    *,
    endpoint: str = "",
    region: str = "",
    path_style: bool | None = None,
    checksum: str = "crc32c",
    tags: Mapping[str, str] | None = None,
    sse: str = "",
    kms_key: str = "",
    connect_timeout_ms: int = CONNECT_TIMEOUT_MS,
    read_timeout_ms: int = READ_TIMEOUT_MS,
) -> ObjectStore:
    """The store that the URL names; what follows the URL is for s3 only.

    path_style None means True with an endpoint, where bucket.host seldom resolves, and the SDK's choice on AWS.
    Raises Invalid INVALID_CONFIG, and what FolderStore and S3Store raise.
    """
    parts = _split(url)
    if parts.scheme == "file":
        return FolderStore(_folder(url, parts))
    if parts.scheme == "s3":
        if endpoint and urlsplit(endpoint).scheme not in ("http", "https"):
            raise _invalid("s3_endpoint", endpoint, "is not a URL", "Write it as http://host:port or https://host.")
        prefix = parts.path.strip("/")
        if not _BUCKET.fullmatch(parts.netloc):
            raise _invalid("cloud", url, f"names no bucket: {parts.netloc!r}")
        try:
            if prefix:
                check_bucket_prefix(prefix)
        except ValueError:
            what = f"has a prefix that can't be used: {prefix!r}"
            remedy = f"Use at most {PREFIX_BYTES_MAX} bytes of A-Z a-z 0-9 . _ - and / in the prefix."
            raise _invalid("cloud", url, what, remedy) from None
        return S3Store(
            parts.netloc,
            prefix,
            endpoint=endpoint,
            region=region,
            path_style=True if path_style is None and endpoint else path_style,
            checksum=checksum,
            tags=tags,
            sse=sse,
            kms_key=kms_key,
            connect_timeout_ms=connect_timeout_ms,
            read_timeout_ms=read_timeout_ms,
        )
    raise _invalid("cloud", url, f"has the unknown scheme {parts.scheme!r}" if parts.scheme else "has no scheme")


def folder_of(url: str) -> Path | None:
    """The folder that the URL names; None if it names none. Raises Invalid INVALID_CONFIG."""
    parts = _split(url)
    return _folder(url, parts) if parts.scheme == "file" else None


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise _invalid("cloud", url, f"is not a URL ({error})") from error
    if parts.query or parts.fragment:
        raise _invalid("cloud", url, "has a ? or a #", "Write these as %3F and %23.")
    return parts


def _folder(url: str, parts: SplitResult) -> Path:
    # In file://data/x the first part is a host, so that a relative path would silently lose its first folder.
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        meant = Path(parts.netloc + parts.path).absolute().as_uri()
        raise _invalid("cloud", url, "has a relative path", f"Write the absolute path after file://, such as {meant}.")
    path = unquote(parts.path)
    if "\0" in path:
        raise _invalid("cloud", url, "has a NUL")
    return Path(path)


def _invalid(setting: str, value: str, what: str, remedy: str = _FORMS) -> errors.Invalid:
    return errors.Invalid(
        "INVALID_CONFIG",
        f"{setting} = {value!r}: it {what}.",
        {setting: value},
        [(setting, what)],
        remedy=remedy,
    )
