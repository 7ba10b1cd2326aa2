"""What the simulation once found, told as a story of its own: seeds change their worlds whenever the code changes."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from sessiond.core import rules
from sessiond.tiers.cloud.bucket import open_bucket
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from tests.sim.devices import Device
from tests.sim.node import TENANT
from tests.sim.schedule import Trace
from tests.sim.world import SECOND, World, patched

SEED = 1
LEASE_MS = 1000


class Story:
    """A calm world of two nodes and one session, in which only that happens which the story says."""

    def __init__(self, folder: Path) -> None:
        self.world = World(SEED, folder, Trace(), nodes=2)
        knobs = self.world.knobs
        knobs.lease_ms, knobs.flush_interval_ms, knobs.idle_release_ms = LEASE_MS, 60_000, 0
        knobs.sessions, knobs.cloud_only, knobs.expiry, knobs.deletes = ["s0"], set(), {}, False
        knobs.serve_unconfirmed = True
        self.world.weather.calm = True

    def device(self, name: str, node: str) -> Device:
        device = Device(self.world, name, "s0")
        device.home, device.faithful = node, 1.0
        return device

    def tell(self, plot: Callable[[], Awaitable[None]]) -> list[tuple[str, str]]:
        """Run it, let the nodes come to rest, and hold every invariant; what is broken."""
        world = self.world
        with patched(world):
            try:
                for machine in world.machines.values():
                    machine.start()
                assert world.schedule.run(world._served, 20 * SECOND)
                bucket = open_bucket(world.direct, b"", 0)
                world.history.add("s0", rules.session_hash(bucket.hash_key, TENANT, "s0"), False)
                world._task(plot())  # type: ignore[arg-type]
                assert world.schedule.run(lambda: world._living == 0, 200 * SECOND)
                world._come_to_rest()
                world._check(bucket)
            finally:
                world.end()
        return [("DEFECT", what) for what in world.schedule.defects] + world.history.violations


@pytest.fixture
def story() -> Iterator[Story]:
    folder = Path(tempfile.mkdtemp(prefix="sim-"))
    try:
        yield Story(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_session_of_a_lost_disk_is_written_through_the_other_node(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n2")
    refusals: list[str] = []

    async def plot() -> None:
        assert await first.create()
        assert await first.append()
        assert await second.resume(), "n2 knows n1 as its owner"
        story.world.schedule.after(1, lambda: story.world.lose_disk("n1"))
        await first.sleep(0.1)
        while not story.world._served():
            await first.sleep(0.1)
        # n1 is back, and is another hot tier: nobody asks it for the session.
        await second.append(10.0)
        refusals.append(story.world.history.sessions["s0"].ops[-1].reason)

    assert story.tell(plot) == []
    # What the device expected may be lost with the disk.
    assert refusals[0] in ("", "EXPECTED_MISMATCH")


def test_a_node_that_stood_still_changes_nothing_and_its_turns_come_back(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n2")

    async def plot() -> None:
        world = story.world
        assert await first.create()
        assert await first.append()
        zombie = world.machines["n1"].daemon
        assert zombie is not None
        zombie.host.freeze()
        assert await second.append(30.0), "n2 takes it once the lease has stood still"
        taken = world.history.sessions["s0"].present
        assert taken is not None
        assert (taken.epoch, taken.owner and taken.owner[1]) == (2, "n2")
        world._thaw(zombie)
        await first.append(30.0)

    assert story.tell(plot) == []
    names = [turn.turn_id for turn in story.world.history.sessions["s0"].known.values()]
    assert names, "nothing was written, so nothing was tested"


def test_a_node_that_drains_and_cannot_flush_never_answers_without_its_own_turns(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n1")
    request = session_pb2.AppendTurnRequest(session_id="s0", durability=turn_pb2.DURABILITY_EDGE)

    async def plot() -> None:
        world = story.world
        assert await first.create()
        request.turns.append(first.turn())
        assert await first.send(request, 5.0)
        # The bucket takes no writes, and the drain begins.
        world.weather.outage["n1"] = ("unwritable", "m/")
        world.drain("n1")
        await first.sleep(0.5)
        for _ in range(4):
            await second.resume(1.0)
        del world.weather.outage["n1"]

    assert story.tell(plot) == []
    answered = [op for op in story.world.history.sessions["s0"].ops if op.kind == "resume"]
    assert len(answered) == 4


def test_a_conflict_with_a_session_on_its_way_out_is_never_told_as_no_such_session(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n1")
    story.world.knobs.group_max, story.world.knobs.fsync_us = 64, 30_000
    request = session_pb2.AppendTurnRequest(session_id="s0", conflict_mode=session_pb2.CONFLICT_MODE_RETURN_TAIL)
    request.expected.seq = 77
    release = admin_pb2.ReleaseRequest(session_ids=["s0"])

    async def plot() -> None:
        world = story.world
        assert await first.create()
        assert await first.append()
        request.turns.append(second.turn())
        for _ in range(20):
            # Both may be in one commit: the append is refused, and behind it the release begins.
            await asyncio.gather(second.send(request, 5.0), world.call("n1", "Release", release, 5.0))

    assert story.tell(plot) == []
    kinds = [op.kind for op in story.world.history.sessions["s0"].ops]
    assert kinds.count("conflict") == 20
