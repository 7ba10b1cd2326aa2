"""Hot resume: against a bare handler that returns the same bytes, and of a long session against a short one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import Bare, Load, running_bare
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, session_pb2

CALLERS = 16
CONNECTIONS = 4
AGAINST = "bare handler, same bytes"


@pytest.fixture(scope="module")
def daemon(size: Any) -> Iterator[Daemon]:
    with running_daemon() as running:
        with wire.Client(running.address) as client:
            for turns in (100, 1000, size.of(10_000, 2_000)):
                talk.make_session(client, f"turns-{turns}", turns)
            client.settle()
        yield running


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[wire.Client]:
    with wire.Client(daemon.address) as made:
        yield made


def context_of(reply: bytes) -> context_pb2.ActiveContext:
    return session_pb2.ResumeSessionResponse.FromString(reply).context


@pytest.fixture(scope="module")
def request_bytes() -> bytes:
    return wire.resume_request("turns-1000")


@pytest.fixture(scope="module")
def bare(client: wire.Client, request_bytes: bytes) -> Iterator[Bare]:
    reply = client.raw(wire.RESUME)(request_bytes)
    context = context_of(reply)
    assert context.receipt.rung == context_pb2.RUNG_HOT
    assert 2500 < context.tokens.total <= 4000
    with running_bare(reply) as running:
        yield running


def test_one_caller(
    benchmark: Any, ledger: Any, size: Any, daemon: Daemon, client: wire.Client, bare: Bare, request_bytes: bytes
) -> None:
    ours = client.raw(wire.RESUME)
    with wire.Client(bare.address) as other:
        theirs = other.raw(wire.RESUME)
        rounds, calls = size.of(60, 3), size.of(300, 50)
        mine, facing = ratio.by_calls(
            benchmark, lambda: ours(request_bytes), lambda: theirs(request_bytes), rounds, calls
        )
    case = "hot resume, 1,000 turns, 4,000 tokens, one caller"
    for name, share, promise in (("p50", 0.5, "hot p50"), ("p99", 0.99, "hot p99")):
        ledger.add(
            case,
            name,
            AGAINST,
            "s",
            [ratio.percentile(block, share) for block in mine],
            [ratio.percentile(block, share) for block in facing],
            promise,
        )
    benchmark.extra_info["ratio"] = ledger.ratios[-2].ratio
    assert daemon.pid


def test_with_a_new_message(
    benchmark: Any, ledger: Any, size: Any, client: wire.Client, bare: Bare, request_bytes: bytes
) -> None:
    # What a gateway sends that knows what the user just said: its tokens are counted while the call waits.
    asked = wire.resume_request("turns-1000", new_message=talk.text(7, 200))
    ours, rounds, calls = client.raw(wire.RESUME), size.of(30, 3), size.of(300, 50)
    with wire.Client(bare.address) as other:
        theirs = other.raw(wire.RESUME)
        mine, facing = ratio.by_calls(benchmark, lambda: ours(asked), lambda: theirs(request_bytes), rounds, calls)
    made = ledger.add(
        "hot resume, 1,000 turns, with a new message of 200 bytes",
        "p50",
        AGAINST,
        "s",
        [ratio.percentile(block, 0.5) for block in mine],
        [ratio.percentile(block, 0.5) for block in facing],
    )
    benchmark.extra_info["ratio"] = made.ratio


def test_calls_per_second(
    benchmark: Any, ledger: Any, size: Any, daemon: Daemon, bare: Bare, request_bytes: bytes
) -> None:
    calls, rounds = size.of(4000, 400), size.of(12, 2)
    with Load(CALLERS, CONNECTIONS) as load:

        def run(address: str, pid: int) -> dict[str, float]:
            before = wire.cpu_s(pid)
            answer = load.run(address, wire.RESUME, calls, [request_bytes])
            answer["server_cpu_s"] = wire.cpu_s(pid) - before
            return answer

        mine, facing = ratio.by_blocks(
            benchmark, lambda: run(daemon.address, daemon.pid), lambda: run(bare.address, bare.pid), rounds
        )
    case = f"hot resume, 1,000 turns, {CALLERS} callers"
    made = ledger.add(
        case,
        "calls/s",
        AGAINST,
        "/s",
        [answer["calls"] / answer["seconds"] for answer in mine],
        [answer["calls"] / answer["seconds"] for answer in facing],
        "hot calls",
    )
    ledger.add(
        case,
        "server CPU a call",
        AGAINST,
        "s",
        [answer["server_cpu_s"] / answer["calls"] for answer in mine],
        [answer["server_cpu_s"] / answer["calls"] for answer in facing],
    )
    for name in ("p50", "p99"):
        ledger.add(
            case,
            name,
            AGAINST,
            "s",
            [answer[f"{name}_s"] for answer in mine],
            [answer[f"{name}_s"] for answer in facing],
        )
    busy = [answer["server_cpu_s"] / answer["seconds"] for answer in mine + facing]
    driven = [answer["cpu_s"] / answer["calls"] for answer in mine + facing]
    ledger.note(
        case,
        f"cores in use by the server: {min(busy):.2f} - {max(busy):.2f}; CPU of the load generator a call: "
        f"{min(driven) * 1e6:.0f} - {max(driven) * 1e6:.0f} us",
    )
    benchmark.extra_info["ratio"] = made.ratio


def test_long_session_against_a_short_one(benchmark: Any, ledger: Any, size: Any, client: wire.Client) -> None:
    long = size.of(10_000, 2_000)
    asked, short = wire.resume_request(f"turns-{long}"), wire.resume_request("turns-100")
    call, rounds, calls = client.raw(wire.RESUME), size.of(60, 3), size.of(300, 50)
    windows = [context_of(call(request)) for request in (asked, short)]
    # The same work: as many turns of as many tokens.
    assert len(windows[0].turns) == len(windows[1].turns)
    assert windows[0].tokens.tail == windows[1].tokens.tail
    mine, facing = ratio.by_calls(benchmark, lambda: call(asked), lambda: call(short), rounds, calls)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        made = ledger.add(
            f"hot resume, {long:,} turns, one caller",
            name,
            "the same of 100 turns",
            "s",
            [ratio.percentile(block, share) for block in mine],
            [ratio.percentile(block, share) for block in facing],
            "hot long" if name == "p50" else "",
        )
        benchmark.extra_info[f"ratio_{name}"] = made.ratio
