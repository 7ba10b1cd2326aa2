"""Writers that go on over every fault and every kill, what they were told, and what has to be true of it afterwards."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter, defaultdict

import grpc

from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.fault.world import CLOUD_ACK, EDGE_ACK, PATIENCE_S
from tests.wire import Refusal, Wire, assistant, user

RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)
UNCONFIRMED = context_pb2.OWNERSHIP_UNCONFIRMED


class Load:
    """Some writers on some sessions. One turn_id is sent until it is acknowledged, and then never again.

    cloud_share: of appends that ask for CLOUD. rate_per_s: of all writers together; 0 as fast as they can.
    calls: how often a call was refused, by code and reason; '' for what no daemon answered.
    """

    def __init__(
        self, address: str, sessions: list[str], writers: int, seed: int, cloud_share: float = 0, rate_per_s: int = 0
    ) -> None:
        self.address = address
        self.sessions = sessions
        self.seed = seed
        self.cloud_share = cloud_share
        self.pause_s = writers / rate_per_s if rate_per_s else 0.0
        self.stop = threading.Event()
        self.changed = threading.Condition()
        self.acks = 0
        self.unconfirmed = 0
        self.acked: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        self.versions: dict[str, int] = defaultdict(int)
        self.refused: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(writers)]

    def __enter__(self) -> Load:
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
        try:
            self._write(writer)
        except BaseException as error:
            with self.changed:
                self.failures.append(f"writer {writer}: {error!r}")
                self.changed.notify_all()

    def _write(self, writer: int) -> None:
        rng = random.Random(self.seed * 1000 + writer)
        wire = Wire(self.address)
        due, number = time.monotonic() + rng.random() * self.pause_s, 0
        while not self.stop.wait(max(0.0, due - time.monotonic())):
            due += self.pause_s
            number += 1
            session = rng.choice(self.sessions)
            make = user if number % 2 else assistant
            size = rng.choice((3, 40, 400, 30_000 if rng.random() < 0.04 else 80))
            turn = make(f"w{writer}-{number}", f"turn {number} of writer {writer} " + "x" * size)
            durability = CLOUD_ACK if rng.random() < self.cloud_share else EDGE_ACK
            if not self._send(wire, session, turn, durability):
                break
        wire.close()

    def _send(self, wire: Wire, session: str, turn: turn_pb2.TurnInput, durability: int) -> bool:
        """Until it is acknowledged; False if the load ended first."""
        while True:
            floor = self.versions[session]
            try:
                reply = wire.append(session, turn, durability=durability)
                break
            except grpc.RpcError as error:
                self._note(error)
                if self.stop.is_set():
                    return False
                self.stop.wait(0.05)
        with self.changed:
            (placed,) = reply.turns
            assert placed.turn_id == turn.turn_id
            assert reply.checkpoint_version >= floor, "a checkpoint version went back"
            assert reply.durability >= durability
            assert durability < CLOUD_ACK or reply.cloud_seq >= placed.position.seq
            self.versions[session] = max(self.versions[session], reply.checkpoint_version)
            self.acked[session][turn.turn_id] = (placed.position.epoch, placed.position.seq)
            self.acks += 1
            self.unconfirmed += reply.ownership == UNCONFIRMED
            self.changed.notify_all()
        return True

    def _note(self, error: grpc.RpcError) -> None:
        answered = is_answered(error)
        with self.changed:
            self.refused[error.code().name, Refusal(error).reason if answered else ""] += 1
            self.changed.notify_all()
        if error.code() not in RETRYABLE:
            raise error
        if answered:
            assert Refusal(error).retry_ms > 0, f"{Refusal(error).reason} without a delay"

    def wait_for_answers(self, calls: int) -> None:
        """Until so many more calls were acknowledged or refused."""

        def answers() -> int:
            return self.acks + self.refused.total()

        with self.changed:
            aim = answers() + calls
            reached = self.changed.wait_for(lambda: answers() >= aim or self.failures, timeout=PATIENCE_S)
        assert not self.failures, self.failures
        assert reached, f"no answers: {answers()} of {aim}"

    def wait_for(self, acks: int) -> None:
        """Until so many more turns are acknowledged."""
        with self.changed:
            aim = self.acks + acks
            reached = self.changed.wait_for(lambda: self.acks >= aim or self.failures, timeout=PATIENCE_S)
        assert not self.failures, self.failures
        assert reached, f"no progress: {self.acks} of {aim} acknowledged; {dict(self.refused)}"

    def check(self, wire: Wire) -> None:
        """Everything that was acknowledged is in the log, once, in its place and in its writer's order."""
        assert not self.failures, self.failures
        for session, acked in self.acked.items():
            found: dict[str, tuple[int, int]] = {}
            by_writer: dict[str, list[int]] = defaultdict(list)
            last = 0
            for turn in wire.turns(session):
                assert turn.seq == last + 1, f"{session}: turn {last + 1} is missing"
                last = turn.seq
                assert turn.turn_id not in found, f"{session}: {turn.turn_id} was applied twice"
                found[turn.turn_id] = (turn.epoch, turn.seq)
                writer, number = turn.turn_id.split("-")
                by_writer[writer].append(int(number))
            for turn_id, place in acked.items():
                assert found.get(turn_id) == place, f"{session}: {turn_id} was acknowledged at {place}"
            for numbers in by_writer.values():
                assert numbers == sorted(numbers), f"{session}: a writer's turns are out of order"
            head = wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30).session
            assert head.head.seq == last
            assert head.checkpoint.version >= self.versions[session]


def is_answered(error: grpc.RpcError) -> bool:
    """Whether it is the daemon that refused, and not the lack of one."""
    return "grpc-status-details-bin" in dict(error.trailing_metadata() or ())
