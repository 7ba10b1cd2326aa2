"""The wall clock jumps by a month, stands still and steps back under a running daemon: everything goes on.

Only CLOCK_REALTIME moves, as when an operator or NTP sets a clock; CLOCK_BOOTTIME and CLOCK_MONOTONIC run on.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sessiond import config
from sessiond.cli import exits
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.fault.syscalls import Control
from tests.wire import HOT, Wire, assistant, user

DAY_S = 86_400
LEASE_MS = 900
FLUSH_MS = 50
WAIT_S = 30
HOUR_MS = 3_600_000
SESSIONS = ("quiet", "busy", "cloud")
# Sessions that live for an hour: however the wall clock jumps, no hour passes here.
EXPIRING = {
    "fixed": turn_pb2.Expiry(ttl_ms=HOUR_MS, mode=turn_pb2.EXPIRY_MODE_FIXED, action=turn_pb2.EXPIRY_ACTION_DELETE),
    "sliding": turn_pb2.Expiry(
        ttl_ms=HOUR_MS, mode=turn_pb2.EXPIRY_MODE_SLIDING, action=turn_pb2.EXPIRY_ACTION_ARCHIVE
    ),
    "left": turn_pb2.Expiry(ttl_ms=HOUR_MS, mode=turn_pb2.EXPIRY_MODE_SLIDING, action=turn_pb2.EXPIRY_ACTION_DELETE),
}
# Where the clock is taken to, one after the other: (what, seconds off, whether it stands still there).
JOURNEY = (
    ("a month ahead", 30 * DAY_S, False),
    ("frozen there", 30 * DAY_S, True),
    ("back to a month ago", -30 * DAY_S, False),
    ("an hour further back", -30 * DAY_S - 3600, False),
    ("frozen in the past", -30 * DAY_S - 3600, True),
    ("right again", 0, False),
)


@dataclass
class Under:
    """A daemon with a wall clock of its own, and the turns that it acknowledged."""

    daemon: Daemon
    control: Control
    wire: Wire
    acked: dict[str, list[str]] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)

    def go(self, offset_s: float, frozen: bool) -> None:
        self.control.freeze_clock(time.time_ns() if frozen else 0)
        self.control.shift_clock(offset_s)

    def talk(self, session: str, cloud: bool = False) -> None:
        """Append an exchange; its times are not before those of the turns before it."""
        known = self.acked.setdefault(session, [])
        turns = [user(f"{len(known) + 1}", "and then?"), assistant(f"{len(known) + 2}", "then this.")]
        durability = turn_pb2.DURABILITY_CLOUD if cloud else turn_pb2.DURABILITY_EDGE
        reply = self.wire.append(session, *turns, durability=durability)
        assert reply.ownership == context_pb2.OWNERSHIP_CONFIRMED
        known += [turn.turn_id for turn in reply.turns]
        for turn in reply.turns:
            assert turn.append_time_unix_ms >= self.times.get(session, 0)
            self.times[session] = turn.append_time_unix_ms

    def renewals(self) -> int:
        """Puts of the daemon so far; with nothing to flush, those are of its lease."""
        status = self.wire.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert status.cloud.lease_valid
        return sum(row.count for row in status.cloud.requests if (row.kind, row.outcome) == ("put", "ok"))

    def flushed(self) -> bool:
        """Whether nothing waits to be flushed, and for how long something does."""
        return self.wire.admin.GetStatus(admin_pb2.GetStatusRequest()).hot.dirty_sessions == 0

    def settled(self) -> None:
        for session, turn_ids in self.acked.items():
            turns = list(self.wire.turns(session))
            assert [turn.turn_id for turn in turns] == turn_ids
            times = [turn.append_time_unix_ms for turn in turns]
            assert times == sorted(times)


@contextlib.contextmanager
def under(tmp_path: Path, **settings: int) -> Iterator[Under]:
    control = Control(tmp_path / "control", tmp_path / "data")
    chosen = {"flush_interval_ms": FLUSH_MS, "lease_ms": LEASE_MS, "map_size_bytes": 64 * 1024**2, **settings}
    with (
        running_daemon(tmp_path / "data", env=control.env, **chosen) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        assert control.is_mapped
        yield Under(daemon, control, wire)


def within(holds, what: str) -> None:
    """Wait until it holds, by the test's own clock, at most WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, f"not within {WAIT_S} s: {what}"
        time.sleep(0.02)


