"""What goes wrong, how often and for how long: drawn from the seed, so that some worlds are calm and others are not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

MS = 1000


@dataclass(slots=True)
class StorePlan:
    """What becomes of one request to the store.

    lands: after so many us it is carried out; None for never. answers: after so many us more its answer arrives; None
    for never. says: "" for the truth, else the failure that is told whatever happened. again: after so many us the very
    request is carried out once more.
    """

    lands: int | None
    answers: int | None
    says: str = ""
    again: int | None = None


@dataclass(slots=True)
class CallPlan:
    """What becomes of one call: when the request arrives, when the reply does (us each; None never), and once more."""

    request: int | None
    reply: int | None
    again: int | None = None


@dataclass(slots=True)
class Rates:
    """Shares of requests that meet each fault."""

    fails_before: float = 0.0
    fails_after: float = 0.0
    contended: float = 0.0
    unsent: float = 0.0
    lost_request: float = 0.0
    lost_reply: float = 0.0
    late: float = 0.0
    twice: float = 0.0
    call_lost: float = 0.0
    reply_lost: float = 0.0
    call_twice: float = 0.0
    slow: float = 0.0


@dataclass
class Weather:
    """The faults of one world. Links are (from, to); names are those of hosts, `store` and `clients`."""

    rng: random.Random
    rates: Rates
    store_us: int = 4 * MS
    call_us: int = 500
    store_timeout_us: int = 2_000 * MS
    calm: bool = False
    cut: set[tuple[str, str]] = field(default_factory=set)
    # Hosts whose requests about such keys the store refuses: (how, prefix of the keys). `deaf`: it carries them out and
    # does not answer. `unwritable`: it only reads.
    outage: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Hosts whose requests to the store take long, until when.
    slow: dict[str, int] = field(default_factory=dict)
    now_us: Callable[[], int] = lambda: 0

    @classmethod
    def of(cls, rng: random.Random) -> Weather:
        """Weather for a world: from none to much."""
        level = rng.choice((0.0, 0.3, 1.0, 1.0, 2.5))
        kinds = {
            "fails_before": 0.02,
            "fails_after": 0.03,
            "contended": 0.015,
            "unsent": 0.01,
            "lost_request": 0.01,
            "lost_reply": 0.015,
            "late": 0.015,
            "twice": 0.02,
            "call_lost": 0.02,
            "reply_lost": 0.03,
            "call_twice": 0.03,
            "slow": 0.05,
        }
        # Not every kind in every world: some faults hide others.
        rates = Rates(**{name: rate * level * rng.choice((0, 0.5, 1, 3)) for name, rate in sorted(kinds.items())})
        return cls(
            rng,
            rates,
            store_us=rng.choice((1, 5, 40)) * MS,
            call_us=rng.choice((200, 1000, 10_000)),
            store_timeout_us=rng.choice((400, 2000)) * MS,
        )

    def _delay(self, usual_us: int) -> int:
        rng = self.rng
        factor = 0.3 + rng.random() * 1.4
        if not self.calm and rng.random() < self.rates.slow:
            factor *= rng.choice((5, 20, 60))
        return 1 + int(usual_us * factor)

    def store(self, host: str, key: str, writes: bool) -> StorePlan:
        """What becomes of a host's next request to the store."""
        there, back = self._delay(self.store_us // 2), self._delay(self.store_us // 2)
        if self.slow.get(host, 0) > self.now_us():
            there *= 1 + int(self.rng.random() * 100)
        if (host, "store") in self.cut:
            return StorePlan(None, None)
        if ("store", host) in self.cut:
            return StorePlan(there, None)
        how, prefix = self.outage.get(host, ("", ""))
        if how == "unwritable" and not writes:
            how = ""
        if how and key.startswith(prefix):
            return StorePlan(there, None) if how == "deaf" else StorePlan(None, back, how)
        if self.calm:
            return StorePlan(there, back)
        rng, rates = self.rng, self.rates
        dice = rng.random()
        for rate, plan in (
            (rates.fails_before, StorePlan(None, there + back, "failed")),
            (rates.unsent, StorePlan(None, 1, "unsent")),
            (rates.lost_request, StorePlan(None, None)),
            (rates.lost_reply, StorePlan(there, None)),
            (rates.fails_after if writes else 0.0, StorePlan(there, back, "failed")),
            (rates.contended if writes else 0.0, StorePlan(there if rng.random() < 0.3 else None, back, "contended")),
            (rates.late if writes else 0.0, StorePlan(there + int(rng.random() * 12_000 * MS), None)),
            (rates.twice if writes else 0.0, StorePlan(there, back, "", int(rng.random() * 3_000 * MS))),
        ):
            if dice < rate:
                return plan
            dice -= rate
        return StorePlan(there, back)

    def call(self, source: str, target: str) -> CallPlan:
        """What becomes of a call from one host to another."""
        there, back = self._delay(self.call_us), self._delay(self.call_us)
        if (source, target) in self.cut:
            return CallPlan(None, None)
        if (target, source) in self.cut:
            return CallPlan(there, None)
        if self.calm:
            return CallPlan(there, back)
        rng, rates = self.rng, self.rates
        dice = rng.random()
        if dice < rates.call_lost:
            return CallPlan(None, None)
        dice -= rates.call_lost
        if dice < rates.reply_lost:
            return CallPlan(there, None)
        dice -= rates.reply_lost
        if dice < rates.call_twice:
            return CallPlan(there, back, there + int(rng.random() * 4_000 * MS))
        return CallPlan(there, back)
