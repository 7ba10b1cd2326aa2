"""The gRPC server: every method of the contract, health and reflection, on one asyncio loop.

It promises that each refusal leaves as one google.rpc.Status and that a method this release does not serve says so. It
never blocks the loop on disk or network.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, Final

import grpc
import structlog
from google.protobuf.message import Message
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from sessiond.errors import Corrupt, Exhausted, SessiondError, Unavailable, Unimplemented
from sessiond.service.hotpath import HotPath
from sessiond.service.node import CallCounts, Node
from sessiond.service.ownership import Call, OwnedElsewhere
from sessiond.service.router import Refused, Router
from sessiond.service.sessions import Sessions
from sessiond.service.watch import WATCH, Watches
from sessiond.transport.batched import ITEMS, RESUMES, Batched
from sessiond.transport.options import SERVICES, TENANT, rpcs_max, server_options
from sessiond.transport.peers import Credentials
from sessiond.transport.sockets import bind_unix, in_use, socket_path
from sessiond.transport.status import DETAILS_KEY, status_code, status_proto
from sessiond.transport.wire import embed, parse, reply
from sessiond.v1 import admin_pb2, node_pb2, session_pb2

log = structlog.get_logger("sessiond.transport")

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
# Not a reason to send calls elsewhere: sessions that the node owns are served without it.
CLOUD_TIER: Final = "cloud"
HEALTH_PERIOD_S: Final = 0.5
# Calls about one session, or what belongs to one user, which its owner answers.
FORWARDED: Final = frozenset(
    method.name
    for service in SERVICES[:2]
    for method in service.methods
    if not method.server_streaming and method.name not in ("ListSessions", "BatchResumeSessions", "BatchAppendTurns")
)
# A caller that sets it to 1 would rather be told where its session is than have the call forwarded.
REDIRECT_HEADER: Final = "x-sessiond-redirect"
# What a forwarded request has around it.
FORWARD_BYTES: Final = 4096
CODES: Final = {code.value[0]: code for code in grpc.StatusCode}

Unary = Callable[[Call, Any], Awaitable[Any]]


class Server:
    """The node's gRPC server. `bind`, then `start`; `stop` last."""

    def __init__(
        self,
        clock_ms: Callable[[], int],
        calls: CallCounts,
        request_bytes_max: int,
        concurrent_calls_max: int,
        watchers_max: int = 0,
    ) -> None:
        self._clock_ms = clock_ms
        self._calls = calls
        self._request_bytes_max = request_bytes_max
        self._calls_max = concurrent_calls_max
        self._in_flight = 0
        self.answered_for_others = 0
        self._health = HealthServicer()
        self._unary: dict[str, tuple[type[Message], Unary]] = {}
        self._node: Node | None = None
        self._router: Router | None = None
        self._credentials: Credentials | None = None
        self._incarnation = b""
        self._rescue: Callable[[node_pb2.RescueRequest], Awaitable[node_pb2.RescueResponse]] | None = None
        self._watches: Watches | None = None
        # What of the calls is answered from the hot tier alone; None while nothing is.
        self.hot_path: HotPath | None = None
        self._batched = Batched(
            self._answering, self._internal, self._resume_hot, self, calls, clock_ms, request_bytes_max
        )
        self._watch: asyncio.Task[None] | None = None
        self._started = False
        # What a node that starts says it waits for.
        self.waits_for = ""
        self.shut_down = asyncio.Event()
        rpcs = rpcs_max(concurrent_calls_max, watchers_max)
        self._server = grpc.aio.server(options=server_options(rpcs, False), maximum_concurrent_rpcs=rpcs)
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
        if listen.startswith("unix:"):
            bind_unix(socket_path(listen), lambda: self._listen(listen))
            return 0
        port = self._listen(listen)
        if port == 0:
            raise in_use(listen, "gRPC says no more")
        return port

    def _listen(self, listen: str) -> int:
        try:
            return int(self._server.add_insecure_port(listen))
        except RuntimeError as error:
            raise in_use(listen, error) from error

    def serve(
        self,
        sessions: Sessions,
        node: Node,
        router: Router,
        credentials: Credentials,
        rescue: Callable[[node_pb2.RescueRequest], Awaitable[node_pb2.RescueResponse]],
        incarnation: bytes,
        watches: Watches,
    ) -> None:
        """Connect the calls that this release serves. rescue: takes turns that another node offers."""
        self._watches = watches
        self._node = node
        self._router = router
        self._credentials = credentials
        self._rescue = rescue
        self._incarnation = incarnation
        self._unary = {
            "CreateSession": _message(session_pb2.CreateSessionRequest, sessions.create),
            "GetSession": _message(session_pb2.GetSessionRequest, sessions.get),
            "ListSessions": _message(session_pb2.ListSessionsRequest, sessions.list_sessions),
            "UpdateSession": _message(session_pb2.UpdateSessionRequest, sessions.update),
            "DeleteSession": _message(session_pb2.DeleteSessionRequest, sessions.delete),
            "ListCheckpoints": _message(session_pb2.ListCheckpointsRequest, sessions.list_checkpoints),
            "ResumeSession": (session_pb2.ResumeSessionRequest, _resume(sessions)),
            "AppendTurn": (session_pb2.AppendTurnRequest, _append(sessions)),
            "ListOrphans": (session_pb2.ListOrphansRequest, _list_orphans(sessions)),
            "ListTurns": (session_pb2.ListTurnsRequest, _list_turns(sessions)),
            "GetStatus": (admin_pb2.GetStatusRequest, lambda _caller, _request: node.status()),
            "Flush": _message(admin_pb2.FlushRequest, node.flush),
            "Release": _message(admin_pb2.ReleaseRequest, node.release),
        }
        node.on_phase = self._schedule_health

    def also_serve(self, name: str, kind: type[Message], work: Any) -> None:
        """Connect one more unary call, after `serve`. work: takes (Call, request) and returns the response."""
        self._unary[name] = _message(kind, work)

    def _handler(self, service: str, name: str, streams: bool) -> Any:
        if streams:
            told = {WATCH: self._told, "ForwardWatch": self._told_forwarded}.get(name)
            stream = self._stream(name) if told is None else self._watching(name, told)
            return grpc.unary_stream_rpc_method_handler(stream)
        return grpc.unary_unary_rpc_method_handler(self._unary_call(name))

    def _unary_call(self, name: str) -> Any:
        """What answers a unary method: by the hot path first, where that may know it."""
        quick = {"ResumeSession": self._resume, "AppendTurn": self._append}.get(name)
        return self._call(name) if quick is None else quick()

    def _resume(self) -> Any:
        """Resumes that the hot path answers, and the others as any call."""
        general = self._call("ResumeSession")

        async def call(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            # Nothing is awaited, so that it counts among no calls that wait.
            if self._in_flight < self._calls_max:
                answer = self._resume_hot(raw, TENANT)
                if answer is not None:
                    self._calls.add("ResumeSession", "OK", "")
                    return answer
            return bytes(await general(raw, context))

        return call

    def _resume_hot(self, raw: bytes, tenant: str) -> bytes | None:
        """A resume's reply if the hot path has one."""
        return None if self.hot_path is None else self.hot_path.resume(raw, tenant)

    def _append(self) -> Any:
        """Appends that the hot path does, and the others as any call."""
        general = self._call("AppendTurn")

        async def call(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            hot_path = self.hot_path
            if hot_path is not None and self._in_flight < self._calls_max:
                self._in_flight += 1
                try:
                    answer = await hot_path.append(raw, TENANT)
                except asyncio.CancelledError:
                    self._calls.add("AppendTurn", "CANCELLED", "")
                    raise
                finally:
                    self._in_flight -= 1
                if answer is not None:
                    self._calls.add("AppendTurn", "OK", "")
                    return answer
            return bytes(await general(raw, context))

        return call

    def _call(self, name: str) -> Any:
        own = {"Forward": self._forward, "Rescue": self._take_rescued}.get(name)

        async def call(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            self._in_flight += 1
            try:
                if self._in_flight > self._calls_max:
                    if name == "WarmSession":
                        return b""  # a hint that nobody has time for; its reply says that nothing is hot
                    raise Exhausted("OVERLOADED", f"{self._calls_max} calls are being answered.")
                if own is not None:
                    return await own(raw, context)
                answer = await self._answer(name, self._caller(context), raw)
            except Refused as refused:
                # Said by the session's owner: passed on as it came.
                status = status_pb2.Status.FromString(refused.status)
                code = CODES[status.code]
                self._calls.add(name, code.name, refused.reason)
                await context.abort(code, status.message, trailing_metadata=((DETAILS_KEY, refused.status),))
                raise AssertionError from refused
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

    async def _answer(self, name: str, caller: Call, raw: bytes) -> bytes:
        """A unary call's reply, by whichever node. Raises SessiondError."""
        if name in ITEMS and self._node is not None:
            batch = self._batched.resume if name == RESUMES else self._batched.append
            return await batch(caller, raw)
        served = self._unary.get(name)
        if served is None:
            raise self._not_served(name)
        kind, work = served
        request = parse(kind, raw, self._request_bytes_max)
        if name in FORWARDED and self._router is not None:
            return await self._router.call(name, caller, request, raw, _replied(work))
        return reply(await work(caller, request))

    def _answering(self, name: str) -> Callable[[Call, bytes], Awaitable[bytes]]:
        """The way of one item of a batch: of an append by the hot path first, too."""
        return self._append_one if name == "AppendTurn" else partial(self._answer, name)

    async def _append_one(self, caller: Call, raw: bytes) -> bytes:
        answer = None if self.hot_path is None else await self.hot_path.append(raw, caller.tenant)
        return await self._answer("AppendTurn", caller, raw) if answer is None else answer

    def widen(self, wanted: int) -> int:
        """As batches.Places says."""
        taken = max(0, min(wanted, self._calls_max - self._in_flight))
        self._in_flight += taken
        return taken

    def narrow(self) -> None:
        """As batches.Places says."""
        self._in_flight -= 1

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

    def _watching(self, name: str, told: Any) -> Any:
        """A stream of events. Not a generator: what a caller that is gone leaves behind ends with its task."""

        async def call(raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            try:
                await told(raw, context)
            except SessiondError as error:
                self._count(name, error)
                await self._abort(context, error)
            except asyncio.CancelledError:
                self._calls.add(name, "CANCELLED", "")
                raise
            except Exception as error:
                refusal = self._internal(name, error)
                self._count(name, refusal)
                await self._abort(context, refusal)
            else:
                self._calls.add(name, "OK", "")

        return call

    async def _told(self, raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Tell a client what it watches for as long as it listens."""
        if self._watches is None:
            raise self._not_served(WATCH)
        request = parse(session_pb2.WatchSessionRequest, raw, self._request_bytes_max)
        watcher = await self._watches.open(self._caller(context), request)
        try:
            while (event := await watcher.next()) is not None:
                await context.write(event)
        finally:
            watcher.close()

    async def _told_forwarded(self, raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Tell another node, for as long as this one owns the session; then that it does not."""
        if self._credentials is None or self._watches is None:
            raise self._not_served("ForwardWatch")
        call = parse(node_pb2.ForwardWatchRequest, raw, self._request_bytes_max + FORWARD_BYTES).call
        metadata: Any = context.invocation_metadata()
        self._credentials.check(metadata, call.incarnation, call.tenant, call.method, call.request)
        if call.incarnation != self._incarnation:
            # As for other calls: the lease tells that this hot tier is gone, the manifest may name it for ever.
            raise Unavailable("NOT_OWNER", "The hot tier that this call is meant for is not here any more.")
        last = node_pb2.ForwardResponse(not_owner=True)
        if call.method == WATCH:
            try:
                request = parse(session_pb2.WatchSessionRequest, call.request, self._request_bytes_max)
                watcher = await self._watches.open(Call(call.tenant, None, forwarded=True), request)
                try:
                    while (event := await watcher.next()) is not None:
                        # What ForwardWatchResponse has around an event.
                        await context.write(embed(1, embed(1, event)))
                finally:
                    watcher.close()
                return
            except SessiondError as error:
                if error.reason != "NOT_OWNER":
                    last = node_pb2.ForwardResponse(status=status_proto(error).SerializeToString())
        await context.write(embed(1, last.SerializeToString()))

    async def _forward(self, raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """A call that another node forwarded: answered here, or refused, and never sent on."""
        if self._credentials is None:
            raise self._not_served("Forward")
        forwarded = parse(node_pb2.ForwardRequest, raw, self._request_bytes_max + FORWARD_BYTES)
        name = forwarded.method
        metadata: Any = context.invocation_metadata()
        node = self._credentials.check(metadata, forwarded.incarnation, forwarded.tenant, name, forwarded.request)
        if forwarded.incarnation != self._incarnation:
            # Not "ask again who the owner is": the bucket may name it for ever. Its lease tells that it is gone.
            raise Unavailable("NOT_OWNER", "The hot tier that this call is meant for is not here any more.")
        served = self._unary.get(name)
        if served is None or name not in FORWARDED:
            raise self._not_served(name)
        kind, work = served
        self.answered_for_others += 1
        try:
            request = parse(kind, forwarded.request, self._request_bytes_max)
            call = Call(forwarded.tenant, self._deadline_ms(context), forwarded=True)
            if self._router is not None and self._router.is_given(call, request, node):
                return node_pb2.ForwardResponse(not_owner=True).SerializeToString()
            answer = reply(await work(call, request))
            if self._router is not None:
                self._router.visited(name, call, request, node)
        except OwnedElsewhere:
            return node_pb2.ForwardResponse(not_owner=True).SerializeToString()
        except Refused as refused:
            return node_pb2.ForwardResponse(status=refused.status).SerializeToString()
        except SessiondError as error:
            return node_pb2.ForwardResponse(status=status_proto(error).SerializeToString()).SerializeToString()
        return node_pb2.ForwardResponse(reply=answer).SerializeToString()

    async def _take_rescued(self, raw: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Turns that another node offers."""
        if self._credentials is None or self._rescue is None:
            raise self._not_served("Rescue")
        request = parse(node_pb2.RescueRequest, raw, self._request_bytes_max)
        signed = request.SerializeToString(deterministic=True)
        metadata: Any = context.invocation_metadata()
        self._credentials.check(metadata, request.incarnation, "", "Rescue", signed)
        return bytes((await self._rescue(request)).SerializeToString())

    def _caller(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Call:
        redirects = False
        metadata: Any = context.invocation_metadata()
        for key, value in metadata or ():
            if key == REDIRECT_HEADER:
                redirects = value == "1"
        return Call(TENANT, self._deadline_ms(context), redirects=redirects)

    def _deadline_ms(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> int | None:
        remaining = context.time_remaining()
        # gRPC reports a very large number where there is no deadline.
        return None if remaining is None or remaining > 1e8 else self._clock_ms() + int(remaining * 1000)

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


def _replied(work: Unary) -> Callable[[Call, Any], Awaitable[bytes]]:
    async def call(caller: Call, request: Any) -> bytes:
        return reply(await work(caller, request))

    return call


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


def _list_orphans(sessions: Sessions) -> Unary:
    async def call(caller: Call, request: session_pb2.ListOrphansRequest) -> bytes:
        frames, rest = await sessions.list_orphans(caller, request)
        return frames + bytes(rest.SerializeToString())

    return call


def _list_turns(sessions: Sessions) -> Unary:
    async def call(caller: Call, request: session_pb2.ListTurnsRequest) -> bytes:
        frames, rest = await sessions.list_turns(caller, request)
        return frames + bytes(rest.SerializeToString())

    return call