def test_sessions_flushes_and_leases_go_on_over_every_jump_of_the_wall_clock(tmp_path: Path) -> None:
    with under(tmp_path) as node:
        for session in SESSIONS:
            node.wire.create(session, user_id="ada")
            node.talk(session)
        for what, offset_s, frozen in JOURNEY:
            node.go(offset_s, frozen)
            renewals = node.renewals()
            for _ in range(3):
                node.talk("busy")
            node.talk("cloud", cloud=True)
            within(node.flushed, f"a flush, {what}")
            flushed = node.renewals()
            # Three renewals a lease: the lease lives by the clock of the boot.
            within(lambda at=flushed: node.renewals() >= at + 4, f"renewals of the lease, {what}")
            assert flushed > renewals
            # What nobody touched is there, and nothing was taken from it.
            context = node.wire.resume("quiet")
            assert context.receipt.rung == HOT, what
            assert context.receipt.ownership == context_pb2.OWNERSHIP_CONFIRMED, what
            assert not context.receipt.missing, what
        node.settled()
        listed = node.wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ada"))
        assert {item.session_id for item in listed.sessions} == set(SESSIONS)
        assert node.daemon.terminate() == exits.OK
        settings = config.load(None, {}, {"data_dir": str(node.daemon.data_dir), "cloud": node.daemon.cloud})
        assert verify(settings, lambda *_: None) == []


def test_no_session_expires_by_a_jump_of_the_wall_clock(tmp_path: Path) -> None:
    with under(tmp_path) as node:
        for session, expiry in EXPIRING.items():
            node.wire.create(session, user_id="ada", policy=turn_pb2.SessionPolicy(expiry=expiry))
            node.talk(session)
        for what, offset_s, frozen in JOURNEY:
            node.go(offset_s, frozen)
            # Upkeep looks at every session four times a second; the lease's renewals, at three a lease, tell the time.
            renewals = node.renewals()
            within(lambda at=renewals: node.renewals() >= at + 4, f"renewals of the lease, {what}")
            for session in EXPIRING:
                found = node.wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session)).session
                assert found.lifecycle == session_pb2.LIFECYCLE_ACTIVE, f"{session}, {what}"
            # What is appended while the clock is wrong counts its hour from a time that is no later than the true one.
            node.talk("sliding")
        within(node.flushed, "a flush")
        upkeep = node.wire.admin.GetStatus(admin_pb2.GetStatusRequest()).upkeep
        assert (upkeep.archived_sessions, upkeep.deleted_sessions) == (0, 0)
        node.settled()
        assert node.daemon.terminate() == exits.OK


@pytest.mark.parametrize("offset_s", [30 * DAY_S, -30 * DAY_S], ids=["ahead", "back"])
def test_a_restart_after_a_jump_finds_every_acknowledged_turn_and_times_do_not_go_back(
    tmp_path: Path, offset_s: int
) -> None:
    with under(tmp_path) as node:
        node.wire.create("a")
        for _ in range(3):
            node.talk("a")
        node.daemon.kill()
        node.go(offset_s, frozen=False)
        node.daemon.start()
        node.talk("a")
        node.talk("a", cloud=True)
        node.daemon.kill()
        node.go(0, frozen=False)
        node.daemon.start()
        node.talk("a")
        node.settled()
        assert node.daemon.terminate() == exits.OK


@pytest.mark.parametrize("offset_s", [30 * DAY_S, -30 * DAY_S], ids=["ahead", "back"])
def test_a_drain_ends_when_its_grace_has_passed_also_if_the_clock_jumps_meanwhile(
    tmp_path: Path, offset_s: int
) -> None:
    """A drain that can't flush gives up after its grace; not at once, and not a month later."""
    with under(tmp_path, flush_interval_ms=3_600_000, lease_ms=600_000, drain_grace_ms=3000) as node:
        node.wire.create("a")
        node.talk("a")
        (tmp_path / "data" / "cloud").rename(tmp_path / "away")
        began = time.monotonic()
        progress = node.wire.admin.Drain(admin_pb2.DrainRequest(), timeout=WAIT_S)
        next(progress)
        node.go(offset_s, frozen=False)
        last = list(progress)[-1]
        took_s = time.monotonic() - began
        assert (last.done, last.clean, last.remaining_sessions) == (True, False, 1)
        assert took_s >= 2.5, "the grace was cut short"
        (tmp_path / "away").rename(tmp_path / "data" / "cloud")
        assert [turn.turn_id for turn in node.wire.turns("a")] == node.acked["a"]
