"""resume_many and append_many, sync and asyncio alike: results in order, and repeats of only what may be repeated."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sessiond.client import (
    AppendResult,
    Client,
    Conflict,
    Context,
    Invalid,
    NotFound,
    SessiondError,
    Unavailable,
    assistant,
    user,
)
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import session_pb2, turn_pb2
from tests.client.servers import Line, OnLoop, Scripted, nodes, refuse

NEVER_MS = 3_600_000
UNAVAILABLE, NOT_FOUND, EXHAUSTED, INVALID = 14, 5, 8, 3


@pytest.fixture(params=[Client, OnLoop], ids=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running_daemon(flush_interval_ms=50) as daemon:
        yield daemon


@pytest.fixture
def client(kind: Any, daemon: Daemon) -> Iterator[Any]:
    with kind(daemon.address) as client:
        yield client


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.stop()


def made(client: Any, count: int) -> list[str]:
    return [client.create_session().session_id for _ in range(count)]


def large(count: int) -> list[turn_pb2.TurnInput]:
    """Turns of 1 MB, of a few tokens."""
    turns = [user("x" * 1_000_000) for _ in range(count)]
    for turn in turns:
        for encoding in (turn_pb2.ENCODING_O200K_BASE, turn_pb2.ENCODING_CL100K_BASE):
            turn.supplied_tokens.add(encoding=encoding, tokens=9)
    return turns


def reasons(results: list[Any]) -> list[str]:
    return [result.reason if isinstance(result, SessiondError) else "" for result in results]


def calls_of(daemon: Daemon, method: str) -> int:
    with Client(daemon.address) as client:
        return sum(row.count for row in client.get_status().calls if row.method == method)


# Against a daemon ----------------------------------------------------------------------------------------------------


def test_results_come_in_order_each_a_result_or_its_error(client: Any) -> None:
    first, second, third = made(client, 3)
    appended = client.append_many(
        [
            (first, user("Hello")),
            ("never-made", user("Hello")),
            {"session_id": second, "turns": [user("One"), assistant("Two")], "expected": 0},
            (first, assistant("Good day")),
            {"session_id": third, "turns": user("x"), "expected": 7},
        ],
        context={"budget_tokens": 500},
    )
    assert [type(result) for result in appended] == [AppendResult, NotFound, AppendResult, AppendResult, Conflict]
    assert [result.head.seq for result in (appended[0], appended[2], appended[3])] == [1, 2, 2]
    assert len(appended[3].context.turns) == 2
    resumed = client.resume_many(
        [first, "never-made", {"session_id": second, "since": 1}, {"session_id": third, "budget_tokens": 1}, first],
        budget_tokens=700,
    )
    assert [type(result) for result in resumed] == [Context, NotFound, Context, Invalid, Context]
    alone = client.resume(first, 700)
    for found in (resumed[0], resumed[4]):
        # Not all of it: it is flushed meanwhile.
        assert (found.etag, found.to_openai(), found.tokens) == (alone.etag, alone.to_openai(), alone.tokens)
    assert resumed[2].delta
    assert [turn.seq for turn in resumed[2].turns] == [2]
    assert resumed[1].metadata["session_id"] == "never-made"
    assert str(resumed[3]).count(resumed[3].remedy) == 1
    assert client.resume_many([]) == client.append_many([]) == []


def test_errors_of_items_are_those_of_single_calls(client: Any) -> None:
    (session,) = made(client, 1)
    client.append(session, user("Hello"))
    bad = [
        {"session_id": "no such id"},
        {"session_id": "never-made"},
        {"session_id": session, "budget_tokens": 3},
        {"session_id": session, "strategy": "SUMMARY"},
    ]
    for arguments, found in zip(bad, client.resume_many(bad, 400), strict=True):
        with pytest.raises(SessiondError) as single:
            client.resume(**{"budget_tokens": 400, **arguments})
        assert type(found) is type(single.value)
        assert (found.reason, str(found), found.metadata) == (
            single.value.reason,
            str(single.value),
            single.value.metadata,
        )
        assert found.retry_after_ms == single.value.retry_after_ms


def test_what_the_client_itself_refuses_is_the_items_error_too(client: Any) -> None:
    (session,) = made(client, 1)
    results = client.append_many([(session, user("One")), {"session_id": session, "turns": [], "durability": "SAFE"}])
    assert reasons(results) == ["", "INVALID_CONTEXT"]
    results = client.resume_many([session, {"session_id": session, "budget_tokens": -1}], 500)
    assert reasons(results) == ["", "INVALID_CONTEXT"]
    with pytest.raises(TypeError):
        client.resume_many([session], 500, budget=3)


def test_more_than_one_request_takes_goes_in_several(client: Any, daemon: Daemon) -> None:
    sessions = made(client, 20)
    before = calls_of(daemon, "BatchResumeSessions")
    results = client.resume_many(sessions * 30, 500)
    assert all(isinstance(result, Context) for result in results)
    assert calls_of(daemon, "BatchResumeSessions") - before == 3
    # By their bytes: two of these have no room in one request.
    before = calls_of(daemon, "BatchAppendTurns"), calls_of(daemon, "AppendTurn")
    results = client.append_many(
        [(sessions[0], large(3)), (sessions[1], large(3)), (sessions[2], user("x")), (sessions[3], user("x"))]
    )
    assert [result.head.seq for result in results] == [3, 3, 1, 1]
    assert calls_of(daemon, "BatchAppendTurns") - before[0] == 1
    assert calls_of(daemon, "AppendTurn") - before[1] == 1


def test_appends_to_one_session_are_made_in_their_order(client: Any) -> None:
    sessions = made(client, 3)
    turns = [(session, user(f"{number}")) for number in range(6) for session in sessions]
    results = client.append_many(turns)
    for number, session in enumerate(sessions):
        assert [result.head.seq for result in results[number::3]] == list(range(1, 7))
        assert [turn.message.parts[0].text for turn in client.list_turns(session)] == list("012345")
    again = client.append_many(turns)
    assert {result.outcome for result in again} == {"DUPLICATE"}


def test_turns_of_batches_are_kept_to_be_sent_again(kind: Any, tmp_path: Path) -> None:
    settings = {"flush_interval_ms": NEVER_MS, "flush_waiting_ms": NEVER_MS, "lease_ms": 700}
    with running_daemon(tmp_path, **settings) as daemon, kind(daemon.address, resend=True) as client:
        sessions = made(client, 2)
        client.append_many([(session, [user("One"), assistant("Two")]) for session in sessions])
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.start()
        for session in sessions:
            restored = client.within(60.0).resend(session, 500)
            assert [turn.message.parts[0].text for turn in restored.turns] == ["One", "Two"]


def test_contexts_beyond_one_reply_are_asked_for_again(client: Any, daemon: Daemon) -> None:
    (session,) = made(client, 1)
    for _ in range(7):
        client.append(session, large(1))
    left_out = "BatchResumeSessions/item", "RESOURCE_EXHAUSTED", "BATCH_REPLY_FULL"

    def count() -> int:
        rows = client.get_status().calls
        return sum(row.count for row in rows if (row.method, row.status, row.reason) == left_out)

    before = count()
    results = client.within(60.0).resume_many([session] * 10, 4000)
    assert [len(result.turns) for result in results] == [7] * 10
    assert count() - before == 6 + 2


# Several nodes -------------------------------------------------------------------------------------------------------


def test_sessions_of_several_nodes_are_asked_of_each_and_go_on_when_one_drains(kind: Any, tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as daemons, kind(",".join(daemon.address for daemon in daemons)) as client:
        sessions = made(client, 30)
        assert reasons(client.append_many([(session, user("One")) for session in sessions])) == [""] * 30
        assert reasons(client.resume_many(sessions, 500)) == [""] * 30
        # Each node was asked for what it owns, so that none had to forward.
        status = []
        for daemon in daemons:
            with Client(daemon.address) as direct:
                status.append(direct.get_status())
        assert sum(row.count for one in status for row in one.ownership.forwarded) == 0
        assert all(one.turns_appended for one in status)
        daemons[1].terminate()
        results = client.append_many([(session, assistant("Two")) for session in sessions])
        assert reasons(results) == [""] * 30
        assert [result.head.seq for result in results] == [2] * 30
        contexts = client.resume_many(sessions, 500)
        assert [len(context.turns) for context in contexts] == [2] * 30


def test_redirects_lead_each_item_to_its_owner(kind: Any, tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as daemons:
        with Client(daemons[1].address) as other:
            sessions = made(other, 4)
        with kind(daemons[0].address, redirects=True) as client:
            for _ in range(2):
                assert reasons(client.resume_many(sessions, 500)) == [""] * 4
            assert reasons(client.append_many([(session, user("One")) for session in sessions])) == [""] * 4
        with Client(daemons[0].address) as direct:
            assert sum(row.count for row in direct.get_status().ownership.forwarded) == 0


# What is repeated ----------------------------------------------------------------------------------------------------


def error(code: int, reason: str, retry_after_ms: int = 0, **metadata: str) -> session_pb2.ItemError:
    return session_pb2.ItemError(
        code=code, reason=reason, message="It is so.", retry_after_ms=retry_after_ms, metadata=metadata
    )


def resumes(*items: session_pb2.ItemError | str) -> Line:
    """A reply to a batch of resumes: an error, or a context with this etag."""
    reply = session_pb2.BatchResumeSessionsResponse()
    for item in items:
        if isinstance(item, str):
            reply.items.add().context.context_etag = item
        else:
            reply.items.add(error=item)
    return lambda _: reply.SerializeToString()


def resumed(etag: str) -> Line:
    reply = session_pb2.ResumeSessionResponse()
    reply.context.context_etag = etag
    return lambda _: reply.SerializeToString()


def appends(*items: session_pb2.ItemError | int) -> Line:
    reply = session_pb2.BatchAppendTurnsResponse()
    for item in items:
        if isinstance(item, int):
            reply.items.add().response.head.seq = item
        else:
            reply.items.add(error=item)
    return lambda _: reply.SerializeToString()


def asked(scripted: Scripted) -> list[list[str]]:
    """The sessions of each request so far. A single call's is taken for a batch of what its id is."""
    found = []
    for _, raw, _ in scripted.requests:
        with contextlib.suppress(Exception):
            batch = session_pb2.BatchResumeSessionsRequest.FromString(raw)
            found.append([request.session_id for request in batch.requests])
            continue
        found.append([session_pb2.ResumeSessionRequest.FromString(raw).session_id])
    return found


