"""The real conversations through the command line, the daemon killed five times on the way: each turn exactly once."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from sessiond.client import Client
from sessiond.testing import Daemon, running_daemon
from tests.airline import PATH, needs_airline
from tests.cli.command import Ran, process, start

KILLS = 5
# Appends of a run before its daemon is killed. All of it takes more than 200 calls, one conversation or more in flight
# at each kill.
APPENDS_BEFORE_KILL = 15
SESSIONS, TURNS = 200, 5308


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(data_dir=tmp_path / "data") as started:
        yield started


def given() -> dict[str, dict]:
    with gzip.open(PATH, "rt", encoding="utf-8") as lines:
        return {line["id"]: line for line in map(json.loads, lines)}


def appends(client: Client) -> int:
    """Appends that this daemon acknowledged since it started."""
    return sum(row.count for row in client.get_status().calls if (row.method, row.status) == ("AppendTurn", "OK"))


def kill_while_it_imports(daemon: Daemon, client: Client, running: Popen[str]) -> None:
    """SIGKILL once so much of this run was acknowledged and more is under way."""
    while appends(client) < APPENDS_BEFORE_KILL:
        assert running.poll() is None, "the import ended before its daemon could be killed"
        time.sleep(0.002)
    daemon.kill()


def imported(daemon: Daemon) -> Ran:
    return process("import", PATH, "--json", SESSIOND_SERVER=daemon.address)


def exported(daemon: Daemon) -> dict[str, dict]:
    ran = process("export", SESSIOND_SERVER=daemon.address)
    assert (ran.code, ran.err) == (0, "")
    found = {line["id"]: line for line in ran.lines}
    assert len(found) == len(ran.lines)
    return found


def heads(client: Client) -> dict[str, int]:
    found = [(session.session_id, session.head.seq) for session in client.list_sessions()]
    assert len(found) == len(dict(found))
    return dict(found)


def check_each_turn_once(client: Client, conversations: dict[str, dict]) -> None:
    assert heads(client) == {name: len(line["messages"]) for name, line in conversations.items()}
    seen: set[str] = set()
    for name, line in conversations.items():
        turns = list(client.list_turns(name))
        assert [turn.seq for turn in turns] == list(range(1, len(line["messages"]) + 1))
        seen.update(turn.turn_id for turn in turns)
    assert len(seen) == TURNS


@needs_airline
def test_five_kills_on_the_way_and_the_loss_of_the_disk_leave_every_turn_exactly_once(daemon: Daemon) -> None:
    conversations = given()
    assert (len(conversations), sum(len(line["messages"]) for line in conversations.values())) == (SESSIONS, TURNS)
    acknowledged = 0
    with Client(daemon.address) as client:
        for _ in range(KILLS):
            running = start("import", PATH, "--json", "--timeout", "3", SESSIOND_SERVER=daemon.address)
            try:
                kill_while_it_imports(daemon, client, running)
                out, err = running.communicate(timeout=60)
            finally:
                running.kill()
            assert running.returncode == 5
            assert "Run the same command again: it continues from here." in err
            summary = json.loads(out)
            # What earlier runs were told is there; what this one was told comes on top.
            assert summary["failed"] == 0
            assert summary["turns_added"] > 0
            acknowledged += summary["turns_added"]
            daemon.start()
            there = sum(heads(client).values())
            assert acknowledged <= there < TURNS
            acknowledged = there
        last = imported(daemon)
        assert last.code == 0
        assert (last.json["conversations"], last.json["failed"], last.json["possibly_missing"]) == (SESSIONS, 0, 0)
        assert last.json["turns_present"] == acknowledged
        assert last.json["turns_present"] + last.json["turns_added"] == TURNS
        check_each_turn_once(client, conversations)
        assert exported(daemon) == conversations
        before = heads(client)

        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        daemon.start()
        again = imported(daemon)
        assert again.code == 0
        assert (again.json["unchanged"], again.json["turns_added"], again.json["turns_present"]) == (SESSIONS, 0, TURNS)
        assert heads(client) == before
        check_each_turn_once(client, conversations)
        assert exported(daemon) == conversations
    ran = process("verify", "--data-dir", daemon.data_dir, "--json")
    assert (ran.code, ran.json["checked_sessions"], ran.json["violations"]) == (0, SESSIONS, [])
