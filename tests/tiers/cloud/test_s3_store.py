"""What the S3 store makes of every way in which a store, a network or a proxy can answer."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from hashlib import sha256
from typing import Any

import google_crc32c
import pytest
from botocore import exceptions as sdk
from botocore.awsrequest import AWSPreparedRequest, AWSRequest
from botocore.response import StreamingBody
from botocore.stub import Stubber

from sessiond import errors
from sessiond.tiers.cloud.bucket import (
    Bucket,
    lease_key,
    manifest_key,
    object_kind,
    orphan_key,
    refusal,
    segment_index_key,
    segment_key,
)
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.cloud.s3 import S3Store
from sessiond.tiers.cloud.store import (
    Ambiguous,
    BucketMissing,
    Listed,
    ObjectNotFound,
    PreconditionLost,
    Stored,
    StoreDamaged,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)
from tests.seaweed import Seaweed

Call = Callable[[S3Store], object]

GET: Call = lambda store: store.get("m/1")  # noqa: E731
GET_RANGE: Call = lambda store: store.get("m/1", 0, 4)  # noqa: E731
PUT: Call = lambda store: store.put("m/1", b"body")  # noqa: E731
CREATE: Call = lambda store: store.put("m/1", b"body", if_absent=True)  # noqa: E731
REPLACE: Call = lambda store: store.put("m/1", b"body", if_match='"old"')  # noqa: E731
DELETE: Call = lambda store: store.delete("m/1")  # noqa: E731
LIST: Call = lambda store: list(store.list("m/"))  # noqa: E731

# Of b"body", by google_crc32c, which the compiled core has nothing of.
CRC32C = b64encode(google_crc32c.value(b"body").to_bytes(4, "big")).decode()

OPERATIONS = {
    GET: "get_object",
    GET_RANGE: "get_object",
    PUT: "put_object",
    CREATE: "put_object",
    REPLACE: "put_object",
    DELETE: "delete_object",
    LIST: "list_objects_v2",
}
NAMES = {
    GET: "get",
    GET_RANGE: "get-range",
    PUT: "put",
    CREATE: "create",
    REPLACE: "replace",
    DELETE: "delete",
    LIST: "list",
}
WRITES = [PUT, CREATE, REPLACE]
OTHERS = [GET, GET_RANGE, DELETE, LIST]


def name_of(value: object) -> str | None:
    return NAMES.get(value) if callable(value) and value in NAMES else None


def set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys from the environment, and nothing of whoever runs the tests."""
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent/credentials")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    set_credentials(monkeypatch)


