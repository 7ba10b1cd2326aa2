"""The client and several nodes: it finds sessions directly, and what a node can't do it asks of another one at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sessiond.client import Client, Unavailable, assistant, failures, user
from sessiond.client.ring import Ring
from sessiond.client.routes import CHANNELS_MAX, ELSEWHERE, RING_VARIABLE
from sessiond.testing import Daemon
from sessiond.v1 import session_pb2, session_pb2_grpc
from tests.client.servers import OnLoop, Scripted, accept, nodes, refuse

SERVICE_CONFIG = Path(__file__).resolve().parents[2] / "docs" / "routing" / "service-config.json"
SESSIONS = 24
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


@pytest.fixture(params=[Client, OnLoop], ids=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    with nodes(tmp_path_factory.mktemp("three"), 3) as daemons:
        yield daemons


def servers(daemons: list[Daemon]) -> str:
    return ",".join(daemon.address for daemon in daemons)


def forwarded(daemons: list[Daemon]) -> int:
    """Calls that one of them forwarded to another so far, whatever became of them."""
    count = 0
    for daemon in daemons:
        with Client(daemon.address) as client:
            count += sum(row.count for row in client.get_status().ownership.forwarded)
    return count


def talk(client: Any, count: int = SESSIONS) -> list[str]:
    sessions = [client.create_session().session_id for _ in range(count)]
    for session in sessions:
        client.append(session, [user("One"), assistant("Two")])
        assert len(client.resume(session, 1000).turns) == 2
    return sessions


# Reaching the owner ----------------------------------------------------------------------------------------------


def test_no_call_is_forwarded_where_every_client_knows_all_nodes(
    kind: Any, three: list[Daemon], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RING_VARIABLE, "true")
    before = forwarded(three)
    with kind(servers(three)) as client:
        sessions = talk(client)
    where = {session: Ring([daemon.address for daemon in three]).order(session)[0] for session in sessions}
    assert set(where.values()) == {daemon.address for daemon in three}
    # In another order, by gRPC's own ring, and with nothing but the published service config.
    with kind(servers(three[::-1])) as client:
        assert all(len(client.resume(session, 1000).turns) == 2 for session in sessions)
    with kind(f"ipv4:{servers(three)}") as client:
        assert all(client.append(session, user("Three")).head.seq == 3 for session in sessions)
    options = [("grpc.service_config", SERVICE_CONFIG.read_text()), ("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"ipv4:{servers(three)}", options=options) as channel:
        stub = session_pb2_grpc.SessionServiceStub(channel)
        for session in sessions:
            request = session_pb2.GetSessionRequest(session_id=session)
            reply = stub.GetSession(request, metadata=(("x-session-id", session),), timeout=20)
            assert reply.session.head.seq == 3
        # Without a session any node answers.
        stub.ListSessions(session_pb2.ListSessionsRequest(), timeout=20)
    assert forwarded(three) == before


def test_a_client_of_one_node_learns_by_redirects_where_its_sessions_are(kind: Any, three: list[Daemon]) -> None:
    with kind(servers(three)) as client:
        sessions = talk(client)
    before = forwarded(three)
    with kind(three[0].address, redirects=True) as client:
        for _ in range(2):
            for session in sessions:
                assert len(client.resume(session, 1000).turns) == 2
        assert forwarded(three) == before
        assert {turn.seq for turn in client.list_turns(sessions[0])} == {1, 2}
    with kind(three[0].address) as client:
        for session in sessions:
            client.get_session(session)
    assert forwarded(three) > before


def test_a_client_that_learned_an_owner_follows_its_sessions_on(kind: Any, tmp_path: Path) -> None:
    with nodes(tmp_path, 2) as both, kind(both[0].address, redirects=True) as client:
        with Client(both[1].address) as other:
            sessions = talk(other, 4)
        for session in sessions:
            client.append(session, user("Three"))
        before = forwarded(both)
        # What it knows is out of date now: node 0 takes them when they are asked for.
        both[1].terminate()
        for session in sessions:
            assert client.append(session, user("Four")).head.seq == 4
        both[1].start()
        for session in sessions:
            assert client.append(session, user("Five")).head.seq == 5
        assert forwarded([both[0]]) <= before


def test_a_node_that_drains_or_crashes_is_left_without_an_error(kind: Any, tmp_path: Path) -> None:
    with nodes(tmp_path, 3) as daemons, kind(servers(daemons), timeout_s=30.0) as client:
        sessions = talk(client, 9)
        for end in (Daemon.terminate, Daemon.kill):
            end(daemons[0])
            for session in sessions:
                done = client.append(session, user("More"), return_tail_on_conflict=True)
                assert done.outcome == "APPENDED"
            daemons[0].start()
        for session in sessions:
            assert [turn.seq for turn in client.list_turns(session)] == [1, 2, 3, 4]


@pytest.mark.parametrize("redirects", [False, True], ids=["forwarded", "redirected"])
def test_a_rolling_restart_under_load_reaches_no_caller(tmp_path: Path, redirects: bool) -> None:
    with nodes(tmp_path, 3) as daemons, Client(servers(daemons), timeout_s=30.0, redirects=redirects) as client:
        sessions = talk(client, 12)
        over = threading.Event()
        errors: list[BaseException] = []
        took_ms: list[float] = []
        heads = dict.fromkeys(sessions, 2)

        def write(mine: list[str]) -> None:
            try:
                while not over.is_set():
                    for session in mine:
                        began = time.monotonic()
                        done = client.append(session, user("More"), expected=heads[session])
                        took_ms.append((time.monotonic() - began) * 1000)
                        heads[session] += 1
                        # A reply may be lost with its node; the repeat is a duplicate then.
                        assert done.outcome in ("APPENDED", "DUPLICATE")
                        assert done.head.seq == heads[session]
            except BaseException as error:
                errors.append(error)

        writers = [threading.Thread(target=write, args=(sessions[number::2],)) for number in range(2)]
        for writer in writers:
            writer.start()
        try:
            for daemon in daemons:
                daemon.restart()
        finally:
            over.set()
            for writer in writers:
                writer.join()
        assert not errors, errors
        took_ms.sort()
        print(f"{len(took_ms)} appends, p99 {took_ms[int(len(took_ms) * 0.99)]:.0f} ms, longest {took_ms[-1]:.0f} ms")
        for session, head in heads.items():
            assert [turn.seq for turn in client.list_turns(session)] == list(range(1, head + 1))


# Servers that refuse, by a script --------------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[list[Scripted]]:
    """Three servers that accept what their script does not refuse, in the order in which session `s` goes to them."""
    made = [Scripted(accept) for _ in range(3)]
    by_address = {server.address: server for server in made}
    yield [by_address[address] for address in Ring(list(by_address)).order("s")]
    for server in made:
        server.stop()


def several(made: list[Scripted]) -> str:
    return ",".join(sorted(server.address for server in made))


@pytest.mark.parametrize("reason", [*sorted(ELSEWHERE - {"SERVER_UNREACHABLE"}), ""])
def test_a_call_goes_on_to_the_next_server_without_a_pause(
    kind: Any, scripted: list[Scripted], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the call may take.
    monkeypatch.setattr(failures, "BACKOFF_FIRST_S", 60.0)
    for server in scripted[:2]:
        # A minute: whoever waits for it is found out.
        server.script = [refuse(UNAVAILABLE, reason, 60_000 if reason else 0)]
    with kind(several(scripted)) as client:
        assert client.append("s", user("x")).outcome == "APPENDED"
    assert [len(server.requests) for server in scripted] == [1, 1, 1]
    assert len({request for server in scripted for _, request, _ in server.requests}) == 1


def test_what_all_servers_refuse_is_asked_again_at_a_pace_of_its_own(kind: Any, scripted: list[Scripted]) -> None:
    for server in scripted:
        server.script = [refuse(UNAVAILABLE, "OWNER_UNREACHABLE", 60_000)] * 2
    with kind(several(scripted)) as client:
        assert client.append("s", user("x")).outcome == "APPENDED"
    times = sorted(at for server in scripted for at, _, _ in server.requests)
    assert len(times) == 7
    # One pause after each round: 50 ms, then 100, of which half is at random.
    assert times[3] - times[2] >= 0.025
    assert times[6] - times[5] >= 0.05
    assert times[6] - times[0] < 5


def test_a_refusal_that_another_server_would_share_waits_as_it_says(kind: Any, scripted: list[Scripted]) -> None:
    scripted[0].script = [refuse(UNAVAILABLE, "STORE_UNAVAILABLE", 300)]
    with kind(several(scripted)) as client:
        client.append("s", user("x"))
    assert [len(server.requests) for server in scripted] == [2, 0, 0]
    assert scripted[0].requests[1][0] - scripted[0].requests[0][0] >= 0.3


def test_without_repeats_a_refusal_is_told_and_a_redirect_still_followed(kind: Any, scripted: list[Scripted]) -> None:
    first, second, _ = scripted
    first.script = [refuse(UNAVAILABLE, "NODE_DRAINING", 1000)]
    with kind(several(scripted), retry_s=0) as client, pytest.raises(Unavailable) as refused:
        client.append("s", user("x"))
    assert refused.value.reason == "NODE_DRAINING"
    first.script = [refuse(UNAVAILABLE, "NOT_OWNER", 1000, owner_address=second.address)]
    with kind(several(scripted), retry_s=0, redirects=True) as client:
        assert client.append("s", user("x")).outcome == "APPENDED"
    assert [len(server.requests) for server in scripted] == [2, 1, 0]


def test_a_session_is_asked_for_where_it_was_found(kind: Any, scripted: list[Scripted]) -> None:
    first, second, _ = scripted
    first.script = [refuse(UNAVAILABLE, "NOT_OWNER", 1000, owner_address=second.address)]
    with kind(several(scripted), redirects=True) as client:
        for _ in range(3):
            client.append("s", user("x"))
        assert [len(server.requests) for server in scripted] == [1, 3, 0]
        assert all(metadata["x-sessiond-redirect"] == "1" for _, _, metadata in second.requests)
        # It went on, and the client with it.
        second.script = [refuse(UNAVAILABLE, "NOT_OWNER", 1000, owner_address=first.address)]
        for _ in range(2):
            client.append("s", user("x"))
    assert [len(server.requests) for server in scripted] == [3, 4, 0]


def test_nodes_that_send_a_call_round_are_asked_to_forward_it(kind: Any, scripted: list[Scripted]) -> None:
    def round_to(address: str) -> Any:
        def line(context: grpc.ServicerContext) -> bytes:
            if dict(context.invocation_metadata()).get("x-sessiond-redirect"):
                return refuse(UNAVAILABLE, "NOT_OWNER", 1000, owner_address=address)(context)
            return accept(context)

        return line

    for server, following in zip(scripted, [*scripted[1:], scripted[0]], strict=True):
        server.always = round_to(following.address)
    with kind(several(scripted), redirects=True) as client:
        assert client.append("s", user("x")).outcome == "APPENDED"
    assert sum(len(server.requests) for server in scripted) == 4


def test_an_owner_that_can_not_be_reached_from_here_is_reached_through_a_node(
    kind: Any, scripted: list[Scripted]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        nowhere = f"127.0.0.1:{unused.getsockname()[1]}"

    def forward(context: grpc.ServicerContext) -> bytes:
        if dict(context.invocation_metadata()).get("x-sessiond-redirect"):
            return refuse(UNAVAILABLE, "NOT_OWNER", 1000, owner_address=nowhere)(context)
        return accept(context)

    for server in scripted:
        server.always = forward
    with kind(several(scripted), redirects=True) as client:
        for _ in range(3):
            assert client.append("s", user("x")).outcome == "APPENDED"
    asked = [dict(metadata) for _, _, metadata in scripted[0].requests]
    # Each call asks first, since the address may be of use again; only the first one tried it.
    assert len(asked) == 6
    assert [("x-sessiond-redirect" in metadata) for metadata in asked] == [True, False] * 3


@contextlib.contextmanager
def silent_server() -> Iterator[str]:
    """An address that takes connections, as a machine that stands still does, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def test_a_server_that_says_nothing_costs_a_second_once(kind: Any) -> None:
    server = Scripted(accept)
    with silent_server() as silent, kind(f"{silent},{server.address}") as client:
        order = Ring([silent, server.address])
        sessions = [f"s{number}" for number in range(40)]
        to_silent = [session for session in sessions if order.order(session)[0] == silent]
        assert len(to_silent) > 10
        began = time.monotonic()
        client.append(to_silent[0], user("x"))
        first_s = time.monotonic() - began
        began = time.monotonic()
        for session in to_silent:
            client.append(session, user("x"))
        rest_s = time.monotonic() - began
    server.stop()
    assert 0.9 < first_s < 5
    assert rest_s < 1


