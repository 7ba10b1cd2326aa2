"""A session that is asked for through one other node only moves there; one that is asked for everywhere stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.client import Client, user
from sessiond.service.router import VISITS_MAX, VISITS_MS
from sessiond.testing import running_daemon

PATIENCE_S = 30.0


@pytest.fixture
def clients(tmp_path: Path) -> Iterator[tuple[Client, Client]]:
    cloud = f"file://{tmp_path / 'cloud'}"
    with (
        running_daemon(cloud=cloud, node_name="a", lease_ms=1000) as a,
        running_daemon(cloud=cloud, node_name="b", lease_ms=1000) as b,
        Client(a.address) as to_a,
        Client(b.address) as to_b,
    ):
        yield to_a, to_b


def owner(client: Client) -> tuple[str, int]:
    session = client.get_session("s")
    return session.owner_node, session.epoch


def test_a_session_follows_the_node_that_it_is_always_asked_for_through(clients: tuple[Client, Client]) -> None:
    to_a, to_b = clients
    to_a.create_session("s")
    assert owner(to_a) == ("a", 1)
    began, appended = time.monotonic(), 0
    while owner(to_b)[0] != "b":
        assert time.monotonic() - began < PATIENCE_S, f"still there after {appended} appends through the other node"
        appended += 1
        assert to_b.append("s", user("q", turn_id=f"t{appended}")).head.seq == appended
    assert time.monotonic() - began >= VISITS_MS / 1000
    assert appended >= VISITS_MAX
    assert [turn.seq for turn in to_a.list_turns("s")] == list(range(1, appended + 1))


def test_a_session_that_is_asked_for_through_both_nodes_stays(clients: tuple[Client, Client]) -> None:
    to_a, to_b = clients
    to_a.create_session("s")
    for number in range(4 * VISITS_MAX):
        # Nearly always through the other node; once in a while directly.
        client = to_a if number % (VISITS_MAX - 1) == 0 else to_b
        client.append("s", user("q", turn_id=f"t{number}"))
    assert owner(to_b) == ("a", 1)
