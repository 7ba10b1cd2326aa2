"""Bad input through the port: a clear status, reason, field and remedy each, and nothing changed.

It holds must-show 7 of the issue as far as a running daemon is concerned; test_bad_start.py has the rest.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from sessiond.errors import REASONS
from sessiond.testing import Daemon, running_daemon
from sessiond.transport.peers import NODE_HEADER, signature
from sessiond.transport.server import SERVICES
from sessiond.v1 import admin_pb2, context_pb2, node_pb2, session_pb2, turn_pb2
from tests.wire import Refusal, Wire, assistant, message, refusal, tool_call, tool_result, user

MIB = 1024 * 1024
SERVED = {
    "CreateSession",
    "GetSession",
    "ListSessions",
    "UpdateSession",
    "DeleteSession",
    "ResumeSession",
    "AppendTurn",
    "BatchResumeSessions",
    "BatchAppendTurns",
    "ListTurns",
    "ListCheckpoints",
    "ListOrphans",
    "ForkSession",
    "WatchSession",
    "GetState",
    "PutState",
    "DeleteState",
    "ListStates",
    "WarmSession",
    "GetStatus",
    "Flush",
    "Drain",
    "Release",
}
# Answered for other nodes only.
NODE_CALLS = {"Forward", "ForwardWatch", "Rescue"}
# Exhausts the backtracking stack of the tokenizer's regex; well below the limit on a turn.
PANIC = " " * 999_999
_names = (f"bad-{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running_daemon(flush_interval_ms=50) as running:
        yield running


@pytest.fixture(scope="module")
def wire(daemon: Daemon) -> Iterator[Wire]:
    stubs = Wire(daemon.address)
    yield stubs
    stubs.close()


@pytest.fixture
def session(wire: Wire) -> str:
    """A session with some of everything; its newest message is the user's, and call c9 is closed by it."""
    name = next(_names)
    wire.create(name, user_id="ada", metadata={"lang": "en"})
    wire.append(
        name,
        message("t1", turn_pb2.ROLE_SYSTEM, "Be brief."),
        user("t2", "What is the weather in Paris?"),
        tool_call("t3", ("c1", "weather"), ("c9", "clock")),
        tool_result("t4", "c1", "sunny"),
        user("t5", "Never mind the clock."),
    )
    wire.append(name, assistant("t6", "It is sunny."), user("t7", "Thank you, and tomorrow?"))
    change = turn_pb2.StateChange(flags={"vip": True}, mode="chat")
    change.pins.add(key="city", value="Paris")
    update(wire, name, change, turn_id="t8")
    return name


def update(wire: Wire, session: str, change: turn_pb2.StateChange, **fields: object):
    request = session_pb2.UpdateSessionRequest(session_id=session, change=change, **fields)
    return wire.sessions.UpdateSession(request, timeout=30)


def picture(wire: Wire, session: str) -> list[object]:
    """Everything about a session that a refused call must leave as it is: all of it, but what a flush moves."""
    described = wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30).session
    described.ClearField("cloud_seq")
    checkpoints = wire.sessions.ListCheckpoints(session_pb2.ListCheckpointsRequest(session_id=session), timeout=30)
    return [
        described.SerializeToString(deterministic=True),
        checkpoints.SerializeToString(deterministic=True),
        [turn.SerializeToString(deterministic=True) for turn in wire.turns(session)],
    ]


@contextlib.contextmanager
def unchanged(wire: Wire, *sessions: str) -> Iterator[None]:
    before = [picture(wire, session) for session in sessions]
    yield
    assert [picture(wire, session) for session in sessions] == before


def refused(
    reason: str, field: str | None, call: Callable[..., object], *arguments: object, **named: object
) -> Refusal:
    """What a call is refused with: this reason, with its status and remedy, naming this field (None: there is none)."""
    found = refusal(call, *arguments, **named)
    known = REASONS[reason]
    assert found.reason == reason, found.message
    assert found.code is grpc.StatusCode[known.status]
    assert found.metadata["remedy"] == known.remedy
    assert found.message.endswith(known.remedy)
    assert len(found.message) > len(known.remedy) + 10
    assert found.retry_ms == (known.retry_after_ms or 0)
    assert found.fields == ([] if field is None else [field])
    return found


# Sessions and ids ----------------------------------------------------------------------------------------------------

WITH_A_SESSION: dict[str, Callable[..., object]] = {
    "GetSession": session_pb2.GetSessionRequest,
    "UpdateSession": lambda **ids: session_pb2.UpdateSessionRequest(
        turn_id="x", change=turn_pb2.StateChange(mode="m"), **ids
    ),
    "ResumeSession": lambda **ids: session_pb2.ResumeSessionRequest(
        context=context_pb2.ContextSpec(budget_tokens=4000), **ids
    ),
    "AppendTurn": lambda **ids: session_pb2.AppendTurnRequest(turns=[user("x", "hello")], **ids),
    "ListTurns": session_pb2.ListTurnsRequest,
    "ListCheckpoints": session_pb2.ListCheckpointsRequest,
}
NO_IDS = ["-starts-with-a-dash", "has space", "has/slash", "umlaut-ä", "a" * 129, "é" * 65, "line\nbreak", ".hidden"]


@pytest.mark.parametrize("method", WITH_A_SESSION)
def test_an_unknown_session_is_not_found(wire: Wire, method: str) -> None:
    call = getattr(wire.sessions, method)
    found = refused("SESSION_NOT_FOUND", None, call, WITH_A_SESSION[method](session_id="never-made"))
    assert found.metadata["session_id"] == "never-made"
    refused("SESSION_NOT_FOUND", None, wire.sessions.GetSession, session_pb2.GetSessionRequest(session_id="never-made"))


@pytest.mark.parametrize("method", WITH_A_SESSION)
def test_a_session_of_another_user_is_not_found(wire: Wire, session: str, method: str) -> None:
    call = getattr(wire.sessions, method)
    with unchanged(wire, session):
        refused("SESSION_NOT_FOUND", None, call, WITH_A_SESSION[method](session_id=session, user_id="eve"))


@pytest.mark.parametrize("method", WITH_A_SESSION)
@pytest.mark.parametrize("name", ["", *NO_IDS])
def test_a_malformed_session_id_is_refused(wire: Wire, method: str, name: str) -> None:
    call = getattr(wire.sessions, method)
    refused("INVALID_SESSION_ID", "session_id", call, WITH_A_SESSION[method](session_id=name))


@pytest.mark.parametrize("method", WITH_A_SESSION)
@pytest.mark.parametrize("name", ["u" * 257, "é" * 129, "tab\there", "nul\0"])
def test_a_malformed_user_id_is_refused(wire: Wire, session: str, method: str, name: str) -> None:
    call = getattr(wire.sessions, method)
    with unchanged(wire, session):
        refused("INVALID_USER_ID", "user_id", call, WITH_A_SESSION[method](session_id=session, user_id=name))


