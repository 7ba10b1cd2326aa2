"""A watched session: every device hears of every turn once, in order, whatever happens to the node in between."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from tests.wire import Refusal, Wire, assistant, tool_call, tool_result, user

# A stream that says nothing ends the test instead of stopping it.
WATCH_S = 60.0
NEVER_MS = 3_600_000
EVENT_BYTES_MAX = 1024**2


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "data", flush_interval_ms=50) as started:
        yield started


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    made = Wire(daemon.address)
    yield made
    made.close()


class Watch:
    """One stream, and the log as whoever follows it knows it."""

    def __init__(self, wire: Wire, session: str, after: turn_pb2.TurnPosition | None = None, user_id: str = "") -> None:
        request = session_pb2.WatchSessionRequest(session_id=session, after=after, user_id=user_id)
        self.stream = wire.sessions.WatchSession(request, timeout=WATCH_S)
        self.log: list[turn_pb2.Turn] = []
        self.events: list[session_pb2.WatchSessionResponse] = []

    def next(self) -> session_pb2.WatchSessionResponse:
        event = next(self.stream)
        self.events.append(event)
        if event.epoch_changed:
            first = event.turns[0].seq if event.turns else event.head.seq + 1
            self.log = [turn for turn in self.log if turn.seq < first]
        for turn in event.turns:
            if self.log:
                assert turn.seq == self.log[-1].seq + 1
            self.log.append(turn)
        return event

    def until(self, holds: Callable[[session_pb2.WatchSessionResponse], bool]) -> session_pb2.WatchSessionResponse:
        while True:
            event = self.next()
            if holds(event):
                return event

    def until_seq(self, seq: int) -> session_pb2.WatchSessionResponse:
        return self.until(lambda _: bool(self.log) and self.log[-1].seq >= seq)

    def texts(self) -> list[str]:
        return [turn.message.parts[0].text for turn in self.log]

    def refusal(self) -> Refusal:
        """What the stream ends with."""
        while True:
            try:
                self.next()
            except grpc.RpcError as error:
                return Refusal(error)

    def close(self) -> None:
        self.stream.cancel()


def position(turn: turn_pb2.Turn) -> turn_pb2.TurnPosition:
    return turn_pb2.TurnPosition(epoch=turn.epoch, seq=turn.seq, chain=turn.chain)


def ownership(wire: Wire) -> admin_pb2.OwnershipStatus:
    return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30).ownership


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Poll, with a bound: for what no reply tells."""
    ends = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < ends, what
        time.sleep(0.01)


