"""The client for asyncio: the calls of the other one, awaited. One channel per event loop, opened by the first call.

It never blocks the loop and never hides an error.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import grpc

from sessiond.client.batches import Sending, rounds
from sessiond.client.calls import (
    DRAIN_S_MAX,
    TIMEOUT_S,
    AppendResult,
    Call,
    Calls,
    ChannelKey,
    Listing,
    Many,
    PositionLike,
    Reappended,
)
from sessiond.client.context import Context
from sessiond.client.failures import failure_of
from sessiond.client.routes import CHANNELS_MAX
from sessiond.client.watching import AsyncWatch
from sessiond.errors import SessiondError
from sessiond.v1 import admin_pb2, admin_pb2_grpc, session_pb2_grpc, state_pb2_grpc, turn_pb2

P = ParamSpec("P")
Reply = TypeVar("Reply")
Item = TypeVar("Item")


def _unary(
    build: Callable[Concatenate[Calls, P], Call[Reply]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, Reply]]:
    @functools.wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return await self.run(build(self.calls, *args, **kwargs))

    return method


def _listing(
    build: Callable[Concatenate[Calls, P], Listing[Item]],
) -> Callable[Concatenate[AsyncClient, P], AsyncPages[Item]]:
    @functools.wraps(build)
    def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncPages[Item]:
        return AsyncPages(self, build(self.calls, *args, **kwargs))

    return method


def _many(
    build: Callable[Concatenate[Calls, P], Many[Reply]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, list[Reply | SessiondError]]]:
    @functools.wraps(build)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> list[Reply | SessiondError]:
        return await self.run_many(build(self.calls, *args, **kwargs))

    return method


class AsyncPages(Generic[Item]):
    """An asynchronous iterator over all pages of a list. page: the reply that the newest item came in."""

    def __init__(self, client: AsyncClient, listing: Listing[Item]) -> None:
        self.page: Any = None
        self._items = self._all(client, listing)

    def __aiter__(self) -> AsyncIterator[Item]:
        return self._items

    def __anext__(self) -> Awaitable[Item]:
        return self._items.__anext__()

    async def _all(self, client: AsyncClient, listing: Listing[Item]) -> AsyncIterator[Item]:
        token = ""
        while True:
            self.page = await client.run(listing.page(token))
            for item in listing.items(self.page):
                yield item
            listing.check(self.page)
            token = self.page.next_page_token
            if not token:
                return


class _Channels:
    """One channel per server or owner, opened on the running loop by the first call that needs it."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._channels: OrderedDict[ChannelKey, tuple[grpc.aio.Channel, dict[str, Any]]] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def stub(self, service: str, key: ChannelKey) -> Any:
        opened = self._channels.get(key)
        if opened is None:
            channel = grpc.aio.insecure_channel(key.address, options=self._calls.channel_options(key))
            stubs = {
                "SessionService": session_pb2_grpc.SessionServiceStub(channel),
                "StateService": state_pb2_grpc.StateServiceStub(channel),
                "AdminService": admin_pb2_grpc.AdminServiceStub(channel),
            }
            opened = self._channels[key] = channel, stubs
            if len(self._channels) > CHANNELS_MAX + len(self._calls.routes.servers):
                _, (oldest, _) = self._channels.popitem(last=False)
                # Calls on their way end first.
                task = asyncio.ensure_future(oldest.close(self._calls.timeout_s))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)
        self._channels.move_to_end(key)
        return opened[1][service]

    async def close(self) -> None:
        opened, self._channels = self._channels, OrderedDict()
        for task in self._closing:
            task.cancel()
        for channel, _ in opened.values():
            await channel.close(None)


