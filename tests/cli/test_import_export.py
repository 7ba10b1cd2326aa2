"""Import and export: what goes in comes out equal, a second run changes nothing, a bad line harms no other."""

from __future__ import annotations

import gzip
import json
import threading
from pathlib import Path

import pytest

from sessiond.cli import import_
from sessiond.cli.lines import session_id_of
from sessiond.client import Client, rewind, user
from sessiond.testing import Daemon
from tests.cli.command import process, run
from tests.cli.generated import ODD, Json, by_id, call, conversations, large, result, write


def say(text: str) -> Json:
    return {"role": "user", "content": text}


def counts(ran) -> tuple[int, ...]:
    names = ("conversations", "imported", "continued", "unchanged", "failed", "turns_added", "turns_present")
    return tuple(ran.json[name] for name in names)


def renamed(lines: list[Json], prefix: str) -> list[Json]:
    return [{**line, "id": f"{prefix}{line['id']}"} for line in lines]


def test_generated_conversations_come_out_equal_and_a_second_run_adds_nothing(daemon: Daemon, tmp_path: Path) -> None:
    lines = renamed(conversations(seed=7, count=60), "gen-")
    turns = sum(len(line["messages"]) for line in lines)
    file = write(tmp_path / "in.jsonl", lines)
    ran = run("import", file, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert counts(ran) == (60, 60, 0, 0, 0, turns, 0)
    names = [session_id_of("", line["id"]) for line in lines]
    exported = run("export", *names)
    assert (exported.code, exported.err) == (0, "")
    assert exported.lines == lines
    again = run("import", file, "--json")
    assert again.code == 0
    assert counts(again) == (60, 0, 0, 60, 0, 0, turns)
    assert run("export", *names).out == exported.out


def test_every_odd_message_comes_out_equal(daemon: Daemon, tmp_path: Path) -> None:
    odd = [
        *ODD,
        call("a", "b", "a"),
        result("a", None),
        result("b", []),
        {"role": "assistant", "content": "", "function_call": {"name": "old", "arguments": "{}"}},
        {"role": "function", "name": "old", "content": "x"},
        {"role": "assistant", "audio": {"id": "audio_1"}, "content": None},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "k", "type": "custom", "custom": {"name": "n", "input": "i"}}],
        },
        {"role": "tool", "tool_call_id": "k", "content": "", "name": "n"},
    ]
    file = write(tmp_path / "odd.jsonl", [{"id": "odd", "messages": odd}])
    assert run("import", file).code == 0
    (line,) = run("export", "odd").lines
    for given, got in zip(odd, line["messages"], strict=True):
        assert json.dumps(got, sort_keys=True) == json.dumps(given, sort_keys=True)


