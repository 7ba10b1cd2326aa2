"""Turns that a fenced node had acknowledged are brought to the session's owner, whatever went wrong on the way before.

Real nodes in this process, over a folder that answers as a test tells it to (test_commits.py); what one node offers
another comes there without a network.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.core import rules
from sessiond.daemon import doubt_all
from sessiond.service.node import CallCounts, Node
from sessiond.service.rescue import IN_FLIGHT_MAX, Rescues
from sessiond.service.router import PeerUnreachable
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hot.rows import PHASE_CLAIMING, PHASE_FENCED
from sessiond.tiers.hydrate import load
from sessiond.v1 import admin_pb2, context_pb2, node_pb2, session_pb2
from tests.tiers.test_commits import (
    Killed,
    Land,
    LiveNode,
    World,
    assistant,
    fenced,
    is_manifest,
    killed_once_landed,
    refused,
    talk,
    unsent,
    user,
)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


class Wire:
    """Every node of the world, by its hot tier."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cut = 0

    async def call(self, address: str, request: node_pb2.ForwardRequest, timeout_s: float) -> node_pb2.ForwardResponse:
        raise PeerUnreachable("no call is forwarded here")

    async def rescue(self, address: str, request: node_pb2.RescueRequest, timeout_s: float) -> node_pb2.RescueResponse:
        if self.cut:
            self.cut -= 1
            raise PeerUnreachable("the way is cut")
        for node in self.world.nodes:
            if node.node.incarnation == request.incarnation:
                return await rescues(node).apply(request)
        raise PeerUnreachable("no such node")

    def reason(self, status: bytes) -> str:
        return ""


def rescues(node: LiveNode, wire: Wire | None = None) -> Rescues:
    return Rescues(node.sessions._parts, node.sessions.ownership, wire or Wire(node.world))


def drained(node: LiveNode, offering: Rescues, grace_ms: int = 10_000) -> admin_pb2.DrainResponse:
    """How a drain of this node ends."""
    parts = node.sessions._parts
    counted = CountingStore(node.world.store)
    admin = Node(parts, node.sessions, counted, None, "test", grace_ms, CallCounts(), None, offering)  # type: ignore[arg-type]

    async def drain() -> admin_pb2.DrainResponse:
        last = admin_pb2.DrainResponse()
        async for progress in admin.drain(0):
            last.CopyFrom(progress)
        return last

    return node.world.run(drain())


def no_manifest(key: str, land: Land) -> str:
    return unsent(key, land) if is_manifest(key) else land()


def cut_short(world: World) -> tuple[LiveNode, Rescues]:
    """A fenced node whose attempt to take its session back, and its turns 3 and 4 with it, the store did not answer."""
    node = fenced(world)
    offering = rescues(node)
    world.store.on_put = no_manifest
    with refused("STORE_UNAVAILABLE"):
        world.run(offering.offer(world.h))
    world.store.heal()
    assert node.head.phase == PHASE_CLAIMING
    return node, offering


def test_turns_behind_a_claim_that_failed_are_offered_to_whoever_took_the_session_since(world: World) -> None:
    node, offering = cut_short(world)
    owner = world.node("third", "n3")
    owner.resume()
    world.run(offering.offer(world.h))
    assert [turn.turn_id for turn in owner.resume().turns] == ["t1", "t2", "t3", "t4"]
    assert not node.proofs()


def test_turns_behind_a_claim_that_failed_come_into_the_log_once_the_store_answers(world: World) -> None:
    node, offering = cut_short(world)
    world.run(offering.offer(world.h))
    assert [turn.turn_id for turn in node.resume().turns] == ["t1", "t2", "t3", "t4"]


def fenced_with_nothing(world: World) -> tuple[LiveNode, LiveNode]:
    """A node that was taken over although the cloud tier had all of it, and knows it; and whoever has the session."""
    node = talk(world, "first")
    node.flush()
    owner = world.node("second", "n2")
    assert owner.take_over()
    doubt_all(node.hot)
    node.flush()
    assert node.head.phase == PHASE_FENCED
    assert owner.resume().receipt.rung == context_pb2.RUNG_PARTIAL
    return node, owner


def test_a_fenced_node_that_lacks_nothing_says_so_and_nothing_is_missing(world: World) -> None:
    node, owner = fenced_with_nothing(world)
    world.run(rescues(node).offer(world.h))
    assert owner.resume().receipt.rung == context_pb2.RUNG_HOT
    assert not node.proofs()
    assert not world.manifest.loss


def test_only_the_hot_tier_that_owned_the_epoch_says_that_nothing_is_missing(world: World) -> None:
    _, owner = fenced_with_nothing(world)
    for epoch, head_seq, incarnation in ((1, 2, bytes(16)), (1, 3, world.nodes[0].node.incarnation), (2, 2, bytes(16))):
        request = node_pb2.RescueRequest(session_hash=world.h, epoch=epoch, head_seq=head_seq)
        request.from_incarnation = incarnation
        world.run(rescues(owner).apply(request))
        assert owner.resume().receipt.rung == context_pb2.RUNG_PARTIAL


