"""What a cold resume asks of the store, counted outside the daemon: one GET, whoever owned the session before."""

from __future__ import annotations

import pytest

from sessiond.v1 import admin_pb2, turn_pb2
from tests.cluster.history import CLOUD_ACK, History
from tests.cluster.load import append, resume
from tests.cluster.nodes import hash_of, running_cluster, until
from tests.fault.proxy import Asked, running_proxy
from tests.seaweed import Seaweed
from tests.wire import CLOUD, HOT, assistant, user

PREFIX = "counted"
CALL_TURNS = 250


def turns_of(count: int) -> list[turn_pb2.TurnInput]:
    return [(user if number % 2 else assistant)(f"t{number}", f"turn {number}") for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("count", "read_only"), [(10, False), (10_000, False), (10_000, True)], ids=["few", "many", "many-read-only"]
)
def test_a_cold_resume_within_the_manifest_is_one_get(seaweed: Seaweed, count: int, read_only: bool) -> None:
    prefix = f"{PREFIX}-{count}-{read_only}"
    with (
        running_proxy(seaweed.endpoint, seaweed.bucket, prefix) as proxy,
        running_cluster(seaweed, 2, prefix=prefix, endpoints={"n2": proxy.endpoint}) as cluster,
    ):
        wire = cluster[0].wire()
        wire.create("s")
        made = turns_of(count)
        for first in range(0, count, CALL_TURNS):
            wire.append("s", *made[first : first + CALL_TURNS])
        released = wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=["s"]), timeout=30)
        assert released.released_sessions == 1
        assert cluster.owner("s") == ""
        before = len(proxy.log)
        found = resume(cluster[1].wire(), "s", budget_tokens=1000, read_only=read_only)
        assert found.receipt.rung == CLOUD
        assert found.receipt.head.seq == count
        assert found.turns[-1].turn_id == f"t{count}"
        if not read_only:
            until(lambda: cluster.owner("s") == "n2", "it is claimed behind the reply")
        # Its lease is renewed all the time, whatever is resumed.
        asked = [asked for asked, _ in proxy.log[before:] if not asked.key.startswith("n/")]
        manifest = f"m/{hash_of('s').hex()}"
        reads = [(each.method, each.key) for each in asked if each.method != "PUT"]
        assert reads == [("GET", manifest)], "a cold resume is one GET, no LIST, no HEAD; nor does a claim read again"
        assert {each.key for each in asked if each.method == "PUT"} == (set() if read_only else {manifest})
        if not read_only:
            until(lambda: resume(cluster[1].wire(), "s").receipt.rung == HOT, "it is hot where it was claimed")


def test_a_resume_through_another_node_asks_the_store_once_and_then_no_more(seaweed: Seaweed) -> None:
    prefix = f"{PREFIX}-forwarded"
    with (
        running_proxy(seaweed.endpoint, seaweed.bucket, prefix) as proxy,
        running_cluster(seaweed, 2, prefix=prefix, endpoints={"n2": proxy.endpoint}) as cluster,
    ):
        history = History()
        wire = cluster[0].wire()
        wire.create("s")
        history.appended("s", CLOUD_ACK, append(wire, "s", user("t1", "hello"), CLOUD_ACK))
        before = len(proxy.log)
        for _ in range(5):
            assert resume(cluster[1].wire(), "s").receipt.rung == HOT
        asked: list[Asked] = [asked for asked, _ in proxy.log[before:] if not asked.key.startswith("n/")]
        assert [(each.method, each.key) for each in asked] == [("GET", f"m/{hash_of('s').hex()}")]
