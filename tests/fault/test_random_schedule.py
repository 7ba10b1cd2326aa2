"""Faults by chance under concurrent writers, with kills: an oracle of what was acknowledged has the last word.

A seed says which requests fail and how, and which turns are sent; the faults of one request do not depend on what runs
at the same time. pytest prints the seed of a run that failed.
"""

from __future__ import annotations

import random
from contextlib import closing

import pytest

from tests.fault.load import Load
from tests.fault.proxy import (
    AFTER,
    BEFORE,
    CUT,
    CUT_REQUEST,
    PASS,
    RESET,
    SILENCE,
    SWALLOW,
    Fault,
    Schedule,
)
from tests.fault.world import faulty, until
from tests.seaweed import Seaweed
from tests.wire import user

SESSIONS = [f"s{number}" for number in range(6)]
WRITERS = 12
KILLS = 2
ACKS_BETWEEN = (40, 160)
SHARE = 0.4
FAULTS = (
    *(Fault(what, when) for what in ("500", "503", "409", "412", RESET, SWALLOW, CUT) for when in (BEFORE, AFTER)),
    Fault("400"),
    Fault("429"),
    Fault("403"),
    Fault(CUT_REQUEST),
    # Each costs the read timeout, or most of it.
    Fault(SILENCE),
    Fault(SILENCE, AFTER),
    Fault(delay_ms=150),
    Fault("500", AFTER, delay_ms=150),
)


def run(seaweed: Seaweed, seed: int) -> None:
    """One seed: writers, faults, kills, then everything is healed and counted."""
    print(f"seed {seed}")
    rng = random.Random(seed)
    schedule = Schedule(seed, SHARE, FAULTS)
    with faulty(seaweed, store_read_timeout_ms=250, flush_interval_ms=20) as world, closing(world.wire()) as wire:
        for session in SESSIONS:
            wire.create(session)
            wire.append(session, user("first-1", "hello"))
        world.proxy.rule = schedule
        with Load(world.daemon.address, SESSIONS, WRITERS, seed, cloud_share=0.3) as load:
            for _ in range(KILLS):
                load.wait_for(rng.randint(*ACKS_BETWEEN))
                world.daemon.kill()
                world.daemon.start()
            load.wait_for(rng.randint(*ACKS_BETWEEN))
            world.proxy.heal()
            load.wait_for(50)
            load.end()
            until(lambda: world.flushed(wire), "nothing is unflushed")
            load.check(wire)
        for session, acked in load.acked.items():
            assert world.manifest(session).head >= max(seq for _, seq in acked.values())
        wire.close()
        assert world.daemon.terminate() == 0
        world.check_clean()
        failed = [asked for asked, fault in world.proxy.decisions().items() if fault != PASS]
        assert failed
        # What replaying rests on: nothing but the seed and the request went into any decision.
        for asked, fault in world.proxy.decisions().items():
            assert fault in (schedule(asked), PASS)
        print(f"{load.acks} acknowledged, {len(failed)} requests failed, refused {dict(load.refused)}")


@pytest.mark.parametrize("seed", range(1, 5))
def test_random_faults_and_kills_lose_and_double_nothing(seaweed: Seaweed, seed: int) -> None:
    run(seaweed, seed)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(1000, 1300))
def test_many_random_faults_and_kills_lose_and_double_nothing(seaweed: Seaweed, seed: int) -> None:
    run(seaweed, seed)