def test_a_call_that_comes_before_the_rescue_finds_the_turns_in_the_log(world: World) -> None:
    node = fenced(world)
    node.sessions.ownership.on_reclaimed = rescues(node).reclaimed
    node.append(user("t5"))
    assert [turn.turn_id for turn in node.resume().turns] == ["t1", "t2", "t3", "t4", "t5"]
    node.flush()
    assert not world.manifest.orphans
    assert not world.manifest.loss


def test_a_claim_that_landed_unheard_and_that_nobody_asks_for_is_owned_and_can_be_released(world: World) -> None:
    talk(world).release()
    node = world.node("second", "n2")
    world.store.on_put = killed_once_landed
    with pytest.raises(Killed):
        node.append(user("t3"))
    world.store.heal()
    assert node.head.phase == PHASE_CLAIMING
    assert world.manifest.owner is not None
    ended = drained(node, rescues(node))
    assert ended.clean
    assert world.manifest.owner is None


def test_a_claim_that_was_overtaken_and_that_nobody_asks_for_leaves_nothing(world: World) -> None:
    talk(world).release()
    node, third = world.node("second", "n2"), world.node("third", "n3")
    world.store.on_put = no_manifest
    with refused("STORE_UNAVAILABLE"):
        node.append(user("t3"))
    world.store.heal()
    assert node.head.phase == PHASE_CLAIMING
    third.append(user("t4"))
    offering = rescues(node)
    offering.note(world.h)
    world.run(offering.settle())
    assert node.sessions.ownership.peek(world.h) is None


def test_a_drain_with_turns_behind_a_claim_that_failed_is_not_called_clean(world: World) -> None:
    node, offering = cut_short(world)
    world.store.on_put = no_manifest
    ended = drained(node, offering, 300)
    assert ended.done
    assert not ended.clean
    assert node.proofs() >= world.acked


def test_a_drain_brings_the_turns_behind_a_claim_that_failed_into_the_log(world: World) -> None:
    node, offering = cut_short(world)
    ended = drained(node, offering)
    assert ended.clean
    assert world.manifest.owner is None
    assert world.manifest.head == 4


def test_a_drain_offers_again_what_an_owner_that_was_out_of_reach_did_not_take(world: World) -> None:
    node = fenced(world)
    world.node("third", "n3").resume()
    wire = Wire(world)
    wire.cut = 2
    ended = drained(node, rescues(node, wire))
    assert ended.clean
    assert wire.cut == 0
    world.nodes[-1].flush()
    assert world.manifest.head == 4


def test_a_drain_offers_every_fenced_session_however_many_there_are(world: World) -> None:
    first, second = world.node("first", "n1"), world.node("second", "n2")
    offering = rescues(first)
    names = [f"s{number}" for number in range(2 * IN_FLIGHT_MAX + 1)]
    for name in names:
        world.run(first.sessions.create(first.call, session_pb2.CreateSessionRequest(session_id=name)))
        request = session_pb2.AppendTurnRequest(session_id=name, turns=[user("t1")])
        world.run(first.sessions.append(first.call, request))
        h = rules.session_hash(world.bucket.hash_key, "default", name)
        cold = load(world.store, h)
        assert cold is not None
        assert second.claims.claim(cold, [1, 0, 1, 0], world.clock())
        doubt_all(first.hot)
        first.flusher.flush(h)
        head = first.sessions.ownership.peek(h)
        assert head is not None
        assert head.phase == PHASE_FENCED
        offering.note(h)
    ended = drained(first, offering)
    assert (dict(ended.failures), ended.clean) == ({}, True)
    assert offering.outcomes == {"APPLIED": len(names)}


def test_an_older_disk_that_brings_some_of_what_was_lost_does_not_hide_the_rest(world: World) -> None:
    node = talk(world, "first")
    node.flush()
    node.append(user("t3"), assistant("t4"))
    world.nodes.remove(node)
    node.close()
    shutil.copytree(world.path / "first", world.path / "older")
    node = world.node("first")
    node.append(user("t5"), assistant("t6"))
    second = world.node("second", "n2")
    assert second.take_over()
    # The disk is gone; the copy of it is another hot tier.
    copy = Environment(world.path / "older", 1 << 30, 128, 64)
    copy.mint_incarnation()
    copy.close()
    back = world.node("older")
    doubt_all(back.hot)
    back.flush()
    world.run(rescues(back).offer(world.h))
    reply = second.resume()
    assert [turn.turn_id for turn in reply.turns] == ["t1", "t2", "t3", "t4"]
    assert reply.receipt.rung == context_pb2.RUNG_PARTIAL
    assert reply.receipt.missing


def test_a_fenced_disk_that_brings_all_that_was_lost_leaves_nothing_missing(world: World) -> None:
    node = talk(world, "first")
    node.flush()
    node.append(user("t3"), assistant("t4"))
    second = world.node("second", "n2")
    assert second.take_over()
    assert second.resume().receipt.missing
    doubt_all(node.hot)
    node.flush()
    world.run(rescues(node).offer(world.h))
    reply = second.resume()
    assert reply.receipt.rung == context_pb2.RUNG_HOT
    assert not reply.receipt.missing