@pytest.fixture(scope="module")
def store() -> Iterator[S3Store]:
    """One for all tests that answer in the SDK's stead: making a client takes a tenth of a second."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        set_credentials(monkeypatch)
        store = S3Store("bucket", "pre/fix", endpoint="http://127.0.0.1:1", path_style=True)
    with closing(store):
        yield store


@pytest.fixture
def stub(store: S3Store) -> Iterator[Stubber]:
    """Answers of the SDK itself, for what no real server can be made to say."""
    with Stubber(store._client) as stubber:
        yield stubber
        stubber.assert_no_pending_responses()


# Replies of the store

REPLIES: list[tuple[Call, int, str, type[StoreError]]] = [
    *[(call, 412, "PreconditionFailed", PreconditionLost) for call in (CREATE, REPLACE)],
    *[(call, 409, "ConditionalRequestConflict", Ambiguous) for call in (CREATE, REPLACE)],
    # Nothing was asked for that could have been lost.
    (PUT, 412, "PreconditionFailed", Ambiguous),
    *[(call, 412, "PreconditionFailed", StoreUnavailable) for call in OTHERS],
    *[(PUT, 409, code, Ambiguous) for code in ("OperationAborted", "409")],
    *[(call, status, "", Ambiguous) for call in WRITES for status in (500, 501, 502, 503, 504, 599)],
    *[(call, status, "", StoreUnavailable) for call in OTHERS for status in (409, 429, 500, 502, 503, 504)],
    *[(REPLACE, 404, code, PreconditionLost) for code in ("NoSuchKey", "404", "")],
    *[(call, 404, "NoSuchBucket", BucketMissing) for call in WRITES + OTHERS],
    *[(call, 404, "NoSuchKey", ObjectNotFound) for call in (GET, GET_RANGE)],
    # A bare 404 is a proxy's or a wrong endpoint's: it must not become "there is no such session".
    *[(call, 404, code, StoreUnavailable) for call in OTHERS for code in ("404", "", "NotFound", "NoRoute")],
    *[(call, 404, "404", StoreUnavailable) for call in (PUT, CREATE)],
    *[(call, 403, "AccessDenied", StoreDenied) for call in WRITES + OTHERS],
    *[(call, 401, "", StoreDenied) for call in WRITES + OTHERS],
    *[
        (PUT, 403, code, StoreDenied)
        for code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "RequestTimeTooSkewed")
    ],
    *[(call, 400, "ExpiredToken", StoreDenied) for call in (PUT, GET)],
    *[(call, 301, "PermanentRedirect", StoreDenied) for call in (PUT, GET, DELETE, LIST)],
    *[(call, 400, "AuthorizationHeaderMalformed", StoreDenied) for call in (PUT, GET)],
    # The body came damaged, late or too fast: nothing says that it was not applied, and sending it again may help.
    *[(PUT, 400, code, Ambiguous) for code in ("BadDigest", "IncompleteBody", "RequestTimeout")],
    *[(PUT, status, "", Ambiguous) for status in (307, 408, 429)],
    *[(call, 400, "InvalidRequest", StoreDenied) for call in (PUT, GET)],
    *[(PUT, status, "", StoreDenied) for status in (405, 413, 416)],
]


@pytest.mark.parametrize(("call", "status", "code", "expected"), REPLIES, ids=name_of)
def test_a_refusal_means_what_the_contract_says(
    store: S3Store, stub: Stubber, call: Call, status: int, code: str, expected: type[StoreError]
):
    stub.add_client_error(OPERATIONS[call], code, "in the store's words", status)
    with pytest.raises(StoreError) as raised:
        call(store)
    assert type(raised.value) is expected
    assert raised.value.key == ("m/" if call is LIST else "m/1")
    assert str(status) in raised.value.detail
    assert "in the store's words" in raised.value.detail
    assert raised.value.retry_after_ms == (5000 if status in (429, 503) else 1000)


def test_a_delete_of_what_is_absent_succeeds_whatever_the_vendor_answers(store: S3Store, stub: Stubber):
    stub.add_client_error("delete_object", "NoSuchKey", "", 404)
    store.delete("m/1")


def test_a_wrong_region_is_named(store: S3Store, stub: Stubber):
    headers = {"x-amz-bucket-region": "eu-west-3"}
    stub.add_client_error("get_object", "PermanentRedirect", "", 301, response_meta={"HTTPHeaders": headers})
    with pytest.raises(StoreDenied, match="region, the bucket is in eu-west-3"):
        store.get("m/1")


SDK_ERRORS: list[tuple[Exception, type[StoreError], type[StoreError]]] = [
    # What happened, what it is to a put, what it is to the others.
    (sdk.EndpointConnectionError(endpoint_url="u", error="refused"), StoreUnavailable, StoreUnavailable),
    (sdk.ConnectTimeoutError(endpoint_url="u"), StoreUnavailable, StoreUnavailable),
    (sdk.CredentialRetrievalError(provider="p", error_msg="m"), StoreUnavailable, StoreUnavailable),
    (sdk.NoCredentialsError(), StoreDenied, StoreDenied),
    (sdk.UnauthorizedSSOTokenError(), StoreDenied, StoreDenied),
    (sdk.ReadTimeoutError(endpoint_url="u"), Ambiguous, StoreUnavailable),
    (sdk.ConnectionClosedError(endpoint_url="u"), Ambiguous, StoreUnavailable),
    (sdk.SSLError(endpoint_url="u", error="e"), Ambiguous, StoreUnavailable),
    (sdk.ProxyConnectionError(proxy_url="u"), Ambiguous, StoreUnavailable),
    (sdk.HTTPClientError(error="e"), Ambiguous, StoreUnavailable),
    (sdk.FlexibleChecksumError(error_msg="e"), Ambiguous, StoreUnavailable),
    (ConnectionResetError(104, "reset"), Ambiguous, StoreUnavailable),
    (RuntimeError("never seen before"), Ambiguous, StoreUnavailable),
]


@pytest.mark.parametrize("call", WRITES + OTHERS, ids=name_of)
@pytest.mark.parametrize(("error", "to_put", "to_others"), SDK_ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_of_the_sdk_means_what_the_contract_says(
    store: S3Store, call: Call, error: Exception, to_put: type[StoreError], to_others: type[StoreError]
):
    def fail(**_: object) -> None:
        raise error

    events = store._client.meta.events
    events.register("before-send.s3", fail)
    try:
        with pytest.raises(StoreError) as raised:
            call(store)
    finally:
        events.unregister("before-send.s3", fail)
    assert type(raised.value) is (to_put if call in WRITES else to_others)
    assert raised.value.__cause__ is error


# What is asked of the store


def test_each_call_asks_for_exactly_what_it_means(store: S3Store, stub: Stubber):
    where = {"Bucket": "bucket", "Key": "pre/fix/m/1"}
    said = {
        "Body": b"body",
        "ChecksumCRC32C": CRC32C,
        "ContentType": "application/octet-stream",
        "Metadata": {"sessiond-kind": "manifest"},
    }
    stub.add_response("put_object", {"ETag": '"1"'}, {**where, **said})
    stub.add_response("put_object", {"ETag": '"2"'}, {**where, **said, "IfNoneMatch": "*"})
    stub.add_response("put_object", {"ETag": '"3"'}, {**where, **said, "IfMatch": '"old"'})
    assert [PUT(store), CREATE(store), REPLACE(store)] == ['"1"', '"2"', '"3"']
    stub.add_response("delete_object", {}, where)
    DELETE(store)
    for call, asked in ((GET, where), (GET_RANGE, {**where, "Range": "bytes=0-4"})):
        body = StreamingBody(io.BytesIO(b"01234"), 5)
        reply = {"Body": body, "ContentLength": 5, "ETag": '"4"', "ResponseMetadata": {"HTTPStatusCode": 206}}
        stub.add_response("get_object", reply, asked)
        assert call(store) == Stored(b"01234", '"4"')


def test_a_listing_is_asked_for_page_by_page_and_gives_keys_without_the_prefix(store: S3Store, stub: Stubber):
    where = {"Bucket": "bucket", "Prefix": "pre/fix/m/"}
    rows = [{"Key": f"pre/fix/m/{number}", "Size": number} for number in range(4)]
    marker = {"Key": "pre/fix/m/folder/", "Size": 0}
    stub.add_response(
        "list_objects_v2",
        {"Contents": [*rows[:2], marker], "IsTruncated": True, "NextContinuationToken": "next"},
        {**where, "MaxKeys": 1000, "StartAfter": "pre/fix/m/!"},
    )
    stub.add_response(
        "list_objects_v2",
        {"Contents": rows[2:], "IsTruncated": False},
        {**where, "MaxKeys": 998, "ContinuationToken": "next"},
    )
    assert list(store.list("m/", "m/!", limit=1000)) == [Listed(f"m/{number}", number) for number in range(4)]
    stub.add_response(
        "list_objects_v2",
        {"Contents": rows[:1], "IsTruncated": True, "NextContinuationToken": "next"},
        {**where, "MaxKeys": 1},
    )
    assert list(store.list("m/", limit=1)) == [Listed("m/0", 0)]


def test_a_store_that_ignores_a_range_gives_the_range_all_the_same(store: S3Store, stub: Stubber):
    for status, seen in ((200, b"23"), (206, b"0123456789")):
        reply = {"Body": StreamingBody(io.BytesIO(b"0123456789"), 10), "ContentLength": 10, "ETag": '"4"'}
        stub.add_response("get_object", {**reply, "ResponseMetadata": {"HTTPStatusCode": status}})
        assert store.get("m/1", 2, 3).body == seen


# A server that breaks off


class Server:
    """Listens on a free port, reads one whole request per connection, sends `reply` and hangs up."""

    def __init__(self, reply: bytes, keep_silent: bool = False) -> None:
        self.reply = reply
        self.keep_silent = keep_silent
        self.requests: list[bytes] = []
        self.received = threading.Semaphore(0)
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, connection.makefile("rb") as stream:
                self._answer(connection, stream)

    def _answer(self, connection: socket.socket, stream: io.BufferedReader) -> None:
        head = b""
        while line := stream.readline():
            head += line
            if line == b"\r\n":
                break
        fields = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
        }
        if fields.get(b"expect"):
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = stream.read(int(fields.get(b"content-length", 0)))
        self.requests.append(head + body)
        self.received.release()
        if self.keep_silent:
            self._ended.wait(30)
        connection.sendall(self.reply)


def s3_store(server: Server, **options: Any) -> S3Store:
    return S3Store("bucket", endpoint=server.endpoint, path_style=True, **options)


# Each says that it is the connection's last: else the next request may be sent down one that is just being closed.
OK = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
PUT_REPLY = OK + b'Content-Length: 0\r\nETag: "0123456789abcdef"\r\n\r\n'
GET_FIELDS = [b"Content-Length: 10\r\n", b'ETag: "0123456789abcdef"\r\n']
LIST_BODY = (
    b'<?xml version="1.0"?><ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>'
    b"<Contents><Key>m/1</Key><Size>1</Size></Contents></ListBucketResult>"
)
LIST_REPLY = OK + b"Content-Length: %d\r\n\r\n%s" % (len(LIST_BODY), LIST_BODY)


def test_a_put_whose_reply_is_cut_off_anywhere_is_ambiguous_or_has_its_whole_etag():
    with Server(b"") as server, closing(s3_store(server)) as store:
        ambiguous = 0
        for end in range(len(PUT_REPLY) + 1):
            server.reply = PUT_REPLY[:end]
            try:
                assert store.put("m/1", b"body", if_absent=True) == '"0123456789abcdef"'
            except Ambiguous:
                ambiguous += 1
                assert end <= PUT_REPLY.index(b'f"') + 1
        assert ambiguous > len(PUT_REPLY) * 3 / 4
        assert len(server.requests) == len(PUT_REPLY) + 1


@pytest.mark.parametrize("fields", [GET_FIELDS, GET_FIELDS[::-1]], ids=["length first", "etag first"])
def test_a_get_whose_reply_is_cut_off_anywhere_is_unavailable(fields: list[bytes]):
    whole = OK + b"".join(fields) + b"\r\n0123456789"
    with Server(b"") as server, closing(s3_store(server)) as store:
        for end in range(len(whole)):
            server.reply = whole[:end]
            with pytest.raises(StoreUnavailable):
                store.get("m/1")
        server.reply = whole
        assert store.get("m/1") == Stored(b"0123456789", '"0123456789abcdef"')


def test_a_listing_whose_reply_is_cut_off_anywhere_is_unavailable():
    with Server(b"") as server, closing(s3_store(server)) as store:
        for end in range(len(LIST_REPLY)):
            server.reply = LIST_REPLY[:end]
            with pytest.raises(StoreUnavailable):
                list(store.list("m/"))
        server.reply = LIST_REPLY
        assert list(store.list("m/")) == [Listed("m/1", 1)]


def test_an_absence_whose_reply_is_cut_off_is_not_absence():
    body = b"<Error><Code>NoSuchKey</Code><Message>no</Message></Error>"
    reply = b"HTTP/1.1 404 Not Found\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    with Server(b"") as server, closing(s3_store(server)) as store:
        for end in range(len(reply)):
            server.reply = reply[:end]
            with pytest.raises(StoreUnavailable):
                store.get("m/1")
        server.reply = reply
        with pytest.raises(ObjectNotFound):
            store.get("m/1")


CHECKSUMS = {
    "crc32c": lambda body: google_crc32c.value(body).to_bytes(4, "big"),
    "sha256": lambda body: sha256(body).digest(),
    "crc32": lambda body: zlib.crc32(body).to_bytes(4, "big"),
}


def get_reply(body: bytes, checksum: str, etag: bytes = b'"e"') -> bytes:
    head = b"Content-Length: %d\r\nETag: %s\r\n%s\r\n\r\n" % (len(body), etag, checksum.encode())
    return OK + head + body


@pytest.mark.parametrize("name", CHECKSUMS)
def test_a_body_that_does_not_match_its_checksum_is_never_returned(name: str):
    told = f"x-amz-checksum-{name}: {b64encode(CHECKSUMS[name](b'good')).decode()}"
    with Server(get_reply(b"evil", told)) as server, closing(s3_store(server)) as store:
        with pytest.raises(StoreUnavailable, match="checksum"):
            store.get("m/1")
        server.reply = get_reply(b"good", told)
        assert store.get("m/1").body == b"good"
        # Other wrong bytes each time: they become wrong on their way.
        for wrong in (b"evil", b"vile", b"evil"):
            server.reply = get_reply(wrong, told)
            with pytest.raises(StoreUnavailable):
                store.get("m/1")
        # The same wrong bytes again: they lie there like this, and reading once more is no remedy.
        with pytest.raises(StoreDamaged):
            store.get("m/1")
        server.reply = get_reply(b"evil", told, etag=b'"f"')
        with pytest.raises(StoreUnavailable):
            store.get("m/1")


def test_what_says_nothing_of_the_whole_body_is_not_compared_with_it():
    with Server(b"") as server, closing(s3_store(server)) as store:
        for told in ("x-amz-checksum-crc32c: AAAAAA==-2", "x-amz-checksum-crc64nvme: AAAAAAAAAAA=", "x-other: 1"):
            server.reply = get_reply(b"good", told)
            assert store.get("m/1").body == b"good"
        part = get_reply(b"oo", "x-amz-checksum-crc32c: AAAAAA==").replace(b"200 OK", b"206 Partial Content")
        server.reply = part
        assert store.get("m/1", 1, 2).body == b"oo"


def test_a_damaged_object_is_corrupt_to_whoever_asked_for_a_session():
    for key, reason in [("m/1", "CORRUPT_MANIFEST"), ("s/1/2", "CORRUPT_SEGMENT"), ("o/1/2", "CORRUPT_SEGMENT")]:
        refused = refusal(StoreDamaged(key, "it does not match"))
        assert (type(refused), refused.reason) == (errors.Corrupt, reason)


@pytest.mark.parametrize("name", ["crc32c", "sha256", "none"])
def test_a_put_carries_the_checksum_that_is_set_and_no_other_and_a_get_asks_for_it(name: str):
    with Server(PUT_REPLY) as server, closing(s3_store(server, checksum=name)) as store:
        store.put("m/1", b"body")
        server.reply = get_reply(b"body", "x-amz-checksum-crc32c: AAAAAA==")
        if name == "none":
            assert store.get("m/1").body == b"body"
        else:
            with pytest.raises(StoreUnavailable):
                store.get("m/1")
    put, got = server.requests
    sent = [line for line in put.lower().split(b"\r\n") if line.startswith((b"x-amz-checksum", b"x-amz-trailer"))]
    if name == "none":
        assert sent == []
        assert b"checksum" not in got.lower()
    else:
        assert sent == [b"x-amz-checksum-%s: %s" % (name.encode(), b64encode(CHECKSUMS[name](b"body")).lower())]
        assert b"x-amz-checksum-mode: ENABLED\r\n" in got


def test_tags_kind_and_encryption_go_with_each_put_as_they_are_set(store: S3Store):
    options = {"tags": {"team": "chat & co", "env": "prod"}, "sse": "aws:kms", "kms_key": "arn:aws:kms:x"}
    with Server(PUT_REPLY) as server, closing(s3_store(server, **options)) as store:
        store.put("s/ab/1-2-3", b"body")
        store.put("bucket.json", b"{}")
    segment, bucket = (request.split(b"\r\n") for request in server.requests)
    assert b"x-amz-tagging: team=chat+%26+co&env=prod&sessiond-kind=segment" in segment
    assert b"x-amz-meta-sessiond-kind: segment" in segment
    assert b"x-amz-server-side-encryption: aws:kms" in segment
    assert b"x-amz-server-side-encryption-aws-kms-key-id: arn:aws:kms:x" in segment
    assert b"Content-Type: application/octet-stream" in segment
    assert b"x-amz-meta-sessiond-kind: bucket" in bucket
    assert b"Content-Type: application/json" in bucket


def test_without_tags_or_encryption_none_are_sent():
    with Server(PUT_REPLY) as server, closing(s3_store(server)) as store:
        store.put("s/ab/1-2-3", b"body")
    assert b"tagging" not in server.requests[0].lower()
    assert b"encryption" not in server.requests[0].lower()


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("bucket.json", "bucket"),
        (manifest_key(bytes(16)), "manifest"),
        (segment_key(bytes(16), 1, 1, bytes(32)), "segment"),
        (segment_index_key(bytes(16), 1, bytes(32)), "index"),
        (orphan_key(bytes(16), 1, 1, bytes(32)), "orphan"),
        (Bucket(bytes(16), bytes(32)).user_index_key("t", "u", 1, bytes(16)), "user"),
        (lease_key("node-1"), "lease"),
        ("x/00/00005110/00", "expiry"),
        ("probe/passed-1", "probe"),
        ("lost+found", "other"),
    ],
)
def test_every_key_says_what_kind_of_object_it_names(key: str, kind: str):
    assert object_kind(key) == kind


def test_silence_ends_at_the_read_timeout():
    for call in WRITES + OTHERS:
        with Server(b"", keep_silent=True) as server, closing(s3_store(server, read_timeout_ms=50)) as store:
            with pytest.raises(StoreError, match=r"[Tt]imeout") as raised:
                call(store)
            assert type(raised.value) is (Ambiguous if call in WRITES else StoreUnavailable)
            assert server.received.acquire(timeout=30)
            assert len(server.requests) == 1


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 500 Oops\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"])
def test_one_call_is_one_request(reply: bytes):
    with Server(reply) as server, closing(s3_store(server)) as store:
        for number, call in enumerate(WRITES + OTHERS, 1):
            with pytest.raises(Ambiguous if call in WRITES else StoreUnavailable):
                call(store)
            assert len(server.requests) == number


def test_a_refused_connection_sent_nothing_and_is_unavailable():
    # Bound and not listening: the port stays ours and refuses.
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        with closing(S3Store("bucket", endpoint=endpoint, path_style=True)) as store:
            for call in WRITES + OTHERS:
                with pytest.raises(StoreUnavailable):
                    call(store)


def test_a_connection_that_is_not_accepted_in_time_sent_nothing_and_is_unavailable():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(full.getsockname())
        endpoint = f"http://127.0.0.1:{full.getsockname()[1]}"
        with closing(S3Store("bucket", endpoint=endpoint, path_style=True, connect_timeout_ms=50)) as store:
            assert store._client.meta.config.connect_timeout == 0.05
            with pytest.raises(StoreUnavailable, match="ConnectTimeoutError"):
                store.put("m/1", b"body")
        for client in waiting:
            client.close()


# The store's clock

NEW_YEAR = b"Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n"
NEW_YEAR_MS = 1_767_225_600_000


@pytest.mark.parametrize("status", [b"200 OK", b"412 Precondition Failed", b"503 Slow Down"])
def test_the_clock_is_the_stores_by_whatever_it_answered_last(status: bytes, monkeypatch: pytest.MonkeyPatch):
    boot_ms = 5_000
    monkeypatch.setattr("sessiond.tiers.cloud.s3._boot_ms", lambda: boot_ms)
    later = b"Date: Thu, 01 Jan 2026 00:01:00 GMT\r\n"
    head, _, rest = PUT_REPLY.partition(b"\r\n")
    with Server(head + b"\r\n" + NEW_YEAR + rest) as server, closing(s3_store(server)) as store:
        assert store.clock_ms() is None
        store.put("m/1", b"body")
        assert store.clock_ms() == NEW_YEAR_MS
        boot_ms += 1_500
        assert store.clock_ms() == NEW_YEAR_MS + 1_500
        server.reply = b"HTTP/1.1 " + status + b"\r\n" + later + rest
        with suppress(StoreError):
            store.put("m/1", b"body")
        assert store.clock_ms() == NEW_YEAR_MS + 60_000
        # A reply without a date leaves it as it was, and so does none at all.
        for reply in (PUT_REPLY, b""):
            server.reply = reply
            with suppress(StoreError):
                store.put("m/1", b"body")
            assert store.clock_ms() == NEW_YEAR_MS + 60_000


def test_a_date_that_is_cut_off_does_not_move_the_clock():
    with Server(b"") as server, closing(s3_store(server)) as store:
        for end in range(len(OK), len(OK) + len(NEW_YEAR) - 2):
            server.reply = (OK + NEW_YEAR)[:end]
            with pytest.raises(Ambiguous):
                store.put("m/1", b"body")
            assert store.clock_ms() is None


# Credentials and settings


def test_without_credentials_everything_is_denied(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with Server(PUT_REPLY) as server, closing(s3_store(server)) as store:
        for call in WRITES + OTHERS:
            with pytest.raises(StoreDenied, match="credentials"):
                call(store)
        assert server.requests == []


def test_half_a_set_of_credentials_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(errors.Denied) as refused:
        S3Store("bucket")
    assert refused.value.reason == "STORE_DENIED"


def test_a_profile_that_does_not_exist_is_refused_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(errors.Invalid, match="nobody") as refused:
        S3Store("bucket")
    assert refused.value.reason == "INVALID_CONFIG"


def test_a_bad_prefix_is_a_defect_of_the_caller():
    for prefix in ("/a", "a/", "../a", "/".join(["x" * 100] * 3)):
        with pytest.raises(ValueError, match="not a"):
            S3Store("bucket", prefix)


def test_the_sdk_is_imported_only_by_those_who_use_it():
    script = "import sys, sessiond.tiers.cloud.open; print([name for name in sys.modules if name.startswith('boto')])"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


# The real server


@pytest.fixture
def real(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> Seaweed:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    return seaweed


def test_a_missing_bucket_is_missing(real: Seaweed):
    with closing(S3Store("nowhere", endpoint=real.endpoint, path_style=True)) as store:
        for call in [GET, GET_RANGE, PUT, DELETE, LIST]:
            with pytest.raises(BucketMissing):
                call(store)


def test_the_clock_of_a_real_store_is_about_this_machines(real: Seaweed):
    with closing(CountingStore(S3Store(real.bucket, "clock", endpoint=real.endpoint, path_style=True))) as store:
        assert store.clock_ms() is None
        with pytest.raises(ObjectNotFound):
            store.get("m/1")
        told_ms = store.clock_ms()
        # A wide margin: only that it is a date at all, and in milliseconds.
        assert told_ms is not None
        assert abs(told_ms - time.time_ns() // 1_000_000) < 600_000


@pytest.mark.parametrize("name", ["crc32c", "sha256"])
def test_a_real_store_refuses_a_body_that_changed_on_its_way_and_the_writer_may_send_it_again(real: Seaweed, name: str):
    options = {"endpoint": real.endpoint, "path_style": True, "checksum": name}
    with closing(S3Store(real.bucket, f"changed-{name}", **options)) as store:

        def change(request: AWSPreparedRequest, **_: object) -> None:
            # As on the way: whatever the SDK signs and sends besides is of the body that was handed over.
            request.body = b"evil"

        events = store._client.meta.events
        # Without the hash of the body in the signature, as over TLS; else that alone would refuse it.
        store._client.meta.events.register("before-sign.s3", _unsigned_body)
        events.register("before-send.s3", change)
        with pytest.raises(Ambiguous, match="BadDigest"):
            store.put("m/1", b"good", if_absent=True)
        events.unregister("before-send.s3", change)
        with pytest.raises(ObjectNotFound):
            store.get("m/1")
        store.put("m/1", b"good", if_absent=True)
        assert store.get("m/1").body == b"good"


def _unsigned_body(request: AWSRequest, **_: object) -> None:
    request.headers["X-Amz-Content-SHA256"] = "UNSIGNED-PAYLOAD"


def test_a_real_store_keeps_kind_tags_and_checksum(real: Seaweed):
    options = {"endpoint": real.endpoint, "path_style": True, "tags": {"team": "chat & co"}, "sse": "AES256"}
    with closing(S3Store(real.bucket, "tagged", **options)) as store:
        store.put("u/1/2/3", b"body")
        assert store.get("u/1/2/3").body == b"body"
        where = {"Bucket": real.bucket, "Key": "tagged/u/1/2/3"}
        head = store._client.head_object(**where, ChecksumMode="ENABLED")
        assert head["Metadata"] == {"sessiond-kind": "user"}
        assert (head["ContentType"], head["ChecksumCRC32C"]) == ("application/octet-stream", CRC32C)
        assert head["ServerSideEncryption"] == "AES256"
        tags = store._client.get_object_tagging(**where)["TagSet"]
        assert {tag["Key"]: tag["Value"] for tag in tags} == {"team": "chat & co", "sessiond-kind": "user"}


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_denied(real: Seaweed, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "wrong")
    with closing(S3Store(real.bucket, endpoint=real.endpoint, path_style=True)) as store:
        for call in WRITES + OTHERS:
            with pytest.raises(StoreDenied):
                call(store)


def test_connections_are_kept_and_shared_by_threads(real: Seaweed):
    with closing(S3Store(real.bucket, "shared", endpoint=real.endpoint, path_style=True)) as store:
        pool = store._client._endpoint.http_session._manager
        with ThreadPoolExecutor(8) as threads:
            for _ in range(3):
                list(threads.map(lambda number: store.put(f"m/{number}", b"x" * 100), range(40)))
                bodies = threads.map(lambda number: store.get(f"m/{number}").body, range(40))
                assert set(bodies) == {b"x" * 100}
        [connections] = [pool.pools[key] for key in pool.pools.keys()]  # noqa: SIM118
        assert connections.num_requests == 240
        assert connections.num_connections <= 8
