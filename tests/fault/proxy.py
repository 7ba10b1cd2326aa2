"""A proxy in front of a real S3 server that fails on demand, before or after a request is applied.

What becomes of the nth request of a method for a key is a pure function of the seed, so that a schedule replays; every
decision is written down. It never changes a request that it lets through: Host and the signature are the client's own.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

from sessiond.testing import HOST, free_port

# A client that is kept waiting longer has left; nothing here waits for ever.
HOLD_S_MAX = 120.0
UPSTREAM_TIMEOUT_S = 60.0

CODES = {
    400: "IncompleteBody",
    403: "ExpiredToken",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}
STATUSES = tuple(str(status) for status in CODES)
# What else can become of an answer: it never comes, the connection is reset, closed, or ends within the answer.
SILENCE, RESET, SWALLOW, CUT = "silence", "reset", "swallow", "cut"
# The request's body ends half-way, as if the client had died; only before it is applied.
CUT_REQUEST = "cut-request"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request. what: a status, SILENCE, RESET, SWALLOW, CUT, CUT_REQUEST, or '' for nothing.

    when: BEFORE the store has the request, or AFTER it has applied it. delay_ms: before anything is done.
    """

    what: str = ""
    when: str = BEFORE
    delay_ms: int = 0

    def __str__(self) -> str:
        late = f"+{self.delay_ms}ms" if self.delay_ms else ""
        return f"{self.when}-{self.what}{late}" if self.what else f"pass{late}"


PASS = Fault()


@dataclass(frozen=True)
class Asked:
    """One request: its method, its key below the bucket's prefix without what differs from run to run, and which of
    its kind it is, from 0."""

    method: str
    key: str
    n: int


Rule = Callable[[Asked], Fault]


@dataclass(frozen=True)
class Schedule:
    """Faults by chance, which is the seed's: a share of the requests of these methods for keys that begin so.

    The lease is left alone unless asked for: a node that can't renew stops being sure of everything, which is another
    test.
    """

    seed: int
    share: float
    faults: tuple[Fault, ...]
    prefixes: tuple[str, ...] = ("m/", "s/", "u/", "o/")

    def __call__(self, asked: Asked) -> Fault:
        """What becomes of this request; nothing else goes into it."""
        if not asked.key.startswith(self.prefixes):
            return PASS
        drawn = blake2b(f"{self.seed} {asked.method} {asked.key} {asked.n}".encode(), digest_size=16).digest()
        if int.from_bytes(drawn[:8], "big") >= self.share * 2**64:
            return PASS
        return self.faults[int.from_bytes(drawn[8:], "big") % len(self.faults)]


def stable(key: str) -> str:
    """The key without times and content hashes, which no two runs share."""
    kind, _, rest = key.partition("/")
    if kind in ("s", "o"):
        return f"{kind}/{rest.rpartition('-')[0]}"
    if kind == "u":
        return f"{kind}/{rest.rpartition('/')[0]}/{rest.rpartition('-')[2]}"
    return key


