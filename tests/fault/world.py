"""A real daemon whose real S3 client speaks to a real store through the proxy, and what has to hold afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc
import pytest

from sessiond import config
from sessiond.core import rules
from sessiond.core.manifest import Manifest
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.cloud.s3 import S3Store
from sessiond.tiers.hydrate import load
from sessiond.v1 import admin_pb2, turn_pb2
from sessiond.verify import verify
from tests.fault.proxy import PASS, Asked, Fault, Proxy, Rule, running_proxy
from tests.seaweed import Seaweed
from tests.wire import Refusal, Wire

# Fixed, so that a session has the same keys in every run and a schedule replays.
HASH_KEY = "5e551017" * 8
# Short: a request that is never answered costs this.
READ_TIMEOUT_MS = 400
CLOUD_ACK, EDGE_ACK = turn_pb2.DURABILITY_CLOUD, turn_pb2.DURABILITY_EDGE
PATIENCE_S = 60.0
Result = TypeVar("Result")


def hash_of(session: str) -> bytes:
    """The session's hash in every key."""
    return rules.session_hash(bytes.fromhex(HASH_KEY), "default", session)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_S) -> float:
    """Wait for the condition; how long it took, in seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"after {seconds} s still not: {what}"
        time.sleep(0.02)
    return time.monotonic() - began


@dataclass
class World:
    """One daemon, the proxy before its store, and the store without the proxy."""

    daemon: Daemon
    proxy: Proxy
    store: S3Store
    seaweed: Seaweed

    def wire(self) -> Wire:
        """Stubs of the daemon; the caller closes them."""
        return Wire(self.daemon.address)

    def manifest(self, session: str) -> Manifest:
        """The session's manifest as the store has it, whatever the proxy does."""
        cold = load(self.store, hash_of(session))
        assert cold is not None, f"{session} has no manifest"
        return cold.manifest

    def status(self, wire: Wire) -> admin_pb2.GetStatusResponse:
        """The daemon's status."""
        return wire.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=30)

    def flushed(self, wire: Wire) -> bool:
        """Whether the cloud tier has everything, asked of the daemon as `sessiond flush` does: what waits for an
        answer would else wait for it."""
        return not (wire.admin.Flush(admin_pb2.FlushRequest(), timeout=60).failed_sessions or self.dirty(wire))

    def dirty(self, wire: Wire) -> int:
        """Sessions of which the cloud tier lacks something."""
        return self.status(wire).hot.dirty_sessions

    def check_clean(self) -> None:
        """Every invariant holds in both tiers. The daemon has ended."""
        options = {"data_dir": str(self.daemon.data_dir), "cloud": self.daemon.cloud, "hash_key": HASH_KEY}
        settings = config.load(None, {}, {**options, "s3_endpoint": self.seaweed.endpoint})
        assert verify(settings, lambda *_: None) == []


@contextlib.contextmanager
def faulty(
    seaweed: Seaweed, rule: Rule = lambda _: PASS, bucket: str = "", **settings: str | int | bool
) -> Iterator[World]:
    """A daemon on a prefix of its own, its store behind the proxy. bucket: the server's own unless named."""
    credentials = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    prefix = f"fault-{secrets.token_hex(8)}"
    bucket = bucket or seaweed.bucket
    defaults = {
        "hash_key": HASH_KEY,
        "node_name": "n1",
        "flush_interval_ms": 50,
        "store_connect_timeout_ms": READ_TIMEOUT_MS,
        "store_read_timeout_ms": READ_TIMEOUT_MS,
    }
    with (
        environment(credentials),
        running_proxy(seaweed.endpoint, bucket, prefix) as proxy,
        contextlib.closing(S3Store(bucket, prefix, endpoint=seaweed.endpoint, path_style=True)) as store,
        running_daemon(
            cloud=f"s3://{bucket}/{prefix}", s3_endpoint=proxy.endpoint, env=credentials, **{**defaults, **settings}
        ) as daemon,
    ):
        # Only now: the start is another test's.
        proxy.rule = rule
        try:
            yield World(daemon, proxy, store, seaweed)
        finally:
            proxy.heal()


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables in this process, for the store that looks past the proxy."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        yield


def on(method: str, start: str, fault: Fault, first: int | None = None) -> Rule:
    """The fault for requests of this method whose key begins so; with `first` only for that many of them."""
    seen = 0

    def rule(asked: Asked) -> Fault:
        nonlocal seen
        if asked.method != method or not asked.key.startswith(start):
            return PASS
        seen += 1
        return fault if first is None or seen <= first else PASS

    return rule


def either(*rules_: Rule) -> Rule:
    """The first of the rules that has a fault for the request."""

    def rule(asked: Asked) -> Fault:
        return next((fault for fault in (each(asked) for each in rules_) if fault != PASS), PASS)

    return rule


def completed(call: Callable[[], Result]) -> Result:
    """What a call returns in the end, sent again as its refusals ask: the first after an outage may come too early."""
    found: list[Result] = []

    def again() -> bool:
        try:
            found.append(call())
        except grpc.RpcError as error:
            if not Refusal(error).retry_ms:
                raise
        return bool(found)

    until(again, "the call is answered")
    return found[0]


def answer(call: Callable[[], object]) -> object:
    """What a call returns, or its Refusal."""
    try:
        return call()
    except grpc.RpcError as error:
        return Refusal(error)