def expiring(**fields: int) -> turn_pb2.SessionPolicy:
    return turn_pb2.SessionPolicy(expiry=turn_pb2.Expiry(**fields))


def create_refused(wire: Wire, reason: str, field: str, **fields: object) -> None:
    name = str(fields.setdefault("session_id", next(_names)))
    refused(reason, field, wire.create, name, **{key: value for key, value in fields.items() if key != "session_id"})
    if reason != "INVALID_SESSION_ID":
        request = session_pb2.GetSessionRequest(session_id=name)
        refused("SESSION_NOT_FOUND", None, wire.sessions.GetSession, request)


@pytest.mark.parametrize("name", NO_IDS)
def test_a_session_is_not_made_under_a_malformed_id(wire: Wire, name: str) -> None:
    create_refused(wire, "INVALID_SESSION_ID", "session_id", session_id=name)


@pytest.mark.parametrize(
    ("reason", "field", "fields"),
    [
        ("INVALID_USER_ID", "user_id", {"user_id": "u" * 257}),
        ("INVALID_STATE_CHANGE", "metadata", {"metadata": {str(n): "x" for n in range(65)}}),
        ("INVALID_STATE_CHANGE", "metadata", {"metadata": {"key": "x" * 16384}}),
        ("INVALID_STATE_CHANGE", "metadata", {"metadata": {"": "x"}}),
        ("INVALID_CONTEXT", "created_at_unix_ms", {"created_at_unix_ms": 2**63}),
        ("INVALID_POLICY", "policy.min_durability", {"policy": turn_pb2.SessionPolicy(min_durability=9)}),
        ("INVALID_POLICY", "policy.strategy", {"policy": turn_pb2.SessionPolicy(strategy=99)}),
        ("INVALID_POLICY", "policy.encoding", {"policy": turn_pb2.SessionPolicy(encoding=3)}),
        ("INVALID_POLICY", "policy.budget_tokens", {"policy": turn_pb2.SessionPolicy(budget_tokens=2**32 - 1)}),
        ("INVALID_POLICY", "policy.expiry.ttl_ms", {"policy": expiring(ttl_ms=2**62)}),
        ("INVALID_POLICY", "policy.expiry.ttl_ms", {"policy": expiring(mode=turn_pb2.EXPIRY_MODE_FIXED)}),
        ("INVALID_POLICY", "policy.expiry.mode", {"policy": expiring(ttl_ms=1, mode=9)}),
        ("INVALID_POLICY", "policy.expiry.action", {"policy": expiring(ttl_ms=1, action=9)}),
        (
            "NOT_SERVED_YET",
            "policy.strategy",
            {"policy": turn_pb2.SessionPolicy(strategy=turn_pb2.STRATEGY_RECALL)},
        ),
    ],
)
def test_a_session_is_not_made_of_bad_fields(wire: Wire, reason: str, field: str, fields: dict[str, object]) -> None:
    create_refused(wire, reason, field, **fields)


def test_a_session_id_of_another_user_is_taken_and_their_session_stays_as_it_is(wire: Wire, session: str) -> None:
    with unchanged(wire, session):
        refused("SESSION_EXISTS", "session_id", wire.create, session, user_id="eve")
        assert not wire.create(session, user_id="ada", metadata={"lang": "fr"}).created


# Turns ---------------------------------------------------------------------------------------------------------------


def turn(turn_id: str = "new", role: int = turn_pb2.ROLE_USER, **fields: object) -> turn_pb2.TurnInput:
    return turn_pb2.TurnInput(turn_id=turn_id, role=role, **fields)


def parts(*pieces: turn_pb2.Part, role: int = turn_pb2.ROLE_USER, **fields: object) -> turn_pb2.TurnInput:
    return turn(role=role, message=turn_pb2.Message(parts=pieces), **fields)


def text(value: str = "hello") -> turn_pb2.Part:
    return turn_pb2.Part(text=value)


def state(**fields: object) -> turn_pb2.TurnInput:
    return turn(role=0, state=turn_pb2.StateChange(**fields))


def pin(key: str, value: str = "x", scope: int = 0) -> turn_pb2.PinnedFact:
    return turn_pb2.PinnedFact(key=key, value=value, scope=scope)


def summary(first: int, last: int, chain: bytes = bytes(16), words: str = "They spoke.") -> turn_pb2.TurnInput:
    covered = turn_pb2.SeqRange(first_seq=first, last_seq=last)
    return turn(role=0, summary=turn_pb2.Summary(text=words, covered=covered, covered_chain=chain))


def supplied(*counts: tuple[int, int]) -> turn_pb2.TurnInput:
    made = parts(text())
    for encoding, tokens in counts:
        made.supplied_tokens.add(encoding=encoding, tokens=tokens)
    return made


