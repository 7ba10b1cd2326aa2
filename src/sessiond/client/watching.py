"""Watches that go on by themselves: after a lost connection, a node that drains, and a session that changes hands.

They promise every turn once and in order, whatever happens to the stream in between, and an end only where there is
one: the session was deleted, the watch was closed, or it is refused for good. They start no thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, cast

import grpc

from sessiond.client.failures import BACKOFF_FIRST_S, BACKOFF_MAX_S, DETAILS_KEY, Attempts, failure_of
from sessiond.v1 import session_pb2, turn_pb2

if TYPE_CHECKING:
    from sessiond.client.calls import Call, Calls

# A stream that ends so, and not by a daemon's own word, was cut on its way; to read again is harmless.
CUT: Final = frozenset(
    (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.ABORTED)
)

EOF: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]
# The stub of a service over a channel, opened if need be.
Stub = Callable[[str, Any], Any]


class Following:
    """What a watch knows of its session: its place in the log, what it told last, and what an end of its stream means.

    It opens nothing and waits for nothing.
    """

    def __init__(self, calls: Calls, call: Call[Any]) -> None:
        self._calls = calls
        self._call = call
        self._attempts: Attempts | None = None
        self._told: tuple[Any, ...] | None = None
        self._backoff_s = BACKOFF_FIRST_S
        self._request = cast(session_pb2.WatchSessionRequest, call.request)
        after = self._request.after if self._request.HasField("after") else None
        self.position: turn_pb2.TurnPosition | None = after
        self.ended = False

    def open(self, stub: Stub) -> Any:
        """A stream from here on."""
        if self._attempts is None:
            self._attempts = self._calls.attempts(self._call, endless=self._told is not None)
        route = self._attempts.route
        request = session_pb2.WatchSessionRequest()
        request.CopyFrom(self._request)
        if self.position is not None:
            request.after.CopyFrom(self.position)
        method = stub(self._call.service, self._calls.channel_key(route)).WatchSession
        return method(request, metadata=route.metadata)

    def take(self, event: session_pb2.WatchSessionResponse) -> session_pb2.WatchSessionResponse | None:
        """What to tell of an event; None if all of it was told before."""
        if self._attempts is not None:
            self._attempts.route.answered()
            self._attempts = None
        self._backoff_s = BACKOFF_FIRST_S
        if event.deleted:
            self.ended = True
            return event
        if not event.epoch_changed and self.position is not None and event.turns:
            known_seq = self.position.seq
            if event.turns[0].seq <= known_seq:
                fresh = [turn for turn in event.turns if turn.seq > known_seq]
                del event.turns[:]
                event.turns.extend(fresh)
        if event.turns:
            last = event.turns[-1]
            self.position = turn_pb2.TurnPosition(epoch=last.epoch, seq=last.seq, chain=last.chain)
        elif self.position is None or event.epoch_changed:
            self.position = event.head
        missing = [item.SerializeToString() for item in event.missing]
        marks = event.head.seq, event.head.chain, event.checkpoint_version, event.cloud_seq, missing
        if not event.turns and not event.epoch_changed and marks == self._told:
            return None
        self._told = marks
        return event

    def wait_s(self, error: grpc.RpcError) -> float | None:
        """How long to wait before the stream is opened again; None where the session was deleted meanwhile.

        Raises SessiondError where it is not.
        """
        found = failure_of(error, self._calls.server)
        if self._told is not None and found.error.reason == "SESSION_DELETED":
            self.ended = True
            return None
        if self._attempts is None:
            self._attempts = self._calls.attempts(self._call, endless=True)
        trailers: Any = error.trailing_metadata()
        said = any(key == DETAILS_KEY for key, _ in trailers or ())
        if self._told is not None and error.code() in CUT and not said:
            return self.cut_s()
        return self._attempts.wait_s(error)

    def cut_s(self) -> float:
        """How long to wait after a stream that was cut on its way."""
        wait_s = self._backoff_s * random.uniform(0.5, 1.0)
        self._backoff_s = min(2 * self._backoff_s, BACKOFF_MAX_S)
        return wait_s


_DELETED: Final = session_pb2.WatchSessionResponse(deleted=True)


class Watch(Iterator[session_pb2.WatchSessionResponse]):
    """Events of a session, for ever: iterate it in one thread, `close` it from any. Made by `Client.watch`."""

    def __init__(self, following: Following, stub: Stub) -> None:
        self._following = following
        self._stub = stub
        self._stream: Any = None
        self._closed = threading.Event()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> turn_pb2.TurnPosition | None:
        """The turn that was told last, to go on after in another process; None before the first event."""
        return self._following.position

    def close(self) -> None:
        """End it; whoever waits for the next event gets none."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()

    def __next__(self) -> session_pb2.WatchSessionResponse:
        following = self._following
        while not self._closed.is_set() and not following.ended:
            if self._stream is None:
                self._stream = following.open(self._stub)
                continue  # it may have been closed meanwhile
            try:
                event = next(self._stream, None)
            except grpc.RpcError as error:
                self._stream = None
                if self._closed.is_set():
                    break
                wait_s = following.wait_s(error)
                if wait_s is None:
                    return _DELETED
                self._closed.wait(wait_s)
                continue
            if event is None:
                self._stream = None
            elif (told := following.take(event)) is not None:
                return told
        if self._stream is not None:
            self._stream.cancel()
        raise StopIteration


class AsyncWatch(AsyncIterator[session_pb2.WatchSessionResponse]):
    """The same for asyncio: iterate it with `async for`. Made by `AsyncClient.watch`."""

    def __init__(self, following: Following, stub: Stub) -> None:
        self._following = following
        self._stub = stub
        self._stream: Any = None
        self._closed = asyncio.Event()

    async def __aenter__(self) -> AsyncWatch:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    @property
    def position(self) -> turn_pb2.TurnPosition | None:
        """As `Watch.position`."""
        return self._following.position

    def close(self) -> None:
        """End it; whoever waits for the next event gets none."""
        self._closed.set()
        if self._stream is not None:
            self._stream.cancel()

    async def __anext__(self) -> session_pb2.WatchSessionResponse:
        following = self._following
        while not self._closed.is_set() and not following.ended:
            if self._stream is None:
                self._stream = following.open(self._stub)
            try:
                event = await self._stream.read()
            except asyncio.CancelledError:
                # Of the task that iterates, or of the stream alone: gRPC tells the two in the same way.
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    self._stream.cancel()
                    raise
                self._stream = None
                await self._pause(following.cut_s())
                continue
            except grpc.RpcError as error:
                self._stream = None
                if self._closed.is_set():
                    break
                wait_s = following.wait_s(error)
                if wait_s is None:
                    return _DELETED
                await self._pause(wait_s)
                continue
            if event is EOF:
                self._stream = None
            elif (told := following.take(event)) is not None:
                return told
        raise StopAsyncIteration

    async def _pause(self, wait_s: float) -> None:
        if wait_s:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), wait_s)
