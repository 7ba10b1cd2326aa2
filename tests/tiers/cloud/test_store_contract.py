"""What every object store keeps, shown on a folder and on a real S3 server."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import EndpointConnectionError

from sessiond import errors
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.cloud.open import open_store
from sessiond.tiers.cloud.probe import probe
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
from tests.seaweed import Seaweed, make_bucket

SEGMENT_BYTES_MAX = 4 << 20

OpenStore = Callable[[str], ObjectStore]


# By the name of the bucket; one may keep what is replaced and deleted, without that any caller sees it.
BUCKETS: dict[str, dict[str, bool]] = {"s3": {}, "versioned": {"versioned": True}, "locked": {"locked": True}}


@pytest.fixture(params=["folder", *BUCKETS])
def open_named(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenStore]:
    """Opens the store of a name: the same objects for the same name, and no others."""
    opened: list[ObjectStore] = []
    if request.param == "folder":

        def open_one(name: str) -> ObjectStore:
            opened.append(open_store((tmp_path / name).as_uri()))
            return opened[-1]

    else:
        seaweed: Seaweed = request.getfixturevalue("seaweed")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
        test = secrets.token_hex(8)
        bucket = seaweed.bucket
        if BUCKETS[request.param]:
            bucket = make_bucket(seaweed, request.param, **BUCKETS[request.param])

        def open_one(name: str) -> ObjectStore:
            opened.append(open_store(f"s3://{bucket}/{test}/{name}", endpoint=seaweed.endpoint))
            return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_named: OpenStore) -> ObjectStore:
    return open_named("a")


def keys(rows: Iterator[Listed]) -> list[str]:
    return [row.key for row in rows]


@pytest.mark.parametrize("size_bytes", [0, 1, 65_536, SEGMENT_BYTES_MAX])
def test_a_get_returns_the_bytes_and_the_etag_of_the_put(store: ObjectStore, size_bytes: int):
    body = secrets.token_bytes(size_bytes)
    etag = store.put("s/ab/1", body)
    assert store.get("s/ab/1") == Stored(body, etag)


def test_another_opening_of_the_same_store_sees_what_was_put_and_another_store_does_not(open_named: OpenStore):
    open_named("a").put("bucket.json", b"{}")
    assert open_named("a").get("bucket.json").body == b"{}"
    with pytest.raises(ObjectNotFound):
        open_named("b").get("bucket.json")
    assert keys(open_named("b").list("")) == []


def test_a_put_without_condition_replaces(store: ObjectStore):
    old = store.put("m/1", b"old")
    new = store.put("m/1", b"new and longer")
    assert old != new
    assert store.get("m/1") == Stored(b"new and longer", new)


def test_if_absent_creates_once(store: ObjectStore):
    etag = store.put("m/1", b"mine", if_absent=True)
    with pytest.raises(PreconditionLost):
        store.put("m/1", b"theirs", if_absent=True)
    assert store.get("m/1") == Stored(b"mine", etag)


def test_if_match_replaces_only_the_version_it_names(store: ObjectStore):
    first = store.put("m/1", b"one")
    second = store.put("m/1", b"two", if_match=first)
    with pytest.raises(PreconditionLost):
        store.put("m/1", b"three", if_match=first)
    assert store.get("m/1") == Stored(b"two", second)


def test_if_match_on_nothing_is_lost_and_creates_nothing(store: ObjectStore):
    etag = store.put("m/1", b"one")
    store.delete("m/1")
    for key in ("m/1", "m/never", "nowhere/at/all"):
        with pytest.raises(PreconditionLost):
            store.put(key, b"two", if_match=etag)
        with pytest.raises(ObjectNotFound):
            store.get(key)


def test_a_deleted_object_can_be_created_again(store: ObjectStore):
    store.put("m/1", b"one")
    store.delete("m/1")
    store.put("m/1", b"two", if_absent=True)
    assert store.get("m/1").body == b"two"


def test_a_put_with_two_conditions_is_refused_before_anything_is_written(store: ObjectStore):
    with pytest.raises(ValueError, match="one condition"):
        store.put("m/1", b"one", if_absent=True, if_match="x")
    assert keys(store.list("")) == []


def test_absence_is_told_as_absence(store: ObjectStore):
    store.put("m/1", b"one")
    for key in ("m/2", "m/1x", "m", "never/seen"):
        with pytest.raises(ObjectNotFound):
            store.get(key)


def test_deleting_removes_and_deleting_again_succeeds(store: ObjectStore):
    store.put("m/1", b"one")
    store.put("m/2", b"two")
    store.delete("m/1")
    store.delete("m/1")
    store.delete("never/seen")
    with pytest.raises(ObjectNotFound):
        store.get("m/1")
    assert keys(store.list("")) == ["m/2"]


def test_a_range_includes_both_ends_and_carries_the_etag_of_the_whole(store: ObjectStore):
    etag = store.put("s/1", b"0123456789")
    for first, last, seen in [(0, 0, b"0"), (2, 5, b"2345"), (0, 9, b"0123456789"), (7, 100, b"789")]:
        assert store.get("s/1", first, last) == Stored(seen, etag)


def test_a_range_behind_the_end_is_empty(store: ObjectStore):
    store.put("s/1", b"0123456789")
    assert store.get("s/1", 10, 20).body == b""
    with pytest.raises(ObjectNotFound):
        store.get("s/2", 10, 20)


def test_half_a_range_is_refused(store: ObjectStore):
    for first, last in [(1, None), (None, 1), (2, 1), (-1, 1)]:
        with pytest.raises(ValueError, match="range"):
            store.get("s/1", first, last)


BAD_KEYS = ["", "/m/1", "m/1/", "m//1", ".", "..", "../x", "m/../x", "m/./x", ".locks/00", ".tmp/x", "m/1\n", "m/ä"]
BAD_KEYS += ["m/a b", "m\\1", "m/\0", "x" * 256, "/".join(["x" * 200] * 4)]


def test_a_bad_key_is_refused_by_every_method(store: ObjectStore):
    for key in BAD_KEYS:
        for call in (
            store.get,
            store.delete,
            lambda key: store.put(key, b""),
            lambda key: store.put(key, b"", if_match="x"),
        ):
            with pytest.raises(ValueError, match="not a key"):
                call(key)
    for prefix in ("/", "m//", "../", "m/..", ".tmp", "m/*"):
        with pytest.raises(ValueError, match="not a key"):
            store.list(prefix)
    for key in ("a", "-", "_x", "a..b", "b/.c", "x" * 255, "/".join(["y" * 191] * 4)):
        store.put(key, b"fine")
        assert store.get(key).body == b"fine"


def test_a_listing_ascends_and_keeps_to_its_prefix(store: ObjectStore):
    put = ["bucket.json", "m/0a", "m/0b", "m/Z", "n/node", "s/0a/1-x", "s/0a/2-y", "s/0b/1-z", "u/t/v/w/x", "u/t0/v"]
    for key in reversed(put):
        store.put(key, key.encode())
    assert list(store.list("")) == [Listed(key, len(key)) for key in put]
    assert keys(store.list("m/")) == ["m/0a", "m/0b", "m/Z"]
    assert keys(store.list("m/0")) == ["m/0a", "m/0b"]
    assert keys(store.list("m/0b")) == ["m/0b"]
    assert keys(store.list("m")) == ["m/0a", "m/0b", "m/Z"]
    assert keys(store.list("s/0")) == ["s/0a/1-x", "s/0a/2-y", "s/0b/1-z"]
    assert keys(store.list("u/t/")) == ["u/t/v/w/x"]
    assert keys(store.list("s/0a/1-x/")) == []
    assert keys(store.list("nothing/")) == []


def test_a_listing_goes_on_after_a_key_whether_or_not_it_is_there(store: ObjectStore):
    put = ["m/b", "s/b/1", "s/b/3", "s/c/1", "u/b"]
    for key in put:
        store.put(key, b"")
    # Not "m" or "s/b": SeaweedFS leaves out what is in a folder when it is to start after the folder's name.
    asked = ["", "m/", "m/b", "m/c", "s/b/", "s/b/1", "s/b/2", "s/b/9", "s/bb", "s/c/1", "t", "u/b", "v"]
    for start_after in asked:
        assert keys(store.list("", start_after)) == [key for key in put if key > start_after], start_after
        assert keys(store.list("s/", start_after)) == [
            key for key in put if key > start_after and key.startswith("s/")
        ], start_after


def test_a_listing_ends_at_its_limit(store: ObjectStore):
    put = [f"m/{number:02d}/{letter}" for number, letter in itertools.product(range(4), "ab")]
    for key in put:
        store.put(key, b"")
    for limit in (1, 3, 8, 9, 2_000):
        assert keys(store.list("m/", limit=limit)) == put[:limit]
    assert keys(store.list("m/", start_after=put[2], limit=2)) == put[3:5]
    with pytest.raises(ValueError, match="limit"):
        store.list("m/", limit=0)


# Not in SeaweedFS's versioned buckets, which give one of these twice. No folder of ours holds both files and folders
# whose names begin alike.
@pytest.mark.parametrize("open_named", ["folder", "s3"], indirect=True)
def test_paging_gives_each_key_once_even_where_a_folder_and_a_file_share_a_beginning(store: ObjectStore):
    # SeaweedFS has its own order for these (see S3Store), so that only completeness is the same everywhere.
    put = {"l/B", "l/a-b", "l/a.c", "l/a/x", "l/a/y/z", "l/a0", "l/b"}
    for key in put:
        store.put(key, b"")
    seen: list[str] = []
    while page := keys(store.list("l/", seen[-1] if seen else "", limit=2)):
        seen += page
    assert sorted(seen) == sorted(put)
    assert sorted(keys(store.list("l/a"))) == ["l/a-b", "l/a.c", "l/a/x", "l/a/y/z", "l/a0"]


def test_of_threads_that_write_at_once_exactly_one_wins(store: ObjectStore):
    threads = 4
    with ThreadPoolExecutor(threads) as pool:
        etag: str | None = None
        for turn in range(3):
            start = threading.Barrier(threads)

            def attempt(
                number: int, turn: int = turn, start: threading.Barrier = start, etag: str | None = etag
            ) -> str | None:
                start.wait()
                try:
                    return store.put("m/1", b"%d in %d" % (number, turn), if_absent=etag is None, if_match=etag)
                except PreconditionLost:
                    return None

            told = list(pool.map(attempt, range(threads)))
            winners = [number for number, won in enumerate(told) if won]
            assert len(winners) == 1
            etag = told[winners[0]]
            assert store.get("m/1") == Stored(b"%d in %d" % (winners[0], turn), etag or "")


def test_a_fit_store_passes_the_probe_which_leaves_nothing_behind(store: ObjectStore):
    store.put("m/1", b"one")
    probe(store)
    assert keys(store.list("")) == ["m/1"]


def test_requests_and_bytes_are_counted_by_kind_and_outcome(store: ObjectStore):
    counted = CountingStore(store)
    assert (counted.url, counted.reachable, counted.last_error, counted.snapshot()) == (store.url, True, "", [])
    etag = counted.put("m/1", b"12345")
    counted.put("m/1", b"123", if_match=etag)
    with pytest.raises(PreconditionLost):
        counted.put("m/1", b"1234567", if_match=etag)
    counted.get("m/1")
    counted.get("m/1", 0, 1)
    with pytest.raises(ObjectNotFound):
        counted.get("m/2")
    assert keys(counted.list("m/")) == ["m/1"]
    counted.delete("m/1")
    assert counted.snapshot() == [
        ("delete", "ok", 1, 0),
        ("get", "not_found", 1, 0),
        ("get", "ok", 2, 5),
        ("list", "ok", 1, 0),
        ("put", "lost", 1, 7),
        ("put", "ok", 2, 8),
    ]
    assert (counted.reachable, counted.last_error) == (True, "")


class Told(ObjectStore):
    """A store that answers each call by calling what the test put in `answer`."""

    url = "told:"

    def __init__(self, answer: Callable[[], object]) -> None:
        self.answer = answer

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        self.answer()
        return Stored(b"", "")

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        self.answer()
        return "etag"

    def delete(self, key: str) -> None:
        self.answer()

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        yield Listed("m/1", 1)
        self.answer()

    def close(self) -> None:
        pass


def raising(error: Exception) -> Callable[[], object]:
    def answer() -> object:
        raise error

    return answer


@pytest.mark.parametrize(
    ("error", "outcome", "reachable"),
    [
        (Ambiguous("m/1", "reset"), "ambiguous", False),
        (StoreUnavailable("m/1", "refused"), "unavailable", False),
        (StoreDenied("m/1", "403"), "denied", False),
        (StoreDamaged("m/1", "checksum"), "damaged", False),
        (BucketMissing("m/1", "gone"), "bucket_missing", False),
        (PreconditionLost("m/1", "412"), "lost", True),
    ],
)
def test_the_newest_request_says_whether_the_store_is_reachable(error: Exception, outcome: str, reachable: bool):
    told = Told(raising(error))
    counted = CountingStore(told)
    with pytest.raises(type(error)):
        counted.put("m/1", b"123")
    assert counted.snapshot() == [("put", outcome, 1, 3)]
    assert (counted.reachable, counted.last_error) == (reachable, "" if reachable else str(error))
    with pytest.raises(type(error)):
        list(counted.list("m/"))
    told.answer = lambda: None
    counted.delete("m/1")
    assert (counted.reachable, counted.last_error) == (True, "")


def test_a_listing_that_its_reader_leaves_is_counted():
    counted = CountingStore(Told(lambda: None))
    rows = counted.list("m/")
    next(rows)
    assert counted.snapshot() == []
    rows.close()
    assert counted.snapshot() == [("list", "ok", 1, 0)]


def test_an_old_request_that_ends_late_does_not_hide_that_the_store_is_back():
    started, over = threading.Event(), threading.Event()

    def time_out() -> None:
        started.set()
        assert over.wait(30)
        raise Ambiguous("m/1", "timeout")

    told = Told(time_out)
    counted = CountingStore(told)
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(counted.put, "m/1", b"")
        assert started.wait(30)
        told.answer = lambda: None
        counted.put("m/1", b"")
        over.set()
        assert isinstance(late.exception(30), Ambiguous)
    assert (counted.reachable, counted.last_error) == (True, "")
    assert counted.snapshot() == [("put", "ambiguous", 1, 0), ("put", "ok", 1, 0)]


class Memory(ObjectStore):
    """A store in memory that does wrong, from its nth conditional put on, what the test tells it to."""

    url = "memory:"

    def __init__(self, fault: str = "", from_conditional: int = 0) -> None:
        self.fault = fault
        self.from_conditional = from_conditional
        self.conditional = 0
        self.answer: Callable[[bool], object] = lambda conditional: None
        self.objects: dict[str, tuple[bytes, str]] = {}
        self.lock = threading.Lock()
        self.versions = itertools.count(1)

    def has(self, fault: str) -> bool:
        return self.fault == fault and self.conditional >= self.from_conditional

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        with self.lock:
            if key not in self.objects:
                raise ObjectNotFound(key, "")
            body, etag = self.objects[key]
            return Stored(body[:-1] if self.has("damages") else body, "x" if self.has("mistakes etags") else etag)

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        with self.lock:
            self.conditional += if_absent or if_match is not None
            self.answer(if_absent or if_match is not None)
            found = self.objects.get(key)
            lost = (
                (if_absent and found and not self.has("ignores If-None-Match"))
                or (if_match is not None and not found and not self.has("matches the missing"))
                or (if_match is not None and found and found[1] != if_match and not self.has("ignores If-Match"))
            )
            if not lost or self.has("writes what it refuses"):
                self.objects[key] = body, str(next(self.versions))
            if lost:
                raise (StoreDenied if self.has("refuses losers") else PreconditionLost)(key, "4xx")
            return self.objects[key][1]

    def delete(self, key: str) -> None:
        with self.lock:
            self.objects.pop(key, None)

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        yield from (Listed(key, len(body)) for key, (body, _) in sorted(self.objects.items()))

    def close(self) -> None:
        pass


def refusing(error: StoreError) -> Callable[[bool], object]:
    """Answer every conditional write with this."""

    def answer(conditional: bool) -> None:
        if conditional:
            raise error

    return answer


# The probe makes 8 conditional writes, 8 more, and then three that must be lost.
@pytest.mark.parametrize(
    ("fault", "from_conditional", "seen"),
    [
        ("ignores If-None-Match", 0, "8 won, 0 lost, 0 unclear, 0 refused; exactly one must win"),
        ("ignores If-Match", 9, "8 won, 0 lost, 0 unclear, 0 refused; exactly one must win"),
        ("ignores If-Match", 17, "a write with If-Match with a stale etag was accepted"),
        ("ignores If-None-Match", 18, "a write with If-None-Match: * on what exists was accepted"),
        ("matches the missing", 0, "a write with If-Match on a deleted object was accepted"),
        ("refuses losers", 0, "1 won, 0 lost, 0 unclear, 7 refused (4xx); exactly one must win"),
        ("writes what it refuses", 0, "1 won, 7 lost, 0 unclear, 0 refused, but what was read back is not what"),
        ("writes what it refuses", 17, "a write that was refused changed the object"),
        ("damages", 0, "999 bytes were read back"),
        ("mistakes etags", 0, "the put returned the etag 1 and the get x"),
    ],
)
def test_an_unfit_store_is_refused_with_what_was_seen(fault: str, from_conditional: int, seen: str):
    memory = Memory(fault, from_conditional)
    with pytest.raises(errors.Invalid) as refused:
        probe(memory, attempts_concurrent=8)
    assert refused.value.reason == "STORE_UNFIT"
    assert seen in refused.value.message
    assert memory.objects == {}


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (PreconditionLost("", "412"), "0 won, 8 lost, 0 unclear, 0 refused; exactly one must win"),
        (StoreDenied("", "400 NotSupported"), "8 refused (400 NotSupported); exactly one must win"),
        (Ambiguous("", "501 NotImplemented"), "8 unclear, 0 refused (501 NotImplemented), 3 times in a row"),
    ],
)
def test_a_store_that_lets_nobody_win_is_refused(error: StoreError, seen: str):
    memory = Memory()
    memory.answer = refusing(error)
    with pytest.raises(errors.Invalid) as refused:
        probe(memory, attempts_concurrent=8)
    assert refused.value.reason == "STORE_UNFIT"
    assert seen in refused.value.message
    assert memory.objects == {}


def test_the_probe_forgives_409s_as_long_as_one_wins():
    memory = Memory()

    def conflict(conditional: bool) -> None:
        # All of the first race, then all but the last of each.
        if conditional and (memory.conditional <= 8 or (memory.conditional <= 24 and memory.conditional % 8)):
            raise Ambiguous("", "409 ConditionalRequestConflict")

    memory.answer = conflict
    probe(memory, attempts_concurrent=8)
    assert memory.conditional == 24 + 3
    assert memory.objects == {}


def test_a_store_that_goes_down_is_not_called_unfit():
    memory = Memory()

    def go_down(conditional: bool) -> None:
        if conditional:
            raise Ambiguous("", "500")
        if memory.conditional:
            raise StoreUnavailable("", "refused")

    memory.answer = go_down
    with pytest.raises(StoreUnavailable):
        probe(memory)
    memory.answer = refusing(StoreUnavailable("", "refused"))
    with pytest.raises(StoreUnavailable):
        probe(memory)


@pytest.mark.parametrize(
    ("url", "options", "setting", "words"),
    [
        ("file://data/x", {}, "cloud", "file:///"),
        ("file:data/x", {}, "cloud", "file:///"),
        ("/var/lib/sessiond", {}, "cloud", "file:///an/absolute/folder"),
        ("gs://bucket", {}, "cloud", "s3://bucket/prefix"),
        ("file:///data?x=1", {}, "cloud", "%3F"),
        ("s3://", {}, "cloud", "s3://bucket/prefix"),
        ("s3://user@bucket/x", {}, "cloud", "s3://bucket/prefix"),
        ("s3://bucket/../x", {}, "cloud", "prefix"),
        ("s3://[", {}, "cloud", "s3://bucket/prefix"),
        ("s3://bucket", {"endpoint": "127.0.0.1:9000"}, "s3_endpoint", "http://"),
        ("s3://bucket", {"region": "not a region"}, "cloud", "setting"),
    ],
)
def test_a_bad_setting_is_refused_with_what_to_write_instead(
    url: str, options: dict[str, str], setting: str, words: str
):
    with pytest.raises(errors.Invalid) as refused:
        open_store(url, **options)
    assert refused.value.reason == "INVALID_CONFIG"
    assert [path for path, _ in refused.value.fields] == [setting]
    assert words in refused.value.remedy


def test_the_url_of_a_store_opens_it_again(open_named: OpenStore, tmp_path: Path):
    store = open_named("with space" if "a" in open_named("a").url.partition("file:")[2] else "b")
    assert " " not in store.url
    if store.url.startswith("file:"):
        store.put("m/1", b"one")
        assert open_store(store.url).get("m/1").body == b"one"
        assert (tmp_path / "with space" / "m" / "1").read_bytes() == b"one"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "https://bucket-x.s3.amazonaws.com/m/1"),
        ({"region": "eu-west-3"}, "https://bucket-x.s3.eu-west-3.amazonaws.com/m/1"),
        ({"path_style": True, "region": "eu-west-3"}, "https://s3.eu-west-3.amazonaws.com/bucket-x/m/1"),
        ({"endpoint": "http://store.test:9000"}, "http://store.test:9000/bucket-x/m/1"),
        ({"endpoint": "http://store.test", "path_style": False}, "http://bucket-x.store.test/m/1"),
    ],
)
def test_addresses_are_virtual_hosts_on_aws_and_paths_at_an_endpoint(
    options: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    store = open_store("s3://bucket-x", **options)
    asked: list[str] = []

    def answer(request: AWSPreparedRequest, **_: object) -> None:
        asked.append(request.url)
        raise EndpointConnectionError(endpoint_url=request.url)

    store._client.meta.events.register("before-send.s3", answer)
    with pytest.raises(StoreUnavailable):
        store.delete("m/1")
    store.close()
    assert asked == [expected]