CALL = turn_pb2.Part(tool_call=turn_pb2.ToolCall(call_id="k", name="f", arguments="{}"))
RESULT = turn_pb2.Part(tool_result=turn_pb2.ToolResult(call_id="k", parts=[text()]))
NESTED = turn_pb2.Part(tool_result=turn_pb2.ToolResult(call_id="k", parts=[RESULT]))
HUGE = 2**32 - 1
# name: (the turn, reason, field below the turn)
BAD_TURNS: dict[str, tuple[turn_pb2.TurnInput, str, str]] = {
    "no body at all": (turn(), "EMPTY_TURN", ""),
    "a message without parts": (parts(), "EMPTY_TURN", ".message.parts"),
    "only empty text": (parts(text(""), text("")), "EMPTY_TURN", ".message.parts"),
    "an empty refusal": (
        parts(turn_pb2.Part(refusal=""), role=turn_pb2.ROLE_ASSISTANT),
        "EMPTY_TURN",
        ".message.parts",
    ),
    "an opaque item without data": (
        parts(turn_pb2.Part(opaque=turn_pb2.OpaqueItem(origin="a"))),
        "EMPTY_TURN",
        ".message.parts",
    ),
    "a part that is nothing": (parts(text(), turn_pb2.Part()), "INVALID_TURN", ".message.parts[1]"),
    "over the limit of 1 MiB": (parts(text("x" * MIB)), "TURN_TOO_LARGE", ""),
    "over the limit by its metadata": (
        parts(text("x" * (MIB - 100)), meta=turn_pb2.TurnMeta(model="m" * 200)),
        "TURN_TOO_LARGE",
        "",
    ),
    "a result without any call": (tool_result("new", "c77"), "TOOL_RESULT_WITHOUT_CALL", ".message.parts"),
    "a result for a call that a user message closed": (
        tool_result("new", "c9"),
        "TOOL_RESULT_WITHOUT_CALL",
        ".message.parts",
    ),
    "a second result for one call": (tool_result("new", "c1"), "TOOL_RESULT_WITHOUT_CALL", ".message.parts"),
    "a result in a user message": (parts(text(), RESULT), "TOOL_RESULT_WITHOUT_CALL", ".message.parts"),
    "no turn_id": (turn("", message=turn_pb2.Message(parts=[text()])), "INVALID_TURN_ID", ".turn_id"),
    "a turn_id of 129 bytes": (
        turn("t" * 129, message=turn_pb2.Message(parts=[text()])),
        "INVALID_TURN_ID",
        ".turn_id",
    ),
    "a turn_id of 130 bytes in 65 characters": (
        turn("é" * 65, message=turn_pb2.Message(parts=[text()])),
        "INVALID_TURN_ID",
        ".turn_id",
    ),
    "a message without a role": (parts(text(), role=0), "INVALID_TURN", ".role"),
    "an unknown role": (parts(text(), role=99), "INVALID_TURN", ".role"),
    "a negative role": (parts(text(), role=-1), "INVALID_TURN", ".role"),
    "an unknown status": (parts(text(), role=turn_pb2.ROLE_ASSISTANT, status=9), "INVALID_TURN", ".status"),
    "a status on a user's turn": (parts(text(), status=1), "INVALID_TURN", ".status"),
    "a role on a milestone": (turn(milestone=turn_pb2.Milestone(label="x")), "INVALID_TURN", ".role"),
    "a call by a user": (parts(CALL), "INVALID_TURN", ".message.parts[0].tool_call"),
    "a call without a tool": (
        parts(turn_pb2.Part(tool_call=turn_pb2.ToolCall(call_id="k")), role=turn_pb2.ROLE_ASSISTANT),
        "INVALID_TURN",
        ".message.parts[0].tool_call.name",
    ),
    "a result by the assistant": (
        parts(RESULT, role=turn_pb2.ROLE_ASSISTANT),
        "INVALID_TURN",
        ".message.parts[0].tool_result",
    ),
    "text by a tool": (parts(text(), role=turn_pb2.ROLE_TOOL), "INVALID_TURN", ".message.parts[0]"),
    "a call by the system": (
        parts(text(), CALL, role=turn_pb2.ROLE_SYSTEM),
        "INVALID_TURN",
        ".message.parts[1].tool_call",
    ),
    "a result within a result": (
        parts(NESTED, role=turn_pb2.ROLE_TOOL),
        "INVALID_TURN",
        ".message.parts[0].tool_result.parts[0]",
    ),
    "an attachment that is nowhere": (
        parts(turn_pb2.Part(attachment=turn_pb2.Attachment(tokens=3))),
        "INVALID_TURN",
        ".message.parts[0].attachment.uri",
    ),
    "a sha256 of 31 bytes": (
        parts(turn_pb2.Part(attachment=turn_pb2.Attachment(uri="x:y", sha256=bytes(31)))),
        "INVALID_TURN",
        ".message.parts[0].attachment.sha256",
    ),
    "attachments of more tokens than any budget": (
        parts(*[turn_pb2.Part(attachment=turn_pb2.Attachment(uri="x:y", tokens=HUGE))] * 3),
        "INVALID_TURN",
        ".message",
    ),
    "an opaque item of more tokens than any budget": (
        parts(turn_pb2.Part(opaque=turn_pb2.OpaqueItem(data=b"x", tokens=HUGE))),
        "INVALID_TURN",
        ".message",
    ),
    "1,025 parts": (parts(*[text("x")] * 1025), "INVALID_TURN", ".message.parts"),
    "33 labels": (
        parts(text(), meta=turn_pb2.TurnMeta(labels={str(n): "x" for n in range(33)})),
        "INVALID_TURN",
        ".meta.labels",
    ),
    "a label of 1,025 bytes": (
        parts(text(), meta=turn_pb2.TurnMeta(labels={"k": "x" * 1024})),
        "INVALID_TURN",
        ".meta.labels",
    ),
    "a count in no encoding": (supplied((0, 5)), "INVALID_TURN", ".supplied_tokens[0].encoding"),
    "a count in an unknown encoding": (supplied((1, 5), (7, 5)), "INVALID_TURN", ".supplied_tokens[1].encoding"),
    "two counts in one encoding": (supplied((1, 5), (1, 5)), "INVALID_TURN", ".supplied_tokens[1].encoding"),
    "a count above any budget": (supplied((2, HUGE)), "INVALID_TURN", ".message"),
    "a text that makes the tokenizer panic": (parts(text(PANIC)), "TOKENIZER_FAILED", ".message"),
    "a tool result that makes the tokenizer panic": (
        parts(
            turn_pb2.Part(tool_result=turn_pb2.ToolResult(call_id="k", parts=[text(PANIC)])), role=turn_pb2.ROLE_TOOL
        ),
        "TOKENIZER_FAILED",
        ".message",
    ),
    "a panic in only the encoding that was not supplied": (
        parts(
            text(PANIC),
            supplied_tokens=[turn_pb2.SuppliedTokens(encoding=turn_pb2.ENCODING_CL100K_BASE, tokens=9)],
        ),
        "TOKENIZER_FAILED",
        ".message",
    ),
    "a summary without text": (summary(1, 3, words=""), "EMPTY_TURN", ".summary.text"),
    "a summary that makes the tokenizer panic": (summary(1, 3, words=PANIC), "TOKENIZER_FAILED", ".summary"),
    "a summary of nothing": (summary(0, 0), "INVALID_TURN", ".summary.covered"),
    "a summary of a range backwards": (summary(3, 2), "INVALID_TURN", ".summary.covered"),
    "a summary with a chain of 15 bytes": (summary(1, 3, bytes(15)), "INVALID_TURN", ".summary.covered_chain"),
    "a milestone without a label": (turn(role=0, milestone=turn_pb2.Milestone()), "INVALID_TURN", ".milestone.label"),
    "a milestone with a label of 129 bytes": (
        turn(role=0, milestone=turn_pb2.Milestone(label="x" * 129)),
        "INVALID_TURN",
        ".milestone.label",
    ),
    "a change of nothing": (state(), "EMPTY_TURN", ".state"),
    "a pin without a key": (state(pins=[pin("a"), pin("")]), "INVALID_STATE_CHANGE", ".state.pins[1].key"),
    "a pin with a key of 65 bytes": (state(pins=[pin("k" * 65)]), "INVALID_STATE_CHANGE", ".state.pins[0].key"),
    "a pin with a value of 2,049 bytes": (
        state(pins=[pin("k", "v" * 2049)]),
        "INVALID_STATE_CHANGE",
        ".state.pins[0].value",
    ),
    "a pin twice": (state(pins=[pin("k"), pin("k")]), "INVALID_STATE_CHANGE", ".state.pins[1].key"),
    "a pin of an unknown scope": (state(pins=[pin("k", scope=9)]), "INVALID_STATE_CHANGE", ".state.pins[0].scope"),
    "a pin of the user's": (
        state(pins=[pin("k", scope=turn_pb2.PIN_SCOPE_USER)]),
        "NOT_SERVED_YET",
        ".state.pins[0].scope",
    ),
    "65 pins": (state(pins=[pin(str(n)) for n in range(65)]), "INVALID_STATE_CHANGE", ".state.pins"),
    "64 pins beside the one that is there": (
        state(pins=[pin(str(n)) for n in range(64)]),
        "INVALID_STATE_CHANGE",
        ".state.pins",
    ),
    "pins beyond their tokens": (
        state(pins=[pin(key, "word " * 400) for key in "abc"]),
        "PINS_FULL",
        ".state.pins",
    ),
    "65 flags": (state(flags={str(n): True for n in range(65)}), "INVALID_STATE_CHANGE", ".state.flags"),
    "64 flags beside the one that is there": (
        state(flags={str(n): True for n in range(64)}),
        "INVALID_STATE_CHANGE",
        ".state.flags",
    ),
    "a flag without a name": (state(flags={"": True}), "INVALID_STATE_CHANGE", ".state.flags"),
    "metadata without a name": (state(metadata={"": "x"}), "INVALID_STATE_CHANGE", ".state.metadata"),
    "metadata of 16 KiB beside what is there": (
        state(metadata={"k": "x" * 16383}),
        "INVALID_STATE_CHANGE",
        ".state.metadata",
    ),
    "64 pairs of metadata beside the one that is there": (
        state(metadata={str(n): "x" for n in range(64)}),
        "INVALID_STATE_CHANGE",
        ".state.metadata",
    ),
    "a mode of 129 bytes": (state(mode="m" * 129), "INVALID_STATE_CHANGE", ".state.mode"),
    "a policy that is none": (
        state(policy=turn_pb2.SessionPolicy(strategy=42)),
        "INVALID_POLICY",
        ".state.policy.strategy",
    ),
    "extra fields that are no JSON": (
        turn(message=turn_pb2.Message(parts=[turn_pb2.Part(text="x")], extra_json=b"{")),
        "INVALID_TURN",
        ".message.extra_json",
    ),
    "an original that is no JSON object": (
        turn(message=turn_pb2.Message(parts=[turn_pb2.Part(text="x")], original_json=b"[1]")),
        "INVALID_TURN",
        ".message.original_json",
    ),
    "a rewind beyond the head": (
        turn(role=0, rewind=turn_pb2.Rewind(to_seq=10_000)),
        "INVALID_REWIND",
        ".rewind.to_seq",
    ),
    "a rewind beyond every seq": (
        turn(role=0, rewind=turn_pb2.Rewind(to_seq=2**64 - 1)),
        "INVALID_REWIND",
        ".rewind.to_seq",
    ),
}


