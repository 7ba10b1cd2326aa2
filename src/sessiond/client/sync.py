"""The client for threads: one channel, safe to share; each call has a deadline and is repeated only where that is safe.

It never starts a thread of its own and never hides an error.
"""

from __future__ import annotations

import copy
import functools
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import grpc

from sessiond.client.batches import rounds
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
from sessiond.client.watching import Watch
from sessiond.errors import SessiondError
from sessiond.v1 import admin_pb2, admin_pb2_grpc, session_pb2_grpc, state_pb2_grpc, turn_pb2

P = ParamSpec("P")
Reply = TypeVar("Reply")
Item = TypeVar("Item")


def _unary(build: Callable[Concatenate[Calls, P], Call[Reply]]) -> Callable[Concatenate[Client, P], Reply]:
    @functools.wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Reply:
        return self.run(build(self.calls, *args, **kwargs))

    return method


def _listing(build: Callable[Concatenate[Calls, P], Listing[Item]]) -> Callable[Concatenate[Client, P], Pages[Item]]:
    @functools.wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Pages[Item]:
        return Pages(self, build(self.calls, *args, **kwargs))

    return method


def _many(
    build: Callable[Concatenate[Calls, P], Many[Reply]],
) -> Callable[Concatenate[Client, P], list[Reply | SessiondError]]:
    @functools.wraps(build)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> list[Reply | SessiondError]:
        return self.run_many(build(self.calls, *args, **kwargs))

    return method


class Pages(Generic[Item]):
    """An iterator over all pages of a list. page: the reply that the newest item came in."""

    def __init__(self, client: Client, listing: Listing[Item]) -> None:
        self.page: Any = None
        self._items = self._all(client, listing)

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def __next__(self) -> Item:
        return next(self._items)

    def _all(self, client: Client, listing: Listing[Item]) -> Iterator[Item]:
        token = ""
        while True:
            self.page = client.run(listing.page(token))
            yield from listing.items(self.page)
            listing.check(self.page)
            token = self.page.next_page_token
            if not token:
                return


