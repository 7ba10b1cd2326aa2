"""Hot resume against what users would otherwise take, each as a competent user of it would write it (`bench/peers.py`).

Both sides end with the same thing: a list of {"role", "content"} that a model can be given, of at most 4,000 tokens,
ending with the session's newest turn. Ours comes over gRPC from another process, as does Redis's; the SQLite ones are
in the caller's own process.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Peers
from bench.servers import Missing, running_postgres, running_redis
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

BUDGET_TOKENS = 4000
SIZES = (100, 1000, 10_000)
# The library's texts repeat after so many turns; odd, so that a text is the user's as often as the assistant's.
TEXTS = 97
# Calls of a round: as many of ours as fit beside a few of a slow peer.
CALLS_MAX = 100
ROUND_S = 0.25
PLOT = "latency"
ROLES = {turn_pb2.ROLE_USER: "user", turn_pb2.ROLE_ASSISTANT: "assistant"}


@dataclass(frozen=True)
class Recipe:
    """One peer. exact: its windows are by exact counts. promises: by number of turns."""

    name: str
    what: str
    needs: str = ""
    exact: bool = True
    promises: tuple[tuple[int, str], ...] = ()

    def promise(self, turns: int) -> str:
        """The promise that a session of so many turns is about."""
        return dict(self.promises).get(turns, "")


WHOLE_LIST = ((1000, "redis 1000"), (10_000, "redis 10000"))
RECIPES = [
    Recipe("redis_plain", "Redis, whole list, json and redis-py alone, trim with tiktoken", "redis",
           promises=WHOLE_LIST),
    Recipe("redis_list", "Redis, whole list, orjson and hiredis, trim with tiktoken", "redis", promises=WHOLE_LIST),
    Recipe("redis_blob", "Redis, session as one value, orjson and hiredis, trim with tiktoken", "redis"),
    Recipe("redis_newest", "Redis, LRANGE -64 with stored counts, orjson and hiredis", "redis",
           promises=tuple((turns, "redis best") for turns in SIZES)),
    Recipe("agents_all", "OpenAI Agents SDK, SQLiteSession, trim with tiktoken"),
    Recipe("agents_newest", "OpenAI Agents SDK, SQLiteSession, limit=64, trim with tiktoken"),
    Recipe("langgraph_sqlite", "LangGraph SqliteSaver, trim_messages with tiktoken", promises=((1000, "langgraph"),)),
    Recipe("langgraph_approximate", "LangGraph SqliteSaver, trim_messages, approximate counts", exact=False),
    Recipe("langgraph_postgres", "LangGraph PostgresSaver, trim_messages with tiktoken", "postgres"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sizes(size: Any) -> tuple[int, ...]:
    return SIZES[: size.of(3, 2)]


@pytest.fixture(scope="module")
def daemon(sizes: tuple[int, ...]) -> Iterator[Daemon]:
    with running_daemon() as running, wire.Client(running.address) as client:
        for turns in sizes:
            client.sessions.CreateSession(session_pb2.CreateSessionRequest(session_id=f"turns-{turns}"), timeout=30)
            for first in range(1, turns + 1, talk.TURNS_PER_CALL):
                numbers = range(first, min(first + talk.TURNS_PER_CALL, turns + 1))
                # Counted by the daemon, as the peers count: both sides fill the budget with the same turns.
                said = [talk.turn(number, supplied=False) for number in numbers]
                request = session_pb2.AppendTurnRequest(session_id=f"turns-{turns}", turns=said)
                client.sessions.AppendTurn(request, timeout=30)
        client.settle()
        yield running


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peers") / "texts.json"
    path.write_text(json.dumps([talk.text(number) for number in range(TEXTS)]))
    return path


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Where a peer's data is: started when first asked for, kept to the end."""
    with contextlib.ExitStack() as opened:
        known: dict[str, dict[str, Any]] = {"": {"folder": str(tmp_path_factory.mktemp("peers-data"))}}

        def place(needs: str) -> dict[str, Any]:
            if needs not in known:
                if needs == "postgres":
                    known[needs] = {"dsn": opened.enter_context(running_postgres())}
                else:
                    port = opened.enter_context(running_redis(durable=needs == "redis"))
                    known[needs] = {"host": "127.0.0.1", "port": port}
            return known[needs]

        yield place


@pytest.fixture(scope="module")
def peers(ledger: Any) -> Iterator[Peers]:
    try:
        made = Peers()
    except Missing as missing:
        pytest.skip(str(missing))
    with made:
        ledger.note("peers", ", ".join(f"{name} {version or 'missing'}" for name, version in made.versions.items()))
        yield made