@pytest.mark.parametrize("name", BAD_TURNS)
def test_a_bad_turn_is_refused_and_appends_nothing(wire: Wire, session: str, name: str) -> None:
    bad, reason, below = BAD_TURNS[name]
    with unchanged(wire, session):
        refused(reason, f"turns[0]{below}", wire.append, session, bad)


@pytest.mark.parametrize("name", [name for name in BAD_TURNS if "panic" not in name])
def test_one_bad_turn_among_good_ones_appends_none_of_them(wire: Wire, session: str, name: str) -> None:
    bad, reason, below = BAD_TURNS[name]
    good = [user("good-1", "One."), assistant("good-2", "Two."), bad, user("good-3", "Three.")]
    with unchanged(wire, session):
        refused(reason, f"turns[2]{below}", wire.append, session, *good)
    # And the good ones alone go in: they left no trace that would make them duplicates.
    assert not any(turn.duplicate for turn in wire.append(session, good[0], good[1], good[3]).turns)


def test_no_turns_and_too_many_are_refused(wire: Wire, session: str) -> None:
    with unchanged(wire, session):
        refused("NO_TURNS", "turns", wire.append, session)
        refused("NO_TURNS", "turns", wire.append, session, *(user(f"n{n}", "x") for n in range(257)))


def test_a_turn_id_twice_in_one_call_is_refused(wire: Wire, session: str) -> None:
    with unchanged(wire, session):
        refused(
            "INVALID_TURN_ID", "turns[2].turn_id", wire.append, session, user("a", "x"), user("b", "y"), user("a", "x")
        )


def test_an_empty_tool_result_is_accepted(wire: Wire, session: str) -> None:
    reply = wire.append(session, tool_call("call", ("c5", "silent")), tool_result("answer", "c5"))
    assert reply.outcome == session_pb2.APPEND_OUTCOME_APPENDED
    assert [turn.tokens_o200k for turn in reply.turns][1] == 4
    assert list(wire.turns(session))[-1].message.parts[0].tool_result.call_id == "c5"


def test_a_turn_of_exactly_the_limit_is_accepted(wire: Wire, session: str) -> None:
    exact = parts(text("x" * (MIB - 100)))
    exact.message.parts[0].text += "y" * (MIB - exact.ByteSize())
    assert exact.ByteSize() == MIB
    for encoding in (turn_pb2.ENCODING_O200K_BASE, turn_pb2.ENCODING_CL100K_BASE):
        exact.supplied_tokens.add(encoding=encoding, tokens=7)
    exact.message.parts[0].text = exact.message.parts[0].text[: MIB - exact.ByteSize()]
    assert exact.ByteSize() == MIB
    assert wire.append(session, exact).turns[0].position.seq == 9


def test_supplied_counts_make_a_turn_acceptable_that_the_tokenizer_cannot_count(
    daemon: Daemon, wire: Wire, session: str
) -> None:
    pid = daemon.pid
    bad = parts(text(PANIC))
    with unchanged(wire, session):
        found = refused("TOKENIZER_FAILED", "turns[0].message", wire.append, session, bad)
        assert found.metadata["encoding"] == "o200k_base"
    bad.supplied_tokens.add(encoding=turn_pb2.ENCODING_O200K_BASE, tokens=12_345)
    bad.supplied_tokens.add(encoding=turn_pb2.ENCODING_CL100K_BASE, tokens=12_346)
    reply = wire.append(session, bad)
    assert (reply.turns[0].tokens_o200k, reply.turns[0].tokens_cl100k) == (12_345, 12_346)
    context = wire.resume(session, 100_000)
    assert context.turns[-1].message.parts[0].text == PANIC
    assert context.turns[-1].o200k.source == turn_pb2.TOKEN_SOURCE_SUPPLIED
    assert context.tokens.tail > 12_345
    assert daemon.pid == pid


def test_what_is_counted_for_a_context_is_refused_where_the_tokenizer_panics(wire: Wire, session: str) -> None:
    new = turn_pb2.Message(parts=[text(PANIC)])
    with unchanged(wire, session):
        refused("TOKENIZER_FAILED", "context.new_message", wire.resume, session, spec={"new_message": new})
        refused("TOKENIZER_FAILED", "context.instructions", wire.resume, session, spec={"instructions": PANIC})


def test_a_request_over_our_limit_and_below_the_transports_is_refused_with_details(wire: Wire, session: str) -> None:
    with unchanged(wire, session):
        turns = [user(f"n{n}", "x" * 1_000_000) for n in range(9)]
        found = refused("REQUEST_TOO_LARGE", "", wire.append, session, *turns)
        assert int(found.metadata["limit_bytes"]) == 8 * MIB
        assert int(found.metadata["size_bytes"]) > 9_000_000


