"""StateService from the outside: one winner of many writers, no write twice or lost, nothing left of what is gone."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.client import Client, Conflict, NotFound
from sessiond.core import rules
from sessiond.core.rules import user_session
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.cloud.bucket import manifest_key, open_bucket
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.store import ObjectStore
from sessiond.tiers.hot.environment import TABLES, Reader
from sessiond.v1 import admin_pb2, session_pb2, state_pb2, turn_pb2
from sessiond.verify import Report, verify
from tests.cli.command import run
from tests.wire import HOT, PARTIAL, Refusal, Wire, refusal, user

IN_CLOUD, AT_EDGE = turn_pb2.DURABILITY_CLOUD, turn_pb2.DURABILITY_EDGE
MIB = 1024**2
WRITERS = 16
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
PATIENCE_S = 60
_names = (f"s{number}" for number in itertools.count())


class Blobs:
    """Blobs of a session or of a user over the port."""

    def __init__(self, wire: Wire, session_id: str = "", user_id: str = "") -> None:
        self.wire = wire
        self.scope = (
            state_pb2.StateScope(session_id=session_id) if session_id else state_pb2.StateScope(user_id=user_id)
        )

    def put(self, key: str, content: bytes, write_id: str, **fields: object) -> state_pb2.PutStateResponse:
        request = state_pb2.PutStateRequest(scope=self.scope, key=key, content=content, write_id=write_id, **fields)
        return self.wire.states.PutState(request, timeout=30)

    def get(self, key: str, **fields: object) -> state_pb2.GetStateResponse:
        return self.wire.states.GetState(state_pb2.GetStateRequest(scope=self.scope, key=key, **fields), timeout=30)

    def delete(self, key: str, write_id: str, **fields: object) -> state_pb2.DeleteStateResponse:
        request = state_pb2.DeleteStateRequest(scope=self.scope, key=key, write_id=write_id, **fields)
        return self.wire.states.DeleteState(request, timeout=30)

    def list(self, **fields: object) -> state_pb2.ListStatesResponse:
        return self.wire.states.ListStates(state_pb2.ListStatesRequest(scope=self.scope, **fields), timeout=30)


@pytest.fixture(scope="module")
def shared() -> Iterator[Daemon]:
    """One daemon for tests that leave it as it was."""
    with running_daemon(flush_interval_ms=50) as daemon:
        yield daemon


@pytest.fixture
def wire(shared: Daemon) -> Iterator[Wire]:
    with contextlib.closing(Wire(shared.address)) as opened:
        yield opened


@pytest.fixture
def blobs(wire: Wire) -> Blobs:
    """The blobs of a session of the test's own."""
    name = next(_names)
    wire.create(name, user_id="ann")
    return Blobs(wire, name)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "data", flush_interval_ms=50) as started:
        yield started


def clean(daemon: Daemon, cloud: str = "") -> Report:
    report = Report()
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": cloud or daemon.cloud})
    assert verify(settings, lambda *_: None, report=report) == []
    return report


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def flush(wire: Wire) -> None:
    assert not wire.admin.Flush(admin_pb2.FlushRequest(), timeout=30).failed_sessions


@contextlib.contextmanager
def bucket_of(daemon: Daemon) -> Iterator[tuple[ObjectStore, Callable[[str], bytes]]]:
    """The daemon's folder store, and the hash of a session's id."""
    store = FolderStore(Path(daemon.cloud.removeprefix("file://")))
    bucket = open_bucket(store, b"", 0, make=False)
    try:
        yield store, lambda session: rules.session_hash(bucket.hash_key, "default", session)
    finally:
        store.close()


def objects_of(store: ObjectStore, h: bytes) -> list[str]:
    return sorted(row.key for row in store.list("", limit=100_000) if h.hex() in row.key)


# Writers ------------------------------------------------------------------------------------------------------------


