"""checkpoint = replay(checkpoint, turns after its cursor): one answer, in any batching."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.layout import (
    FLAG_APPLIES,
    FLAG_BOUNDARY,
    FLAG_CUT,
    FLAG_EXCHANGE,
    HEADER_BYTES,
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_REWIND,
    KIND_STATE,
    KIND_SUMMARY,
    OPEN_CALLS_MAX,
    ROLE_ASSISTANT,
    ROLE_USER,
    SUPERSEDED_RANGES_MAX,
)
from sessiond.errors import Corrupt, Exhausted
from tests.core.loggen import (
    EXAMPLES,
    HASH,
    OTHER_HASH,
    Action,
    Log,
    Rewind,
    Say,
    Summarise,
    build_log,
    logs,
    random_log,
)

often = settings(max_examples=EXAMPLES, deadline=None)


def say(role: int = ROLE_USER, tokens: int = 5) -> Say:
    return Say(role, (("text", "hi"),), (tokens, tokens, 0))


def in_force(log: Log) -> list[int]:
    """The seqs that no rewind has superseded, rewinds themselves included."""
    return [seq for seq in range(1, log.seq + 1) if seq not in log.superseded]


@often
@given(logs(), st.data())
def test_replay_in_any_batching_gives_the_same_bytes(log: Log, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, log.seq), max_size=6)))
    state = log.states[0]
    for low, high in itertools.pairwise([0, *cuts, log.seq]):
        state = core.replay(HASH, state, b"".join(log.frames[low:high]))
        assert state == log.states[high]


@often
@given(logs())
def test_replay_of_nothing_changes_nothing(log: Log) -> None:
    for state in log.states:
        assert core.replay(HASH, state, b"") == state


def test_a_long_log_replays_to_the_same_bytes_from_anywhere() -> None:
    frames, _, folded = random_log(5, 600)
    for start in range(0, 601, 97):
        assert core.replay(HASH, folded[start], b"".join(frames[start:])) == folded[-1]


@often
@given(logs(min_turns=2), st.data())
def test_a_gap_a_repeat_or_a_disorder_is_corrupt(log: Log, data: st.DataObject) -> None:
    if log.seq < 2:
        return
    start, found = data.draw(
        st.tuples(st.integers(0, log.seq), st.integers(0, log.seq - 1)).filter(lambda pair: pair[0] != pair[1])
    )
    with pytest.raises(Corrupt, match=f"its seq is {found + 1} where {start + 1} is due"):
        core.replay(HASH, log.states[start], log.frames[found])
    swapped = [*log.frames]
    swapped[0], swapped[1] = swapped[1], swapped[0]
    for stream in (b"".join(swapped), log.frames[0] * 2, b"".join(log.frames[1:])):
        with pytest.raises(Corrupt):
            core.replay(HASH, log.states[0], stream)


def test_a_turn_of_another_session_is_corrupt() -> None:
    frames, _, folded = random_log(1, 5)
    with pytest.raises(Corrupt, match="its checksum does not match"):
        core.replay(OTHER_HASH, folded[0], frames[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prev_live_seq": 0}, "it links to another message"),
        ({"cumulative": (16, 15, 0)}, "its token column does not add up"),
        ({"cumulative": (15, 15, 1)}, "its token column does not add up"),
        ({"tokens": (6, 5, 0)}, "its token column does not add up"),
    ],
)
def test_a_turn_that_contradicts_the_log_is_corrupt(changes: dict[str, Any], message: str) -> None:
    log = Log.of([say(), say(ROLE_ASSISTANT), say()])
    values = log.headers[2]._asdict() | changes
    del values["offset"], values["end"]
    frame = core.seal_frame(HASH, **values, body=log.frames[2][HEADER_BYTES:])
    with pytest.raises(Corrupt, match=message):
        core.replay(HASH, log.states[2], frame)


@often
@given(logs())
def test_the_state_says_what_the_log_in_force_says(log: Log) -> None:
    """An independent fold: over the turns in force, with protobuf's own parser."""
    state = states.decode(log.states[-1])
    live, kept = log.live(), in_force(log)
    assert [header.seq for header in live] == [
        seq for seq in kept if rules.is_live(log.headers[seq - 1].kind, log.headers[seq - 1].role)
    ]
    starts = [header.seq for header in live if header.flags & FLAG_EXCHANGE]
    assert state.live_messages == len(live)
    assert state.live_tokens == [sum(header.tokens[slot] for header in live) for slot in range(3)]
    assert (state.exchanges, state.exchange_seq) == (len(starts), starts[-1] if starts else 0)
    assert state.cursor == log.seq
    everything = [header for header in log.headers if rules.is_live(header.kind, header.role)]
    assert state.cumulative == [sum(header.tokens[slot] for header in everything) for slot in range(3)]

    flags: dict[str, bool] = {}
    metadata, pins, mode, milestone, summary, instructions = {"made": "here"}, {}, "", None, [], None
    for seq in kept:
        header, body = log.headers[seq - 1], log.bodies[seq - 1]
        if header.kind == KIND_STATE:
            flags |= dict(body.state.flags)
            mode = body.state.mode if body.state.HasField("mode") else mode
            metadata = {
                key: text
                for key, text in (metadata | dict(body.state.metadata)).items()
                if key not in body.state.metadata_removed
            }
            pins |= {pin.key: (pin.value, header.epoch, seq) for pin in body.state.pins}
            pins = {key: pin for key, pin in pins.items() if key not in body.state.pins_removed}
        elif header.kind == KIND_MILESTONE:
            milestone = [seq, body.milestone.label]
        elif header.kind == KIND_SUMMARY and header.flags & FLAG_APPLIES:
            covered = body.summary.covered
            row = [seq, covered.first_seq, covered.last_seq, *header.tokens]
            summary = [row] if covered.first_seq == 1 else [*summary, row]
        elif header.kind == KIND_MESSAGE and not rules.is_live(header.kind, header.role):
            instructions = [seq, *header.tokens]
    assert state.flags == {key: True for key, value in flags.items() if value}
    assert (state.mode, state.metadata, state.milestone) == (mode, metadata, milestone)
    assert (state.summary, state.instructions) == (summary, instructions)
    assert {key: tuple(pin[:3]) for key, pin in state.pins.items()} == pins
    for name in ("pins", "flags", "metadata"):
        assert list(getattr(state, name)) == sorted(getattr(state, name))

    changed = [header for header in log.headers if header.kind in (KIND_STATE, KIND_REWIND)]
    assert state.state_at == ([changed[-1].epoch, changed[-1].seq] if changed else [0, 0])
    bounds = [header for header in log.headers if header.flags & FLAG_BOUNDARY]
    assert state.boundary == ([bounds[-1].epoch, bounds[-1].seq, bounds[-1].time_ms] if bounds else [0, 0, 0])
    if log.headers:
        assert (state.epoch, state.chain) == (log.headers[-1].epoch, log.headers[-1].chain)
        assert state.time_ms == log.headers[-1].time_ms


