"""The oracle against cases worked out by hand: before it judges others, it must be right itself."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from sessiond.v1 import turn_pb2
from tests import oracle
from tests.oracle import Oracle

HELLO = {"kind": "text", "text": "hello"}  # one token in both encodings


def call(*ids: str) -> list[dict[str, Any]]:
    return [{"kind": "tool_call", "call_id": call_id, "name": "hello", "arguments": "hello"} for call_id in ids]


def answer(*ids: str) -> list[dict[str, Any]]:
    return [{"kind": "tool_result", "call_id": call_id, "parts": []} for call_id in ids]


def said(role: str, tokens: int = 10, parts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A message that counts `tokens`, whatever it says."""
    return {"kind": "message", "role": role, "parts": parts or [HELLO], "supplied": {1: tokens, 2: 2 * tokens}}


def log(*turns: dict[str, Any], metadata: dict[str, str] | None = None) -> Oracle:
    """A log of these turns; turn n's chain is the byte n."""
    return Oracle([{"seq": seq, "chain": bytes([seq])} | turn for seq, turn in enumerate(turns, 1)], metadata)


def summary(first: int, last: int, tokens: int = 7, chain: bytes | None = None) -> dict[str, Any]:
    covered = bytes([last]) if chain is None else chain
    return {
        "kind": "summary", "text": "x", "first": first, "last": last, "covered_chain": covered, "supplied": {1: tokens},
    }  # fmt: skip


def rewind(to_seq: int) -> dict[str, Any]:
    return {"kind": "rewind", "to_seq": to_seq}


def state(**changes: Any) -> dict[str, Any]:
    return {"kind": "state"} | changes


def exchanges(count: int, tokens: int = 10) -> list[dict[str, Any]]:
    """`count` pairs of a question and an answer, `tokens` each."""
    return [said(role, tokens) for _ in range(count) for role in ("user", "assistant")]


# --- counting


@pytest.mark.parametrize(
    ("message", "tokens"),
    [
        ({}, 4),
        ({"parts": [HELLO]}, 5),
        ({"name": "hello", "parts": [HELLO, {"kind": "refusal", "text": "hello"}]}, 4 + 1 + 1 + 1 + 1),
        ({"parts": call("a_long_call_id")}, 4 + 3 + 1 + 1),
        ({"parts": answer("a_long_call_id")}, 4),
        ({"parts": [{"kind": "tool_result", "call_id": "a", "parts": [HELLO, HELLO]}]}, 6),
        ({"parts": [{"kind": "attachment", "tokens": 85, "alt_text": "hello"}]}, 4 + 85 + 1),
        ({"parts": [{"kind": "opaque", "tokens": 9, "data": b"hello"}]}, 4 + 9),
        ({"parts": [{"kind": "opaque", "tokens": 0, "data": b"hello"}]}, 4 + 1),
        ({"parts": [{"kind": "opaque", "tokens": 0, "data": b"\xff\xff\xff\xff"}]}, 4 + 2),
        ({"parts": [{"kind": "opaque", "tokens": 0, "data": b"\xff\xff\xff"}]}, 4 + 1),
    ],
)
def test_messages_count_by_the_rule(message: dict[str, Any], tokens: int) -> None:
    assert oracle.message_tokens(message, 1) == tokens
    assert oracle.message_tokens(message, 2) == tokens


def test_only_messages_and_summaries_count() -> None:
    assert oracle.turn_tokens({"kind": "summary", "text": "hello"}) == 5
    assert oracle.turn_tokens(state(pins={"a": "b"})) == 0
    assert oracle.turn_tokens(said("user", 3), 2) == 6
    assert oracle.text_tokens("お誕生日おめでとう", 1) == 8
    assert oracle.text_tokens("お誕生日おめでとう", 2) == 9


