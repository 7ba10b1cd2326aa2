"""A day of a node with very many sessions, compressed: how memory, descriptors, map and bucket go over the hours.

Run it alone, since it measures its own process: python -m tests.soak.day --sessions 200000 --out FOLDER. The parts are
a daemon's, wired as it wires them, on a clock that this program moves: sessions are created all day long, hold some
exchanges, rest, are released and evicted, some come back, half of them expire. It writes samples.json and day.svg.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sessiond.core.expiry import DAY_MS
from sessiond.service.ownership import Call, Parts
from sessiond.service.sessions import Sessions
from sessiond.tiers.cloud.bucket import open_bucket
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.flush import Flusher
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hydrate import Claims, Node, Segments
from sessiond.tiers.upkeep import Upkeep
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

HOUR_MS = 3_600_000
STEP_MS = 10_000
SAMPLES_PER_HOUR = 6
# Six in the evening, so that the day changes within it.
START_MS = 20_000 * DAY_MS + 18 * HOUR_MS
EXCHANGES = 3
RETURN_SHARE = 0.2
EXPIRE_SHARE = 0.5
TTL_MS = 4 * HOUR_MS
CALLS_AT_ONCE = 64


class HeldLease:
    """A lease that holds: another process is not part of this day."""

    lost = fenced = False
    tenure = fences = 0

    def is_valid(self) -> bool:
        return True


@dataclass
class Sample:
    """One look at the node. hour: of the simulated day. Sizes in bytes; object counts only on the hour, else 0."""

    hour: float
    resident: int
    descriptors: int
    map_used: int
    map_file: int
    hot_sessions: int
    objects: int
    bucket: int
    created: int
    turns: int


class Day:
    """The node, its clock and its traffic."""

    def __init__(self, folder: Path, sessions: int, turn_bytes: int, map_bytes: int, seed: int) -> None:
        self.now_ms = START_MS
        self.sessions = sessions
        self.turn_bytes = turn_bytes
        self.rng = random.Random(seed)
        clock = lambda: self.now_ms  # noqa: E731
        self.folder = folder
        self.store = CountingStore(FolderStore(folder / "cloud"))
        self.bucket = open_bucket(self.store, b"", 1)
        self.hot = Environment(folder / "hot", map_bytes, 512, 64)
        node = Node(self.hot.incarnation, "n1", "here")
        self.flusher = Flusher(
            self.hot, self.store, self.bucket, node, 1000, 4, clock, waiting_ms=35_000, boot_ms=clock
        )
        self.claims = Claims(self.hot, self.store, self.bucket, node, time.sleep)
        self.pools = [ThreadPoolExecutor(8), ThreadPoolExecutor(2)]
        self.service = Sessions(
            Parts(
                hot=self.hot,
                store=self.store,
                bucket=self.bucket,
                node=node,
                lease=HeldLease(),  # type: ignore[arg-type]
                flusher=self.flusher,
                claims=self.claims,
                segments=Segments(self.store),
                tokenizer=Tokenizer(),
                executor=self.pools[0],
                counting=self.pools[1],
                clock_ms=clock,
                expiry_ms=clock,
                latest_ms=clock,
                running_ms=clock,
                turn_bytes_max=1 << 20,
                default_budget_tokens=4000,
            )
        )
        self.upkeep = Upkeep(
            self.hot,
            self.store,
            self.bucket,
            node,
            self.flusher,
            tenants=lambda: ["default"],
            resumed_ms=self.service.ownership.resumed_ms,
            clock_ms=clock,
            steady_ms=clock,
            running_ms=clock,
            idle_release_ms=300_000,
            evict_at_percent=70,
            wait=time.sleep,
        )
        self.call = Call("default", None)
        self.created = self.turns = 0
        self.samples: list[Sample] = []
        # What happens at a step: sessions by number and by how many exchanges they have had.
        self.due: dict[int, list[tuple[int, int]]] = {}

    def plan(self) -> Iterator[list[tuple[int, int]]]:
        """For each step of the day, which sessions speak: (number, exchanges so far)."""
        steps = 24 * HOUR_MS // STEP_MS
        born: dict[int, list[int]] = {}
        for number in range(self.sessions):
            born.setdefault(self.rng.randrange(steps), []).append(number)
        for step in range(steps):
            yield [(number, 0) for number in born.get(step, [])] + self.due.pop(step, [])

    def follow(self, step: int, number: int, exchanges: int) -> None:
        """Say when a session speaks next, if it does."""
        if exchanges < EXCHANGES:
            wait_s = self.rng.randrange(20, 240)
        elif exchanges == EXCHANGES and self.rng.random() < RETURN_SHARE:
            wait_s = self.rng.randrange(3600, 8 * 3600)
        else:
            return
        self.due.setdefault(step + max(1, wait_s * 1000 // STEP_MS), []).append((number, exchanges))

    async def exchange(self, number: int, exchanges: int) -> None:
        """One exchange as a gateway has it: resume, then append what was asked and answered."""
        session = f"s{number}"
        if not exchanges:
            policy = None
            if number % 100 < EXPIRE_SHARE * 100:
                action = turn_pb2.EXPIRY_ACTION_DELETE if number % 2 else turn_pb2.EXPIRY_ACTION_ARCHIVE
                policy = turn_pb2.SessionPolicy(expiry=turn_pb2.Expiry(ttl_ms=TTL_MS, action=action))
            await self.service.create(
                self.call,
                session_pb2.CreateSessionRequest(session_id=session, user_id=f"u{number % 977}", policy=policy),
            )
            self.created += 1
        spec = context_pb2.ContextSpec(budget_tokens=4000)
        try:
            await self.service.resume(self.call, session_pb2.ResumeSessionRequest(session_id=session, context=spec))
            turns = [
                message(f"q{exchanges}", turn_pb2.ROLE_USER, "question " + "x" * self.rng.randrange(self.turn_bytes)),
                message(
                    f"a{exchanges}", turn_pb2.ROLE_ASSISTANT, "answer " + "y" * self.rng.randrange(self.turn_bytes)
                ),
            ]
            await self.service.append(self.call, session_pb2.AppendTurnRequest(session_id=session, turns=turns))
        except Exception as error:
            if getattr(error, "reason", "") not in ("SESSION_ARCHIVED", "SESSION_DELETED"):
                raise
            return
        self.turns += 2

    def sample(self, step: int) -> None:
        """Look at the process and the disk."""
        on_the_hour = step % (HOUR_MS // STEP_MS) == 0
        objects = bucket = 0
        if on_the_hour:
            for base, _, files in os.walk(self.folder / "cloud"):
                if "/." in base[len(str(self.folder)) :]:
                    continue
                objects += len(files)
                bucket += sum(os.stat(os.path.join(base, name)).st_size for name in files)
        used, _ = self.hot.used_bytes()
        with self.hot.read() as transaction:
            held = transaction.entries("heads")
        with open("/proc/self/statm") as file:
            resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        # The map's pages count as resident where they are in memory, and are the file's, not ours.
        with open("/proc/self/smaps_rollup") as file:
            anonymous = next(int(line.split()[1]) * 1024 for line in file if line.startswith("Anonymous:"))
        self.samples.append(
            Sample(
                hour=round(step * STEP_MS / HOUR_MS, 3),
                resident=min(resident, anonymous),
                descriptors=len(os.listdir("/proc/self/fd")),
                map_used=used,
                map_file=(self.folder / "hot" / "data.mdb").stat().st_size,
                hot_sessions=held,
                objects=objects,
                bucket=bucket,
                created=self.created,
                turns=self.turns,
            )
        )
        if on_the_hour:
            last = self.samples[-1]
            print(
                f"hour {last.hour:4.1f}: {last.created} sessions, {last.turns} turns, {last.resident >> 20} MiB, "
                f"{last.descriptors} fds, map {last.map_used >> 20} MiB, {last.hot_sessions} hot, "
                f"{last.objects} objects",
                file=sys.stderr,
                flush=True,
            )

    async def live(self) -> None:
        """The whole day."""
        every = HOUR_MS // STEP_MS // SAMPLES_PER_HOUR
        for step, speaking in enumerate(self.plan()):
            self.now_ms = START_MS + step * STEP_MS
            for start in range(0, len(speaking), CALLS_AT_ONCE):
                batch = speaking[start : start + CALLS_AT_ONCE]
                await asyncio.gather(*(self.exchange(*speaker) for speaker in batch))
            for number, exchanges in speaking:
                self.follow(step, number, exchanges + 1)
            await asyncio.to_thread(self.rest)
            if step % every == 0:
                self.sample(step)
        await self.service.ownership.settle()
        self.sample(24 * HOUR_MS // STEP_MS)

    def rest(self) -> None:
        """What the node does by itself in a step, brought to its end: a step has seconds, and takes milliseconds."""
        rounds = max(1, self.sessions // 20_000)
        for _ in range(rounds):
            self.upkeep.tick()
        self.flusher._collect()
        self.flusher._feed()
        while self.flusher._due or self.flusher._running or self.upkeep._releasing:
            self.flusher._feed()
            time.sleep(0.0005)

    def close(self) -> None:
        self.flusher.stop()
        self.claims.close()
        for pool in self.pools:
            pool.shutdown(wait=True)
        self.hot.close()
        self.store.close()


def message(turn_id: str, role: int, text: str) -> turn_pb2.TurnInput:
    content = turn_pb2.Message(parts=[turn_pb2.Part(text=text)])
    return turn_pb2.TurnInput(turn_id=turn_id, role=role, message=content)  # type: ignore[arg-type]


def plot(samples: list[Sample], sessions: int) -> str:
    """Four lines over the day, each on a scale of its own, as SVG."""
    panels = (
        ("Resident memory without the map, MiB", [(s.hour, s.resident / 2**20) for s in samples]),
        ("Open descriptors", [(s.hour, s.descriptors) for s in samples]),
        ("Map in use, MiB", [(s.hour, s.map_used / 2**20) for s in samples]),
        ("Objects in the bucket, thousands", [(s.hour, s.objects / 1000) for s in samples if s.objects]),
        ("Sessions made so far, thousands", [(s.hour, s.created / 1000) for s in samples]),
    )
    width, height, left = 760, 120, 60
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{len(panels) * (height + 40) + 30}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="18" font-size="14">A day of a node with {sessions} sessions</text>',
    ]
    for index, (title, points) in enumerate(panels):
        top = 50 + index * (height + 40)
        high = max(value for _, value in points) * 1.1 or 1
        path = " ".join(
            f"{left + hour / 24 * (width - left - 20):.1f},{top + height - value / high * height:.1f}"
            for hour, value in points
        )
        out += [
            f'<text x="{left}" y="{top - 6}">{title}</text>',
            f'<rect x="{left}" y="{top}" width="{width - left - 20}" height="{height}" fill="none" stroke="#ccc"/>',
            f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{high:.0f}</text>',
            f'<text x="{left - 6}" y="{top + height}" text-anchor="end">0</text>',
            f'<polyline points="{path}" fill="none" stroke="#1667b7" stroke-width="1.5"/>',
        ]
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=2000)
    parser.add_argument("--turn-bytes", type=int, default=800, help="A turn's text is shorter than this.")
    parser.add_argument("--map-mib", type=int, default=256, help="Size of the map; what does not fit is evicted.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(argv)
    print(f"a day of {given.sessions} sessions, seed {given.seed}", file=sys.stderr, flush=True)
    # In memory where that can be had: what a disk makes of the fsyncs is not measured here.
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="sessiond-day-", dir=memory if os.access(memory, os.W_OK) else None))
    began = time.monotonic()
    try:
        day = Day(folder, given.sessions, given.turn_bytes, given.map_mib << 20, given.seed)
        try:
            asyncio.run(day.live())
        finally:
            day.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    given.out.mkdir(parents=True, exist_ok=True)
    done = asdict(day.upkeep.done)
    facts = {
        "sessions": given.sessions,
        "seed": given.seed,
        "map": given.map_mib << 20,
        "seconds": round(time.monotonic() - began, 1),
        "upkeep": done,
        "puts": {about: count for kind, about, count in day.store.objects() if kind == "put"},
        "samples": [asdict(sample) for sample in day.samples],
    }
    (given.out / "samples.json").write_text(json.dumps(facts, indent=1) + "\n")
    (given.out / "day.svg").write_text(plot(day.samples, given.sessions))
    print(f"{facts['seconds']} s; {done}; {given.out / 'day.svg'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