def test_a_request_over_the_transports_limit_is_its_bare_refusal(wire: Wire) -> None:
    call = wire.channel.unary_unary("/sessiond.v1.SessionService/AppendTurn")
    with pytest.raises(grpc.RpcError) as bare:
        call(bytes(65 * MIB))
    assert bare.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert wire.admin.GetStatus(admin_pb2.GetStatusRequest()).phase == admin_pb2.NODE_PHASE_SERVING


def test_what_a_caller_sent_never_pushes_the_details_out_of_the_trailers(wire: Wire, session: str) -> None:
    long = "\N{GRINNING FACE}" * 100_000
    with unchanged(wire, session):
        # An id at its limit, whose echo takes many more bytes than that, and one beyond it.
        widest = "\N{GRINNING FACE}" * 128
        where = "turns[0].message.parts"
        refused("TOOL_RESULT_WITHOUT_CALL", where, wire.append, session, tool_result("new", widest))
        where = "turns[0].message.parts[0].tool_result.call_id"
        refused("INVALID_TURN", where, wire.append, session, tool_result("new", long))
        change = turn_pb2.StateChange(mode="m")
        refused("INVALID_STATE_CHANGE", "etag", update, wire, session, change, turn_id="new", etag=long[:1000])
        refused("INVALID_PAGE_TOKEN", "page_token", list_turns, wire, session, page_token=long)


# Position and idempotency --------------------------------------------------------------------------------------------


def test_a_wrong_head_is_aborted_and_names_the_head(wire: Wire, session: str) -> None:
    for wrong in (
        turn_pb2.TurnPosition(seq=7),
        turn_pb2.TurnPosition(seq=9),
        turn_pb2.TurnPosition(epoch=1, seq=7),
        turn_pb2.TurnPosition(epoch=2, seq=8),
        turn_pb2.TurnPosition(),
        turn_pb2.TurnPosition(epoch=HUGE, seq=2**64 - 1),
    ):
        with unchanged(wire, session):
            found = refused("EXPECTED_MISMATCH", "expected", wire.append, session, user("new", "x"), expected=wrong)
            assert (found.metadata["head_epoch"], found.metadata["head_seq"]) == ("1", "8")
    right = turn_pb2.TurnPosition(epoch=1, seq=8)
    assert wire.append(session, user("new", "x"), expected=right).head.seq == 9
    # turn_id is looked at before `expected`: the same call again is a duplicate and no conflict.
    again = wire.append(session, user("new", "x"), expected=right)
    assert again.outcome == session_pb2.APPEND_OUTCOME_DUPLICATE


@pytest.mark.parametrize(
    ("epoch", "seq", "lacking"), [(1, 5, [6, 7, 8]), (0, 0, [*range(1, 9)]), (2, 8, []), (1, 99, [])]
)
def test_a_wrong_head_returns_the_missing_tail_where_that_is_asked_for(
    wire: Wire, session: str, epoch: int, seq: int, lacking: list[int]
) -> None:
    with unchanged(wire, session):
        reply = wire.append(
            session,
            user("new", "x"),
            expected=turn_pb2.TurnPosition(epoch=epoch, seq=seq),
            conflict_mode=session_pb2.CONFLICT_MODE_RETURN_TAIL,
        )
        assert reply.outcome == session_pb2.APPEND_OUTCOME_CONFLICT
        assert not reply.turns
        stored = {turn.seq: turn for turn in wire.turns(session)}
        assert list(reply.conflict.turns) == [stored[number] for number in lacking]
        assert reply.conflict.head == turn_pb2.TurnPosition(epoch=1, seq=8, chain=stored[8].chain)
        assert not reply.conflict.truncated


def test_a_turn_id_with_other_content_is_refused_and_with_the_same_is_a_duplicate(wire: Wire, session: str) -> None:
    others = [
        user("t7", "Thank you, and the day after?"),
        assistant("t7", "Thank you, and tomorrow?"),
        turn_pb2.TurnInput(turn_id="t7", milestone=turn_pb2.Milestone(label="x")),
    ]
    with unchanged(wire, session):
        for other in others:
            found = refused("TURN_ID_REUSED", "turns[0].turn_id", wire.append, session, other)
            assert (found.metadata["turn_id"], found.metadata["seq"]) == ("t7", "7")
            refused("TURN_ID_REUSED", "turns[1].turn_id", wire.append, session, user("new", "x"), other)
        again = wire.append(session, user("t7", "Thank you, and tomorrow?"))
        assert again.outcome == session_pb2.APPEND_OUTCOME_DUPLICATE
        # What is known about a turn may differ from one try to the next; what was said counts.
        traced = message("t7", turn_pb2.ROLE_USER, "Thank you, and tomorrow?", meta=turn_pb2.TurnMeta(model="other"))
        assert wire.append(session, traced).outcome == session_pb2.APPEND_OUTCOME_DUPLICATE
        change = turn_pb2.StateChange(mode="other")
        refused("TURN_ID_REUSED", "turn_id", update, wire, session, change, turn_id="t8")


# Budgets and contexts ------------------------------------------------------------------------------------------------


def in_both(wire: Wire, session: str, reason: str, field: str, spec: dict[str, object]) -> None:
    """A context that can't be made is refused by a resume, and by an append before anything is appended."""
    budget = int(spec.pop("budget_tokens", 4000))  # type: ignore[call-overload]
    with unchanged(wire, session):
        refused(reason, field, wire.resume, session, budget, spec=spec)
        context = context_pb2.ContextSpec(budget_tokens=budget, **spec)
        refused(reason, field, wire.append, session, user("new", "x"), context=context)


@pytest.mark.parametrize(
    ("reason", "field", "spec"),
    [
        ("INVALID_BUDGET", "context.budget_tokens", {"budget_tokens": 0}),
        ("INVALID_BUDGET", "context.budget_tokens", {"budget_tokens": HUGE}),
        ("INVALID_BUDGET", "context.reserve_tokens", {"budget_tokens": 100, "reserve_tokens": 100}),
        ("INVALID_BUDGET", "context.reserve_tokens", {"budget_tokens": 100, "reserve_tokens": HUGE}),
        ("INVALID_CONTEXT", "context.strategy", {"strategy": 99}),
        ("INVALID_CONTEXT", "context.strategy", {"strategy": -1}),
        ("NOT_SERVED_YET", "context.strategy", {"strategy": turn_pb2.STRATEGY_SUMMARY}),
        ("NOT_SERVED_YET", "context.strategy", {"strategy": turn_pb2.STRATEGY_RECALL}),
        ("INVALID_CONTEXT", "context.encoding", {"encoding": 3}),
        ("INVALID_CONTEXT", "context.last_exchanges", {"strategy": turn_pb2.STRATEGY_LAST_N}),
        (
            "INVALID_CONTEXT",
            "context.last_exchanges",
            {"strategy": turn_pb2.STRATEGY_LAST_N, "last_exchanges": 100_001},
        ),
        ("INVALID_CONTEXT", "context.since.chain", {"since": turn_pb2.TurnPosition(seq=1, chain=bytes(15))}),
        ("EMPTY_TURN", "context.new_message.parts", {"new_message": turn_pb2.Message()}),
        ("INVALID_CONTEXT", "context.new_message.parts[0].tool_call", {"new_message": turn_pb2.Message(parts=[CALL])}),
    ],
)
def test_a_context_that_cannot_be_made_is_refused(
    wire: Wire, session: str, reason: str, field: str, spec: dict[str, object]
) -> None:
    in_both(wire, session, reason, field, dict(spec))


