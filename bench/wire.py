"""The client of every case: raw bytes in, raw bytes out, so that neither side of a ratio pays for protobuf here.

It promises the same channel, the same options and the same deadline for both sides. It never retries.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from sessiond.v1 import admin_pb2, admin_pb2_grpc, context_pb2, session_pb2, session_pb2_grpc, turn_pb2

# A call that hangs ends the run instead of stopping it.
TIMEOUT_S = 30.0
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", 64 * 1024**2),
    ("grpc.initial_reconnect_backoff_ms", 5),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 20),
]
SERVICE = "/sessiond.v1.SessionService/"
RESUME = SERVICE + "ResumeSession"
APPEND = SERVICE + "AppendTurn"
CREATE = SERVICE + "CreateSession"
BATCH_RESUME = SERVICE + "BatchResumeSessions"
BATCH_APPEND = SERVICE + "BatchAppendTurns"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class Client:
    """One channel to one server; `raw` for measuring, the stubs for setting up and looking."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=OPTIONS)
        self.sessions = session_pb2_grpc.SessionServiceStub(self.channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self.channel)

    def raw(self, path: str) -> Callable[[bytes], bytes]:
        """A call of the path: request bytes to reply bytes, no serializer on either side."""
        call = self.channel.unary_unary(path)
        return lambda request: call(request, timeout=TIMEOUT_S)

    def status(self) -> admin_pb2.GetStatusResponse:
        """The node's counters."""
        return self.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=TIMEOUT_S)

    def store_requests(self) -> dict[str, int]:
        """Requests that went to the object store, by kind, whatever became of them."""
        counts: dict[str, int] = {}
        for row in self.status().cloud.requests:
            counts[row.kind] = counts.get(row.kind, 0) + row.count
        return counts

    def settle(self) -> None:
        """Write everything to the cloud tier, so that no flush runs into what is measured next."""
        answer = self.admin.Flush(admin_pb2.FlushRequest(), timeout=TIMEOUT_S * 4)
        assert not answer.failed_sessions, answer

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def resume_request(session_id: str, read_only: bool = False, new_message: str = "") -> bytes:
    """A resume at a budget of 4,000 tokens, everything else by default."""
    context = context_pb2.ContextSpec(budget_tokens=4000)
    if new_message:
        context.new_message.parts.add(text=new_message)
    request = session_pb2.ResumeSessionRequest(session_id=session_id, context=context, read_only=read_only)
    return bytes(request.SerializeToString())


def append_request(
    session_id: str, turn: turn_pb2.TurnInput, durability: int = turn_pb2.DURABILITY_EDGE
) -> session_pb2.AppendTurnRequest:
    """An append of one turn."""
    return session_pb2.AppendTurnRequest(session_id=session_id, turns=[turn], durability=durability)  # type: ignore[arg-type]


def family(pid: int) -> list[int]:
    """The process and all that descend from it: a daemon may have workers."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # It may end between the look and the read.
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, its threads and its descendants so far, in steps of a clock tick (10 ms)."""
    ticks = 0
    for one in family(pid):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        # Own user and system time, and that of children that ended and were waited for.
        ticks += sum(int(value) for value in fields[11:15])
    return ticks / CLOCK_TICKS


def anonymous_bytes(pid: int) -> list[int]:
    """Resident memory without mapped files of the process and of each that descends from it."""
    found = []
    for one in family(pid):
        text = Path(f"/proc/{one}/status").read_text()
        found.append(next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon:")) * 1024)
    return found


def timed(call: Callable[[bytes], bytes], request: bytes) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call(request)
    return time.perf_counter() - started
