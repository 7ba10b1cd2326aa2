"""A node whose keeper stands still while its workers go on: none says CONFIRMED once it may have been fenced."""

from __future__ import annotations

import threading
import time

import grpc

from sessiond.v1 import context_pb2
from tests.cluster.history import EDGE_ACK, History
from tests.cluster.load import append, resume
from tests.cluster.nodes import running_cluster, until
from tests.cluster.test_zombie import SESSIONS, check_return, finish, take_over, talk
from tests.wire import user

CONFIRMED = context_pb2.OWNERSHIP_CONFIRMED
NEVER_MS = 3_600_000


def test_workers_of_a_frozen_keeper_never_confirm_after_its_lease_and_lose_nothing() -> None:
    with running_cluster(flush_interval_ms=NEVER_MS) as cluster:
        history = History()
        talk(cluster, history)
        wire = cluster[0].wire()
        told: list[tuple[float, str, int, object]] = []
        stop = threading.Event()
        for session in SESSIONS:
            resume(wire, session)

        def go_on(session: str) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    reply = append(wire, session, user(f"z-{session}-{number}", "?"), EDGE_ACK, 2.0)
                    told.append((time.monotonic(), session, reply.ownership, reply))
                    receipt = resume(wire, session, 2.0).receipt
                    told.append((time.monotonic(), session, receipt.ownership, None))
                except grpc.RpcError:
                    stop.wait(0.05)

        threads = [threading.Thread(target=go_on, args=(session,)) for session in SESSIONS]
        for thread in threads:
            thread.start()
        until(lambda: any(row[2] == CONFIRMED for row in list(told)), "the lease is valid, and they say so")
        cluster[0].freeze()
        try:
            frozen_s = time.monotonic()
            take_over(cluster, history)
            taken_s = time.monotonic()
            # They go on for a while beside the new owners.
            until(lambda: len([row for row in told if row[0] > taken_s]) > 20, "workers still answer")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            cluster[0].thaw()
        late = [row for row in told if row[0] > taken_s]
        assert {row[2] for row in late} == {context_pb2.OWNERSHIP_UNCONFIRMED}
        assert frozen_s < taken_s
        for _, session, _, reply in told:
            if reply is not None:
                history.appended(session, EDGE_ACK, reply)
        until(lambda: cluster[0].status().cloud.lease_valid, "n1 holds its lease again")
        check_return(cluster, history)
        for session in SESSIONS:
            reply = append(cluster[0].wire(), session, user(f"after-{session}", "!"), EDGE_ACK)
            history.appended(session, EDGE_ACK, reply)
        finish(cluster, SESSIONS, history)
