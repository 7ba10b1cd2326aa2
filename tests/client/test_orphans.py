"""Turns that a node had acknowledged before another took its session over: shown, and appended again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sessiond.cli import exits
from sessiond.client import (
    Client,
    Conflict,
    Invalid,
    again,
    assistant,
    milestone,
    rewind,
    state_change,
    summary,
    system,
    tool_result,
    user,
)
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import session_pb2, turn_pb2
from tests.cli.command import run
from tests.client.servers import OnLoop, nodes

NEVER_MS = 3_600_000


@pytest.fixture(params=[Client, OnLoop], ids=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


def text(turn: turn_pb2.Turn) -> str:
    return turn.message.parts[0].text


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Two nodes; the first was killed with turns of `s0` to `s3` that only its disk has, and came back."""
    settings = {"flush_interval_ms": NEVER_MS, "flush_waiting_ms": NEVER_MS}
    with nodes(tmp_path_factory.mktemp("parted"), 2, **settings) as both:
        names = [f"s{number}" for number in range(4)]
        with Client(both[0].address) as first, Client(both[1].address, timeout_s=60.0) as second:
            for name in names:
                first.create_session(name)
                first.append(name, [user("One"), assistant(tool_calls=[("open", "f", "{}")])], durability="CLOUD")
                turns = [
                    tool_result("open", "late"),
                    user("Two", turn_id=f"two-{name}"),
                    assistant("Three", tokens={"o200k_base": 7}, model="m"),
                    milestone("here"),
                    system("Be rude."),
                    state_change(mode="lost"),
                    rewind(1),
                ]
                first.append(name, turns)
            both[0].kill()
            for name in names:
                second.append(name, [user("Meanwhile"), assistant("Fine")], durability="CLOUD")
            both[0].start()
            for name in names:
                until(lambda name=name: len(list(second.list_orphans(name))) == 7)
        yield both


def test_orphans_come_from_any_node_as_they_were_acknowledged(kind: Any, parted: list[Daemon]) -> None:
    for daemon in parted:
        with kind(daemon.address) as client:
            found = list(client.list_orphans("s0"))
            assert [turn.seq for turn in found] == list(range(3, 10))
            assert {turn.epoch for turn in found} == {1}
            assert text(found[1]) == "Two"
            assert list(client.list_orphans("s0", user_id="")) == found
    # They are not in the log, and the session says that they may be missing.
    with kind(parted[1].address) as client:
        assert not {turn.turn_id for turn in found} & {turn.turn_id for turn in client.list_turns("s0")}
        assert client.resume("s0", 1000).rung == "PARTIAL"


def test_what_only_says_something_is_appended_again_and_once(kind: Any, parted: list[Daemon]) -> None:
    name = "s1" if kind is Client else "s2"
    with kind(parted[0].address) as client:
        before = {turn.turn_id: turn for turn in client.list_orphans(name)}
        outcome = client.reappend(name)
        # The call that the result answers is closed by now; the other kinds act on a log that is another one.
        assert [(turn.seq, error and error.reason) for turn, error in outcome.left] == [
            (7, None),
            (8, None),
            (9, None),
            (3, "TOOL_RESULT_WITHOUT_CALL"),
        ]
        turns = list(client.list_turns(name))
        tail = turns[-3:]
        assert [done.position.seq for done in outcome.appended] == [turn.seq for turn in tail]
        assert [text(turn) for turn in tail[:2]] == ["Two", "Three"]
        assert tail[2].milestone.label == "here"
        assert (tail[1].o200k.tokens, tail[1].o200k.source) == (7, turn_pb2.TOKEN_SOURCE_SUPPLIED)
        assert tail[1].meta.model == "m"
        for turn in tail:
            assert turn.body_digest == before[turn.turn_id].body_digest
            assert turn.meta.created_at_unix_ms == before[turn.turn_id].append_time_unix_ms
        assert [turn.seq for turn in client.list_orphans(name)] == [3, 7, 8, 9]
        # Again changes nothing: what is in the log is left out, and a repeat is a duplicate.
        assert client.reappend(name).appended == []
        assert client.reappend(name, tail).appended[0].duplicate
        assert len(list(client.list_turns(name))) == len(turns)


