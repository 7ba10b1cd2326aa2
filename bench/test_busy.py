"""A hot resume's p99 at 70 % of the peak, while the node flushes to SeaweedFS and hydrates 50 cold sessions a second.

Peak and p99 are both measured with that going on, and, as the other side, without it. Calls at the rate come whether or
not the ones before have ended, and count from when each was due. Daemon, store and three generators share the machine.
"""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Load
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, session_pb2
from tests.cluster.nodes import until
from tests.seaweed import Seaweed

HOT, HOT_TURNS = 64, 100
WRITTEN, APPENDS_PER_S = 100, 100
OWNED_S_MAX = 60.0
COLD_PER_S, COLD_TURNS = 50, 20
CALLERS, CONNECTIONS = 16, 4
# Of the measured peak.
SHARE = 0.7
REGION = "us-east-1"


class Background:
    """Appends that are flushed and sessions that are hydrated, at their rates, each by a generator of its own."""

    def __init__(self, daemon: Daemon, written: list[str], cold: list[str]) -> None:
        self._daemon = daemon
        appends = [wire.append_request(name, talk.turn(1, supplied=False)).SerializeToString() for name in written]
        self._appends = appends, [raw.index(b"turn-") + len(b"turn-") for raw in appends]
        self._cold = cold
        self._loads = Load(1, 2), Load(1, 2)
        self._under_way: list[Future[dict[str, float]]] = []
        self.hydrated = 0

    def begin(self, seconds: float) -> None:
        """Go on for so many seconds."""
        count = int(COLD_PER_S * seconds)
        names, self._cold = self._cold[:count], self._cold[count:]
        assert len(names) == count, "more cold sessions are needed"
        self.hydrated += count
        address = self._daemon.address
        self._under_way = [
            self._loads[0].begin(
                address, wire.APPEND, 0, *self._appends, each=True, per_s=APPENDS_PER_S, for_s=seconds
            ),
            self._loads[1].begin(
                address, wire.RESUME, count, [wire.resume_request(name) for name in names], each=True,
                per_s=COLD_PER_S,
            ),
        ]  # fmt: skip

    def end(self) -> list[dict[str, float]]:
        """Wait for both; their answers: appends, cold resumes."""
        return [future.result() for future in self._under_way]

    def close(self) -> None:
        for load in self._loads:
            load.close()


def test_p99_at_70_percent_of_the_peak(
    benchmark: Any, ledger: Any, size: Any, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, seconds = size.of(4, 1), size.of(3, 1)
    hot = [f"hot-{number}" for number in range(size.of(HOT, 8))]
    written = [f"written-{number}" for number in range(size.of(WRITTEN, 10))]
    # Two stretches a round, and a round to warm up.
    cold = [f"cold-{number}" for number in range(2 * COLD_PER_S * seconds * (rounds + 1))]
    env = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    url = f"s3://{seaweed.bucket}/bench-busy"
    with running_daemon(cloud=url, s3_endpoint=seaweed.endpoint, s3_region=REGION, env=env) as daemon:
        with wire.Client(daemon.address) as client:
            talk.make_sessions(client, [*hot, *written], HOT_TURNS, 16)
            talk.make_sessions(client, cold, COLD_TURNS, 16)
        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        daemon.start()
        requests = [wire.resume_request(name) for name in hot]
        with wire.Client(daemon.address) as client, Load(CALLERS, CONNECTIONS) as load:
            call = client.raw(wire.RESUME)
            # Until the node owns those that shall be hot; a cold resume claims in the background.
            for request in requests:
                until(lambda request=request: rung_of(call(request)) == context_pb2.RUNG_HOT, "it is hot", OWNED_S_MAX)
            background = Background(daemon, written, cold)
            beside: list[list[dict[str, float]]] = []

            def measured(busy: bool) -> dict[str, float]:
                found: dict[str, float] = {}
                for stretch in ("peak", "paced"):
                    if busy:
                        background.begin(seconds)
                    pace = {"per_s": found["peak"] * SHARE} if stretch == "paced" else {}
                    answer = load.run(daemon.address, wire.RESUME, 0, requests, for_s=max(0.5, seconds * 0.9), **pace)
                    if busy:
                        beside.append(background.end())
                    if stretch == "peak":
                        found["peak"] = answer["calls"] / answer["seconds"]
                    else:
                        found |= {name: answer[f"{name}_s"] for name in ("p50", "p99", "max")}
                return found

            try:
                before = client.store_requests()
                mine, facing = ratio.by_blocks(benchmark, lambda: measured(True), lambda: measured(False), rounds)
                after = client.store_requests()
            finally:
                background.close()
    asked = {kind: after[kind] - before.get(kind, 0) for kind in after}
    assert asked["get"] >= background.hydrated, "every cold session was fetched"
    assert asked["put"] > background.hydrated, "sessions were claimed, and turns flushed"
    case = f"hot resume while flushing to SeaweedFS and hydrating {COLD_PER_S} cold sessions/s"
    against = "the same with nothing beside it"
    ledger.add(
        case, "peak, calls/s", against, "/s", [one["peak"] for one in mine], [one["peak"] for one in facing]
    )  # fmt: skip
    for name in ("p50", "p99", "max"):
        made = ledger.add(
            case, f"{name} at 70 % of each peak", against, "s", [one[name] for one in mine],
            [one[name] for one in facing],
        )  # fmt: skip
        benchmark.extra_info[name] = made.ours
    ledger.alone(case, "p99 at 70 % of the peak", "s", [one["p99"] for one in mine], "busy p99")
    appended, hydrated = zip(*beside[2:], strict=True)
    ledger.note(
        case,
        f"beside it, medians: append p99 {middle(appended, 'p99_s'):.1f} ms, cold resume p50 "
        f"{middle(hydrated, 'p50_s'):.1f} ms, p99 {middle(hydrated, 'p99_s'):.1f} ms; {background.hydrated:,} "
        f"sessions hydrated, {asked['put']:,} PUTs",
    )


def rung_of(reply: bytes) -> int:
    return session_pb2.ResumeSessionResponse.FromString(reply).context.receipt.rung


def middle(answers: Any, key: str) -> float:
    """The median, in milliseconds."""
    return ratio.percentile(sorted(answer[key] for answer in answers), 0.5) * 1000
