"""The daemon's parts wired together in this process, without gRPC: for profiles, and to record what an append writes.

It follows `sessiond.daemon` and starts no server. Nothing here is measured against another side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack

from bench import talk
from sessiond import daemon
from sessiond.core import rules
from sessiond.service.hotpath import HotPath
from sessiond.service.ownership import Parts
from sessiond.service.prepare import prepare_turns
from sessiond.service.sessions import Sessions
from sessiond.tiers.cloud.bucket import open_bucket
from sessiond.tiers.cloud.counting import CountingStore
from sessiond.tiers.cloud.lease import Lease
from sessiond.tiers.cloud.open import open_store
from sessiond.tiers.flush import Flusher
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hydrate import Claims, Segments, first_manifest
from sessiond.tiers.hydrate import Node as NodeIdentity
from sessiond.tokens import Tokenizer

TURN_BYTES_MAX = 1024**2
MAP_SIZE_BYTES = 1024**3
LEASE_MS = 4000
FLUSH_INTERVAL_MS = 1000


@contextlib.contextmanager
def running(folder: Path, flushes: bool = True) -> Iterator[tuple[Sessions, Parts]]:
    """The service on real tiers in the folder. flushes: in the background, as in the daemon."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as opened:
        store = CountingStore(open_store((folder / "cloud").absolute().as_uri()))
        opened.callback(store.close)
        bucket = open_bucket(store, b"", daemon.now_ms())
        hot = Environment(folder / "hot", MAP_SIZE_BYTES, 1024, 64)
        opened.callback(hot.close)
        hot.bind_store(bucket.store_id)
        identity = NodeIdentity(hot.incarnation, "bench", "127.0.0.1:1")
        lease = Lease(store, identity.name, hot.incarnation, identity.address, LEASE_MS, lambda: None)
        lease.acquire()
        lease.start()
        opened.callback(lease.stop, True)
        flusher = Flusher(hot, store, bucket, identity, FLUSH_INTERVAL_MS, 4, daemon.now_ms)
        if flushes:
            flusher.start()
        opened.callback(flusher.stop)
        claims = Claims(hot, store, bucket, identity, lambda seconds: None)
        opened.callback(claims.close)
        executor = ThreadPoolExecutor(max_workers=daemon.STORE_THREADS)
        opened.callback(executor.shutdown, wait=True, cancel_futures=True)
        tokenizer = Tokenizer()
        tokenizer.warm()
        parts = Parts(
            hot=hot,
            store=store,
            bucket=bucket,
            node=identity,
            lease=lease,
            flusher=flusher,
            claims=claims,
            segments=Segments(store),
            tokenizer=tokenizer,
            executor=executor,
            counting=executor,
            clock_ms=daemon.now_ms,
            expiry_ms=daemon.now_ms,
            latest_ms=daemon.now_ms,
            running_ms=daemon.now_ms,
            turn_bytes_max=TURN_BYTES_MAX,
            default_budget_tokens=0,
        )
        yield Sessions(parts), parts


def hot_path(sessions: Sessions, parts: Parts) -> HotPath:
    """The hot path on the same tiers, as the daemon has it."""
    return HotPath(
        parts.hot,
        parts.bucket.hash_key,
        parts.tokenizer,
        parts.lease,
        parts.node.name,
        default_budget_tokens=0,
        serve_unconfirmed=True,
        turn_bytes_max=TURN_BYTES_MAX,
        clock_ms=daemon.now_ms,
        expiry_ms=daemon.now_ms,
        latest_ms=daemon.now_ms,
        running_ms=daemon.now_ms,
        note_resumed=lambda h: None,
        note_appended=lambda h, turns: None,
        rungs=sessions.rungs,
    )


class Recorder(Transaction):
    """A transaction that also notes what is written: (table, key, value), the value None where a row is deleted."""

    def __init__(self, transaction: Transaction) -> None:
        super().__init__(transaction.lmdb, transaction.tables)
        self.rows: list[tuple[str, bytes, bytes | None]] = []

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """As in Transaction."""
        self.rows.append((table, bytes(key), bytes(value)))
        super().put(table, key, value)

    def delete(self, table: str, key: bytes) -> bool:
        """As in Transaction; a row that was not there is no write."""
        found = super().delete(table, key)
        if found:
            self.rows.append((table, bytes(key), None))
        return found


def record_appends(folder: Path, before: int, appends: int) -> tuple[Path, Path, int]:
    """(file with the rows of each append, the environment they belong to, bytes of an append's rows on average).

    before: turns that the session has when the first recorded append comes.
    """
    with running(folder, flushes=False) as (_, parts):
        h = rules.session_hash(parts.bucket.hash_key, "default", "recorded")
        birth = {
            "created_ms": 1,
            "metadata": {},
            "forked_from": "",
            "forked_epoch": 0,
            "forked_seq": 0,
            "reset_of": "",
        }
        manifest = first_manifest(parts.node, "default", "recorded", "", h, birth, {}, 1)
        assert parts.claims.create(manifest)
        recorded: list[list[tuple[str, bytes, bytes | None]]] = []

        def append(first: int, count: int, records: bool) -> None:
            turns = [talk.turn(number, supplied=False) for number in range(first, first + count)]
            prepared = prepare_turns(turns, parts.bucket.hash_key, parts.tokenizer, TURN_BYTES_MAX)

            def operation(transaction: Transaction) -> Any:
                recorder = Recorder(transaction)
                done = log.append(
                    recorder,
                    h,
                    "recorded",
                    prepared,
                    None,
                    None,
                    daemon.now_ms(),
                    0,
                    daemon.now_ms,
                    daemon.now_ms,
                    dict,
                )
                if records:
                    recorded.append(recorder.rows)
                return done

            assert isinstance(parts.hot.run_blocking(operation), log.Appended)

        for first in range(1, before + 1, talk.TURNS_PER_CALL):
            append(first, min(talk.TURNS_PER_CALL, before + 1 - first), records=False)
        for number in range(before + 1, before + 1 + appends):
            append(number, 1, records=True)
    rows = folder / "rows"
    rows.write_bytes(msgpack.packb(recorded))
    written = sum(len(key) + len(value or b"") for append_rows in recorded for _, key, value in append_rows)
    return rows, folder / "hot", written // len(recorded)