def test_of_fifty_writers_over_one_version_exactly_one_wins(blobs: Blobs) -> None:
    version = blobs.put("counter", b"0", "first", expected_version=0).header.version
    for turn in range(3):

        def write(number: int, turn: int = turn, version: int = version) -> state_pb2.PutStateResponse | Refusal:
            try:
                return blobs.put("counter", b"%d" % number, f"{turn}-{number}", expected_version=version)
            except grpc.RpcError as error:
                return Refusal(error)

        with ThreadPoolExecutor(WRITERS) as pool:
            answers = list(pool.map(write, range(50)))
        won = [answer for answer in answers if isinstance(answer, state_pb2.PutStateResponse)]
        lost = [answer for answer in answers if isinstance(answer, Refusal)]
        assert len(won) == 1
        assert {(answer.code, answer.reason) for answer in lost} == {
            (grpc.StatusCode.ABORTED, "STATE_VERSION_MISMATCH")
        }
        assert {answer.metadata["version"] for answer in lost} == {str(won[0].header.version)}
        assert blobs.get("counter").header == won[0].header or blobs.get("counter").header.durability == IN_CLOUD
        version = won[0].header.version


def test_a_repeated_write_is_answered_as_the_first_and_changes_nothing(blobs: Blobs) -> None:
    first = blobs.put("k", b"one", "w1", media_type="text/plain", labels={"a": "1"}, expected_version=0)
    second = blobs.put("k", b"two", "w2", expected_version=first.header.version)
    # The first again, as a network that repeats would send it, after it was written over.
    again = blobs.put("k", b"one", "w1", media_type="text/plain", labels={"a": "1"}, expected_version=0)
    assert again.duplicate
    assert again.header.version == first.header.version
    assert again.header.updated_at_unix_ms == first.header.updated_at_unix_ms
    assert blobs.get("k").content == b"two"
    for changed in ({"content": b"One"}, {"media_type": ""}, {"labels": {}}, {"key": "other"}):
        asked = {"key": "k", "content": b"one", "media_type": "text/plain", "labels": {"a": "1"}, **changed}
        found = refusal(blobs.put, write_id="w1", **asked)
        assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "WRITE_ID_REUSED")
    assert blobs.delete("k", "d1").deleted
    third = blobs.put("k", b"three", "w3", expected_version=0)
    assert third.header.version > second.header.version + 1, "a deletion has a version, too"
    repeated = blobs.delete("k", "d1")
    assert (repeated.deleted, repeated.duplicate) == (True, True)
    assert blobs.get("k").content == b"three"
    assert not blobs.delete("absent", "d2").deleted
    blobs.put("absent", b"x", "w4")
    assert not blobs.delete("absent", "d2").deleted, "the first answer stands"
    assert refusal(blobs.delete, "k", "d3", expected_version=1).reason == "STATE_VERSION_MISMATCH"


def test_a_write_is_remembered_over_the_last_96_and_refused_beyond_them_where_a_version_is_expected(
    blobs: Blobs,
) -> None:
    first = blobs.put("k", b"one", "w", expected_version=0)
    for number in range(95):
        blobs.put("other", b"%d" % number, f"o{number}")
    assert blobs.put("k", b"one", "w", expected_version=0).duplicate
    blobs.put("other", b"x", "o95")
    assert refusal(blobs.put, "k", b"one", "w", expected_version=0).reason == "STATE_VERSION_MISMATCH"
    assert blobs.get("k").header.version == first.header.version


def test_known_content_is_not_sent_again(blobs: Blobs) -> None:
    version = blobs.put("k", b"x" * 1000, "w").header.version
    same = blobs.get("k", known_version=version)
    assert (same.not_modified, same.content, same.header.size_bytes) == (True, b"", 1000)
    assert blobs.get("k", known_version=version - 1).content == b"x" * 1000


