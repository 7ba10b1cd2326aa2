"""What fit_window promises of a window, against a brute-force reading of DESIGN.md's "Strides without state"."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond import core
from sessiond.core.layout import (
    FIT_MORE,
    FIT_NOTHING,
    FIT_OK,
    FLAG_CUT,
    FLAG_EXCHANGE,
    HEADER_BYTES,
    MODE_FULL,
    MODE_HYBRID,
    MODE_LAST_N,
    MODE_SUMMARY,
    ROLE_ASSISTANT,
    ROLE_TOOL,
    ROLE_USER,
    Header,
)
from sessiond.errors import Corrupt
from tests.core.loggen import EXAMPLES, HASH, Log, Say, budgets, build_log, small_logs

often = settings(max_examples=EXAMPLES, deadline=None)


class Wish(NamedTuple):
    mode: int
    last_exchanges: int
    tail: int
    exact: int
    stride: int
    slot: int = 0
    since_seq: int = 0


@st.composite
def windows(draw: st.DrawFn, max_turns: int = 30) -> tuple[Log, Wish]:
    """A log and a wish whose budgets lie where they make a difference."""
    log = draw(small_logs(max_turns))
    slot = draw(st.integers(0, 1))
    tail, exact = draw(budgets(log, slot))
    mode = draw(st.sampled_from((MODE_HYBRID, MODE_HYBRID, MODE_FULL, MODE_LAST_N, MODE_SUMMARY)))
    stride = draw(st.one_of(st.just(max(1, tail // 4)), st.integers(1, 80)))
    return log, Wish(mode, draw(st.integers(1, 4)), tail, exact, stride, slot)


def fit(log: Log, wish: Wish, rows: list[bytes] | None = None) -> tuple[Any, ...]:
    places = log.places
    return core.fit_window(
        HASH,
        log.rows() if rows is None else rows,
        wish.slot,
        places[5],
        places[9],
        wish.mode,
        wish.last_exchanges,
        wish.tail,
        wish.exact,
        wish.stride,
        wish.since_seq,
    )


def due(log: Log, wish: Wish) -> int | None:
    """Where the window must start, by reading the rule aloud; None if nothing fits."""
    live = log.live()
    cuts = [header for header in live if header.flags & FLAG_CUT]
    total = {cut.seq: sum(header.tokens[wish.slot] for header in live if header.seq >= cut.seq) for cut in cuts}
    before = {cut.seq: cut.cumulative[wish.slot] - cut.tokens[wish.slot] for cut in cuts}
    if wish.mode == MODE_HYBRID:
        multiple = 0
        while True:
            # The first legal cut at or after the multiple.
            cut = next((cut.seq for cut in cuts if before[cut.seq] >= multiple), None)
            if cut is None:
                break
            if total[cut] <= wish.tail:
                if cut <= log.places[9] or cut == cuts[0].seq:
                    return cut
                break
            multiple += wish.stride
    if wish.mode in (MODE_LAST_N, MODE_SUMMARY):
        wanted = wish.last_exchanges if wish.mode == MODE_LAST_N else 1
        starts = [cut.seq for cut in cuts if cut.flags & FLAG_EXCHANGE]
        if len(starts) >= wanted:
            cuts = [cut for cut in cuts if cut.seq >= starts[-wanted]]
    return next((cut.seq for cut in cuts if total[cut.seq] <= wish.exact), None)


def ranges_of(headers: list[Header]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for header in headers:
        if ranges and ranges[-1][1] == header.seq - 1:
            ranges[-1] = ranges[-1][0], header.seq
        else:
            ranges.append((header.seq, header.seq))
    return ranges


@often
@given(windows(), st.data())
def test_a_window_is_the_one_due_whole_contiguous_and_within_budget(
    case: tuple[Log, Wish], data: st.DataObject
) -> None:
    log, wish = case
    wish = wish._replace(since_seq=data.draw(st.integers(0, log.seq + 1)))
    live = log.live()
    answer = fit(log, wish)
    if not live:
        assert answer == (FIT_OK, 0, 0, 0, b"", [], 0, b"")
        return
    start = due(log, wish)
    if start is None:
        newest = [header.seq for header in live if header.flags & FLAG_CUT][-1]
        needed = sum(header.tokens[wish.slot] for header in live if header.seq >= newest)
        assert answer == (FIT_NOTHING, needed)
        assert needed > wish.exact
        return
    window = [header for header in live if header.seq >= start]
    tokens = sum(header.tokens[wish.slot] for header in window)
    assert answer[:4] == (FIT_OK, start, tokens, len(window))
    assert tokens <= wish.exact
    assert window[0].flags & FLAG_CUT
    assert answer[4] == b"".join(log.frames[h.seq - 1] for h in window if h.seq > wish.since_seq)
    assert answer[5] == ranges_of(window)
    assert answer[6:] == (window[0].prev_live_seq, window[-1].chain)


@often
@given(windows(max_turns=40))
def test_a_window_never_splits_a_tool_exchange(case: tuple[Log, Wish]) -> None:
    log, wish = case
    answer = fit(log, wish)
    if answer[0] != FIT_OK:
        return
    still_open: list[str] = []
    for header in core.scan_frames(HASH, answer[4]):
        for is_result, call_id in core.tool_events(answer[4][header.offset + HEADER_BYTES : header.end]):
            if is_result:
                assert call_id in still_open, f"turn {header.seq} answers a call outside the window"
                still_open.remove(call_id)
            else:
                still_open.append(call_id)


@often
@given(windows())
def test_rows_fed_one_by_one_lead_to_the_same_window(case: tuple[Log, Wish]) -> None:
    log, wish = case
    rows = log.frames  # each a row of its own
    whole = fit(log, wish, rows)
    given_rows: list[bytes] = []
    asked = log.seq + 1
    answer = fit(log, wish, given_rows)
    while answer[0] == FIT_MORE:
        assert answer[1] < asked, "a row that was given already was asked for"
        asked = answer[1]
        given_rows = rows[asked - 1 :]
        answer = fit(log, wish, given_rows)
    assert answer == whole
    assert fit(log, wish) == whole


@often
@given(small_logs(max_turns=50, rewinds=False), st.integers(1, 200), st.integers(1, 60))
def test_the_start_of_a_window_never_moves_back_as_a_log_grows(log: Log, budget: int, stride: int) -> None:
    wish = Wish(MODE_HYBRID, 0, budget, budget, stride)
    start = 0
    growing = Log({"made": "here"})
    growing.frames, growing.headers = log.frames, log.headers
    for seq in range(1, log.seq + 1):
        growing.states = log.states[: seq + 1]
        answer = fit(growing, wish)
        if answer[0] == FIT_OK and answer[3]:
            assert answer[1] >= start
            start = answer[1]


def test_the_start_stands_still_for_a_stride_and_then_jumps() -> None:
    """1,000 plain turns of 20 tokens: 800 of them move the start of a 400-token window 159 times, not 800."""
    log = Log()
    starts = []
    wish = Wish(MODE_HYBRID, 0, 400, 400, 100)
    for turn in range(1000):
        log.do(Say(ROLE_ASSISTANT if turn % 2 else ROLE_USER, (("text", "hi"),), (20, 20, 0)))
        answer = fit(log, wish, log.frames[-30:])
        assert answer[0] == FIT_OK
        assert answer[2] > 300 or turn < 20
        starts.append(answer[1])
    moves = sum(one != other for one, other in itertools.pairwise(starts[200:]))
    assert moves == 160 - 1 or moves == 160


def test_what_varies_from_call_to_call_does_not_move_the_start() -> None:
    log = Log()
    for turn in range(60):
        log.do(Say(ROLE_ASSISTANT if turn % 2 else ROLE_USER, (("text", "hi"),), (10, 10, 0)))
    for tail in range(40, 400, 7):
        starts = {fit(log, Wish(MODE_HYBRID, 0, tail, exact, tail // 4))[1] for exact in range(tail, tail + 120, 5)}
        assert len(starts) == 1
        assert 10 * (log.seq + 1 - starts.pop()) <= tail


@often
@given(windows(), st.data())
def test_damage_within_a_window_is_corrupt(case: tuple[Log, Wish], data: st.DataObject) -> None:
    log, wish = case
    log.do(Say(ROLE_USER, (("text", "hi"),), (1, 1, 0)))
    wish = wish._replace(exact=10**9)
    answer = fit(log, wish)
    seqs = [header.seq for header in log.live() if header.seq >= answer[1]]
    seq = data.draw(st.sampled_from(seqs))
    frame = bytearray(log.frames[seq - 1])
    # Not its seq: a row without the turn that is looked for may be one that ends too early.
    frame[data.draw(st.integers(20, len(frame) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(Corrupt):
        fit(log, wish, [*log.frames[: seq - 1], bytes(frame), *log.frames[seq:]])


def test_a_turn_missing_within_the_rows_is_corrupt_and_one_before_them_is_asked_for() -> None:
    log = build_log(3, 30)
    live = [header.seq for header in log.live()]
    wish = Wish(MODE_FULL, 0, 10**9, 10**9, 0)
    with pytest.raises(Corrupt, match=f"its row lacks turn {live[-3]}"):
        fit(log, wish, [frame for seq, frame in enumerate(log.frames, 1) if seq != live[-3]])
    assert fit(log, wish, log.frames[live[-3] :]) == (FIT_MORE, live[-3])
    assert fit(log, wish, []) == (FIT_MORE, live[-1])
    assert fit(log, wish, [b"", b""]) == (FIT_MORE, live[-1])


@pytest.mark.parametrize("order", [(1, 0), (0, 0)])
def test_rows_out_of_order_are_corrupt(order: tuple[int, int]) -> None:
    log = build_log(3, 30)
    halves = b"".join(log.frames[:15]), b"".join(log.frames[15:])
    with pytest.raises(Corrupt, match="its row is out of order"):
        fit(log, Wish(MODE_FULL, 0, 9, 9, 0), [halves[order[0]], halves[order[1]]])
    with pytest.raises(Corrupt, match="its row is out of order"):
        core.row_live(halves[order[0]] + halves[order[1]], 1, 0)


def test_one_exchange_larger_than_the_budget_is_answered_with_its_size() -> None:
    log = Log.of([Say(ROLE_USER, (("text", "hi"),), (30, 31, 0)), Say(ROLE_USER, (("text", "hi"),), (500, 501, 0))])
    for mode in (MODE_FULL, MODE_LAST_N, MODE_SUMMARY, MODE_HYBRID):
        assert fit(log, Wish(mode, 1, 100, 499, 25)) == (FIT_NOTHING, 500)
        assert fit(log, Wish(mode, 1, 100, 499, 25, slot=1)) == (FIT_NOTHING, 501)
        assert fit(log, Wish(mode, 1, 100, 500, 25))[:4] == (FIT_OK, 2, 500, 1)


def test_a_summary_window_is_the_newest_exchange() -> None:
    log = build_log(9, 60)
    answer = fit(log, Wish(MODE_SUMMARY, 0, 10**6, 10**6, 0))
    assert answer[1] == log.places[9]
    assert answer == fit(log, Wish(MODE_LAST_N, 1, 10**6, 10**6, 0))


def test_a_window_does_not_start_between_a_call_and_its_result() -> None:
    log = Log.of(
        [
            Say(ROLE_USER, (("text", "hi"),), (10, 10, 0)),
            Say(ROLE_ASSISTANT, (("call", "a"), ("call", "a")), (10, 10, 0)),
            Say(ROLE_TOOL, (("result", 0),), (10, 10, 0)),
            Say(ROLE_TOOL, (("result", 0),), (10, 10, 0)),
            Say(ROLE_ASSISTANT, (("text", "so"),), (10, 10, 0)),
        ]
    )
    starts = [fit(log, Wish(MODE_FULL, 0, budget, budget, 0))[1] for budget in (10, 20, 30, 39, 40, 49, 50)]
    assert starts == [5, 5, 5, 5, 2, 2, 1]


def test_a_window_does_not_start_at_an_answer_given_while_a_call_is_open() -> None:
    log = Log.of(
        [
            Say(ROLE_USER, (("text", "hi"),), (10, 10, 0)),
            Say(ROLE_ASSISTANT, (("call", "a"),), (10, 10, 0)),
            Say(ROLE_ASSISTANT, (("text", "wait"),), (10, 10, 0)),
            Say(ROLE_TOOL, (("result", 0),), (10, 10, 0)),
        ]
    )
    assert fit(log, Wish(MODE_FULL, 0, 29, 29, 0)) == (FIT_NOTHING, 30)
    assert fit(log, Wish(MODE_FULL, 0, 30, 30, 0))[1] == 2


@often
@given(small_logs())
def test_row_live_adds_up_to_the_live_conversation(log: Log) -> None:
    places = log.places
    rows = log.rows()
    target, tokens = places[5], 0
    for row in reversed(rows):
        if target in [header.seq for header in core.scan_frames(HASH, row)]:
            own, target = core.row_live(row, target, 0)
            tokens += own
    assert (tokens, target) == (places[7][0], 0)


def test_row_live_refuses_a_row_without_the_turn() -> None:
    log = build_log(3, 10)
    with pytest.raises(Corrupt, match="its row lacks turn 11"):
        core.row_live(log.stream, 11, 0)
    with pytest.raises(Corrupt, match="its row lacks turn 1"):
        core.row_live(b"", 1, 0)