@pytest.mark.parametrize("size", [1, 15, 17, 32])
def test_a_position_whose_chain_is_none_is_refused(wire: Wire, session: str, size: int) -> None:
    place = turn_pb2.TurnPosition(epoch=1, seq=1, chain=bytes(size))
    with unchanged(wire, session):
        refused("INVALID_CONTEXT", "highest_acked.chain", wire.resume, session, highest_acked=place)
        refused("INVALID_CONTEXT", "expected.chain", wire.append, session, user("new", "x"), expected=place)
        watch = session_pb2.WatchSessionRequest(session_id=session, after=place)
        refused("INVALID_CONTEXT", "after.chain", lambda: list(wire.sessions.WatchSession(watch, timeout=10)))


@pytest.mark.parametrize("strategy", ["STRATEGY_FULL", "STRATEGY_LAST_N", "STRATEGY_HYBRID"])
@pytest.mark.parametrize("encoding", ["ENCODING_O200K_BASE", "ENCODING_CL100K_BASE"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"reserve_tokens": 1000},
        {"instructions": "Answer in as many words as you like. " * 20},
        {"new_message": turn_pb2.Message(parts=[text("And the day after tomorrow? " * 20)])},
    ],
    ids=["plain", "reserve", "instructions", "new message"],
)
def test_a_budget_below_the_newest_message_names_the_minimum_and_that_minimum_works(
    wire: Wire, session: str, strategy: str, encoding: str, extra: dict[str, object]
) -> None:
    wire.append(session, user("long", "Tell me about every city on the way. " * 50))
    spec = {"strategy": strategy, "encoding": encoding, "last_exchanges": 2, **extra}
    reserve = int(extra.get("reserve_tokens", 0))  # type: ignore[call-overload]
    minimum = 0
    with unchanged(wire, session):
        for budget in (reserve + 1, reserve + 10, reserve + 100):
            found = refused("BUDGET_TOO_SMALL", "context.budget_tokens", wire.resume, session, budget, spec=spec)
            assert found.metadata["budget_tokens"] == str(budget)
            assert minimum in (0, int(found.metadata["minimum_budget_tokens"]))
            minimum = int(found.metadata["minimum_budget_tokens"])
        refused("BUDGET_TOO_SMALL", "context.budget_tokens", wire.resume, session, minimum - 1, spec=spec)
        context = wire.resume(session, minimum, spec=spec)
    assert [turn.turn_id for turn in context.turns] == ["long"]
    assert context.tokens.total + reserve == minimum


def test_an_append_whose_context_does_not_fit_says_so_beside_the_appended_turn(wire: Wire, session: str) -> None:
    reply = wire.append(session, user("new", "word " * 100), context=context_pb2.ContextSpec(budget_tokens=50))
    assert reply.outcome == session_pb2.APPEND_OUTCOME_APPENDED
    assert reply.context_error.reason == "BUDGET_TOO_SMALL"
    assert reply.context_error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    minimum = int(reply.context_error.metadata["minimum_budget_tokens"])
    assert wire.resume(session, minimum).tokens.total == minimum


def test_an_append_to_a_cold_session_takes_the_budget_of_its_policy() -> None:
    with running_daemon(flush_interval_ms=50) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            wire.create("cold", policy=turn_pb2.SessionPolicy(budget_tokens=500))
            wire.append("cold", user("t1", "Hello."))
        daemon.terminate()
        daemon.lose_hot_tier()
        daemon.start()
        with contextlib.closing(Wire(daemon.address)) as wire:
            reply = wire.append("cold", user("t2", "Are you there?"), context=context_pb2.ContextSpec())
            assert [turn.turn_id for turn in reply.context.turns] == ["t1", "t2"]
            assert reply.context.tokens.budget == 500


def test_what_a_request_asks_that_is_not_served_yet_is_named(wire: Wire, session: str) -> None:
    with unchanged(wire, session):
        for new_id in ("a b", session):
            refused("INVALID_SESSION_ID", "reset_to_session_id", wire.resume, session, reset_to_session_id=new_id)
        reset = {"reset_to_session_id": "other", "read_only": True}
        refused("INVALID_CONTEXT", "reset_to_session_id", wire.resume, session, **reset)
        refused("NOT_SERVED_YET", "writer_token", wire.append, session, user("new", "x"), writer_token="secret")
        accept = {"accept_missing": 1, "read_only": True}
        refused("INVALID_CONTEXT", "accept_missing", wire.resume, session, **accept)


@pytest.mark.parametrize("value", [3, 77, -1])
def test_an_unknown_enum_value_is_refused(wire: Wire, session: str, value: int) -> None:
    change = turn_pb2.StateChange(mode="m")
    with unchanged(wire, session):
        refused("INVALID_CONTEXT", "durability", wire.append, session, user("new", "x"), durability=value)
        refused("INVALID_CONTEXT", "durability", update, wire, session, change, turn_id="new", durability=value)
        refused("INVALID_CONTEXT", "conflict_mode", wire.append, session, user("new", "x"), conflict_mode=value)


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in BAD_TURNS.items() if case[0].WhichOneof("body") == "state"])
def test_a_bad_state_change_is_refused(wire: Wire, session: str, name: str) -> None:
    bad, reason, below = BAD_TURNS[name]
    field = "change" + below.removeprefix(".state")
    with unchanged(wire, session):
        refused(reason, field, update, wire, session, bad.state, turn_id="new")


@pytest.mark.parametrize("etag", ["garbage", "1", "-", "1-", "-8", "1-2-3", "²-²", "+1-8", "1-8 ", "9" * 50 + "-1"])
def test_a_malformed_state_etag_is_refused(wire: Wire, session: str, etag: str) -> None:
    change = turn_pb2.StateChange(mode="m")
    with unchanged(wire, session):
        refused("INVALID_STATE_CHANGE", "etag", update, wire, session, change, turn_id="new", etag=etag)


def test_a_stale_state_etag_is_aborted_and_chat_makes_none_stale(wire: Wire, session: str) -> None:
    etag = wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session)).session.state.etag
    wire.append(session, user("chat", "And on Monday?"))
    first = update(wire, session, turn_pb2.StateChange(mode="first"), turn_id="first", etag=etag)
    with unchanged(wire, session):
        change = turn_pb2.StateChange(mode="second")
        found = refused("STATE_ETAG_MISMATCH", "etag", update, wire, session, change, turn_id="second", etag=etag)
        assert found.metadata["etag"] == first.session.state.etag != etag


