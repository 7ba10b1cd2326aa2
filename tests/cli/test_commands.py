"""The commands that talk to a daemon: what they print, what --json gives, and the exit code of every kind of error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sessiond import config, errors
from sessiond.cli import app, exits
from sessiond.client import Client, assistant, milestone, summary, system, user
from sessiond.testing import Daemon, free_port
from tests.cli.command import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def talk(client: Client) -> str:
    """A session with a bit of everything."""
    session = client.create_session(user_id="talker", metadata={"channel": "web"}).session_id
    client.append(session, [system("Be brief."), user("What is the weather?")])
    client.append(
        session,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}
            ],
        },
    )
    client.append(session, {"role": "tool", "tool_call_id": "c1", "content": "sunny"})
    client.append(session, [assistant("Sunny."), milestone("answered")])
    client.update_session(session, pins={"city": "Rome"}, flags={"vip": True}, mode="chat")
    client.append(session, user("Thanks\n\x1b[31m!"))
    return session


def test_append_says_where_and_how_safe(daemon: Daemon, client: Client) -> None:
    ran = run("append", "said", "--create", "--user", "ann", "--text", "hello", "--turn-id", "t1")
    assert ran.code == 0
    rows = dict(line.split(None, 1) for line in ran.out.splitlines())
    assert (rows["outcome"], rows["position"], rows["turn_id"], rows["durability"]) == ("appended", "1:1", "t1", "edge")
    (turn,) = client.list_turns("said")
    assert rows["chain"] == turn.chain.hex()
    again = run("append", "said", "--text", "hello", "--turn-id", "t1", "--json").json
    assert again["outcome"] == "APPEND_OUTCOME_DUPLICATE"
    assert again["turns"][0]["position"] == again["head"] == {"epoch": 1, "seq": 1, "chain": turn.chain.hex()}
    safe = run(
        "append", "said", "--text", "b", "--role", "assistant", "--durability", "cloud", "--expected", "1:1", "--json"
    )
    assert (safe.json["durability"], safe.json["cloud_seq"]) == ("DURABILITY_CLOUD", 2)
    assert client.get_session("said").user_id == "ann"


def test_append_takes_its_message_from_anywhere(daemon: Daemon, client: Client, tmp_path: Path) -> None:
    client.create_session("sources")
    message = {"role": "user", "content": [{"type": "text", "text": "from json"}]}
    (tmp_path / "text").write_text("from file")
    (tmp_path / "message.json").write_text(json.dumps(message))
    assert run("append", "sources", "--file", tmp_path / "text").code == 0
    assert run("append", "sources", stdin="from pipe é".encode()).code == 0
    assert run("append", "sources", "--file", "-", stdin=b"from dash").code == 0
    assert run("append", "sources", "--message", json.dumps(message)).code == 0
    assert run("append", "sources", "--message", f"@{tmp_path / 'message.json'}").code == 0
    (line,) = run("export", "sources").lines
    texts = ["from file", "from pipe é", "from dash"]
    assert line["messages"] == [*({"role": "user", "content": text} for text in texts), message, message]


def test_resume_shows_the_context_its_tokens_and_its_receipt(daemon: Daemon, client: Client, talk: str) -> None:
    ran = run("resume", talk, "--budget", 1000, "--new-message", "And tomorrow?", "--reserve", 10)
    assert ran.code == 0
    head, *rows = ran.out.splitlines()
    assert head.split() == ["seq", "role", "tokens", "text"]
    parts = [tuple(row.split()[:2]) for row in rows[: rows.index("")]]
    assert parts == [
        ("1", "instructions"),
        ("-", "pins"),
        ("2", "user"),
        ("3", "assistant"),
        ("4", "tool"),
        ("5", "assistant"),
        ("8", "user"),
        ("-", "new"),
    ]
    facts = dict(row.split(None, 1) for row in rows[rows.index("") + 1 :])
    tokens = client.resume(talk, 1000, new_message="And tomorrow?", reserve_tokens=10).tokens
    assert facts["tokens"].startswith(f"{tokens.total} of 1000 with 10 reserved in o200k_base: instructions ")
    assert f"tail {tokens.tail}, new message {tokens.new_message}, framing 3" in facts["tokens"]
    assert (facts["rung"], facts["ownership"], facts["strategy"]) == ("HOT", "CONFIRMED", "hybrid")
    assert '[call weather({"city":"Rome"})]' in ran.out
    assert "\x1b" not in ran.out


def test_resume_as_a_model_takes_it(daemon: Daemon, client: Client, talk: str) -> None:
    context = client.resume(talk, 1000)
    assert run("resume", talk, "--budget", 1000, "--openai").json == context.to_openai()
    assert run("resume", talk, "--budget", 1000, "--anthropic").json == context.to_anthropic()
    everything = run("resume", talk, "--budget", 1000, "--json").json
    assert everything["receipt"]["rung"] == "RUNG_HOT"
    assert everything["tokens"]["total"] == context.tokens.total
    assert everything["turns"][0]["message"]["parts"] == [{"text": "What is the weather?"}]
    assert everything["turns"][0]["chain"] == context.turns[0].chain.hex()


def test_resume_passes_every_option_on(daemon: Daemon, client: Client, talk: str) -> None:
    ran = run(
        *("resume", talk, "--budget", 500, "--last", 1, "--encoding", "cl100k_base", "--instructions", "Rhyme."),
        *("--highest-acked", "1:99", "--read-only", "--user", "talker", "--json"),
    ).json
    assert (ran["strategy"], ran["encoding"]) == ("STRATEGY_LAST_N", "ENCODING_CL100K_BASE")
    assert ran["given_instructions"] == "Rhyme."
    assert [turn["seq"] for turn in ran["turns"]] == [8]
    assert (ran["receipt"]["rung"], ran["receipt"]["missing"][0]["last_seq"]) == ("RUNG_PARTIAL", 99)
    shown = run("resume", talk, "--budget", 500, "--highest-acked", "1:99").out
    assert "turns from 9 to 99 of epoch 1 are missing: hot tier lost" in shown
    assert "notice" in shown


def test_resume_proves_what_was_acknowledged_by_its_chain(daemon: Daemon, client: Client, talk: str) -> None:
    head = list(client.list_turns(talk))[-1]

    def rung(acked: str) -> str:
        ran = run("resume", talk, "--budget", 500, "--highest-acked", acked, "--json")
        assert ran.code == 0
        return str(ran.json["receipt"]["rung"])

    assert rung(f"{head.epoch}:{head.seq}") == "RUNG_HOT"
    assert rung(f"{head.epoch}:{head.seq}:{head.chain.hex().upper()}") == "RUNG_HOT"
    assert rung(f"{head.epoch}:{head.seq}:{'0' * 32}") == "RUNG_PARTIAL"


@pytest.mark.parametrize("acked", ["1", "1:", "1:2:", "1:2:ab", "1:2:" + "g" * 32, "1:2:" + "0" * 34, f"{2**32}:1"])
def test_positions_are_checked(acked: str) -> None:
    ran = run("resume", "any", "--highest-acked", acked)
    assert ran.code == 2
    assert "not EPOCH:SEQ[:CHAINHEX]" in ran.err


def test_resume_shows_a_summary(daemon: Daemon, client: Client) -> None:
    session = client.create_session().session_id
    client.append(session, [user(f"question {n} " + "word " * 50) for n in range(40)])
    turns = list(client.list_turns(session))
    client.append(session, summary("They talked.", turns[29]))
    out = run("resume", session, "--budget", 900).out
    assert any(row.split()[:2] == ["41", "summary"] and "They talked." in row for row in out.splitlines())
    assert "summarised" in out


def test_sessions_lists_with_and_without_user_and_limit(daemon: Daemon, client: Client) -> None:
    for number in range(3):
        client.create_session(f"listed-{number}", user_id="lister", created_at_unix_ms=1_000_000 + number)
    client.append("listed-1", user("hello"))
    rows = run("sessions", "--user", "lister").out.splitlines()
    assert [row.split()[0] for row in rows] == ["session", "listed-0", "listed-1", "listed-2"]
    limited = run("sessions", "--user", "lister", "--limit", 2, "--json").lines
    assert [(row["session_id"], row["head"].get("seq")) for row in limited] == [("listed-0", 0), ("listed-1", 1)]
    assert len(run("sessions", "--json").lines) >= 3


def test_a_list_that_may_lack_sessions_says_so(own_daemon: Daemon) -> None:
    assert run("append", "held", "--create", "--text", "hello").code == 0
    cloud = own_daemon.data_dir / "cloud"
    cloud.rename(own_daemon.data_dir / "away")
    try:
        for argv in (["sessions"], ["export"]):
            ran = run(*argv)
            assert ran.code == exits.INCOMPLETE
            assert "held" in ran.out
            assert "there may be sessions that this node does not hold" in ran.err
    finally:
        (own_daemon.data_dir / "away").rename(cloud)
    assert run("export").code == 0


def test_show_says_everything_about_a_session(daemon: Daemon, client: Client, talk: str) -> None:
    ran = run("show", talk)
    assert ran.code == 0
    for part in ("talker", "channel = web", "city = Rome", "vip", "chat", "5 in force"):
        assert part in ran.out
    shown = run("show", talk, "--user", "talker", "--json").json
    assert shown["session"]["state"]["metadata"] == {"channel": "web"}
    assert [checkpoint["header"]["replay_cursor"] for checkpoint in shown["checkpoints"]] == [6, 5, 4, 3]


def test_stats_counts_calls_rungs_and_requests(daemon: Daemon, talk: str) -> None:
    run("resume", talk, "--budget", 1000)
    ran = run("stats")
    assert ran.code == 0
    for part in ("Resumes", "HOT", "ResumeSession", "Requests to the cloud tier", "put", str(daemon.data_dir / "hot")):
        assert part in ran.out
    status = run("stats", "--json").json
    assert status["phase"] == "NODE_PHASE_SERVING"
    assert len(status["incarnation"]) == 32
    assert any(row["method"] == "ResumeSession" and row["status"] == "OK" and row["count"] for row in status["calls"])


def test_flush_reports_what_it_wrote(daemon: Daemon, talk: str) -> None:
    assert run("flush", "--json").json["failed_sessions"] == 0
    assert "0 failed" in run("flush", "--session", talk).out


def test_drain_shows_progress_and_can_end_the_daemon(own_daemon: Daemon) -> None:
    for number in range(20):
        run("append", f"s{number}", "--create", "--text", "hello")
    ran = run("drain", "--shut-down", "--json")
    assert (ran.code, ran.json["clean"], ran.json["released_sessions"]) == (0, True, 20)
    process = own_daemon.process
    assert process is not None
    assert process.wait(30) == 0
    own_daemon.process = None
    assert run("stats", "--timeout", "0.2").code == exits.UNAVAILABLE


@pytest.mark.parametrize(
    ("argv", "code", "reason"),
    [
        (["resume", "absent", "--budget", "100"], exits.NOT_FOUND, "SESSION_NOT_FOUND"),
        (["show", "absent"], exits.NOT_FOUND, "SESSION_NOT_FOUND"),
        (["append", "absent", "--text", "a"], exits.NOT_FOUND, "SESSION_NOT_FOUND"),
        (["show", "not/an id"], exits.USAGE, "INVALID_SESSION_ID"),
        (["show", "x" * 129], exits.USAGE, "INVALID_SESSION_ID"),
        (["resume", "known", "--budget", "0"], exits.USAGE, "INVALID_BUDGET"),
        (["resume", "known", "--budget", "4"], exits.USAGE, "BUDGET_TOO_SMALL"),
        (["resume", "known", "--budget", "100", "--reserve", "100"], exits.USAGE, "INVALID_BUDGET"),
        (["resume", "known", "--budget", "100", "--strategy", "recall"], exits.USAGE, "NOT_SERVED_YET"),
        (["append", "known", "--text", ""], exits.USAGE, "EMPTY_TURN"),
        (["append", "known", "--message", "{}"], exits.USAGE, "INVALID_TURN"),
        (["append", "known", "--message", "[]"], exits.USAGE, "INVALID_TURN"),
        (["append", "known", "--message", "{"], exits.USAGE, "INVALID_TURN"),
        (["append", "known", "--file", "/absent"], exits.USAGE, "INVALID_INPUT_FILE"),
        (
            ["append", "known", "--message", '{"role":"tool","tool_call_id":"c","content":"x"}'],
            exits.USAGE,
            "TOOL_RESULT_WITHOUT_CALL",
        ),
        (["append", "known", "--text", "other", "--turn-id", "used"], exits.CONFLICT, "TURN_ID_REUSED"),
        (["append", "known", "--text", "b", "--expected", "1:9"], exits.CONFLICT, "EXPECTED_MISMATCH"),
        (["append", "known", "--text", "b", "--user", "bob"], exits.NOT_FOUND, "SESSION_NOT_FOUND"),
        (["append", "known", "--text", "b", "--create", "--user", "bob"], exits.CONFLICT, "SESSION_EXISTS"),
        (["append", "known", "--text", "x" * 1_100_000], exits.USAGE, "TURN_TOO_LARGE"),
        (["import", "/absent"], exits.USAGE, "INVALID_INPUT_FILE"),
        (["export", "absent"], exits.NOT_FOUND, "SESSION_NOT_FOUND"),
        (["verify", "--data-dir", "/absent"], exits.NOT_FOUND, "BUCKET_NOT_FOUND"),
        (["dump", "--data-dir", "/absent"], exits.USAGE, "INVALID_CONFIG"),
        (["dump", "/absent"], exits.USAGE, "INVALID_INPUT_FILE"),
        (["dump", __file__], exits.USAGE, "INVALID_INPUT_FILE"),
    ],
)
def test_every_refusal_has_its_exit_code_and_reason(
    daemon: Daemon, client: Client, argv: list[str], code: int, reason: str
) -> None:
    client.create_session("known", user_id="ann")
    client.append("known", user("hello", turn_id="used"))
    plain = run(*argv)
    assert plain.code == code
    assert plain.err.startswith(f"sessiond: {reason}: ")
    assert plain.err.count("\n") == 1
    if "--json" in run(argv[0], "--help").out:
        told = run(*argv, "--json").error
        assert (told["reason"], told["exit_code"]) == (reason, code)
        assert told["remedy"]
        assert told["remedy"] in plain.err


@pytest.mark.parametrize(
    "argv",
    [
        ["nonsense"],
        ["append"],
        ["append", "s", "--text", "a", "--file", "b"],
        ["append", "s", "--text", "a", "--expected", "9"],
        ["append", "s", "--text", "a", "--expected", "a:b"],
        ["resume", "s", "--budget", "x"],
        ["resume", "s", "--last", "0"],
        ["resume", "s", "--openai", "--json"],
        ["resume", "s", "--last", "1", "--strategy", "full"],
        ["import"],
        ["import", "f", "--into", "s", "--session-prefix", "p"],
        ["export", "s", "--all"],
        ["dump", "path", "--session", "s"],
        ["serve", "--lease-ms", "x"],
        ["stats", "--timeout", "0"],
        ["watch", "s", "--after", f"{2**64}"],
        ["fork", "s", "--at", f"{2**64}"],
        ["state", "put", "k", "-", "--session", "s", "--expected", f"{2**64}"],
        ["state", "list", "--session", "s", "--accept-missing", f"{2**32}"],
        ["resume", "s", "--accept-missing", f"{2**32}"],
    ],
)
def test_wrong_usage_ends_with_2(argv: list[str]) -> None:
    ran = run(*argv)
    assert (ran.code, ran.out) == (exits.USAGE, "")
    assert "Error: " in ran.err or "--json" in argv
    as_json = run(*argv, "--json")
    assert as_json.code == exits.USAGE
    assert as_json.error["exit_code"] == exits.USAGE


def test_nobody_there_is_unavailable_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("SESSIOND_SERVER", nobody)
    for argv in (
        ["stats"],
        ["sessions"],
        ["export"],
        ["flush"],
        ["drain"],
        ["show", "a"],
        ["append", "a", "--text", "b"],
    ):
        ran = run(*argv)
        assert ran.code == exits.UNAVAILABLE
        assert ran.err.startswith("sessiond: SERVER_UNREACHABLE: ")
        assert nobody in ran.err
        assert "sessiond serve" in ran.err
    other = f"127.0.0.1:{free_port()}"
    assert other in run("stats", "--server", other).err


def test_a_defect_is_one_line_and_ends_with_1(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sessiond.cli.output.facts", lambda rows: 1 // 0)
    ran = run("version")
    assert ran.code == exits.INTERNAL
    assert ran.err.startswith("sessiond: INTERNAL: ZeroDivisionError")
    assert ran.err.count("\n") == 1
    monkeypatch.setenv("SESSIOND_DEBUG", "1")
    from sessiond import cli

    assert cli.run(["version"]) == exits.INTERNAL
    assert "Traceback" in capsys.readouterr().err


def test_every_kind_of_error_has_an_exit_code() -> None:
    expected = {
        "NotFound": 3,
        "Conflict": 4,
        "Invalid": 2,
        "Unavailable": 5,
        "Corrupt": 6,
        "Exhausted": 7,
        "Denied": 8,
        "Unimplemented": 2,
    }
    for reason, row in errors.REASONS.items():
        error = row.kind(reason, "text")
        assert exits.code_of(error) == (
            1 if reason in ("INTERNAL", "VIOLATIONS_FOUND") else expected[row.kind.__name__]
        )
        assert exits.json_of(error)["kind"] == row.kind.__name__


def test_help_lists_every_command_and_exit_code() -> None:
    ran = run("--help")
    assert ran.code == 0
    for name in app.COMMANDS:
        assert f"  {name} " in ran.out
        assert run(name, "--help").code == 0
    for code in exits.MEANINGS:
        assert f"  {code} " in ran.out


def test_the_page_about_the_command_line_names_every_command_option_and_exit_code() -> None:
    import click

    page = " ".join((ROOT / "docs/cli.md").read_text().split())
    fields = config.Settings.__struct_fields__
    context = click.Context(app.group)
    for name in app.COMMANDS:
        assert f"sessiond {name}" in page
        command = app.group.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            # Those take every setting, as sessiond.toml and `serve --help` have them.
            is_setting = name in ("serve", "doctor", "repair", "rebuild") and parameter.name in fields
            if is_setting or not isinstance(parameter, click.Option):
                continue
            for option in parameter.opts:
                assert re.search(rf"{option}\b", page), f"{name} {option}"
    for code, meaning in exits.MEANINGS.items():
        assert f"| {code} | {meaning} |" in page


def test_version_says_what_is_installed() -> None:
    from sessiond import __version__, core

    shown = run("version", "--json").json
    assert shown["sessiond"] == __version__
    assert shown["compiled_core"] is core.COMPILED
    assert shown["proto_package"] == "sessiond.v1"
    assert {"python", "lmdb"} <= set(shown)
    assert __version__ in run("version").out
    assert run("--version").out == f"sessiond {__version__}\n"
