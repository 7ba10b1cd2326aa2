from __future__ import annotations

from collections.abc import Iterator

import pytest

from sessiond.cli import import_
from sessiond.client import Client
from sessiond.testing import Daemon, running_daemon


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SESSIOND_SERVER", "SESSIOND_CONFIG", "SESSIOND_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    # A slow machine must not put progress between the lines that a test looks at.
    monkeypatch.setattr(import_, "PROGRESS_EVERY_S", 3600.0)


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[Daemon]:
    """One daemon for the tests of a module; each uses sessions of its own."""
    with running_daemon(flush_interval_ms=50) as daemon:
        yield daemon


@pytest.fixture
def daemon(shared_daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Daemon:
    """The module's daemon, as the one that commands talk to."""
    monkeypatch.setenv("SESSIOND_SERVER", shared_daemon.address)
    return shared_daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.address) as connected:
        yield connected


@pytest.fixture
def own_daemon(monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    """A daemon of the test's own, which it may kill; flushes only on request."""
    with running_daemon(flush_interval_ms=3_600_000) as started:
        monkeypatch.setenv("SESSIOND_SERVER", started.address)
        yield started
