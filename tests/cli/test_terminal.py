"""On a terminal: tables with whole ids and numbers, progress that moves, and nothing that a user wrote is obeyed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from sessiond.client import Client, user
from sessiond.testing import Daemon
from tests.cli.command import environment
from tests.cli.generated import write


def on_terminal(*argv: object, columns: int = 80, **added: str) -> tuple[int, str]:
    """(exit code, everything that the terminal was sent) of one command."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "sessiond", *(str(argument) for argument in argv)]
    added = {"TERM": "xterm", **added}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**added)) as running:
        os.close(theirs)
        sent = b""
        # Linux ends a terminal that nobody holds any more with an error.
        with contextlib.suppress(OSError):
            while piece := os.read(ours, 65_536):
                sent += piece
        os.close(ours)
        code = running.wait(60)
    return code, sent.decode()


def plain(sent: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)


def test_tables_keep_ids_and_numbers_whole_and_give_way_at_the_end(daemon: Daemon, client: Client) -> None:
    long_id = "a-session-with-a-long-id-" + "x" * 60
    client.create_session(long_id, user_id="terminal")
    client.append(long_id, [user("word " * 100 + "\x1b]0;owned\x07 \x1b[2J")])
    code, sent = on_terminal("sessions", "--user", "terminal", SESSIOND_SERVER=daemon.address)
    assert code == 0
    assert long_id in plain(sent)
    code, sent = on_terminal("resume", long_id, "--budget", "1000", SESSIOND_SERVER=daemon.address)
    assert code == 0
    (row,) = [line for line in plain(sent).splitlines() if "word word" in line]
    assert row.split()[:3] == ["1", "user", str(client.resume(long_id, 1000).turns[0].o200k.tokens)]
    assert "…" in row
    assert len(row.rstrip()) <= 80
    assert "\x1b]0;owned" not in sent
    assert "\x1b[2J" not in sent


def test_an_import_shows_a_bar_and_its_refusals_stay_readable(daemon: Daemon, tmp_path: Path) -> None:
    lines = [{"id": f"bar-{n}", "messages": [{"role": "user", "content": "x"}]} for n in range(50)]
    file = write(tmp_path / "in.jsonl", [*lines, {"id": "bar-bad", "messages": [{"role": "robot"}]}])
    code, sent = on_terminal("import", file, columns=80, SESSIOND_SERVER=daemon.address)
    assert code == 9
    assert "51 conversations: 50 imported, 0 continued, 0 unchanged, 1 failed; 50 turns added" in plain(sent)
    assert f"sessiond: INVALID_TURN: {file}:51: messages[0].role" in plain(sent)
    assert "━" in sent
