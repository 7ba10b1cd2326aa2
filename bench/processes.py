"""The processes that cases start: bare servers and the load generator. Daemons come from `sessiond.testing`.

It promises that each is ended by its process id when its block ends, and that a process that does not answer ends the
run instead of stopping it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import talk, wire
from bench.servers import Missing
from sessiond.testing import HOST, free_port
from sessiond.v1 import session_pb2

ROOT = Path(__file__).resolve().parents[1]
# The environment that `make bench` makes for the peers.
PEERS_PYTHON = "build/bench/peers/bin/python"
# Longer than any run of the load generator.
ANSWER_S_MAX = 300.0
# Above every number that setting up uses: a turn_id that was used with other content is refused.
FIRST_NUMBER = 1_000_000
CALLS_MAX = 10_000_000
MADE_AT_ONCE = 5000
BATCHED = 32


def environment() -> dict[str, str]:
    """This process's, without settings of a daemon, and with this checkout first on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SESSIOND_")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    return kept


@dataclass(frozen=True)
class Bare:
    """A bare server at work."""

    address: str
    pid: int


def bare_command(listen: str, reply: Path, **more: Any) -> list[str]:
    """What starts a bare server."""
    return [sys.executable, "-m", "bench.bare", json.dumps({"listen": listen, "reply": str(reply), **more})]


@contextlib.contextmanager
def running_bare(reply: bytes, env: dict[str, str] | None = None, probe: bytes = b"", **more: Any) -> Iterator[Bare]:
    """A bare server that returns the reply. more: as `bench.bare` says. probe: a request that it can answer."""
    with tempfile.TemporaryDirectory(prefix="bench-bare-") as folder:
        path = Path(folder, "reply")
        path.write_bytes(reply)
        address = f"{HOST}:{free_port()}"
        process = subprocess.Popen(
            bare_command(address, path, **more),
            stdin=subprocess.DEVNULL,
            env={**environment(), **(env or {})},
            cwd=ROOT,
        )
        try:
            with wire.Client(address) as client:
                first = client.channel.unary_unary(wire.RESUME)
                assert first(probe, timeout=wire.TIMEOUT_S, wait_for_ready=True) == reply
            yield Bare(address, process.pid)
        finally:
            process.kill()
            process.wait()


class Peers:
    """The process of the peers, in the environment that `make bench` makes for them.

    Raises Missing where that environment is not there.
    """

    def __init__(self) -> None:
        python = Path(os.environ.get("BENCH_PEERS_PYTHON") or ROOT / PEERS_PYTHON)
        if not python.exists():
            raise Missing("the peers' packages are missing; make bench installs them")
        self._process = subprocess.Popen(
            # Only the folder of the benchmarks on the path: nothing of the daemon is imported there.
            [str(python), "-m", "bench.peers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "LANGSMITH_TRACING": "false", "OPENAI_API_KEY": "none"},
            cwd=ROOT,
            text=True,
        )
        try:
            self.versions: dict[str, str] = self._answer()
        except BaseException:
            self.close()
            raise

    def fill(self, peer: str, turns: int, texts: Path, where: dict[str, Any]) -> None:
        """Make a session of so many turns."""
        done = self._ordered({"fill": peer, "turns": turns, "texts": str(texts), "where": where})
        assert done["turns"] == turns

    def read(self, peer: str, turns: int, budget: int, calls: int, seconds: float) -> dict[str, Any]:
        """Read it: as `bench.peers` says."""
        return self._ordered({"read": peer, "turns": turns, "budget": budget, "calls": calls, "seconds": seconds})

    def _ordered(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = threading.Timer(ANSWER_S_MAX, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
            watch.join()
        if not line:
            raise RuntimeError("the peers' process ended; its error stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Load:
    """The load generator: one process for both sides, so that both are driven the same way."""

    def __init__(self, callers: int, connections: int, first: int = FIRST_NUMBER) -> None:
        """first: of the numbers that calls get; generators that write to the same sessions start far apart."""
        self._callers = callers
        self._connections = connections
        self._first = first
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
            text=True,
        )

    def run(
        self,
        address: str,
        path: str,
        calls: int,
        bodies: list[bytes],
        counter_at: list[int] | None = None,
        **more: float,
    ) -> dict[str, float]:
        """One run; the generator's answer. calls: 0 where `for_s` ends it. more: as `bench.load` says."""
        order = {
            "port": int(address.rpartition(":")[2]),
            "path": path,
            "bodies": [body.hex() for body in bodies],
            "counter_at": counter_at or [-1] * len(bodies),
            "first": self._first,
            "connections": self._connections,
            "callers": self._callers,
            **({"calls": calls} if calls else {}),
            **more,
        }
        # Without a number of calls: more than any run makes.
        self._first += calls or CALLS_MAX
        return self._ordered(order)

    def begin(self, *args: Any, **more: Any) -> Future[dict[str, float]]:
        """The same beside what this process does meanwhile."""
        answer: Future[dict[str, float]] = Future()

        def wait() -> None:
            try:
                answer.set_result(self.run(*args, **more))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=wait, name="load", daemon=True).start()
        return answer

    def make(self, address: str, names: list[str], turns: int, turn_bytes: int) -> None:
        """Sessions of so many turns of so many bytes, their counts supplied: far more than a stub could make."""
        said = [talk.turn(number, turn_bytes=turn_bytes) for number in range(1, turns + 1)]
        for start in range(0, len(names), MADE_AT_ONCE):
            part = names[start : start + MADE_AT_ONCE]
            creates = [session_pb2.CreateSessionRequest(session_id=name).SerializeToString() for name in part]
            self.run(address, wire.CREATE, len(part), creates, each=True)
            batches = [
                session_pb2.BatchAppendTurnsRequest(
                    requests=[
                        session_pb2.AppendTurnRequest(session_id=name, turns=said)
                        for name in part[first : first + BATCHED]
                    ]
                ).SerializeToString()
                for first in range(0, len(part), BATCHED)
            ]
            self.run(address, wire.BATCH_APPEND, len(batches), batches, each=True)

    def crowd(self, address: str, path: str, bodies: list[bytes], retry_ms: int) -> Future[dict[str, float]]:
        """Everybody at once, as soon as the address can be connected to; the answer comes when all have theirs.

        The generator waits for the port from now on, so that it is ready before the server is.
        """
        order = {
            "crowd": True,
            "port": int(address.rpartition(":")[2]),
            "path": path,
            "bodies": [body.hex() for body in bodies],
            "connections": self._connections,
            "retry_ms": retry_ms,
        }
        answer: Future[dict[str, float]] = Future()

        def wait() -> None:
            try:
                answer.set_result(self._ordered(order))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=wait, name="crowd", daemon=True).start()
        return answer

    def _ordered(self, order: dict[str, Any]) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        # A server that hangs: the generator notices by itself; this is for a generator that does not.
        watch = threading.Timer(ANSWER_S_MAX, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
            watch.join()
        if not line:
            raise RuntimeError("the load generator ended; its error stands above")
        answer: dict[str, float] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the generator."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