def test_only_items_that_may_be_repeated_are(kind: Any, scripted: Scripted) -> None:
    scripted.script = [
        resumes(
            "a1",
            error(UNAVAILABLE, "STORE_UNAVAILABLE", 10),
            error(NOT_FOUND, "SESSION_NOT_FOUND"),
            error(EXHAUSTED, "OVERLOADED", 10),
            error(EXHAUSTED, "PINS_FULL"),
            error(INVALID, "INVALID_BUDGET"),
        ),
        resumes(error(UNAVAILABLE, "STORE_UNAVAILABLE", 10), "d1"),
        resumed("b1"),
    ]
    with kind(scripted.address) as client:
        results = client.resume_many(list("abcdef"), 500)
    assert reasons(results) == ["", "", "SESSION_NOT_FOUND", "", "PINS_FULL", "INVALID_BUDGET"]
    assert [results[place].etag for place in (0, 1, 3)] == ["a1", "b1", "d1"]
    assert asked(scripted) == [list("abcdef"), ["b", "d"], ["b"]]


def test_items_wait_as_long_as_the_daemon_asked_and_no_longer(kind: Any, scripted: Scripted) -> None:
    scripted.script = [
        resumes(
            error(UNAVAILABLE, "STORE_UNAVAILABLE", 300),
            error(UNAVAILABLE, "STORE_UNAVAILABLE", 300),
            error(UNAVAILABLE, "HOT_TIER_FAILED", 1500),
        ),
        resumes("a", "b"),
        resumed("c"),
    ]
    with kind(scripted.address) as client:
        assert reasons(client.resume_many(list("abc"), 500)) == [""] * 3
    began, second, third = [at for at, _, _ in scripted.requests]
    assert 0.3 <= second - began < 1.4
    assert 1.5 <= third - began < 5