@often
@given(logs(min_turns=1), st.lists(st.integers(0, 20), min_size=1, max_size=4))
def test_a_rewind_restores_what_was(log: Log, picks: list[int]) -> None:
    for pick in picks:
        log.do(Rewind(pick))
        to_seq = log.bodies[-1].rewind.to_seq
        before, after = states.decode_places(log.states[to_seq]), log.places
        for place in states.RESTORED_PLACES:
            assert after[place] == before[place]
        assert after[17] == [log.epoch, log.seq]
        covered = {seq for first, last in after[20] for seq in range(first, last + 1)}
        assert covered == log.superseded


def test_a_rewind_to_the_start_leaves_an_empty_window() -> None:
    log = Log.of([say(), say(ROLE_ASSISTANT)])
    log.do(Rewind(2))
    state = states.decode(log.states[-1])
    assert (state.last_live_seq, state.live_messages, state.superseded) == (0, 0, [[1, 2]])
    assert state.cumulative == [10, 10, 0]


def test_superseded_ranges_are_kept_up_to_their_limit() -> None:
    actions: list[Action] = []
    for _ in range(SUPERSEDED_RANGES_MAX + 6):
        actions += [say(), say(ROLE_ASSISTANT), Rewind(1)]
    state = states.decode(Log.of(actions).states[-1])
    assert len(state.superseded) == SUPERSEDED_RANGES_MAX
    assert state.superseded[-1] == [len(actions) - 1, len(actions) - 1]
    assert state.superseded[0] == [3 * 6 + 2, 3 * 6 + 2]