def test_a_node_that_stands_still_leaves_time_to_ask_another(kind: Any, scripted: list[Scripted]) -> None:
    first = scripted[0]

    def hang(context: grpc.ServicerContext) -> bytes:
        first.release.wait(30)
        return b""

    first.script = [hang]
    with kind(several(scripted), timeout_s=4.0) as client:
        began = time.monotonic()
        assert client.append("s", user("x")).outcome == "APPENDED"
        assert 1.9 < time.monotonic() - began < 3.9
    assert [len(server.requests) for server in scripted] == [1, 1, 0]


def test_calls_about_a_node_go_to_the_first_that_is_named(kind: Any, three: list[Daemon]) -> None:
    for daemon in three:
        others = [other for other in three if other is not daemon]
        with kind(servers([daemon, *others])) as client:
            assert client.get_status().hot.path == str(daemon.data_dir / "hot")


def test_a_call_about_a_node_and_a_session_stays_at_the_node(kind: Any, scripted: list[Scripted]) -> None:
    for server in scripted:
        order = [server.address, *(other.address for other in scripted if other is not server)]
        server.script = [refuse(UNAVAILABLE, "NODE_STARTING", 10), lambda _: b""]
        with kind(",".join(order), redirects=True) as client:
            client.flush("s")
    assert [len(server.requests) for server in scripted] == [2, 2, 2]
    assert all("x-sessiond-redirect" not in asked for server in scripted for _, _, asked in server.requests)


