"""A watch of our clients: one iterator, whatever becomes of the stream, the node and the owner behind it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from sessiond.client import AsyncClient, Client, NotFound, SessiondError, Unavailable, assistant, user
from sessiond.client.watching import Following
from sessiond.testing import Daemon, free_port, running_daemon
from sessiond.v1 import session_pb2, turn_pb2
from tests.cli.command import environment

NEVER_MS = 3_600_000
# An iterator that says nothing ends the test instead of stopping it.
WATCH_S = 60.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "data", flush_interval_ms=50, lease_ms=500) as started:
        yield started


class Heard:
    """What an application keeps of a watch."""

    def __init__(self) -> None:
        self.turns: list[turn_pb2.Turn] = []
        self.taken_back = 0
        self.deleted = False

    def take(self, event: session_pb2.WatchSessionResponse) -> None:
        if event.epoch_changed:
            first = event.turns[0].seq if event.turns else event.head.seq + 1
            kept = [turn for turn in self.turns if turn.seq < first]
            self.taken_back += len(self.turns) - len(kept)
            self.turns = kept
        for turn in event.turns:
            assert not self.turns or turn.seq == self.turns[-1].seq + 1, "a gap or a repeat"
            self.turns.append(turn)
        self.deleted = self.deleted or event.deleted

    @property
    def seqs(self) -> list[int]:
        return [turn.seq for turn in self.turns]


@contextlib.contextmanager
def in_time(watch) -> Iterator[None]:
    """Close a watch that takes too long."""
    timer = threading.Timer(WATCH_S, watch.close)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


def until(watch, heard: Heard, seq: int) -> None:
    with in_time(watch):
        while not heard.turns or heard.turns[-1].seq < seq:
            heard.take(next(watch))


def test_a_watch_tells_the_present_then_every_turn(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        client.create_session("s")
        client.append("s", [user("one")])
        with client.watch("s") as now, client.watch("s", after=0) as all_of_it:
            heard, whole = Heard(), Heard()
            first = next(now)
            assert (first.head.seq, list(first.turns)) == (1, [])
            client.append("s", [assistant("two"), user("three")])
            until(now, heard, 3)
            until(all_of_it, whole, 3)
            assert (heard.seqs, whole.seqs) == ([2, 3], [1, 2, 3])
            assert now.position.seq == 3


def test_a_watch_goes_on_over_kills_and_restarts_without_gap_or_repeat(daemon: Daemon) -> None:
    with Client(daemon.address, timeout_s=60) as client:
        client.create_session("s")
        heard = Heard()
        with client.watch("s", after=0) as watch:
            for life in range(4):
                for number in range(5):
                    client.append("s", [user(f"{life}-{number}")])
                until(watch, heard, 5 * life + 5)
                if life % 2:
                    daemon.kill()
                    daemon.start()
                else:
                    daemon.restart()
            client.append("s", [user("last")])
            until(watch, heard, 21)
        assert heard.seqs == list(range(1, 22))
        assert heard.taken_back == 0


def test_a_watch_goes_on_over_a_drain_on_another_node(tmp_path: Path) -> None:
    cloud = f"file://{tmp_path / 'cloud'}"
    shared = {"cloud": cloud, "lease_ms": 500, "flush_interval_ms": 50}
    with (
        running_daemon(tmp_path / "a", node_name="a", **shared) as first,
        running_daemon(tmp_path / "b", node_name="b", **shared) as second,
        Client(f"{first.address},{second.address}", timeout_s=60) as client,
    ):
        names = [f"s{number}" for number in range(6)]
        watches = {name: (client.watch(name, after=0), Heard()) for name in names}
        for name in names:
            client.create_session(name)
            client.append(name, [user("one")])
            until(*watches[name], 1)
        first.terminate()
        for name in names:
            client.append(name, [user("two")])
            until(*watches[name], 2)
        first.start()
        second.terminate()
        for name in names:
            client.append(name, [user("three")])
            until(*watches[name], 3)
            assert watches[name][1].seqs == [1, 2, 3]
            assert watches[name][1].taken_back == 0


def test_turns_that_a_lost_disk_took_are_taken_back(tmp_path: Path) -> None:
    with (
        running_daemon(
            tmp_path / "data", flush_interval_ms=NEVER_MS, flush_waiting_ms=NEVER_MS, lease_ms=500
        ) as daemon,
        Client(daemon.address, timeout_s=60) as client,
    ):
        client.create_session("s")
        client.append("s", [user("one"), user("two")])
        client.flush()
        client.append("s", [user("three"), user("four")])
        heard = Heard()
        with client.watch("s", after=0) as watch:
            until(watch, heard, 4)
            daemon.kill()
            daemon.lose_hot_tier()
            daemon.start()
            with in_time(watch):
                while not heard.taken_back:
                    heard.take(next(watch))
            client.append("s", [user("three again")])
            until(watch, heard, 3)
        assert heard.seqs == [1, 2, 3]
        assert heard.taken_back == 2
        assert heard.turns[-1].message.parts[0].text == "three again"


def test_a_deletion_is_the_last_event_also_when_it_came_while_nobody_listened(daemon: Daemon) -> None:
    with Client(daemon.address, timeout_s=60) as client:
        for name in ("s", "t"):
            client.create_session(name)
        with client.watch("s") as watch, in_time(watch):
            next(watch)
            client.delete_session("s")
            assert [event.deleted for event in watch] == [True]
        with client.watch("t") as watch, in_time(watch):
            next(watch)
            # The stream is cut, and before it is opened again the session is gone.
            watch._stream.cancel()
            client.delete_session("t")
            assert [event.deleted for event in watch] == [True]
        assert refused(client, "t") == (NotFound, "SESSION_DELETED")


def test_a_watch_that_is_refused_says_why(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        client.create_session("s", user_id="ada")
        assert refused(client, "s", user_id="eve") == (NotFound, "SESSION_NOT_FOUND")
        assert refused(client, "none") == (NotFound, "SESSION_NOT_FOUND")
        assert next(client.watch("s", user_id="ada")).head.seq == 0
    with Client(f"127.0.0.1:{free_port()}", timeout_s=0.3) as nowhere:
        assert refused(nowhere, "s") == (Unavailable, "SERVER_UNREACHABLE")


def refused(client: Client, session: str, **how: str) -> tuple[type, str]:
    with pytest.raises(SessiondError) as caught:
        next(client.watch(session, **how))
    return type(caught.value), caught.value.reason


def test_closing_a_watch_or_its_client_ends_whoever_waits_for_it(daemon: Daemon) -> None:
    with ThreadPoolExecutor(2) as pool:
        client = Client(daemon.address)
        client.create_session("s")
        one, two = client.watch("s"), client.watch("s")
        for watch in (one, two):
            next(watch)
        waiting = [pool.submit(list, watch) for watch in (one, two)]
        one.close()
        assert waiting[0].result(timeout=WATCH_S) == []
        client.close()
        assert waiting[1].result(timeout=WATCH_S) == []


def test_the_asyncio_client_watches_the_same_way(daemon: Daemon) -> None:
    async def talk() -> list[int]:
        heard = Heard()
        async with AsyncClient(daemon.address, timeout_s=60) as client:
            await client.create_session("s")
            async with client.watch("s", after=0) as watch:
                await client.append("s", [user("one"), user("two")])
                while len(heard.turns) < 2:
                    heard.take(await anext(watch))
                await asyncio.to_thread(daemon.restart)
                await client.append("s", [user("three")])
                while len(heard.turns) < 3:
                    heard.take(await anext(watch))
                # The stream alone is cut: it goes on.
                watch._stream.cancel()
                await client.append("s", [user("four")])
                while len(heard.turns) < 4:
                    heard.take(await anext(watch))
                # The task that iterates is cancelled: it ends, and the watch can be taken up again.
                waiting = asyncio.ensure_future(anext(watch))
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            await client.delete_session("s")
            with pytest.raises(NotFound):
                await anext(client.watch("s"))
            await client.create_session("t")
            waits = client.watch("t")
            await anext(waits)
            pending = asyncio.ensure_future(anext(waits))
            await asyncio.sleep(0)
        with pytest.raises(StopAsyncIteration):
            await pending
        return heard.seqs

    assert asyncio.run(asyncio.wait_for(talk(), WATCH_S)) == [1, 2, 3, 4]


def event(*seqs: int, head: int = 0, epoch_changed: bool = False, cloud_seq: int = 0):
    turns = [turn_pb2.Turn(seq=seq, epoch=1, chain=bytes([seq]) * 16) for seq in seqs]
    head = head or (seqs[-1] if seqs else 0)
    position = turn_pb2.TurnPosition(epoch=1, seq=head, chain=bytes([head]) * 16)
    return session_pb2.WatchSessionResponse(
        turns=turns, head=position, epoch_changed=epoch_changed, cloud_seq=cloud_seq
    )


def test_what_was_told_is_not_told_again_and_the_place_is_kept() -> None:
    with Client("127.0.0.1:1") as client:
        following: Following = client.calls.watch("s", after=3)
    seen = [following.take(one) for one in (event(4, 5, head=6), event(6), event(5, 6, 7), event(head=7))]
    assert [[turn.seq for turn in one.turns] for one in seen if one is not None] == [[4, 5], [6], [7]]
    assert following.position.seq == 7
    # A mark that moved is told, the same again is not.
    assert following.take(event(head=7, cloud_seq=5)) is not None
    assert following.take(event(head=7, cloud_seq=5)) is None
    # Turns in the place of others are told although they are not above.
    assert [turn.seq for turn in following.take(event(6, 7, epoch_changed=True)).turns] == [6, 7]
    assert following.take(event(head=5, epoch_changed=True)) is not None
    assert following.position.seq == 5


def test_a_stream_is_opened_behind_what_was_told_last() -> None:
    asked: list[session_pb2.WatchSessionRequest] = []

    class Stub:
        def WatchSession(self, request, metadata) -> None:
            asked.append(request)
            assert dict(metadata)["x-session-id"] == "s"

    with Client("127.0.0.1:1") as client:
        following: Following = client.calls.watch("s", user_id="ada")
    for one in (None, event(head=3), event(4, 5, head=9), event(head=2, epoch_changed=True)):
        if one is not None:
            following.take(one)
        following.open(lambda service, key: Stub())
    assert [request.user_id for request in asked] == ["ada"] * 4
    assert [request.HasField("after") for request in asked] == [False, True, True, True]
    assert [request.after.seq for request in asked] == [0, 3, 5, 2]
    assert asked[2].after.chain == bytes([5]) * 16


def test_the_command_prints_a_json_line_for_each_turn_until_it_is_stopped(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        client.create_session("s")
        client.append("s", [user("one")])
        command = [sys.executable, "-m", "sessiond", "watch", "s", "--after", "0", "--server", daemon.address]
        running = {
            how: subprocess.Popen(
                [*command, *how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
            )
            for how in ((), ("--json",))
        }
        timer = threading.Timer(WATCH_S, lambda: [process.kill() for process in running.values()])
        timer.start()
        try:
            plain, as_json = running[()], running[("--json",)]
            assert plain.stdout.readline() == "1  user  one\n"
            assert json.loads(as_json.stdout.readline())["message"]["parts"] == [{"text": "one"}]
            client.append("s", [assistant("two")])
            assert plain.stdout.readline() == "2  assistant  two\n"
            assert json.loads(as_json.stdout.readline())["seq"] == 2
            plain.send_signal(signal.SIGINT)
            out, _ = plain.communicate()
            assert (plain.returncode, out) == (130, "")
            client.delete_session("s")
            out, err = as_json.communicate()
            assert (as_json.returncode, out, err) == (0, "", "sessiond: the session was deleted\n")
        finally:
            timer.cancel()
            timer.join()
            for process in running.values():
                process.kill()
                process.communicate()


def test_a_stream_that_a_proxy_cuts_is_opened_again() -> None:
    """Statuses that no daemon gives and that a connection's end can have."""
    with Client("127.0.0.1:1") as client:
        following = client.calls.watch("s")
        following.take(event(1))
        for code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            assert 0 <= following.wait_s(Cut(code)) < 5
        # One that was never answered is not: it may be no daemon that is there.
        new = client.calls.watch("s")
        with pytest.raises(SessiondError) as caught:
            new.wait_s(Cut(grpc.StatusCode.INTERNAL))
        assert caught.value.reason == "INTERNAL"


class Cut(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "stream was reset"

    def trailing_metadata(self) -> tuple[()]:
        return ()
