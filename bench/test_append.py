"""Durable appends of one turn of 800 bytes: EDGE of one caller and of 64, CLOUD, and what counting its tokens takes.

Each on the disk of the temporary folder, where fsync may take longer than everything else together, and in memory,
where it takes nothing and what is left is ours.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import inside, ratio, talk, wire
from bench.load import DIGITS
from bench.processes import Load, running_bare
from sessiond.testing import Daemon, running_daemon
from sessiond.tokens import Tokenizer
from sessiond.v1 import session_pb2, turn_pb2

# Turns of a session before the first append that counts.
BEFORE = 200
CALLERS = 64
CONNECTIONS = 8


MEMORY = Path("/dev/shm")
PLACES = [
    "disk",
    pytest.param("memory", marks=pytest.mark.skipif(not MEMORY.is_dir(), reason="this machine has no /dev/shm")),
]


@pytest.fixture(scope="module", params=PLACES)
def place(request: Any) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(place: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-append-", dir=MEMORY if place == "memory" else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def daemon(folder: Path) -> Iterator[Daemon]:
    with running_daemon(folder / "daemon") as running:
        with wire.Client(running.address) as client:
            names = ["edge", "cloud", "counted", *(f"caller-{number}" for number in range(CALLERS))]
            talk.make_sessions(client, names, BEFORE)
            client.settle()
        yield running


@pytest.fixture(scope="module")
def client(daemon: Daemon) -> Iterator[wire.Client]:
    with wire.Client(daemon.address) as made:
        yield made


def appends(
    client: wire.Client, session_id: str, durability: int = turn_pb2.DURABILITY_EDGE, supplied: bool = False
) -> Callable[[], bytes]:
    """A call that appends the next turn. The requests are made before, so that making them is not measured."""
    call = client.raw(wire.APPEND)
    template = wire.append_request(session_id, talk.turn(1, supplied), durability)
    numbers = itertools.count(BEFORE + 1)
    body, at = with_counter(template)
    assistant = template.turns[0]
    assistant.role = turn_pb2.ROLE_ASSISTANT
    answer, answer_at = with_counter(template)

    def append() -> bytes:
        number = next(numbers)
        kind, place = (body, at) if number % 2 else (answer, answer_at)
        return call(kind[:place] + b"%012d" % number + kind[place + DIGITS :])

    return append


def with_counter(request: session_pb2.AppendTurnRequest) -> tuple[bytes, int]:
    """(the request's bytes, where the digits of its turn's id stand)."""
    raw = bytes(request.SerializeToString())
    return raw, raw.index(b"turn-") + len(b"turn-")


def reply_of(raw: bytes) -> session_pb2.AppendTurnResponse:
    answer = session_pb2.AppendTurnResponse.FromString(raw)
    assert answer.outcome == session_pb2.APPEND_OUTCOME_APPENDED
    return answer


def test_edge_one_caller(
    benchmark: Any, ledger: Any, size: Any, daemon: Daemon, client: wire.Client, folder: Path, place: str
) -> None:
    rounds, calls = size.of(15, 3), size.of(200, 10)
    recorded, environment, written = inside.record_appends(folder / "recorded", BEFORE, size.of(512, 32))
    ours = appends(client, "edge")
    reply = ours()
    assert reply_of(reply).durability == turn_pb2.DURABILITY_EDGE
    asked = wire.append_request("edge", talk.turn(1, False)).SerializeToString()
    with (
        running_bare(reply, rows=str(recorded), lmdb=str(environment)) as bare,
        wire.Client(bare.address) as other,
    ):
        theirs = other.raw(wire.APPEND)
        before = wire.cpu_s(daemon.pid), wire.cpu_s(bare.pid)
        mine, facing = ratio.by_calls(benchmark, ours, lambda: theirs(asked), rounds, calls)
        after = wire.cpu_s(daemon.pid), wire.cpu_s(bare.pid)
    case = f"append EDGE, one caller, {place}"
    for name, share, promise in (("p50", 0.5, "append one"), ("p99", 0.99, "")):
        made = ledger.add(
            case,
            name,
            "bare handler + LMDB commit of the same rows",
            "s",
            [ratio.percentile(block, share) for block in mine],
            [ratio.percentile(block, share) for block in facing],
            promise,
        )
        benchmark.extra_info[f"ratio_{name}"] = made.ratio
    done = (rounds + 1) * calls
    ledger.note(
        case,
        f"{written:,} bytes of rows an append; CPU a call {(after[0] - before[0]) / done * 1e6:.0f} us, background "
        f"flush included, against {(after[1] - before[1]) / done * 1e6:.0f} us",
    )


def test_edge_many_callers(
    benchmark: Any, ledger: Any, size: Any, daemon: Daemon, client: wire.Client, place: str
) -> None:
    rounds, calls = size.of(10, 2), size.of(2000, 256)
    # Every other caller writes the user's turns, and every other the assistant's, which make checkpoints.
    made = [
        with_counter(wire.append_request(f"caller-{number}", talk.turn(1 + number % 2, False)))
        for number in range(CALLERS)
    ]
    bodies, counter_at = [body for body, _ in made], [at for _, at in made]
    probe = made[0][0]
    digits = slice(made[0][1], made[0][1] + DIGITS)
    first = bytearray(probe)
    first[digits] = b"9" * DIGITS
    reply = client.raw(wire.APPEND)(bytes(first))
    reply_of(reply)
    with running_bare(reply) as bare, Load(CALLERS, CONNECTIONS) as load:
        before = client.status().group_commit

        def run(address: str, pid: int) -> dict[str, float]:
            spent = wire.cpu_s(pid)
            answer = load.run(address, wire.APPEND, calls, bodies, counter_at)
            answer["server_cpu_s"] = wire.cpu_s(pid) - spent
            return answer

        mine, facing = ratio.by_blocks(
            benchmark, lambda: run(daemon.address, daemon.pid), lambda: run(bare.address, bare.pid), rounds
        )
        after = client.status().group_commit
    case = f"append EDGE, {CALLERS} callers, {place}"
    against = "bare handler, same reply"
    figure = ledger.add(
        case,
        "calls/s",
        against,
        "/s",
        [answer["calls"] / answer["seconds"] for answer in mine],
        [answer["calls"] / answer["seconds"] for answer in facing],
        "append many",
    )
    benchmark.extra_info["ratio"] = figure.ratio
    ledger.add(
        case,
        "server CPU a call",
        against,
        "s",
        [answer["server_cpu_s"] / answer["calls"] for answer in mine],
        [answer["server_cpu_s"] / answer["calls"] for answer in facing],
    )
    for name in ("p50", "p99"):
        ledger.add(
            case,
            name,
            against,
            "s",
            [answer[f"{name}_s"] for answer in mine],
            [answer[f"{name}_s"] for answer in facing],
        )
    group = (after.appends - before.appends) / max(1, after.commits - before.commits)
    busy = [answer["server_cpu_s"] / answer["seconds"] for answer in mine]
    ledger.note(
        case,
        f"{group:.1f} writes a commit on average, {after.group_max} at most; cores in use by the daemon: "
        f"{min(busy):.2f} - {max(busy):.2f}",
    )


def test_cloud_on_a_folder(benchmark: Any, ledger: Any, size: Any, client: wire.Client, place: str) -> None:
    rounds, calls = size.of(10, 3), size.of(100, 5)
    ours, theirs = appends(client, "cloud", turn_pb2.DURABILITY_CLOUD), appends(client, "edge-beside")
    talk.make_session(client, "edge-beside", BEFORE)
    assert reply_of(ours()).durability == turn_pb2.DURABILITY_CLOUD
    mine, facing = ratio.by_calls(benchmark, ours, theirs, rounds, calls)
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        made = ledger.add(
            f"append CLOUD on a folder, one caller, {place}",
            name,
            "append EDGE",
            "s",
            [ratio.percentile(block, share) for block in mine],
            [ratio.percentile(block, share) for block in facing],
        )
        benchmark.extra_info[f"ratio_{name}"] = made.ratio


def test_counting_tokens(benchmark: Any, ledger: Any, size: Any, client: wire.Client, place: str) -> None:
    # Both encodings, as an append does it, against the same append with the counts supplied.
    rounds, calls = size.of(15, 3), size.of(100, 10)
    tokenizer = Tokenizer()
    tokenizer.warm()
    message = talk.turn(1, False).message
    counted, supplied = appends(client, "counted", supplied=False), appends(client, "supplied-beside", supplied=True)
    talk.make_session(client, "supplied-beside", BEFORE)
    mine, facing = ratio.by_calls(benchmark, counted, supplied, rounds, calls)
    case = f"append EDGE, one caller, {place}, tokens counted"
    whole = [ratio.percentile(block, 0.5) for block in mine]
    ledger.add(
        case, "p50", "the same with counts supplied", "s", whole, [ratio.percentile(block, 0.5) for block in facing]
    )
    counting = []
    for _ in whole:
        block = sorted(
            wire.timed(lambda _: sum(tokenizer.count_message(message, encoding) for encoding in talk.ENCODINGS), b"")  # type: ignore[arg-type,return-value]
            for _ in range(50)
        )
        counting.append(ratio.percentile(block, 0.5))
    made = ledger.add(
        "tiktoken, one turn of 800 bytes, both encodings",
        "p50",
        f"the whole append EDGE, {place}",
        "s",
        counting,
        whole,
        "counting",
    )
    benchmark.extra_info["share"] = made.ratio