def test_channels_to_owners_are_bounded(kind: Any) -> None:
    made = [Scripted(accept) for _ in range(CHANNELS_MAX + 8)]
    router = Scripted()
    router.script = [refuse(UNAVAILABLE, "NOT_OWNER", 0, owner_address=server.address) for server in made]
    try:
        with kind(router.address, redirects=True) as client:
            for number in range(len(made)):
                client.append(f"s{number}", user("x"))
            real = client if isinstance(client, Client) else client._client
            assert len(real._channels._channels) == CHANNELS_MAX + 1
            # Those that were closed are opened again.
            for number in range(len(made)):
                client.append(f"s{number}", user("x"))
        assert all(len(server.requests) == 2 for server in made)
        assert len(router.requests) == len(made)
    finally:
        for server in [*made, router]:
            server.stop()


# Names behind which there are several ----------------------------------------------------------------------------


def test_a_node_of_a_name_that_drains_is_left_by_its_health(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RING_VARIABLE, "true")
    with nodes(tmp_path, 2) as both, kind(f"ipv4:{servers(both)}", timeout_s=30.0) as client:
        sessions = talk(client, 12)
        with Client(both[0].address) as admin:
            assert [progress.clean for progress in admin.drain() if progress.done] == [True]
        with Client(both[1].address) as admin:
            for session in sessions:
                assert client.append(session, user("Three")).head.seq == 3
            # Nobody had to send them on: the node that drains was not asked.
            assert admin.get_status().ownership.answered_for_others == 0
