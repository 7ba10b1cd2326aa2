"""Calls that this process does not answer itself, passed on to another over one channel: bytes in, bytes out.

It promises that what goes through it is what came: request and reply bytes, metadata, the caller's deadline and its
giving up, status, details and trailing metadata, message by message for streams of either side. It parses nothing,
retries nothing and knows of a method only how many messages its caller sends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final

import grpc

CHANNEL_OPTIONS: Final = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
# Of a caller's time, what is kept for the way back.
HOP_S: Final = 0.02
# What gRPC makes anew on each connection.
_OWN_METADATA: Final = frozenset(("user-agent", "te", "content-type", "grpc-accept-encoding", "grpc-encoding"))
# gRPC reports a very large number where there is no deadline.
_NO_DEADLINE_S: Final = 1e8

# What `read` returns at the end of a stream.
_EOF: Final[Any] = grpc.aio.EOF  # type: ignore[attr-defined]

Context = grpc.aio.ServicerContext[bytes, bytes]
Metadata = Sequence[tuple[str, str | bytes]]


class Relay(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic in the stubs only
    """Handles every method that nobody else handles, by asking the process at the other end of a channel."""

    def __init__(
        self, channel: Any, unary: Sequence[str], both_ways: Sequence[str], relayed: Callable[[], None]
    ) -> None:
        """channel: of grpc.aio. unary: full names of methods with one message each way. both_ways: of those whose
        caller may send more than one; all others take one and may answer with any number. relayed: counts a call.
        """
        self._channel = channel
        self._relayed = relayed
        self._known = {name: grpc.unary_unary_rpc_method_handler(self.unary(name)) for name in unary}
        self._known |= {name: grpc.stream_stream_rpc_method_handler(self._both_ways(name)) for name in both_ways}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """GRPC asks who handles a method."""
        name = handler_call_details.method
        return self._known.get(name) or grpc.unary_stream_rpc_method_handler(self._stream(name))

    def unary(self, name: str) -> Any:
        """The handler of a method with one message each way."""
        ask = self._channel.unary_unary(name)

        async def call(raw: bytes, context: Context) -> bytes:
            self._relayed()
            asked = ask(raw, timeout=_left_s(context), metadata=_metadata(context), wait_for_ready=True)
            try:
                # Given up by the caller, this is cancelled, and the call that it waits for with it.
                answer: bytes = await asked
            except grpc.aio.AioRpcError as error:
                await _abort(context, error)
            _pass_trailing(context, await asked.trailing_metadata())
            return answer

        return call

    def _stream(self, name: str) -> Any:
        """The handler of a method that takes one message. It goes with the call: one that is written after the other
        end has refused the call would turn that refusal into an error of gRPC's own.
        """

        async def call(raw: bytes, context: Context) -> None:
            self._relayed()
            ask = self._channel.unary_stream(name)
            asked = ask(raw, timeout=_left_s(context), metadata=_metadata(context), wait_for_ready=True)
            await _pass_answers(asked, context)

        return call

    def _both_ways(self, name: str) -> Any:
        async def call(requests: AsyncIterator[bytes], context: Context) -> None:
            self._relayed()
            ask = self._channel.stream_stream(name)
            asked = ask(timeout=_left_s(context), metadata=_metadata(context), wait_for_ready=True)
            sending = asyncio.ensure_future(_send(requests, asked))
            try:
                await _pass_answers(asked, context)
            finally:
                sending.cancel()

        return call


async def _pass_answers(asked: Any, context: Context) -> None:
    """What comes back, as it comes, and how it ends. A caller that gives up ends the call that was made for it."""
    try:
        while (answer := await asked.read()) is not _EOF:
            await context.write(answer)
        code = await asked.code()
        if code is not grpc.StatusCode.OK:
            details, trailing = await asked.details(), await asked.trailing_metadata()
            await context.abort(code, details or "", _plain(trailing))
        _pass_trailing(context, await asked.trailing_metadata())
    except grpc.aio.AioRpcError as error:
        await _abort(context, error)
    finally:
        asked.cancel()


async def _send(requests: AsyncIterator[bytes], asked: Any) -> None:
    """What the caller sends, as it comes. A caller that is gone ends the call itself."""
    try:
        async for request in requests:
            await asked.write(request)
        await asked.done_writing()
    except (asyncio.InvalidStateError, grpc.RpcError):
        return  # the answer has ended the call; whoever reads it says how


def _left_s(context: Context) -> float | None:
    """What is left of the caller's time, less what an answer given at the last moment needs for its way back."""
    left_s = context.time_remaining()
    return None if left_s is None or left_s > _NO_DEADLINE_S else max(0.0, left_s - min(HOP_S, left_s / 10))


def _metadata(context: Context) -> Metadata:
    """What the caller sent along."""
    return _plain(context.invocation_metadata())


def _plain(metadata: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((key, value) for key, value in metadata or () if key not in _OWN_METADATA)


def _pass_trailing(context: Context, trailing: Any) -> None:
    if plain := _plain(trailing):
        context.set_trailing_metadata(plain)


async def _abort(context: Context, error: grpc.aio.AioRpcError) -> None:
    await context.abort(error.code(), error.details() or "", _plain(error.trailing_metadata()))
