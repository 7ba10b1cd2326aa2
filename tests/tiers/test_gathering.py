"""Waiting for more writes before a commit: they share it, and where none come it is hardly tried again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.tiers.hot import environment
from sessiond.tiers.hot.environment import GATHER_AGAIN, GATHER_S, GATHERED_MIN, Environment, Transaction

TIMEOUT_S = 30.0


@pytest.fixture
def hot(tmp_path: Path) -> Iterator[Environment]:
    opened = Environment(tmp_path / "hot", 16 * 1024**2, 64, 64)
    yield opened
    opened.close()


def nothing(transaction: Transaction) -> None:
    del transaction


def alone(hot: Environment, writes: int) -> None:
    """So many writes, each after the other's end."""
    for _ in range(writes):
        hot.run_blocking(nothing)


def test_a_caller_alone_is_hardly_ever_held_up(hot: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(environment, "pause", pauses.append)
    alone(hot, 3 * GATHER_AGAIN[1])
    assert hot.commits == 3 * GATHER_AGAIN[1]
    # After 4, 8, 16 ... 1,024 commits.
    assert 0 < len(pauses) <= 11
    assert set(pauses) == {GATHER_S}


def test_writes_that_come_meanwhile_share_the_commit_and_are_waited_for_again(
    hot: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    others: list[threading.Thread] = []
    more = GATHERED_MIN

    def come(seconds: float) -> None:
        pauses.append(seconds)
        there = hot._queue.qsize()
        for _ in range(more):
            others.append(threading.Thread(target=hot.run_blocking, args=(nothing,)))
            others[-1].start()
        while hot._queue.qsize() < there + more:
            threading.Event().wait(0.001)

    monkeypatch.setattr(environment, "pause", come)
    alone(hot, GATHER_AGAIN[0])
    assert len(pauses) == 1
    before = hot.commits
    alone(hot, 5)
    # Each of the five found others, and took them with it.
    assert (hot.commits - before, len(pauses)) == (5, 6)
    for other in others:
        other.join(TIMEOUT_S)
    assert hot.appends == GATHER_AGAIN[0] + 5 + 6 * more
    more = GATHERED_MIN - 1
    alone(hot, 1)
    assert len(pauses) == 7
    alone(hot, GATHER_AGAIN[0] - 1)
    assert len(pauses) == 7
