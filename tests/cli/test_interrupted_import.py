"""Import through crashes and losses: run again, it continues; what can't be known to be back is said to be missing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sessiond.cli import import_
from sessiond.client import Client, user
from sessiond.testing import Daemon, running_daemon
from tests.cli.command import run
from tests.cli.generated import Json, by_id, conversations, large, write


def say(text: str) -> Json:
    return {"role": "user", "content": text}


@pytest.fixture
def after_appends(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Have something happen after a number of appends, while others are under way."""

    def arm(count: int, action: Callable[[], None]) -> None:
        lock, left = threading.Lock(), [count]
        send = import_.Importer._send

        def counted(self, session_id, batch, present):
            done = send(self, session_id, batch, present)
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    action()
            return done

        monkeypatch.setattr(import_.Importer, "_send", counted)

    return arm


def lines_and_turns() -> tuple[list[Json], int]:
    made = conversations(seed=5, count=40, exchanges_max=30)
    # A session without turns that was lost can't be shown to be whole again.
    lines = [{**line, "id": f"c{n}"} for n, line in enumerate(made) if line["messages"]]
    return lines, sum(len(line["messages"]) for line in lines)


def test_a_killed_daemon_ends_the_import_as_unavailable_and_the_next_run_continues(
    own_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_appends
) -> None:
    monkeypatch.setattr(import_, "RETRY_S", 0.2)
    lines, turns = lines_and_turns()
    file = write(tmp_path / "k.jsonl", lines)
    with monkeypatch.context() as patch:
        patch.setattr(import_, "BATCH_TURNS_MAX", 5)
        after_appends(25, own_daemon.kill)
        ran = run("import", file, "--json")
    assert ran.code == 5
    assert ran.error["reason"] == "SERVER_UNREACHABLE"
    assert "Run the same command again: it continues from here." in ran.error["remedy"]
    assert 0 < ran.json["turns_added"] < turns
    own_daemon.start()
    again = run("import", file, "--json")
    assert (again.code, again.err) == (0, "")
    # What was acknowledged is there, and what was in flight may be.
    assert again.json["turns_present"] >= ran.json["turns_added"]
    assert again.json["turns_present"] + again.json["turns_added"] == turns
    assert by_id(run("export").lines) == by_id(lines)
    with Client(own_daemon.address) as client:
        ids = [turn.turn_id for line in lines for turn in client.list_turns(line["id"])]
    assert len(ids) == len(set(ids)) == turns


def test_a_daemon_that_comes_back_in_time_is_not_even_noticed(
    own_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_appends
) -> None:
    monkeypatch.setattr(import_, "BATCH_TURNS_MAX", 5)
    monkeypatch.setattr(import_, "RETRY_S", 20.0)
    lines, turns = lines_and_turns()

    def crash() -> None:
        own_daemon.kill()
        own_daemon.start()

    after_appends(25, crash)
    ran = run("import", write(tmp_path / "b.jsonl", lines), "--json")
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["turns_added"] == turns
    assert by_id(run("export").lines) == by_id(lines)


def test_turns_lost_with_the_hot_tier_come_back_and_the_session_is_whole_again(
    own_daemon: Daemon, tmp_path: Path
) -> None:
    lines, turns = lines_and_turns()
    file = write(tmp_path / "l.jsonl", lines)
    assert run("import", file).code == 0
    own_daemon.kill()
    own_daemon.lose_hot_tier()
    own_daemon.start()
    partial = run("export")
    assert partial.code == 9
    assert "may be missing" in partial.err
    assert run("export", "--allow-missing").code == 0
    ran = run("import", file, "--json")
    assert ran.code == 0
    assert (ran.json["turns_added"], ran.json["turns_present"], ran.json["possibly_missing"]) == (turns, 0, 0)
    whole = run("export")
    assert (whole.code, whole.err) == (0, "")
    assert by_id(whole.lines) == by_id(lines)
    with Client(own_daemon.address) as client:
        assert not [line["id"] for line in lines if client.get_session(line["id"]).missing]


