"""The whole line over a real S3 server: claims, flushes, segments, a lost disk, and one GET per cold resume."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sessiond import config
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.wire import CLOUD, HOT, PARTIAL, Wire, assistant, user


@pytest.fixture
def daemon(seaweed, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    credentials = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    cloud = f"s3://{seaweed.bucket}/{request.node.name}"
    with running_daemon(cloud=cloud, s3_endpoint=seaweed.endpoint, env=credentials, flush_interval_ms=50) as running:
        yield running


def requests(wire: Wire) -> dict[str, int]:
    """Requests to the store so far, by kind, the lease's own left out."""
    counts: dict[str, int] = {}
    for row in wire.admin.GetStatus(admin_pb2.GetStatusRequest()).cloud.requests:
        counts[row.kind] = counts.get(row.kind, 0) + row.count
    return counts


def fill(wire: Wire, session: str, count: int, first: int = 1, size: int = 40, **fields: object):
    reply = None
    for start in range(first, first + count, 64):
        turns = [
            (user if n % 2 else assistant)(f"t{n}", f"number {n} " + "y" * size)
            for n in range(start, min(start + 64, first + count))
        ]
        reply = wire.append(session, *turns, **fields)
    return reply


def test_sessions_survive_on_s3(daemon: Daemon, seaweed) -> None:
    wire = Wire(daemon.address)
    wire.create("small", user_id="ann", metadata={"k": "v"})
    wire.create("large", user_id="ann")
    wire.create("strict", policy=turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_CLOUD))
    fill(wire, "small", 10)
    fill(wire, "large", 700, size=300)
    strict = fill(wire, "strict", 5)
    assert strict.durability == turn_pb2.DURABILITY_CLOUD
    before = {name: wire.resume(name) for name in ("small", "large", "strict")}
    wire.close()
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    wire = Wire(daemon.address)
    for name, context in before.items():
        cold = wire.resume(name)
        assert cold.receipt.rung == CLOUD
        assert [turn.chain for turn in cold.turns] == [turn.chain for turn in context.turns]
        assert cold.state == context.state
    assert len(list(wire.turns("large"))) == 700
    listed = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ann")).sessions
    assert {session.session_id for session in listed} == {"small", "large"}
    for _ in range(2000):
        if all(wire.resume(name).receipt.rung == HOT for name in before):
            break
    assert [wire.resume(name).receipt.rung for name in before] == [HOT] * 3
    fill(wire, "small", 2, first=11, durability=turn_pb2.DURABILITY_CLOUD)
    fill(wire, "strict", 2, first=11)
    wire.close()
    daemon.kill()
    daemon.lose_hot_tier()
    daemon.restart()
    wire = Wire(daemon.address)
    # The node owned all three when it lost its disk; only one of them could not have lost anything.
    assert [wire.resume(name).receipt.rung for name in ("small", "large", "strict")] == [PARTIAL, PARTIAL, CLOUD]
    assert len(wire.resume("small").turns) == 12
    wire.resume("small", accept_missing=1)
    wire.close()
    assert daemon.terminate() == 0
    settings = config.load(
        None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud, "s3_endpoint": seaweed.endpoint}
    )
    assert verify(settings, lambda *_: None) == []


def test_a_cold_resume_within_the_manifest_is_exactly_one_get(daemon: Daemon) -> None:
    wire = Wire(daemon.address)
    for name, turns in (("short", 10), ("long", 1500)):
        wire.create(name)
        fill(wire, name, turns, size=200)
    wire.close()
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    wire = Wire(daemon.address)
    for name in ("short", "long"):
        for _ in range(5):
            before = requests(wire)
            context = wire.resume(name, read_only=True)
            after = requests(wire)
            assert context.receipt.rung == CLOUD
            assert after["get"] - before["get"] == 1
            assert after.get("list", 0) == before.get("list", 0)
    wire.close()
