"""Settings that several nodes need: where a node is reached, and the secret that they share."""

from __future__ import annotations

import logging
import socket

import pytest

from sessiond.config import load
from sessiond.errors import Invalid
from sessiond.transport.peers import node_key


@pytest.mark.parametrize(
    ("listen", "advertise", "port", "address"),
    [
        ("127.0.0.1:7443", "", 7443, "127.0.0.1:7443"),
        ("10.0.0.5:0", "", 40123, "10.0.0.5:40123"),
        ("0.0.0.0:7443", "", 7443, f"{socket.gethostname()}:7443"),
        ("[::]:0", "", 40123, f"{socket.gethostname()}:40123"),
        ("0.0.0.0:7443", "node-1.chat.example:443", 7443, "node-1.chat.example:443"),
        ("[::]:7443", "[fd00::1]:7443", 7443, "[fd00::1]:7443"),
        ("[::]:7443", "fd00::1:7443", 7443, "[fd00::1]:7443"),
        ("unix:/run/sessiond.sock", "", 0, "unix:/run/sessiond.sock"),
        ("unix:/run/sessiond.sock", "10.0.0.5:7443", 0, "10.0.0.5:7443"),
    ],
)
def test_a_node_is_reached_where_it_says_else_where_it_listens(
    listen: str, advertise: str, port: int, address: str
) -> None:
    assert load(None, {}, {"listen": listen, "advertise": advertise}).address(port) == address


@pytest.mark.parametrize(
    ("advertise", "why"),
    [
        ("10.0.0.5", "is not HOST:PORT"),
        (":7443", "is not HOST:PORT"),
        ("10.0.0.5:0", "is not HOST:PORT"),
        ("10.0.0.5:65536", "is not HOST:PORT"),
        ("a/b:7443", "is not HOST:PORT"),
        ("dns:///nodes:7443", "is not HOST:PORT"),
        ("fd00::1::2:7443", "is not HOST:PORT"),
        ("0.0.0.0:7443", "is every address"),
        ("[::]:7443", "is every address"),
    ],
)
def test_an_address_that_nobody_could_reach_is_refused(advertise: str, why: str) -> None:
    with pytest.raises(Invalid, match="advertise") as refused:
        load(None, {}, {"advertise": advertise})
    assert refused.value.reason == "INVALID_CONFIG"
    assert why in refused.value.message


@pytest.mark.parametrize("key", ["hash_key", "node_key"])
def test_a_secret_is_hexadecimal_of_16_to_64_bytes_and_never_shown(key: str, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in ("xyz", "ab" * 15, "ab" * 65, "  "):
        with pytest.raises(Invalid, match=key) as refused:
            load(None, {}, {key: wrong})
        assert not wrong.strip() or wrong not in str(refused.value)
    settings = load(None, {}, {key: "c0ffee" * 6})
    logging.getLogger().error("%s %r", settings, settings)
    assert "c0ffee" not in caplog.text
    assert f"{key}='...'" in caplog.text
    assert "lease_ms=4000" in caplog.text


def test_the_secret_of_the_nodes_comes_from_the_hash_key_unless_it_is_set() -> None:
    made = node_key(b"", b"k" * 32)
    assert len(made) == 32
    assert made not in (node_key(b"", b"l" * 32), b"k" * 32)
    assert node_key(b"n" * 16, b"k" * 32) == node_key(b"n" * 16, b"l" * 32) == b"n" * 16