def test_a_state_change_without_a_turn_id_is_refused(wire: Wire, session: str) -> None:
    with unchanged(wire, session):
        refused("INVALID_TURN_ID", "turn_id", update, wire, session, turn_pb2.StateChange(mode="m"))
        refused("INVALID_TURN_ID", "turn_id", update, wire, session, turn_pb2.StateChange(mode="m"), turn_id="t" * 129)


def test_a_rewind_to_a_superseded_turn_is_refused(wire: Wire, session: str) -> None:
    wire.append(session, turn(turn_id="back", role=0, rewind=turn_pb2.Rewind(to_seq=2)))
    with unchanged(wire, session):
        for seq in (3, 8):
            again = turn(role=0, rewind=turn_pb2.Rewind(to_seq=seq))
            refused("INVALID_REWIND", "turns[0].rewind.to_seq", wire.append, session, again)
    assert wire.append(session, turn(role=0, rewind=turn_pb2.Rewind(to_seq=1))).head.seq == 10


def test_a_summary_that_claims_what_is_not_so_stays_without_effect(wire: Wire, session: str) -> None:
    wire.append(session, summary(1, 3, chain=b"x" * 16))
    context = wire.resume(session)
    assert not context.receipt.summarised
    assert context.turns[0].turn_id == "t2"


# Pages ---------------------------------------------------------------------------------------------------------------


def list_turns(wire: Wire, session: str, **fields: object) -> session_pb2.ListTurnsResponse:
    return wire.sessions.ListTurns(session_pb2.ListTurnsRequest(session_id=session, **fields), timeout=30)


def list_sessions(wire: Wire, **fields: object) -> session_pb2.ListSessionsResponse:
    return wire.sessions.ListSessions(session_pb2.ListSessionsRequest(**fields), timeout=30)


def test_a_bad_page_token_is_refused(wire: Wire, session: str) -> None:
    other = next(_names)
    wire.create(other, user_id="ada")
    wire.append(other, user("o1", "x"), user("o2", "y"))
    token = list_turns(wire, session, page_size=3).next_page_token
    assert list_turns(wire, session, page_token=token).turns[0].seq == 4
    theirs = list_turns(wire, other, page_size=1).next_page_token
    sessions = list_sessions(wire, user_id="ada", page_size=1).next_page_token
    tampered = [token[:at] + ("A" if token[at] != "A" else "B") + token[at + 1 :] for at in range(len(token))]
    appended = [token + "A", token + "=", token + "!", token + "\n", " " + token, token[:-1], token * 2]
    for bad in ["garbage", "AAAA", "ä", "=", "A" * 10_000, theirs, sessions, *tampered, *appended]:
        refused("INVALID_PAGE_TOKEN", "page_token", list_turns, wire, session, page_token=bad)
    for bad in ["garbage", token, sessions[:-1] + "!", sessions + "A"]:
        refused("INVALID_PAGE_TOKEN", "page_token", list_sessions, wire, user_id="ada", page_token=bad)
    refused("INVALID_PAGE_TOKEN", "page_token", list_sessions, wire, page_token=sessions)
    refused("INVALID_PAGE_TOKEN", "page_token", list_sessions, wire, user_id="eve", page_token=sessions)


def test_a_page_size_above_the_limit_is_refused(wire: Wire, session: str) -> None:
    assert len(list_turns(wire, session, page_size=1000).turns) == 8
    assert list_sessions(wire, page_size=200).sessions
    for size in (1001, HUGE):
        refused("INVALID_PAGE_SIZE", "page_size", list_turns, wire, session, page_size=size)
    for size in (201, HUGE):
        refused("INVALID_PAGE_SIZE", "page_size", list_sessions, wire, page_size=size)
    refused("INVALID_CONTEXT", "last_seq", list_turns, wire, session, first_seq=5, last_seq=4)
    refused("INVALID_USER_ID", "user_id", list_sessions, wire, user_id="u" * 257)


def test_a_page_beyond_the_end_is_empty_and_the_last(wire: Wire, session: str) -> None:
    for first in (9, 10_000, 2**64 - 1):
        page = list_turns(wire, session, first_seq=first)
        assert not page.turns
        assert not page.next_page_token


# Bytes ---------------------------------------------------------------------------------------------------------------

BAD = "@@BAD@@"
NOT_UTF8 = [b"\xff\xfe\xfd\xfc\xfb\xfa\xf9", b"\xc3\x28\xa0\xa1abc", b"\xed\xa0\x80abcd", b"abcdef\xe2"]


def raw(wire: Wire, service: str, method: str) -> Callable[[bytes], bytes]:
    call = wire.channel.unary_unary(f"/sessiond.v1.{service}/{method}")
    return lambda sent: call(sent, timeout=30)


