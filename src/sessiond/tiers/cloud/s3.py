"""An S3 bucket, or one compatible with it, as an object store: one request per call, and the truth about its outcome.

It never retries (the SDK's own retries are off), and never takes a reply that was cut off for a whole one.

A write is definite only if the store said so: 200 with a whole etag, or a refusal. Where the connection was never made
nothing was written; everything else is Ambiguous. http.client takes the end of the connection for the end of the
headers, so that a reply cut off among them looks like a whole one with fewer of them: each call asks for something
that only a whole reply has.
"""

from __future__ import annotations

import re
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from email.utils import parsedate_to_datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlencode

from sessiond import core, errors
from sessiond.tiers.cloud.bucket import object_kind
from sessiond.tiers.cloud.keys import check_bucket_prefix, check_key, check_prefix, check_range
from sessiond.tiers.cloud.store import (
    Ambiguous,
    BucketMissing,
    Listed,
    ObjectNotFound,
    ObjectStore,
    PreconditionLost,
    Stored,
    StoreDamaged,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

CONNECT_TIMEOUT_MS = 2_000
READ_TIMEOUT_MS = 10_000
# More than the threads that a worker lets into the cloud tier at once; boto3's own 10 would throw connections away.
CONNECTIONS_MAX = 32
# What a store answers at most per page of a listing.
PAGE_ROWS_MAX = 1_000
# A throttled prefix needs longer than a lost packet: AWS scales one over minutes and asks for a lower rate meanwhile.
SLOW_DOWN_RETRY_MS = 5_000

# The tag with an object's kind, where tags are sent; also the name of its metadata.
KIND_NAME: Final = "sessiond-kind"
# Objects whose damage was seen once; forgetting one costs one more read of it.
SUSPECTS_MAX = 1_024

_CHECKSUMS: dict[str, Callable[[bytes], bytes]] = {
    "ChecksumCRC32C": lambda body: core.crc32c(body).to_bytes(4, "big"),
    "ChecksumSHA256": lambda body: sha256(body).digest(),
    # What an SDK of ours sent before, and others send when they restore an object.
    "ChecksumCRC32": lambda body: zlib.crc32(body).to_bytes(4, "big"),
}
# By the setting s3_checksum.
_SENT: dict[str, str] = {"crc32c": "ChecksumCRC32C", "sha256": "ChecksumSHA256"}

# 4xx replies after which the same bytes may be sent again: the body did not arrive whole, or too much came at once.
_RESEND_STATUS = (408, 409, 429)
_RESEND_CODES = frozenset(
    ("BadDigest", "IncompleteBody", "InvalidDigest", "RequestTimeout", "XAmzContentChecksumMismatch")
)
# How S3 says that a bucket does not have a setting at all.
_NOT_SET = frozenset(
    (
        "NoSuchLifecycleConfiguration",
        "NoSuchPublicAccessBlockConfiguration",
        "ObjectLockConfigurationNotFoundError",
    )
)
# RFC 9110, section 5.6.7: what a server sends in Date.
_DATE = re.compile(r"[A-Z][a-z]{2}, \d{2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT")


class S3Store(ObjectStore):
    """One bucket, or what lies under a prefix of it, through boto3 with its usual credential chain.

    prefix: without slashes around it. endpoint: an http(s) URL, or '' for AWS. region: '' for the SDK's own choice.
    path_style: the bucket in the path (True), in the host's name (False), or as the SDK thinks best (None).
    read_timeout_ms bounds each wait for bytes, not the whole call. A range that begins behind the object's end has
    neither bytes nor an etag.

    checksum: crc32c, sha256, or none for a store that takes neither: of the bytes as they are handed over, sent with
    each put, so that the store refuses a body that changed on its way; asked for with each get, and compared here.
    tags: object tags of each put, the kind of the object added; none are sent if there are none. sse: '' for the
    bucket's own default, AES256 or aws:kms, the latter with kms_key or the account's own.

    A listing comes in the store's order. SeaweedFS walks folder by folder, so that there, unlike on S3, 'a/b' comes
    before 'a-b'; page by page each key still comes once, if start_after is a key that was listed.

    Raises Denied STORE_DENIED for half a set of credentials, Invalid INVALID_CONFIG for what the SDK can't use.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
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
        connections_max: int = CONNECTIONS_MAX,
    ) -> None:
        # Here and not above: the import takes 0.2 s, which a node with a folder does not have to pay.
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError, PartialCredentialsError

        if prefix:
            check_bucket_prefix(prefix)
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        settings = Config(
            connect_timeout=connect_timeout_ms / 1000,
            read_timeout=read_timeout_ms / 1000,
            retries={"total_max_attempts": 1},
            max_pool_connections=connections_max,
            # Checksums are ours: the SDK's own are taken behind a copy of the body, go into a trailer that some stores
            # do not know, and need another package for CRC32C.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "auto" if path_style is None else "path" if path_style else "virtual"},
        )
        try:
            self._client: Any = boto3.session.Session().client(
                "s3", endpoint_url=endpoint or None, region_name=region or None, config=settings
            )
        except PartialCredentialsError as error:
            raise errors.Denied("STORE_DENIED", f"The credentials for {self.url} are incomplete: {error}.") from error
        except (BotoCoreError, ValueError) as error:
            raise errors.Invalid(
                "INVALID_CONFIG",
                f"The S3 client for {self.url} can't be made: {error}.",
                {"cloud": self.url, "s3_endpoint": endpoint},
                [("s3_endpoint" if endpoint else "cloud", str(error))],
            ) from error
        self._sent = _SENT.get(checksum)
        self._tags = dict(tags or {})
        self._encryption = {
            name: value for name, value in (("ServerSideEncryption", sse), ("SSEKMSKeyId", kms_key)) if value
        }
        # By key: the etag and the checksum of a body that did not match once.
        self._suspects: dict[str, tuple[str, str]] = {}
        # The store's clock as a reply told it, and the boot clock when that came.
        self._told: tuple[int, int] | None = None
        self._client.meta.events.register("response-received.s3", self._note_date)
        if self._sent:
            self._client.meta.events.register("before-call.s3.GetObject", _ask_for_checksum)

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        """One GetObject, with Range for a range."""
        check_key(key)
        span = check_range(first_byte, last_byte)
        asked = {"Range": f"bytes={first_byte}-{last_byte}"} if span else {}
        try:
            reply = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key, **asked)
            # The SDK compares the length of what it reads.
            with closing(reply["Body"]) as stream:
                body: bytes = stream.read()
        except Exception as error:
            if span and _status(error) == 416:
                return Stored(b"", "")  # the range begins behind the object's end, and S3 sends no etag then
            raise _explain("get", key, error) from error
        etag = reply.get("ETag", "")
        if "ContentLength" not in reply or not _whole(etag):
            raise StoreUnavailable(key, "the reply ended among its headers")
        # A store may ignore Range and send all of it. The checksum is the whole object's, so a range has none.
        whole = not span or reply["ResponseMetadata"]["HTTPStatusCode"] == 200
        if whole and self._sent:
            self._verify(key, body, etag, reply)
        return Stored(body[span] if span and whole else body, etag)

    def _verify(self, key: str, body: bytes, etag: str, reply: dict[str, Any]) -> None:
        """Raise StoreUnavailable for a body that is not what its writer said; StoreDamaged if it comes again so."""
        for name, checksum in _CHECKSUMS.items():
            told = reply.get(name)
            # One of parts (its number behind a dash) says nothing of the whole; ours are never written in parts.
            if told is None or "-" in told:
                continue
            found = b64encode(checksum(body)).decode()
            if found == told:
                continue
            detail = f"its checksum ({name.removeprefix('Checksum')}) is {told}, that of what was read {found}"
            if self._suspects.get(key) == (etag, found):
                # The same wrong bytes twice: they do not become wrong on the way, they lie there like this.
                raise StoreDamaged(key, detail)
            if len(self._suspects) >= SUSPECTS_MAX:
                self._suspects.clear()
            self._suspects[key] = etag, found
            raise StoreUnavailable(key, detail)
        if self._suspects:
            self._suspects.pop(key, None)

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """One PutObject, with the checksum, kind, tags and encryption that are set, and If-None-Match or If-Match."""
        check_key(key)
        if if_absent and if_match is not None:
            raise ValueError("a put has at most one condition")
        said: dict[str, Any] = dict(self._encryption)
        if if_absent:
            said["IfNoneMatch"] = "*"
        elif if_match is not None:
            said["IfMatch"] = if_match
        if self._sent:
            said[self._sent] = b64encode(_CHECKSUMS[self._sent](body)).decode()
        kind = object_kind(key)
        said["Metadata"] = {KIND_NAME: kind}
        said["ContentType"] = "application/json" if key.endswith(".json") else "application/octet-stream"
        if self._tags:
            said["Tagging"] = urlencode({**self._tags, KIND_NAME: kind})
        try:
            reply = self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=body, **said)
        except Exception as error:
            raise _explain("put", key, error, if_absent, if_match is not None) from error
        etag: str = reply.get("ETag", "")
        if not _whole(etag):
            # Half an etag taken for whole would make the next If-Match lose, which reads as being fenced.
            raise Ambiguous(key, f"the reply carries no whole etag: {etag!r}")
        return etag

    def delete(self, key: str) -> None:
        """One DeleteObject; in a versioned bucket it hides the object and leaves its versions."""
        check_key(key)
        try:
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        except Exception as error:
            explained = _explain("delete", key, error)
            if not isinstance(explained, ObjectNotFound):
                raise explained from error

    def list(self, prefix: str, start_after: str = "", limit: int = PAGE_ROWS_MAX) -> Iterator[Listed]:
        """One ListObjectsV2 per 1,000 rows."""
        check_prefix(prefix)
        if limit < 1:
            raise ValueError(f"a listing needs a limit of at least 1, not {limit}")
        return self._rows(prefix, start_after, limit)

    def _rows(self, prefix: str, start_after: str, limit: int) -> Iterator[Listed]:
        left = limit
        asked = {"StartAfter": self._prefix + start_after} if start_after else {}
        while left:
            try:
                reply = self._client.list_objects_v2(
                    Bucket=self._bucket, Prefix=self._prefix + prefix, MaxKeys=min(left, PAGE_ROWS_MAX), **asked
                )
            except Exception as error:
                raise _explain("list", prefix, error) from error
            if "IsTruncated" not in reply:
                raise StoreUnavailable(prefix, "the reply ended before its listing")
            for row in reply.get("Contents", ()):
                if not row["Key"].endswith("/"):  # a console's folder marker is no object of ours
                    yield Listed(row["Key"][len(self._prefix) :], row["Size"])
                    left -= 1
            if not reply["IsTruncated"]:
                return
            asked = {"ContinuationToken": reply["NextContinuationToken"]}

    @property
    def key_prefix(self) -> str:
        """What stands before every key in the bucket: empty, or a prefix with its slash."""
        return self._prefix

    def bucket_setting(self, read: str) -> dict[str, Any] | None:
        """The reply of one call that reads a setting of the bucket, named as the SDK does; None where nothing is set.

        Raises StoreDenied, StoreUnavailable, BucketMissing.
        """
        try:
            reply: dict[str, Any] = getattr(self._client, read)(Bucket=self._bucket)
        except Exception as error:
            if _code(error) in _NOT_SET:
                return None
            raise _explain("list", "", error) from error
        return reply

    def clock_ms(self) -> int | None:
        """By the newest reply's Date, errors included, carried on with the clock that also counts time asleep."""
        told = self._told
        return None if told is None else told[0] + _boot_ms() - told[1]

    def _note_date(self, response_dict: dict[str, Any] | None = None, **_: Any) -> None:
        date = (response_dict or {}).get("headers", {}).get("Date", "")
        # Whole or not at all: a reply that was cut off in its year would set the clock back by centuries.
        if _DATE.fullmatch(date):
            with suppress(ValueError):
                self._told = round(parsedate_to_datetime(date).timestamp() * 1000), _boot_ms()

    def close(self) -> None:
        """Close the pool of connections."""
        self._client.close()


def _ask_for_checksum(params: dict[str, Any], **_: Any) -> None:
    # As a header and not as ChecksumMode, with which the SDK would compare some of them itself, and first.
    params["headers"]["x-amz-checksum-mode"] = "ENABLED"


def _boot_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _whole(etag: str) -> bool:
    # RFC 9110, section 8.8.3: an entity tag is quoted. One without its last quote was cut off.
    return len(etag) > 1 and etag.endswith('"')


def _status(error: Exception) -> int:
    reply = getattr(error, "response", None) or {}
    status: int = reply.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status


def _code(error: Exception) -> str:
    reply = getattr(error, "response", None) or {}
    return str(reply.get("Error", {}).get("Code", ""))


def _explain(kind: str, key: str, error: Exception, if_absent: bool = False, if_match: bool = False) -> StoreError:
    """What an exception of the SDK means to a caller of `kind`: get, put, delete or list."""
    from botocore import exceptions as sdk

    if isinstance(error, sdk.ClientError):
        return _explain_reply(kind, key, error, if_absent, if_match)
    detail = f"{type(error).__name__}: {error}"
    if isinstance(
        error,
        (
            sdk.NoCredentialsError,
            sdk.PartialCredentialsError,
            sdk.NoAuthTokenError,
            sdk.SSOError,
            sdk.UnauthorizedSSOTokenError,
        ),
    ):
        return StoreDenied(key, detail)
    # Raised before a connection stood: refused, no such host, no route, or no credentials to sign with for now.
    unsent = (sdk.EndpointConnectionError, sdk.ConnectTimeoutError, sdk.CredentialRetrievalError)
    if kind == "put" and not isinstance(error, unsent):
        return Ambiguous(key, detail)
    return StoreUnavailable(key, detail)


def _explain_reply(kind: str, key: str, error: ClientError, if_absent: bool, if_match: bool) -> StoreError:
    status = _status(error)
    code = str(error.response.get("Error", {}).get("Code", ""))
    detail = f"{status} {code}: {error.response.get('Error', {}).get('Message', '')}"
    retry_after_ms = SLOW_DOWN_RETRY_MS if status in (429, 503) else 1000
    unclear = Ambiguous if kind == "put" else StoreUnavailable

    if code == "NoSuchBucket":
        return BucketMissing(key, detail)
    if status == 301 or code in ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        where = headers.get("x-amz-bucket-region", "another one")
        return StoreDenied(key, f"wrong region, the bucket is in {where}: {detail}")
    if status == 412:
        # Where nothing was asked for, nothing can have been lost: somebody on the way has answered.
        return PreconditionLost(key, detail) if if_absent or if_match else unclear(key, detail, retry_after_ms)
    if status == 404:
        # What has to be matched is not there, whatever the vendor calls it; the caller reads again anyway.
        if if_match:
            return PreconditionLost(key, detail)
        # Only this code is the store's word on the object. A bare 404 comes from a proxy, a wrong endpoint or a reply
        # without its body, and taking it for absence would tell a user that a session never was.
        if code == "NoSuchKey" and kind != "put":
            return ObjectNotFound(key, detail)
        return StoreUnavailable(key, detail)
    if status >= 500 or status in _RESEND_STATUS or code in _RESEND_CODES or status < 400:
        return unclear(key, detail, retry_after_ms)
    # Credentials (401, 403, and 400 ExpiredToken), policy, or the request as such: sending it again changes nothing.
    return StoreDenied(key, detail)
