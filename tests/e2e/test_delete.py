"""A deleted session is gone from every answer and from both tiers, and its id is refused for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.core import rules
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.cloud.bucket import manifest_key, open_bucket
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.store import ObjectStore
from sessiond.tiers.hot.environment import TABLES, Reader
from sessiond.v1 import session_pb2, turn_pb2
from sessiond.verify import verify
from tests.wire import Wire, assistant, refusal, user

SECRET = "the words that must go"


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "data", flush_interval_ms=50) as started:
        yield started


def talk(wire: Wire, session: str, exchanges: int = 2, size: int = 40) -> None:
    wire.create(session, user_id="ada", metadata={"about": SECRET})
    for number in range(exchanges):
        wire.append(session, user(f"q{number}", SECRET + "x" * size), assistant(f"a{number}", SECRET))


def delete(wire: Wire, session: str, user_id: str = "") -> bool:
    request = session_pb2.DeleteSessionRequest(session_id=session, user_id=user_id)
    return wire.sessions.DeleteSession(request, timeout=30).deleted


def listed(wire: Wire, **fields: object) -> set[str]:
    reply = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(**fields), timeout=30)
    assert not reply.unreadable
    return {session.session_id for session in reply.sessions}


def assert_gone(wire: Wire, session: str) -> None:
    for call in (
        lambda: wire.resume(session),
        lambda: wire.resume(session, read_only=True),
        lambda: wire.append(session, user("new", "hello")),
        lambda: wire.create(session),
        lambda: wire.create(session, user_id="ada"),
        lambda: list(wire.turns(session)),
        lambda: wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30),
        lambda: wire.sessions.ListCheckpoints(session_pb2.ListCheckpointsRequest(session_id=session), timeout=30),
        lambda: wire.sessions.UpdateSession(
            session_pb2.UpdateSessionRequest(
                session_id=session, turn_id="u", change=turn_pb2.StateChange(metadata={"a": "b"})
            ),
            timeout=30,
        ),
    ):
        found = refusal(call)
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_DELETED"), found
    assert session not in listed(wire)
    assert session not in listed(wire, user_id="ada")
    assert not delete(wire, session)


def objects_of(store: ObjectStore, h: bytes) -> list[str]:
    return sorted(row.key for row in store.list("", limit=100_000) if h.hex() in row.key)


def rows_of(daemon: Daemon, h: bytes) -> list[str]:
    reader = Reader(Path(daemon.data_dir) / "hot")
    try:
        with reader.read() as transaction:
            return [table for table in TABLES for key, _ in transaction.scan(table, b"") if h in key]
    finally:
        reader.close()


def test_a_deleted_session_is_gone_from_every_answer_and_both_tiers_also_after_a_restart(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    # One long enough to have segments, one with its turns in the manifest only, one of somebody else's.
    talk(wire, "long", exchanges=8, size=30_000)
    talk(wire, "short")
    talk(wire, "kept")
    wire.append("long", user("last", "x"), durability=turn_pb2.DURABILITY_CLOUD)
    store = FolderStore(Path(daemon.data_dir) / "cloud")
    bucket = open_bucket(store, b"", 0, make=False)
    hashes = {name: rules.session_hash(bucket.hash_key, "default", name) for name in ("long", "short", "kept")}
    assert any(key.startswith("s/") for key in objects_of(store, hashes["long"]))
    for name in ("long", "short"):
        assert delete(wire, name)
        assert_gone(wire, name)
        assert objects_of(store, hashes[name]) == [manifest_key(hashes[name])]
        assert SECRET.encode() not in store.get(manifest_key(hashes[name])).body
        assert rows_of(daemon, hashes[name]) == []
    daemon.kill()
    daemon.start()
    wire = Wire(daemon.address)
    for name in ("long", "short"):
        assert_gone(wire, name)
    assert len(list(wire.turns("kept"))) == 4
    daemon.terminate()
    daemon.lose_hot_tier()
    daemon.start()
    wire = Wire(daemon.address)
    for name in ("long", "short"):
        assert_gone(wire, name)
    assert listed(wire, user_id="ada") == {"kept"}
    assert len(list(wire.turns("kept"))) == 4
    store.close()
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    assert verify(settings, lambda done, total: None) == []


def test_a_released_session_can_be_deleted(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    talk(wire, "s")
    daemon.restart()
    wire = Wire(daemon.address)
    assert delete(wire, "s")
    assert_gone(wire, "s")


def test_deletion_needs_the_right_user_and_a_session(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    talk(wire, "s")
    assert refusal(delete, wire, "s", "eve").reason == "SESSION_NOT_FOUND"
    assert refusal(delete, wire, "never").reason == "SESSION_NOT_FOUND"
    assert refusal(delete, wire, "no id").reason == "INVALID_SESSION_ID"
    assert len(list(wire.turns("s"))) == 4
    assert delete(wire, "s", "ada")
    assert refusal(delete, wire, "s", "eve").reason == "SESSION_NOT_FOUND"


def test_turns_that_come_while_a_session_is_deleted_are_refused_or_go_with_it(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    talk(wire, "s")
    appends = []
    for number in range(40):
        request = session_pb2.AppendTurnRequest(session_id="s", turns=[user(f"late{number}", "x")])
        appends.append(wire.sessions.AppendTurn.future(request, timeout=30))
        if number == 20:
            assert delete(wire, "s")
    told = {append.code() for append in appends}
    assert told <= {grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND}, told
    assert appends[-1].code() == grpc.StatusCode.NOT_FOUND
    assert_gone(wire, "s")
