"""100,000 generated contexts against the oracle: the same turns, the same counts, inside the budget, nothing torn."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sessiond import core
from sessiond.core import state as states
from sessiond.core.layout import Header
from sessiond.errors import Invalid
from sessiond.service import context as contexts
from sessiond.service.context import Standing
from sessiond.service.prepare import Spec
from sessiond.tiers.hot.log import HistoryNeeded
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2, turn_pb2
from tests.core.loggen import HASH, random_log
from tests.oracle import Oracle, from_turn_protos

CONTEXTS = 100_000
CONTEXTS_PER_LOG = 200
STRATEGIES = {
    "FULL": turn_pb2.STRATEGY_FULL,
    "LAST_N": turn_pb2.STRATEGY_LAST_N,
    "HYBRID": turn_pb2.STRATEGY_HYBRID,
}
TEXTS = ["", "ok", "What was the flight that I booked last week, and is it refundable? " * 3]


class Rows:
    """A log in rows of random sizes, of which the oldest are missing until they are asked for."""

    def __init__(self, frames: list[bytes], rng: random.Random) -> None:
        self.rows: list[tuple[int, int, bytes]] = []
        at = 0
        while at < len(frames):
            size = min(len(frames) - at, rng.choice((1, 2, 3, 8, 40)))
            self.rows.append((at + 1, at + size, b"".join(frames[at : at + size])))
            at += size
        self.cold_below = rng.choice((0, 0, len(frames) // 2))
        self.fetches = 0

    def walk(self, last_live_seq: int, slot: int, tokens_max: int) -> list[Any]:
        return contexts.walked(self, last_live_seq, slot, tokens_max, 0)[0]

    def row_for(self, seq: int) -> bytes:
        if seq < self.cold_below:
            raise HistoryNeeded(seq, self.cold_below - 1)
        return next(row for first, last, row in self.rows if first <= seq <= last)

    def frame(self, seq: int) -> tuple[Header, Any]:
        row = next(row for first, last, row in self.rows if first <= seq <= last)
        return next(header for header in core.scan_frames(HASH, row) if header.seq == seq), row

    def fetch(self) -> None:
        self.fetches += 1
        self.cold_below //= 2


def build(rows: Rows, state: states.State, spec: Spec) -> context_pb2.ActiveContext:
    standing = Standing(context_pb2.RUNG_HOT, context_pb2.OWNERSHIP_CONFIRMED, "n", state.cursor, 0)
    while True:
        try:
            return context_pb2.ActiveContext.FromString(contexts.build(rows, HASH, state, spec, standing))
        except HistoryNeeded:
            rows.fetch()


def compare(rng: random.Random, frames: list[bytes], state: states.State, oracle: Oracle, tokenizer: Tokenizer) -> str:
    strategy = rng.choice(("HYBRID", "HYBRID", "FULL", "LAST_N"))
    encoding = rng.choice((1, 2))
    budget = rng.choice((rng.randint(1, 60), rng.randint(20, 600), rng.randint(200, 6000), 10**6))
    reserve = rng.choice((0, 0, rng.randrange(budget)))
    last = rng.randint(1, 6) if strategy == "LAST_N" else 0
    instructions = rng.choice((None, None, None, "be brief"))
    text = rng.choice((None, None, *TEXTS[1:]))
    proto = context_pb2.ContextSpec(
        budget_tokens=budget,
        reserve_tokens=reserve,
        strategy=STRATEGIES[strategy],
        last_exchanges=last,
        encoding=encoding,
        instructions=instructions,
    )
    if text is not None:
        proto.new_message.parts.add(text=text)
    wanted = oracle.window(
        budget,
        reserve=reserve,
        encoding=encoding,
        strategy=strategy,
        last_exchanges=last,
        instructions=instructions,
        new_message=None if text is None else {"role": "user", "parts": [{"kind": "text", "text": text}]},
    )
    spec = Spec(proto, {}, tokenizer, 0, "context")
    if not wanted["ok"]:
        with pytest.raises(Invalid) as refused:
            build(Rows(frames, rng), state, spec)
        assert refused.value.reason == "BUDGET_TOO_SMALL"
        assert int(refused.value.metadata["minimum_budget_tokens"]) == wanted["minimum_budget_tokens"]
        return "too small"
    context = build(Rows(frames, rng), state, spec)
    seqs = [turn.seq for turn in context.turns]
    assert seqs == wanted["seqs"], (proto, wanted)
    assert context.tokens.tail == wanted["tail_tokens"]
    assert context.tokens.instructions == wanted["instructions_tokens"]
    assert context.tokens.pins == wanted["pins_tokens"]
    assert context.tokens.summary == wanted["summary_tokens"]
    assert context.tokens.new_message == wanted["new_tokens"]
    assert context.tokens.total == wanted["total_tokens"] <= budget - reserve
    assert [turn.seq for turn in context.summaries] == wanted["summary_seqs"]
    assert oracle.torn_exchange(seqs) is None
    # Every live message is repeated, summarised or named as left out.
    named = {
        seq
        for part in (context.receipt.verbatim, context.receipt.summarised, context.receipt.omitted)
        for span in part
        for seq in range(span.first_seq, span.last_seq + 1)
    }
    assert {turn["seq"] for turn in oracle.live} <= named
    left_out = {seq for span in context.receipt.omitted for seq in range(span.first_seq, span.last_seq + 1)}
    assert not left_out & {*seqs, context.instructions.seq}
    if not seqs:
        return "empty"
    return "whole" if len(seqs) == len(oracle.live) else "cut"


@pytest.mark.parametrize("part", range(4))
def test_generated_contexts_are_the_oracles(part: int) -> None:
    rng = random.Random(part)
    tokenizer = Tokenizer()
    outcomes: dict[str, int] = {}
    for number in range(CONTEXTS // CONTEXTS_PER_LOG // 4):
        frames, _, folded = random_log(part * 100_000 + number, rng.choice((0, 3, 20, 60, 150)), text_bytes=12)
        turns = context_pb2.ActiveContext.FromString(b"".join(frames)).turns
        for turn in turns:
            # The generator makes counts up: to the oracle they are the caller's.
            turn.o200k.source = turn.cl100k.source = turn_pb2.TOKEN_SOURCE_SUPPLIED
        oracle = Oracle(from_turn_protos(list(turns), {}).turns)
        state = states.decode(folded[-1])
        for _ in range(CONTEXTS_PER_LOG):
            outcome = compare(rng, frames, state, oracle, tokenizer)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    # The generator reaches every kind of answer, or the test would prove less than it says.
    assert sum(outcomes.values()) == CONTEXTS // 4
    assert min(outcomes.get(kind, 0) for kind in ("cut", "whole", "too small", "empty")) > 100, outcomes


def test_a_window_stands_still_while_a_conversation_grows_and_then_jumps() -> None:
    rng = random.Random(7)
    frames, _, folded = random_log(5, 150, text_bytes=12)
    tokenizer = Tokenizer()
    spec = Spec(context_pb2.ContextSpec(budget_tokens=2000), {}, tokenizer, 0, "context")
    starts = []
    for length in range(1, len(frames) + 1):
        state = states.decode(folded[length])
        try:
            context = build(Rows(frames[:length], rng), state, spec)
        except Invalid:
            continue
        if context.turns and not state.superseded:
            starts.append(context.window.first_seq)
    assert starts == sorted(starts)
    assert len(set(starts)) < len(starts) / 3
