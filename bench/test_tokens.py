"""Tokens that a model is sent over a conversation of 1,000 turns at a budget of 4,000, against all of it each time.

The conversations are real ones of an airline's agent with its tools (../shared/data), chained in file order; each round
is another thousand turns. A call is made before every assistant message. Both sides are counted by the daemon, by the
same rule, the newest instructions only. What the shorter context costs is reported beside it: of the values that the
assistant then gave to a tool, those with a digit in them (reservations, flights, dates, amounts) that the conversation
had shown before, how many does the window still show?
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import grpc

from bench import wire
from sessiond.testing import running_daemon
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.airline import chained, needs_airline

BUDGET_TOKENS = 4000
TURNS = 1000
EVERYTHING = 2**31 - 1


def texts(message: turn_pb2.Message) -> Iterator[str]:
    for part in message.parts:
        kind = part.WhichOneof("kind")
        if kind == "tool_call":
            yield part.tool_call.arguments
        elif kind == "tool_result":
            yield from (inner.text for inner in part.tool_result.parts)
        else:
            yield part.text


def shown(context: context_pb2.ActiveContext) -> str:
    """Everything that the model would read."""
    turns = [context.instructions, *context.summaries, *context.turns]
    return "\n".join(text for turn in turns for text in texts(turn.message))


def values(value: Any) -> Iterator[str]:
    """What stands at the leaves of a tool call's arguments, where it has a digit."""
    if isinstance(value, dict):
        yield from (found for inner in value.values() for found in values(inner))
    elif isinstance(value, list):
        yield from (found for inner in value for found in values(inner))
    elif any(letter.isdigit() for letter in str(value)) and len(str(value)) >= 3:
        yield str(value)


class Conversation:
    """One session, and what each side was sent."""

    def __init__(self, client: wire.Client, name: str) -> None:
        self._client = client
        self._name = name
        self.sent = self.whole = self.calls = self.needed = self.kept = self.larger = 0
        client.sessions.CreateSession(session_pb2.CreateSessionRequest(session_id=name), timeout=wire.TIMEOUT_S)

    def _context(self, budget: int, strategy: int) -> context_pb2.ActiveContext:
        spec = context_pb2.ContextSpec(budget_tokens=budget, strategy=strategy)  # type: ignore[arg-type]
        request = session_pb2.ResumeSessionRequest(session_id=self._name, context=spec)
        return self._client.sessions.ResumeSession(request, timeout=wire.TIMEOUT_S).context

    def window(self) -> context_pb2.ActiveContext:
        """The context at the budget; at the next double of it where the newest message alone is larger."""
        budget = BUDGET_TOKENS
        while True:
            try:
                found = self._context(budget, turn_pb2.STRATEGY_HYBRID)
            except grpc.RpcError:
                assert budget < 16 * BUDGET_TOKENS
                budget, self.larger = budget * 2, self.larger + 1
                continue
            assert found.tokens.total <= budget
            return found

    def say(self, turn: turn_pb2.TurnInput) -> None:
        """The turn, and before an assistant's the call that brought it about."""
        if turn.role == turn_pb2.ROLE_ASSISTANT:
            ours, theirs = self.window(), self._context(EVERYTHING, turn_pb2.STRATEGY_FULL)
            self.calls += 1
            self.sent += ours.tokens.total
            self.whole += theirs.tokens.total
            needs = {
                value
                for part in turn.message.parts
                if part.HasField("tool_call")
                for value in values(json.loads(part.tool_call.arguments or "{}"))
            }
            if needs:
                everything, window = shown(theirs), shown(ours)
                needs = {value for value in needs if value in everything}
                self.needed += len(needs)
                self.kept += sum(value in window for value in needs)
        request = session_pb2.AppendTurnRequest(session_id=self._name, turns=[turn])
        self._client.sessions.AppendTurn(request, timeout=wire.TIMEOUT_S)


@needs_airline
def test_tokens_of_a_long_conversation(benchmark: Any, ledger: Any, size: Any) -> None:
    turns, rounds = size.of(TURNS, 120), size.of(5, 2)
    source = chained()
    done: list[Conversation] = []
    with running_daemon() as daemon, wire.Client(daemon.address) as client:

        def converse() -> None:
            conversation = Conversation(client, f"airline-{len(done)}")
            for turn in itertools.islice(source, turns):
                conversation.say(turn)
            done.append(conversation)

        benchmark.pedantic(converse, rounds=rounds, iterations=1)
    assert all(one.calls > turns // 4 and one.needed > turns // 40 for one in done)
    case = f"a conversation of {turns:,} turns, every call at a budget of {BUDGET_TOKENS:,} tokens"
    made = ledger.add(
        case, "input tokens in all", "the full transcript each time", "tokens", [one.sent for one in done],
        [one.whole for one in done], "tokens" if turns == TURNS else "",
    )  # fmt: skip
    ledger.alone(
        case, "evidence kept: values given to tools that the window shows", "%",
        [100 * one.kept / one.needed for one in done],
    )  # fmt: skip
    ledger.note(
        case,
        f"{sum(one.calls for one in done):,} calls, {sum(one.needed for one in done):,} values with a digit that were "
        f"given to tools and had been shown before, {sum(one.kept for one in done):,} of them in the window; "
        f"{sum(one.larger for one in done)} calls needed a larger budget for one exchange",
    )
    benchmark.extra_info["ratio"] = made.ratio
