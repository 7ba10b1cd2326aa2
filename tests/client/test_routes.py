"""Where a call goes: the ring that gRPC has too, servers that are away, owners that were named, names of many nodes."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import grpc
import pytest

from sessiond.client import routes
from sessiond.client.ring import Ring, xxh64
from sessiond.client.routes import Route, Routes, may_be_several
from sessiond.errors import Invalid, Unavailable
from tests.client.servers import Line, Scripted

SERVICE_CONFIG = Path(__file__).resolve().parents[2] / "docs" / "routing" / "service-config.json"
THREE = "10.0.0.1:7443,10.0.0.2:7443,10.0.0.3:7443"
APPEND = "/sessiond.v1.SessionService/AppendTurn"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def names_itself(server: Scripted) -> Line:
    return lambda _: server.address.encode()


# The ring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0xEF46DB3751D8E999),
        (b"a", 0xD24EC4F1A98C6E5B),
        (b"abc", 0x44BC2CF5AD770999),
    ],
)
def test_xxh64_gives_the_published_values(data: bytes, expected: int) -> None:
    assert xxh64(data) == expected


def test_a_session_is_where_grpcs_own_ring_has_it_also_after_a_server_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(routes.RING_VARIABLE, "true")
    servers = [Scripted() for _ in range(5)]
    for server in servers:
        server.always = names_itself(server)
    addresses = [server.address for server in servers]
    # Of every length: short, of one round of 32 bytes, of several.
    keys = [str(uuid.UUID(int=number * 0x9E3779B9)) for number in range(60)] + ["x" * size for size in range(1, 129)]
    config = json.loads(SERVICE_CONFIG.read_text())
    del config["methodConfig"], config["healthCheckConfig"]
    options = [("grpc.service_config", json.dumps(config)), ("grpc.enable_http_proxy", 0)]
    try:
        with grpc.insecure_channel(f"ipv4:{','.join(addresses)}", options=options) as channel:
            ask = channel.unary_unary(APPEND)

            def asked(key: str) -> str:
                return str(ask(b"", metadata=(("x-session-id", key),), timeout=20, wait_for_ready=True).decode())

            place = Ring(addresses)
            assert {key: asked(key) for key in keys} == {key: place.order(key)[0] for key in keys}
            assert set(Counter(place.order(key)[0] for key in keys)) == set(addresses)
            servers.pop().stop()
            left = {key: [address for address in place.order(key) if address != addresses[4]] for key in keys}
            # A connection that ends is noticed by the first call over it.
            moved = {}
            for key in keys:
                try:
                    moved[key] = asked(key)
                except grpc.RpcError:
                    moved[key] = asked(key)
            assert moved == {key: order[0] for key, order in left.items()}
    finally:
        for server in servers:
            server.stop()


def test_a_list_without_one_server_moves_few_sessions_of_the_others() -> None:
    before, after = Ring(THREE.split(",")), Ring(THREE.split(",")[1:])
    keys = [str(number) for number in range(2000)]
    assert all(sorted(before.order(key)) == sorted(THREE.split(",")) for key in keys)
    stayed = [key for key in keys if before.order(key)[0] != "10.0.0.1:7443"]
    assert 1000 < len(stayed) < 1600
    # Fewer servers have more points each, as in gRPC.
    moved = [key for key in stayed if after.order(key)[0] != before.order(key)[0]]
    assert len(moved) < len(stayed) / 5


def test_a_session_that_meets_a_point_exactly_belongs_to_it() -> None:
    servers = THREE.split(",")
    assert [Ring(servers).order(f"{server}_17")[0] for server in servers] == servers


# What a text names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "servers"),
    [
        ("h:1", ["h:1"]),
        ("h:1, g:2,h:1", ["h:1", "g:2"]),
        ("[::1]:1,10.0.0.1:2", ["[::1]:1", "10.0.0.1:2"]),
        ("unix:/a,b", ["unix:/a,b"]),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", ["ipv4:10.0.0.1:1,10.0.0.2:1"]),
        ("dns:///nodes:7443", ["dns:///nodes:7443"]),
        ("xds:///nodes", ["xds:///nodes"]),
    ],
)
def test_servers_are_named_one_by_one_or_by_a_target_of_grpcs(server: str, servers: list[str]) -> None:
    assert routes.parse(server) == servers


@pytest.mark.parametrize("server", ["", ",", "h:1,", "h:1,g", "h:1,,g:2"])
def test_what_names_no_server_is_refused(server: str) -> None:
    with pytest.raises(Invalid, match="HOST:PORT") as refused:
        routes.parse(server)
    assert refused.value.fields[0][0] == "server"


@pytest.mark.parametrize(
    ("target", "several"),
    [
        ("nodes.chat.svc:7443", True),
        ("dns:///nodes:7443", True),
        ("xds:///nodes", True),
        ("ipv4:10.0.0.1:1,10.0.0.2:1", True),
        ("ipv4:10.0.0.1:1", False),
        ("127.0.0.1:7443", False),
        ("[::1]:7443", False),
        ("localhost:7443", False),
        ("dns:///127.0.0.1:7443", False),
        ("unix:/run/sessiond.sock", False),
    ],
)
def test_only_what_may_lead_to_several_nodes_is_spread_by_grpc(target: str, several: bool) -> None:
    assert may_be_several(target) is several
    assert Routes(target, False).uses_ring_of_grpc is several


# Servers that are away -------------------------------------------------------------------------------------------


def test_a_server_that_was_away_is_asked_last_for_a_time_that_grows_and_ends() -> None:
    clock = Clock()
    known = Routes(THREE, False, clock)
    first, second, third = known.order("s")
    # Of several calls that find out at once only one counts.
    for _ in range(5):
        known.avoid(first)
    assert known.order("s") == [second, third, first]
    clock.now_s += routes.AVOID_FIRST_S
    assert known.order("s") == [first, second, third]
    waited = []
    for _ in range(8):
        known.avoid(first)
        began = clock.now_s
        while known.order("s")[0] != first:
            clock.now_s += 0.25
        waited.append(clock.now_s - began)
    assert waited == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0, 8.0]
    known.avoid(first)
    known.answered(first)
    known.avoid(first)
    clock.now_s += routes.AVOID_FIRST_S
    assert known.order("s")[0] == first


def test_a_call_asks_each_server_once_before_it_waits() -> None:
    route = Route(Routes(THREE, False, Clock()), "s")
    asked = [route.address]
    for _ in range(2):
        assert route.more
        assert route.moved("NODE_DRAINING")
        asked.append(route.address)
    assert sorted(asked) == sorted(THREE.split(","))
    assert not route.more
    assert not route.moved("NODE_DRAINING")
    # A second round goes to all again.
    assert [route.moved("OWNER_UNREACHABLE") for _ in range(3)] == [True, True, False]


def test_a_refusal_that_every_node_shares_moves_nothing() -> None:
    route = Route(Routes(THREE, False, Clock()), "s")
    address = route.address
    for reason in ("STORE_UNAVAILABLE", "CLOUD_NOT_COMMITTED", "OVERLOADED", "COMMIT_UNKNOWN"):
        assert not route.moved(reason)
        assert route.address == address


def test_a_call_about_one_node_stays_there_whatever_it_says() -> None:
    route = Route(Routes(THREE, True, Clock()), "s", one_node=True)
    assert route.metadata == (("x-session-id", "s"),)
    for _ in range(3):
        assert not route.moved("NODE_DRAINING")
        assert route.address == "10.0.0.1:7443"
    assert not route.several
    assert not route.more


# Owners that were named ------------------------------------------------------------------------------------------


def elsewhere(address: str) -> Unavailable:
    return Unavailable("NOT_OWNER", "Elsewhere.", {"owner_address": address})


def test_a_call_follows_three_redirects_and_asks_for_no_more() -> None:
    known = Routes(THREE, True, Clock())
    route = Route(known, "s")
    asks = (("x-session-id", "s"), ("x-sessiond-redirect", "1"))
    for number in range(3):
        assert route.metadata == asks
        assert route.redirected(elsewhere(f"10.1.1.{number}:1"))
        assert (route.address, route.direct) == (f"10.1.1.{number}:1", True)
    assert route.metadata == asks[:1]
    assert not route.redirected(elsewhere("10.1.1.9:1"))
    assert known.owner("s") == "10.1.1.2:1"
    # The next call goes there at once; another session's does not.
    assert Route(known, "s").address == "10.1.1.2:1"
    assert not Route(known, "other").direct


def test_without_redirects_nobody_is_asked_where_a_session_is() -> None:
    route = Route(Routes(THREE, False, Clock()), "s")
    assert route.metadata == (("x-session-id", "s"),)
    assert not route.redirected(elsewhere("10.1.1.1:1"))
    assert Route(Routes(THREE, True, Clock()), "").metadata == ()


def test_an_owner_that_can_not_be_reached_from_here_is_left_aside_for_a_while() -> None:
    clock = Clock()
    known = Routes(THREE, True, clock)
    route = Route(known, "s")
    at_first = route.address
    assert route.redirected(elsewhere("10.1.1.1:1"))
    assert route.moved("SERVER_UNREACHABLE")
    # Back to the servers, one of which forwards it.
    assert (route.address, route.direct) == (at_first, False)
    assert route.metadata == (("x-session-id", "s"),)
    assert known.owner("s") == ""
    other = Route(known, "other")
    assert other.redirected(elsewhere("10.1.1.1:1"))
    assert not other.direct
    assert other.metadata == (("x-session-id", "other"),)
    clock.now_s += routes.UNREACHABLE_S
    again = Route(known, "s")
    assert again.redirected(elsewhere("10.1.1.1:1"))
    assert again.direct


def test_an_owner_that_restarts_is_asked_again_soon() -> None:
    clock = Clock()
    known = Routes(THREE, True, clock)
    route = Route(known, "s")
    assert route.redirected(elsewhere("10.1.1.1:1"))
    route.answered()
    again = Route(known, "s")
    assert again.moved("SERVER_UNREACHABLE")
    assert not known.learn("s", "10.1.1.1:1")
    clock.now_s += routes.AWAY_S
    assert known.learn("s", "10.1.1.1:1")
    for number in range(2 * routes.CHANNELS_MAX):
        known.reached(f"10.2.0.{number}:1")
    assert len(known._reached) == routes.CHANNELS_MAX


@pytest.mark.parametrize("address", ["", "itself"])
def test_a_redirect_that_leads_nowhere_has_the_call_forwarded(address: str) -> None:
    route = Route(Routes(THREE, True, Clock()), "s")
    at_first = route.address
    assert route.redirected(elsewhere(at_first if address else ""))
    assert route.address == at_first
    assert route.metadata == (("x-session-id", "s"),)
    assert not route.redirected(elsewhere("10.1.1.1:1"))


def test_an_owner_that_gave_a_session_up_is_forgotten() -> None:
    known = Routes(THREE, True, Clock())
    known.learn("s", "10.1.1.1:1")
    route = Route(known, "s")
    assert route.direct
    assert route.moved("NODE_DRAINING")
    assert not route.direct
    assert known.owner("s") == ""
    # It was reached: only the session is not there.
    assert known.learn("s", "10.1.1.1:1")
    # What the owner itself can't do is no reason to leave it.
    route = Route(known, "s")
    assert not route.moved("CLOUD_NOT_COMMITTED")
    assert route.direct


def test_what_is_remembered_is_bounded() -> None:
    known = Routes(THREE, True, Clock())
    for number in range(routes.OWNERS_MAX + 1):
        known.learn(f"s{number}", "10.1.1.1:1")
        known.owner("s0")
    assert len(known._owners) == routes.OWNERS_MAX
    assert (known.owner("s0"), known.owner("s1")) == ("10.1.1.1:1", "")
    for number in range(2 * routes.CHANNELS_MAX):
        known.forget("s", f"10.2.0.{number}:1", unreachable=True)
    assert len(known._unreachable) == routes.CHANNELS_MAX


# gRPC's own ring -------------------------------------------------------------------------------------------------

SETS = """
import os, sys
from sessiond.client import Client
name = "GRPC_EXPERIMENTAL_RING_HASH_SET_REQUEST_HASH_KEY"
for server in ("127.0.0.1:1", "localhost:1", "unix:/nowhere", "10.0.0.1:1,10.0.0.2:1"):
    with Client(server, timeout_s=0.01, retry_s=0) as client:
        try:
            client.get_session("s")
        except Exception:
            pass
    assert name not in os.environ, server
with Client("nodes.invalid:1", timeout_s=0.01, retry_s=0) as client:
    try:
        client.get_session("s")
    except Exception:
        pass
assert os.environ.pop(name) == "true"
"""


def test_the_environment_is_changed_only_for_a_name_with_several_nodes() -> None:
    subprocess.run([sys.executable, "-c", SETS], check=True, timeout=60)


def test_whoever_switched_hashing_off_gets_the_nodes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(routes.RING_VARIABLE, "false")
    config = json.loads(routes.ring_options()["grpc.service_config"])
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    monkeypatch.setenv(routes.RING_VARIABLE, "1")
    config = json.loads(routes.ring_options()["grpc.service_config"])
    assert config["loadBalancingConfig"][0] == json.loads(SERVICE_CONFIG.read_text())["loadBalancingConfig"][0]
    assert config["healthCheckConfig"] == json.loads(SERVICE_CONFIG.read_text())["healthCheckConfig"]
