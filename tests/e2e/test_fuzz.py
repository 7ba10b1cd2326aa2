"""Random and mutated requests to every method: never INTERNAL or UNKNOWN, the daemon lives, the store stays sound."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sessiond import config
from sessiond.testing import Daemon, running_daemon
from sessiond.transport.server import SERVICES
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.wire import Refusal, Wire, assistant, tool_call, tool_result, user

METHODS = {
    f"/{service.full_name}/{method.name}": method
    for service in SERVICES
    for method in service.methods
    # One drain, and the rest would only see NODE_DRAINING.
    if method.name != "Drain"
}
SESSIONS = ["fuzz-1", "fuzz-2", "fuzz-3"]
# What the daemon must never answer to whatever it is sent: a defect, or a damaged store.
NEVER = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS, grpc.StatusCode.CANCELLED}
often = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

VALID: list[tuple[str, Message]] = [
    ("CreateSession", session_pb2.CreateSessionRequest(session_id="fuzz-4", user_id="ada", metadata={"a": "b"})),
    ("GetSession", session_pb2.GetSessionRequest(session_id="fuzz-1", user_id="ada")),
    ("ListSessions", session_pb2.ListSessionsRequest(user_id="ada", page_size=3)),
    (
        "UpdateSession",
        session_pb2.UpdateSessionRequest(
            session_id="fuzz-1",
            turn_id="u1",
            etag="1-3",
            change=turn_pb2.StateChange(
                flags={"f": True},
                mode="m",
                metadata={"k": "v"},
                pins=[turn_pb2.PinnedFact(key="k", value="v")],
                policy=turn_pb2.SessionPolicy(budget_tokens=900),
            ),
        ),
    ),
    (
        "ResumeSession",
        session_pb2.ResumeSessionRequest(
            session_id="fuzz-2",
            context=context_pb2.ContextSpec(
                budget_tokens=900,
                reserve_tokens=10,
                strategy=turn_pb2.STRATEGY_LAST_N,
                last_exchanges=2,
                instructions="Be brief.",
                new_message=turn_pb2.Message(parts=[turn_pb2.Part(text="And now?")]),
                since=turn_pb2.TurnPosition(epoch=1, seq=2, chain=bytes(range(16))),
            ),
            highest_acked=turn_pb2.TurnPosition(epoch=1, seq=4, chain=bytes(range(16))),
            known_checkpoint_version=5,
        ),
    ),
    (
        "AppendTurn",
        session_pb2.AppendTurnRequest(
            session_id="fuzz-3",
            turns=[
                user("a1", "Hello."),
                tool_call("a2", ("c", "f")),
                tool_result("a3", "c", "x"),
                assistant("a4", "Hi."),
            ],
            expected=turn_pb2.TurnPosition(epoch=1, seq=2),
            conflict_mode=session_pb2.CONFLICT_MODE_RETURN_TAIL,
            durability=turn_pb2.DURABILITY_CLOUD,
            context=context_pb2.ContextSpec(budget_tokens=900),
        ),
    ),
    (
        "AppendTurn",
        session_pb2.AppendTurnRequest(
            session_id="fuzz-1",
            turns=[
                turn_pb2.TurnInput(turn_id="b1", rewind=turn_pb2.Rewind(to_seq=1)),
                turn_pb2.TurnInput(turn_id="b2", milestone=turn_pb2.Milestone(label="here")),
                turn_pb2.TurnInput(
                    turn_id="b3",
                    summary=turn_pb2.Summary(
                        text="They spoke.", covered=turn_pb2.SeqRange(first_seq=1, last_seq=2), covered_chain=bytes(16)
                    ),
                ),
            ],
        ),
    ),
    ("ListTurns", session_pb2.ListTurnsRequest(session_id="fuzz-1", page_size=3, first_seq=2, last_seq=9)),
    ("ListCheckpoints", session_pb2.ListCheckpointsRequest(session_id="fuzz-1")),
    ("DeleteSession", session_pb2.DeleteSessionRequest(session_id="fuzz-3", user_id="eve")),
    ("Release", admin_pb2.ReleaseRequest(session_ids=["fuzz-2", "fuzz-9"])),
    ("Flush", admin_pb2.FlushRequest(session_id="fuzz-1")),
]
PATHS = {path.rsplit("/", 1)[1]: path for path in METHODS}


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running_daemon(flush_interval_ms=50) as running:
        with contextlib.closing(Wire(running.address)) as wire:
            for name in SESSIONS:
                wire.create(name, user_id="ada")
                wire.append(name, user("t1", "Hello."), assistant("t2", "Hello!"))
        yield running
        # Whatever was let in holds every invariant.
        assert running.terminate() == 0
        found = config.load(None, {}, {"data_dir": str(running.data_dir), "cloud": running.cloud})
        assert verify(found, lambda *_: None) == []


@pytest.fixture(scope="module")
def wire(daemon: Daemon) -> Iterator[Wire]:
    stubs = Wire(daemon.address)
    yield stubs
    stubs.close()


def check(daemon: Daemon, wire: Wire, path: str, sent: bytes) -> grpc.StatusCode:
    """Send it; whatever comes back is an answer, or a refusal with its details."""
    if METHODS[path].server_streaming:
        # A watch that is let in tells at once how the session stands, and then goes on for as long as somebody listens.
        call: Any = wire.channel.unary_stream(path)(sent, timeout=60)
        error = _error(lambda: next(call))
        call.cancel()
    else:
        error = wire.channel.unary_unary(path).future(sent, timeout=60).exception()
    if error is None:
        return grpc.StatusCode.OK
    found = Refusal(error)
    assert found.code not in NEVER, f"{path} {sent.hex()}: {found.reason} {found.message}\n{daemon.log()[-3000:]}"
    assert daemon.process is not None
    assert daemon.process.poll() is None
    return found.code


def _error(call: Any) -> grpc.RpcError | None:
    try:
        call()
    except grpc.RpcError as error:
        return error
    return None


@often
@given(path=st.sampled_from(sorted(METHODS)), sent=st.binary(max_size=200))
def test_random_bytes_are_refused_or_answered(daemon: Daemon, wire: Wire, path: str, sent: bytes) -> None:
    check(daemon, wire, path, sent)


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A valid request with a few bytes changed, dropped, doubled or put in."""
    name, message = draw(st.sampled_from(VALID))
    sent = bytearray(message.SerializeToString(deterministic=True))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(sent) - 1)))
        match draw(st.sampled_from(["flip", "set", "drop", "insert", "double", "cut"])):
            case "flip":
                sent[at : at + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in sent[at : at + 1])
            case "set":
                sent[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
            case "drop":
                del sent[at : at + draw(st.integers(1, 8))]
            case "insert":
                sent[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "double":
                sent += sent[at:]
            case "cut":
                del sent[at:]
    # Now and then to a method that it is not meant for.
    path = draw(st.sampled_from(sorted(METHODS))) if draw(st.integers(0, 9)) == 0 else PATHS[name]
    return path, bytes(sent)


@often
@given(mutated())
def test_mutated_requests_are_refused_or_answered(daemon: Daemon, wire: Wire, case: tuple[str, bytes]) -> None:
    check(daemon, wire, *case)


TEXTS = [*SESSIONS, *SESSIONS, "t1", "t2", "x", "", "\0", "²", "é" * 70, "\N{GRINNING FACE}" * 300, "1-2", "a" * 5000]
NUMBERS = [0, 0, 1, 1, 2, 3, 5, 100, 2**31 - 1, 2**31, 2**32 - 1]


def random_message(kind: Any, rng: random.Random, depth: int = 0) -> Message:
    """A message of any field with any value: valid protobuf, seldom a valid request."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        wanted = 0.9 if field.name in ("session_id", "turn_id", "turns", "context", "budget_tokens") else 0.4
        if rng.random() > wanted or depth > 6:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            for _ in range(rng.randrange(3)):
                getattr(message, field.name)[rng.choice(TEXTS)] = random_value(value, rng)
        elif field.message_type is not None:
            for _ in range(rng.randrange(4) if field.is_repeated else 1):
                made = random_message(field.message_type, rng, depth + 1)
                place = getattr(message, field.name)
                place.add().CopyFrom(made) if field.is_repeated else place.CopyFrom(made)
        elif field.is_repeated:
            getattr(message, field.name).extend(random_value(field, rng) for _ in range(rng.randrange(4)))
        else:
            setattr(message, field.name, random_value(field, rng))
    return message


def random_value(field: Any, rng: random.Random) -> Any:
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            if field.name == "session_id" and rng.random() < 0.9:
                return rng.choice(SESSIONS)
            return rng.choice(TEXTS)
        case FieldDescriptor.TYPE_BYTES:
            return rng.choice([b"", b"x", bytes(16), bytes(32), b"\xff\xfe", rng.randbytes(16)])
        case FieldDescriptor.TYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.TYPE_ENUM:
            return rng.choice([0, 1, 1, 2, 2, 3, 4, 5, 6, 99, -1, -(2**31)])
        case FieldDescriptor.TYPE_UINT64 | FieldDescriptor.TYPE_FIXED64:
            return rng.choice([*NUMBERS, 2**40, 2**63, 2**64 - 1])
        case FieldDescriptor.TYPE_UINT32 | FieldDescriptor.TYPE_FIXED32:
            return rng.choice(NUMBERS)
    return 0


@often
@given(path=st.sampled_from(sorted(METHODS)), seed=st.integers(0, 2**32 - 1))
def test_requests_of_random_fields_are_refused_or_answered(daemon: Daemon, wire: Wire, path: str, seed: int) -> None:
    rng = random.Random(seed)
    check(daemon, wire, path, random_message(METHODS[path].input_type, rng).SerializeToString())


def test_many_appends_of_random_fields_are_refused_or_answered(daemon: Daemon, wire: Wire) -> None:
    rng = random.Random(20261120)
    codes = []
    # Of their own: those of the other tests may have been deleted by now, or given a millisecond to live.
    sessions = ["append-1", "append-2", "append-3"]
    for name in sessions:
        wire.create(name)
    for _ in range(400):
        request = random_message(session_pb2.AppendTurnRequest.DESCRIPTOR, rng)
        request.ClearField("expected")
        request.ClearField("writer_token")
        request.ClearField("user_id")
        if rng.random() < 0.9:
            request.ClearField("durability")
            request.ClearField("conflict_mode")
        request.session_id = rng.choice(sessions)
        # One turn, for any bad one among several refuses them all.
        del request.turns[1:]
        if rng.random() < 0.7:
            request.ClearField("context")
        for turn in request.turns:
            turn.turn_id = f"r{rng.randrange(200)}"
            turn.ClearField("supplied_tokens")
            if turn.HasField("state"):
                turn.state.policy.ClearField("expiry")
        codes.append(check(daemon, wire, PATHS["AppendTurn"], request.SerializeToString()))
    # It is no test of appends if none gets in.
    assert codes.count(grpc.StatusCode.OK) > 20, codes