def proc_status(daemon: Daemon, name: str) -> int:
    text = Path(f"/proc/{daemon.pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


def fill(wire: Wire, session: str, turns: int, size: int = 0, start: int = 1) -> None:
    """Turns `start` to `turns`, a hundred a call."""
    pad = "word " * (size // 5)
    for first in range(start, turns + 1, 100):
        numbers = range(first, min(first + 100, turns + 1))
        wire.append(session, *(user(f"t{number}", f"{number} {pad}".strip()) for number in numbers))


def test_two_devices_hear_of_every_turn_in_order_as_it_is_stored(wire: Wire) -> None:
    wire.create("s")
    with ThreadPoolExecutor(2) as pool:
        phone, desk = Watch(wire, "s"), Watch(wire, "s")
        for watch in (phone, desk):
            first = watch.next()
            assert (first.head.seq, first.turns, first.epoch_changed) == (0, [], False)
        heard = [pool.submit(watch.until_seq, 40) for watch in (phone, desk)]
        for number in range(1, 41, 2):
            done = wire.append("s", user(f"q{number}", f"{number}"), assistant(f"a{number}", f"{number + 1}"))
        last = [future.result() for future in heard]
    stored = list(wire.turns("s"))
    for watch, event in zip((phone, desk), last, strict=True):
        assert [turn.SerializeToString() for turn in watch.log] == [turn.SerializeToString() for turn in stored]
        assert event.head == done.head
        assert event.checkpoint_version == done.checkpoint_version
        assert not any(event.epoch_changed for event in watch.events)
        watch.close()


def test_each_turn_is_on_its_way_when_its_append_is_acknowledged(wire: Wire) -> None:
    wire.create("s")
    watch = Watch(wire, "s")
    watch.next()
    for number in range(1, 30):
        wire.append("s", user(f"t{number}", f"{number}"))
        # Nothing else is appended until it was heard: a watcher that were one behind would wait here for ever.
        watch.until_seq(number)


def test_every_kind_of_turn_is_told(wire: Wire) -> None:
    wire.create("s")
    watch = Watch(wire, "s")
    watch.next()
    wire.append("s", user("q", "look it up"), tool_call("c", ("call-1", "find")), tool_result("r", "call-1", "found"))
    wire.append("s", assistant("a", "done"))
    head = watch.until_seq(4).head
    summary = turn_pb2.TurnInput(turn_id="sum")
    summary.summary.text = "they looked it up"
    summary.summary.covered.first_seq, summary.summary.covered.last_seq = 1, 4
    summary.summary.covered_chain = head.chain
    wire.append("s", summary)
    wire.append("s", turn_pb2.TurnInput(turn_id="rw", rewind=turn_pb2.Rewind(to_seq=1)))
    change = session_pb2.UpdateSessionRequest(
        session_id="s", turn_id="st", change=turn_pb2.StateChange(metadata={"title": "a find"})
    )
    wire.sessions.UpdateSession(change, timeout=30)
    watch.until_seq(7)
    assert [turn.SerializeToString() for turn in watch.log] == [turn.SerializeToString() for turn in wire.turns("s")]
    assert [turn.kind for turn in watch.log] == [1, 1, 1, 1, 2, 5, 3]


def test_a_watch_goes_on_after_the_turn_that_its_caller_names(wire: Wire) -> None:
    wire.create("s")
    fill(wire, "s", 10)
    turns = list(wire.turns("s"))
    named = {
        "by its chain": position(turns[5]),
        "by its epoch": turn_pb2.TurnPosition(epoch=turns[5].epoch, seq=6),
        "by its seq": turn_pb2.TurnPosition(seq=6),
    }
    for how, after in named.items():
        watch = Watch(wire, "s", after)
        event = watch.next()
        assert [turn.seq for turn in event.turns] == [7, 8, 9, 10], how
        assert not event.epoch_changed, how
    assert [turn.seq for turn in Watch(wire, "s", turn_pb2.TurnPosition()).next().turns] == list(range(1, 11))
    assert Watch(wire, "s", position(turns[-1])).next().turns == []
    assert Watch(wire, "s").next().turns == []


def test_a_chain_that_is_not_the_logs_begins_anew_where_the_logs_part(wire: Wire) -> None:
    wire.create("s")
    fill(wire, "s", 10)
    other = turn_pb2.TurnPosition(epoch=1, seq=6, chain=b"\1" * 16)
    event = Watch(wire, "s", other).next()
    assert event.epoch_changed
    assert [turn.seq for turn in event.turns] == list(range(1, 11))
    ahead = turn_pb2.TurnPosition(epoch=1, seq=12, chain=b"\1" * 16)
    event = Watch(wire, "s", ahead).next()
    assert (event.epoch_changed, event.turns, event.head.seq) == (True, [], 10)


def test_what_reached_the_cloud_tier_is_told(wire: Wire) -> None:
    wire.create("s")
    watch = Watch(wire, "s")
    watch.next()
    wire.append("s", user("q", "hello"), assistant("a", "hello"))
    event = watch.until(lambda event: event.cloud_seq == 2)
    assert event.head.seq == 2
    assert sum(len(event.turns) for event in watch.events) == 2


def test_turns_that_a_lost_hot_tier_took_are_replaced_and_named(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=NEVER_MS, flush_waiting_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        fill(wire, "s", 5)
        wire.admin.Flush(admin_pb2.FlushRequest(), timeout=30)
        fill(wire, "s", 8, start=6)
        watch = Watch(wire, "s", turn_pb2.TurnPosition())
        watch.until_seq(8)
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.start()
        after = Watch(wire, "s", position(watch.log[-1]))
        after.log = watch.log
        event = after.next()
        assert (event.epoch_changed, event.head.seq, event.turns) == (True, 5, [])
        assert [(missing.first_seq, missing.possible_only) for missing in event.missing] == [(6, True)]
        wire.append("s", user("new", "six again"))
        after.until_seq(6)
        assert after.texts()[4:] == ["5", "six again"]
        # The same for one that comes later, when the log has other turns above.
        late = Watch(wire, "s", position(watch.events[-1].turns[-1]))
        event = late.next()
        assert event.epoch_changed
        assert [turn.turn_id for turn in event.turns] == ["new"]
        wire.close()


def test_a_watch_of_a_restarted_node_repeats_and_skips_nothing(daemon: Daemon, wire: Wire) -> None:
    wire.create("s")
    fill(wire, "s", 7)
    watch = Watch(wire, "s", turn_pb2.TurnPosition())
    watch.until_seq(7)
    daemon.kill()
    daemon.start()
    again = Watch(wire, "s", position(watch.log[-1]))
    event = again.next()
    assert (event.turns, event.head.seq, event.epoch_changed, event.missing) == ([], 7, False, [])
    fill(wire, "s", 9, start=8)
    again.until_seq(9)


def test_a_deletion_is_told_and_ends_the_stream(wire: Wire) -> None:
    wire.create("s")
    watch = Watch(wire, "s")
    watch.next()
    wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s"), timeout=30)
    assert watch.next().deleted
    assert next(watch.stream, None) is None
    assert watch.stream.code() is grpc.StatusCode.OK
    assert Watch(wire, "s").refusal().reason == "SESSION_DELETED"


def test_no_session_and_another_users_look_alike(wire: Wire) -> None:
    wire.create("s", user_id="ada")
    assert Watch(wire, "s", user_id="ada").next().head.seq == 0
    told = [Watch(wire, name, user_id="eve").refusal() for name in ("s", "none")]
    assert [(found.code, found.reason) for found in told] == [(grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")] * 2
    assert Watch(wire, "no good").refusal().reason == "INVALID_SESSION_ID"
    assert ownership(wire).watchers <= 1


def test_a_deleted_session_of_another_user_looks_like_none(wire: Wire) -> None:
    wire.create("s", user_id="ada")
    wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s"), timeout=30)
    found = [Watch(wire, "s", user_id=user).refusal().reason for user in ("eve", "ada", "")]
    assert found == ["SESSION_NOT_FOUND", "SESSION_DELETED", "SESSION_DELETED"]


def test_a_backlog_of_ten_thousand_turns_comes_whole_in_bounded_events(wire: Wire) -> None:
    wire.create("s")
    fill(wire, "s", 10_000, size=400)
    # Released and taken again: only the newest turns are hot, the others are in segments.
    wire.admin.Flush(admin_pb2.FlushRequest(), timeout=60)
    assert wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=["s"]), timeout=60).released_sessions == 1
    fill(wire, "s", 10_050, size=400, start=10_001)
    watch = Watch(wire, "s", turn_pb2.TurnPosition())
    watch.until_seq(10_050)
    assert [turn.seq for turn in watch.log] == list(range(1, 10_051))
    assert [turn.turn_id for turn in watch.log] == [f"t{number}" for number in range(1, 10_051)]
    sizes = [event.ByteSize() for event in watch.events]
    assert max(sizes) <= EVENT_BYTES_MAX + 4096
    assert len(sizes) >= 5
    assert all(event.head.seq == 10_050 for event in watch.events)


def test_a_reader_that_does_not_read_costs_no_memory_and_misses_nothing(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=NEVER_MS, flush_waiting_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        fill(wire, "s", 100, size=50_000)
        # A first reader that keeps up shows what serving takes in any case.
        Watch(wire, "s", turn_pb2.TurnPosition()).until_seq(100)
        slow = [Watch(wire, "s") for _ in range(4)]
        for watch in slow:
            watch.next()
        before = proc_status(daemon, "RssAnon")
        fill(wire, "s", 500, size=50_000, start=101)
        # 20 MB of turns for each of four. What the appends themselves take varies with how they meet.
        grown_kib = proc_status(daemon, "RssAnon") - before
        assert grown_kib < 60_000, grown_kib
        for watch in slow:
            watch.until_seq(500)
            assert [turn.seq for turn in watch.log] == list(range(101, 501))
        wire.close()


def test_watchers_hold_no_thread_and_no_reader_and_let_go_of_everything(daemon: Daemon, wire: Wire) -> None:
    for number in range(20):
        wire.create(f"s{number}")
        wire.append(f"s{number}", user("t", "hello"))
    Watch(wire, "s0").next()
    threads, readers = proc_status(daemon, "Threads"), hot_readers(wire)
    watches = [Watch(wire, f"s{number % 20}") for number in range(400)]
    for watch in watches:
        watch.next()
    assert ownership(wire).watchers >= 400
    assert hot_readers(wire) <= readers + 1
    # What the pools of the daemon may still add; a thread each would be 400.
    assert proc_status(daemon, "Threads") <= threads + 40
    for watch in watches:
        watch.close()
    wait_until(lambda: ownership(wire).watchers <= 1, "watchers are left over")
    wire.append("s1", user("u", "still here"))


def test_thousands_that_come_at_once_are_all_answered(daemon: Daemon, wire: Wire) -> None:
    for number in range(50):
        wire.create(f"s{number}")
    wires = [Wire(daemon.address) for _ in range(20)]
    for each in wires:
        each.sessions.GetSession(session_pb2.GetSessionRequest(session_id="s0"), timeout=30)
    # As after a restart or a pause of the node: it finds all of them before it could take up the first.
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        watches = [Watch(wires[number % 20], f"s{number % 50}") for number in range(4_000)]
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    for watch in watches:
        watch.next()
    assert ownership(wire).watchers == len(watches)
    for each in wires:
        each.close()
    wait_until(lambda: ownership(wire).watchers == 0, "watchers are left over")


def hot_readers(wire: Wire) -> int:
    return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30).hot.readers


def test_streams_above_the_limit_are_refused_with_details(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", watchers_max=3) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        open_ones = [Watch(wire, "s") for _ in range(3)]
        for watch in open_ones:
            watch.next()
        found = Watch(wire, "s").refusal()
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert found.retry_ms > 0
        open_ones[0].close()
        wait_until(lambda: ownership(wire).watchers == 2, "a stream that ended counts still")
        Watch(wire, "s").next()
        wire.close()


def test_a_drain_ends_streams_with_a_retry(daemon: Daemon, wire: Wire) -> None:
    wire.create("s")
    watch = Watch(wire, "s")
    watch.next()
    for _ in wire.admin.Drain(admin_pb2.DrainRequest(), timeout=60):
        pass
    found = watch.refusal()
    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "NODE_DRAINING")
    assert found.retry_ms > 0
    assert Watch(wire, "s").refusal().reason == "NODE_DRAINING"


def test_a_watched_session_is_in_use_and_is_not_released_as_idle(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=20, idle_release_ms=300) as daemon:
        wire = Wire(daemon.address)
        for name in ("watched", "left"):
            wire.create(name)
            wire.append(name, user("t", "hello"))
        watch = Watch(wire, "watched")
        watch.next()

        def owner(name: str) -> str:
            request = session_pb2.GetSessionRequest(session_id=name)
            return wire.sessions.GetSession(request, timeout=30).session.owner_node

        wait_until(lambda: not owner("left"), "what nobody uses was not released")
        # It was as idle for as long, and several more looks than the other had.
        ends = time.monotonic() + 2
        while time.monotonic() < ends:
            assert owner("watched")
        assert not any(event.epoch_changed for event in watch.events)
        watch.close()
        wait_until(lambda: not owner("watched"), "what nobody watches any more was not released")
        wire.close()


def test_a_watch_survives_the_release_of_its_session(wire: Wire) -> None:
    wire.create("s")
    fill(wire, "s", 3)
    watch = Watch(wire, "s", turn_pb2.TurnPosition())
    watch.until_seq(3)
    # Taken again by an append.
    assert wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=["s"]), timeout=30).released_sessions == 1
    fill(wire, "s", 4, start=4)
    event = watch.until_seq(4)
    assert event.turns[0].epoch == 2
    assert any(event.epoch_changed for event in watch.events)
    # Taken again by the watch alone.
    assert wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=["s"]), timeout=30).released_sessions == 1
    watch.until(lambda event: event.epoch_changed)
    request = session_pb2.GetSessionRequest(session_id="s")
    assert wire.sessions.GetSession(request, timeout=30).session.epoch == 3
    fill(wire, "s", 5, start=5)
    watch.until_seq(5)
    assert [turn.seq for turn in watch.log] == [1, 2, 3, 4, 5]