def test_a_list_comes_in_pages_by_the_bytes_of_the_keys(blobs: Blobs) -> None:
    keys = ["a", "a/1", "a/2", "ab", "b", "é", "z" * 256]
    for number, key in enumerate(reversed(keys)):
        blobs.put(key, b"%d" % number, key[:100])
    assert [header.key for header in blobs.list().headers] == sorted(keys, key=str.encode)
    assert [header.key for header in blobs.list(key_prefix="a/").headers] == ["a/1", "a/2"]
    seen, token = [], ""
    while True:
        page = blobs.list(page_size=2, page_token=token)
        seen += [header.key for header in page.headers]
        token = page.next_page_token
        if not token:
            break
        assert len(page.headers) == 2
    assert seen == sorted(keys, key=str.encode)
    assert not any(header.ByteSize() > 500 for header in page.headers)


class Counting:
    """Threads that count up one number by compare and set, over every kill, and what they were told."""

    def __init__(self, address: str, scopes: list[dict[str, str]]) -> None:
        self.address = address
        self.scopes = scopes
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.counted = [0] * len(scopes)
        self.newest = [0] * len(scopes)
        self.failures: list[BaseException] = []

    def run(self, number: int) -> None:
        try:
            self._run(number)
        except BaseException as error:
            self.failures.append(error)

    def _run(self, number: int) -> None:
        rng = random.Random(number)
        wire = Wire(self.address)
        writes = 0
        while not self.stop.is_set():
            place = rng.randrange(len(self.scopes))
            blobs = Blobs(wire, **self.scopes[place])
            durability = IN_CLOUD if rng.random() < 0.2 else AT_EDGE
            writes += 1
            found = None
            while not self.stop.is_set():
                try:
                    if found is None:
                        found = blobs.get("n")
                    content = b"%d" % (int(found.content) + 1) + b" " * rng.choice((0, 0, 5000, 60_000))
                    write_id, expected = f"{number}-{writes}", found.header.version
                    reply = self._sent(blobs, content, write_id, expected, durability)
                    if reply is None:
                        return
                    with self.lock:
                        self.counted[place] += 1
                        self.newest[place] = max(self.newest[place], reply.header.version)
                    break
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.ABORTED:
                        writes, found = writes + 1, None
                    elif error.code() not in RETRYABLE:
                        raise
                    else:
                        self.stop.wait(0.02)
        wire.close()

    def _sent(
        self, blobs: Blobs, content: bytes, write_id: str, expected: int, durability: int
    ) -> state_pb2.PutStateResponse | None:
        """The answer to one write, sent again and again; also at the end, so that it is known what was applied."""
        while True:
            try:
                return blobs.put("n", content, write_id, expected_version=expected, durability=durability)
            except grpc.RpcError as error:
                if error.code() not in RETRYABLE:
                    raise
                time.sleep(0.02)