def test_a_lost_connection_repeats_the_batch_with_the_same_turn_ids(kind: Any, scripted: Scripted) -> None:
    scripted.script = [refuse(grpc.StatusCode.UNAVAILABLE), appends(1, 1)]
    with kind(scripted.address) as client:
        results = client.append_many([("a", {"role": "user", "content": "x"}), ("b", user("y"))])
    assert [result.head.seq for result in results] == [1, 1]
    assert scripted.requests[0][1] == scripted.requests[1][1]
    batch = session_pb2.BatchAppendTurnsRequest.FromString(scripted.requests[0][1])
    assert all(request.turns[0].turn_id for request in batch.requests)


def test_a_refusal_of_the_whole_is_every_items_error_and_not_repeated(kind: Any, scripted: Scripted) -> None:
    scripted.script = [refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_BATCH")]
    with kind(scripted.address) as client:
        assert reasons(client.resume_many(list("ab"), 500)) == ["INVALID_BATCH"] * 2


def test_a_later_append_to_a_session_waits_for_the_outcome_of_the_earlier(kind: Any, scripted: Scripted) -> None:
    def appended(seq: int) -> Line:
        head = turn_pb2.TurnPosition(seq=seq)
        return lambda _: session_pb2.AppendTurnResponse(head=head).SerializeToString()

    scripted.script = [
        appends(error(UNAVAILABLE, "STORE_UNAVAILABLE", 10), 5),
        appended(1),
        refuse(grpc.StatusCode.ALREADY_EXISTS, "TURN_ID_REUSED"),
        # Tried whatever became of the one before it.
        appended(2),
    ]
    with kind(scripted.address) as client:
        first, second, third, other = client.append_many(
            [("a", user("1")), ("a", user("2")), ("a", user("3")), ("b", user("4"))]
        )
    assert (first.head.seq, second.reason, third.head.seq, other.head.seq) == (1, "TURN_ID_REUSED", 2, 5)
    batch = session_pb2.BatchAppendTurnsRequest.FromString(scripted.requests[0][1])
    sent = [[request.turns[0].message.parts[0].text for request in batch.requests]]
    for _, raw, _ in scripted.requests[1:]:
        sent.append([session_pb2.AppendTurnRequest.FromString(raw).turns[0].message.parts[0].text])
    assert sent == [["1", "4"], ["1"], ["2"], ["3"]]


def test_items_left_out_for_want_of_room_are_sent_again_at_once(kind: Any, scripted: Scripted) -> None:
    full = error(EXHAUSTED, "BATCH_REPLY_FULL", 1)
    scripted.script = [resumes("a", full, full), resumes("b", full), resumed("c")]
    # Without repeats: these were not begun.
    with kind(scripted.address, retry_s=0) as client:
        results = client.resume_many(list("abc"), 500)
    assert [result.etag for result in results] == ["a", "b", "c"]
    assert asked(scripted) == [["a", "b", "c"], ["b", "c"], ["c"]]


def test_nothing_is_repeated_where_that_is_switched_off(kind: Any, scripted: Scripted) -> None:
    scripted.script = [resumes("a", error(UNAVAILABLE, "STORE_UNAVAILABLE", 10))]
    with kind(scripted.address, retry_s=0) as client:
        assert reasons(client.resume_many(list("ab"), 500)) == ["", "STORE_UNAVAILABLE"]
    assert len(scripted.requests) == 1


def test_the_whole_ends_when_its_time_is_up(kind: Any) -> None:
    scripted = Scripted(always=resumes(*[error(UNAVAILABLE, "STORE_UNAVAILABLE", 50)] * 2))
    try:
        with kind(scripted.address, timeout_s=1.0) as client:
            began = time.monotonic()
            assert reasons(client.resume_many(list("ab"), 500)) == ["STORE_UNAVAILABLE"] * 2
            assert time.monotonic() - began < 5
    finally:
        scripted.stop()
    assert len(scripted.requests) > 1


def test_a_server_that_says_nothing_is_no_outcome_of_an_item(kind: Any, scripted: Scripted) -> None:
    def hang(_: object) -> bytes:
        scripted.release.wait(30)
        return b""

    scripted.script = [hang]
    with kind(scripted.address, timeout_s=0.5) as client:
        results = client.append_many([("a", user("x")), ("b", user("y"))])
    assert reasons(results) == ["DEADLINE_TOO_SHORT"] * 2
    assert all(isinstance(result, Unavailable) and "not known" in str(result) for result in results)
