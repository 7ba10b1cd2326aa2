"""What the client's tests talk through and to: both clients behind one face, a server that answers by a script, several
nodes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from sessiond.client import AsyncClient
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import session_pb2

Line = Callable[[grpc.ServicerContext], bytes]


class OnLoop:
    """An AsyncClient behind the calls of a Client, so that one test holds for both."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self) -> OnLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()

    def within(self, *times: float) -> OnLoop:
        other = object.__new__(OnLoop)
        other._runner, other._client = self._runner, self._client.within(*times)
        return other

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            async def run() -> Any:
                answer = getattr(self._client, name)(*arguments, **options)
                return [item async for item in answer] if hasattr(answer, "__aiter__") else await answer

            return self._runner.run(run())

        return call


class Scripted:
    """A gRPC server that answers each call with the next line of a script, and remembers what it was asked.

    always: answers when the script is over.
    """

    def __init__(self, always: Line | None = None) -> None:
        self.script: list[Line] = []
        self.always = always
        self.requests: list[tuple[float, bytes, dict[str, Any]]] = []
        self._server = grpc.server(futures.ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self,))  # type: ignore[arg-type]
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()
        self.release = threading.Event()

    def service(self, _: object) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.requests.append((time.monotonic(), request, dict(context.invocation_metadata())))
        line = self.always if self.always and not self.script else self.script.pop(0)
        return line(context)

    def stop(self) -> None:
        self.release.set()
        self._server.stop(0).wait()


def refuse(code: grpc.StatusCode, reason: str = "", retry_after_ms: int = 0, **metadata: str) -> Line:
    """A refusal. metadata: of its ErrorInfo."""

    def line(context: grpc.ServicerContext) -> bytes:
        if reason:
            told = {"remedy": "Do it.", **metadata}
            details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="sessiond", metadata=told)]
            if retry_after_ms:
                delay = duration_pb2.Duration()
                delay.FromMilliseconds(retry_after_ms)
                details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            packed = [any_pb2.Any() for _ in details]
            for item, detail in zip(packed, details, strict=True):
                item.Pack(detail)
            status = status_pb2.Status(code=code.value[0], message="It is so. Do it.", details=packed)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, "It is so. Do it.")
        raise AssertionError

    return line


def accept(_: object) -> bytes:
    return session_pb2.AppendTurnResponse(outcome=session_pb2.APPEND_OUTCOME_APPENDED).SerializeToString()


@contextlib.contextmanager
def nodes(folder: Path, count: int, **settings: Any) -> Iterator[list[Daemon]]:
    """So many daemons on one bucket, which flush often."""
    chosen = {"map_size_bytes": 64 * 1024**2, "flush_interval_ms": 50, "lease_ms": 700, **settings}
    with contextlib.ExitStack() as opened:
        yield [
            opened.enter_context(
                running_daemon(folder / f"n{number}", (folder / "cloud").as_uri(), node_name=f"n{number}", **chosen)
            )
            for number in range(count)
        ]
