"""Addresses to listen on: Unix sockets without taking one from somebody, and a TCP port that several processes share.

It promises that a socket file is replaced only if nobody answers there, and that a port which another daemon holds is
refused. It accepts no connection.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sessiond.errors import Unavailable

# Names of this kind live as long as the process that has them, one table for each network namespace, as ports do.
_CLAIM: Final = "\0sessiond/listen/"
# So long what listens on a port is given to end.
ENDING_S: Final = 1.0


def socket_path(listen: str) -> Path:
    """The file of an address `unix:/path`, `unix:path` or `unix:///path`."""
    path = listen.removeprefix("unix:")
    return Path(path.removeprefix("//") if path.startswith("///") else path)


def in_use(listen: str, error: object) -> Unavailable:
    """The refusal of an address that can't be listened on."""
    what = f"The address {listen} can't be listened on: {error}."
    described = [("listen", "in use, or not an address of this machine")]
    return Unavailable("PORT_IN_USE", what, {"listen": listen}, described)


def bind_unix(path: Path, bind: Callable[[], object]) -> None:
    """Call `bind`, which listens at this path and would unlink whatever stands there, only if nobody answers there.

    Raises Unavailable PORT_IN_USE.
    """
    listen = f"unix:{path}"
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise in_use(listen, error.strerror) from error
    try:
        # Whoever comes at the same moment waits until we listen, and then hears an answer.
        fcntl.flock(folder, fcntl.LOCK_EX)
        _clear(path, listen)
        bind()
    finally:
        os.close(folder)


def _clear(path: Path, listen: str) -> None:
    """Remove a socket that a process left behind. Raises Unavailable PORT_IN_USE for anything else."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise in_use(listen, error.strerror) from error
    if not stat.S_ISSOCK(found.st_mode):
        raise in_use(listen, "a file that is no socket stands there")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
        trial.settimeout(5)
        try:
            trial.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            raise in_use(listen, error.strerror or error) from error
    raise in_use(listen, "another process serves there")


class SharedPort:
    """A TCP address held for several processes of this node, each of which listens on it with SO_REUSEPORT."""

    def __init__(self, listen: str) -> None:
        """Find out that nobody listens there, and hold it. Raises Unavailable PORT_IN_USE."""
        host, _, port = listen.rpartition(":")
        self._held: list[socket.socket] = []
        name = host.strip("[]")
        try:
            found = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
            number = int(port)
            if number:
                self._claim(host, number)
            for family, address in addresses:
                number = self._hold(family, (address[0], number, *address[2:]), tried=not number)
        except (OSError, ValueError) as error:
            self.close()
            raise in_use(listen, getattr(error, "strerror", None) or error) from error
        except Unavailable:
            self.close()
            raise
        self.port = number
        self.address = f"{host}:{number}"

    def _claim(self, host: str, port: int) -> None:
        """Be the only daemon that starts on this address. Two that share a port of one user would not hear of it."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._held.append(claim)
        claim.bind(f"{_CLAIM}{host}:{port}")

    def _try(self, family: int, address: tuple[object, ...]) -> None:
        """Find out that nobody listens there. Workers of a keeper that was killed a moment ago may still be ending."""
        ends_s = time.monotonic() + ENDING_S
        while True:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _only_its_family(trial)
                try:
                    trial.bind(address)
                    trial.listen(1)
                except OSError as error:
                    if error.errno != errno.EADDRINUSE or time.monotonic() > ends_s:
                        raise
                else:
                    return
            time.sleep(ENDING_S / 20)

    def _hold(self, family: int, address: tuple[object, ...], *, tried: bool) -> int:
        """Bind without listening, so that no connection is led here; the port. tried: it is a free one of any."""
        if not tried:
            self._try(family, address)
        held = socket.socket(family, socket.SOCK_STREAM)
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _only_its_family(held)
        held.bind(address)
        return int(held.getsockname()[1])

    def close(self) -> None:
        """Let go of it."""
        for held in self._held:
            held.close()
        self._held.clear()


def _only_its_family(made: socket.socket) -> None:
    if made.family == socket.AF_INET6:
        with contextlib.suppress(OSError):
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
