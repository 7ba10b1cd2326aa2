"""The gRPC server: every method of the contract, health and reflection, on one asyncio loop.

It promises that each refusal leaves as one google.rpc.Status and that a method this release does not serve says so. It
never blocks the loop on disk or network.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from sessiond.errors import Corrupt, Exhausted, SessiondError, Unavailable, Unimplemented
from sessiond.service.node import CallCounts, Node
from sessiond.service.ownership import Call
from sessiond.service.sessions import Sessions
from sessiond.transport.status import DETAILS_KEY, status_code, status_proto
from sessiond.transport.wire import embed, parse, reply
from sessiond.v1 import admin_pb2, session_pb2, state_pb2

log = structlog.get_logger("sessiond.transport")

# Above every limit of ours, whose refusals carry details; the transport's own does not.
TRANSPORT_BYTES_MAX: Final = 64 * 1024**2
LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
# Not a reason to send calls elsewhere: sessions that the node owns are served without it.
CLOUD_TIER: Final = "cloud"
HEALTH_PERIOD_S: Final = 0.5
SERVICES: Final = (
    session_pb2.DESCRIPTOR.services_by_name["SessionService"],
    state_pb2.DESCRIPTOR.services_by_name["StateService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
)
# Until identities are verified, every caller is of this tenant.
TENANT: Final = "default"

Unary = Callable[[Call, Any], Awaitable[Any]]


class Server:
    """The node's gRPC server. `bind`, then `start`; `stop` last."""

    def __init__(
        self,
        clock_ms: Callable[[], int],
        calls: CallCounts,
        request_bytes_max: int,
        concurrent_calls_max: int,
    ) -> None:
        self._clock_ms = clock_ms
        self._calls = calls
        self._request_bytes_max = request_bytes_max
        self._calls_max = concurrent_calls_max
        self._in_flight = 0
        self._health = HealthServicer()
        self._unary: dict[str, tuple[type[Message], Unary]] = {}
        self._node: Node | None = None
        self._watch: asyncio.Task[None] | None = None
        self._started = False
        # What a node that starts says it waits for.
        self.waits_for = ""
        self.shut_down = asyncio.Event()
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", TRANSPORT_BYTES_MAX),
                ("grpc.max_send_message_length", TRANSPORT_BYTES_MAX),
                # A second daemon on the port must be told, not given half of the calls.
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
                ("grpc.http2.max_ping_strikes", 5),
            ],
            # Twice our own limit and room for health: what is above ours must get as far as its details.
            maximum_concurrent_rpcs=2 * concurrent_calls_max + 64,
        )
        for service in SERVICES:
            handlers = {
                method.name: self._handler(service.name, method.name, method.server_streaming)
                for method in service.methods
            }
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [service.full_name for service in SERVICES]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    def bind(self, listen: str) -> int:
        """Take the address; the port that was taken. Raises Unavailable PORT_IN_USE."""
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise Unavailable(
                "PORT_IN_USE",
                f"The address {listen} can't be listened on: {error}.",
                {"listen": listen},
                [("listen", "in use, or not an address of this machine")],
            ) from error
        if port == 0 and not listen.startswith("unix:"):
            raise Unavailable("PORT_IN_USE", f"The address {listen} can't be listened on.", {"listen": listen})
        return int(port)

    def serve(self, sessions: Sessions, node: Node) -> None:
        """Connect the calls that this release serves."""
        self._node = node
        self._unary = {
            "CreateSession": _message(session_pb2.CreateSessionRequest, sessions.create),
            "GetSession": _message(session_pb2.GetSessionRequest, sessions.get),
            "ListSessions": _message(session_pb2.ListSessionsRequest, sessions.list_sessions),
            "UpdateSession": _message(session_pb2.UpdateSessionRequest, sessions.update),
            "DeleteSession": _message(session_pb2.DeleteSessionRequest, sessions.delete),
            "ListCheckpoints": _message(session_pb2.ListCheckpointsRequest, sessions.list_checkpoints),
            "ResumeSession": (session_pb2.ResumeSessionRequest, _resume(sessions)),
            "AppendTurn": (session_pb2.AppendTurnRequest, _append(sessions)),
            "ListTurns": (session_pb2.ListTurnsRequest, _list_turns(sessions)),
            "GetStatus": (admin_pb2.GetStatusRequest, lambda _caller, _request: node.status()),
            "Flush": _message(admin_pb2.FlushRequest, node.flush),
            "Release": _message(admin_pb2.ReleaseRequest, node.release),
        }
        node.on_phase = self._schedule_health

    def _handler(self, service: str, name: str, streams: bool) -> Any:
        if streams:
            return grpc.unary_stream_rpc_method_handler(self._stream(name))
        return grpc.unary_unary_rpc_method_handler(self._call(name))

    def _call(self, name: str) -> Any:
        async def call(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self._in_flight += 1
            try:
                if self._in_flight > self._calls_max:
                    raise Exhausted("OVERLOADED", f"{self._calls_max} calls are being answered.")
                served = self._unary.get(name)
                if served is None:
                    raise self._not_served(name)
                kind, work = served
                request = parse(kind, raw, self._request_bytes_max)
                answer = reply(await work(self._caller(context), request))
            except SessiondError as error:
                self._count(name, error)
                await self._abort(context, error)
                raise AssertionError from error
            except asyncio.CancelledError:
                self._calls.add(name, "CANCELLED", "")
                raise
            except Exception as error:
                refusal = self._internal(name, error)
                self._count(name, refusal)
                await self._abort(context, refusal)
                raise AssertionError from error
            finally:
                self._in_flight -= 1
            self._calls.add(name, "OK", "")
            return answer

        return call

    def _stream(self, name: str) -> Any:
        async def call(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
            try:
                if name != "Drain" or self._node is None:
                    raise self._not_served(name)
                request = parse(admin_pb2.DrainRequest, raw, self._request_bytes_max)
                async for progress in self._node.drain(request.grace_ms):
                    yield progress.SerializeToString()
                if request.shut_down:
                    self.shut_down.set()
            except SessiondError as error:
                self._count(name, error)
                await self._abort(context, error)
                raise AssertionError from error
            except asyncio.CancelledError:
                self._calls.add(name, "CANCELLED", "")
                raise
            except Exception as error:
                refusal = self._internal(name, error)
                self._count(name, refusal)
                await self._abort(context, refusal)
                raise AssertionError from error
            self._calls.add(name, "OK", "")

        return call

    def _caller(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Call:
        remaining = context.time_remaining()
        # gRPC reports a very large number where there is no deadline.
        deadline_ms = None if remaining is None or remaining > 1e8 else self._clock_ms() + int(remaining * 1000)
        return Call(TENANT, deadline_ms)

    def _not_served(self, name: str) -> SessiondError:
        if self._node is None:
            return Unavailable("NODE_STARTING", f"This node is starting{self.waits_for}.")
        return Unimplemented("NOT_SERVED_YET", f"{name} is part of the contract but not served by this release.")

    def _internal(self, name: str, error: Exception) -> SessiondError:
        """What to tell of an error that nobody foresaw; of a limit of the machine, what it is."""
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return Exhausted("TOO_MANY_FILES", f"{name} needs a file and may open no more.")
        if isinstance(error, MemoryError):
            return Exhausted("OVERLOADED", f"{name} was given no memory.")
        log.error("call_failed", method=name, exc_info=error)
        return Corrupt("INTERNAL", f"{name} failed for an unforeseen reason: {type(error).__name__}.")

    def _count(self, name: str, error: SessiondError) -> None:
        self._calls.add(name, status_code(error).name, error.reason)

    async def _abort(self, context: grpc.aio.ServicerContext[bytes, bytes], error: SessiondError) -> None:
        status = status_proto(error)
        await context.abort(
            status_code(error), status.message, trailing_metadata=((DETAILS_KEY, status.SerializeToString()),)
        )

    async def start(self) -> None:
        """Begin answering, if it has not begun. Health says NOT_SERVING until the node serves."""
        await self._set_health()
        if self._node is not None:
            self._watch = asyncio.create_task(self._watch_cloud())
        if not self._started:
            self._started = True
            await self._server.start()

    async def _watch_cloud(self) -> None:
        """Tell health whenever the cloud tier stops answering, or answers again."""
        answers: bool | None = None
        while self._node is not None:
            if self._node.cloud_answers != answers:
                answers = self._node.cloud_answers
                up, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
                await self._health.set(CLOUD_TIER, up if answers else down)
            await asyncio.sleep(HEALTH_PERIOD_S)

    def _schedule_health(self) -> None:
        task = asyncio.ensure_future(self._set_health())
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _set_health(self) -> None:
        serving = self._node is not None and self._node.phase == admin_pb2.NODE_PHASE_SERVING
        up, down = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(LIVENESS, up)
        if self._node is None:
            await self._health.set(CLOUD_TIER, down)
        for name in ("", READINESS, *(service.full_name for service in SERVICES)):
            await self._health.set(name, up if serving else down)

    async def stop(self, grace_s: float) -> None:
        """Stop taking calls; those under way have the grace."""
        if self._watch is not None:
            self._watch.cancel()
        await self._server.stop(grace_s)


def _message(kind: type[Message], work: Any) -> tuple[type[Message], Unary]:
    return kind, work


def _resume(sessions: Sessions) -> Unary:
    async def call(caller: Call, request: session_pb2.ResumeSessionRequest) -> bytes:
        return embed(1, await sessions.resume(caller, request))

    return call


def _append(sessions: Sessions) -> Unary:
    async def call(caller: Call, request: session_pb2.AppendTurnRequest) -> bytes:
        context, rest = await sessions.append(caller, request)
        tail = bytes(rest.SerializeToString())
        return tail if context is None else embed(1, context) + tail

    return call


def _list_turns(sessions: Sessions) -> Unary:
    async def call(caller: Call, request: session_pb2.ListTurnsRequest) -> bytes:
        frames, rest = await sessions.list_turns(caller, request)
        return frames + bytes(rest.SerializeToString())

    return call
