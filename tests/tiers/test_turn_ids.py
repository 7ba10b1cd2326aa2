"""Turn ids in memory are those in the rows, however many turns come at a time, and reach over the horizon."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.core.manifest import TURN_ID_ENTRY_BYTES, TURN_IDS_MAX
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction

H = b"a session's hash"
OTHER = b"another's hash.."
TURNS = 3 * TURN_IDS_MAX


@pytest.fixture
def hot(tmp_path: Path) -> Iterator[Environment]:
    made = Environment(tmp_path / "hot", 1 << 26, 8, 8)
    try:
        yield made
    finally:
        made.close()


def entry(seq: int) -> bytes:
    return random.Random(seq).randbytes(16) + seq.to_bytes(8, "big")


@pytest.mark.parametrize("sizes", [(1,), (2,), (63, 64, 65), (1, 2, 7, 64, 200, 256)], ids=str)
def test_rows_and_memory_hold_the_same_ids_over_the_horizon(hot: Environment, sizes: tuple[int, ...]) -> None:
    rng = random.Random(1)
    ids = b""
    first = 1

    def add(transaction: Transaction, count: int) -> bytes:
        return log.append_ids(transaction, H, first, ids, [entry(seq) for seq in range(first, first + count)])

    hot.run_blocking(lambda transaction: log.append_ids(transaction, OTHER, 1, b"", [entry(1)]))
    while first <= TURNS:
        count = rng.choice(sizes)
        ids = hot.run_blocking(lambda transaction, count=count: add(transaction, count))
        first += count
        if first % 5 == 0 or first > TURNS:
            with hot.read() as transaction:
                stored = log.turn_ids(transaction, H, first - 1)
            assert ids == stored
            kept = len(stored) // TURN_ID_ENTRY_BYTES
            assert min(first - 1, TURN_IDS_MAX) <= kept <= TURN_IDS_MAX + 3 * 64
            assert stored == b"".join(entry(seq) for seq in range(first - kept, first))
    with hot.read() as transaction:
        assert log.turn_ids(transaction, OTHER, 1) == entry(1)
