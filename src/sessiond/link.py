"""What the processes of a node say to each other besides calls: whole messages over a pair of sockets.

It promises that a message arrives whole or not at all, that saying something never waits for the other process, and
that the end of either process is heard by the other at once. What can't be said is the caller's to say again.
"""

from __future__ import annotations

import socket
from typing import Any, Final

import msgpack

# Below what the kernel takes as one message by default.
MESSAGE_BYTES_MAX: Final = 128 * 1024
# The keeper's own socket, in a folder that only its user can open.
SOCKET_NAME: Final = "keeper.sock"

# From the keeper: what to listen on and whom to ask; the hot tier, once it may be opened; end, after this many ms.
LISTEN: Final = "listen"
OPEN: Final = "open"
STOP: Final = "stop"
# From a worker: it can be told what to listen on; it listens, or why not; these sessions changed (all of them, if it
# lost count); these were used, and what was counted; the hot tier failed.
READY: Final = "ready"
LISTENING: Final = "listening"
CHANGED: Final = "changed"
TOLD: Final = "told"
FAILED: Final = "failed"


class Link:
    """One end. Any thread may send; one receives."""

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self.socket = end

    @classmethod
    def pair(cls) -> tuple[Link, socket.socket]:
        """(one end for here, the other for another process)."""
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(mine), theirs

    def send(self, kind: str, **content: Any) -> bool:
        """Say something now; False if the other end does not keep up, or is gone."""
        raw = msgpack.packb([kind, content])
        assert len(raw) <= MESSAGE_BYTES_MAX
        try:
            self.socket.send(raw)
        except OSError:
            return False
        return True

    def receive(self) -> tuple[str, dict[str, Any]] | None:
        """The next message; None if there is none yet. Raises EOFError once the other end is gone."""
        try:
            raw = self.socket.recv(MESSAGE_BYTES_MAX)
        except BlockingIOError:
            return None
        except OSError as error:
            raise EOFError from error
        if not raw:
            raise EOFError
        kind, content = msgpack.unpackb(raw)
        return kind, content

    def close(self) -> None:
        """Let go of it; the other end hears of it."""
        self.socket.close()