def test_raw_and_packed_vocabularies_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if not oracle.RAW_VOCABULARIES.exists():
        pytest.skip(f"{oracle.RAW_VOCABULARIES} is absent")
    for name in oracle.ENCODINGS.values():
        monkeypatch.undo()
        raw = oracle._ranks(name)
        monkeypatch.setattr(oracle, "RAW_VOCABULARIES", Path("nowhere"))
        assert oracle._ranks(name) == raw


def test_the_oracle_stands_on_its_own() -> None:
    source = ast.parse(Path(oracle.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(source) if isinstance(node, ast.Import) for name in node.names}
    assert {name for name in imported if name and name.startswith("sessiond")} == {"sessiond.v1"}


# --- what stands, and where a window may start


def test_a_rewind_supersedes_what_follows_its_target_and_nothing_else() -> None:
    rewound = log(*exchanges(2), rewind(2), said("user"), said("assistant"), rewind(6), said("assistant"))
    assert [turn["seq"] for turn in rewound.live] == [1, 2, 6, 9]
    assert rewound.in_force(9) == [1, 2, 5, 6, 8, 9]
    assert rewound.in_force(7) == [1, 2, 5, 6, 7]
    assert rewound.cumulative() == [0, 10, 20, 30, 40, 40, 50, 60, 60, 70]
    assert log(*exchanges(1), rewind(0)).live == []


def test_legal_cuts_are_user_messages_and_assistant_messages_with_nothing_open() -> None:
    turns = log(
        said("system"),  # 1: never
        said("user"),  # 2: cut
        said("assistant", parts=call("a", "b")),  # 3: cut, nothing is open yet
        said("tool", parts=answer("b")),  # 4: never
        said("assistant"),  # 5: a is open
        said("tool", parts=answer("a")),  # 6: never
        said("assistant"),  # 7: cut
        said("assistant", parts=call("a")),  # 8: cut
        said("user", parts=[HELLO, *answer("a")]),  # 9: holds a result
        said("assistant", parts=call("c")),  # 10: cut
        said("user"),  # 11: cut, and closes c
        said("assistant"),  # 12: cut
    )
    assert turns.cuts == [2, 3, 7, 8, 10, 11, 12]
    assert turns.exchange_starts == [2, 11]
    assert turns.checkpoint()["exchanges"] == 2


def test_a_result_pairs_with_the_nearest_earlier_open_call_of_its_id() -> None:
    turns = log(
        said("user"), said("assistant", parts=call("a")), said("assistant", parts=call("a", "b")),
        said("tool", parts=answer("a")), said("tool", parts=answer("a")),
    )  # fmt: skip
    _, pairs, orphans, still_open = oracle.walk_calls(turns.live)
    assert (pairs, orphans, still_open) == ([(3, 4), (2, 5)], [], ["b"])
    assert turns.checkpoint()["open_calls"] == ["b"]


def test_a_torn_exchange_is_told() -> None:
    turns = log(
        said("user"), said("assistant", parts=call("a", "x")), said("tool", parts=answer("a")), said("user"),
        said("tool", parts=answer("x")),
    )  # fmt: skip
    # x was closed by the user message, so turn 5 answers nothing, and turn 2 lacks no result of it.
    assert turns.torn_exchange([1, 2, 3, 4]) is None
    assert turns.torn_exchange([4]) is None
    assert turns.torn_exchange([1, 2]) == "the call in turn 2 is without its result in turn 3"
    assert turns.torn_exchange([3, 4]) == "the result in turn 3 is without its call in turn 2"
    assert turns.torn_exchange([4, 5]) == "the result in turn 5 answers nothing"
    assert turns.torn_exchange([4, 6]) == "turn 6 is no live message"


# --- windows


def window(of: Oracle, budget: int, **options: Any) -> tuple[int, int] | int:
    """(start, tail tokens), or the least budget where this one is too small."""
    found = of.window(budget, **options)
    if not found["ok"]:
        return int(found["minimum_budget_tokens"])
    return found["start_seq"], found["tail_tokens"]


def test_a_full_window_starts_at_the_earliest_cut_that_fits() -> None:
    turns = log(*exchanges(3))  # 60 tokens, and 3 of framing
    assert window(turns, 63, strategy="FULL") == (1, 60)
    assert window(turns, 62, strategy="FULL") == (2, 50)
    assert window(turns, 70, strategy="FULL", reserve=20) == (3, 40)
    assert window(turns, 13, strategy="FULL") == (6, 10)
    assert window(turns, 12, strategy="FULL") == 13
    assert window(turns, 22, strategy="FULL", reserve=10) == 23
    # 20 and 6 tokens a message in the other encoding.
    assert window(turns, 43, strategy="FULL", encoding=2) == (5, 40)


def test_what_is_fixed_takes_its_part_of_the_budget() -> None:
    turns = log(said("developer", 9), state(pins={"hello": "hello"}), *exchanges(2))
    found = turns.window(3 + 9 + 4 + 6 + 40, strategy="FULL", new_message={"parts": [HELLO, HELLO]})
    assert found == {
        "ok": True, "start_seq": 3, "seqs": [3, 4, 5, 6], "stride": False, "instructions_tokens": 9, "pins_tokens": 4,
        "summary_tokens": 0, "summary_seqs": [], "new_tokens": 6, "tail_tokens": 40, "total_tokens": 62,
        "transcript_tokens": 40,
    }  # fmt: skip
    assert window(turns, 61, strategy="FULL", new_message={"parts": [HELLO, HELLO]}) == (4, 30)
    given = turns.window(3 + 5 + 4 + 40, strategy="FULL", instructions="hello")
    assert (given["instructions_tokens"], given["start_seq"], given["total_tokens"]) == (5, 3, 52)
    assert window(turns, 3 + 5 + 4 + 39, strategy="FULL", instructions="hello") == (4, 30)


def test_last_n_keeps_whole_exchanges_or_as_much_of_them_as_fits() -> None:
    turns = log(*exchanges(4))
    assert window(turns, 100, strategy="LAST_N", last_exchanges=2) == (5, 40)
    assert window(turns, 100, strategy="LAST_N", last_exchanges=4) == (1, 80)
    assert window(turns, 100, strategy="LAST_N", last_exchanges=9) == (1, 80)
    assert window(turns, 42, strategy="LAST_N", last_exchanges=2) == (6, 30)
    assert window(turns, 12, strategy="LAST_N", last_exchanges=2) == 13
    assert window(log(said("assistant"), *exchanges(1)), 100, strategy="LAST_N", last_exchanges=2) == (1, 30)


def test_a_hybrid_window_starts_at_a_stride_and_stands_still() -> None:
    # E = 100: strides of 25; room 97 - max(new, 6) = 91. Cuts every 10 tokens; stride cuts are the first, then those
    # where the tokens before pass 25, 50, 75: turns 1, 4 (30), 6 (50), 9 (80), 11 (100), ...
    starts = [window(log(*exchanges(12)[:count]), 100) for count in range(1, 25)]
    assert [start for start, _ in starts] == [  # type: ignore[misc]
        1, 1, 1, 1, 1, 1, 1, 1, 1,  # up to 90 tokens fit
        4, 4, 4, 6, 6, 9, 9, 9, 11, 11, 14, 14, 14, 16, 16,
    ]  # fmt: skip
    # 10 turns: 100 tokens do not fit into 91, 70 from turn 4 on do.
    assert starts[9] == (4, 70)


def test_a_new_message_below_its_share_does_not_move_the_window() -> None:
    turns = log(*exchanges(5), *exchanges(1, 6)[:1])  # 106 tokens; E = 112: strides of 28, share 7
    # Stride cuts: 1, then 30 before turn 4, 60 before turn 7, 90 before turn 10. Room 109 - 7 = 102.
    assert window(turns, 112) == (4, 76)
    for tokens in (5, 6, 7):
        new = {"parts": [HELLO] * (tokens - 4)}
        assert window(turns, 112, new_message=new) == (4, 76)
    # Above its share it is charged in full: 109 - 34 = 75 < 76, so the next stride.
    assert window(turns, 112, new_message={"parts": [HELLO] * 29}) == (4, 76)
    assert window(turns, 112, new_message={"parts": [HELLO] * 30}) == (7, 46)


def test_where_no_stride_leaves_the_newest_exchange_the_earliest_cut_that_fits_is_taken() -> None:
    # One exchange: 10 + 5 x 10. E = 43: strides of 10, so every cut is one; room 40 - 2.
    steps = log(said("user"), *[said("assistant") for _ in range(5)])
    found = steps.window(43)
    # Turn 4 (30 tokens) would be the stride; it is after the exchange's start, so the exact rule: 40 fit, from turn 3.
    assert (found["start_seq"], found["tail_tokens"], found["stride"]) == (3, 40, False)
    # Without a user message the newest exchange starts at the first cut, which the same holds for.
    found = log(*[said("assistant") for _ in range(6)]).window(43)
    assert (found["start_seq"], found["stride"]) == (3, False)
    assert log(*[said("assistant") for _ in range(3)]).window(43)["stride"] is True


def test_superseded_turns_move_strides_but_take_no_room() -> None:
    # Turns 3 to 6 (40 tokens) are rewound; live: 1, 2, 8, 9, 40 tokens. E = 40: strides of 10, room 37 - 2.
    turns = log(*exchanges(3), rewind(2), *exchanges(1))
    assert window(turns, 40) == (2, 30)
    # E = 43 with strides of 10: 40 - 2 < 40, turn 2 is a stride (10 before it).
    assert window(turns, 43) == (2, 30)
    assert window(turns, 45) == (1, 40)
    # E = 39, room 36 - 2 = 34; strides of 9: turn 2 at 10 passes 9.
    assert turns.window(39)["stride"] is True
    # Raw tokens before turn 8 are 60, not 20: with E = 240 and strides of 60 it is a stride cut, turn 2 is not.
    long = log(*exchanges(3), rewind(2), said("user", 200), said("assistant", 10))
    assert window(long, 240) == (8, 210)


def test_a_summary_is_paid_for_always_and_shown_once_the_window_has_moved() -> None:
    turns = log(*exchanges(2), summary(1, 2, tokens=7), *exchanges(2))
    whole = turns.window(103)
    assert (whole["start_seq"], whole["summary_seqs"], whole["summary_tokens"], whole["total_tokens"]) == (1, [], 0, 83)
    # E = 80: strides of 20, room 80 - 10 - 5 = 65; cuts at 0, 10, 20, 30, 40, ...: turn 3 (20 before) leaves 60.
    moved = turns.window(80)
    assert (moved["start_seq"], moved["summary_seqs"], moved["summary_tokens"], moved["tail_tokens"]) == (3, [5], 7, 60)
    assert moved["total_tokens"] == 3 + 7 + 60
    assert turns.window(63, strategy="FULL")["total_tokens"] == 63
    assert turns.window(63, strategy="FULL")["summary_seqs"] == []
    # The least budget has room for the summary: 3 + 7 + 10.
    assert window(turns, 19) == 20


def test_an_empty_window_needs_only_what_is_fixed() -> None:
    turns = log(said("system", 9))
    assert turns.window(12)["seqs"] == []
    assert window(turns, 12) == (0, 0)
    assert window(turns, 11) == 12
    assert window(turns, 21, reserve=10, strategy="FULL") == 22
    assert window(log(), 7, new_message={"parts": []}) == (0, 0)


# --- checkpoints


def test_a_checkpoint_holds_what_the_log_says() -> None:
    turns = log(
        said("system"),
        state(flags={"a": True, "b": True}, mode="plan", metadata={"k": "v"}, pins={"p": "1", "o": "2"}),
        *exchanges(1), {"kind": "milestone", "label": "booked"}, summary(1, 4),
        state(flags={"a": False}, metadata_removed=["k"], pins={"p": "3"}, pins_removed=["o"]), said("developer"),
        said("user"), said("assistant", parts=call("x")),
        metadata={"born": "yes"},
    )  # fmt: skip
    assert turns.checkpoint() == {
        "replay_cursor": 10, "instructions_seq": 8, "summary_seqs": [6], "summarised": (1, 4), "tail_first_seq": 5,
        "pins": {"p": "3"}, "flags": {"b": True}, "mode": "plan", "metadata": {"born": "yes"}, "milestone": "booked",
        "state_seq": 7, "exchanges": 2, "live_messages": 4, "live_tokens": {1: 40, 2: 80}, "last_live_seq": 10,
        "open_calls": ["x"],
    }  # fmt: skip
    early = turns.checkpoint(2)
    assert (early["replay_cursor"], early["flags"], early["live_messages"], early["summarised"]) == (
        2, {"a": True, "b": True}, 0, None,
    )  # fmt: skip
    assert early["metadata"] == {"born": "yes", "k": "v"}
    assert log(state(mode="x"), state(mode="")).checkpoint()["mode"] == ""


def test_a_rewind_restores_all_state_and_is_the_newest_change_of_it() -> None:
    turns = log(
        said("system"), said("user"), said("assistant", parts=call("x")), state(flags={"a": True}, pins={"p": "1"}),
        said("user"), said("developer"), summary(1, 3), {"kind": "milestone", "label": "m"},
        state(flags={"a": False}, mode="z", metadata={"k": "v"}, pins={"p": "2"}), rewind(4),
    )  # fmt: skip
    expected = turns.checkpoint(4) | {"replay_cursor": 10, "state_seq": 10}
    assert turns.checkpoint() == expected
    assert expected["open_calls"] == ["x"]
    assert (expected["instructions_seq"], expected["summarised"], expected["milestone"]) == (1, None, "")


@pytest.mark.parametrize(
    ("summaries", "summarised", "summary_seqs"),
    [
        ([summary(1, 4)], (1, 4), [9]),
        ([summary(2, 4)], None, []),  # leaves a gap
        ([summary(1, 8)], (1, 8), [9]),
        ([summary(1, 9, chain=b"\x09")], None, []),  # itself
        ([summary(1, 4, chain=b"?")], None, []),  # not the chain at its end
        ([summary(1, 4), summary(5, 6)], (1, 6), [9, 10]),
        ([summary(1, 4), summary(4, 6)], (1, 4), [9]),  # overlaps
        ([summary(1, 4), summary(6, 8)], (1, 4), [9]),  # leaves a gap
        ([summary(1, 4), summary(1, 4)], (1, 4), [9]),  # no further
        ([summary(1, 4), summary(1, 3)], (1, 4), [9]),
        ([summary(1, 4), summary(1, 6)], (1, 6), [10]),
        ([rewind(6), summary(1, 7)], None, []),  # its end is superseded
        ([rewind(6), summary(1, 6)], (1, 6), [10]),
        ([summary(1, 4), rewind(6), summary(5, 6)], None, []),  # what it would extend was rewound
    ],
)
def test_a_summary_takes_effect_only_where_it_extends_or_replaces(
    summaries: list[dict[str, Any]], summarised: tuple[int, int] | None, summary_seqs: list[int]
) -> None:
    found = log(*exchanges(4), *summaries).checkpoint()
    assert (found["summarised"], found["summary_seqs"]) == (summarised, summary_seqs)


def test_summaries_in_effect_are_all_counted_and_at_most_32() -> None:
    two = log(*exchanges(4), summary(1, 2, tokens=7), summary(3, 4, tokens=5))
    moved = two.window(70)
    assert (moved["summary_seqs"], moved["summary_tokens"]) == ([9, 10], 12)
    assert moved["total_tokens"] == 3 + 12 + moved["tail_tokens"]

    many = log(*exchanges(20), *[summary(last, last) for last in range(1, 34)])
    assert many.checkpoint()["summarised"] == (1, 32)
    afresh = log(*exchanges(20), *[summary(last, last) for last in range(1, 33)], summary(1, 33))
    assert (afresh.checkpoint()["summarised"], afresh.checkpoint()["summary_seqs"]) == ((1, 33), [73])


# --- from a reply


def test_turns_of_a_reply_become_the_same_log() -> None:
    part = turn_pb2.Part
    called = part(tool_call=turn_pb2.ToolCall(call_id="a", name="f", arguments="{}"))
    answered = part(tool_result=turn_pb2.ToolResult(call_id="a", parts=[part(refusal="no")]))
    supplied = turn_pb2.TokenCount(tokens=77, source=turn_pb2.TOKEN_SOURCE_SUPPLIED)
    counted = turn_pb2.TokenCount(tokens=99, source=turn_pb2.TOKEN_SOURCE_COUNTED)
    turns = [
        turn_pb2.Turn(role=turn_pb2.ROLE_USER, message=turn_pb2.Message(name="hello", parts=[part(text="hello")])),
        turn_pb2.Turn(role=turn_pb2.ROLE_ASSISTANT, message=turn_pb2.Message(parts=[called]), o200k=supplied),
        turn_pb2.Turn(role=turn_pb2.ROLE_TOOL, message=turn_pb2.Message(parts=[answered]), o200k=counted),
        turn_pb2.Turn(
            role=turn_pb2.ROLE_USER,
            message=turn_pb2.Message(
                parts=[
                    part(attachment=turn_pb2.Attachment(tokens=5, alt_text="hello")),
                    part(opaque=turn_pb2.OpaqueItem(data=b"\xff", tokens=0)),
                ]
            ),
        ),
        turn_pb2.Turn(summary=turn_pb2.Summary(text="s", covered={"first_seq": 1, "last_seq": 2}, covered_chain=b"2")),
        turn_pb2.Turn(
            state=turn_pb2.StateChange(
                flags={"a": True}, mode="", metadata={"k": "v"}, metadata_removed=["born"],
                pins=[turn_pb2.PinnedFact(key="p", value="1")], pins_removed=["q"],
            )
        ),
        turn_pb2.Turn(milestone=turn_pb2.Milestone(label="m")),
        turn_pb2.Turn(role=turn_pb2.ROLE_ASSISTANT, message=turn_pb2.Message(), flags=32, o200k=counted),
        turn_pb2.Turn(rewind=turn_pb2.Rewind(to_seq=7)),
    ]  # fmt: skip
    for seq, turn in enumerate(turns, 1):
        turn.seq = seq
        turn.chain = str(seq).encode()
    whole = oracle.from_turn_protos(turns, {"born": "yes"})
    assert [oracle.turn_tokens(turn) for turn in whole.turns] == [7, 77, 5, 11, 5, 0, 0, 99, 0]
    assert whole.turns[5]["mode"] == ""
    assert oracle.turn_from_proto(turn_pb2.Turn(state=turn_pb2.StateChange()))["mode"] is None
    assert whole.checkpoint() == {
        "replay_cursor": 9, "instructions_seq": 0, "summary_seqs": [5], "summarised": (1, 2), "tail_first_seq": 3,
        "pins": {"p": "1"}, "flags": {"a": True}, "mode": "", "metadata": {"k": "v"}, "milestone": "m",
        "state_seq": 9, "exchanges": 2, "live_messages": 4, "live_tokens": {1: 100, 2: 7 + 9 + 5 + 11},
        "last_live_seq": 4, "open_calls": [],
    }  # fmt: skip
    assert oracle.message_from_proto(turns[0].message) == {"name": "hello", "parts": [HELLO]}
    with pytest.raises(ValueError, match="gap"):
        oracle.from_turn_protos(turns[1:])
