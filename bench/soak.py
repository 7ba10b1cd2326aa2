"""Mixed load for a long time on one daemon: are memory, file size and latency flat? `python -m bench.soak --help`.

Sessions come, hold exchanges, rest, are released and evicted, and some come back. In slices of a few seconds three
generators make resumes, appends on the disk and appends in the cloud tier at steady rates, and between slices the
process and its files are looked at. At the end every session must have as many turns as were acknowledged. It judges no
time: what the last third took is compared with the third before.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench import ratio, talk, wire
from bench.processes import Load
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import session_pb2, turn_pb2

RESUMES_PER_S, EDGE_PER_S, CLOUD_PER_S = 150, 100, 5
# Sessions that a slice speaks to: new ones, those of the slice before, and some that were left long ago.
NEW, BACK = 20, 5
RESTS_MS = 15_000
# Small, so that it fills within minutes and eviction has to keep it there.
MAP_BYTES = 16 * 1024**2
LONG_MINUTES, LONG_MAP_BYTES = 10, 64 * 1024**2
CHECKERS = 16
PLOT = "soak"


@dataclass
class Sample:
    """One slice: its latencies in seconds, and what the daemon held after it."""

    minute: float
    values: dict[str, float] = field(default_factory=dict)


# Name, unit, what to multiply by for the plot, its unit there.
MEASURES = (
    ("resume p50", "s", 1e3, "ms"),
    ("resume p99", "s", 1e3, "ms"),
    ("append EDGE p50", "s", 1e3, "ms"),
    ("append EDGE p99", "s", 1e3, "ms"),
    ("append CLOUD p50", "s", 1e3, "ms"),
    ("resident memory without the map", "MB", 1, "MB"),
    ("file of the hot tier", "MB", 1, "MB"),
    ("hot tier in use", "MB", 1, "MB"),
    ("sessions in the hot tier", "", 1, ""),
    ("open descriptors", "", 1, ""),
)


class Soak:
    """The sessions, the generators and what was seen."""

    def __init__(self, daemon: Daemon, client: wire.Client, slice_s: float, seed: int = 1) -> None:
        self._daemon = daemon
        self._client = client
        self._slice_s = slice_s
        self._rng = random.Random(seed)
        self._loads = [Load(1, 4), Load(1, 4), Load(1, 4, first=10**11)]
        self._newest: list[str] = []
        # Turns that were acknowledged, by session.
        self.turns: dict[str, int] = {}
        self.calls = 0
        self.samples: list[Sample] = []

    def close(self) -> None:
        for load in self._loads:
            load.close()

    def _append(self, names: list[str], durability: int) -> tuple[list[bytes], list[int]]:
        made = []
        for place, name in enumerate(names):
            request = wire.append_request(name, talk.turn(1 + place % 2, supplied=False), durability)
            made.append(request.SerializeToString())
        return made, [raw.index(b"turn-") + len(b"turn-") for raw in made]

    def slice(self) -> None:
        """One slice and the look after it."""
        new = [f"soak-{len(self.turns) + number}" for number in range(NEW)]
        left = [name for name in self.turns if name not in self._newest]
        speaking = new + self._newest + self._rng.sample(left, min(BACK, len(left)))
        talk.make_sessions(self._client, new, 0, 8)
        self.turns |= dict.fromkeys(new, 0)
        address, for_s = self._daemon.address, self._slice_s
        resumes, edge, cloud = self._loads
        appends = (self._append(speaking, turn_pb2.DURABILITY_EDGE), self._append(speaking, turn_pb2.DURABILITY_CLOUD))
        # A turn first, so that a resume always finds one.
        self._count(speaking, edge.run(address, wire.APPEND, len(speaking), *appends[0], each=True))
        under_way = [
            edge.begin(address, wire.APPEND, 0, *appends[0], each=True, per_s=EDGE_PER_S, for_s=for_s),
            cloud.begin(address, wire.APPEND, 0, *appends[1], each=True, per_s=CLOUD_PER_S, for_s=for_s),
        ]
        requests = [wire.resume_request(name) for name in speaking]
        asked = resumes.run(address, wire.RESUME, 0, requests, each=True, per_s=RESUMES_PER_S, for_s=for_s)
        self.calls += int(asked["calls"])
        done = [future.result() for future in under_way]
        for answer in done:
            self._count(speaking, answer)
        self._newest = new
        self._look(asked, *done)

    def _count(self, names: list[str], answer: dict[str, float]) -> None:
        """Call k was about session k % len, and every one that is counted was acknowledged."""
        for call in range(int(answer["calls"])):
            self.turns[names[call % len(names)]] += 1
        self.calls += int(answer["calls"])

    def _look(self, asked: dict[str, float], edge: dict[str, float], cloud: dict[str, float]) -> None:
        family = wire.family(self._daemon.pid)
        status = self._client.status()
        path = self._daemon.data_dir / "hot" / "data.mdb"
        values = {
            "resume p50": asked["p50_s"],
            "resume p99": asked["p99_s"],
            "append EDGE p50": edge["p50_s"],
            "append EDGE p99": edge["p99_s"],
            "append CLOUD p50": cloud["p50_s"],
            "resident memory without the map": sum(wire.anonymous_bytes(self._daemon.pid)) / 1e6,
            "file of the hot tier": path.stat().st_blocks * 512 / 1e6,
            "hot tier in use": status.hot.map_used_bytes / 1e6,
            "sessions in the hot tier": status.hot.sessions,
            "open descriptors": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in family),
        }
        self.samples.append(Sample((len(self.samples) + 1) * self._slice_s / 60, values))

    def check(self) -> None:
        """Every session has every turn that was acknowledged, wherever it is by now."""

        def head(name: str) -> int:
            request = session_pb2.GetSessionRequest(session_id=name)
            return int(self._client.sessions.GetSession(request, timeout=wire.TIMEOUT_S).session.head.seq)

        with ThreadPoolExecutor(CHECKERS) as pool:
            for (name, turns), found in zip(self.turns.items(), pool.map(head, self.turns), strict=True):
                assert found == turns, f"{name} has {found} turns, {turns} were acknowledged"


def soak(ledger: ratio.Ledger, minutes: float, slice_s: float) -> None:
    """Run it, and add what came of it to the ledger."""
    slices = max(3, round(minutes * 60 / slice_s))
    map_bytes = LONG_MAP_BYTES if minutes >= LONG_MINUTES else MAP_BYTES
    with (
        tempfile.TemporaryDirectory(prefix="bench-soak-") as name,
        running_daemon(Path(name, "data"), map_size_bytes=map_bytes, idle_release_ms=RESTS_MS) as daemon,
        wire.Client(daemon.address) as client,
    ):
        run = Soak(daemon, client, slice_s)
        try:
            for number in range(slices):
                run.slice()
                if number % max(1, slices // 20) == 0:
                    last = run.samples[-1]
                    told = ", ".join(f"{key} {ratio.shown(last.values[key], unit)}" for key, unit, _, _ in MEASURES)
                    print(f"{last.minute:6.1f} min: {told}", file=sys.stderr, flush=True)
            run.check()
            upkeep = client.status()
        finally:
            run.close()
    third = slices // 3
    case = f"mixed load for {slices * slice_s / 60:.1f} minutes"
    for key, unit, scale, plotted in MEASURES:
        values = [sample.values[key] for sample in run.samples]
        ledger.add(case, key, "the third before", unit, values[-third:], values[-2 * third : -third], "soak")
        for sample, value in zip(run.samples, values, strict=True):
            ledger.point(PLOT, f"{key}{f', {plotted}' if plotted else ''}", sample.minute, [value * scale])
    ledger.note(
        case,
        f"{run.calls:,} calls, none failed; {len(run.turns):,} sessions, {sum(run.turns.values()):,} turns, every one "
        f"where it should be; {upkeep.hot.sessions:,} sessions in the hot tier at the end, of "
        f"{map_bytes / 1e6:.0f} MB; {RESUMES_PER_S} resumes, {EDGE_PER_S} EDGE and {CLOUD_PER_S} CLOUD appends a "
        f"second of {slice_s:g} s slices",
    )


def main(argv: list[str]) -> int:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--slice-s", type=float, default=10)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    ledger = ratio.Ledger(quick=False)
    soak(ledger, given.minutes, given.slice_s)
    print()
    ledger.save(given.out)
    print("\n".join(ledger.table()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
