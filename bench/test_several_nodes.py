"""Several nodes on one bucket: what it costs to ask the wrong one, and how long a hand-over, a loss and a crowd take.

Only the first case is a ratio; the others are times of things that have no other side, and are noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Load
from sessiond.client import AsyncClient
from sessiond.testing import running_daemon
from sessiond.v1 import context_pb2, session_pb2
from tests.cluster.ends import make_writable
from tests.cluster.history import History
from tests.cluster.nodes import Member, running_cluster, until
from tests.cluster.steady import Steady, check, roll
from tests.seaweed import Seaweed

TURNS = 1000
LEASE_MS = 4000
# What is counted as hand-over: from the order to stop until so long after the node is back.
AFTER_S = 1.0
RETRY_MS = 200
pytestmark = pytest.mark.nodes


def percent(values: list[float], share: float) -> float:
    return ratio.percentile(sorted(values), share)


def test_calls_sprayed_over_three_nodes(benchmark: Any, ledger: Any, size: Any) -> None:
    with (
        running_cluster(links=False, lease_ms=LEASE_MS, flush_interval_ms=1000) as cluster,
        contextlib.ExitStack() as opened,
    ):
        clients = [opened.enter_context(wire.Client(member.address)) for member in cluster]
        talk.make_session(clients[0], "s", TURNS)
        clients[0].settle()
        request = wire.resume_request("s")
        sprayed = itertools.cycle([client.raw(wire.RESUME) for client in clients])
        direct = clients[0].raw(wire.RESUME)
        reply = direct(request)
        assert session_pb2.ResumeSessionResponse.FromString(reply).context.tokens.total > 2500

        def ours() -> None:
            assert next(sprayed)(request) == reply

        def theirs() -> None:
            assert direct(request) == reply

        mine, facing = ratio.by_calls(benchmark, ours, theirs, size.of(20, 3), size.of(210, 15))
        after = cluster.manifest("s")
        assert (after.epoch, after.owner and after.owner[1]) == (1, "n1"), "ownership moved"
    case = f"resume sprayed over 3 nodes, {TURNS:,} turns, 4,000 tokens"
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        made = ledger.add(
            case,
            name,
            "the same call at its owner, same bytes",
            "s",
            [ratio.percentile(block, share) for block in mine],
            [ratio.percentile(block, share) for block in facing],
        )
        benchmark.extra_info[f"ratio_{name}"] = made.ratio


@pytest.mark.parametrize("store", ["folder", pytest.param("seaweedfs", marks=pytest.mark.full)])
def test_a_rolling_restart(benchmark: Any, ledger: Any, size: Any, seaweed: Seaweed, store: str) -> None:
    sessions = [f"s{number}" for number in range(size.of(100, 10))]
    rate = size.of(200, 20)
    server = seaweed if store == "seaweedfs" else None
    with running_cluster(server, links=False, lease_ms=LEASE_MS, flush_interval_ms=1000) as cluster:
        for member in cluster:
            # The first count of all loads the tokenizers; that is not what is measured here.
            member.wire().create(f"warm-{member.name}")
            make_writable(member, f"warm-{member.name}", "t", History())

        async def work() -> tuple[Steady, list[tuple[float, float]]]:
            async with AsyncClient(",".join(cluster.addresses), timeout_s=20) as client:
                for session in sessions:
                    await client.create_session(session)
                steady = Steady(client, sessions, rate)
                return steady, await roll(cluster, steady, size.of(5, 1))

        steady, windows = benchmark.pedantic(lambda: asyncio.run(work()), rounds=1, iterations=1)
        check(cluster, steady)
        assert cluster.stop() == [0, 0, 0]
        cluster.check_clean()
    during, calm = [], []
    for call in steady.calls:
        moving = any(began <= call.due_s <= ended + AFTER_S for began, ended in windows)
        (during if moving else calm).append(call.answered_s - call.due_s)
    ledger.note(
        f"rolling restart of 3 nodes at {rate} appends/s, {store}",
        f"{len(steady.calls):,} appends, no error, none lost or doubled, all in order; during hand-over "
        f"({len(during):,}): p50 {percent(during, 0.5) * 1e3:.1f} ms, p99 {percent(during, 0.99) * 1e3:.0f} ms, max "
        f"{max(during) * 1e3:.0f} ms (to reach: p99 500 ms); else: p50 {percent(calm, 0.5) * 1e3:.1f} ms, p99 "
        f"{percent(calm, 0.99) * 1e3:.0f} ms; a restart took "
        f"{', '.join(f'{ended - began:.1f}' for began, ended in windows)} s",
    )


@pytest.mark.full
def test_a_node_lost_with_its_disk(benchmark: Any, ledger: Any, size: Any, seaweed: Seaweed) -> None:
    names = [f"s{number}" for number in range(size.of(200, 10))]
    with running_cluster(seaweed, links=False, lease_ms=LEASE_MS, flush_interval_ms=1000) as cluster:
        with wire.Client(cluster[0].address) as client:
            talk.make_sessions(client, names, 4, 16)
            client.settle()
        cluster[0].kill()
        cluster[0].lose_disk()
        history = History()

        def work() -> list[float]:
            with ThreadPoolExecutor(32) as pool:
                began = time.monotonic()

                def one(place: int) -> float:
                    make_writable(cluster[1 + place % 2], names[place], "go-on", history)
                    return time.monotonic() - began

                return list(pool.map(one, range(len(names))))

        waits = benchmark.pedantic(work, rounds=1, iterations=1)
    ledger.note(
        f"a node lost with its disk, {len(names)} sessions, SeaweedFS",
        f"writable again at another node after {min(waits):.1f} s, p50 {percent(waits, 0.5):.1f} s, last "
        f"{max(waits):.1f} s (to reach: 10 s + 3 leases of {LEASE_MS / 1000:.0f} s = {10 + 3 * LEASE_MS / 1000:.0f} s)",
    )


class Memory:
    """Resident bytes of a process while the block runs: at its start and the most that was seen."""

    def __init__(self, pid: int) -> None:
        self._statm = Path(f"/proc/{pid}/statm")
        self._over = threading.Event()
        self.first = self.most = self._now()
        self._thread = threading.Thread(target=self._watch)

    def _now(self) -> int:
        return int(self._statm.read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, self._now())

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def reads(member: Member) -> dict[tuple[str, str], int]:
    """Requests so far by what they did and what they were about."""
    return {(row.kind, row.object): row.count for row in member.status().cloud.objects}


@pytest.mark.full
def test_a_crowd_of_cold_sessions(benchmark: Any, ledger: Any, size: Any, seaweed: Seaweed) -> None:
    names = [f"s{number}" for number in range(size.of(1000, 50))]
    with running_cluster(seaweed, 2, links=False, lease_ms=LEASE_MS, flush_interval_ms=1000) as cluster:
        with wire.Client(cluster[0].address) as client:
            talk.make_sessions(client, names, 40, 16)
        assert cluster[0].terminate() == 0
        cold = cluster[1]
        before = reads(cold)
        with Load(callers=1, connections=size.of(50, 5)) as load, Memory(cold.daemon.pid) as memory:
            bodies = [wire.resume_request(name) for name in names]
            found = benchmark.pedantic(
                lambda: load.crowd(cold.address, wire.RESUME, bodies, RETRY_MS).result(), rounds=1, iterations=1
            )
        until(lambda: cold.status().hot.sessions == len(names), "all are claimed", 120)
        asked = {key: count - before.get(key, 0) for key, count in reads(cold).items()}
    assert asked[("get", "manifest")] == len(names), asked
    assert not any(count for (kind, about), count in asked.items() if kind == "list" or about == "segment"), asked
    ledger.note(
        f"{len(names):,} sessions of 40 turns resumed cold at once on one node, SeaweedFS",
        f"one GET each, no LIST; p50 {found['p50_s']:.2f} s, p99 {found['p99_s']:.2f} s, max {found['max_s']:.2f} s, "
        f"refused and sent again {found['refused']:.0f}; the daemon had {memory.first / 1e6:.0f} MB before and "
        f"{memory.most / 1e6:.0f} MB at most; the generator took {found['cpu_s']:.2f} s of CPU",
    )


def crowd_note(found: dict[str, float]) -> str:
    return (
        f"every one has its context: p50 {found['p50_s']:.2f} s, p99 {found['p99_s']:.2f} s, last "
        f"{found['max_s']:.2f} s after the port opened; {found['refused']:.0f} calls refused and sent again after "
        f"{RETRY_MS} ms, {found['bytes'] / 1e6:.0f} MB, the generator took {found['cpu_s']:.2f} s of CPU"
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_crowd_after_a_restart(benchmark: Any, ledger: Any, size: Any, tmp_path: Path, workers: int) -> None:
    clients = size.of(15_000, 300)
    names = [f"session-{number}" for number in range(clients)]
    bodies = [wire.resume_request(name) for name in names]
    with running_daemon(tmp_path / "data", workers=workers) as daemon:
        with wire.Client(daemon.address) as client:
            talk.make_sessions(client, names, 4, 48)
            client.settle()
        found = []
        for _ in range(size.of(3, 1)):
            daemon.kill()
            with Load(callers=1, connections=size.of(300, 10)) as load:
                crowd = load.crowd(daemon.address, wire.RESUME, bodies, RETRY_MS)
                daemon.start()
                found.append(crowd.result())
        benchmark.pedantic(lambda: None, rounds=1, iterations=1)
        with wire.Client(daemon.address) as client:
            one = session_pb2.ResumeSessionResponse.FromString(client.raw(wire.RESUME)(bodies[-1])).context
            assert (one.receipt.rung, len(one.turns)) == (context_pb2.RUNG_HOT, 4)
            assert client.status().cloud.lease_valid
    found.sort(key=lambda each: each["p99_s"])
    ledger.note(
        f"{clients:,} clients that reconnect over 300 connections after SIGKILL and a restart on the disk, "
        f"{f'{workers} workers' if workers else 'one process'}, median of {len(found)} by p99",
        crowd_note(found[len(found) // 2]) + " (to reach: p99 3 s)",
    )


@pytest.mark.full
def test_a_crowd_after_a_steal(benchmark: Any, ledger: Any, size: Any) -> None:
    clients = size.of(15_000, 300)
    names = [f"session-{number}" for number in range(clients)]
    with running_cluster(size=2, links=False, lease_ms=LEASE_MS, flush_interval_ms=1000) as cluster:
        with wire.Client(cluster[0].address) as client:
            talk.make_sessions(client, names, 4, 48)
            client.settle()
        cluster[0].kill()
        heir = cluster[1]
        took = make_writable(heir, names[0], "first", History())
        before = reads(heir)
        with Load(callers=1, connections=300) as load, Memory(heir.daemon.pid) as memory:
            bodies = [wire.resume_request(name) for name in names]
            found = benchmark.pedantic(
                lambda: load.crowd(heir.address, wire.RESUME, bodies, RETRY_MS).result(), rounds=1, iterations=1
            )
            claimed = until(lambda: heir.status().hot.sessions >= clients, "all are claimed", 600)
        gets = reads(heir)[("get", "manifest")] - before.get(("get", "manifest"), 0)
        with wire.Client(heir.address) as client:
            one = session_pb2.ResumeSessionResponse.FromString(client.raw(wire.RESUME)(bodies[-1])).context
            assert one.receipt.missing, "nobody knows whether its owner had acknowledged more"
    ledger.note(
        f"{clients:,} clients that come to another node after a steal, folder",
        f"the first session was writable {took:.1f} s after the loss; then {crowd_note(found)}; {gets:,} manifests "
        f"fetched, the last session claimed {claimed:.0f} s later; {memory.first / 1e6:.0f} MB before, "
        f"{memory.most / 1e6:.0f} MB at most",
    )