class _Channels:
    """One channel per server or owner, opened by the first call that needs it. Thread-safe."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._lock = threading.Lock()
        self._closed = False
        self._channels: OrderedDict[ChannelKey, tuple[grpc.Channel, dict[str, Any]]] = OrderedDict()

    def stub(self, service: str, key: ChannelKey) -> Any:
        with self._lock:
            if self._closed:
                raise ValueError("The client is closed.")
            opened = self._channels.get(key)
            if opened is None:
                channel = grpc.insecure_channel(key.address, options=self._calls.channel_options(key))
                stubs = {
                    "SessionService": session_pb2_grpc.SessionServiceStub(channel),
                    "StateService": state_pb2_grpc.StateServiceStub(channel),
                    "AdminService": admin_pb2_grpc.AdminServiceStub(channel),
                }
                opened = self._channels[key] = channel, stubs
                if len(self._channels) > CHANNELS_MAX + len(self._calls.routes.servers):
                    # Not closed: a call may be on its way. It goes with its last stub.
                    self._channels.popitem(last=False)
            self._channels.move_to_end(key)
            return opened[1][service]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for channel, _ in self._channels.values():
                channel.close()
            self._channels.clear()


class Client:
    """A connection to a daemon, or to several that share a bucket.

    server: HOST:PORT, several as HOST:PORT,HOST:PORT, unix:PATH or another target of gRPC's; unsaid, SESSIOND_SERVER,
    else 127.0.0.1:7443. timeout_s: for a whole call, repeats included. retry_s: how long to go on repeating after the
    first failure, 0 for never; unsaid, until timeout_s. channel_options: gRPC channel arguments by name. resend: keep
    turns until the cloud tier has them; see `resend`. redirects: be told which node owns a session and call it
    directly, where nodes can be reached at what they advertise, instead of having calls forwarded.
    """

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
        self._watches: weakref.WeakSet[Watch] = weakref.WeakSet()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection back; calls under way are cancelled, and watches end."""
        for watch in list(self._watches):
            watch.close()
        self._channels.close()

    def within(self, timeout_s: float, retry_s: float | None = None) -> Client:
        """The same client and connection with other times for the calls made through it."""
        other = copy.copy(self)
        other.calls = copy.copy(self.calls)
        other.calls.timeout_s, other.calls.retry_s = timeout_s, retry_s
        return other

    def run(self, call: Call[Reply]) -> Reply:
        """Send a call and repeat it where that is safe, within the deadline. Raises SessiondError."""
        attempts = self.calls.attempts(call)
        route = attempts.route
        while True:
            method = getattr(self._channels.stub(call.service, self.calls.channel_key(route)), call.method)
            try:
                reply = method(call.request, timeout=attempts.attempt_s(), metadata=route.metadata)
            except grpc.RpcError as error:
                wait_s = attempts.wait_s(error)
            else:
                route.answered()
                return call.done(reply)
            if wait_s:
                time.sleep(wait_s)

    def run_many(self, many: Many[Reply]) -> list[Reply | SessiondError]:
        """Send calls together, and repeat those for which that is safe, within the deadline; what became of each."""
        steps = rounds(self.calls, many)
        replies: list[Any] = []
        try:
            step = next(steps)
            while True:
                if step.wait_s:
                    time.sleep(step.wait_s)
                replies = []
                sent = [
                    getattr(self._channels.stub("SessionService", sending.key), sending.method).future(
                        sending.request, timeout=sending.timeout_s, metadata=sending.metadata
                    )
                    for sending in step.sendings
                ]
                for future in sent:
                    try:
                        replies.append(future.result())
                    except grpc.RpcError as error:
                        replies.append(error)
                step = steps.send(replies)
        except StopIteration as end:
            outcomes: list[Reply | SessiondError] = end.value
            return outcomes

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

    def drain(self, grace_ms: int = 0, *, shut_down: bool = False) -> Iterator[admin_pb2.DrainResponse]:
        """Have the node stop taking work, flush and release everything: progress, the last with `done`. Iterate it.

        grace_ms: the most to spend; 0 for the daemon's own. Raises SessiondError.
        """
        request = admin_pb2.DrainRequest(grace_ms=grace_ms, shut_down=shut_down)
        timeout_s = (grace_ms / 1000 or DRAIN_S_MAX) + self.calls.timeout_s
        try:
            yield from self._channels.stub("AdminService", self.calls.node).Drain(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise failure_of(error, self.calls.server).error from error

    def reappend(
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
        found = self.list_orphans(session_id, user_id=user_id) if turns is None else turns
        steps = self.calls.reappend(session_id, found, turns is not None, durability, user_id)
        try:
            call = next(steps)
            while True:
                try:
                    done = self.run(call)
                except SessiondError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(done)
        except StopIteration as end:
            outcome: Reappended = end.value
            return outcome

    def watch(
        self, session_id: str, *, after: PositionLike | AppendResult | Context | None = None, user_id: str = ""
    ) -> Watch:
        """The session's events from now on, or after a turn: new turns, checkpoint versions, what the cloud tier has.

        after: the last turn that the caller holds (0 for none); with its chain, as replies give it, what follows surely
        follows it. It goes on by itself over lost connections, drains and changes of owner, for ever once it was
        answered; turns come once and in order. An event with `epoch_changed` takes back the turns from its first one
        on, or above its head if it has none; one with `deleted` is the last. Raises SessiondError where it is refused.
        """
        watch = Watch(self.calls.watch(session_id, after=after, user_id=user_id), self._channels.stub)
        self._watches.add(watch)
        return watch

    def resend(self, session_id: str, budget_tokens: int = 0, **resume: Any) -> Context:
        """Append again, under their own turn_ids, the turns that the cloud tier may lack, then resume.

        For a client made with resend=True, after a reply that says PARTIAL: turns that survived are recognised, lost
        ones are restored. resume: further arguments of `resume`.
        """
        appends, acked = self.calls.lost(session_id)
        for call in appends:
            self.run(call)
        return self.resume(session_id, budget_tokens, **{"highest_acked": acked if acked.seq else None, **resume})
