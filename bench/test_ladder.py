"""How long a context takes from each rung of the ladder: HOT, CLOUD from a manifest or from segments, PARTIAL, RESET.

Sessions are asked once each, for the first answer is the recovery; a HOT call of the same client follows in rounds that
take turns. All over gRPC, one caller, budget 4,000.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import ratio, talk, wire
from sessiond.core import rules
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.cloud.bucket import manifest_key, open_bucket
from sessiond.tiers.cloud.open import open_store
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from tests.seaweed import Seaweed

PLOT = "rungs"
TURNS = 20
# 160 KB: the newest of them are in the manifest, the others in a segment.
LONG_TURNS = 200
LONG_BUDGET = 20_000
NEVER_MS = 3_600_000
REGION = "us-east-1"


def asked(name: str, budget: int = 4000, reset_to: str = "") -> bytes:
    request = session_pb2.ResumeSessionRequest(
        session_id=name, context=context_pb2.ContextSpec(budget_tokens=budget), reset_to_session_id=reset_to
    )
    return bytes(request.SerializeToString())


def append(client: wire.Client, name: str, number: int) -> None:
    request = wire.append_request(name, talk.turn(number), turn_pb2.DURABILITY_EDGE)
    client.sessions.AppendTurn(request, timeout=wire.TIMEOUT_S)


def measure(
    benchmark: Any, ledger: Any, client: wire.Client, name: str, rung: int, requests: list[bytes], hot: bytes,
    rounds: int,
) -> list[float]:  # fmt: skip
    """Each request once, split over the rounds, against as many HOT calls; the HOT side's p50 by round."""
    call = client.raw(wire.RESUME)
    per_round = len(requests) // (rounds + 1)
    left = iter(requests)

    def once(request: bytes, expected: int) -> float:
        replies: list[bytes] = []
        took = wire.timed(lambda raw: replies.append(call(raw)) or b"", request)
        receipt = session_pb2.ResumeSessionResponse.FromString(replies[0]).context.receipt
        assert receipt.rung == expected, receipt
        assert bool(receipt.missing) == (expected == context_pb2.RUNG_PARTIAL), receipt
        return took

    mine, facing = ratio.by_blocks(
        benchmark,
        lambda: sorted(once(next(left), rung) for _ in range(per_round)),
        lambda: sorted(once(hot, context_pb2.RUNG_HOT) for _ in range(per_round)),
        rounds,
    )
    p50 = [[ratio.percentile(block, 0.5) for block in side] for side in (mine, facing)]
    made = ledger.add(f"first resume, {name}", "p50", "HOT", "s", p50[0], p50[1])
    p99 = [[block[-1] for block in side] for side in (mine, facing)]
    ledger.add(f"first resume, {name}", f"worst of {per_round}", "HOT", "s", p99[0], p99[1])
    ledger.point(PLOT, "sessiond", name, p50[0])
    benchmark.extra_info["ratio"] = made.ratio
    return p50[1]


def make_hot(client: wire.Client, name: str) -> bytes:
    """A session that is hot on this node; the request for it."""
    talk.make_session(client, name, TURNS)
    return asked(name)


@contextlib.contextmanager
def drained(names: list[str], turns: int, **settings: Any) -> Iterator[Daemon]:
    """A daemon whose sessions were released to the cloud tier, and whose hot tier is gone."""
    with running_daemon(**settings) as daemon:
        with wire.Client(daemon.address) as client:
            talk.make_sessions(client, names, turns, 8)
        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        daemon.start()
        yield daemon


@pytest.fixture
def rounds(size: Any) -> int:
    return int(size.of(10, 2))


@pytest.fixture
def names(size: Any, rounds: int) -> list[str]:
    return [f"lost-{number}" for number in range(size.of(12, 3) * (rounds + 1))]


def test_cloud_from_a_folder(benchmark: Any, ledger: Any, names: list[str], rounds: int) -> None:
    with drained(names, TURNS) as daemon, wire.Client(daemon.address) as client:
        hot = measure(
            benchmark, ledger, client, "CLOUD, manifest, folder", context_pb2.RUNG_CLOUD,
            [asked(name) for name in names], make_hot(client, "hot"), rounds,
        )  # fmt: skip
    ledger.point(PLOT, "sessiond", "HOT", hot)


def test_cloud_from_segments(benchmark: Any, ledger: Any, names: list[str], rounds: int) -> None:
    with drained(names, LONG_TURNS) as daemon, wire.Client(daemon.address) as client:
        before = client.store_requests()["get"]
        measure(
            benchmark, ledger, client, "CLOUD, manifest and segment, folder", context_pb2.RUNG_CLOUD,
            [asked(name, LONG_BUDGET) for name in names], make_hot(client, "hot"), rounds,
        )  # fmt: skip
        assert client.store_requests()["get"] - before >= 2 * len(names), "a manifest and a segment each"


def test_cloud_from_seaweedfs(benchmark: Any, ledger: Any, names: list[str], rounds: int, seaweed: Seaweed) -> None:
    env = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    where = {"cloud": f"s3://{seaweed.bucket}/bench-ladder", "s3_endpoint": seaweed.endpoint, "s3_region": REGION}
    with drained(names, TURNS, env=env, **where) as daemon, wire.Client(daemon.address) as client:
        measure(
            benchmark, ledger, client, "CLOUD, manifest, SeaweedFS", context_pb2.RUNG_CLOUD,
            [asked(name) for name in names], make_hot(client, "hot"), rounds,
        )  # fmt: skip


def test_partial_after_the_disk_is_lost(benchmark: Any, ledger: Any, names: list[str], rounds: int) -> None:
    # Nothing is flushed by itself, so that each session has turns that only the disk held.
    with running_daemon(flush_interval_ms=NEVER_MS, flush_waiting_ms=NEVER_MS) as daemon:
        with wire.Client(daemon.address) as client:
            talk.make_sessions(client, names, TURNS, 8)
            client.admin.Flush(admin_pb2.FlushRequest(), timeout=wire.TIMEOUT_S)
            for name in names:
                append(client, name, TURNS + 1)
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.start()
        with wire.Client(daemon.address) as client:
            measure(
                benchmark, ledger, client, "PARTIAL, disk lost, folder", context_pb2.RUNG_PARTIAL,
                [asked(name) for name in names], make_hot(client, "hot"), rounds,
            )  # fmt: skip


def test_reset_of_what_can_not_be_read(benchmark: Any, ledger: Any, names: list[str], rounds: int) -> None:
    with drained(names, TURNS) as daemon, wire.Client(daemon.address) as client:
        store = open_store(daemon.cloud)
        hash_key = open_bucket(store, b"", 0).hash_key
        store.close()
        root = Path(daemon.cloud.removeprefix("file://"))
        for name in names:
            path = root / manifest_key(rules.session_hash(hash_key, "default", name))
            stored = bytearray(path.read_bytes())
            stored[len(stored) // 2] ^= 1
            path.write_bytes(stored)
        measure(
            benchmark, ledger, client, "RESET, manifest damaged, folder", context_pb2.RUNG_RESET,
            [asked(name, reset_to=f"new-{name}") for name in names], make_hot(client, "hot"), rounds,
        )  # fmt: skip
