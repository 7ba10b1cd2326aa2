"""`sessiond stats` and `sessiond doctor` where several nodes share a bucket."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sessiond.cli import exits
from sessiond.client import Client, user
from sessiond.testing import Daemon, free_port, running_daemon
from sessiond.tiers.cloud.lease import process_identity
from tests.cli.command import Ran, run
from tests.client.servers import nodes

KEY = "c0ffee" * 8


def doctor(daemon: Daemon, node: str, *argv: object) -> Ran:
    where = ("--data-dir", daemon.data_dir, "--cloud", daemon.cloud, "--node-name", node, "--node-key", KEY)
    return run("doctor", "--json", *where, "--listen", daemon.address, *argv)


def found(ran: Ran) -> dict[str, dict[str, Any]]:
    return {row["check"]: row for row in ran.json["checks"]}


def failures(ran: Ran) -> dict[str, str]:
    return {row["check"]: row["reason"] for row in ran.json["checks"] if row["outcome"] == "FAIL"}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    with nodes(tmp_path_factory.mktemp("three"), 3, lease_ms=1000, node_key=KEY) as daemons:
        yield daemons


# stats ----------------------------------------------------------------------------------------------------------------


def facts(daemon: Daemon) -> dict[str, str]:
    lines = run("stats", "--server", daemon.address).out.splitlines()
    return dict(re.split(r"  +", line, maxsplit=1) for line in lines[: lines.index("")])


def test_stats_tells_how_sessions_and_calls_move(tmp_path: Path) -> None:
    with (
        nodes(tmp_path, 2) as both,
        Client(both[0].address) as first,
        Client(both[1].address, timeout_s=60.0) as second,
    ):
        first.create_session("s")
        first.append("s", user("One"))
        before = facts(both[1])
        assert before["came here"] == "0 that nobody owned, 0 of nodes that were gone"
        assert before["fenced"] == "0 times; 0 sessions wait to be rescued"
        for _ in range(3):
            second.resume("s", 1000)
        assert facts(both[1])["other nodes"] == "3 calls forwarded to them, 0 answered for them"
        assert facts(both[0])["other nodes"] == "0 calls forwarded to them, 3 answered for them"
        shown = run("stats", "--server", both[1].address).out
        assert "Calls forwarded to other nodes\nto node  outcome   calls\nn0       answered      3\n" in shown
        assert "Calls forwarded" not in run("stats", "--server", both[0].address).out
        second.create_session("t")
        both[0].kill()
        second.append("s", user("Two"))
        told_of = [json.loads(line) for line in both[1].log().splitlines() if '"peer_fenced"' in line]
        assert [(line["node"], line["address"]) for line in told_of] == [("n0", both[0].address)]
        moved = facts(both[1])
        assert moved["came here"] == "0 that nobody owned, 1 of nodes that were gone"
        told = run("stats", "--json", "--server", both[1].address).json["ownership"]
        assert (told["claims"], told["steals"]) == (0, 1)


def test_a_list_says_whose_sessions_it_shows_as_they_were_flushed_and_calls_none_of_them_lossy(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as both, Client(both[0].address) as first:
        first.create_session("s")
        first.append("s", user("One"), durability="CLOUD")
        standing = [run("sessions", "--server", daemon.address).out.splitlines()[-1] for daemon in both]
        assert standing[0].endswith("in the cloud tier")
        assert standing[1].endswith("as n0 flushed it")


def test_release_says_what_another_node_owns_and_what_is_not_there(tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as both, Client(both[0].address) as first:
        first.create_session("s")
        refused = run("release", "--json", "s", "none", "--server", both[1].address)
        assert refused.code == exits.INCOMPLETE
        assert refused.json["failures"] == {"s": "NOT_OWNER", "none": "SESSION_NOT_FOUND"}
        assert refused.json["released_sessions"] == 0
        # The second time nobody owns it, whoever is asked.
        for daemon in (both[0], both[0], both[1]):
            assert run("release", "--json", "s", "--server", daemon.address).json["released_sessions"] == 1


# doctor ---------------------------------------------------------------------------------------------------------------


def test_each_of_several_nodes_sees_calls_and_is_reached_by_the_others(three: list[Daemon]) -> None:
    for number, daemon in enumerate(three):
        ran = doctor(daemon, f"n{number}")
        assert failures(ran) == {}
        told = found(ran)
        others = [other for other in range(3) if other != number]
        named = ", ".join(f"n{other} at {three[other].address} (renews its lease)" for other in others)
        assert (told["other nodes"]["outcome"], told["other nodes"]["seen"]) == ("PASS", named)
        assert told["calls to other nodes"]["seen"] == "2 of 2 answer and know the key"
        assert told["advertise"]["seen"] == f"this node answers at {daemon.address}"


def test_an_address_at_which_nobody_answers_fails_where_there_are_others(three: list[Daemon]) -> None:
    ran = doctor(three[0], "n0", "--advertise", f"127.0.0.1:{free_port()}")
    assert failures(ran) == {"advertise": "SERVER_UNREACHABLE"}
    assert ran.code == exits.UNAVAILABLE
    assert "advertise" in found(ran)["advertise"]["remedy"]
    # Another node's is no better.
    ran = doctor(three[0], "n0", "--advertise", three[1].address)
    assert failures(ran) == {"advertise": "INVALID_CONFIG"}
    assert "'n1'" in found(ran)["advertise"]["seen"]
    ran = doctor(three[0], "n0", "--advertise", "nowhere.invalid:7443")
    assert failures(ran) == {"advertise": "INVALID_CONFIG"}
    assert "'nowhere.invalid'" in found(ran)["advertise"]["seen"]


def test_a_loopback_address_fails_where_another_node_runs_on_another_machine(
    three: list[Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessiond import doctor as examined

    elsewhere = {**process_identity(), "boot_id": "another"}
    monkeypatch.setattr(examined, "process_identity", lambda: elsewhere)
    ran = doctor(three[0], "n0")
    assert failures(ran) == {"advertise": "INVALID_CONFIG"}
    assert "from this machine only" in found(ran)["advertise"]["seen"]


def test_nodes_with_different_keys_are_named(three: list[Daemon]) -> None:
    for key in (("--node-key", "dead" * 8), ("--node-key", "")):
        ran = doctor(three[0], "n0", *key)
        assert failures(ran) == {"calls to other nodes": "NODE_UNVERIFIED"}
        assert "node_key" in found(ran)["calls to other nodes"]["remedy"]
        assert KEY not in ran.out


def test_a_new_node_is_told_about_those_that_it_joins(three: list[Daemon], tmp_path: Path) -> None:
    listen = f"127.0.0.1:{free_port()}"
    options = ("--data-dir", tmp_path / "data", "--cloud", three[0].cloud, "--node-key", KEY, "--node-name", "n3")
    ran = run("doctor", "--json", *options, "--listen", listen)
    assert failures(ran) == {}
    assert found(ran)["calls to other nodes"]["seen"] == "3 of 3 answer and know the key"
    assert found(ran)["advertise"]["seen"] == f"{listen}; this node's daemon is not running, so it can't be tried"


def test_a_node_that_stands_still_or_is_gone_is_named_and_goes_by_no_clock(tmp_path: Path) -> None:
    with nodes(tmp_path, 4, node_key=KEY) as daemons:
        alone = daemons[0]
        daemons[1].terminate()
        os.kill(daemons[2].pid, signal.SIGSTOP)
        try:
            ran = doctor(alone, "n0")
            assert failures(ran) == {}
            told = found(ran)["other nodes"]
            assert told["outcome"] == "WARN"
            assert "n1 at" in told["seen"]
            assert "(released)" in told["seen"]
            assert f"n2 at {daemons[2].address} (its lease stands still)" in told["seen"]
            assert f"n3 at {daemons[3].address} (renews its lease)" in told["seen"]
            # Only what renews its lease is called.
            assert found(ran)["calls to other nodes"]["seen"] == "1 of 1 answer and know the key"
        finally:
            os.kill(daemons[2].pid, signal.SIGCONT)
        with Client(alone.address, timeout_s=60.0) as client, Client(daemons[3].address) as lost:
            lost.create_session("s")
            lost.append("s", user("One"))
            daemons[3].kill()
            client.append("s", user("Two"))
        assert f"n3 at {daemons[3].address} (fenced)" in found(doctor(alone, "n0"))["other nodes"]["seen"]


def test_a_node_that_renews_and_does_not_answer_fails(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        elsewhere = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            nodes(tmp_path, 1) as (first,),
            running_daemon(tmp_path / "b", first.cloud, node_name="b", advertise=elsewhere, lease_ms=700),
        ):
            ran = doctor(first, "n0", "--node-key", "")
    assert failures(ran) == {"calls to other nodes": "SERVER_UNREACHABLE"}
    assert f"b at {elsewhere}" in found(ran)["calls to other nodes"]["seen"]


def test_a_node_that_is_alone_needs_no_address(tmp_path: Path) -> None:
    with nodes(tmp_path, 1) as (alone,):
        ran = doctor(alone, "n0", "--advertise", "nowhere.invalid:7443")
        assert failures(ran) == {}
        assert found(ran)["other nodes"]["seen"] == "none"
        assert "nobody needs" in found(ran)["advertise"]["seen"]
        assert "calls to other nodes" not in found(ran)
