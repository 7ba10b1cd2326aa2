"""SIGKILL at any moment under concurrent writers: every acknowledged turn once and in order, versions never back."""

from __future__ import annotations

import random
import threading
from collections import defaultdict

import grpc
import pytest

from sessiond import config
from sessiond.testing import running_daemon
from sessiond.v1 import session_pb2, turn_pb2
from sessiond.verify import verify
from tests.wire import Wire, assistant, user

WRITERS = 16
SESSIONS = 6
# Acknowledged turns between two kills, drawn anew each time.
ACKS_BETWEEN_KILLS = (1, 160)
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


class Load:
    """Writers that go on over every kill, and what they were told."""

    def __init__(self, address: str, seed: int) -> None:
        self.address = address
        self.seed = seed
        self.stop = threading.Event()
        self.changed = threading.Condition()
        self.acks = 0
        self.acked: dict[str, dict[str, tuple[int, int, int]]] = defaultdict(dict)
        self.versions: dict[str, int] = defaultdict(int)
        self.failures: list[str] = []

    def run(self, writer: int) -> None:
        try:
            self._run(writer)
        except BaseException as error:
            with self.changed:
                self.failures.append(f"writer {writer}: {error!r}")
                self.changed.notify_all()

    def _run(self, writer: int) -> None:
        rng = random.Random(self.seed * 1000 + writer)
        wire = Wire(self.address)
        number = 0
        while not self.stop.is_set():
            session = f"s{rng.randrange(SESSIONS)}"
            turns = []
            for _ in range(rng.choice((1, 1, 1, 2, 5))):
                number += 1
                make = user if number % 2 else assistant
                size = rng.choice((3, 40, 400, 9000 if rng.random() < 0.05 else 80))
                turns.append(make(f"w{writer}-{number}", f"turn {number} of writer {writer} " + "x" * size))
            durability = turn_pb2.DURABILITY_CLOUD if rng.random() < 0.2 else turn_pb2.DURABILITY_EDGE
            reply = None
            while reply is None:
                floor = self.versions[session]
                try:
                    reply = wire.append(session, *turns, durability=durability)
                except grpc.RpcError as error:
                    if error.code() not in RETRYABLE:
                        raise
                    if self.stop.is_set():
                        wire.close()
                        return
                    # What was sent may be in the log or not; the same turn_ids go again.
                    self.stop.wait(0.01)
            with self.changed:
                assert reply.checkpoint_version >= floor, "a checkpoint version went back"
                self.versions[session] = max(self.versions[session], reply.checkpoint_version)
                for order, turn in enumerate(reply.turns):
                    known = (turn.position.epoch, turn.position.seq, number * 8 + order)
                    self.acked[session][turn.turn_id] = known
                if durability == turn_pb2.DURABILITY_CLOUD:
                    assert reply.cloud_seq >= max(turn.position.seq for turn in reply.turns)
                self.acks += len(reply.turns)
                self.changed.notify_all()
        wire.close()

    def wait_for(self, acks: int) -> None:
        with self.changed:
            reached = self.changed.wait_for(lambda: self.acks >= acks or self.failures, timeout=60)
        assert not self.failures, self.failures
        assert reached, f"no progress: {self.acks} of {acks} acknowledged"


def run_loop(kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with running_daemon(flush_interval_ms=50) as daemon:
        wire = Wire(daemon.address)
        for index in range(SESSIONS):
            wire.create(f"s{index}", user_id="u")
        load = Load(daemon.address, seed)
        threads = [threading.Thread(target=load.run, args=(writer,)) for writer in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(kills):
                load.wait_for(load.acks + rng.randint(*ACKS_BETWEEN_KILLS))
                daemon.kill()
                daemon.restart()
            load.wait_for(load.acks + 50)
        finally:
            load.stop.set()
            for thread in threads:
                thread.join()
        assert not load.failures, load.failures
        check(wire, load)
        wire.close()
        assert daemon.terminate() == 0
        settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
        assert verify(settings, lambda *_: None) == []
        total = sum(len(turns) for turns in load.acked.values())
        print(f"{kills} kills, {total} acknowledged turns, seed {seed}")


def check(wire: Wire, load: Load) -> None:
    for session, acked in load.acked.items():
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
        for turn_id, (epoch, seq, _) in acked.items():
            assert found.get(turn_id) == (epoch, seq), f"{session}: {turn_id} was acknowledged at {(epoch, seq)}"
        for numbers in by_writer.values():
            assert numbers == sorted(numbers)
        head = wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session)).session
        assert head.head.seq == last
        assert head.checkpoint.version >= load.versions[session]


def test_25_kills_under_16_writers_lose_and_double_nothing() -> None:
    run_loop(kills=25, seed=20261120)


@pytest.mark.torture
@pytest.mark.parametrize("seed", range(20))
def test_500_kills_under_16_writers_lose_and_double_nothing(seed: int) -> None:
    run_loop(kills=25, seed=seed)
