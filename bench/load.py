"""A load generator in a process of its own, cheap enough to leave the server its core: HTTP/2 by hand, one thread.

`python -m bench.load` reads one JSON object a line and answers each with one. It promises that every call it counts
came back with a message and a whole end of stream; anything else ends it with an error. It never parses what came back:
a grpcio client in Python takes as much CPU per call as the server, and on two cores would be what is measured. A run is

    port, path, calls
    bodies             hex of request messages; caller k sends bodies[k % len], so that each has a session of its own
    counter_at         for each body, where 12 digits stand that every call makes new (a turn_id), or -1
    first              the first such number
    connections        callers are dealt out over so many connections
    callers            calls that are under way at any time

and its answer: calls, seconds, p50_s, p99_s, max_s, bytes, cpu_s of this process. Optionally

    each               true: call k sends bodies[k % len], whoever makes it; with as many calls as bodies, each once
    for_s              ends after so many seconds instead of so many calls
    per_s              calls are begun at this rate, however many are under way; times are then since each was due

With `crowd` every body is sent once, all of them
as soon as the port takes a connection, and again after `retry_ms` where it was refused; times are then since the port
opened, and the answer also has refused, max_s and bytes.
"""

from __future__ import annotations

import json
import math
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

DIGITS = 12
HOST = "127.0.0.1"
IDLE_S_MAX = 60.0
RECV_BYTES = 1 << 20
WINDOW_MAX = (1 << 31) - 1
GIVE_BACK_BYTES = 64 * 1024**2
# What every peer must take: RFC 9113, sections 4.2 and 6.9.2.
FRAME_BYTES_MAX = 16_384
STREAM_BYTES_MAX = 65_535

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """RFC 9113, section 4.1."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def headers(path: str, authority: str) -> bytes:
    """Request headers as literals without indexing (RFC 7541, section 6.2.2), so that they're the same every time."""

    def text(value: str) -> bytes:
        raw = value.encode()
        assert len(raw) < 127
        return bytes((len(raw),)) + raw

    return (
        b"\x83\x86\x04"
        + text(path)
        + b"\x01"
        + text(authority)
        + b"\x0f\x10"
        + text("application/grpc")
        + b"\x00"
        + text("te")
        + text("trailers")
    )


class Connection:
    """One connection and the callers on it."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=IDLE_S_MAX)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.headers = headers(path, f"{HOST}:{port}")
        self.next_stream = 1
        self.window = 65_535
        self.received = self.total = 0
        self.rest = b""
        self.under_way: dict[int, list[Any]] = {}  # stream -> [caller, when it was sent, bytes that came]
        self.waiting: deque[tuple[int, bytes, float | None]] = deque()
        # Callers whose calls were refused; None where a refusal ends the run.
        self.refused: list[int] | None = None
        self.socket.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0, (4).to_bytes(2, "big") + WINDOW_MAX.to_bytes(4, "big"))
            + frame(WINDOW_UPDATE, 0, 0, (WINDOW_MAX - 65_535).to_bytes(4, "big"))
        )

    def ended_badly(self, stream: int, what: str) -> None:
        """A call was refused: that is counted, or ends the run."""
        if self.refused is None:
            raise RuntimeError(what)
        row = self.under_way.pop(stream, None)
        if row is not None:
            self.refused.append(row[0])

    def call(self, caller: int, message: bytes, since: float | None = None) -> bytes:
        """The frames of one call, or nothing while the server's window has no room for it. since: it was due then."""
        size = len(message) + 5
        if self.window < size:
            self.waiting.append((caller, message, since))
            return b""
        self.window -= size
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        self.under_way[stream] = [caller, time.perf_counter() if since is None else since, 0]
        body = b"\0" + len(message).to_bytes(4, "big") + message
        head = frame(HEADERS, END_HEADERS, stream, self.headers)
        if size <= FRAME_BYTES_MAX:
            return head + frame(DATA, END_STREAM, stream, body)
        # A stream's own window is not watched: no message is larger than what it begins with.
        assert size <= STREAM_BYTES_MAX, f"{size} bytes are more than a stream may send at first"
        starts = range(0, size, FRAME_BYTES_MAX)
        return head + b"".join(
            frame(DATA, END_STREAM if at == starts[-1] else 0, stream, body[at : at + FRAME_BYTES_MAX]) for at in starts
        )

    def receive(self) -> tuple[list[tuple[int, float]], bytes]:
        """(caller and seconds of each call that ended, bytes to send)."""
        chunk = self.socket.recv(RECV_BYTES)
        if not chunk:
            raise RuntimeError("the server closed the connection")
        data = self.rest + chunk if self.rest else chunk
        at, end = 0, len(data)
        ended: list[tuple[int, float]] = []
        out = b""
        while end - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if end - at < 9 + size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            if kind == DATA:
                self.under_way[stream][2] += size
                self.received += size
                self.total += size
            elif kind == HEADERS:
                if flags & END_STREAM:
                    came = self.under_way[stream][2]
                    if not came:  # an error has trailers only
                        self.ended_badly(stream, f"a call failed: {data[at + 9 : at + 9 + size]!r}")
                    else:
                        caller, sent, _ = self.under_way.pop(stream)
                        ended.append((caller, time.perf_counter() - sent))
            elif kind == SETTINGS and not flags & ACK:
                out += frame(SETTINGS, ACK, 0, b"")
            elif kind == PING and not flags & ACK:
                out += frame(PING, ACK, 0, data[at + 9 : at + 17])
            elif kind == WINDOW_UPDATE and stream == 0:
                self.window += int.from_bytes(data[at + 9 : at + 13], "big")
            elif kind == RST_STREAM and self.refused is not None:
                self.ended_badly(stream, "reset")
            elif kind in (RST_STREAM, GOAWAY):
                raise RuntimeError(f"the server ended stream {stream}: frame {kind}, {data[at + 9 : at + 9 + size]!r}")
            at += 9 + size
        self.rest = data[at:]
        if self.received > GIVE_BACK_BYTES:
            out += frame(WINDOW_UPDATE, 0, 0, self.received.to_bytes(4, "big"))
            self.received = 0
        while self.waiting and self.window >= len(self.waiting[0][1]) + 5:
            out += self.call(*self.waiting.popleft())
        return ended, out


