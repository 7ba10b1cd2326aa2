"""Blobs of a node that was taken for gone: told as missing while it is away, and back as they were once it is."""

from __future__ import annotations

import contextlib

import grpc
import pytest

from sessiond.v1 import context_pb2, state_pb2, turn_pb2
from tests.cluster.nodes import STEAL_LEASES, Cluster, Member, running_cluster, until
from tests.wire import Refusal, Wire

CLOUD, EDGE = turn_pb2.DURABILITY_CLOUD, turn_pb2.DURABILITY_EDGE
NEVER_MS = 3_600_000
CALL_S_MAX = 2.0
SESSION, USER = state_pb2.StateScope(session_id="s"), state_pb2.StateScope(user_id="ann")


def put(
    member: Member, scope: state_pb2.StateScope, key: str, content: bytes, durability: int = EDGE
) -> state_pb2.StateHeader:
    """Write a blob, under one write_id until a node acknowledges it."""
    found: list[state_pb2.StateHeader] = []
    request = state_pb2.PutStateRequest(
        scope=scope, key=key, content=content, durability=durability, write_id=f"{member.name}-{key}-{content!r}"
    )
    with contextlib.closing(Wire(member.address)) as wire:

        def written() -> bool:
            try:
                found.append(wire.states.PutState(request, timeout=CALL_S_MAX).header)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED and not Refusal(error).retry_ms:
                    raise
            return bool(found)

        until(written, f"{key} is written at {member.name}")
    return found[0]


def get(member: Member, scope: state_pb2.StateScope, key: str) -> state_pb2.GetStateResponse:
    request = state_pb2.GetStateRequest(scope=scope, key=key)
    return member.wire().states.GetState(request, timeout=20)


def listed(member: Member, scope: state_pb2.StateScope) -> state_pb2.ListStatesResponse:
    return member.wire().states.ListStates(state_pb2.ListStatesRequest(scope=scope), timeout=20)


def away(cluster: Cluster, how: str) -> None:
    """Nobody hears of n1 for as long as it takes to be taken for gone."""
    cluster[0].kill() if how == "killed" else cluster[0].freeze()


@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_a_nodes_blobs_come_back_with_it_unless_they_were_written_since(how: str) -> None:
    with running_cluster(size=2, flush_interval_ms=NEVER_MS) as cluster:
        near, far = cluster[0], cluster[1]
        near.wire().create("s")
        acked: dict[str, int] = {}
        for scope in (SESSION, USER):
            put(near, scope, "a", b"in the cloud", CLOUD)
            acked[str(scope)] = put(near, scope, "a", b"on the disk").version
            put(near, scope, "b", b"on the disk")
        away(cluster, how)
        for scope in (SESSION, USER):
            assert put(far, scope, "b", b"since").version >> 32 == 2, f"not taken within {STEAL_LEASES} leases"
            found = get(far, scope, "a")
            assert (found.content, found.rung) == (b"in the cloud", context_pb2.RUNG_PARTIAL)
            assert [(lost.epoch, lost.reason) for lost in found.missing] == [
                (1, context_pb2.MISSING_REASON_HOT_TIER_LOST)
            ]
        near.start() if how == "killed" else near.thaw()
        for scope in (SESSION, USER):
            until(lambda scope=scope: not listed(far, scope).missing, "what n1 had is back")
            for member in cluster:
                found = get(member, scope, "a")
                assert (found.content, found.header.version) == (b"on the disk", acked[str(scope)])
                assert get(member, scope, "b").content == b"since"
            assert put(near, scope, "a", b"on the disk").version == acked[str(scope)], "a repeat is known"
        assert cluster.stop() == [0, 0]
        cluster.check_clean()
