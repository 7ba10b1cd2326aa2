"""The shared block: what the keeper says is read whole or not at all, and who waits for LMDB's lock goes first."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import zlib

import pytest

from sessiond.tiers import block as blocks
from sessiond.tiers.block import Block, ClockView, LeaseView, Slot, is_stuck
from sessiond.tiers.hot.environment import LOCK_COMMITS, LOCK_FREE, LOCK_HELD, LOCK_WAITS

WRITER = """
import sys
from sessiond.tiers.block import Block
block = Block(int(sys.argv[1]))
print("ready", flush=True)
number = 0
while True:
    number += 1
    block.publish(valid_until_ms=number, tenure=number, phase=number % 5, steady_offset_ms=-number,
                  running_offset_ms=number)
"""


@pytest.fixture
def block():
    made = Block.create()
    yield made
    made.close()


def test_what_another_process_publishes_without_a_pause_is_never_read_in_parts(block: Block) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(block.file)], pass_fds=[block.file], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout.readline() == b"ready\n"
        seen, newest = set(), 0
        ends_s = time.monotonic() + 20
        while len(seen) < 2000 and time.monotonic() < ends_s:
            said = block.read()
            assert said is not None
            number = said.tenure
            assert (said.valid_until_ms, said.phase, said.steady_offset_ms, said.running_offset_ms) == (
                number,
                number % 5,
                -number,
                number,
            )
            assert number >= newest
            newest = number
            seen.add(number)
        assert len(seen) >= 2000, "the writer was never caught at work"
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


def stands_at(block: Block) -> int:
    return blocks._COPIES[block._words[0] & 1]


@pytest.mark.parametrize("offset", range(52))
def test_a_block_that_does_not_verify_is_a_lease_that_is_not_held(block: Block, offset: int) -> None:
    lease = LeaseView(block, lambda: 5)
    block.publish(valid_until_ms=10, tenure=7)
    assert (lease.is_valid(), lease.tenure, lease.lost) == (True, 7, False)
    with memoryview(block._map) as view:
        view[stands_at(block) + offset] ^= 1
    assert block.read() is None
    assert (lease.is_valid(), lease.tenure, lease.lost) == (False, -1, True)
    block.publish(valid_until_ms=11)
    assert (lease.is_valid(), lease.tenure, lease.lost) == (True, 7, False)


@pytest.mark.parametrize("written", range(53))
def test_who_is_killed_or_interrupted_while_it_writes_has_said_nothing_yet(block: Block, written: int) -> None:
    block.publish(valid_until_ms=10, tenure=7)
    stood = block._words[0]
    state = struct.pack("<QqqIIqq", stood + 1, 99, 8, 1, 4, 5, 6)
    fresh = (state + struct.pack("<I", zlib.crc32(state)))[:written]
    start = blocks._COPIES[(stood + 1) & 1]
    block._map[start : start + written] = fresh
    assert block.read().tenure == 7
    if written == len(state) + 4:
        block._words[0] = stood + 1
        assert (block.read().tenure, block.read().lost) == (8, True)


def test_a_copy_of_another_version_is_not_taken_for_what_stands(block: Block) -> None:
    block.publish(tenure=7)
    block._words[0] += 2
    assert block.read() is None


@pytest.mark.parametrize(
    ("said", "now_ms", "valid"),
    [
        ({"valid_until_ms": 100}, 99, True),
        ({"valid_until_ms": 100}, 100, False),
        ({"valid_until_ms": 0}, 0, False),
        ({"valid_until_ms": 100, "fenced": True}, 1, False),
        ({"valid_until_ms": 100, "lost": True}, 1, False),
    ],
)
def test_a_view_is_valid_as_the_lease_is(block: Block, said: dict, now_ms: int, valid: bool) -> None:
    block.publish(**said)
    assert LeaseView(block, lambda: now_ms).is_valid() is valid


def test_clocks_follow_the_keepers_and_no_jump_of_the_wall_clock_forward(block: Block) -> None:
    wall, boot = [1_000_000], [500]
    clock = ClockView(block, lambda: wall[0], lambda: boot[0])
    block.publish(steady_offset_ms=999_500, running_offset_ms=999_000)
    assert (clock(), clock.running_ms(), clock.latest_ms()) == (1_000_000, 999_500, 1_000_000)
    wall[0] += 10_000_000
    assert clock() == 1_000_000
    wall[0], boot[0] = 900_000, 600
    assert (clock(), clock.latest_ms()) == (900_000, 1_000_100)


def test_slots_say_who_holds_the_lock_and_one_who_waits_goes_first(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = block.slot(0, 3), block.slot(2, 3)
    other.note(LOCK_WAITS)
    naps = []

    def sleep(seconds: float) -> None:
        naps.append(block.locks(3)[0][0])
        if len(naps) == 3:
            other.note(LOCK_HELD)

    monkeypatch.setattr(blocks.time, "sleep", sleep)
    mine.note(LOCK_WAITS)
    # Until then it did not ask: the lock is not fair, and the one who asks last may get it first.
    assert naps == [LOCK_FREE] * 3
    assert mine.hand_overs == 1
    assert [what for what, _ in block.locks(3)] == [LOCK_WAITS, LOCK_FREE, LOCK_HELD]
    other.note(LOCK_FREE)
    mine.note(LOCK_HELD)
    assert block.locks(3)[0][0] == LOCK_HELD
    mine.note(LOCK_FREE)
    mine.note(LOCK_WAITS)
    assert (mine.hand_overs, len(naps)) == (1, 3), "nobody waited"


def test_one_who_never_takes_the_lock_is_not_waited_for_longer_than_a_hand_over(block: Block) -> None:
    mine, other = Slot(block._words, 0, 2), Slot(block._words, 1, 2)
    other.note(LOCK_WAITS)
    began = time.monotonic()
    mine.note(LOCK_WAITS)
    assert blocks.HAND_OVER_S <= time.monotonic() - began < blocks.HAND_OVER_S + 1
    assert [what for what, _ in block.locks(2)] == [LOCK_WAITS, LOCK_WAITS]


@pytest.mark.parametrize(
    ("what", "age_ms", "stopped", "stuck"),
    [
        (LOCK_HELD, 999, False, False),
        (LOCK_HELD, 1000, False, True),
        (LOCK_COMMITS, 60_000, False, False),
        (LOCK_COMMITS, 1000, True, True),
        (LOCK_WAITS, 60_000, False, False),
        (LOCK_WAITS, 1000, True, True),
        (LOCK_FREE, 60_000, True, False),
    ],
)
def test_a_slow_disk_is_not_a_stuck_process(what: int, age_ms: int, stopped: bool, stuck: bool) -> None:
    assert is_stuck(what, 5000, 5000 + age_ms, 1000, stopped) is stuck
