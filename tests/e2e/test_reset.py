"""RESET, the last rung: where a history can't be read for good, on request, once, and linked to what is lost."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond import config
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.e2e import stores
from tests.wire import CLOUD, HOT, Wire, assistant, message, refusal, user

NEVER_MS = 3_600_000
RESET = context_pb2.RUNG_RESET
LARGE = "word " * 14_000
POLICY = turn_pb2.SessionPolicy(budget_tokens=200_000, pins_budget_tokens=77)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "data", flush_interval_ms=NEVER_MS) as daemon:
        yield daemon


def talk(wire: Wire, session: str) -> None:
    """A session of Ada's whose beginning is in segments."""
    wire.create(session, user_id="ada", policy=POLICY, metadata={"k": "first"})
    wire.append(session, message("s", turn_pb2.ROLE_SYSTEM, "Be brief."), user("u", LARGE), assistant("a", "noted"))
    change = turn_pb2.TurnInput(turn_id="z")
    change.state.metadata["k"] = "last"
    wire.append(session, change, user("v", "And then?"), assistant("w", "That."))
    assert not wire.admin.Flush(admin_pb2.FlushRequest(session_id=session)).failures


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    """A daemon without rows, beside a cloud tier with the session "a"."""
    with contextlib.closing(Wire(daemon.address)) as before:
        talk(before, "a")
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    with contextlib.closing(Wire(daemon.address)) as wire:
        yield wire


def damage(daemon: Daemon, session: str, kind: str) -> None:
    """Flip a bit in the middle of a session's manifest (m) or of its first segment (s)."""
    h, root = stores.hash_of(daemon.data_dir, session).hex(), daemon.data_dir / "cloud"
    path = root / "m" / h if kind == "m" else min((root / "s" / h).iterdir())
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)


def get(wire: Wire, session: str) -> session_pb2.Session:
    return wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30).session


def test_a_session_whose_segments_can_not_be_read_is_replaced_once_and_on_request_only(
    daemon: Daemon, wire: Wire
) -> None:
    damage(daemon, "a", "s")
    assert refusal(wire.resume, "a", 200_000).reason == "CORRUPT_SEGMENT"
    assert refusal(get, wire, "b").reason == "SESSION_NOT_FOUND"
    for _ in range(3):
        found = wire.resume("a", 200_000, reset_to_session_id="b", spec={"new_message": user("x", "hello").message})
        assert (found.receipt.rung, found.receipt.reset_of) == (RESET, "a")
        assert "could not be recovered" in found.receipt.notice
        assert (list(found.turns), found.new_message.parts[0].text) == ([], "hello")
    made = get(wire, "b")
    assert (made.reset_of_session_id, made.user_id, made.policy) == ("a", "ada", POLICY)
    assert dict(made.state.metadata) == {"k": "last"}
    assert (made.head.seq, made.forked_from_session_id) == (0, "")
    # It goes on as any session does, and whoever asks for the lost one is led to where it stands now.
    wire.append("b", user("n1", "From the start, then."), assistant("n2", "Gladly."))
    plain = wire.resume("b")
    assert (plain.receipt.rung, plain.receipt.reset_of, plain.receipt.notice) == (HOT, "", "")
    again = wire.resume("a", 200_000, reset_to_session_id="b")
    assert (again.receipt.rung, again.receipt.reset_of) == (RESET, "a")
    assert [turn.turn_id for turn in again.turns] == ["n1", "n2"]
    wire.close()
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    with contextlib.closing(Wire(daemon.address)) as later:
        again = later.resume("a", 200_000, reset_to_session_id="b")
        assert (again.receipt.rung, len(again.turns)) == (RESET, 2)
        assert get(later, "b").reset_of_session_id == "a"


def test_a_session_that_can_be_read_is_served_and_nothing_is_made(daemon: Daemon, wire: Wire) -> None:
    damage(daemon, "a", "s")
    # What the least budget needs is in the manifest.
    least = int(refusal(wire.resume, "a", 1).metadata["minimum_budget_tokens"])
    assert wire.resume("a", least, reset_to_session_id="b").receipt.rung in (CLOUD, HOT)
    talk(wire, "c")
    assert wire.resume("c", 200_000, reset_to_session_id="b").receipt.rung == HOT
    assert refusal(wire.resume, "nobody", reset_to_session_id="b").reason == "SESSION_NOT_FOUND"
    assert refusal(wire.resume, "c", 5, reset_to_session_id="b").reason == "BUDGET_TOO_SMALL"
    wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="c"))
    assert refusal(wire.resume, "c", reset_to_session_id="b").reason == "SESSION_DELETED"
    assert refusal(get, wire, "b").reason == "SESSION_NOT_FOUND"


def test_a_session_without_a_readable_manifest_is_replaced_by_what_the_request_says(daemon: Daemon, wire: Wire) -> None:
    damage(daemon, "a", "m")
    assert refusal(wire.resume, "a").reason == "CORRUPT_MANIFEST"
    found = wire.resume("a", reset_to_session_id="b", user_id="ada")
    assert (found.receipt.rung, found.receipt.reset_of) == (RESET, "a")
    made = get(wire, "b")
    assert (made.user_id, made.policy, dict(made.state.metadata)) == ("ada", turn_pb2.SessionPolicy(), {})
    listed = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ada"))
    assert ([each.session_id for each in listed.sessions], [each.session_id for each in listed.unreadable]) == (
        ["b"],
        ["a"],
    )


def test_what_a_newer_release_wrote_is_not_given_up(daemon: Daemon, wire: Wire) -> None:
    path = daemon.data_dir / "cloud" / "m" / stores.hash_of(daemon.data_dir, "a").hex()
    sound = path.read_bytes()
    path.write_bytes(stores.newer(sound))
    assert refusal(wire.resume, "a", reset_to_session_id="b").reason == "NEWER_FORMAT"
    assert refusal(get, wire, "b").reason == "SESSION_NOT_FOUND"
    path.write_bytes(sound)
    assert wire.resume("a", 200_000, reset_to_session_id="b").receipt.rung == CLOUD


def test_an_id_that_is_taken_replaces_nothing(daemon: Daemon, wire: Wire) -> None:
    wire.create("taken", user_id="ada")
    wire.create("gone", user_id="ada")
    wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="gone"))
    damage(daemon, "a", "s")
    refused = refusal(wire.resume, "a", 200_000, reset_to_session_id="taken")
    assert (refused.reason, refused.fields) == ("SESSION_EXISTS", ["reset_to_session_id"])
    assert refusal(wire.resume, "a", 200_000, reset_to_session_id="gone").reason == "SESSION_DELETED"
    assert refusal(wire.resume, "a", 200_000, user_id="eve", reset_to_session_id="b").reason == "SESSION_NOT_FOUND"
    assert wire.resume("a", 200_000, reset_to_session_id="b").receipt.rung == RESET
    assert get(wire, "taken").reset_of_session_id == ""
    # Two that are lost can't be replaced by one.
    talk(wire, "c")
    wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=["c"]))
    damage(daemon, "c", "m")
    assert refusal(wire.resume, "c", reset_to_session_id="b", read_only=True).reason == "INVALID_CONTEXT"


def test_damaged_rows_are_replaced_with_what_their_head_says(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            talk(wire, "a")
        daemon.kill()
        h = stores.hash_of(daemon.data_dir, "a")
        with stores.rows(daemon.data_dir) as (transaction, tables):
            cursor = transaction.cursor(tables["turns"])
            assert cursor.set_range(h)
            for key, value in [(bytes(k), bytearray(v)) for k, v in cursor.iternext() if bytes(k)[:16] == h]:
                value[len(value) // 2] ^= 1
                transaction.put(key, bytes(value), db=tables["turns"])
        daemon.restart()
        with contextlib.closing(Wire(daemon.address)) as wire:
            assert refusal(wire.resume, "a").reason == "CORRUPT_FRAME"
            assert wire.resume("a", reset_to_session_id="b").receipt.rung == RESET
            made = get(wire, "b")
            assert (made.user_id, made.policy, dict(made.state.metadata)) == ("ada", POLICY, {"k": "last"})


def test_a_session_that_another_node_holds_is_served_by_it_though_its_manifest_is_damaged(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path / "one", flush_interval_ms=NEVER_MS, node_name="one") as first,
        running_daemon(tmp_path / "two", cloud=first.cloud, flush_interval_ms=NEVER_MS, node_name="two") as second,
        contextlib.closing(Wire(first.address)) as here,
        contextlib.closing(Wire(second.address)) as there,
    ):
        talk(here, "a")
        damage(first, "a", "m")
        assert refusal(there.resume, "a").reason == "CORRUPT_MANIFEST"
        found = there.resume("a", 200_000, reset_to_session_id="b")
        assert (found.receipt.rung, found.receipt.node) == (HOT, "one")
        assert [turn.turn_id for turn in found.turns] == ["u", "a", "v", "w"]
        assert refusal(there.resume, "a", 200_000, reset_to_session_id="b", user_id="eve").reason == "SESSION_NOT_FOUND"
        assert refusal(get, there, "b").reason == "SESSION_NOT_FOUND"
        # A node that does not answer may hold it: nothing is given up while it can be heard of again.
        first.kill()
        assert refusal(there.resume, "a", reset_to_session_id="b").reason == "CORRUPT_MANIFEST"
        assert refusal(get, there, "b").reason == "SESSION_NOT_FOUND"


def test_verify_tells_of_the_lost_session_alone(daemon: Daemon, wire: Wire) -> None:
    damage(daemon, "a", "s")
    wire.resume("a", 200_000, reset_to_session_id="b")
    wire.append("b", user("n1", "From the start."), assistant("n2", "Gladly."))
    wire.close()
    assert daemon.terminate() == 0
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    assert {(found.session_id, found.invariant) for found in verify(settings, lambda *_: None)} == {("a", "I11")}
