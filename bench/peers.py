"""What users would otherwise take, each written as a competent user of it would: `python -m bench.peers`.

It runs in an environment of its own (`make bench` makes it), reads one JSON object a line and answers each with one. A
peer ends a read with what a model gets: a list of {"role", "content"} of at most `budget` tokens, the newest turns, by
the counting rule of `turn.proto`. It never measures the daemon, and imports nothing of it but the file of a vocabulary.

    {"fill": peer, "turns": n, "texts": path, "where": {...}}    make a session of n turns; turn k says texts[k % len]
    {"read": peer, "turns": n, "budget": b, "calls": c, "seconds": s}
                                                    at most c reads in about s seconds: their seconds, and the last one
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# What the counting rule adds to a message and to a context: head of turn.proto.
MESSAGE_TOKENS, CONTEXT_TOKENS = 4, 3
# Newest turns that a recipe with a limit fetches: more than 4,000 tokens of them, with room for short ones.
NEWEST = 64
READS_MIN = 3
VOCABULARY = Path(__file__).parents[1] / "src/sessiond/tokens/vocab/o200k_base.vocab"

Message = dict[str, Any]
Read = Callable[[], list[Message]]


def counter() -> Callable[[str], int]:
    """Tokens of a text in o200k_base, from the vocabulary in this checkout: tiktoken would fetch its own."""
    import tiktoken

    raw = zlib.decompress(VOCABULARY.read_bytes())
    size = 199_998
    ranks, at = {}, size
    for rank in range(size):
        ranks[raw[at : at + raw[rank]]] = rank
        at += raw[rank]
    # The pattern of o200k_base as tiktoken itself has it; only its vocabulary comes from elsewhere.
    import tiktoken.load
    import tiktoken_ext.openai_public as published

    published.load_tiktoken_bpe = lambda *_, **__: ranks
    encoding = tiktoken.Encoding(**published.o200k_base())
    return lambda text: len(encoding.encode_ordinary(text))


def trimmed(newest_first: Iterable[Message], tokens_of: Callable[[Message], int], budget: int) -> list[Message]:
    """The longest run of newest messages within the budget that starts with the user; nothing older is counted."""
    kept: list[Message] = []
    left = budget - CONTEXT_TOKENS
    for message in newest_first:
        left -= tokens_of(message)
        if left < 0:
            break
        kept.append({"role": message["role"], "content": message["content"]})
    kept.reverse()
    while kept and kept[0]["role"] != "user":
        del kept[0]
    return kept


class Peers:
    """Everything that was opened, by name, until the process ends."""

    def __init__(self) -> None:
        self.count = counter()
        self.reads: dict[tuple[str, int], Callable[[int], Read]] = {}
        self.open: dict[str, Any] = {}
        self.loop = asyncio.new_event_loop()

    def counted(self, message: Message) -> int:
        """Tokens of a message by the rule."""
        return MESSAGE_TOKENS + self.count(message["content"])

    # ------------------------------------------------------------------------------------------------------- Redis

    def _redis(self, where: dict[str, Any]) -> Any:
        """One connection, kept: redis-py with the parser that it finds, hiredis unless `plain`."""
        import redis

        key = f"redis {where}"
        if key not in self.open:
            parser = {}
            if where.get("plain"):
                from redis._parsers import _RESP2Parser

                parser = {"parser_class": _RESP2Parser, "protocol": 2}
            pool = redis.ConnectionPool(host=where["host"], port=where["port"], **parser)
            self.open[key] = redis.Redis(connection_pool=pool)
        return self.open[key]

    def redis_list(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """A list of JSON values: LRANGE 0 -1, then trim with tiktoken from the newest."""
        import orjson

        client, key = self._redis(where), f"list:{len(turns)}:{where}"
        loads = json.loads if where.get("plain") else orjson.loads
        client.delete(key)
        for start in range(0, len(turns), 500):
            client.rpush(key, *(orjson.dumps(turn) for turn in turns[start : start + 500]))

        def read(budget: int) -> list[Message]:
            messages = [loads(value) for value in client.lrange(key, 0, -1)]
            return trimmed(reversed(messages), self.counted, budget)

        return lambda budget: lambda: read(budget)

    def redis_plain(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """The same as most write it: json of the standard library, redis-py without hiredis."""
        return self.redis_list(turns, {**where, "plain": True})

    def redis_blob(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """The whole session as one JSON value: GET, then trim with tiktoken from the newest."""
        import orjson

        client, key = self._redis(where), f"blob:{len(turns)}"
        client.set(key, orjson.dumps(turns))

        def read(budget: int) -> list[Message]:
            return trimmed(reversed(orjson.loads(client.get(key))), self.counted, budget)

        return lambda budget: lambda: read(budget)

    def redis_newest(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """Counts stored when a turn is pushed: LRANGE -64 -1, then trim by the stored counts."""
        import orjson

        client, key = self._redis(where), f"newest:{len(turns)}"
        client.delete(key)
        for start in range(0, len(turns), 500):
            rows = [orjson.dumps({**turn, "tokens": self.counted(turn)}) for turn in turns[start : start + 500]]
            client.rpush(key, *rows)

        def read(budget: int) -> list[Message]:
            values = client.lrange(key, -NEWEST, -1)
            return trimmed(map(orjson.loads, reversed(values)), lambda message: int(message["tokens"]), budget)

        return lambda budget: lambda: read(budget)

    # ------------------------------------------------------------------------------------------- OpenAI Agents SDK

    def _agents(self, turns: list[Message], where: dict[str, Any], limit: int | None) -> Callable[[int], Read]:
        from agents import SQLiteSession

        name = f"agents-{len(turns)}"
        if name not in self.open:
            session = self.open[name] = SQLiteSession(name, Path(where["folder"]) / "agents.db")
            for start in range(0, len(turns), 500):
                self.loop.run_until_complete(session.add_items(turns[start : start + 500]))
        session = self.open[name]

        def read(budget: int) -> list[Message]:
            items = self.loop.run_until_complete(session.get_items(limit))
            return trimmed(reversed(items), self.counted, budget)

        return lambda budget: lambda: read(budget)

    def agents_all(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """SQLiteSession.get_items(), then trim with tiktoken from the newest."""
        return self._agents(turns, where, None)

    def agents_newest(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """SQLiteSession.get_items(limit=64), then trim with tiktoken from the newest."""
        return self._agents(turns, where, NEWEST)

    # ---------------------------------------------------------------------------------------------------- LangGraph

    def _thread(self, saver: Any, turns: list[Message]) -> dict[str, Any]:
        """A thread whose newest checkpoint holds the messages, as a graph with a `messages` channel leaves it."""
        from langchain_core.messages import AIMessage, HumanMessage
        from langgraph.checkpoint.base import empty_checkpoint

        kinds = {"user": HumanMessage, "assistant": AIMessage}
        messages = [kinds[turn["role"]](content=turn["content"], id=str(uuid.uuid4())) for turn in turns]
        config = {"configurable": {"thread_id": f"thread-{len(turns)}", "checkpoint_ns": ""}}
        version = f"{len(turns):032}.0"
        checkpoint = {
            **empty_checkpoint(),
            "channel_values": {"messages": messages},
            "channel_versions": {"messages": version},
        }
        saver.put(config, checkpoint, {"source": "loop", "step": len(turns)}, {"messages": version})
        return config

    def _trims(self, saver: Any, turns: list[Message], approximate: bool) -> Callable[[int], Read]:
        from langchain_core.messages import trim_messages

        config = self._thread(saver, turns)

        def tokens_of(messages: list[Any]) -> int:
            return sum(MESSAGE_TOKENS + self.count(message.content) for message in messages)

        roles = {"human": "user", "ai": "assistant"}

        def read(budget: int) -> list[Message]:
            found = saver.get_tuple(config).checkpoint["channel_values"]["messages"]
            kept = trim_messages(
                found,
                max_tokens=budget - CONTEXT_TOKENS,
                strategy="last",
                token_counter="approximate" if approximate else tokens_of,
                start_on="human",
                include_system=True,
            )
            return [{"role": roles[message.type], "content": message.content} for message in kept]

        return lambda budget: lambda: read(budget)

    def _sqlite_saver(self, where: dict[str, Any]) -> Any:
        if "sqlite" not in self.open:
            import sqlite3

            from langgraph.checkpoint.sqlite import SqliteSaver

            connection = sqlite3.connect(str(Path(where["folder"]) / "langgraph.db"), check_same_thread=False)
            self.open["sqlite"] = SqliteSaver(connection)
        return self.open["sqlite"]

    def langgraph_sqlite(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """SqliteSaver.get_tuple, then trim_messages with tiktoken."""
        return self._trims(self._sqlite_saver(where), turns, False)

    def langgraph_approximate(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """SqliteSaver.get_tuple, then trim_messages with its approximate counter, which is not exact."""
        return self._trims(self._sqlite_saver(where), turns, True)

    def langgraph_postgres(self, turns: list[Message], where: dict[str, Any]) -> Callable[[int], Read]:
        """PostgresSaver.get_tuple on a connection that stays, then trim_messages with tiktoken."""
        if "postgres" not in self.open:
            from langgraph.checkpoint.postgres import PostgresSaver
            from psycopg import Connection
            from psycopg.rows import dict_row

            connection = Connection.connect(where["dsn"], autocommit=True, prepare_threshold=0, row_factory=dict_row)
            self.open["postgres"] = PostgresSaver(connection)
            self.open["postgres"].setup()
        return self._trims(self.open["postgres"], turns, False)

    # ------------------------------------------------------------------------------------------------------- orders

    def fill(self, order: dict[str, Any]) -> dict[str, Any]:
        """Make a session."""
        texts = json.loads(Path(order["texts"]).read_text())
        turns = [
            {"role": "user" if number % 2 else "assistant", "content": texts[number % len(texts)]}
            for number in range(1, order["turns"] + 1)
        ]
        self.reads[order["fill"], order["turns"]] = getattr(self, order["fill"])(turns, order["where"])
        return {"turns": len(turns)}

    def read(self, order: dict[str, Any]) -> dict[str, Any]:
        """Read it again and again."""
        read = self.reads[order["read"], order["turns"]](order["budget"])
        seconds: list[float] = []
        until = time.perf_counter() + order["seconds"]
        while len(seconds) < READS_MIN or (len(seconds) < order["calls"] and time.perf_counter() < until):
            started = time.perf_counter()
            context = read()
            seconds.append(time.perf_counter() - started)
        return {
            "seconds": seconds,
            "context": context,
            "tokens": CONTEXT_TOKENS + sum(map(self.counted, context)),
        }


def versions() -> dict[str, str]:
    """The peers' packages as they are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in (
        "redis", "hiredis", "openai-agents", "langgraph-checkpoint-sqlite", "langgraph-checkpoint-postgres",
        "langchain-core", "tiktoken",
    ):  # fmt: skip
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def main() -> None:
    """Orders, one a line, until standard input ends."""
    # Whatever a library prints must not come between the answers.
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(versions()), file=out, flush=True)
    peers = Peers()
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(peers.fill(order) if "fill" in order else peers.read(order)), file=out, flush=True)


if __name__ == "__main__":
    main()