class Proxy:
    """The proxy, on a port of its own until it is closed.

    rule: asked about every request; replace it at any time. Requests are numbered whatever becomes of them.
    """

    def __init__(self, upstream: str, bucket: str, prefix: str, rule: Rule = lambda _: PASS) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname is not None
        self._upstream = (parts.hostname, parts.port or 80)
        self._stem = f"/{bucket}/{prefix}/"
        self.rule = rule
        self.log: list[tuple[Asked, Fault]] = []
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._connections: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        # Rises with every down(): a connection of before is dead, even if its thread has not seen it yet.
        self._outages = 0
        # Cleared, whatever comes is lost.
        self._answering = threading.Event()
        self._answering.set()
        self._closed = threading.Event()
        self._listening = threading.Event()
        # Bound once and for all: while it is down the port stays ours, and refuses.
        self._port = free_port()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((HOST, self._port))
        self.endpoint = f"http://{HOST}:{self._port}"
        self._accepting = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)
        self.up()
        self._accepting.start()

    # What a test does with it -----------------------------------------------------------------------------------------

    def heal(self) -> None:
        """From now on every request passes."""
        self.rule = lambda _: PASS
        self.up()

    def up(self) -> None:
        """Accept connections and answer."""
        self._answering.set()
        if not self._listening.is_set():
            self._listener.listen(512)
            self._listening.set()

    def down(self) -> None:
        """Refuse connections, and reset those that there are."""
        if self._listening.is_set():
            self._listening.clear()
            self._listener.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._outages += 1
            for connection in self._connections:
                _reset(connection)

    def black_hole(self) -> None:
        """Accept connections, and lose every request that comes, for good: nothing is passed on or answered."""
        self._answering.clear()

    def decisions(self) -> dict[Asked, Fault]:
        """Every decision so far by request."""
        with self._lock:
            return dict(self.log)

    def close(self) -> None:
        """Stop; connections are reset."""
        self._closed.set()
        self.down()
        self._listening.set()
        self._answering.set()
        self._listener.close()
        self._accepting.join(HOLD_S_MAX)
        for thread in list(self._threads):
            thread.join(HOLD_S_MAX)

    # What it does -----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed.is_set():
            self._listening.wait()
            try:
                connection, _ = self._listener.accept()
            except OSError:
                continue
            with self._lock:
                self._connections.add(connection)
                # down() may have come in between, which this one must not survive.
                outages = self._outages if self._listening.is_set() else -1
            thread = threading.Thread(target=self._serve, args=(connection, outages), daemon=True)
            self._threads.add(thread)
            thread.start()

    def _serve(self, connection: socket.socket, outages: int) -> None:
        upstream = http.client.HTTPConnection(*self._upstream, timeout=UPSTREAM_TIMEOUT_S)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as stream:
                while self._one(connection, stream, upstream, outages):
                    pass
        except (OSError, http.client.HTTPException, _Ended):
            pass
        finally:
            upstream.close()
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            self._threads.discard(threading.current_thread())

    def _one(
        self, connection: socket.socket, stream: BinaryIO, upstream: http.client.HTTPConnection, outages: int
    ) -> bool:
        """One request and its answer; whether the connection goes on."""
        line = stream.readline()
        if not line.endswith(b"\r\n"):
            return False
        words = line.decode("ascii", "replace").split(" ")
        if len(words) != 3:
            return False  # no HTTP: a caller who looks for a server that had this port before
        method, target, _ = words
        headers: list[tuple[str, str]] = []
        while (field := stream.readline()) != b"\r\n":
            if not field.endswith(b"\r\n"):
                return False
            name, _, value = field.decode("latin-1").partition(":")
            headers.append((name, value.strip()))
        told = {name.lower(): value for name, value in headers}
        assert "transfer-encoding" not in told, "the SDK sends whole bodies"
        if told.get("expect", "").lower() == "100-continue":
            connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(told.get("content-length", 0))
        body = stream.read(length)
        if len(body) < length:
            return False
        if self._outages != outages:
            _reset(connection)
            return False
        fault = self._decide(method, target)
        # What is silent to everybody is silent to this one, whatever was planned for it.
        if not self._answering.is_set():
            self._hold(connection, self._closed, HOLD_S_MAX)
            return False
        if fault.delay_ms:
            self._hold(connection, self._closed, fault.delay_ms / 1000)
        if fault.what and fault.when == BEFORE:
            if fault.what == CUT_REQUEST:
                self._send_half(method, target, headers, body)
                _reset(connection)
                return False
            return self._fail(connection, fault, _refusal(500 if fault.what not in STATUSES else int(fault.what)))
        reply = _pass_on(upstream, method, target, headers, body)
        if self._outages != outages:
            _reset(connection)
            return False
        if fault.what:
            return self._fail(connection, fault, _refusal(int(fault.what)) if fault.what in STATUSES else reply)
        connection.sendall(reply)
        return True

    def _decide(self, method: str, target: str) -> Fault:
        path = unquote(target.partition("?")[0])
        key = stable(path.removeprefix(self._stem)) if path.startswith(self._stem) else "?"
        with self._lock:
            asked = Asked(method, key, self._counts[method, key])
            self._counts[method, key] += 1
            fault = self.rule(asked)
            self.log.append((asked, fault))
        return fault

    def _hold(self, connection: socket.socket, until: threading.Event, seconds: float) -> None:
        """Wait for the event, at most so long; raise _Ended if the client leaves meanwhile."""
        ends = time.monotonic() + seconds
        while not until.is_set() and time.monotonic() < ends:
            until.wait(0.02)
            connection.setblocking(False)
            try:
                if connection.recv(1, socket.MSG_PEEK) == b"":
                    raise _Ended
            except BlockingIOError:
                pass
            finally:
                connection.setblocking(True)

    def _fail(self, connection: socket.socket, fault: Fault, reply: bytes) -> bool:
        if fault.what in STATUSES:
            connection.sendall(reply)
            return True
        if fault.what == SILENCE:
            self._hold(connection, self._closed, HOLD_S_MAX)
        elif fault.what == RESET:
            _reset(connection)
        elif fault.what == CUT:
            # Within the body; of a reply without one within the etag, which is all that a put's says.
            etag, whole = reply.find(b'ETag: "'), reply.endswith(b"\r\n\r\n")
            connection.sendall(reply[: etag + 12] if whole and etag >= 0 else reply[: len(reply) * 3 // 4])
        return False

    def _send_half(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> None:
        head = "".join(f"{name}: {value}\r\n" for name, value in headers if name.lower() != "expect")
        with contextlib.suppress(OSError), socket.create_connection(self._upstream, UPSTREAM_TIMEOUT_S) as upstream:
            upstream.sendall(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body[: len(body) // 2])


class _Ended(Exception):
    """The client has closed its connection."""


def _reset(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # Wakes whoever reads from it; the close that follows there sends the RST.
        connection.shutdown(socket.SHUT_RD)


def _pass_on(
    upstream: http.client.HTTPConnection, method: str, target: str, headers: list[tuple[str, str]], body: bytes
) -> bytes:
    """The upstream's answer as bytes, its length told. One attempt: a second would make two requests of one."""
    upstream.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        if name.lower() not in ("expect", "connection"):
            upstream.putheader(name, value)
    upstream.endheaders(body or None)
    with upstream.getresponse() as answer:
        content = answer.read()
        kept = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("transfer-encoding", "connection", "content-length")
        ]
    length = answer.getheader("Content-Length") if method == "HEAD" else str(len(content))
    lines = [f"HTTP/1.1 {answer.status} {answer.reason}", *(f"{name}: {value}" for name, value in kept)]
    if answer.status != 204:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + content


def _refusal(status: int) -> bytes:
    code = CODES[status]
    content = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>By the proxy.</Message></Error>'
    ).encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


@contextlib.contextmanager
def running_proxy(upstream: str, bucket: str, prefix: str, rule: Rule = lambda _: PASS) -> Iterator[Proxy]:
    """A proxy, closed when the block ends."""
    proxy = Proxy(upstream, bucket, prefix, rule)
    try:
        yield proxy
    finally:
        proxy.close()