def test_a_kind_that_was_chosen_is_appended(kind: Any, parted: list[Daemon]) -> None:
    with kind(parted[1].address) as client:
        (chosen,) = [turn for turn in client.list_orphans("s0") if turn.HasField("state")]
        turn_id = f"{chosen.turn_id}-{kind.__name__}"
        copy = turn_pb2.Turn()
        copy.CopyFrom(chosen)
        copy.turn_id = turn_id
        outcome = client.reappend("s0", [copy], durability="CLOUD")
        assert ([done.turn_id for done in outcome.appended], outcome.left) == ([turn_id], [])
        session = client.get_session("s0")
        assert session.state.mode == "lost"
        assert session.cloud_seq == session.head.seq


def test_the_command_shows_them_and_appends_them(parted: list[Daemon]) -> None:
    server = ("--server", parted[1].address)
    shown = run("orphans", "s3", *server)
    assert shown.code == exits.OK
    lines = shown.out.splitlines()
    assert lines[0].split() == ["epoch:seq", "kind", "appended", "turn_id", "text"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["1:3", "tool"],
        ["1:4", "user"],
        ["1:5", "assistant"],
        ["1:6", "milestone"],
        ["1:7", "system"],
        ["1:8", "state"],
        ["1:9", "rewind"],
    ]
    assert lines[2].split()[-2:] == ["two-s3", "Two"]
    again = run("orphans", "s3", "--reappend", *server)
    assert again.code == exits.INCOMPLETE
    assert again.out.splitlines()[0] == "two-s3  2:5"
    assert len(again.out.splitlines()) == 3
    assert "TOOL_RESULT_WITHOUT_CALL" in again.err
    assert again.err.count("acts on the rest of the session") == 3
    told = run("orphans", "s3", "--reappend", "--json", *server).json
    assert [turn["seq"] for turn in told["turns"]] == [3, 7, 8, 9]
    assert told["appended"] == []
    assert {row["kind"]: row["reason"] for row in told["left"]} == {
        "tool": "TOOL_RESULT_WITHOUT_CALL",
        "system": "",
        "state": "",
        "rewind": "",
    }
    assert run("orphans", "nobody", *server).code == exits.NOT_FOUND


def test_a_turn_that_came_out_goes_in_again_as_the_same(kind: Any) -> None:
    with running_daemon(flush_interval_ms=50) as daemon, kind(daemon.address) as client:
        session = client.create_session().session_id
        client.append(session, [system("Be brief."), user([turn_pb2.Part(text="One")], name="ada")])
        client.append(session, [assistant(tool_calls=[("c", "f", "{}")], tokens={"cl100k_base": 3})])
        client.append(session, [tool_result("c", "x", is_error=True), milestone("m", "n")])
        client.append(session, [assistant("Cut off", status="INTERRUPTED")])
        client.append(session, [state_change(flags={"a": True}, pins={"k": "v"}, policy={"budget_tokens": 9})])
        turns = list(client.list_turns(session))
        client.append(session, [summary("All.", turns[-1]), rewind(2)])
        for turn in client.list_turns(session):
            done = client.append(session, again(turn))
            assert done.outcome == "DUPLICATE", turn
            changed = again(turn)
            changed.ClearField(changed.WhichOneof("body"))
            changed.ClearField("role")
            changed.ClearField("status")
            changed.milestone.label = "other"
            with pytest.raises((Conflict, Invalid)):
                client.append(session, changed)


def test_many_orphans_go_in_as_many_appends_as_they_need(kind: Any) -> None:
    with running_daemon(flush_interval_ms=50) as daemon, kind(daemon.address, timeout_s=60.0) as client:
        session = client.create_session().session_id
        turns = []
        for number in range(400):
            turn = turn_pb2.Turn(turn_id=f"t{number}", seq=number + 1, role=turn_pb2.ROLE_USER)
            turn.message.parts.add(text="x" * (40_000 if number < 150 else 10))
            turns.append(turn)
        outcome = client.reappend(session, turns)
        assert [done.position.seq for done in outcome.appended] == list(range(1, 401))
        calls = [row.count for row in client.get_status().calls if row.method == "AppendTurn" and row.status == "OK"]
        assert calls == [3]
        assert isinstance(outcome.appended[0], session_pb2.AppendedTurn)
