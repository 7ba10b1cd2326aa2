"""TCP links that a test cuts, holds up and deafens: between two nodes, and between a node and its store.

It promises that no connection from which bytes were lost ever carries another byte: it is reset when the link heals,
as a real one would be. It knows nothing of what it carries, so that it stands before gRPC and S3 alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from enum import Enum
from types import TracebackType
from typing import Any, TypeVar

from sessiond.testing import HOST, free_port

CHUNK_BYTES = 1 << 16
ANSWER_S_MAX = 10.0
Result = TypeVar("Result")


class State(Enum):
    """What a link does with what comes."""

    # Bytes pass.
    OPEN = "open"
    # Connections are refused, those that there are reset.
    CUT = "cut"
    # Connections are accepted and nothing passes, either way; all of it is lost.
    LOST = "lost"
    # What is sent arrives, what is answered is lost.
    DEAF = "deaf"
    # Nothing passes while it is held; all of it, late, once the link is open.
    HELD = "held"


class Network:
    """The thread that carries the links; close it last."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._thread.start()
        self.links: list[Link] = []

    def link(self, host: str, port: int) -> Link:
        """An open link to an address."""
        made = Link(self, host, port)
        self.run(made.open())
        self.links.append(made)
        return made

    def heal(self) -> None:
        """Every link is open and without delay."""
        for link in self.links:
            link.set(State.OPEN)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What the work returns, done on the links' own thread."""
        future: Future[Result] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(ANSWER_S_MAX)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for link in self.links:
            self.run(link.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S_MAX)
        self._loop.close()


class _Connection:
    """Both ends of one connection through a link."""

    def __init__(self, near: asyncio.StreamWriter) -> None:
        self.near = near
        self.far: asyncio.StreamWriter | None = None
        # Bytes of it were lost.
        self.torn = False

    def reset(self) -> None:
        for writer in (self.near, self.far):
            if writer is None:
                continue
            # Closing with a time of 0 to linger sends RST instead of FIN.
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Link:
    """One link to one address, at a port of its own that stays."""

    def __init__(self, network: Network, host: str, port: int) -> None:
        self._network = network
        self._upstream = (host, port)
        self._state = State.OPEN
        self._delay_s = 0.0
        self._port = free_port()
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._moved = asyncio.Event()
        self._kept: socket.socket | None = None
        # Bytes that reached the far end, and that came back.
        self.sent = self.answered = 0

    @property
    def address(self) -> str:
        """HOST:PORT of the near end."""
        return f"{HOST}:{self._port}"

    def lead_to(self, host: str, port: int) -> None:
        """Connections that come from now on go there."""
        self._upstream = (host, port)

    def set(self, state: State, delay_ms: int = 0) -> None:
        """From now on, for connections that there are and those that come. delay_ms: before each piece is passed on."""
        self._network.run(self._set(state, delay_ms / 1000))

    async def open(self) -> None:
        """Accept connections."""
        while self._server is None:
            try:
                self._server = await asyncio.start_server(self._accept, HOST, self._port, limit=CHUNK_BYTES)
            except OSError:
                self._port = free_port()  # somebody was faster

    async def close(self) -> None:
        """Reset what there is and stop."""
        await self._set(State.CUT, 0)
        if self._kept is not None:
            self._kept.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _set(self, state: State, delay_s: float) -> None:
        self._state, self._delay_s = state, delay_s
        for connection in list(self._connections):
            if state is State.CUT or (state is State.OPEN and connection.torn):
                connection.reset()
        if state is State.CUT and self._server is not None:
            # The port is not given back: nobody else may answer at it while the link is cut.
            self._server.close()
            self._server = None
            self._kept = _refusing(self._port)
        elif state is not State.CUT and self._kept is not None:
            self._kept.close()
            self._kept = None
            await self.open()
        self._moved.set()
        self._moved = asyncio.Event()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(writer)
        self._connections.add(connection)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while self._state in (State.LOST, State.HELD):
                connection.torn |= self._state is State.LOST
                await self._moved.wait()
            far_reader, connection.far = await asyncio.open_connection(*self._upstream, limit=CHUNK_BYTES)
            for end in (connection.near, connection.far):
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.gather(
                self._pump(connection, reader, connection.far, back=False),
                self._pump(connection, far_reader, connection.near, back=True),
            )
            for end in (connection.near, connection.far):
                end.close()
        except (OSError, asyncio.CancelledError):
            connection.reset()
        finally:
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool
    ) -> None:
        while piece := await reader.read(CHUNK_BYTES):
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            while self._state is State.HELD:
                await self._moved.wait()
            if connection.torn or self._state is State.LOST or (self._state is State.DEAF and back):
                connection.torn = True
                continue
            writer.write(piece)
            await writer.drain()
            if back:
                self.answered += len(piece)
            else:
                self.sent += len(piece)
        if connection.torn:
            raise ConnectionResetError
        writer.write_eof()


def _refusing(port: int) -> socket.socket:
    """A socket that holds a port and does not listen: whoever connects is refused."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((HOST, port))
    return held