@pytest.mark.parametrize("broken", NOT_UTF8)
@pytest.mark.parametrize(
    ("method", "field", "request_of"),
    [
        ("GetSession", "session_id", lambda: session_pb2.GetSessionRequest(session_id=BAD)),
        ("CreateSession", "metadata[0].key", lambda: session_pb2.CreateSessionRequest(metadata={BAD: "x"})),
        ("CreateSession", "metadata[0].value", lambda: session_pb2.CreateSessionRequest(metadata={"x": BAD})),
        (
            "AppendTurn",
            "turns[1].message.parts[2].text",
            lambda: session_pb2.AppendTurnRequest(turns=[user("a", "x"), parts(text(), text(), text(BAD))]),
        ),
        (
            "AppendTurn",
            "turns[0].message.parts[0].tool_result.parts[1].text",
            lambda: session_pb2.AppendTurnRequest(
                turns=[parts(turn_pb2.Part(tool_result=turn_pb2.ToolResult(parts=[text(), text(BAD)])))]
            ),
        ),
        (
            "AppendTurn",
            "turns[0].meta.labels[0].value",
            lambda: session_pb2.AppendTurnRequest(turns=[parts(text(), meta=turn_pb2.TurnMeta(labels={"k": BAD}))]),
        ),
        (
            "AppendTurn",
            "turns[0].message.parts[0].tool_call.arguments",
            lambda: session_pb2.AppendTurnRequest(
                turns=[parts(turn_pb2.Part(tool_call=turn_pb2.ToolCall(arguments=BAD)))]
            ),
        ),
        (
            "ResumeSession",
            "context.new_message.parts[0].attachment.uri",
            lambda: session_pb2.ResumeSessionRequest(
                context=context_pb2.ContextSpec(
                    new_message=turn_pb2.Message(parts=[turn_pb2.Part(attachment=turn_pb2.Attachment(uri=BAD))])
                )
            ),
        ),
        (
            "UpdateSession",
            "change.pins[1].value",
            lambda: session_pb2.UpdateSessionRequest(change=turn_pb2.StateChange(pins=[pin("a"), pin("b", BAD)])),
        ),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_its_whole_path(
    wire: Wire, session: str, method: str, field: str, request_of: Callable[[], object], broken: bytes
) -> None:
    request = request_of()
    if method != "CreateSession" and field != "session_id":
        request.session_id = session  # type: ignore[attr-defined]
    sent = request.SerializeToString()  # type: ignore[attr-defined]
    assert sent.count(BAD.encode()) == 1
    with unchanged(wire, session):
        refused(
            "INVALID_UTF8", field, raw(wire, "SessionService", method), sent.replace(BAD.encode(), broken[: len(BAD)])
        )


@pytest.mark.parametrize("sent", [b"\xff" * 9, b"\x0a\x05ab", b"\x0b", b"\x00", b"\x0a" + b"\xff" * 10 + b"\x01"])
def test_bytes_that_are_no_message_are_refused_by_every_served_method(wire: Wire, sent: bytes) -> None:
    for service in SERVICES:
        for method in service.methods:
            if method.name in SERVED and method.name != "Drain":
                refused("MALFORMED_REQUEST", "", raw(wire, service.name, method.name), sent)
    drain = wire.channel.unary_stream("/sessiond.v1.AdminService/Drain")
    refused("MALFORMED_REQUEST", "", lambda: list(drain(sent, timeout=30)))
    assert wire.admin.GetStatus(admin_pb2.GetStatusRequest()).phase == admin_pb2.NODE_PHASE_SERVING


def test_messages_that_nest_too_deep_are_refused(wire: Wire) -> None:
    deep = b""
    for _ in range(2000):
        # Part.tool_result.parts: fields 4 and 2.
        inner = b"\x12" + length(deep) + deep
        deep = b"\x22" + length(inner) + inner
    sent = b"\x1a" + length(turn_of := b"\xaa\x01" + length(body := b"\x12" + length(deep) + deep) + body) + turn_of
    refused("MALFORMED_REQUEST", "", raw(wire, "SessionService", "AppendTurn"), sent)


def length(payload: bytes) -> bytes:
    size, out = len(payload), bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes(out) + bytes([size])


# What is not served --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        f"{service.name}/{method.name}"
        for service in SERVICES
        for method in service.methods
        if method.name not in SERVED | NODE_CALLS
    ],
)
@pytest.mark.parametrize("sent", [b"", b"\xff\xff\xff"])
def test_a_method_of_a_later_release_is_unimplemented_with_a_reason(wire: Wire, path: str, sent: bytes) -> None:
    service, method = path.split("/")
    described = next(found for found in SERVICES if found.name == service).methods_by_name[method]
    if described.server_streaming:
        stream = wire.channel.unary_stream(f"/sessiond.v1.{path}")
        found = refused("NOT_SERVED_YET", None, lambda: list(stream(sent, timeout=30)))
    else:
        found = refused("NOT_SERVED_YET", None, raw(wire, service, method), sent)
    assert method in found.message


def test_every_other_method_is_served(wire: Wire) -> None:
    methods = {f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods}
    assert {method.name for method in methods.values()} >= SERVED
    for path, method in methods.items():
        if method.name in SERVED and not method.server_streaming:
            error = wire.channel.unary_unary(path).future(b"", timeout=30).exception()
            assert error is None or Refusal(error).code is grpc.StatusCode.INVALID_ARGUMENT


def forwarded(wire: Wire, called: str, message: Message, key: bytes, **changed: Any) -> node_pb2.ForwardResponse:
    """A call as another node would send it, signed with the key."""
    target = wire.admin.GetStatus(admin_pb2.GetStatusRequest()).incarnation
    raw_request = message.SerializeToString()
    fields: dict[str, Any] = {"method": called, "request": raw_request, "tenant": "default", "incarnation": target}
    signed = signature(key, "elsewhere", bytes(16), target, "default", called, raw_request)
    sent = node_pb2.ForwardRequest(**{**fields, **changed})
    header = (NODE_HEADER, f"elsewhere:{bytes(16).hex()}:{signed.hex()}")
    call = wire.channel.unary_unary("/sessiond.v1.NodeService/Forward")
    return node_pb2.ForwardResponse.FromString(call(sent.SerializeToString(), timeout=30, metadata=[header]))


def test_a_call_from_node_to_node_needs_the_key_that_they_share() -> None:
    key = bytes(range(32))
    with running_daemon(node_key=key.hex()) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.create("theirs")
        request = session_pb2.GetSessionRequest(session_id="theirs")
        answered = forwarded(wire, "GetSession", request, key)
        assert session_pb2.GetSessionResponse.FromString(answered.reply).session.session_id == "theirs"
        unsigned = wire.channel.unary_unary("/sessiond.v1.NodeService/Forward")
        refused("NODE_UNVERIFIED", None, lambda: unsigned(b"", timeout=30))
        refused("NODE_UNVERIFIED", None, lambda: forwarded(wire, "GetSession", request, bytes(32)))
        other = session_pb2.GetSessionRequest(session_id="another").SerializeToString()
        for changed in (
            {"request": other},
            {"method": "DeleteSession"},
            {"incarnation": bytes(16)},
            {"tenant": "another"},
        ):
            refused("NODE_UNVERIFIED", None, partial(forwarded, wire, "GetSession", request, key, **changed))
        # What is about the node itself is never another node's to ask.
        refused("NOT_SERVED_YET", None, lambda: forwarded(wire, "Drain", admin_pb2.DrainRequest(), key))
        refused("NOT_SERVED_YET", None, lambda: forwarded(wire, "Forward", node_pb2.ForwardRequest(), key))
        rescue = wire.channel.unary_unary("/sessiond.v1.NodeService/Rescue")
        refused("NODE_UNVERIFIED", None, lambda: rescue(b"", timeout=30))


def test_a_flush_of_an_unknown_session_is_not_found(wire: Wire, session: str) -> None:
    refused("SESSION_NOT_FOUND", None, wire.admin.Flush, admin_pb2.FlushRequest(session_id="never-made"))
    refused("INVALID_SESSION_ID", "session_id", wire.admin.Flush, admin_pb2.FlushRequest(session_id="no good"))
    assert wire.admin.Flush(admin_pb2.FlushRequest(session_id=session)).failed_sessions == 0


def test_calls_above_the_limit_are_refused_with_details() -> None:
    with (
        running_daemon(concurrent_calls_max=1) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        wire.create("busy")
        # Each takes the tokenizer a tenth of a second and more, away from the loop that takes the others in.
        requests = [
            session_pb2.AppendTurnRequest(session_id="busy", turns=[user(f"n{n}", " " * 400_000)]) for n in range(8)
        ]
        calls = [wire.sessions.AppendTurn.future(request, timeout=30) for request in requests]
        outcomes = [call.exception() for call in calls]
        failed = [
            refused("OVERLOADED", None, call.result) for call, error in zip(calls, outcomes, strict=True) if error
        ]
        assert 1 <= len(failed) <= 7
        assert len(list(wire.turns("busy"))) == 8 - len(failed)
