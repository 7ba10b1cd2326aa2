"""What the links between nodes do, so that a test which cuts one knows that it was cut."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from sessiond.testing import HOST
from tests.cluster.tcp import Link, Network, State
from tests.fault.world import until

QUIET_S = 0.2
ANSWER_S = 5.0


class Echo:
    """Answers every piece with itself, and keeps what it heard."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                while piece := connection.recv(1 << 16):
                    self.heard += piece
                    connection.sendall(piece)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


@pytest.fixture
def link(echo: Echo) -> Iterator[Link]:
    with Network() as network:
        yield network.link(HOST, echo.port)


def connect(link: Link) -> socket.socket:
    host, _, port = link.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=ANSWER_S)


def is_quiet(connection: socket.socket) -> bool:
    connection.settimeout(QUIET_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(ANSWER_S)
    return False


def test_an_open_link_passes_bytes_both_ways_and_the_end_of_a_connection(link: Link) -> None:
    with connect(link) as connection:
        sent = bytes(range(256)) * 4096
        threading.Thread(target=connection.sendall, args=(sent,)).start()
        came = bytearray()
        while len(came) < len(sent):
            came += connection.recv(1 << 16)
        assert came == sent
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_a_cut_link_resets_its_connections_and_refuses_new_ones_until_it_heals(link: Link) -> None:
    with connect(link) as connection:
        connection.sendall(b"one")
        assert connection.recv(3) == b"one"
        link.set(State.CUT)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with pytest.raises(ConnectionRefusedError):
        connect(link)
    link.set(State.OPEN)
    with connect(link) as connection:
        connection.sendall(b"two")
        assert connection.recv(3) == b"two"


def test_what_a_link_lost_never_comes_later(link: Link, echo: Echo) -> None:
    with connect(link) as connection:
        connection.sendall(b"one")
        assert connection.recv(3) == b"one"
        link.set(State.LOST)
        connection.sendall(b"two")
        assert is_quiet(connection)
        link.set(State.OPEN)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    assert echo.heard == b"one"


def test_a_deaf_link_delivers_what_is_sent_and_loses_the_answer(link: Link, echo: Echo) -> None:
    with connect(link) as connection:
        link.set(State.DEAF)
        connection.sendall(b"one")
        until(lambda: echo.heard == b"one", "it arrived")
        assert is_quiet(connection)
        link.set(State.OPEN)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_held_link_delivers_late(link: Link, echo: Echo) -> None:
    link.set(State.HELD)
    with connect(link) as connection:
        connection.sendall(b"one")
        assert is_quiet(connection)
        assert not echo.heard
        link.set(State.OPEN)
        assert connection.recv(3) == b"one"


def test_a_slow_link_delays_every_piece(link: Link) -> None:
    link.set(State.OPEN, delay_ms=300)
    with connect(link) as connection:
        connection.sendall(b"one")
        assert is_quiet(connection)
        assert connection.recv(3) == b"one"