def test_an_archived_session_is_told_and_nobody_claims_it(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", flush_interval_ms=20) as daemon:
        wire = Wire(daemon.address)
        wire.create("s")
        fill(wire, "s", 3)
        expiry = turn_pb2.Expiry(ttl_ms=500, action=turn_pb2.EXPIRY_ACTION_ARCHIVE)
        change = turn_pb2.StateChange(policy=turn_pb2.SessionPolicy(expiry=expiry))
        request = session_pb2.UpdateSessionRequest(session_id="s", turn_id="policy", change=change)
        wire.sessions.UpdateSession(request, timeout=30)

        def get() -> session_pb2.Session:
            return wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id="s"), timeout=30).session

        wait_until(lambda: get().lifecycle == session_pb2.LIFECYCLE_ARCHIVED and not get().owner_node, "not archived")
        watch = Watch(wire, "s", turn_pb2.TurnPosition())
        assert [turn.seq for turn in watch.next().turns] == [1, 2, 3, 4]
        assert not get().owner_node
        wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="s"), timeout=30)
        assert watch.until(lambda event: event.deleted)
        wire.close()


def test_a_watch_with_a_deadline_ends_by_it(wire: Wire) -> None:
    wire.create("s")
    stream = wire.sessions.WatchSession(session_pb2.WatchSessionRequest(session_id="s"), timeout=0.5)
    found = refusal_code(stream)
    assert found is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until(lambda: ownership(wire).watchers == 0, "the stream is counted still")


def refusal_code(stream) -> grpc.StatusCode:
    try:
        for _ in stream:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK
