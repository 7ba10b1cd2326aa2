"""Sessions that expire, rest or are evicted, seen from the outside: a real daemon on the real clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.wire import CLOUD, HOT, Wire, assistant, refusal, user

PATIENCE_S = 60
MAP_BYTES = 16 * 1024**2


def wait_until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def expiring(**fields: int) -> turn_pb2.SessionPolicy:
    return turn_pb2.SessionPolicy(expiry=turn_pb2.Expiry(**fields))


def upkeep(wire: Wire) -> admin_pb2.UpkeepStatus:
    return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30).upkeep


def get(wire: Wire, session: str) -> session_pb2.Session:
    return wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30).session


def clean(daemon: Daemon) -> None:
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    assert verify(settings, lambda done, total: None) == []


def test_a_session_lives_as_long_as_its_policy_says_and_is_then_archived_or_deleted() -> None:
    with running_daemon(flush_interval_ms=20) as daemon:
        wire = Wire(daemon.address)
        wire.create("archive", policy=expiring(ttl_ms=3000))
        wire.create("delete", policy=expiring(ttl_ms=3000, action=turn_pb2.EXPIRY_ACTION_DELETE))
        wire.create("slide", policy=expiring(ttl_ms=3000, action=turn_pb2.EXPIRY_ACTION_DELETE))
        wire.create("stay")
        for name in ("archive", "delete", "slide", "stay"):
            wire.append(name, user("q", "Hello."), assistant("a", "Hi."))
        expires_ms = get(wire, "archive").expires_at_unix_ms
        assert expires_ms == get(wire, "archive").last_append_at_unix_ms + 3000
        number = 0
        # One is kept alive by appends while the others come to their time.
        while upkeep(wire).archived_sessions < 1 or upkeep(wire).deleted_sessions < 1:
            number += 1
            assert wire.append("slide", user(f"more{number}", "still here")).head.seq == 2 + number
            assert time.time() * 1000 < expires_ms + PATIENCE_S * 1000
        assert time.time() * 1000 >= expires_ms, "nothing ends before its time"
        wait_until(lambda: get(wire, "archive").owner_node == "")
        archived = get(wire, "archive")
        assert archived.lifecycle == session_pb2.LIFECYCLE_ARCHIVED
        assert [turn.turn_id for turn in wire.resume("archive").turns] == ["q", "a"]
        found = refusal(wire.append, "archive", user("late", "x"))
        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_ARCHIVED")
        for call in (wire.resume, lambda name: wire.append(name, user("late", "x")), wire.create):
            assert refusal(call, "delete").reason == "SESSION_DELETED"
        assert get(wire, "stay").lifecycle == session_pb2.LIFECYCLE_ACTIVE
        # A policy without an end takes the end away.
        change = turn_pb2.StateChange(policy=turn_pb2.SessionPolicy(budget_tokens=4000))
        request = session_pb2.UpdateSessionRequest(session_id="slide", turn_id="keep", change=change)
        assert wire.sessions.UpdateSession(request, timeout=30).session.expires_at_unix_ms == 0
        assert daemon.terminate() == 0
        clean(daemon)


def test_what_expired_while_the_node_was_away_is_over_when_it_comes_back() -> None:
    with running_daemon(flush_interval_ms=20) as daemon:
        wire = Wire(daemon.address)
        wire.create("archive", policy=expiring(ttl_ms=5000))
        wire.create("delete", policy=expiring(ttl_ms=5000, action=turn_pb2.EXPIRY_ACTION_DELETE))
        for name in ("archive", "delete"):
            wire.append(name, user("q", "Hello."), assistant("a", "Hi."))
        last_ms = get(wire, "delete").expires_at_unix_ms
        daemon.kill()
        wait_until(lambda: time.time() * 1000 > last_ms)
        daemon.start()
        wire = Wire(daemon.address)
        assert refusal(wire.resume, "delete").reason == "SESSION_DELETED"
        assert refusal(wire.append, "archive", user("late", "x")).reason == "SESSION_ARCHIVED"
        assert len(wire.resume("archive").turns) == 2
        wait_until(lambda: upkeep(wire).deleted_sessions == 1 and upkeep(wire).archived_sessions == 1)


def test_an_idle_session_is_released_and_comes_back_on_the_cloud_rung() -> None:
    with running_daemon(flush_interval_ms=20, idle_release_ms=500) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        wire.append("s", user("q", "Hello."), assistant("a", "Hi."))
        wait_until(lambda: get(wire, "s").owner_node == "")
        assert upkeep(wire).released_sessions >= 1
        before = wire.resume("s", read_only=True)
        assert before.receipt.rung == CLOUD
        assert wire.resume("s").receipt.rung == CLOUD
        wait_until(lambda: wire.resume("s").receipt.rung == HOT)
        assert [turn.turn_id for turn in wire.resume("s").turns] == ["q", "a"]


@pytest.mark.parametrize("idle_release_ms", [200, 0], ids=["released by time", "released under pressure"])
def test_a_map_that_fills_up_evicts_sessions_and_takes_turns_for_ever(tmp_path: Path, idle_release_ms: int) -> None:
    text = "many words " * 30_000
    with running_daemon(
        tmp_path, flush_interval_ms=20, idle_release_ms=idle_release_ms, map_size_bytes=MAP_BYTES, evict_at_percent=50
    ) as daemon:
        wire = Wire(daemon.address)
        acked = 0
        # Twice what the map can hold.
        while acked * len(text) < 2 * MAP_BYTES:
            name = f"s{acked}"
            wire.create(name)
            deadline = time.monotonic() + PATIENCE_S
            while True:
                try:
                    wire.append(name, user("q", text), assistant("a", "Hi."))
                    break
                except grpc.RpcError as error:
                    # Too fast for the eviction: it says when to come again.
                    found = refusal(_raise, error)
                    assert found.reason == "HOT_TIER_FULL"
                    assert found.retry_ms > 0
                    assert time.monotonic() < deadline, "the map stayed full"
                    time.sleep(0.1)
            acked += 1
        status = wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)
        assert status.upkeep.evicted_sessions > 0
        assert status.hot.map_used_bytes <= MAP_BYTES * 0.9
        assert status.hot.sessions < acked
        for number in range(acked):
            assert [turn.turn_id for turn in wire.resume(f"s{number}", 1_000_000).turns] == ["q", "a"]
        assert daemon.terminate() == 0
        clean(daemon)


def _raise(error: grpc.RpcError) -> None:
    raise error