def test_times_users_and_metadata_reach_the_session(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    line = {
        "id": "timed",
        "user": "timed-ann",
        "metadata": {"channel": "web"},
        "created_at": "2024-05-01T10:00:00Z",
        "messages": [{**say("a"), "created_at": 1714557601}, say("b")],
    }
    plain = {"id": "untimed", "messages": [say("a")]}
    assert run("import", write(tmp_path / "t.jsonl", [line, plain]), "--user", "timed-bob").code == 0
    session = client.get_session("timed")
    assert (session.user_id, session.created_at_unix_ms) == ("timed-ann", 1714557600000)
    assert session.state.metadata["channel"] == "web"
    assert [turn.meta.created_at_unix_ms for turn in client.list_turns("timed")] == [1714557601000, 0]
    assert client.get_session("untimed").user_id == "timed-bob"
    assert [entry["session_id"] for entry in run("sessions", "--user", "timed-ann", "--json").lines] == ["timed"]
    assert run("export", "--user", "timed-ann").lines == [line]


def test_a_prefix_names_the_sessions_and_export_gives_the_own_id_back(daemon: Daemon, tmp_path: Path) -> None:
    lines = [{"id": "one", "messages": [say("a")]}, {"id": 2, "messages": [say("b")]}, {"id": "drei/é", "messages": []}]
    file = write(tmp_path / "p.jsonl", lines)
    assert run("import", file, "--session-prefix", "pre-").code == 0
    assert run("export", "pre-one", "pre-2", session_id_of("pre-", "drei/é")).lines == lines


def test_plain_lists_get_the_same_session_on_every_run(daemon: Daemon, tmp_path: Path) -> None:
    talk = [[say("a"), {"role": "assistant", "content": "b"}], [say("a"), {"role": "assistant", "content": "b"}]]
    file = write(tmp_path / "lists.jsonl", talk)
    assert counts(run("import", file, "--json"))[1:4] == (2, 0, 0)
    packed = tmp_path / "elsewhere" / "lists.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert counts(run("import", packed, "--json"))[1:4] == (0, 0, 2)
    assert run("export", "lists.jsonl-1", "lists.jsonl-2").lines == [
        {"id": f"lists.jsonl-{number}", "messages": messages} for number, messages in enumerate(talk, 1)
    ]


def test_standard_input_and_several_files_are_one_import(daemon: Daemon, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"id": "in-file", "messages": [say("a")]}])
    piped = json.dumps({"id": "in-pipe", "messages": [say("b")]}).encode()
    assert counts(run("import", file, "-", "--json", stdin=piped))[:2] == (2, 2)
    assert [line["id"] for line in run("export", "in-file", "in-pipe").lines] == ["in-file", "in-pipe"]


def test_a_conversation_that_grew_is_continued(daemon: Daemon, tmp_path: Path) -> None:
    talk = [say(f"m{n}") for n in range(200)]
    file = write(tmp_path / "g.jsonl", [{"id": "grows", "messages": talk[:70]}])
    run("import", file)
    write(file, [{"id": "grows", "messages": talk}])
    assert counts(run("import", file, "--json")) == (1, 0, 1, 0, 0, 130, 70)
    assert run("export", "grows").lines[0]["messages"] == talk