def test_a_flag_is_cleared_also_when_an_earlier_run_brought_the_turns_back(own_daemon: Daemon, tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [{"id": "a", "messages": [say(f"m{n}") for n in range(9)]}])
    run("import", file)
    own_daemon.kill()
    own_daemon.lose_hot_tier()
    own_daemon.start()
    with Client(own_daemon.address) as client:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_.Importer, "settle", lambda *_: None)
            assert run("import", file).code == 0
        assert client.get_session("a").missing
        # Not even owned any more: only an owner can clear it.
        own_daemon.terminate()
        own_daemon.start()
        assert client.get_session("a").missing
        acked: list[Any] = []
        resume = import_.Importer._resume

        def recorded(self: import_.Importer, session_id: str, **what: Any) -> None:
            acked.append(what["highest_acked"])
            resume(self, session_id, **what)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_.Importer, "_resume", recorded)
            assert run("import", file).code == 0
        (last,) = client.list_turns("a", first_seq=9)
        assert {(position.seq, position.chain) for position in acked} == {(9, last.chain)}
        assert not client.get_session("a").missing


def test_what_the_files_do_not_reach_stays_marked_until_it_is_accepted(own_daemon: Daemon, tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.jsonl", [{"id": name, "messages": [say("a"), say("b")]} for name in ("went-on", "still")]
    )
    run("import", file)
    with Client(own_daemon.address) as client:
        assert run("flush").code == 0
        client.append("went-on", user("only on this disk"))
        own_daemon.kill()
        own_daemon.lose_hot_tier()
        own_daemon.start()
        ran = run("import", file, "--json")
        assert ran.code == 9
        assert (ran.json["unchanged"], ran.json["possibly_missing"]) == (2, 2)
        assert "--accept-missing" in ran.err
        assert run("export", "went-on").code == 9
        assert client.resume("went-on", 100).rung == "PARTIAL"
        accepted = run("import", file, "--accept-missing", "--json")
        assert (accepted.code, accepted.json["possibly_missing"]) == (0, 0)
        assert run("export", "went-on").code == 0
        assert client.resume("went-on", 100).rung == "HOT"


def test_into_continues_after_a_kill(
    own_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_appends
) -> None:
    lines, turns = lines_and_turns()
    file = write(tmp_path / "i.jsonl", lines)
    monkeypatch.setattr(import_, "RETRY_S", 0.2)
    after_appends(3, own_daemon.kill)
    ran = run("import", file, "--into", "all", "--json")
    assert (ran.code, ran.json["turns_added"]) == (5, 3 * import_.BATCH_TURNS_MAX)
    own_daemon.start()
    again = run("import", file, "--into", "all", "--json")
    assert again.code == 0
    assert again.json["turns_added"] + again.json["turns_present"] == turns
    (line,) = run("export", "all").lines
    assert line["messages"] == [message for one in lines for message in one["messages"]]


def test_a_draining_daemon_ends_the_import_as_unavailable(
    own_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_, "RETRY_S", 0.2)
    assert run("drain", "--json").json["clean"] is True
    ran = run("import", write(tmp_path / "d.jsonl", [{"id": "a", "messages": [say("a")]}]), "--json")
    assert (ran.code, ran.error["reason"]) == (5, "NODE_DRAINING")


def test_a_full_hot_tier_ends_the_import_as_exhausted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_, "RETRY_S", 0.2)
    talk = [large(100_000) for _ in range(100)]
    file = write(tmp_path / "f.jsonl", [{"id": f"c{n}", "messages": talk} for n in range(4)])
    with running_daemon(map_size_bytes=16 * 1024**2, flush_interval_ms=3_600_000) as daemon:
        ran = run("import", file, "--server", daemon.address, "--json")
        assert (ran.code, ran.error["reason"]) == (7, "HOT_TIER_FULL")
        assert json.loads(ran.out)["failed"] == 0
