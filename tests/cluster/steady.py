"""Appends at a steady rate through our client, and a restart of every node meanwhile: what was sent, and what came."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from sessiond.client import AsyncClient, assistant, user
from sessiond.errors import SessiondError
from tests.cluster.history import read_logs
from tests.cluster.nodes import Cluster

# Between two restarts, and after the last one.
CALM_S = 1.0


@dataclass
class Call:
    """One append: when it was due and when it was answered, by time.monotonic."""

    due_s: float
    answered_s: float


@dataclass
class Steady:
    """Appends at a steady rate, each session's one after the other, through one client. errors: what the client raised.

    positions: by session, where each turn was said to be, in the order in which they were sent.
    """

    client: AsyncClient
    sessions: list[str]
    rate_per_s: int
    calls: list[Call] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    positions: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    stopping: bool = False

    async def run(self) -> None:
        """Until `stopping` is set; every append that was begun is answered then."""
        self.positions = {session: [] for session in self.sessions}
        await asyncio.gather(*(self._talk(place, session) for place, session in enumerate(self.sessions)))

    async def _talk(self, place: int, session: str) -> None:
        every_s = len(self.sessions) / self.rate_per_s
        due_s = time.monotonic() + every_s * place / len(self.sessions)
        number = 0
        while not self.stopping:
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            number += 1
            turn = (user if number % 2 else assistant)(f"turn {number} of {session}", turn_id=f"t{number}")
            try:
                reply = await self.client.append(session, turn)
            except SessiondError as error:
                self.errors.append(f"{session} t{number}: {error.reason}: {error}")
                return
            self.calls.append(Call(due_s, time.monotonic()))
            position = reply.turns[0].position
            self.positions[session].append((position.epoch, position.seq))
            due_s += every_s


async def roll(cluster: Cluster, steady: Steady, calm_s: float = CALM_S) -> list[tuple[float, float]]:
    """Restart every node in turn, drained; (from, to) of each restart, by time.monotonic."""
    windows: list[tuple[float, float]] = []
    running = asyncio.create_task(steady.run())
    for member in cluster:
        await asyncio.sleep(calm_s)
        began_s = time.monotonic()
        assert await asyncio.to_thread(member.terminate) == 0, f"{member.name} did not drain cleanly"
        await asyncio.to_thread(member.start)
        windows.append((began_s, time.monotonic()))
    await asyncio.sleep(calm_s)
    steady.stopping = True
    await running
    return windows


def check(cluster: Cluster, steady: Steady) -> None:
    """No error reached the client, and each log is what the client said, in its order, once."""
    assert not steady.errors, f"{len(steady.errors)} errors: {steady.errors[:3]}"
    logs = read_logs(cluster[0].address, steady.sessions)
    for session, positions in steady.positions.items():
        turns = [turn.turn_id for turn in logs[session]]
        assert turns == [f"t{number}" for number in range(1, len(positions) + 1)], session
        assert [seq for _, seq in positions] == list(range(1, len(positions) + 1)), session
        assert positions == [(turn.epoch, turn.seq) for turn in logs[session]], session