class AsyncClient:
    """As `Client`, for asyncio: the same calls and arguments, awaited; lists are iterated with `async for`."""

    def __init__(
        self,
        server: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        retry_s: float | None = None,
        channel_options: Mapping[str, Any] | None = None,
        resend: bool = False,
        redirects: bool = False,
    ) -> None:
        self.calls = Calls(server, timeout_s, retry_s, channel_options, resend, redirects)
        self._channels = _Channels(self.calls)
        self._watches: weakref.WeakSet[AsyncWatch] = weakref.WeakSet()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection back; calls under way are cancelled, and watches end."""
        for watch in list(self._watches):
            watch.close()
        await self._channels.close()

    def within(self, timeout_s: float, retry_s: float | None = None) -> AsyncClient:
        """The same client and connection with other times for the calls made through it."""
        other = copy.copy(self)
        other.calls = copy.copy(self.calls)
        other.calls.timeout_s, other.calls.retry_s = timeout_s, retry_s
        return other

    async def run(self, call: Call[Reply]) -> Reply:
        """Send a call and repeat it where that is safe, within the deadline. Raises SessiondError."""
        attempts = self.calls.attempts(call)
        route = attempts.route
        while True:
            method = getattr(self._channels.stub(call.service, self.calls.channel_key(route)), call.method)
            try:
                reply = await method(call.request, timeout=attempts.attempt_s(), metadata=route.metadata)
            except grpc.RpcError as error:
                wait_s = attempts.wait_s(error)
            else:
                route.answered()
                return call.done(reply)
            if wait_s:
                await asyncio.sleep(wait_s)

    async def run_many(self, many: Many[Reply]) -> list[Reply | SessiondError]:
        """Send calls together, and repeat those for which that is safe, within the deadline; what became of each."""
        steps = rounds(self.calls, many)
        try:
            step = next(steps)
            while True:
                if step.wait_s:
                    await asyncio.sleep(step.wait_s)
                step = steps.send(await asyncio.gather(*map(self._sent, step.sendings)))
        except StopIteration as end:
            outcomes: list[Reply | SessiondError] = end.value
            return outcomes

    async def _sent(self, sending: Sending[Any]) -> Any:
        method = getattr(self._channels.stub("SessionService", sending.key), sending.method)
        try:
            return await method(sending.request, timeout=sending.timeout_s, metadata=sending.metadata)
        except grpc.RpcError as error:
            return error

    create_session = _unary(Calls.create_session)
    get_session = _unary(Calls.get_session)
    list_sessions = _listing(Calls.list_sessions)
    list_sessions_page = _unary(Calls.list_sessions_page)
    update_session = _unary(Calls.update_session)
    delete_session = _unary(Calls.delete_session)
    fork_session = _unary(Calls.fork_session)
    warm_session = _unary(Calls.warm_session)
    resume = _unary(Calls.resume)
    append = _unary(Calls.append)
    resume_many = _many(Calls.resume_many)
    append_many = _many(Calls.append_many)
    list_turns = _listing(Calls.list_turns)
    list_turns_page = _unary(Calls.list_turns_page)
    list_checkpoints = _unary(Calls.list_checkpoints)
    list_orphans = _listing(Calls.list_orphans)
    get_state = _unary(Calls.get_state)
    put_state = _unary(Calls.put_state)
    delete_state = _unary(Calls.delete_state)
    list_states = _listing(Calls.list_states)
    list_states_page = _unary(Calls.list_states_page)
    get_status = _unary(Calls.get_status)
    flush = _unary(Calls.flush)
    release = _unary(Calls.release)

    async def drain(self, grace_ms: int = 0, *, shut_down: bool = False) -> AsyncIterator[admin_pb2.DrainResponse]:
        """Have the node stop taking work, flush and release everything: progress, the last with `done`. Iterate it.

        grace_ms: the most to spend; 0 for the daemon's own. Raises SessiondError.
        """
        request = admin_pb2.DrainRequest(grace_ms=grace_ms, shut_down=shut_down)
        timeout_s = (grace_ms / 1000 or DRAIN_S_MAX) + self.calls.timeout_s
        try:
            async for progress in self._channels.stub("AdminService", self.calls.node).Drain(
                request, timeout=timeout_s
            ):
                yield progress
        except grpc.RpcError as error:
            raise failure_of(error, self.calls.server).error from error

    async def reappend(
        self,
        session_id: str,
        turns: Iterable[turn_pb2.Turn] | None = None,
        *,
        durability: str | int = "",
        user_id: str = "",
    ) -> Reappended:
        """Append turns of list_orphans again, at the end of the log, under their own turn_ids.

        Unsaid, all that are messages of user, assistant or tool, or milestones. System messages, state changes,
        summaries and rewinds act on the rest of the session as it was then: give those of them that you want as turns.
        Raises SessiondError; then call it again.
        """
        found = [turn async for turn in self.list_orphans(session_id, user_id=user_id)] if turns is None else turns
        steps = self.calls.reappend(session_id, found, turns is not None, durability, user_id)
        try:
            call = next(steps)
            while True:
                try:
                    done = await self.run(call)
                except SessiondError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(done)
        except StopIteration as end:
            outcome: Reappended = end.value
            return outcome

    def watch(
        self, session_id: str, *, after: PositionLike | AppendResult | Context | None = None, user_id: str = ""
    ) -> AsyncWatch:
        """As `Client.watch`, to be iterated with `async for`."""
        watch = AsyncWatch(self.calls.watch(session_id, after=after, user_id=user_id), self._channels.stub)
        self._watches.add(watch)
        return watch

    async def resend(self, session_id: str, budget_tokens: int = 0, **resume: Any) -> Context:
        """Append again, under their own turn_ids, the turns that the cloud tier may lack, then resume.

        For a client made with resend=True, after a reply that says PARTIAL: turns that survived are recognised, lost
        ones are restored. resume: further arguments of `resume`.
        """
        appends, acked = self.calls.lost(session_id)
        for call in appends:
            await self.run(call)
        return await self.resume(session_id, budget_tokens, **{"highest_acked": acked if acked.seq else None, **resume})
