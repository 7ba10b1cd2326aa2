"""Thousands of watchers in a process of its own, cheap enough to leave the server its core: HTTP/2 by hand, one thread.

`python -m bench.watchers` reads one JSON object a line and answers each with one. The first opens the streams

    port, path, connections
    bodies             hex of WatchSession requests; stream k sends bodies[k % len]
    streams            how many, dealt out over the connections

and is answered once each has its first event: seconds. Every later one is {"turns", "idle_s"}: it counts events that
carry a turn with a stamp `at=<19 digits of CLOCK_MONOTONIC in ns>;` until there were so many turns, and answers p50_s,
p99_s, max_s from the stamp to the read of the event, turns, and cpu_s of this process. It promises that a stream that
ends, and a turn that comes too seldom, end it with an error.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from typing import Any

from bench.load import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GIVE_BACK_BYTES,
    GOAWAY,
    HEADERS,
    HOST,
    IDLE_S_MAX,
    PING,
    PREFACE,
    RECV_BYTES,
    RST_STREAM,
    SETTINGS,
    WINDOW_MAX,
    WINDOW_UPDATE,
    frame,
    headers,
)

STAMP = re.compile(rb"at=(\d{19});")


class Connection:
    """One connection and the streams on it."""

    def __init__(self, port: int, path: str) -> None:
        self.socket = socket.create_connection((HOST, port), timeout=IDLE_S_MAX)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.headers = headers(path, f"{HOST}:{port}")
        self.rest = b""
        self.received = 0
        self.streams = 0
        self.events: dict[int, int] = {}
        self.parts: dict[int, bytes] = {}
        self.socket.sendall(
            PREFACE
            + frame(SETTINGS, 0, 0, (4).to_bytes(2, "big") + WINDOW_MAX.to_bytes(4, "big"))
            + frame(WINDOW_UPDATE, 0, 0, (WINDOW_MAX - 65_535).to_bytes(4, "big"))
        )

    def open(self, message: bytes) -> None:
        """One more stream."""
        stream, self.streams = 2 * self.streams + 1, self.streams + 1
        self.events[stream] = 0
        body = b"\0" + len(message).to_bytes(4, "big") + message
        self.socket.sendall(frame(HEADERS, END_HEADERS, stream, self.headers) + frame(DATA, END_STREAM, stream, body))

    def receive(self) -> list[bytes]:
        """The events that came."""
        chunk = self.socket.recv(RECV_BYTES)
        if not chunk:
            raise RuntimeError("the server closed the connection")
        data = self.rest + chunk if self.rest else chunk
        at, end, out = 0, len(data), b""
        events: list[bytes] = []
        while end - at >= 9:
            size = int.from_bytes(data[at : at + 3], "big")
            if end - at < 9 + size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream = int.from_bytes(data[at + 5 : at + 9], "big")
            payload = data[at + 9 : at + 9 + size]
            if kind == DATA:
                self.received += size
                whole = self.parts.pop(stream, b"") + payload
                while len(whole) >= 5 and len(whole) >= (due := 5 + int.from_bytes(whole[1:5], "big")):
                    events.append(whole[5:due])
                    self.events[stream] += 1
                    whole = whole[due:]
                if whole:
                    self.parts[stream] = whole
            elif kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                raise RuntimeError(f"the server ended stream {stream}: frame {kind}, {payload!r}")
            elif kind == SETTINGS and not flags & ACK:
                out += frame(SETTINGS, ACK, 0, b"")
            elif kind == PING and not flags & ACK:
                out += frame(PING, ACK, 0, payload)
            at += 9 + size
        self.rest = data[at:]
        if self.received > GIVE_BACK_BYTES:
            out += frame(WINDOW_UPDATE, 0, 0, self.received.to_bytes(4, "big"))
            self.received = 0
        if out:
            self.socket.sendall(out)
        return events


class Watchers:
    """Every stream of a run."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.selector = selectors.DefaultSelector()
        self.connections = [Connection(order["port"], order["path"]) for _ in range(order["connections"])]
        for connection in self.connections:
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)
        bodies = [bytes.fromhex(body) for body in order["bodies"]]
        self.seconds = -time.perf_counter()
        opened = 0
        while opened < order["streams"]:
            # A burst as wide as the connections; what has come is read before the next.
            for connection in self.connections[: order["streams"] - opened]:
                connection.open(bodies[opened % len(bodies)])
                opened += 1
            for key, _ in self.selector.select(0):
                key.data.receive()
        while not all(all(connection.events.values()) for connection in self.connections):
            self._wait(IDLE_S_MAX)
        self.seconds += time.perf_counter()

    def _wait(self, timeout_s: float) -> list[bytes]:
        ready = self.selector.select(timeout_s)
        if not ready:
            raise RuntimeError(f"no event for {timeout_s} s")
        return [event for key, _ in ready for event in key.data.receive()]

    def listen(self, turns: int, idle_s: float) -> dict[str, float]:
        """Until so many stamped turns came."""
        seconds: list[float] = []
        cpu = time.process_time()
        while len(seconds) < turns:
            events = self._wait(idle_s)
            now = time.monotonic_ns()
            for event in events:
                seconds += [(now - int(stamp)) / 1e9 for stamp in STAMP.findall(event)]
        seconds.sort()
        return {
            "turns": len(seconds),
            "p50_s": seconds[(len(seconds) - 1) // 2],
            "p99_s": seconds[(len(seconds) * 99 - 1) // 100],
            "max_s": seconds[-1],
            "cpu_s": time.process_time() - cpu,
        }


def main() -> None:
    """Runs, one a line, until standard input ends."""
    watchers: Watchers | None = None
    for text in sys.stdin:
        order = json.loads(text)
        if watchers is None:
            watchers = Watchers(order)
            print(json.dumps({"seconds": watchers.seconds}), flush=True)
        else:
            print(json.dumps(watchers.listen(order["turns"], order["idle_s"])), flush=True)


if __name__ == "__main__":
    main()
