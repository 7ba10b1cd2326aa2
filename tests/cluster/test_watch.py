"""A watch on one node of a session that another owns: relayed once, and carried on wherever the session goes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from tests.e2e.test_watch import NEVER_MS, Watch, fill, ownership, position, wait_until
from tests.wire import Wire, user

LEASE_MS = 1000


@contextlib.contextmanager
def two_nodes(folder: Path, **settings: int) -> Iterator[list[Daemon]]:
    shared = {"cloud": f"file://{folder / 'cloud'}", "lease_ms": LEASE_MS, "flush_interval_ms": 50, **settings}
    with (
        running_daemon(folder / "a", node_name="a", **shared) as first,
        running_daemon(folder / "b", node_name="b", **shared) as second,
    ):
        yield [first, second]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Daemon]]:
    with two_nodes(tmp_path) as started:
        yield started


@pytest.fixture
def wires(nodes: list[Daemon]) -> Iterator[list[Wire]]:
    with connected(nodes) as made:
        yield made


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Wire]]:
    """Two nodes for the tests that leave them as they are."""
    with two_nodes(tmp_path_factory.mktemp("watch")) as started, connected(started) as made:
        yield made


@contextlib.contextmanager
def connected(nodes: list[Daemon]) -> Iterator[list[Wire]]:
    made = [Wire(node.address) for node in nodes]
    try:
        yield made
    finally:
        for wire in made:
            wire.close()


def owner(wire: Wire, session: str = "s") -> str:
    return wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30).session.owner_node


def release(wire: Wire, session: str = "s") -> None:
    done = wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=[session]), timeout=30)
    assert done.released_sessions == 1, done


def stored(wire: Wire, session: str = "s") -> list[bytes]:
    return [turn.SerializeToString() for turn in wire.turns(session)]


def told(watch: Watch) -> list[bytes]:
    return [turn.SerializeToString() for turn in watch.log]


def test_watchers_of_another_nodes_session_share_one_stream(lasting: list[Wire]) -> None:
    a, b = lasting
    a.create("shared", user_id="ada")
    fill(a, "shared", 20)
    watches = [Watch(b, "shared", turn_pb2.TurnPosition(), user_id="ada") for _ in range(5)]
    for watch in watches:
        watch.until_seq(20)
    fill(a, "shared", 40, start=21)
    for watch in watches:
        watch.until_seq(40)
        assert told(watch) == stored(a, "shared")
        assert not any(event.epoch_changed or event.missing for event in watch.events)
    assert (ownership(a).watchers, ownership(b).watchers) == (1, 5)
    assert (owner(a, "shared"), owner(b, "shared")) == ("a", "a")
    assert Watch(b, "shared", user_id="eve").refusal().reason == "SESSION_NOT_FOUND"
    for watch in watches:
        watch.close()
    wait_until(lambda: (ownership(a).watchers, ownership(b).watchers) == (0, 0), "a stream is left over")


def test_a_long_backlog_comes_through_another_node(lasting: list[Wire]) -> None:
    a, b = lasting
    a.create("long")
    fill(a, "long", 4000, size=500)
    watch = Watch(b, "long", turn_pb2.TurnPosition())
    watch.until_seq(4000)
    assert told(watch) == stored(a, "long")
    late = Watch(b, "long", position(watch.log[99]))
    late.until_seq(4000)
    assert late.log[0].seq == 101
    assert max(event.ByteSize() for event in watch.events) < 1024**2 + 4096


def test_a_watch_follows_its_session_from_node_to_node(lasting: list[Wire]) -> None:
    a, b = lasting
    a.create("moves")
    fill(a, "moves", 3)
    at_a, at_b = Watch(a, "moves", turn_pb2.TurnPosition()), Watch(b, "moves", turn_pb2.TurnPosition())
    for watch in (at_a, at_b):
        watch.until_seq(3)
    # From a to b, by whoever watches there: the node that let go leaves it alone for a while.
    release(a, "moves")
    wait_until(lambda: owner(a, "moves") == "b", "the watching node did not take the session")
    fill(b, "moves", 6, start=4)
    for watch in (at_a, at_b):
        watch.until_seq(6)
    release(b, "moves")
    wait_until(lambda: owner(b, "moves") == "a", "the watching node did not take the session")
    fill(b, "moves", 9, start=7)
    for watch in (at_a, at_b):
        watch.until_seq(9)
        assert told(watch) == stored(a, "moves")
        assert any(event.epoch_changed for event in watch.events)
        assert not any(event.missing for event in watch.events)


def test_a_watch_outlives_the_drain_of_the_owner(wires: list[Wire]) -> None:
    a, b = wires
    for number in range(10):
        a.create(f"s{number}")
        fill(a, f"s{number}", 3)
    watches = [Watch(b, f"s{number}", turn_pb2.TurnPosition()) for number in range(10)]
    for watch in watches:
        watch.until_seq(3)
    for progress in a.admin.Drain(admin_pb2.DrainRequest(), timeout=60):
        last = progress
    assert last.clean
    for number, watch in enumerate(watches):
        fill(b, f"s{number}", 5, start=4)
        watch.until_seq(5)
        assert told(watch) == stored(b, f"s{number}")
        assert not any(event.missing for event in watch.events)


def test_a_watch_outlives_the_owner_and_says_what_may_be_missing(nodes: list[Daemon], wires: list[Wire]) -> None:
    (first, _), (a, b) = nodes, wires
    a.create("s")
    fill(a, "s", 3)
    watch = Watch(b, "s", turn_pb2.TurnPosition())
    watch.until(lambda event: event.cloud_seq == 3)
    first.kill()
    event = watch.until(lambda event: event.epoch_changed)
    assert [(missing.first_seq, missing.possible_only) for missing in event.missing] == [(4, True)]
    assert owner(b) == "b"
    fill(b, "s", 5, start=4)
    watch.until_seq(5)
    # Nothing was lost, and the node that comes back says so.
    first.start()
    a.append("s", user("t6", "6"))
    watch.until_seq(6)
    assert told(watch) == stored(b)


def test_a_watch_leaves_an_owner_that_stands_still(nodes: list[Daemon], wires: list[Wire]) -> None:
    (first, _), (a, b) = nodes, wires
    a.create("s")
    fill(a, "s", 3)
    watch = Watch(b, "s", turn_pb2.TurnPosition())
    watch.until(lambda event: event.cloud_seq == 3)
    first.process.send_signal(signal.SIGSTOP)
    try:
        # Nobody appends anything: the stream alone must notice.
        watch.until(lambda event: event.epoch_changed)
        assert owner(b) == "b"
        fill(b, "s", 5, start=4)
        watch.until_seq(5)
    finally:
        first.process.send_signal(signal.SIGCONT)
    # It was fenced, and says so until it has its lease again.
    wait_until(lambda: a.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30).cloud.lease_valid, "it has none")
    at_a = Watch(a, "s", turn_pb2.TurnPosition())
    at_a.until_seq(5)
    fill(b, "s", 7, start=6)
    for each in (watch, at_a):
        each.until_seq(7)
        assert told(each) == stored(b)


def test_turns_that_died_with_the_owner_are_replaced(tmp_path: Path) -> None:
    with two_nodes(tmp_path, flush_interval_ms=NEVER_MS, flush_waiting_ms=NEVER_MS) as (first, second):
        a, b = Wire(first.address), Wire(second.address)
        a.create("s")
        fill(a, "s", 3)
        a.admin.Flush(admin_pb2.FlushRequest(), timeout=30)
        watch = Watch(b, "s", turn_pb2.TurnPosition())
        a.append("s", *(user(f"lost{number}", "never flushed") for number in range(3)))
        watch.until_seq(6)
        first.kill()
        first.lose_hot_tier()
        event = watch.until(lambda event: event.epoch_changed)
        assert (event.head.seq, event.turns, len(watch.log)) == (3, [], 3)
        assert [missing.first_seq for missing in event.missing] == [4]
        b.append("s", user("kept", "after it"))
        watch.until_seq(4)
        assert told(watch) == stored(b)
        a.close()
        b.close()


def test_turns_that_the_owners_disk_took_are_replaced_when_it_comes_back(tmp_path: Path) -> None:
    never = {"flush_interval_ms": NEVER_MS, "flush_waiting_ms": NEVER_MS}
    with two_nodes(tmp_path, **never) as nodes, connected(nodes) as (a, b):
        for name in ("written", "left", "new"):
            a.create(name)
            fill(a, name, 3)
        a.admin.Flush(admin_pb2.FlushRequest(), timeout=30)
        written, left = Watch(b, "written", turn_pb2.TurnPosition()), Watch(b, "left", turn_pb2.TurnPosition())
        for name, watch in (("written", written), ("left", left)):
            a.append(name, *(user(f"lost{number}", "never flushed") for number in range(3)))
            watch.until_seq(6)
        # While the watching node stands still: it finds the owner's log shorter than what it told.
        nodes[1].process.send_signal(signal.SIGSTOP)
        try:
            nodes[0].kill()
            nodes[0].lose_hot_tier()
            nodes[0].start()
            a.append("written", user("kept", "after it"))
        finally:
            nodes[1].process.send_signal(signal.SIGCONT)
        for watch in (written, left):
            event = watch.until(lambda event: event.epoch_changed)
            assert [missing.first_seq for missing in event.missing] == [4]
        while not any(turn.turn_id == "kept" for turn in written.log):
            written.next()
        assert told(written) == stored(a, "written")
        assert told(left) == stored(b, "left")
        assert owner(a, "written") == "a"
        # The manifest names a hot tier that is gone, and a node of its name answers.
        assert Watch(b, "new", turn_pb2.TurnPosition()).next().head.seq == 3


def test_calls_to_a_node_that_drains_reach_whoever_took_the_session(tmp_path: Path) -> None:
    shared = {"cloud": f"file://{tmp_path / 'cloud'}", "lease_ms": LEASE_MS, "flush_interval_ms": 50}
    with contextlib.ExitStack() as started:
        nodes = [started.enter_context(running_daemon(tmp_path / name, node_name=name, **shared)) for name in "abc"]
        a, b, _ = started.enter_context(connected(nodes))
        watches = {f"s{number}": None for number in range(12)}
        for name in watches:
            a.create(name)
            fill(a, name, 1)
            watches[name] = Watch(b, name, turn_pb2.TurnPosition())
            watches[name].until_seq(1)
        for progress in a.admin.Drain(admin_pb2.DrainRequest(), timeout=60):
            last = progress
        assert last.clean
        for name in watches:
            wait_until(lambda name=name: owner(b, name) == "b", "the watching node did not take the session")
            # By itself the draining node would send half of them to c.
            a.append(name, user("t2", "2"))
            watches[name].until_seq(2)


def test_a_fork_is_told_with_the_turns_that_it_shares(lasting: list[Wire]) -> None:
    a, _ = lasting
    a.create("parent")
    fill(a, "parent", 200, size=2000)
    a.admin.Flush(admin_pb2.FlushRequest(), timeout=30)
    a.sessions.ForkSession(
        session_pb2.ForkSessionRequest(session_id="parent", seq=150, new_session_id="fork"), timeout=30
    )
    a.append("fork", user("its own", "151"))
    for wire in lasting:
        watch = Watch(wire, "fork", turn_pb2.TurnPosition())
        watch.until_seq(151)
        assert told(watch) == stored(a, "fork")
        late = Watch(wire, "fork", position(watch.log[99]))
        late.until_seq(151)
        assert late.log[0].seq == 101
        assert not late.events[0].epoch_changed


def test_a_deletion_on_another_node_is_told(lasting: list[Wire]) -> None:
    a, b = lasting
    a.create("gone")
    watch = Watch(b, "gone")
    watch.next()
    a.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="gone"), timeout=30)
    watch.until(lambda event: event.deleted)
    assert next(watch.stream, None) is None
