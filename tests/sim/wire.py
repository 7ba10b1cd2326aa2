"""gRPC as a world has it: the daemon's own server and channels, with calls that go over the world's network."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import grpc

from sessiond.errors import Corrupt, SessiondError
from sessiond.service.node import CallCounts
from sessiond.transport.peers import Credentials, PeerChannels
from sessiond.transport.server import Server
from sessiond.v1 import node_pb2

if TYPE_CHECKING:
    from tests.sim.schedule import Host
    from tests.sim.world import World

REQUEST_BYTES_MAX = 16 * 1024**2
# The call that a node answers, as far as one thing leads to another.
ANSWERED: ContextVar[str] = ContextVar("ANSWERED", default="")


RpcError = grpc.aio.AioRpcError


def rpc_error(code: grpc.StatusCode, details: str, trailers: Any = ()) -> RpcError:
    return RpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailers), details)


def unreachable(what: str) -> RpcError:
    return rpc_error(grpc.StatusCode.UNAVAILABLE, what)


def too_late() -> RpcError:
    return rpc_error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


class Context:
    """One call, as a handler sees it."""

    def __init__(self, host: Host, timeout_ms: int, metadata: Any) -> None:
        self._host = host
        self._ends_ms = host.boot_ms() + timeout_ms
        self._metadata = metadata

    def time_remaining(self) -> float:
        return (self._ends_ms - self._host.boot_ms()) / 1000

    def invocation_metadata(self) -> Any:
        return self._metadata

    async def abort(self, code: grpc.StatusCode, details: str, trailing_metadata: Any = ()) -> None:
        raise rpc_error(code, details, trailing_metadata)


class _Health:
    async def set(self, service: str, status: Any) -> None:
        """Nobody asks."""


class SimServer(Server):
    """The daemon's server without a socket."""

    def __init__(self, host: Host, counts: CallCounts) -> None:
        self._host = host
        self._clock_ms = host.boot_ms
        self._calls = counts
        self._request_bytes_max = REQUEST_BYTES_MAX
        self._calls_max = 1000
        self._in_flight = 0
        self.answered_for_others = 0
        self._health = _Health()  # type: ignore[assignment]
        self._unary = {}
        self._node = None
        self._router = None
        self._credentials = None
        self._incarnation = b""
        self._rescue = None
        self._watch = None
        self._watches = None
        self.hot_path = None
        self._started = True
        self.waits_for = ""
        self._handlers: dict[str, Callable[[bytes, Any], Any]] = {}

    def handler(self, method: str) -> Any:
        made = self._handlers.get(method)
        if made is None:
            made = self._handlers[method] = self._unary_call(method)
        return made

    def _internal(self, name: str, error: Exception) -> SessiondError:
        self._host.schedule.defect(self._host, f"{name} failed: {type(error).__name__}: {error}", error)
        return Corrupt("INTERNAL", f"{name} failed for an unforeseen reason: {type(error).__name__}.")


class _Stub:
    def __init__(self, world: World, host: Host, address: str) -> None:
        self._world, self._host, self._address = world, host, address

    async def _ask(self, method: str, request: Any, timeout_s: float, metadata: Any) -> bytes:
        if method == ANSWERED.get() == "Forward":
            self._world.history.broken("FORWARD", f"{self._host.name} forwards a forwarded call to {self._address}")
        answer = await self._world.call_node(
            self._host, self._address, method, request.SerializeToString(), timeout_s, metadata
        )
        if isinstance(answer, RpcError):
            raise answer
        assert isinstance(answer, bytes)
        return answer

    async def Forward(self, request: Any, timeout: float, metadata: Any) -> Any:  # noqa: ASYNC109
        return node_pb2.ForwardResponse.FromString(await self._ask("Forward", request, timeout, metadata))

    async def Rescue(self, request: Any, timeout: float, metadata: Any) -> Any:  # noqa: ASYNC109
        return node_pb2.RescueResponse.FromString(await self._ask("Rescue", request, timeout, metadata))


class SimChannels(PeerChannels):
    """The daemon's channels to other nodes, over the world's network."""

    def __init__(self, world: World, host: Host, credentials: Credentials) -> None:
        super().__init__(credentials)
        self._world, self._host = world, host

    def _stub(self, address: str) -> Any:
        return _Stub(self._world, self._host, address)
