"""Gateways that spray appends and resumes over all nodes, go on over every fault, and write down what they are told."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import grpc

from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.cluster.history import CLOUD_ACK, EDGE_ACK, History
from tests.cluster.nodes import PATIENCE_S, Cluster, Member
from tests.fault.load import is_answered
from tests.wire import Refusal, Wire, assistant, user

# A node that says nothing is left after this; the same turn_id goes elsewhere.
CALL_S_MAX = 2.0
# For calls that have to be answered, on a machine that may be busy.
ANSWER_S_MAX = 20.0
RETRYABLE = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
)
# ABORTED says that somebody else was first with the manifest; the reason tells it from a wrong `expected`.
ABORTS = ("EPOCH_LOST",)


def append(
    wire: Wire, session: str, turn: turn_pb2.TurnInput, durability: int = EDGE_ACK, timeout_s: float = ANSWER_S_MAX
) -> session_pb2.AppendTurnResponse:
    """One attempt at an append of one turn."""
    request = session_pb2.AppendTurnRequest(session_id=session, turns=[turn], durability=durability)
    return wire.sessions.AppendTurn(request, timeout=timeout_s)


def resume(
    wire: Wire, session: str, timeout_s: float = ANSWER_S_MAX, budget_tokens: int = 4000, **fields: object
) -> context_pb2.ActiveContext:
    """One attempt at a resume."""
    spec = context_pb2.ContextSpec(budget_tokens=budget_tokens)
    request = session_pb2.ResumeSessionRequest(session_id=session, context=spec, **fields)
    return wire.sessions.ResumeSession(request, timeout=timeout_s).context


class Gateways:
    """Writers on some sessions. A turn is sent until it is acknowledged, by whichever node, and then never again.

    cloud_share: of appends that ask for CLOUD. resume_share: of calls that are resumes. rate_per_s: of all writers
    together; 0 as fast as they can. refused: how often, by code and reason; '' for what no daemon answered.
    """

    def __init__(
        self,
        cluster: Cluster,
        sessions: list[str],
        writers: int,
        seed: int,
        history: History,
        cloud_share: float = 0.3,
        resume_share: float = 0.2,
        rate_per_s: int = 0,
    ) -> None:
        self.cluster = cluster
        self.sessions = sessions
        self.seed = seed
        self.history = history
        self.cloud_share = cloud_share
        self.resume_share = resume_share
        self.pause_s = writers / rate_per_s if rate_per_s else 0.0
        self.stop = threading.Event()
        self.changed = threading.Condition()
        self.acks = self.resumes = 0
        self.refused: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(writers)]

    def __enter__(self) -> Gateways:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """No new turns; returns when what was begun is acknowledged or given up."""
        self.stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, writer: int) -> None:
        wires: dict[str, Wire] = {}
        try:
            self._write(writer, wires)
        except BaseException as error:
            with self.changed:
                self.failures.append(f"writer {writer}: {error!r}")
                self.changed.notify_all()
        finally:
            for wire in wires.values():
                wire.close()

    def _write(self, writer: int, wires: dict[str, Wire]) -> None:
        rng = random.Random(self.seed * 1000 + writer)
        due, number = time.monotonic() + rng.random() * self.pause_s, 0
        while not self.stop.wait(max(0.0, due - time.monotonic())):
            due += self.pause_s
            session = rng.choice(self.sessions)
            if rng.random() < self.resume_share:
                self._resume(rng, wires, session)
                continue
            number += 1
            make = user if number % 2 else assistant
            size = rng.choice((3, 40, 400, 30_000 if rng.random() < 0.04 else 80))
            turn = make(f"w{writer}-{number}", f"turn {number} of writer {writer} " + "x" * size)
            durability = CLOUD_ACK if rng.random() < self.cloud_share else EDGE_ACK
            while not self._append(rng, wires, session, turn, durability):
                if self.stop.wait(rng.random() * 0.05):
                    return

    def _wire(self, wires: dict[str, Wire], member: Member) -> Wire:
        wire = wires.get(member.address)
        if wire is None:
            wire = wires[member.address] = Wire(member.address)
        return wire

    def _append(
        self, rng: random.Random, wires: dict[str, Wire], session: str, turn: turn_pb2.TurnInput, durability: int
    ) -> bool:
        wire = self._wire(wires, rng.choice(self.cluster.members))
        try:
            reply = append(wire, session, turn, durability, CALL_S_MAX)
        except grpc.RpcError as error:
            self._note(error)
            return False
        self.history.appended(session, durability, reply)
        with self.changed:
            self.acks += 1
            self.changed.notify_all()
        return True

    def _resume(self, rng: random.Random, wires: dict[str, Wire], session: str) -> None:
        wire = self._wire(wires, rng.choice(self.cluster.members))
        floor = self.history.floor(session)
        try:
            context = resume(wire, session, CALL_S_MAX)
        except grpc.RpcError as error:
            self._note(error)
            return
        self.history.resumed(session, floor, context.receipt)
        with self.changed:
            self.resumes += 1

    def _note(self, error: grpc.RpcError) -> None:
        answered = is_answered(error)
        reason = Refusal(error).reason if answered else ""
        with self.changed:
            self.refused[error.code().name, reason] += 1
            self.changed.notify_all()
        retryable = error.code() in RETRYABLE and (error.code() is not grpc.StatusCode.ABORTED or reason in ABORTS)
        if not retryable:
            raise error

    def wait_for(self, acks: int, seconds: float = PATIENCE_S) -> None:
        """Until so many more turns are acknowledged."""
        with self.changed:
            aim = self.acks + acks
            reached = self.changed.wait_for(lambda: self.acks >= aim or self.failures, timeout=seconds)
        assert not self.failures, self.failures
        assert reached, f"no progress: {self.acks} of {aim} acknowledged; {dict(self.refused)}"

    def told(self) -> str:
        """What happened, in a line."""
        return f"{self.acks} acknowledged, {self.resumes} resumed, refused {dict(self.refused)}"
