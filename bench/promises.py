"""What DESIGN.md, "What it must reach", and the issue on speed ask of the benchmarks, by the key that cases name.

A case says which promise a figure is about; the report shows every promise, also one that no figure came for. Nothing
here fails a run: whether a figure reaches its promise is told, never asserted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Promise:
    """One thing that a figure should reach.

    sense: "<=" or ">=". limit: of the ratio, or, where unit is not "x", of our own side in that unit ("s", "" for a
    bare number). design: whether DESIGN.md's table has it; else the issue asks for it beside the table.
    """

    what: str
    against: str
    sense: str
    limit: float
    unit: str = "x"
    design: bool = True

    def is_reached(self, value: float) -> bool:
        """Whether the value is on the right side of the limit."""
        return value <= self.limit if self.sense == "<=" else value >= self.limit

    def asked(self) -> str:
        """The limit as the report prints it."""
        if not self.sense:
            return "to be reported"
        amount = f"{self.limit * 1000:g} ms" if self.unit == "s" else f"{self.limit:,g}{self.unit}"
        return f"{'at most' if self.sense == '<=' else 'at least'} {amount}"


PROMISES: Final[dict[str, Promise]] = {
    "hot p50": Promise("hot resume over gRPC, p50", "bare handler", "<=", 1.10),
    "hot p99": Promise("hot resume over gRPC, p99", "bare handler", "<=", 1.25),
    "hot calls": Promise("hot resume over gRPC, calls per second", "bare handler", ">=", 0.85),
    "hot long": Promise("hot resume, session of 10,000 turns", "the same of 100 turns", "<=", 1.05),
    "batch": Promise("batched resume, 64 sessions a call, 4,000 tokens each", "single calls, per core", ">=", 8),
    "redis 1000": Promise("hot resume, 1,000 turns", "Redis, whole list, trim with tiktoken", ">=", 15),
    "redis 10000": Promise("hot resume, 10,000 turns", "Redis, whole list, trim with tiktoken", ">=", 150),
    "langgraph": Promise("hot resume, 1,000 turns", "LangGraph SqliteSaver + trim_messages", ">=", 200),
    "redis best": Promise("hot resume", "best Redis recipe (LRANGE -64 with stored counts)", "", 0),
    "append many": Promise("durable append, 64 callers, calls per second", "bare handler", ">=", 0.5),
    "append one": Promise("durable append, one caller", "bare handler + one LMDB commit of the same rows", "<=", 1.1),
    "cold p50": Promise(
        "cold resume, window within the manifest, p50", "bare handler doing the same GET", "<=", 1.15
    ),
    "cold p99": Promise(
        "cold resume, window within the manifest, p99", "bare handler doing the same GET", "<=", 1.3
    ),
    "restart": Promise(
        "restart after kill -9 to first resume, 100,000 sessions, folder store: seconds more", "process start alone",
        "<=", 0.2, "s",
    ),
    "tokens": Promise(
        "tokens at a 4,000 budget, every call of a conversation of 1,000 turns", "full transcript each time", "<=", 0.1
    ),
    "serving": Promise("start to serving, 100,000 hot sessions", "", "<=", 1.0, "s", design=False),
    "workers cpu": Promise(
        "two workers, calls per second of server CPU", "one worker", ">=", 0.9, design=False
    ),
    "workers calls": Promise("two workers, calls per second, where the cores are there", "one worker", ">=", 1.7,
                             design=False),
    "busy p99": Promise(
        "p99 of a hot resume at 70 % of the peak, while flushing to SeaweedFS and hydrating 50 cold sessions a second",
        "", "<=", 0.005, "s", design=False,
    ),
    "many sessions": Promise("15,000 live sessions on one node", "the same calls to 150 sessions", "", 0, design=False),
    "soak": Promise("mixed load: memory, file size and latency at the end", "the same a third before", "", 0,
                    design=False),
    "counting": Promise("token counting's share of an append", "the whole append", "", 0, design=False),
}  # fmt: skip