def test_a_session_that_went_on_is_left_as_it_is(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    file = write(tmp_path / "w.jsonl", [{"id": "went-on", "messages": [say("a"), say("b")]}])
    run("import", file)
    client.append("went-on", user("live"))
    assert counts(run("import", file, "--json")) == (1, 0, 0, 1, 0, 0, 2)
    assert run("export", "went-on").lines[0]["messages"] == [say("a"), say("b"), say("live")]


def test_another_conversation_of_the_same_id_is_a_conflict_and_the_others_go_on(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    run("import", write(tmp_path / "1.jsonl", [{"id": "taken", "messages": [say("a"), say("b"), say("c")]}]))
    # The last message that both have is equal; one before it is not.
    other = write(
        tmp_path / "2.jsonl", [{"id": "taken", "messages": [say("A"), say("b"), say("c"), say("d")]}, [say("z")]]
    )
    ran = run("import", other, "--json")
    assert ran.code == 9
    assert counts(ran)[1:5] == (1, 0, 0, 1)
    (failure,) = ran.json["failures"]
    assert failure["reason"] == "SESSION_EXISTS"
    assert failure["place"] == f"{other}:1"
    assert "session 'taken'" in ran.err
    assert "turn 3" in ran.err
    assert [turn.seq for turn in client.list_turns("taken")] == [1, 2, 3]


def test_whoever_appends_in_between_is_not_overtaken(
    daemon: Daemon, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = import_.Importer._send

    def overtaken(self, session_id, batch, present):
        if present == 64:
            client.append(session_id, user("live"))
        return send(self, session_id, batch, present)

    monkeypatch.setattr(import_.Importer, "_send", overtaken)
    file = write(tmp_path / "o.jsonl", [{"id": "raced", "messages": [say(f"m{n}") for n in range(100)]}])
    ran = run("import", file, "--json")
    assert (ran.code, ran.json["reasons"], ran.json["turns_added"]) == (9, {"EXPECTED_MISMATCH": 1}, 64)
    assert f"{file}:1" in ran.err
    assert client.get_session("raced").head.seq == 65


def test_a_session_of_another_user_is_a_conflict(daemon: Daemon, tmp_path: Path) -> None:
    run("import", write(tmp_path / "1.jsonl", [{"id": "anns", "user": "ann", "messages": [say("a")]}]))
    ran = run("import", write(tmp_path / "2.jsonl", [{"id": "anns", "user": "bob", "messages": [say("a")]}]), "--json")
    assert (ran.code, ran.json["reasons"]) == (9, {"SESSION_EXISTS": 1})


def test_the_same_conversation_twice_in_one_file_is_one_session(daemon: Daemon, tmp_path: Path) -> None:
    talk = [say(f"m{n}") for n in range(150)]
    lines = [{"id": "twice", "messages": talk[:count]} for count in (150, 20, 150, 149)]
    ran = run("import", write(tmp_path / "d.jsonl", lines), "--json")
    assert (ran.code, ran.json["turns_added"], ran.json["failed"]) == (0, 150, 0)
    assert run("export", "twice").lines[0]["messages"] == talk


def test_a_bad_line_or_message_is_told_with_its_place_and_the_others_go_on(
    daemon: Daemon, client: Client, tmp_path: Path
) -> None:
    good = {"id": "good", "messages": [say("fine")]}
    file = tmp_path / "bad.jsonl"
    rows = [
        "nonsense",
        json.dumps({"id": "no-messages"}),
        json.dumps({"id": "role", "messages": [say("a"), {"role": "robot", "content": "b"}]}),
        json.dumps({"id": "empty", "messages": [*(say(f"m{n}") for n in range(70)), say("")]}),
        json.dumps({"id": "orphan", "messages": [say("a"), result("none")]}),
        json.dumps({"id": "huge", "messages": [say("a"), large(1_100_000)]}),
        json.dumps({"id": "surrogate", "messages": [{"role": "user", "content": "\ud800"}]}),
        json.dumps({"id": "metadata", "metadata": {"k": "v" * 20_000}, "messages": [say("a")]}),
        json.dumps(good),
    ]
    file.write_text("\n".join(rows) + "\n")
    ran = run("import", file, "--json")
    assert ran.code == 9
    assert counts(ran)[:5] == (9, 1, 0, 0, 8)
    told = {int(row["place"].removeprefix(f"{file}:")): row for row in ran.json["failures"]}
    expected = {
        1: ("INVALID_INPUT_FILE", "not JSON"),
        2: ("INVALID_INPUT_FILE", '"messages" is missing'),
        3: ("INVALID_TURN", "messages[1].role: is 'robot'"),
        4: ("EMPTY_TURN", "messages[70]"),
        5: ("TOOL_RESULT_WITHOUT_CALL", "messages[1]"),
        6: ("TURN_TOO_LARGE", "messages[1]"),
        7: ("INVALID_UTF8", "messages[0]"),
        8: ("INVALID_STATE_CHANGE", "metadata"),
    }
    assert {number: row["reason"] for number, row in told.items()} == {n: reason for n, (reason, _) in expected.items()}
    for number, (_, what) in expected.items():
        assert f"{file}:{number}" in told[number]["message"]
        assert what in told[number]["message"]
        assert told[number]["message"] in ran.err
    # What stands before a message that the daemon refuses is in; of what can't be converted, nothing is.
    assert client.get_session("empty").head.seq == 70
    assert run("show", "role").code == 3
    assert run("export", "good").lines == [good]


def test_into_chains_all_conversations_in_file_order(daemon: Daemon, tmp_path: Path) -> None:
    lines = conversations(seed=3, count=30)
    talk = [message for line in lines for message in line["messages"]]
    first = write(tmp_path / "1.jsonl", lines[:10])
    second = write(tmp_path / "2.jsonl", lines[10:])
    assert counts(run("import", first, "--into", "chained", "--json"))[:2] == (10, 10)
    ran = run("import", first, second, "--into", "chained", "--json")
    assert ran.code == 0
    assert ran.json["turns_present"] == sum(len(line["messages"]) for line in lines[:10])
    assert ran.json["turns_added"] + ran.json["turns_present"] == len(talk)
    assert run("export", "chained").lines == [{"id": "chained", "messages": talk}]
    assert sum(message["role"] == "system" for message in talk) > 5
    assert counts(run("import", first, second, "--into", "chained", "--json"))[5:] == (0, len(talk))
    # Fewer conversations than are there: nothing to add, and still the same beginning.
    assert run("import", first, "--into", "chained").code == 0
    refused = run("import", second, "--into", "chained", "--json")
    assert (refused.code, refused.error["reason"]) == (4, "SESSION_EXISTS")
    assert run("export", "chained").lines == [{"id": "chained", "messages": talk}]


def test_into_ends_before_a_bad_line_and_continues_once_it_is_corrected(daemon: Daemon, tmp_path: Path) -> None:
    rows = [{"id": n, "messages": [say(f"{n}a"), say(f"{n}b")]} for n in range(4)]
    file = write(tmp_path / "c.jsonl", [*rows[:2], {"id": 2}, rows[3]])
    ran = run("import", file, "--into", "mended", "--json")
    assert ran.code == 9
    assert f"{file}:3" in ran.err
    assert (ran.json["turns_added"], ran.json["failed"]) == (4, 1)
    write(file, rows)
    assert run("import", file, "--into", "mended").code == 0
    assert [m["content"] for m in run("export", "mended").lines[0]["messages"]] == [
        f"{n}{c}" for n in range(4) for c in "ab"
    ]


def test_export_leaves_out_what_a_rewind_superseded_instructions_included(daemon: Daemon, client: Client) -> None:
    client.create_session("rewound")
    system = {"role": "system", "content": "first"}
    client.append("rewound", [system, say("a"), {"role": "assistant", "content": "b"}])
    client.append("rewound", [{"role": "system", "content": "second"}, say("c")])
    client.update_session("rewound", mode="x")
    client.append("rewound", [rewind(2), say("d"), {"role": "system", "content": "third"}])
    client.append("rewound", [rewind(7), {"role": "assistant", "content": "e"}])
    (line,) = run("export", "rewound").lines
    assert [message["content"] for message in line["messages"]] == ["first", "a", "e"]


def test_export_orders_all_by_creation_then_id(daemon: Daemon, tmp_path: Path) -> None:
    lines = [
        {"id": name, "user": owner, "created_at": time, "messages": [say(name)]}
        for name, owner, time in [("o-b", "u1", 1000), ("o-c", "u2", 500), ("o-a", "u3", 1000), ("o-d", "u1", 2000)]
    ]
    assert run("import", write(tmp_path / "o.jsonl", lines)).code == 0
    listed = [line["id"] for line in run("export", "--all").lines if str(line["id"]).startswith("o-")]
    assert listed == ["o-c", "o-a", "o-b", "o-d"]
    assert [line["id"] for line in run("export", "--user", "u1").lines] == ["o-b", "o-d"]
    assert run("export", "--user", "nobody").out == ""


def test_export_of_an_unknown_session_writes_nothing(daemon: Daemon, tmp_path: Path) -> None:
    run("import", write(tmp_path / "k.jsonl", [{"id": "known", "messages": [say("a")]}]))
    ran = run("export", "known", "unknown")
    assert (ran.code, ran.out) == (3, "")
    assert "SESSION_NOT_FOUND" in ran.err


def test_cloud_durability_is_reached_before_the_end(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", [{"id": "safe", "messages": [say(f"m{n}") for n in range(100)]}])
    assert run("import", file, "--durability", "cloud").code == 0
    assert client.get_session("safe").cloud_seq == 100


def test_batches_keep_to_their_bounds(
    daemon: Daemon, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    send = import_.Importer._send

    def watched(self, session_id, batch, present):
        sizes.append((len(batch), sum(item.turn.ByteSize() for item in batch)))
        return send(self, session_id, batch, present)

    monkeypatch.setattr(import_.Importer, "_send", watched)
    talk = [say("s") for _ in range(150)] + [large(400_000) for _ in range(5)] + [large(1_000_000)]
    file = write(tmp_path / "b.jsonl", [{"id": "batched", "messages": talk}])
    assert run("import", file).code == 0
    assert client.get_session("batched").head.seq == 156
    assert [count for count, _ in sizes] == [64, 64, 24, 2, 1, 1]
    assert all(size <= import_.BATCH_BYTES_MAX for _, size in sizes)
    sizes.clear()
    monkeypatch.setattr(import_, "BATCH_BYTES_MAX", 1000)
    assert run("import", write(tmp_path / "b2.jsonl", [{"id": "batched-2", "messages": talk[150:]}])).code == 0
    assert [count for count, _ in sizes] == [1] * 6


def test_only_a_bounded_number_of_conversations_is_read_ahead(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, read, waiting = threading.Event(), [], threading.Event()
    one = import_.Importer._one

    def held(self, session_id, conversation):
        gate.wait(30)
        one(self, session_id, conversation)

    take = import_.Importer._take

    def counted(self, session_id):
        read.append(session_id)
        if len(read) > import_.IN_FLIGHT_MAX:
            waiting.set()
        return take(self, session_id)

    monkeypatch.setattr(import_.Importer, "_one", held)
    monkeypatch.setattr(import_.Importer, "_take", counted)
    file = write(tmp_path / "m.jsonl", [{"id": f"many-{n}", "messages": [say("a")]} for n in range(100)])
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run("import", file).code))
    thread.start()
    assert waiting.wait(30)
    assert not thread.join(0.2)
    assert len(read) == import_.IN_FLIGHT_MAX + 1
    gate.set()
    thread.join(60)
    assert (codes, len(read)) == ([0], 100)


def test_progress_goes_to_standard_error_and_the_summary_to_standard_output(daemon: Daemon, tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", [{"id": "summed", "messages": [say("a")]}])
    ran = process("import", file, SESSIOND_SERVER=daemon.address)
    assert ran.code == 0
    expected = "1 conversations: 1 imported, 0 continued, 0 unchanged, 0 failed; 1 turns added, 0 there before\n"
    assert ran.out == expected
    assert set(ran.err.splitlines()) <= {expected.strip(), expected.strip().replace(" 1 ", " 0 ")}


def test_a_reader_that_goes_away_ends_an_export_quietly(daemon: Daemon, tmp_path: Path) -> None:
    from tests.cli.command import start

    lines = [{"id": f"pipe-{n}", "messages": [say("x" * 50_000)]} for n in range(40)]
    run("import", write(tmp_path / "pipe.jsonl", lines))
    export = start("export", SESSIOND_SERVER=daemon.address)
    assert export.stdout is not None
    assert export.stderr is not None
    export.stdout.read(1)
    export.stdout.close()
    assert export.wait(60) == 141
    assert export.stderr.read() == ""
    export.stderr.close()


def test_what_was_exported_imports_as_the_same_sessions(daemon: Daemon, tmp_path: Path) -> None:
    lines = renamed(conversations(seed=11, count=10), "round-")
    run("import", write(tmp_path / "r.jsonl", lines))
    names = [session_id_of("", line["id"]) for line in lines]
    out = tmp_path / "out.jsonl"
    out.write_text(run("export", *names).out)
    again = run("import", out, "--json")
    assert (again.code, again.json["unchanged"], again.json["turns_added"]) == (0, 10, 0)
    assert by_id([json.loads(line) for line in out.read_text().splitlines()]) == by_id(lines)
