"""What sessions cost in requests to the object store: idle ones nothing, and a turn no more than it must.

Counted as `sessiond stats` prints it. Hours of a session pass in seconds: a daemon's parts on a clock moved by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sessiond.cli.app import main
from sessiond.config import Settings
from sessiond.testing import running_daemon
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.v1 import admin_pb2
from tests.tiers.test_commits import World
from tests.tiers.test_upkeep import Node
from tests.wire import Wire, assistant, user

IDLE_SESSIONS = 10_000
MEMORY_BYTES_MIN = 2 * 1024**3
DEFAULTS = Settings()
TURNS = 100
# Claim, release, and one for each turn.
PUTS_MAX = TURNS + 2


def status(wire: Wire) -> admin_pb2.GetStatusResponse:
    return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)


def requests(wire: Wire) -> Counter[tuple[str, str]]:
    """Requests so far by kind and by what they were about."""
    return Counter({(row.kind, row.object): row.count for row in status(wire).cloud.objects})


def wait_until_flushed(wire: Wire, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while (left := status(wire).hot.dirty_sessions) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"{left} sessions were not flushed within {timeout_s} s"


def renewals(wire: Wire) -> int:
    return requests(wire)["put", "lease"]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory where that can be had: ten thousand sessions are thirty thousand fsyncs elsewhere."""
    shared = Path("/dev/shm")
    where = shared if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > MEMORY_BYTES_MIN else None
    with tempfile.TemporaryDirectory(prefix="sessiond-", dir=where) as name:
        yield Path(name)


def test_ten_thousand_idle_sessions_cost_nothing_but_the_lease(memory: Path) -> None:
    with running_daemon(memory / "data", flush_interval_ms=20, flush_waiting_ms=20) as daemon:
        wire = Wire(daemon.address)

        def talk(number: int) -> None:
            wire.create(f"s{number}")
            wire.append(f"s{number}", user("q", "hello"), assistant("a", "hi"))

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(talk, range(IDLE_SESSIONS)))
        wait_until_flushed(wire)
        assert status(wire).hot.sessions == IDLE_SESSIONS
        before = requests(wire)
        # Ten renewals of the lease are a time in which the daemon looks through all its sessions more than once.
        until = before["put", "lease"] + 10
        while renewals(wire) < until:
            time.sleep(0.1)
        spent = requests(wire) - before
        assert set(spent) == {("put", "lease")}, spent


# The order in which turns of a session may come, one every half minute.
CHAT = [user if number % 2 == 0 else assistant for number in range(TURNS)]


@pytest.mark.parametrize(
    "kinds", [CHAT, [user] * TURNS, [assistant] * TURNS], ids=["questions and answers", "questions", "answers"]
)
def test_a_session_of_a_hundred_turns_half_a_minute_apart_costs_at_most_a_put_a_turn(
    tmp_path: Path, kinds: list[Any]
) -> None:
    world = World(tmp_path)
    try:
        store = CountingStore(world.store.folder)
        world.store.folder = store  # type: ignore[assignment]
        # Both of the daemon's clocks run as the test tells them; what runs is what runs in a daemon.
        node = Node(world)
        flusher = node.live.flusher
        flusher._boot_ms = world.clock
        flusher._interval_ms, flusher._waiting_ms = DEFAULTS.flush_interval_ms, DEFAULTS.flush_waiting_ms
        lags_ms: list[int] = []

        def pass_time(duration_ms: int) -> None:
            until_ms = world.clock() + duration_ms
            while world.clock() < until_ms:
                world.clock.now_ms += 500
                node.upkeep.tick()
                flusher._collect()
                flusher._feed()
                while flusher.backlog().in_flight:
                    time.sleep(0.0005)
                lags_ms.append(flusher.backlog().oldest_ms)

        node.create("s")
        for number, make in enumerate(kinds):
            node.append("s", make(f"t{number}", f"turn {number}"))
            pass_time(30_000)
        pass_time(DEFAULTS.idle_release_ms + 60_000)
        manifest = node.manifest("s")
        assert (manifest.head, manifest.owner) == (TURNS, None), "not flushed and released"
        puts = {about: count for kind, about, count in store.objects() if kind == "put" and about != "bucket"}
        assert sum(puts.values()) <= PUTS_MAX, puts
        # Cheap, and not late: nothing waits longer than the settings say, give or take one look at the clock.
        assert max(lags_ms) <= DEFAULTS.flush_waiting_ms + 1000
        print(f"{sum(puts.values())} puts: {puts}, the longest wait {max(lags_ms) / 1000} s")
    finally:
        world.close()


def test_stats_prints_requests_by_kind_and_the_bill_per_million_turns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=20, flush_waiting_ms=20) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        wire.append("s", *(user(f"t{number}", "x") for number in range(10)))
        wait_until_flushed(wire)
        assert main(["stats", "--server", daemon.address]) == 0
        told = capsys.readouterr().out
        for word in ("put", "manifest", "user_index", "lease", "per million turns", "10 turns appended"):
            assert word in told
        assert main(["stats", "--json", "--put-price", "1000", "--get-price", "0", "--server", daemon.address]) == 0
        shown = json.loads(capsys.readouterr().out)
        paid = sum(
            int(row["count"])
            for row in shown["cloud"]["objects"]
            if row["kind"] in ("put", "list") and row["object"] != "lease"
        )
        # At a price of 1 for each request the bill is their number.
        assert shown["bill"]["sessions_cost"] == pytest.approx(paid)
        assert shown["bill"]["cost_per_million_turns"] == pytest.approx(paid / 10 * 1e6)
        assert shown["bill"]["lease_cost_per_month"] > 0
