"""Cold resume within the manifest, against a bare handler that does the same GET through the same store class.

The daemon drained and lost its hot tier, so that every session is cold and unowned; `read_only` keeps it so. That a
cold resume is exactly one GET is asserted from the daemon's own counters.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from bench import ratio, talk, wire
from bench.processes import running_bare
from sessiond.core import rules
from sessiond.testing import Daemon, running_daemon
from sessiond.tiers.cloud.bucket import manifest_key, open_bucket
from sessiond.tiers.cloud.open import open_store
from sessiond.v1 import context_pb2, session_pb2
from tests.seaweed import Seaweed

SESSIONS = 16
# 36 KB: more than the manifest carries inline, less than would be sealed into a segment.
TURNS = 40
REGION = "us-east-1"


@contextlib.contextmanager
def cold(**settings: Any) -> Iterator[tuple[Daemon, list[str]]]:
    """A daemon whose sessions are all in the cloud tier, and unowned."""
    names = [f"cold-{number}" for number in range(SESSIONS)]
    with running_daemon(**settings) as daemon:
        with wire.Client(daemon.address) as client:
            talk.make_sessions(client, names, TURNS, callers=8)
        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        daemon.start()
        yield daemon, names


def compare(
    benchmark: Any, ledger: Any, size: Any, case: str, daemon: Daemon, names: list[str], env: Any, store_arguments: Any
) -> None:
    store = open_store(**store_arguments)
    hash_key = open_bucket(store, b"", 0).hash_key
    objects = [manifest_key(rules.session_hash(hash_key, "default", name)).encode() for name in names]
    object_bytes = len(store.get(objects[0].decode()).body)
    store.close()
    rounds, calls = size.of(20, 3), size.of(200, 10)
    with wire.Client(daemon.address) as client:
        call = client.raw(wire.RESUME)
        requests = [wire.resume_request(name, read_only=True) for name in names]
        reply = call(requests[0])
        context = session_pb2.ResumeSessionResponse.FromString(reply).context
        assert context.receipt.rung == context_pb2.RUNG_CLOUD
        assert not context.receipt.missing
        assert context.tokens.total > 2500
        with (
            running_bare(reply, env=env, probe=objects[0], store=store_arguments) as bare,
            wire.Client(bare.address) as other,
        ):
            theirs, next_request, next_object = (
                other.raw(wire.RESUME),
                itertools.cycle(requests),
                itertools.cycle(objects),
            )
            before, cpu = client.store_requests(), (wire.cpu_s(daemon.pid), wire.cpu_s(bare.pid))
            mine, facing = ratio.by_calls(
                benchmark, lambda: call(next(next_request)), lambda: theirs(next(next_object)), rounds, calls
            )
            cpu = (wire.cpu_s(daemon.pid) - cpu[0], wire.cpu_s(bare.pid) - cpu[1])
            after = client.store_requests()
        status = client.status()
    # pytest-benchmark calls once more at the end, for the result.
    resumes = (rounds + 1) * calls + 1
    asked = {kind: after[kind] - before.get(kind, 0) for kind in after}
    assert asked.pop("get") == resumes, "a cold resume is exactly one GET"
    asked.pop("put")  # the node's lease
    assert not any(asked.values()), f"a cold resume makes no request but its GET: {asked}"
    assert status.hot.sessions == 0, "read_only claims nothing"
    for name, share, promise in (("p50", 0.5, "cold p50"), ("p99", 0.99, "cold p99")):
        made = ledger.add(
            case,
            name,
            "bare handler, same GET, same bytes",
            "s",
            [ratio.percentile(block, share) for block in mine],
            [ratio.percentile(block, share) for block in facing],
            promise,
        )
        benchmark.extra_info[f"ratio_{name}"] = made.ratio
    ledger.note(
        case,
        f"{resumes:,} resumes, {resumes:,} GETs, no LIST, no HEAD; a manifest has {object_bytes:,} bytes; CPU a call "
        f"{cpu[0] / resumes * 1e6:.0f} us against {cpu[1] / resumes * 1e6:.0f} us",
    )


def test_folder(benchmark: Any, ledger: Any, size: Any) -> None:
    with cold() as (daemon, names):
        compare(benchmark, ledger, size, "cold resume, folder", daemon, names, {}, {"url": daemon.cloud})


def test_seaweedfs(benchmark: Any, ledger: Any, size: Any, seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"AWS_ACCESS_KEY_ID": seaweed.access_key, "AWS_SECRET_ACCESS_KEY": seaweed.secret_key}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{seaweed.bucket}/bench-cold"
    with cold(cloud=url, s3_endpoint=seaweed.endpoint, s3_region=REGION, env=env) as (daemon, names):
        arguments = {"url": url, "endpoint": seaweed.endpoint, "region": REGION}
        compare(benchmark, ledger, size, "cold resume, SeaweedFS", daemon, names, env, arguments)
