"""A write load that goes on over every crash, and remembers what it was promised. It never invents a turn_id twice."""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

from sessiond.client import Client, SessiondError, Unavailable, assistant, user
from sessiond.v1 import turn_pb2

# Every call of a writer may take this long, repeats over a restart included.
CALL_S: Final = 30.0
STALL_S: Final = 60.0
# How long a writer that met a stopped daemon waits before it sends the same turns again.
PAUSE_S: Final = 0.02


class Stalled(Exception):
    """The writers stopped making progress."""


class Load:
    """Writers in threads, each appending exchanges to sessions of its own; every fourth appends at CLOUD durability."""

    def __init__(self, server: str, sessions: Sequence[str], texts: Sequence[str], writers: int, seed: int) -> None:
        self.acked: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        # Turns that were in the log already when they were sent again: their first answer was lost with the daemon.
        self.answers_lost = 0
        self.cloud_acks = 0
        self.acks = 0
        self.last_ack_at = 0.0
        self._server = server
        self._texts = texts
        self._seed = seed
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._run, args=(number, sessions[number::writers]), name=f"writer-{number}")
            for number in range(writers)
        ]

    def start(self) -> None:
        """Begin to write."""
        for thread in self._threads:
            thread.start()

    def wait_for(self, acks: int) -> float:
        """Wait for this many more acknowledged turns; the time of the last. Raises Stalled, or what went wrong."""
        with self._changed:
            wanted = self.acks + acks
            reached = self._changed.wait_for(lambda: self.acks >= wanted or self._failure is not None, STALL_S)
            if self._failure is not None:
                raise self._failure
            if not reached:
                raise Stalled(
                    f"The writers got {wanted - self.acks} of {acks} acknowledgements too few in {STALL_S:.0f} s."
                )
            return self.last_ack_at

    def stop(self) -> None:
        """End it; whatever is under way is answered or given up first."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _run(self, number: int, sessions: Sequence[str]) -> None:
        rng = random.Random(self._seed * 100 + number)
        durability = "CLOUD" if number % 4 == 3 else "EDGE"
        try:
            with Client(self._server, timeout_s=CALL_S, retry_s=1.0) as client:
                sent = 0
                while not self._stop.is_set():
                    sent += 1
                    session_id = rng.choice(sessions)
                    turns = [
                        user(rng.choice(self._texts), turn_id=f"w{number}-{sent}-user"),
                        assistant(rng.choice(self._texts), turn_id=f"w{number}-{sent}-assistant"),
                    ]
                    self._append(client, session_id, turns, durability)
        except BaseException as failure:
            with self._changed:
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _append(self, client: Client, session_id: str, turns: list[turn_pb2.TurnInput], durability: str) -> None:
        while True:
            try:
                result = client.append(session_id, turns, durability=durability)
            except SessiondError as error:
                # Not acknowledged, and not known to be refused either: the same turns go again, or are given up.
                if not isinstance(error, Unavailable):
                    raise
                if self._stop.wait(PAUSE_S):
                    return
            else:
                self._acknowledge(session_id, result.turns, durability)
                return

    def _acknowledge(self, session_id: str, turns: Sequence[Any], durability: str) -> None:
        with self._changed:
            for turn in turns:
                self.acked[session_id][turn.turn_id] = (turn.position.epoch, turn.position.seq)
                self.answers_lost += turn.duplicate
            self.acks += len(turns)
            self.cloud_acks += len(turns) if durability == "CLOUD" else 0
            self.last_ack_at = time.monotonic()
            self._changed.notify_all()