class Generator:
    """Connections that stay from run to run, by port and path."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str, int], list[Connection]] = {}

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """One run."""
        where = (order["port"], order["path"], order["connections"])
        if where not in self.kept:
            self.kept[where] = [Connection(order["port"], order["path"]) for _ in range(order["connections"])]
        connections = self.kept[where]
        bodies = [bytes.fromhex(body) for body in order["bodies"]]
        counter_at, number, each = order["counter_at"], order["first"], order.get("each", False)
        begun = 0

        def message(caller: int) -> bytes:
            nonlocal begun, number
            which = (begun if each else caller) % len(bodies)
            body, at = bodies[which], counter_at[which]
            begun += 1
            if at < 0:
                return body
            number += 1
            return body[:at] + b"%012d" % number + body[at + DIGITS :]

        came = sum(connection.total for connection in connections)
        cpu, started = time.process_time(), time.perf_counter()
        with selectors.DefaultSelector() as selector:
            for connection in connections:
                selector.register(connection.socket, selectors.EVENT_READ, connection)
            work = self._paced if "per_s" in order else self._closed
            seconds = work(order, connections, selector, message)
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
        seconds.sort()
        done = len(seconds)
        return {
            "calls": done,
            "seconds": took,
            "p50_s": seconds[(done - 1) // 2],
            "p99_s": seconds[(done * 99 - 1) // 100],
            "max_s": seconds[-1],
            "bytes": sum(connection.total for connection in connections) - came,
            "cpu_s": cpu,
        }

    def _closed(
        self,
        order: dict[str, Any],
        connections: list[Connection],
        selector: selectors.BaseSelector,
        message: Callable[[int], bytes],
    ) -> list[float]:
        """Seconds of each call, where a caller begins its next call when the last one has ended."""
        total = order.get("calls", sys.maxsize)
        until = time.perf_counter() + order.get("for_s", math.inf)
        begun = min(order["callers"], total)
        seconds: list[float] = []
        for caller in range(begun):
            connection = connections[caller % len(connections)]
            connection.socket.sendall(connection.call(caller, message(caller)))
        while len(seconds) < begun:
            ready = selector.select(IDLE_S_MAX)
            if not ready:
                raise RuntimeError(f"no answer for {IDLE_S_MAX} s")
            for key, _ in ready:
                ended, out = key.data.receive()
                pieces = [out] if out else []
                for caller, took in ended:
                    seconds.append(took)
                    if begun < total and (until == math.inf or time.perf_counter() < until):
                        begun += 1
                        pieces.append(key.data.call(caller, message(caller)))
                if pieces:
                    key.data.socket.sendall(b"".join(pieces))
        return seconds

    def _paced(
        self,
        order: dict[str, Any],
        connections: list[Connection],
        selector: selectors.BaseSelector,
        message: Callable[[int], bytes],
    ) -> list[float]:
        """Seconds since each call was due, where calls are due at a rate, whatever becomes of those before."""
        per_s = order["per_s"]
        total = order["calls"] if "calls" in order else math.ceil(order["for_s"] * per_s)
        started = heard = time.perf_counter()
        begun = 0
        seconds: list[float] = []
        while len(seconds) < total:
            now = time.perf_counter()
            while begun < total and started + begun / per_s <= now:
                connection = connections[begun % len(connections)]
                connection.socket.sendall(connection.call(begun, message(begun), started + begun / per_s))
                begun += 1
            due = started + begun / per_s if begun < total else now + IDLE_S_MAX
            ready = selector.select(max(0.0, due - now))
            if ready:
                heard = now
            elif len(seconds) < begun and now - heard > IDLE_S_MAX:
                raise RuntimeError(f"no answer for {IDLE_S_MAX} s")
            for key, _ in ready:
                ended, out = key.data.receive()
                seconds += [took for _, took in ended]
                if out:
                    key.data.socket.sendall(out)
        return seconds

    def crowd(self, order: dict[str, Any]) -> dict[str, float]:
        """Everybody at once: one call of each body as soon as the port is open, and again where it is refused."""
        bodies = [bytes.fromhex(body) for body in order["bodies"]]
        retry_s = order["retry_ms"] / 1000
        waits_until = time.perf_counter() + IDLE_S_MAX
        while True:
            try:
                first = Connection(order["port"], order["path"])
                break
            except ConnectionRefusedError:
                if time.perf_counter() > waits_until:
                    raise
                time.sleep(0.001)
        opened, cpu = time.perf_counter(), time.process_time()
        connections = [first]
        connections += [Connection(order["port"], order["path"]) for _ in range(order["connections"] - 1)]
        after: list[float] = []
        again: deque[tuple[float, int]] = deque()
        refused = came = 0
        with selectors.DefaultSelector() as selector:
            for number, connection in enumerate(connections):
                connection.refused = []
                selector.register(connection.socket, selectors.EVENT_READ, connection)
                callers = range(number, len(bodies), len(connections))
                connection.socket.sendall(b"".join(connection.call(caller, bodies[caller]) for caller in callers))
            heard = time.perf_counter()
            while len(after) < len(bodies):
                now = time.perf_counter()
                while again and again[0][0] <= now:
                    caller = again.popleft()[1]
                    connection = connections[caller % len(connections)]
                    connection.socket.sendall(connection.call(caller, bodies[caller]))
                ready = selector.select(max(0.0, again[0][0] - now) if again else 1.0)
                if not ready and now - heard > IDLE_S_MAX:
                    raise RuntimeError(f"no answer for {IDLE_S_MAX} s; {len(after)} of {len(bodies)} came")
                for key, _ in ready:
                    connection, heard = key.data, time.perf_counter()
                    ended, out = connection.receive()
                    after += [heard - opened] * len(ended)
                    for caller in connection.refused:
                        refused += 1
                        again.append((heard + retry_s, caller))
                    connection.refused = []
                    if out:
                        connection.socket.sendall(out)
            cpu = time.process_time() - cpu
        for connection in connections:
            came += connection.total
            connection.socket.close()
        after.sort()
        return {
            "calls": len(after),
            "seconds": after[-1],
            "p50_s": after[(len(after) - 1) // 2],
            "p99_s": after[(len(after) * 99 - 1) // 100],
            "max_s": after[-1],
            "cpu_s": cpu,
            "refused": refused,
            "bytes": came,
        }

    def close(self) -> None:
        """Close every connection."""
        for connections in self.kept.values():
            for connection in connections:
                connection.socket.close()


def main() -> None:
    """Runs, one a line, until standard input ends."""
    generator = Generator()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(generator.crowd(order) if "crowd" in order else generator.run(order)), flush=True)
    finally:
        generator.close()


if __name__ == "__main__":
    main()
