"""What the demonstration measured, and which promises were kept, as numbers and as JSON. It measures nothing itself."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

# With fewer samples there is no 95th percentile to speak of: the worst one stands for it, and is called the worst.
P95_SAMPLES_MIN: Final = 20
# What a restart can find.
FIRST: Final = "a new folder"
UNDER_LOAD: Final = "kill -9 under load"
AFTER_KILL: Final = "kill -9, disk there"
AFTER_DRAIN: Final = "drained, disk deleted"
AFTER_LOSS: Final = "kill -9, disk deleted"


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least this share of all are not above (nearest rank); 0 if there are none."""
    ranked = sorted(samples)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else 0.0


@dataclass(slots=True)
class Latency:
    """Times of one kind of thing, in milliseconds."""

    samples_ms: list[float] = field(default_factory=list)

    def add_s(self, seconds: float) -> None:
        """One more."""
        self.samples_ms.append(seconds * 1000)

    @property
    def p50_ms(self) -> float:
        """The median; 0 if there are no samples."""
        return statistics.median(self.samples_ms) if self.samples_ms else 0.0

    @property
    def high_ms(self) -> float:
        """The 95th percentile, or the worst where there are too few for one."""
        return percentile(self.samples_ms, 0.95) if self.has_p95 else self.max_ms

    @property
    def max_ms(self) -> float:
        """The worst."""
        return max(self.samples_ms, default=0.0)

    @property
    def has_p95(self) -> bool:
        """Whether there are enough for a 95th percentile."""
        return len(self.samples_ms) >= P95_SAMPLES_MIN

    def as_json(self) -> dict[str, Any]:
        """count, p50_ms, p95_ms (null where there are too few) and max_ms."""
        return {
            "count": len(self.samples_ms),
            "p50_ms": round(self.p50_ms, 3),
            "p95_ms": round(self.high_ms, 3) if self.has_p95 else None,
            "max_ms": round(self.max_ms, 3),
        }


@dataclass(slots=True)
class Growth:
    """A conversation that grows call by call.

    turns: how many it has in the end. points: for each call of the model (turns so far, tokens of the context, tokens
    of the full transcript).
    """

    budget_tokens: int
    turns: int = 0
    points: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def context_tokens(self) -> int:
        """Input tokens of all calls, each with its context."""
        return sum(context for _, context, _ in self.points)

    @property
    def transcript_tokens(self) -> int:
        """Input tokens of all calls, had each been sent the full transcript."""
        return sum(transcript for _, _, transcript in self.points)

    @property
    def share(self) -> float:
        """The first over the second."""
        return self.context_tokens / self.transcript_tokens if self.transcript_tokens else 1.0

    def as_json(self) -> dict[str, Any]:
        """Sums, and every point."""
        return {
            "budget_tokens": self.budget_tokens,
            "turns": self.turns,
            "calls": len(self.points),
            "context_tokens_of_all_calls": self.context_tokens,
            "transcript_tokens_of_all_calls": self.transcript_tokens,
            "share": round(self.share, 5),
            "largest_context_tokens": max((context for _, context, _ in self.points), default=0),
            "points": {
                "columns": ["turns", "context_tokens", "transcript_tokens"],
                "rows": [list(point) for point in self.points],
            },
        }


@dataclass(frozen=True, slots=True)
class Promise:
    """One promise and whether it was kept. detail: what was seen."""

    promise: str
    kept: bool
    detail: str


@dataclass(slots=True)
class Figures:
    """Everything that one run measured."""

    growth: Growth
    # Reconnect to context: a new connection, ResumeSession, its reply parsed. Without the first after each restart.
    rungs: dict[str, Latency] = field(default_factory=lambda: {name: Latency() for name in ("HOT", "CLOUD", "PARTIAL")})
    # From the start of the process until it serves, by what the restart found.
    restarts: dict[str, Latency] = field(default_factory=dict)
    # From the start of the process to the first context, over a new connection, and to the first acknowledged append.
    first_contexts: dict[str, Latency] = field(default_factory=dict)
    first_appends: dict[str, Latency] = field(default_factory=dict)
    # From SIGKILL to the next append that was acknowledged, as the writers saw it.
    outage: Latency = field(default_factory=Latency)
    # An append of what happened since the last call of the model, with the context that results.
    turn_calls: Latency = field(default_factory=Latency)
    promises: list[Promise] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def broken(self) -> list[Promise]:
        """The promises that were not kept."""
        return [promise for promise in self.promises if not promise.kept]

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            **self.facts,
            "promises": [{"promise": p.promise, "kept": p.kept, "detail": p.detail} for p in self.promises],
            "rungs": {name: latency.as_json() for name, latency in self.rungs.items()},
            "restarts": {name: latency.as_json() for name, latency in self.restarts.items()},
            "first_contexts": {name: latency.as_json() for name, latency in self.first_contexts.items()},
            "first_appends": {name: latency.as_json() for name, latency in self.first_appends.items()},
            "outage": self.outage.as_json(),
            "append_with_context": self.turn_calls.as_json(),
            "growth": self.growth.as_json(),
        }
