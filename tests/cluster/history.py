"""What callers were told, and what has to be true of it once everything is over.

It promises to know nothing of how the daemons work: it compares acknowledgements with logs, orphans and disks.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Reader
from sessiond.tiers.hot.rows import PHASE_CLAIMING, PHASE_RELEASED, decode_head
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.wire import Wire

CLOUD_ACK, EDGE_ACK = turn_pb2.DURABILITY_CLOUD, turn_pb2.DURABILITY_EDGE
CONFIRMED = context_pb2.OWNERSHIP_CONFIRMED
FRAMES_BYTES_MAX = 64 * 1024**2
Place = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Ack:
    """One turn that was acknowledged. place: its epoch and seq. missing: the reply said that turns may be missing."""

    session: str
    turn_id: str
    place: Place
    durability: int
    confirmed: bool
    duplicate: bool
    missing: bool
    cloud_seq: int


@dataclass(frozen=True, slots=True)
class Suspect:
    """A reply that said CONFIRMED and nothing missing, and was short of a turn that had been acknowledged before."""

    session: str
    turn_id: str
    place: Place
    head: Place
    node: str

    def __str__(self) -> str:
        return (
            f"{self.session}: {self.node} answered with the head {self.head}, CONFIRMED and nothing missing, after "
            f"{self.turn_id} had been acknowledged at {self.place}"
        )


class History:
    """Every acknowledgement, by any number of threads. `check` when everything is over."""

    def __init__(self) -> None:
        self.acks: list[Ack] = []
        self.suspects: list[Suspect] = []
        self._newest: dict[str, Ack] = {}
        self._lock = threading.Lock()

    def appended(self, session: str, asked: int, reply: session_pb2.AppendTurnResponse) -> None:
        """An append was answered. asked: the durability that was asked for."""
        for turn in reply.turns:
            assert reply.durability >= asked, f"{turn.turn_id}: {asked} was asked for, {reply.durability} reached"
            assert asked < CLOUD_ACK or reply.cloud_seq >= turn.position.seq, f"{turn.turn_id} is above cloud_seq"
            ack = Ack(
                session,
                turn.turn_id,
                (turn.position.epoch, turn.position.seq),
                reply.durability,
                reply.ownership == CONFIRMED,
                turn.duplicate,
                bool(reply.missing),
                reply.cloud_seq,
            )
            with self._lock:
                self.acks.append(ack)
                newest = self._newest.get(session)
                # By seq: what a head is compared with.
                if ack.confirmed and (newest is None or ack.place[1] > newest.place[1]):
                    self._newest[session] = ack

    def floor(self, session: str) -> Ack | None:
        """The highest confirmed acknowledgement so far: what a later confirmed answer has, or says that it lacks."""
        with self._lock:
            return self._newest.get(session)

    def resumed(self, session: str, floor: Ack | None, receipt: context_pb2.Receipt) -> None:
        """A resume was answered. floor: as it was before the resume was sent."""
        if floor is None or receipt.ownership != CONFIRMED or receipt.missing or receipt.stale:
            return
        head = (receipt.head.epoch, receipt.head.seq)
        if head[1] < floor.place[1]:
            with self._lock:
                self.suspects.append(Suspect(session, floor.turn_id, floor.place, head, receipt.node))

    @property
    def sessions(self) -> list[str]:
        """Those that something was acknowledged of."""
        return sorted({ack.session for ack in self.acks})

    def check(
        self,
        logs: dict[str, list[turn_pb2.Turn]],
        orphans: dict[str, set[str]],
        queued: dict[str, set[str]] | None = None,
        lost: dict[str, int] | None = None,
    ) -> None:
        """All of it against the logs as they are now.

        orphans: turn_ids that ListOrphans names. queued: turn_ids that only some disk has. lost: for sessions of which
        turns may be lost with a disk, the highest seq that is not; turns above it were told to be missing.
        """
        queued, lost = queued or {}, lost or {}
        wrong: list[str] = []
        for session, turns in logs.items():
            wrong += [f"{session}: {text}" for text in _malformed(turns)]
        places = {session: {turn.turn_id: (turn.epoch, turn.seq) for turn in turns} for session, turns in logs.items()}
        for ack in self.acks:
            found = places[ack.session].get(ack.turn_id)
            kept = orphans.get(ack.session, set()) | queued.get(ack.session, set())
            if ack.durability >= CLOUD_ACK:
                if found != ack.place:
                    wrong.append(f"{ack.session}: {ack.turn_id} was acknowledged CLOUD at {ack.place}, is at {found}")
            elif found is None:
                if ack.turn_id not in kept and not (ack.session in lost and ack.place[1] > lost[ack.session]):
                    wrong.append(f"{ack.session}: {ack.turn_id}, acknowledged EDGE at {ack.place}, is nowhere")
            elif found != ack.place and found[0] <= ack.place[0]:
                # Under a later epoch it was rescued or sent again; within one epoch a place never changes.
                wrong.append(f"{ack.session}: {ack.turn_id} was acknowledged at {ack.place}, is at {found}")
        for suspect in self.suspects:
            if suspect.turn_id not in orphans.get(suspect.session, set()):
                wrong.append(str(suspect))
        assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:40])


def _malformed(turns: list[turn_pb2.Turn]) -> Iterator[str]:
    seen: dict[str, int] = {}
    epoch = 0
    for place, turn in enumerate(turns, 1):
        if turn.seq != place:
            yield f"turn {place} is missing"
            return
        if turn.epoch < epoch:
            yield f"turn {turn.seq} is of epoch {turn.epoch}, after one of epoch {epoch}"
        epoch = turn.epoch
        if turn.turn_id in seen:
            yield f"{turn.turn_id} was applied twice, at {seen[turn.turn_id]} and {turn.seq}"
        seen[turn.turn_id] = turn.seq


def read_logs(address: str, sessions: Iterable[str]) -> dict[str, list[turn_pb2.Turn]]:
    """Every turn of each session, read at one node."""
    with contextlib.closing(Wire(address)) as wire:
        return {session: list(wire.turns(session)) for session in sessions}


def read_orphans(address: str, sessions: Iterable[str]) -> dict[str, set[str]]:
    """The turn_ids that ListOrphans names."""
    found: dict[str, set[str]] = {}
    with contextlib.closing(Wire(address)) as wire:
        for session in sessions:
            found[session] = {turn.turn_id for turn in orphans_of(wire, session)}
    return found


def orphans_of(wire: Wire, session: str) -> list[turn_pb2.Turn]:
    """The turns that ListOrphans names, every page."""
    turns: list[turn_pb2.Turn] = []
    token = ""
    while True:
        request = session_pb2.ListOrphansRequest(session_id=session, page_token=token)
        try:
            page = wire.sessions.ListOrphans(request, timeout=30)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return turns
        turns += page.turns
        token = page.next_page_token
        if not token:
            return turns


def read_disk(data_dir: Path) -> dict[str, set[str]]:
    """By session, the turn_ids above cloud_seq on the disk of a node that has ended."""
    found: dict[str, set[str]] = defaultdict(set)
    if not (data_dir / "hot" / "data.mdb").exists():
        return {}
    with contextlib.closing(Reader(data_dir / "hot")) as hot, hot.read() as transaction:
        for key, value in transaction.scan("heads", b""):
            h = bytes(key)
            head = decode_head(h, value)
            if head.phase in (PHASE_CLAIMING, PHASE_RELEASED) or head.head_seq <= head.cloud_seq:
                continue
            frames, _ = log.frames_between(transaction, h, head.cloud_seq + 1, head.head_seq, FRAMES_BYTES_MAX)
            turns = session_pb2.ListTurnsResponse.FromString(frames).turns
            found[head.session] |= {turn.turn_id for turn in turns}
    return dict(found)