def messages_of(reply: session_pb2.ResumeSessionResponse) -> list[dict[str, str]]:
    """The context as a model is given it."""
    return [
        {"role": ROLES[turn.role], "content": "".join(part.text for part in turn.message.parts)}
        for turn in reply.context.turns
    ]


def check(ours: list[dict[str, str]], theirs: dict[str, Any], recipe: Recipe) -> None:
    """Both sides gave the newest turns, within the budget and no fewer than the budget asks for."""
    context = theirs["context"]
    common = min(len(ours), len(context))
    assert common >= 10
    assert ours[-common:] == context[-common:]
    if recipe.exact:
        assert BUDGET_TOKENS * 0.9 < theirs["tokens"] <= BUDGET_TOKENS


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_hot_resume_against(
    benchmark: Any,
    ledger: Any,
    size: Any,
    peers: Peers,
    daemon: Daemon,
    places: Any,
    texts: Path,
    sizes: tuple[int, ...],
    recipe: Recipe,
) -> None:
    try:
        where = places(recipe.needs)
    except Missing as missing:
        pytest.skip(f"{recipe.what}: {missing}")
    rounds = size.of(7, 2)
    with wire.Client(daemon.address) as client:

        def resume(turns: int) -> tuple[list[float], list[dict[str, str]], context_pb2.ActiveContext]:
            request = session_pb2.ResumeSessionRequest(
                session_id=f"turns-{turns}", context=context_pb2.ContextSpec(budget_tokens=BUDGET_TOKENS)
            )
            seconds: list[float] = []
            until = time.perf_counter() + ROUND_S
            while len(seconds) < 3 or (len(seconds) < CALLS_MAX and time.perf_counter() < until):
                started = time.perf_counter()
                reply = client.sessions.ResumeSession(request, timeout=wire.TIMEOUT_S)
                messages = messages_of(reply)
                seconds.append(time.perf_counter() - started)
            return sorted(seconds), messages, reply.context

        def ours() -> list[list[float]]:
            blocks = []
            for turns in sizes:
                seconds, newest[turns], context = resume(turns)
                assert context.receipt.rung == context_pb2.RUNG_HOT
                assert BUDGET_TOKENS * 0.6 < context.tokens.total <= BUDGET_TOKENS
                blocks.append(seconds)
            return blocks

        def theirs() -> list[list[float]]:
            blocks = []
            for turns in sizes:
                answer = peers.read(recipe.name, turns, BUDGET_TOKENS, CALLS_MAX, ROUND_S)
                check(newest[turns], answer, recipe)
                blocks.append(sorted(answer["seconds"]))
            return blocks

        newest: dict[int, list[dict[str, str]]] = {}
        for turns in sizes:
            peers.fill(recipe.name, turns, texts, where)
        mine, facing = ratio.by_blocks(benchmark, ours, theirs, rounds)
    for place, turns in enumerate(sizes):
        p50 = [[ratio.percentile(block[place], 0.5) for block in side] for side in (mine, facing)]
        case = f"hot resume, {turns:,} turns, 4,000 tokens, as a list of messages"
        made = ledger.add(case, "p50", recipe.what, "s", p50[0], p50[1], recipe.promise(turns), faster=True)
        ledger.point(PLOT, recipe.what, turns, p50[1])
        if recipe is RECIPES[0]:
            ledger.point(PLOT, "sessiond over gRPC", turns, p50[0])
        benchmark.extra_info[f"faster_{turns}"] = made.ratio


def test_redis_as_shipped_reads_as_the_durable_one(
    benchmark: Any, ledger: Any, size: Any, peers: Peers, places: Any, texts: Path
) -> None:
    # The recipes above run against a Redis that fsyncs every write, as our appends do. A read never waits for that.
    try:
        kinds = [places("redis"), places("redis as shipped")]
    except Missing as missing:
        pytest.skip(f"Redis: {missing}")

    def side(turns: int, where: dict[str, Any]) -> Any:
        # A length of its own tells the two apart in the peers' process.
        peers.fill("redis_newest", turns, texts, where)
        return lambda: sorted(peers.read("redis_newest", turns, BUDGET_TOKENS, CALLS_MAX, ROUND_S)["seconds"])

    mine, facing = ratio.by_blocks(benchmark, side(1001, kinds[0]), side(1002, kinds[1]), size.of(7, 2))
    made = ledger.add(
        "Redis, LRANGE -64, every write fsynced (appendfsync always)",
        "p50",
        "Redis as shipped",
        "s",
        [ratio.percentile(block, 0.5) for block in mine],
        [ratio.percentile(block, 0.5) for block in facing],
    )
    benchmark.extra_info["ratio"] = made.ratio