def test_counting_goes_on_exactly_over_sigkills(daemon: Daemon) -> None:
    """Every count that was acknowledged is in the number, and none is twice; writes are repeated over every kill."""
    wire = Wire(daemon.address)
    wire.create("s")
    scopes = [{"session_id": "s"}, {"user_id": "ann"}]
    for scope in scopes:
        Blobs(wire, **scope).put("n", b"0", "first")
    counting = Counting(daemon.address, scopes)
    threads = [threading.Thread(target=counting.run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        rng = random.Random(4)
        for _ in range(4):
            goal = sum(counting.counted) + rng.randrange(10, 60)
            until(lambda goal=goal: sum(counting.counted) >= goal or bool(counting.failures))
            daemon.kill()
            daemon.start()
    finally:
        counting.stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert not counting.failures
    wire = Wire(daemon.address)
    for place, scope in enumerate(scopes):
        found = Blobs(wire, **scope).get("n")
        assert int(found.content) == counting.counted[place] > 0
        assert found.header.version >= counting.newest[place]
        assert not found.missing
    flush(wire)
    clean(daemon)
    assert daemon.terminate() == 0
    clean(daemon)


# Lost, moved, ended -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", [{"session_id": "s"}, {"user_id": "ann"}], ids=["session", "user"])
def test_a_lost_disk_loses_no_cloud_write_and_says_what_else_may_be_missing(
    tmp_path: Path, scope: dict[str, str]
) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=3_600_000) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        blobs = Blobs(wire, **scope)
        safe = blobs.put("safe", b"in the cloud", "w1", durability=IN_CLOUD).header
        assert (safe.durability, blobs.get("safe").header.durability) == (IN_CLOUD, IN_CLOUD)
        lost = blobs.put("safe", b"on the disk only", "w2").header
        assert lost.durability == AT_EDGE
        blobs.put("never", b"on the disk only", "w3")
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.start()
        blobs = Blobs(Wire(daemon.address), **scope)
        for _ in range(2):  # from the cloud tier, then from the rows
            found = blobs.get("safe")
            assert (found.content, found.header.version, found.rung) == (b"in the cloud", safe.version, PARTIAL)
            [missing] = found.missing
            assert (missing.epoch, missing.after_version) == (1, safe.version)
            absent = refusal(blobs.get, "never")
            assert (absent.reason, absent.metadata["missing_epoch"]) == ("STATE_NOT_FOUND", "1")
            assert [lack.epoch for lack in blobs.list().missing] == [1]
            until(lambda: blobs.get("safe", known_version=1).header.version == safe.version)
        # The write that was lost goes again, and is the newest of all.
        again = blobs.put("safe", b"on the disk only", "w2")
        assert (again.duplicate, again.header.version > lost.version) == (False, True)
        assert not blobs.get("safe").missing
        assert blobs.list().rung == PARTIAL
        assert not blobs.list(accept_missing=1).missing
        assert blobs.list().rung == HOT
        assert "missing_epoch" not in refusal(blobs.get, "never").metadata
        assert daemon.terminate() == 0
        daemon.start()
        assert not Blobs(Wire(daemon.address), **scope).list().missing, "accepted for good"
        clean(daemon)


def test_blobs_follow_their_session_to_another_node(tmp_path: Path) -> None:
    cloud = f"file://{tmp_path / 'cloud'}"
    with (
        running_daemon(tmp_path / "1", cloud, node_name="n1", flush_interval_ms=50) as one,
        running_daemon(tmp_path / "2", cloud, node_name="n2", flush_interval_ms=50) as two,
    ):
        near, far = Wire(one.address), Wire(two.address)
        near.create("s", user_id="ann")
        for number, scope in enumerate(({"session_id": "s"}, {"user_id": "ann"})):
            here, there = Blobs(near, **scope), Blobs(far, **scope)
            first = here.put("k", b"one", "w1").header
            # Both nodes answer, and the one that owns it keeps it: the epoch stands.
            assert there.get("k").content == b"one"
            second = there.put("k", b"two", "w2", expected_version=first.version).header
            assert (second.version, here.get("k").content) == (first.version + 1, b"two")
            assert refusal(there.put, "k", b"x", "w3", expected_version=first.version).metadata["version"] == str(
                second.version
            )
            assert there.delete("absent", "d").deleted is False
            assert [header.key for header in there.list().headers] == ["k"]
            if number:
                assert refusal(far.sessions.GetSession, session_pb2.GetSessionRequest(session_id="ann")).reason
        near.close()
        assert one.terminate() == 0
        for scope in ({"session_id": "s"}, {"user_id": "ann"}):
            there = Blobs(far, **scope)
            found = there.get("k")
            assert (found.content, list(found.missing)) == (b"two", [])
            assert there.put("k", b"two", "w2", expected_version=first.version).duplicate
            third = there.put("k", b"three", "w4", expected_version=found.header.version, durability=IN_CLOUD).header
            assert third.version >> 32 > found.header.version >> 32
        far.close()
        assert two.terminate() == 0
        clean(two, cloud)


def test_a_deleted_session_takes_its_blobs_with_it_and_leaves_its_users_alone(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    wire.create("s", user_id="ann")
    wire.create("kept", user_id="ann")
    for scope in ({"session_id": "s"}, {"session_id": "kept"}, {"user_id": "ann"}):
        for number in range(3):
            blobs = Blobs(wire, **scope)
            blobs.put("a", b"secret %d" % number, f"w{number}", durability=IN_CLOUD)
            blobs.put("b", b"more" * 1000, f"v{number}")
    request = session_pb2.DeleteSessionRequest(session_id="s")
    assert wire.sessions.DeleteSession(request, timeout=30).deleted
    gone = Blobs(wire, "s")
    for call in (
        lambda: gone.get("a"),
        lambda: gone.put("a", b"x", "new"),
        lambda: gone.delete("a", "new"),
        lambda: gone.list(),
    ):
        found = refusal(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_DELETED")
    assert Blobs(wire, "kept").get("a").content == b"secret 2"
    assert Blobs(wire, user_id="ann").get("a").content == b"secret 2"
    with bucket_of(daemon) as (store, hash_of):
        h = hash_of("s")
        assert objects_of(store, h) == [manifest_key(h)]
        assert b"secret" not in store.get(manifest_key(h)).body
        assert any(key.startswith("b/") for key in objects_of(store, hash_of("kept")))
        assert any(key.startswith("b/") for key in objects_of(store, hash_of(user_session("ann"))))
    reader = Reader(Path(daemon.data_dir) / "hot")
    with reader.read() as transaction:
        assert [table for table in TABLES for key, _ in transaction.scan(table, b"") if h in key] == []
    reader.close()
    assert daemon.terminate() == 0
    report = clean(daemon)
    assert (report.checked, report.deleted) == (2, 1), "what belongs to a user is no conversation"


def test_blobs_of_an_expired_session_are_read_only_or_gone(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    for name, action in (("archive", turn_pb2.EXPIRY_ACTION_ARCHIVE), ("delete", turn_pb2.EXPIRY_ACTION_DELETE)):
        wire.create(name, policy=turn_pb2.SessionPolicy(expiry=turn_pb2.Expiry(ttl_ms=1500, action=action)))
        Blobs(wire, name).put("k", b"x", "w", durability=IN_CLOUD)

    def upkeep() -> admin_pb2.UpkeepStatus:
        return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30).upkeep

    until(lambda: upkeep().archived_sessions == 1 and upkeep().deleted_sessions == 1)
    archived = Blobs(wire, "archive")
    assert archived.get("k").content == b"x"
    assert [header.key for header in archived.list().headers] == ["k"]
    for call in (lambda: archived.put("k", b"y", "late"), lambda: archived.delete("k", "late")):
        found = refusal(call)
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_ARCHIVED")
    assert refusal(Blobs(wire, "delete").get, "k").reason == "SESSION_DELETED"
    with bucket_of(daemon) as (store, hash_of):
        h = hash_of("delete")
        until(lambda: objects_of(store, h) == [manifest_key(h)])
    assert daemon.terminate() == 0
    clean(daemon)


def test_what_belongs_to_a_user_is_in_no_list_and_no_count_of_conversations(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    blobs = Blobs(wire, user_id="ann")
    assert refusal(blobs.get, "k").reason == "STATE_NOT_FOUND"
    assert not blobs.list().headers
    assert not blobs.delete("k", "w0").deleted
    with bucket_of(daemon) as (store, hash_of):
        assert not objects_of(store, hash_of(user_session("ann"))), "reading makes nothing"
        blobs.put("k", b"x", "w", durability=IN_CLOUD)
        assert {key[0] for key in objects_of(store, hash_of(user_session("ann")))} == {"m", "b"}
    assert refusal(Blobs(wire, user_id="eve").get, "k").reason == "STATE_NOT_FOUND"
    for fields in ({}, {"user_id": "ann"}):
        assert not wire.sessions.ListSessions(session_pb2.ListSessionsRequest(**fields), timeout=30).sessions
    status = wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)
    assert (status.hot.sessions, status.ownership.owned_sessions) == (0, 0)
    assert not run("export", "--server", daemon.address).out
    for call in (wire.resume, wire.create, lambda name: wire.append(name, user("t", "x"))):
        assert refusal(call, user_session("ann")).reason == "INVALID_SESSION_ID"
    assert daemon.terminate() == 0
    assert clean(daemon).checked == 0


# Limits and bad input ------------------------------------------------------------------------------------------------


def test_three_mib_over_s3_come_back_whole_and_a_claim_stays_one_get(seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    cloud = f"s3://{seaweed.bucket}/three-mib"
    content = random.Random(3).randbytes(3 * MIB)
    with running_daemon(cloud=cloud, s3_endpoint=seaweed.endpoint, env=credentials, flush_interval_ms=50) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        blobs = Blobs(wire, "s")
        assert blobs.put("k", content, "w", durability=IN_CLOUD).header.durability == IN_CLOUD
        blobs.put("small", b"x", "w2")
        assert refusal(blobs.put, "k", content + b"x", "w3").reason == "BLOB_TOO_LARGE"
        assert daemon.terminate() == 0
        daemon.start()
        wire = Wire(daemon.address)
        wire.append("s", user("t", "hello"))

        def reads() -> dict[tuple[str, str], int]:
            rows = wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30).cloud.objects
            return {(row.kind, row.object): row.count for row in rows if row.object in ("manifest", "blob")}

        before = reads()
        assert before.get(("get", "manifest")) == 1
        assert ("get", "blob") not in before
        blobs = Blobs(wire, "s")
        with ThreadPoolExecutor(WRITERS) as pool:
            found = list(pool.map(lambda _: blobs.get("k").content == content, range(WRITERS)))
        assert all(found)
        assert blobs.get("k").rung == HOT
        assert 1 <= reads()[("get", "blob")] <= 2, "those who wait share one read"
        settings = {"data_dir": str(daemon.data_dir), "cloud": cloud, "s3_endpoint": seaweed.endpoint}
        assert daemon.terminate() == 0
        assert verify(config.load(None, {}, settings), lambda *_: None) == []


def test_limits_of_one_scope_are_told_and_deleting_makes_room(blobs: Blobs) -> None:
    for number in range(128):
        blobs.put(f"k{number}", b"x", f"w{number}")
    found = refusal(blobs.put, "one more", b"x", "m")
    assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STATE_FULL")
    assert (found.metadata["found"], found.metadata["limit"]) == ("129", "128")
    assert blobs.put("k5", b"y", "over").header.version, "writing over one needs no room"
    assert blobs.delete("k7", "d").deleted
    assert blobs.put("one more", b"x", "m").header.version
    assert len(blobs.list(page_size=1000).headers) == 128
    # Their keys and labels travel in every manifest.
    full = refusal(lambda: [blobs.put(f"k{n}", b"x", f"l{n}", labels={"n": "v" * 1000}) for n in range(8, 100)])
    assert (full.reason, full.metadata["limit"]) == ("STATE_FULL", str(64 * 1024))


def test_a_scope_holds_64_mib(tmp_path: Path) -> None:
    with running_daemon(tmp_path, flush_interval_ms=3_600_000) as daemon:
        wire = Wire(daemon.address)
        blobs = Blobs(wire, user_id="ann")
        content = bytes(3 * MIB)
        for number in range(21):
            blobs.put(f"k{number}", content, f"w{number}")
        blobs.put("rest", bytes(MIB), "rest")
        assert refusal(blobs.put, "one more", b"x", "more").metadata["limit"] == str(64 * MIB)
        flush(wire)
        assert daemon.terminate() == 0
        clean(daemon)


LONG = "x" * 257
BAD = [
    ("INVALID_BLOB", "scope", {"scope": state_pb2.StateScope()}),
    ("INVALID_SESSION_ID", "scope.session_id", {"scope": state_pb2.StateScope(session_id="")}),
    ("INVALID_SESSION_ID", "scope.session_id", {"scope": state_pb2.StateScope(session_id="~user/ann")}),
    ("INVALID_USER_ID", "scope.user_id", {"scope": state_pb2.StateScope(user_id="")}),
    ("INVALID_USER_ID", "scope.user_id", {"scope": state_pb2.StateScope(user_id=LONG)}),
    ("INVALID_USER_ID", "scope.user_id", {"scope": state_pb2.StateScope(user_id="a\nb")}),
    ("INVALID_BLOB", "scope.session_user_id", {"scope": state_pb2.StateScope(user_id="a", session_user_id="a")}),
    ("INVALID_BLOB", "key", {"key": ""}),
    ("INVALID_BLOB", "key", {"key": LONG}),
    ("INVALID_BLOB", "key", {"key": "a\nb"}),
    ("INVALID_BLOB", "key", {"key": "é" * 129}),
]
BAD_WRITES = [
    ("INVALID_WRITE_ID", "write_id", {"write_id": ""}),
    ("INVALID_WRITE_ID", "write_id", {"write_id": "x" * 129}),
    ("INVALID_BLOB", "durability", {"durability": 7}),
]
BAD_PUTS = [
    ("BLOB_TOO_LARGE", "content", {"content": bytes(3 * MIB + 1)}),
    ("INVALID_BLOB", "media_type", {"media_type": LONG}),
    ("INVALID_BLOB", "labels", {"labels": {str(number): "" for number in range(33)}}),
    ("INVALID_BLOB", "labels", {"labels": {"k": "v" * 1024}}),
    ("INVALID_BLOB", "labels", {"labels": {"": "v"}}),
]
METHODS = {
    "GetState": (state_pb2.GetStateRequest, BAD),
    "PutState": (state_pb2.PutStateRequest, [*BAD, *BAD_WRITES, *BAD_PUTS]),
    "DeleteState": (state_pb2.DeleteStateRequest, [*BAD, *BAD_WRITES]),
    "ListStates": (
        state_pb2.ListStatesRequest,
        [
            *(row for row in BAD if row[1].startswith("scope")),
            ("INVALID_BLOB", "key_prefix", {"key_prefix": LONG}),
            ("INVALID_PAGE_SIZE", "page_size", {"page_size": 1001}),
            ("INVALID_PAGE_TOKEN", "page_token", {"page_token": "AAAA"}),
        ],
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_field_is_named_and_nothing_is_written(blobs: Blobs, method: str) -> None:
    kind, table = METHODS[method]
    written = blobs.put("k", b"x", "first").header.version
    good: dict[str, object] = {"scope": blobs.scope}
    if method != "ListStates":
        good["key"] = "k"
    if method in ("PutState", "DeleteState"):
        good["write_id"] = "second"
    call = getattr(blobs.wire.states, method)
    for reason, field, fields in table:
        found = refusal(call, kind(**{**good, **fields}), timeout=30)
        assert (found.reason, found.fields) == (reason, [field]), fields
        assert found.code is grpc.StatusCode.INVALID_ARGUMENT
    assert blobs.get("k").header.version == written
    scope = state_pb2.StateScope(session_id=blobs.scope.session_id, session_user_id="eve")
    assert refusal(call, kind(**{**good, "scope": scope}), timeout=30).reason == "SESSION_NOT_FOUND"
    scope = state_pb2.StateScope(session_id="never")
    assert refusal(call, kind(**{**good, "scope": scope}), timeout=30).reason == "SESSION_NOT_FOUND"
    scope = state_pb2.StateScope(session_id=blobs.scope.session_id, session_user_id="ann")
    assert call(kind(**{**good, "scope": scope}), timeout=30).ByteSize()


# What looks after the bytes ------------------------------------------------------------------------------------------


def test_verify_names_every_object_of_a_blob_that_is_gone_or_changed_and_others_are_read(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    wire.create("s")
    for key in ("gone", "flipped", "sound"):
        Blobs(wire, "s").put(key, key.encode(), key)
    assert daemon.terminate() == 0
    cloud = Path(daemon.cloud.removeprefix("file://"))
    with bucket_of(daemon) as (store, hash_of):
        names = [key for key in objects_of(store, hash_of("s")) if key.startswith("b/")]
        by_content = {name: store.get(name).body for name in names}
    gone = next(name for name, body in by_content.items() if b"gone" in body[-30:])
    flipped = next(name for name, body in by_content.items() if b"flipped" in body[-30:])
    (cloud / gone).unlink()
    body = bytearray((cloud / flipped).read_bytes())
    body[-10] ^= 1
    (cloud / flipped).write_bytes(bytes(body))
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    found = verify(settings, lambda *_: None)
    assert {violation.invariant for violation in found} == {"I11"}
    assert [any(name in violation.explanation for violation in found) for name in (gone, flipped)] == [True, True]
    daemon.start()
    blobs = Blobs(Wire(daemon.address), "s")
    assert blobs.get("sound").content == b"sound"
    told = [refusal(blobs.get, key) for key in ("gone", "flipped")]
    assert {answer.code for answer in told} == {grpc.StatusCode.DATA_LOSS}
    assert [answer.reason for answer in told] == ["MISSING_BLOB", told[1].reason]
    # Whoever has the content writes it again, and all is well.
    for key in ("gone", "flipped"):
        blobs.put(key, b"again", f"again-{key}", durability=IN_CLOUD)
        assert blobs.get(key).content == b"again"
    assert daemon.terminate() == 0
    clean(daemon)


# Client and command line ---------------------------------------------------------------------------------------------


def test_the_client_and_the_commands_write_read_list_and_delete(daemon: Daemon, tmp_path: Path) -> None:
    with Client(daemon.address) as client:
        client.create_session("s", user_id="ann")
        header = client.put_state("plan", b"step 1", session_id="s", user_id="ann", expected_version=0)
        assert client.get_state("plan", session_id="s").content == b"step 1"
        with pytest.raises(Conflict) as conflict:
            client.put_state("plan", b"x", session_id="s", expected_version=0)
        assert conflict.value.metadata["version"] == str(header.version)
        with pytest.raises(NotFound) as absent:
            client.get_state("plan", user_id="änn")
        assert absent.value.reason == "STATE_NOT_FOUND"
        client.put_state("profile", b"{}", user_id="änn", labels={"v": "1"}, durability="CLOUD")
        assert [row.key for row in client.list_states(user_id="änn", page_size=1)] == ["profile"]
        assert client.delete_state("plan", session_id="s", expected_version=header.version)
        assert not client.delete_state("plan", session_id="s")
    server = ("--server", daemon.address)
    file = tmp_path / "file"
    file.write_bytes(b"\x00\xffbytes")
    put = ("state", "put", "notes", str(file), "--session", "s", *server)
    first = run(*put, "--media-type", "a/b", "--label", "x=y=z", "--durability", "cloud", "--json").json
    assert (first["size_bytes"], first["labels"], first["durability"]) == (7, {"x": "y=z"}, "DURABILITY_CLOUD")
    assert run(*put, "--expected", "1").code == 4
    assert run(*put, "--label", "none").code == 2
    copied = tmp_path / "copy"
    assert run("state", "get", "notes", "--session", "s", "--out", str(copied), *server).code == 0
    assert copied.read_bytes() == b"\x00\xffbytes"
    assert run("state", "get", "absent", "--session", "s", *server).code == 3
    assert run("state", "get", "notes", *server).code == 2
    listed = run("state", "list", "--session", "s", *server)
    assert "notes" in listed.out
    assert str(first["version"]) in listed.out
    assert json.loads(run("state", "list", "--user", "änn", "--json", *server).out)["key"] == "profile"
    assert "deleted" in run("state", "delete", "notes", "--session", "s", *server).out
    assert run("state", "delete", "notes", "--session", "s", "--json", *server).json == {
        "key": "notes",
        "deleted": False,
    }
