"""The store is down under load: appends on the node go on, memory stays bounded, and the backlog drains afterwards."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import grpc
import pytest

from tests.fault.load import Load
from tests.fault.world import CLOUD_ACK, World, faulty, until
from tests.seaweed import Seaweed
from tests.wire import Refusal, Wire, user

SESSIONS = [f"s{number}" for number in range(64)]
WRITERS = 8
RATE_PER_S = 200
# The promise of the outage: everything is in the cloud tier so long after the store is back.
DRAIN_S_MAX = 30.0
# What a minute of this load may add to the process: its turns' own pages of the map, and some room.
RESIDENT_GROWTH_BYTES_MAX = 128 * 1024**2
LEASE_MS = 1000
START_S_MAX = 30.0
# The daemon's own defaults, and not the short ones of the other tests here.
SETTINGS = {"store_connect_timeout_ms": 2000, "store_read_timeout_ms": 10_000, "flush_interval_ms": 1000}


def begin(world: World, wire: Wire) -> None:
    """Every session owned, and its first turn in the cloud tier."""
    for session in SESSIONS:
        wire.create(session)
        wire.append(session, user("first-1", "hello"), durability=CLOUD_ACK)


def drained(world: World, wire: Wire, outage_s: float) -> bool:
    """Whether nothing is left of the outage: what is unflushed is younger, while the load goes on."""
    hot = world.status(wire).hot
    return not hot.dirty_sessions or hot.oldest_dirty_ms < min(3000, outage_s * 1000 / 2)


def finish(world: World, load: Load, wire: Wire) -> None:
    """The load's end: all of it in the cloud tier, all of it there, once."""
    load.end()
    until(lambda: world.flushed(wire), "nothing is unflushed", DRAIN_S_MAX)
    load.check(wire)
    for session, acked in load.acked.items():
        assert world.manifest(session).head >= max(seq for _, seq in acked.values())


@pytest.mark.parametrize(("how", "outage_s"), [("refuses", 60), ("silent", 10)])
def test_a_store_that_is_down_costs_no_append_and_the_backlog_drains(
    seaweed: Seaweed, how: str, outage_s: float
) -> None:
    with faulty(seaweed, lease_ms=LEASE_MS, **SETTINGS) as world, closing(world.wire()) as wire:
        begin(world, wire)
        with Load(world.daemon.address, SESSIONS, WRITERS, seed=1, rate_per_s=RATE_PER_S) as load:
            load.wait_for(2 * RATE_PER_S)
            acks, resident = load.acks, world.status(wire).resident_bytes
            (world.proxy.down if how == "refuses" else world.proxy.black_hole)()
            ends = time.monotonic() + outage_s
            peak = dirty = 0
            while time.monotonic() < ends:
                load.wait_for(RATE_PER_S // 2)
                status = world.status(wire)
                peak, dirty = max(peak, status.resident_bytes), max(dirty, status.hot.dirty_sessions)
            # A silent store shows when the first request has waited as long as it may.
            until(lambda: not world.status(wire).cloud.reachable, "the status says that the store is away")
            status = world.status(wire)
            assert status.cloud.last_error
            assert not status.cloud.lease_valid
            taken = load.acks - acks
            world.proxy.up()
            took_s = until(lambda: drained(world, wire, outage_s), "the backlog is drained", DRAIN_S_MAX)
            # Every append of the outage was answered, and marked once the lease had run out.
            assert not load.refused, dict(load.refused)
            assert load.unconfirmed
            assert dirty <= len(SESSIONS)
            growth = peak - resident
            print(
                f"{how} for {outage_s} s: {taken} appends taken, {load.unconfirmed} of them unconfirmed; resident"
                f" {resident >> 20} MiB, at most {peak >> 20} MiB; drained in {took_s:.1f} s"
            )
            assert growth <= RESIDENT_GROWTH_BYTES_MAX
            load.wait_for(RATE_PER_S)
            finish(world, load, wire)
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()


def awaits_store(wire: Wire) -> bool:
    """Whether a daemon answers that it is starting, with a time to come again."""
    try:
        wire.resume(SESSIONS[0])
    except grpc.RpcError as error:
        if error.trailing_metadata() is None or error.code() != grpc.StatusCode.UNAVAILABLE:
            return False
        with suppress(AssertionError):  # nobody listens yet
            found = Refusal(error)
            return found.reason == "NODE_STARTING" and found.retry_ms > 0
    return False


def test_a_kill_while_the_store_is_down_loses_and_doubles_nothing(seaweed: Seaweed) -> None:
    with faulty(seaweed, lease_ms=LEASE_MS, **SETTINGS) as world, closing(world.wire()) as wire:
        begin(world, wire)
        with Load(world.daemon.address, SESSIONS, WRITERS, seed=2, rate_per_s=RATE_PER_S) as load:
            load.wait_for(RATE_PER_S)
            world.proxy.down()
            load.wait_for(5 * RATE_PER_S)
            assert not load.refused, dict(load.refused)
            before = {session: dict(acked) for session, acked in load.acked.items()}
            world.daemon.kill()
            # Without the store nobody knows by which key names are hashed, nor whether another has the node's name: the
            # daemon waits for it, and says so.
            with ThreadPoolExecutor(1) as starting:
                started = starting.submit(world.daemon.start)
                until(lambda: awaits_store(wire), "the daemon waits for its store", START_S_MAX)
                assert not started.done()
                world.proxy.up()
                back = time.monotonic()
                started.result()
            until(lambda: drained(world, wire, 10), "the backlog is drained", DRAIN_S_MAX)
            print(f"killed in an outage: started and drained {time.monotonic() - back:.1f} s after the store was back")
            load.wait_for(RATE_PER_S)
            finish(world, load, wire)
            assert all(load.acked[session].items() >= acked.items() for session, acked in before.items())
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()
