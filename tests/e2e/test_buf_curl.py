"""A client that nobody here wrote: `buf curl` creates, appends, resumes, by reflection and by the published proto."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from sessiond.testing import Daemon, running_daemon

ROOT = Path(__file__).resolve().parents[2]
_names = (f"buf-{number}" for number in itertools.count())
# buf curl exits with 8 times the code of the gRPC status.
CODE = 8
NOT_FOUND, INVALID_ARGUMENT, ABORTED, UNIMPLEMENTED = 5, 3, 10, 12


def buf_binary() -> str:
    """The `buf` of the package buf-bin: beside this Python, else on PATH."""
    beside = Path(sys.executable).parent / "buf"
    found = str(beside) if beside.exists() else shutil.which("buf")
    if not found:
        pytest.fail("there is no `buf`, which these tests need as a client: pip install 'buf-bin>=1.60'")
    return found


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running_daemon(flush_interval_ms=50) as running:
        yield running


class BufCurl:
    """One way of calling the daemon: what it knows of the contract comes from the daemon, or from proto/."""

    def __init__(self, daemon: Daemon, schema: list[str], folder: Path) -> None:
        self._daemon = daemon
        self._schema = schema
        # No account and no remembered modules of whoever runs the tests.
        self._env = {**os.environ, "HOME": str(folder), "XDG_CACHE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}

    def run(self, path: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [buf_binary(), "curl", "--protocol", "grpc", "--http2-prior-knowledge", *self._schema, *options]
        url = f"http://{self._daemon.address}/{path}"
        return subprocess.run(
            [*command, url], cwd=ROOT, env=self._env, capture_output=True, text=True, timeout=120, check=False
        )

    def call(self, method: str, request: dict[str, Any], service: str = "SessionService") -> dict[str, Any]:
        """The answer as JSON."""
        done = self.run(f"sessiond.v1.{service}/{method}", "-d", json.dumps(request))
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def refusal(self, method: str, request: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, bytes]]:
        """(gRPC code, the error as JSON, its details by type)."""
        done = self.run(f"sessiond.v1.SessionService/{method}", "-d", json.dumps(request))
        assert done.returncode != 0
        assert not done.stdout.strip()
        error = json.loads(done.stderr)
        details = {item["type"]: base64.b64decode(item["value"] + "===") for item in error["details"]}
        assert len(details) == len(error["details"])
        return done.returncode // CODE, error, details


@pytest.fixture(scope="module", params=["reflection", "schema"])
def buf(request: pytest.FixtureRequest, daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> BufCurl:
    schema = ["--schema", "proto"] if request.param == "schema" else ["--reflect"]
    return BufCurl(daemon, schema, tmp_path_factory.mktemp("buf"))


@pytest.fixture(scope="module")
def session(buf: BufCurl) -> str:
    """A session that it made itself."""
    name = next(_names)
    answer = buf.call("CreateSession", {"sessionId": name, "userId": "ada", "metadata": {"lang": "fr"}})
    assert answer["created"] is True
    assert answer["session"]["sessionId"] == name
    assert answer["session"]["state"]["metadata"] == {"lang": "fr"}
    assert answer["session"]["lifecycle"] == "LIFECYCLE_ACTIVE"
    return name


def text(words: str) -> dict[str, Any]:
    return {"parts": [{"text": words}]}


def test_it_appends_and_resumes_what_it_appended(buf: BufCurl, session: str) -> None:
    turns = [
        {"turnId": "t1", "role": "ROLE_SYSTEM", "message": text("Réponds brièvement.")},
        {"turnId": "t2", "role": "ROLE_USER", "message": text("Quel temps fait-il à Paris ? 🌦")},
        {
            "turnId": "t3",
            "role": "ROLE_ASSISTANT",
            "message": {"parts": [{"toolCall": {"callId": "c1", "name": "weather", "arguments": '{"city": "Paris"}'}}]},
        },
        {"turnId": "t4", "role": "ROLE_TOOL", "message": {"parts": [{"toolResult": {"callId": "c1"}}]}},
        {"turnId": "t5", "role": "ROLE_ASSISTANT", "message": text("Il pleut.")},
    ]
    request = {"sessionId": session, "turns": turns, "durability": "DURABILITY_CLOUD", "expected": {}}
    answer = buf.call("AppendTurn", request)
    assert answer["outcome"] == "APPEND_OUTCOME_APPENDED"
    assert [turn["turnId"] for turn in answer["turns"]] == ["t1", "t2", "t3", "t4", "t5"]
    positions = [turn["position"] for turn in answer["turns"]]
    assert [(place["epoch"], place["seq"]) for place in positions] == [(1, str(seq)) for seq in range(1, 6)]
    assert len({place["chain"] for place in positions}) == 5
    assert answer["head"] == positions[-1]
    assert answer["cloudSeq"] == "5"
    assert answer["durability"] == "DURABILITY_CLOUD"
    assert answer["checkpointVersion"] == str(1 << 32 | 5)

    again = buf.call("AppendTurn", request)
    assert again["outcome"] == "APPEND_OUTCOME_DUPLICATE"
    assert all(turn["duplicate"] for turn in again["turns"])

    new = {"parts": [{"text": "Et demain ?"}]}
    context = buf.call(
        "ResumeSession",
        {"sessionId": session, "userId": "ada", "context": {"budgetTokens": 500, "newMessage": new}},
    )["context"]
    assert context["instructions"]["message"] == text("Réponds brièvement.")
    assert [turn["turnId"] for turn in context["turns"]] == ["t2", "t3", "t4", "t5"]
    assert [turn["role"] for turn in context["turns"]] == [
        "ROLE_USER",
        "ROLE_ASSISTANT",
        "ROLE_TOOL",
        "ROLE_ASSISTANT",
    ]
    assert context["turns"][0]["message"] == text("Quel temps fait-il à Paris ? 🌦")
    assert context["turns"][1]["message"]["parts"][0]["toolCall"]["arguments"] == '{"city": "Paris"}'
    assert context["turns"][2]["message"]["parts"][0]["toolResult"] == {"callId": "c1"}
    assert context["newMessage"] == new
    assert context["receipt"]["rung"] == "RUNG_HOT"
    assert context["receipt"]["ownership"] == "OWNERSHIP_CONFIRMED"
    assert context["receipt"]["head"] == positions[-1]
    assert context["tokens"]["total"] == sum(
        context["tokens"][part] for part in ("instructions", "tail", "newMessage", "framing")
    )
    same = {"budgetTokens": 500, "newMessage": new, "contextEtag": context["contextEtag"]}
    assert buf.call("ResumeSession", {"sessionId": session, "context": same})["context"]["notModified"] is True

    page = buf.call("ListTurns", {"sessionId": session, "pageSize": 2})
    assert [turn["seq"] for turn in page["turns"]] == ["1", "2"]
    page = buf.call("ListTurns", {"sessionId": session, "pageToken": page["nextPageToken"]})
    assert [turn["seq"] for turn in page["turns"]] == ["3", "4", "5"]
    listed = buf.call("ListSessions", {"userId": "ada"})
    assert session in [found["sessionId"] for found in listed["sessions"]]


def test_a_refusal_shows_its_details(buf: BufCurl, session: str) -> None:
    code, error, details = buf.refusal("ResumeSession", {"sessionId": "never-made", "context": {"budgetTokens": 9}})
    assert (code, error["code"]) == (NOT_FOUND, "not_found")
    info = error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"])
    assert (info.domain, info.reason) == ("sessiond", "SESSION_NOT_FOUND")
    assert info.metadata["session_id"] == "never-made"
    assert error["message"].endswith(info.metadata["remedy"])
    assert "never-made" in error["message"]

    turn = {"turnId": "bad", "role": "ROLE_TOOL", "message": {"parts": [{"toolResult": {"callId": "c9"}}]}}
    code, error, details = buf.refusal("AppendTurn", {"sessionId": session, "turns": [turn]})
    assert (code, error["code"]) == (INVALID_ARGUMENT, "invalid_argument")
    info = error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"])
    assert (info.reason, info.metadata["call_id"]) == ("TOOL_RESULT_WITHOUT_CALL", "c9")
    bad = error_details_pb2.BadRequest.FromString(details["google.rpc.BadRequest"])
    assert [violation.field for violation in bad.field_violations] == ["turns[0].message.parts"]

    turn = {"turnId": "new", "role": "ROLE_USER", "message": text("x")}
    code, error, _ = buf.refusal("AppendTurn", {"sessionId": session, "turns": [turn], "expected": {"seq": "77"}})
    assert (code, error["code"]) == (ABORTED, "aborted")
    code, error, details = buf.refusal("BatchResumeSessions", {})
    assert (code, error["code"]) == (INVALID_ARGUMENT, "invalid_argument")
    assert error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"]).reason == "INVALID_BATCH"
    spec = {"budgetTokens": 1000, "strategy": "STRATEGY_SUMMARY"}
    code, error, details = buf.refusal("ResumeSession", {"sessionId": session, "context": spec})
    assert (code, error["code"]) == (UNIMPLEMENTED, "unimplemented")
    assert error_details_pb2.ErrorInfo.FromString(details["google.rpc.ErrorInfo"]).reason == "NOT_SERVED_YET"


def test_reflection_lists_every_service_and_method(daemon: Daemon, tmp_path: Path) -> None:
    buf = BufCurl(daemon, [], tmp_path)
    services = buf.run("", "--list-services").stdout.split()
    assert {"sessiond.v1.SessionService", "sessiond.v1.StateService", "sessiond.v1.AdminService"} <= set(services)
    assert "grpc.health.v1.Health" in services
    methods = buf.run("", "--list-methods").stdout.split()
    assert "sessiond.v1.SessionService/ResumeSession" in methods
    health = buf.run("grpc.health.v1.Health/Check", "-d", '{"service": "readiness"}')
    assert json.loads(health.stdout) == {"status": "SERVING"}


def test_it_drains_a_daemon_and_sees_it_end_clean(tmp_path: Path) -> None:
    with running_daemon() as daemon:
        buf = BufCurl(daemon, [], tmp_path)
        buf.call("CreateSession", {"sessionId": "s"})
        turn = {"turnId": "t1", "role": "ROLE_USER", "message": text("Hello.")}
        buf.call("AppendTurn", {"sessionId": "s", "turns": [turn]})
        done = buf.run("sessiond.v1.AdminService/Drain", "-d", '{"shutDown": true}')
        assert done.returncode == 0, done.stderr
        decoder, events, rest = json.JSONDecoder(), [], done.stdout.strip()
        while rest:
            event, end = decoder.raw_decode(rest)
            events.append(event)
            rest = rest[end:].lstrip()
        assert events[-1]["done"] is True
        assert events[-1]["clean"] is True
        assert events[-1]["releasedSessions"] == "1"
        process = daemon.process
        assert process is not None
        assert process.wait(60) == 0