def test_a_summary_takes_effect_if_it_extends_the_coverage_or_starts_over() -> None:
    log = Log.of([say()] * 9)
    for how, reach, expected in (
        (0, 2, [[1, 3]]),  # extends
        (2, 1, [[1, 3]]),  # leaves a gap
        (3, 1, [[1, 3]]),  # claims another chain
        (0, 1, [[1, 3], [4, 5]]),
        (1, 3, [[1, 3], [4, 5]]),  # starts over and reaches less far
        (1, 6, [[1, 7]]),  # starts over and reaches beyond
    ):
        log.do(Summarise(how, reach, (3, 3, 0)))
        assert [row[1:3] for row in log.places[11]] == expected


def test_results_pair_with_the_nearest_earlier_unanswered_call() -> None:
    call, other, result = ("call", "a"), ("call", "b"), ("result", 0)
    log = Log.of([say(), Say(ROLE_ASSISTANT, (call, other), (1, 1, 0)), Say(ROLE_ASSISTANT, (call,), (1, 1, 0))])
    assert log.places[16] == [[2, "a"], [2, "b"], [3, "a"]]
    log.do(Say(4, (result,), (1, 1, 0)))  # open call 0 is an "a"; the nearest "a" is turn 3's
    assert log.places[16] == [[2, "a"], [2, "b"]]
    log.do(say())
    assert log.places[16] == []


def test_a_user_message_that_answers_leaves_the_other_calls_open() -> None:
    calls = (("call", "a"), ("call", "b"), ("call", "c"))
    log = Log.of(
        [say(), Say(ROLE_ASSISTANT, calls, (1, 1, 0)), Say(ROLE_USER, (("result", 1), ("text", "so")), (1, 1, 0))]
    )
    assert log.places[16] == [[2, "a"], [2, "c"]]
    log.do(Say(ROLE_USER, (("result", 0), ("result", 0)), (1, 1, 0)))
    assert log.places[16] == []
    assert [header.flags & FLAG_CUT for header in log.headers] == [1, 1, 0, 0]


def test_open_calls_have_a_limit() -> None:
    places = states.decode_places(states.genesis(HASH, {}))
    events = [(False, "a")] * OPEN_CALLS_MAX
    rules.message_flags(places, ROLE_ASSISTANT, 0, events)
    with pytest.raises(Exhausted, match="1025 tool calls would be open"):
        rules.message_flags(places, ROLE_ASSISTANT, 0, [*events, (False, "a")])


def test_a_state_of_a_later_rule_is_refused_by_name() -> None:
    places = states.decode_places(states.genesis(HASH, {}))
    places[0] = 2
    with pytest.raises(Corrupt) as caught:
        core.replay(HASH, states.encode_places(places), b"")
    assert caught.value.reason == "NEWER_FORMAT"


def test_places_that_a_later_release_appended_are_kept() -> None:
    log = build_log(2, 20)
    places = states.decode_places(log.states[0])
    folded = core.replay(HASH, states.encode_places([*places, {"new": [1]}]), log.stream)
    assert states.decode_places(folded) == [*log.places, {"new": [1]}]


@pytest.mark.parametrize("state", [b"", b"\x90", b"\xc1", b"\x81\x01\x02", b"\xdc\x00\x16" + b"\xc0" * 22, b"\x00" * 9])
def test_bytes_that_are_no_state_are_corrupt(state: bytes) -> None:
    with pytest.raises(Corrupt):
        core.replay(HASH, state, b"")


def test_a_turn_of_a_later_replay_rule_is_refused_as_newer_and_not_folded_by_ours() -> None:
    frames, headers, folded = random_log(3, 5)
    header, frame = headers[4], frames[4]
    later = core.seal_frame(
        HASH,
        *(header.seq, header.epoch, header.time_ms, header.kind, header.role, header.status),
        header.flags | 1 << 24,
        *(header.prev_live_seq, header.cumulative, header.tokens, header.sources, header.digest, header.chain),
        frame[HEADER_BYTES:],
    )
    assert core.replay(HASH, folded[4], frame) == folded[5]
    with pytest.raises(Corrupt) as refused:
        core.replay(HASH, folded[4], later)
    assert refused.value.reason == "NEWER_FORMAT"
