"""The compiled core against its readable twin: each group prints both and the ratio in parentheses.

Windows are read as a hot resume reads them, from rows of at most 4,080 bytes, and every frame's checksum is verified.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from sessiond.core import _kernel, pure
from sessiond.core.layout import HEADER_BYTES, MODE_HYBRID, ROLE_ASSISTANT, ROLE_USER
from tests.core.loggen import HASH, Log, Say, build_log

TURN_BYTES = 800
TURN_TOKENS = 160
twins = pytest.mark.parametrize("twin", [_kernel, pure], ids=["compiled", "pure"])


@pytest.fixture(scope="module")
def plain() -> Log:
    """600 turns of 800 bytes and 160 tokens: questions and answers, nothing else."""
    log = Log()
    text_bytes = TURN_BYTES - HEADER_BYTES
    for turn in range(600):
        role = ROLE_ASSISTANT if turn % 2 else ROLE_USER
        # turn_id grows by a digit now and then; the text gives way.
        room = text_bytes - 15 - len(str(turn + 1))
        log.do(Say(role, (("text", "x" * room),), (TURN_TOKENS, TURN_TOKENS, 0)))
    assert {len(frame) for frame in log.frames} == {TURN_BYTES}
    return log


@pytest.fixture(scope="module")
def mixed() -> Log:
    """1,000 turns of every kind, as a conversation with tools has them."""
    return build_log(5, 1000)


def window(log: Log, turns: int) -> tuple[Any, ...]:
    """fit_window's arguments for the newest `turns` turns, with one stride of rows to spare."""
    tokens = turns * TURN_TOKENS
    rows = log.rows()[-(turns * TURN_BYTES // 4000 + 2) :]
    return HASH, rows, 0, log.places[5], log.places[9], MODE_HYBRID, 0, tokens, tokens, tokens // 4, 0


@twins
@pytest.mark.benchmark(group="fit_window: 4,000 tokens, 25 turns of 800 bytes")
def test_window_of_4000_tokens(benchmark: Any, twin: ModuleType, plain: Log) -> None:
    answer = benchmark(twin.fit_window, *window(plain, 25))
    assert 3000 < answer[2] <= 4000


@twins
@pytest.mark.benchmark(group="fit_window: 200 turns of 800 bytes")
def test_window_of_200_turns(benchmark: Any, twin: ModuleType, plain: Log) -> None:
    # The newest 200 turns begin at a multiple of the stride: 400 turns come before them.
    answer = benchmark(twin.fit_window, *window(plain, 200))
    assert len(answer[4]) == 200 * TURN_BYTES


@twins
@pytest.mark.benchmark(group="replay: 1,000 frames of every kind")
def test_replay_of_1000_frames(benchmark: Any, twin: ModuleType, mixed: Log) -> None:
    assert benchmark(twin.replay, HASH, mixed.states[0], mixed.stream) == mixed.states[-1]


@twins
@pytest.mark.benchmark(group="replay: 1 frame, as an append does")
def test_replay_of_one_frame(benchmark: Any, twin: ModuleType, mixed: Log) -> None:
    assert benchmark(twin.replay, HASH, mixed.states[-2], mixed.frames[-1]) == mixed.states[-1]


@twins
@pytest.mark.benchmark(group="seal_frame: a turn of 800 bytes")
def test_seal_frame(benchmark: Any, twin: ModuleType, plain: Log) -> None:
    frame = plain.frames[-1]
    header = twin.read_frame(HASH, frame)
    assert benchmark(twin.seal_frame, HASH, *header[2:], frame[HEADER_BYTES:]) == frame
