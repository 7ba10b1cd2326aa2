"""The other nodes of a bucket as an operator's command sees them: by their leases, and by asking each.

It promises to go by no clock: a lease that changed between two looks is renewed, one that did not stands still. It
fences nobody, takes nothing, and asks a node only whether it knows the key that the nodes share.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc

from sessiond.client.failures import failure_of
from sessiond.core import envelope
from sessiond.errors import Corrupt, SessiondError
from sessiond.tiers.cloud.bucket import lease_key
from sessiond.tiers.cloud.store import ObjectNotFound, ObjectStore
from sessiond.transport.peers import Credentials
from sessiond.v1 import node_pb2, node_pb2_grpc

RENEWED: Final = "renews its lease"
STILL: Final = "its lease stands still"
FENCED: Final = "fenced"
RELEASED: Final = "released"
DAMAGED: Final = "its lease is damaged"

NODES_MAX: Final = 100
# A lease is renewed three times in its length: after half of it, and a moment for the write, it has changed.
WAIT_MAX_S: Final = 5.0
WRITE_S: Final = 0.3
ASK_S: Final = 3.0


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A node by its lease. state: one of the above. boot_id: of the machine that it ran on; empty if unknown."""

    name: str
    address: str
    state: str
    boot_id: str = ""

    def __str__(self) -> str:
        return f"{self.name} at {self.address} ({self.state})" if self.address else f"{self.name} ({self.state})"


def neighbours(store: ObjectStore, node: str, sleep: Callable[[float], None] = time.sleep) -> list[Neighbour]:
    """All nodes with a lease, this one left out. Takes up to WAIT_MAX_S if one may be alive. Raises StoreError."""
    keys = [row.key for row in list(store.list(lease_key(""), limit=NODES_MAX)) if row.key != lease_key(node)]
    first = {key: _holder(store, key) for key in keys}
    open_ms = [int(found[0].get("lease_ms", 0)) for found in first.values() if found is not None and may_live(found[0])]
    if open_ms:
        sleep(min(WAIT_MAX_S, max(open_ms) / 2000 + WRITE_S))
    told: list[Neighbour] = []
    for key, found in first.items():
        if found is None:
            continue
        holder, etag = found
        name, address = key.removeprefix(lease_key("")), str(holder.get("address", ""))
        if may_live(holder):
            again = _holder(store, key)
            state = STILL if again is not None and again[1] == etag else RENEWED
        else:
            state = DAMAGED if not holder else FENCED if holder.get("fenced") else RELEASED
        told.append(Neighbour(name, address, state, str(holder.get("boot_id", ""))))
    return told


def _holder(store: ObjectStore, key: str) -> tuple[dict[str, Any], str] | None:
    with contextlib.suppress(ObjectNotFound):
        found = store.get(key)
        try:
            return envelope.unseal(found.body, envelope.KIND_LEASE, key)[0], found.etag
        except Corrupt:
            return {}, found.etag
    return None


def may_live(holder: dict[str, Any]) -> bool:
    """Whether a lease says nothing against its node's being alive."""
    return bool(holder) and not holder.get("fenced") and not holder.get("released")


def ask(address: str, credentials: Credentials) -> SessiondError | None:
    """What keeps this node from calling another; None if that one answers and knows the key."""
    # For a hot tier that nobody has: it is told that this is not the one, once the signature is believed.
    request = node_pb2.ForwardRequest(method="GetSession", incarnation=bytes(16))
    signed = credentials.metadata(request.incarnation, request.tenant, request.method, request.request)
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            node_pb2_grpc.NodeServiceStub(channel).Forward(request, timeout=ASK_S, metadata=signed)
        except grpc.RpcError as error:
            trouble = failure_of(error, address).error
            return None if trouble.reason == "NOT_OWNER" else trouble
    return None
