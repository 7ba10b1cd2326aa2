"""The command line as tests use it: in this process for what talks to a daemon, as a process where signals matter."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sessiond import cli

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        """The error that --json put on standard error, after whatever was told before it."""
        return json.loads(self.err.splitlines()[-1])["error"]

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


class _Input:
    """Standard input with these bytes."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BufferedReader(io.BytesIO(data))


def run(*argv: object, stdin: bytes = b"") -> Ran:
    """One command in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    sys.stdin = _Input(stdin)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.run([str(argument) for argument in argv])
    finally:
        sys.stdin = before
    assert "Traceback" not in err.getvalue()
    return Ran(code, out.getvalue(), err.getvalue())


def environment(**added: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SESSIOND_")}
    return {**clean, "PYTHONPATH": str(ROOT / "src"), **added}


def start(*argv: object, **added: str) -> subprocess.Popen[str]:
    """One command as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "sessiond", *(str(argument) for argument in argv)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**added),
    )


def process(*argv: object, **added: str) -> Ran:
    """One command as a process of its own, to its end."""
    started = start(*argv, **added)
    try:
        out, err = started.communicate(timeout=60)
    finally:
        started.kill()
    assert "Traceback" not in err
    return Ran(started.returncode, out, err)
