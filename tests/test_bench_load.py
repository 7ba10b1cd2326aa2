"""The load generator of the benchmarks sends what it was told, counts what came back, and keeps to its rate."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from bench.load import Connection, Generator
from bench.processes import Load
from sessiond.testing import HOST

PATH = "/bench.Service/Call"
# Calls that must have come before the first one is answered.
HELD_UNTIL = 20
PER_S = 100.0
PATIENCE_S = 20.0


class Service(grpc.GenericRpcHandler):
    """Answers every call with one byte; the first only once `held_until` calls have come."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []
        self.held_until = 0
        self._lock = threading.Lock()
        self._enough = threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        assert handler_call_details.method == PATH
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self.requests.append(request)
            first = len(self.requests) == 1
            if len(self.requests) >= self.held_until:
                self._enough.set()
        if first and self.held_until and not self._enough.wait(PATIENCE_S):
            context.abort(grpc.StatusCode.ABORTED, "too few calls came")
        return b"!"


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    with ThreadPoolExecutor(HELD_UNTIL * 2) as pool:
        server = grpc.server(pool, handlers=[service])
        port = server.add_insecure_port(f"{HOST}:0")
        server.start()
        yield f"{HOST}:{port}"
        server.stop(None).wait()


def bodies(count: int) -> list[bytes]:
    return [b"body %d" % number for number in range(count)]


def test_each_body_is_sent_once_whoever_is_free(service: Service, address: str) -> None:
    with Load(callers=3, connections=2) as load:
        answer = load.run(address, PATH, 50, bodies(50), each=True)
    assert answer["calls"] == 50
    assert sorted(service.requests) == sorted(bodies(50))


def test_a_message_larger_than_a_frame_comes_whole(service: Service, address: str) -> None:
    large = bytes(range(256)) * 250
    with Load(callers=1, connections=1) as load:
        # More than a connection's window, too: later ones wait for room.
        load.run(address, PATH, 9, [large, b"small", large[:16_379]], each=True)
    assert Counter(service.requests) == {large: 3, b"small": 3, large[:16_379]: 3}


def test_a_caller_says_the_same_again_without_it(service: Service, address: str) -> None:
    with Load(callers=2, connections=1) as load:
        load.run(address, PATH, 40, bodies(5))
    # Two callers, and so the first two bodies.
    assert set(service.requests) == set(bodies(2))


def test_calls_at_a_rate_come_although_one_is_held_and_count_from_when_they_were_due(
    service: Service, address: str
) -> None:
    service.held_until = HELD_UNTIL
    with Load(callers=1, connections=2) as load:
        answer = load.run(address, PATH, 0, bodies(10), each=True, per_s=PER_S, for_s=0.5)
    assert answer["calls"] == 50
    assert Counter(service.requests) == dict.fromkeys(bodies(10), 5)
    # The first was due before all others and answered after the twentieth had come.
    assert (HELD_UNTIL - 1) / PER_S <= answer["max_s"] < PATIENCE_S
    assert answer["seconds"] >= 49 / PER_S


def test_a_call_that_is_sent_late_counts_from_when_it_was_due(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    due: list[float | None] = []
    plain = Connection.call

    def call(self: Connection, caller: int, message: bytes, since: float | None = None) -> bytes:
        due.append(since)
        return plain(self, caller, message, since)

    monkeypatch.setattr(Connection, "call", call)
    order = {"port": int(address.rpartition(":")[2]), "path": PATH, "bodies": ["00"], "counter_at": [-1], "first": 0}
    generator = Generator()
    # A thousand within a millisecond: every one of them is late.
    answer = generator.run(order | {"connections": 1, "calls": 1000, "per_s": 1e6})
    generator.close()
    assert [round((one - due[0]) * 1e6) for one in due] == list(range(1000))
    assert answer["calls"] == 1000


def test_a_call_that_waits_for_room_still_counts_from_when_it_was_due(address: str) -> None:
    connection = Connection(int(address.rpartition(":")[2]), PATH)
    assert connection.call(7, b"x", 1.5)
    connection.window = 0
    assert not connection.call(8, b"y", 2.5)
    connection.socket.close()
    assert [row[:2] for row in connection.under_way.values()] == [[7, 1.5]]
    assert list(connection.waiting) == [(8, b"y", 2.5)]


def test_a_run_for_a_time_counts_every_call_that_it_began(service: Service, address: str) -> None:
    with Load(callers=4, connections=2) as load:
        answer = load.run(address, PATH, 0, bodies(4), for_s=0.2)
    assert answer["calls"] == len(service.requests) > 4
    assert answer["seconds"] >= 0.2


def test_numbers_are_new_in_every_call_and_run_and_far_from_those_of_another_generator(
    service: Service, address: str
) -> None:
    body, at = b"turn-000000000000.", len(b"turn-")
    with Load(callers=2, connections=1) as load, Load(callers=2, connections=1, first=10**11) as other:
        for _ in range(2):
            load.run(address, PATH, 30, [body] * 2, [at] * 2)
        load.run(address, PATH, 0, [body], [at], for_s=0.1)
        load.run(address, PATH, 30, [body] * 2, [at] * 2)
        other.run(address, PATH, 30, [body] * 2, [at] * 2)
    assert len(service.requests) == len(set(service.requests)) >= 120
    assert {len(request) for request in service.requests} == {len(body)}
    assert all(request.startswith(b"turn-") and request.endswith(b".") for request in service.requests)


def test_a_call_that_is_refused_ends_the_run(service: Service, address: str) -> None:
    with Load(callers=1, connections=1) as load, pytest.raises(RuntimeError, match="the load generator ended"):
        # No such method: an error has trailers only.
        load.run(address, "/bench.Service/Other", 3, bodies(1))
    assert service.requests == []
