"""What a node says of its processes, and of read transactions that somebody left open."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing

from sessiond.testing import running_daemon
from sessiond.v1 import session_pb2
from tests.cli.command import run
from tests.wire import HOT, Wire, user
from tests.workers.test_deaths import pids, status, until

READER = """
import sys, pathlib
from sessiond.tiers.hot.environment import Reader
with Reader(pathlib.Path(sys.argv[1])).read():
    print("reads", flush=True)
    sys.stdin.read()
"""


def test_calls_and_turns_are_counted_once_whoever_answered_them() -> None:
    with running_daemon() as daemon, closing(Wire(daemon.address)) as wire:
        wire.create("s")
        pids(wire)
        for number in range(20):
            wire.append("s", user(f"t{number}", "hello"))
            wire.resume("s")
        until(lambda: status(wire).turns_appended >= 20, "turns are counted")
        until(lambda: sum(row.count for row in status(wire).rungs) >= 20, "resumes are counted")
        told = status(wire)
        calls = {(row.method, row.status): row.count for row in told.calls}
        assert (calls["AppendTurn", "OK"], calls["ResumeSession", "OK"]) == (20, 20)
        assert told.turns_appended == 20
        assert {row.rung: row.count for row in told.rungs}["HOT"] == 20
        appends = told.group_commit.appends
        assert appends >= 20
        assert sum(worker.answered + worker.relayed for worker in told.workers) > 40
        shown = run("stats", "--server", daemon.address)
        for worker in told.workers:
            assert f"worker {worker.number}" in shown.out
            assert f"process {worker.pid}" in shown.out
            assert worker.resident_bytes > 10 * 1024**2


def test_a_session_that_workers_answer_for_is_in_use_and_is_not_released_as_idle() -> None:
    with running_daemon(idle_release_ms=1500, flush_interval_ms=50) as daemon, closing(Wire(daemon.address)) as wire:
        for name in ("used", "left"):
            wire.create(name)
            wire.append(name, user("t", "hello"))

        def get(name: str) -> session_pb2.Session:
            return wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=name)).session

        def left_alone() -> bool:
            assert wire.resume("used").receipt.rung == HOT
            return not get("left").owner_node

        until(left_alone, "the one that nobody uses is released")
        ends_s = time.monotonic() + 4
        while time.monotonic() < ends_s:
            assert wire.resume("used").receipt.rung == HOT
        # It was never released and taken again.
        assert get("used").owner_node
        assert get("used").epoch == 1
        assert status(wire).ownership.claims == 0


def test_a_read_transaction_that_is_left_open_is_named() -> None:
    with running_daemon(workers=0) as daemon, closing(Wire(daemon.address)) as wire:
        wire.create("s")
        command = [sys.executable, "-c", READER, str(daemon.data_dir / "hot")]
        reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert reader.stdout.readline() == b"reads\n"
            assert not status(wire).old_readers

            def named() -> list[int]:
                wire.append("s", user(f"t{named.count}", "hello"))
                named.count += 1
                return [row.pid for row in status(wire).old_readers if row.age_ms >= 5000]

            named.count = 0
            until(named, "it is named")
            assert named() == [reader.pid]
            assert '"old_reader"' in daemon.log()
        finally:
            reader.communicate()
        until(lambda: not status(wire).old_readers, "it is gone")
