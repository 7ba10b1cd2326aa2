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
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from tests.sim.devices import Device
from tests.sim.node import TENANT
from tests.sim.schedule import Trace
from tests.sim.weather import StorePlan
from tests.sim.world import SECOND, World, patched

SEED = 1
LEASE_MS = 1000


class Story:
    """A calm world of few nodes and one session, in which only that happens which the story says."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.world = World(SEED, folder, Trace(), nodes)
        knobs = self.world.knobs
        knobs.lease_ms, knobs.flush_interval_ms, knobs.idle_release_ms = LEASE_MS, 60_000, 0
        knobs.sessions, knobs.cloud_only, knobs.expiry, knobs.deletes = ["s0"], set(), {}, False
        knobs.serve_unconfirmed = True
        self.world.weather.calm = True

    def device(self, name: str, node: str) -> Device:
        device = Device(self.world, name, "s0")
        device.home, device.faithful = node, 1.0
        return device

    def cut_off(self, name: str, *others: str) -> Callable[[], None]:
        """Nothing gets through between a node and others, until this is called."""
        links = {link for other in others for link in ((name, other), (other, name))}
        self.world.weather.cut.update(links)
        return lambda: self.world.weather.cut.difference_update(links)

    def owner(self) -> tuple[int, str]:
        """(epoch, node) by the manifest."""
        present = self.world.history.sessions["s0"].present
        assert present is not None
        return present.epoch, str(present.owner[1]) if present.owner is not None else ""

    async def until_owned(self, owner: tuple[int, str], patience_s: float = 30.0) -> None:
        for _ in range(int(patience_s * 20)):
            if self.owner() == owner:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"the session is at {self.owner()}, and not at {owner}")

    async def release(self, node: str) -> None:
        await self.world.call(node, "Release", admin_pb2.ReleaseRequest(session_ids=["s0"]), 5.0)

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
def folder() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="sim-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@pytest.fixture
def story(folder: Path) -> Story:
    return Story(folder)


def appending(
    device: Device, durability: int = turn_pb2.DURABILITY_EDGE, text: str = ""
) -> session_pb2.AppendTurnRequest:
    """One turn of a device, with so many words more."""
    request = session_pb2.AppendTurnRequest(session_id="s0", durability=durability)  # type: ignore[arg-type]
    request.turns.append(device.turn())
    if text:
        request.turns[0].message.parts.add(text=text)
    return request


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


def test_a_node_is_taken_for_gone_only_by_a_fence_that_is_known_to_stand(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n2")
    owners: list[tuple[int, str]] = []

    async def plot() -> None:
        world = story.world
        assert await first.create()
        assert await first.send(appending(first), 5.0)
        back = story.cut_off("n1", "store", "n2")
        # Nothing that is written over the lease of n1 lands, and nobody says so.
        world.weather.outage["n2"] = ("unwritable", "n/n1")
        await second.send(appending(second), 8.0)
        owners.append(story.owner())
        back()
        await first.sleep(LEASE_MS / 1000)
        await first.resume()
        del world.weather.outage["n2"]

    assert story.tell(plot) == []
    assert owners == [(1, "n1")], "n2 took a session whose owner nobody had fenced"


def test_a_node_whose_lease_has_run_out_says_that_it_is_not_sure(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n2")
    answered: list[int] = []

    async def plot() -> None:
        assert await first.create()
        assert await first.send(appending(first), 5.0)
        back = story.cut_off("n1", "store", "n2")
        assert await second.send(appending(second), 30.0), "n2 takes it once the lease has stood still"
        assert story.owner() == (2, "n2")
        await first.resume()
        answered.append(story.world.history.sessions["s0"].ops[-1].ownership)
        back()

    assert story.tell(plot) == []
    assert answered == [context_pb2.OWNERSHIP_UNCONFIRMED]


def test_an_old_copy_of_the_disk_answers_for_nothing(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n1")

    async def plot() -> None:
        world, machine = story.world, story.world.machines["n1"]
        assert await first.create()
        assert await first.send(appending(first), 5.0)
        machine.copy_disk()
        assert await first.send(appending(first, turn_pb2.DURABILITY_CLOUD), 5.0)
        await first.sleep(LEASE_MS / 1000)  # the lease says how far the hot tier had come

        def restored() -> None:
            machine.kill()
            machine.restore_disk()
            machine.start()

        world.schedule.after(1, restored)
        await first.sleep(0.1)
        while not world._served():
            await first.sleep(0.1)
        assert await second.resume(20.0)

    assert story.tell(plot) == []
    op = story.world.history.sessions["s0"].ops[-1]
    assert (op.kind, op.head and op.head[0]) == ("resume", 2)


def test_a_claim_whose_answer_comes_after_a_fence_is_no_ownership(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n2")
    weather = story.world.weather
    usual, patience_us, held = weather.store, weather.store_timeout_us, [False]

    def late(host: str, key: str, writes: bool) -> StorePlan:
        if host == "n2" and key.startswith("m/") and writes and not held[0]:
            held[0] = True
            weather.store_timeout_us = 60 * SECOND  # of this request
            return StorePlan(2000, 20 * SECOND)
        weather.store_timeout_us = patience_us
        return usual(host, key, writes)

    async def plot() -> None:
        world = story.world
        assert await first.create()
        assert await first.send(appending(first), 5.0)
        await story.release("n1")
        weather.store = late  # type: ignore[method-assign]
        claiming = asyncio.ensure_future(second.send(appending(second), 60.0))
        await story.until_owned((2, "n2"))
        back = story.cut_off("n2", "store", "n1")
        assert await first.send(appending(first), 30.0), "n1 takes it once the lease has stood still"
        assert story.owner() == (3, "n1")
        back()
        while world.schedule.now_us < 25 * SECOND:
            await first.resume()
            await second.resume()
            # Often, once the answer is due: it is not for long that rows could be believed.
            await first.sleep(0.5 if world.schedule.now_us < 20 * SECOND else 0.02)
        await claiming

    assert story.tell(plot) == []
    assert held[0]


def test_no_segment_is_deleted_that_a_commit_of_unknown_outcome_may_name(story: Story) -> None:
    first = story.device("a", "n1")
    story.world.knobs.inline_bytes = 400
    weather = story.world.weather

    async def plot() -> None:
        assert await first.create()
        for _ in range(4):
            assert await first.send(appending(first, text="again " * 100), 5.0)
        # Manifests are written from here on, and nobody hears of it.
        weather.outage["n1"] = ("deaf", "m/")
        await first.send(appending(first, turn_pb2.DURABILITY_CLOUD, "again " * 100), 8.0)
        await first.sleep(10.0)  # until the outcome is given up on
        del weather.outage["n1"]
        assert await first.send(appending(first, turn_pb2.DURABILITY_CLOUD), 20.0)

    assert story.tell(plot) == []
    present = story.world.history.sessions["s0"].present
    assert present is not None
    assert present.segments, "no segment was sealed, so nothing was tested"


def test_whoever_owned_a_session_once_is_not_asked_for_ever(folder: Path) -> None:
    story = Story(folder, nodes=3)
    first, second, third = (story.device(name, node) for name, node in (("a", "n1"), ("b", "n2"), ("c", "n3")))

    async def plot() -> None:
        assert await first.create()
        assert await second.send(appending(second), 5.0), "n2 sends it on to n1, and remembers"
        await story.release("n1")
        assert await third.send(appending(third), 5.0)
        assert story.owner() == (2, "n3")
        assert await second.send(appending(second), 5.0)

    assert story.tell(plot) == []


def test_a_creation_that_was_cut_short_with_its_disk_is_listed_once_somebody_has_it(story: Story) -> None:
    first, second = story.device("a", "n1"), story.device("b", "n2")
    weather, objects = story.world.weather, story.world.region.objects

    def rows() -> list[str]:
        return [key for key in objects if key.startswith("u/")]

    async def plot() -> None:
        world = story.world
        # The manifest lands, the row that lists the session does not, and the node is lost.
        weather.outage["n1"] = ("unwritable", "u/")
        assert not await first.create(3.0)
        assert story.owner() == (1, "n1")
        assert rows() == []
        world.schedule.after(1, lambda: world.lose_disk("n1"))
        assert await second.append(40.0), "n2 takes it"
        assert len(rows()) == 1

    assert story.tell(plot) == []
