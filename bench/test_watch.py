"""5,000 watchers on 500 sessions while 200 turns a second are appended: how late each turn comes, and what one costs.

The clock starts when an append is sent. What an event is compared with is that append's own acknowledgement, and what
an acknowledgement is compared with is that of a session which nobody watches, in rounds that take turns.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.load import DIGITS
from bench.processes import FIRST_NUMBER, ROOT, environment
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import session_pb2

SESSIONS, WATCHERS, APPENDS_PER_S = 500, 5_000, 200
CONNECTIONS = 20
IDLE_S = 30.0
WATCH = wire.SERVICE + "WatchSession"
STAMP_DIGITS = 19
pytestmark = pytest.mark.nodes


class Watching:
    """The process of the watchers."""

    def __init__(self, daemon: Daemon, names: list[str], streams: int, connections: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.watchers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
            text=True,
        )
        requests = [session_pb2.WatchSessionRequest(session_id=name).SerializeToString().hex() for name in names]
        where = {"port": daemon.port, "path": WATCH, "connections": connections}
        self.opened_s = self._ask({**where, "bodies": requests, "streams": streams})["seconds"]

    def _ask(self, order: dict[str, Any]) -> dict[str, float]:
        self.begin(order)
        return self.end()

    def begin(self, order: dict[str, Any]) -> None:
        """Give an order."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, float]:
        """Its answer."""
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise RuntimeError("the watchers ended; their error stands above")
        answer: dict[str, float] = json.loads(text)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


class Appends:
    """Turns with a stamp, at a steady pace, to one session after the other."""

    def __init__(self, client: wire.Client, names: list[str]) -> None:
        self._call = client.channel.unary_unary(wire.APPEND)
        self._numbers = itertools.count(FIRST_NUMBER)
        self._templates = [self._template(name) for name in names]

    def _template(self, name: str) -> tuple[bytes, int, int]:
        turn = talk.turn(1)
        turn.message.parts[0].text = f"at={'0' * STAMP_DIGITS};" + turn.message.parts[0].text
        raw = bytes(wire.append_request(name, turn).SerializeToString())
        return raw, raw.index(b"turn-") + len(b"turn-"), raw.index(b"at=") + len(b"at=")

    def run(self, count: int, per_s: int) -> list[float]:
        """Seconds from sending each to its acknowledgement, sorted. An append that falls behind is sent at once."""
        seconds: list[float] = []
        left = threading.Semaphore(0)

        def done(future: Any, sent_ns: int) -> None:
            assert future.result()
            seconds.append((time.monotonic_ns() - sent_ns) / 1e9)
            left.release()

        started = time.monotonic()
        for index in range(count):
            time.sleep(max(0.0, started + index / per_s - time.monotonic()))
            raw, number_at, stamp_at = self._templates[index % len(self._templates)]
            number, sent_ns = b"%012d" % next(self._numbers), time.monotonic_ns()
            message = raw[:number_at] + number + raw[number_at + DIGITS :]
            message = message[:stamp_at] + b"%019d" % sent_ns + message[stamp_at + STAMP_DIGITS :]
            future = self._call.future(message, timeout=wire.TIMEOUT_S)
            future.add_done_callback(lambda future, sent_ns=sent_ns: done(future, sent_ns))
        for _ in range(count):
            assert left.acquire(timeout=wire.TIMEOUT_S)
        return sorted(seconds)


def proc_status(daemon: Daemon, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", Path(f"/proc/{daemon.pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_daemon(tmp_path_factory.mktemp("watch") / "daemon") as running:
        yield running


def test_watchers(benchmark: Any, ledger: Any, size: Any, daemon: Daemon) -> None:
    sessions, watchers = size.of(SESSIONS, 20), size.of(WATCHERS, 100)
    rounds, count = size.of(5, 2), size.of(5 * APPENDS_PER_S, 40)
    watched = [f"watched-{number}" for number in range(sessions)]
    alone = [f"alone-{number}" for number in range(sessions)]
    case = f"{watchers:,} watchers on {sessions} sessions, {APPENDS_PER_S} appends/s"
    with wire.Client(daemon.address) as client:
        talk.make_sessions(client, [*watched, *alone], 2)
        client.settle()
        to_watched, to_alone = Appends(client, watched), Appends(client, alone)
        to_watched.run(count, APPENDS_PER_S)
        client.settle()
        before = proc_status(daemon, "RssAnon"), proc_status(daemon, "Threads"), client.status().hot.readers
        watching = Watching(daemon, watched, watchers, min(CONNECTIONS, watchers))
        try:
            after = proc_status(daemon, "RssAnon"), proc_status(daemon, "Threads"), client.status().hot.readers
            assert client.status().ownership.watchers == watchers
            heard: list[dict[str, float]] = []
            cpu: list[float] = []
            cpu_alone: list[float] = []

            def ours() -> list[float]:
                begun = wire.cpu_s(daemon.pid)
                watching.begin({"turns": count * watchers // sessions, "idle_s": IDLE_S})
                acknowledged = to_watched.run(count, APPENDS_PER_S)
                heard.append(watching.end())
                cpu.append(wire.cpu_s(daemon.pid) - begun)
                return acknowledged

            def theirs() -> list[float]:
                begun = wire.cpu_s(daemon.pid)
                acknowledged = to_alone.run(count, APPENDS_PER_S)
                cpu_alone.append(wire.cpu_s(daemon.pid) - begun)
                return acknowledged

            mine, facing = ratio.by_blocks(benchmark, ours, theirs, rounds)
        finally:
            watching.close()
    heard, cpu, cpu_alone = heard[-rounds:], cpu[-rounds:], cpu_alone[-rounds:]
    each, each_alone = [one / count for one in cpu], [one / count for one in cpu_alone]
    ledger.add(case, "server CPU an append", "appends to sessions nobody watches", "s", each, each_alone)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        acknowledged = [ratio.percentile(block, share) for block in mine]
        arrived = [one[f"{name}_s"] for one in heard]
        ledger.add(case, f"event {name}", "the append's own acknowledgement", "s", arrived, acknowledged)
        unwatched = [ratio.percentile(block, share) for block in facing]
        made = ledger.add(case, f"ack {name}", "appends to sessions nobody watches", "s", acknowledged, unwatched)
        benchmark.extra_info[name] = made.ratio
    worst = max(one["max_s"] for one in heard)
    ledger.note(
        case, f"the latest of {sum(int(one['turns']) for one in heard):,} events came after {worst * 1e3:.1f} ms"
    )
    grown = [one - other for one, other in zip(after, before, strict=True)]
    ledger.note(
        case,
        f"a watcher takes {grown[0] / watchers:.1f} KiB; {grown[1]} threads and {grown[2]} readers more; "
        f"all open in {watching.opened_s:.1f} s",
    )
