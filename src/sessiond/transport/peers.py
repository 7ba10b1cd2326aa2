"""Calls from node to node over gRPC, under an identity of their own: both ends of it.

It promises that a call is answered only if it was signed with the key that the nodes of a bucket share, for this very
hot tier and these very bytes. It never retries: `service.router` decides what an unanswered call means.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
import structlog
from google.rpc import error_details_pb2, status_pb2

from sessiond.errors import Denied, Unavailable
from sessiond.service.router import PeerUnreachable
from sessiond.tiers.hydrate import Node
from sessiond.v1 import node_pb2, node_pb2_grpc

log = structlog.get_logger("sessiond.transport")

# Who calls, and the proof: NAME, 32 hexadecimal digits of its incarnation, 64 of the signature, joined by colons.
NODE_HEADER: Final = "x-sessiond-node"
SIGNATURE_BYTES: Final = 32
CHANNEL_OPTIONS: Final = [
    ("grpc.max_receive_message_length", 64 * 1024**2),
    ("grpc.max_send_message_length", 64 * 1024**2),
    # A node that restarts is back in less than a second.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # The first address that answers is the node's only one.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
]


def node_key(configured: bytes, hash_key: bytes) -> bytes:
    """The key that nodes sign with: as configured, else one that whoever may open the bucket can make."""
    return (
        configured or hashlib.blake2b(b"node key", digest_size=32, key=hash_key[:64], person=b"sessiond node").digest()
    )


def signature(key: bytes, name: str, incarnation: bytes, target: bytes, tenant: str, method: str, raw: bytes) -> bytes:
    """What proves that a node of the bucket sends these bytes to that hot tier on a tenant's behalf, "" for its own.

    target: the hot tier's incarnation.
    """
    signed = hashlib.blake2b(digest_size=SIGNATURE_BYTES, key=key[:64], person=b"node call")
    for part in (name.encode(), incarnation, target, tenant.encode(), method.encode(), raw):
        signed.update(len(part).to_bytes(8, "big") + part)
    return signed.digest()


class Credentials:
    """What this node proves itself with, and checks others by."""

    def __init__(self, key: bytes, node: Node) -> None:
        self._key = key
        self._node = node

    def metadata(self, target: bytes, tenant: str, method: str, raw: bytes) -> tuple[tuple[str, str], ...]:
        """The header of a call to another node."""
        node = self._node
        proof = signature(self._key, node.name, node.incarnation, target, tenant, method, raw)
        return ((NODE_HEADER, f"{node.name}:{node.incarnation.hex()}:{proof.hex()}"),)

    def check(
        self, metadata: Sequence[tuple[str, str | bytes]] | Any, target: bytes, tenant: str, method: str, raw: bytes
    ) -> str:
        """The name of the node that sent a call. Raises Denied NODE_UNVERIFIED."""
        for key, value in metadata or ():
            if key != NODE_HEADER:
                continue
            with contextlib.suppress(ValueError):
                name, incarnation, proof = str(value).rsplit(":", 2)
                due = signature(self._key, name, bytes.fromhex(incarnation), target, tenant, method, raw)
                if hmac.compare_digest(due, bytes.fromhex(proof)):
                    return name
        raise Denied("NODE_UNVERIFIED", f"This call ({method or 'no method'}) is not signed by a node of this bucket.")


class PeerChannels:
    """One channel per address, opened by the first call; for one event loop."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._stubs: dict[str, Any] = {}

    def _stub(self, address: str) -> Any:
        stub = self._stubs.get(address)
        if stub is None:
            channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            stub = node_pb2_grpc.NodeServiceStub(channel)
            self._channels[address], self._stubs[address] = channel, stub
        return stub

    async def call(self, address: str, request: node_pb2.ForwardRequest, timeout_s: float) -> node_pb2.ForwardResponse:
        """Send one forwarded call. Raises PeerUnreachable."""
        signed = self._credentials.metadata(request.incarnation, request.tenant, request.method, request.request)
        try:
            response = await self._stub(address).Forward(request, timeout=timeout_s, metadata=signed)
        except grpc.RpcError as error:
            raise self._unreachable(address, error) from error
        assert isinstance(response, node_pb2.ForwardResponse)
        return response

    async def rescue(self, address: str, request: node_pb2.RescueRequest, timeout_s: float) -> node_pb2.RescueResponse:
        """Offer turns to a session's owner. Raises PeerUnreachable, Unavailable."""
        signed = self._credentials.metadata(
            request.incarnation, "", "Rescue", request.SerializeToString(deterministic=True)
        )
        try:
            response = await self._stub(address).Rescue(request, timeout=timeout_s, metadata=signed)
        except grpc.aio.AioRpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                what = f"{address} refuses turns that it was offered: {error.details()}"
                raise Unavailable("OWNER_UNREACHABLE", what) from error
            raise self._unreachable(address, error) from error
        assert isinstance(response, node_pb2.RescueResponse)
        return response

    async def watch(
        self, address: str, request: node_pb2.ForwardWatchRequest
    ) -> AsyncIterator[node_pb2.ForwardWatchResponse]:
        """The events of a watch on another node. Raises PeerUnreachable."""
        call = request.call
        signed = self._credentials.metadata(call.incarnation, call.tenant, call.method, call.request)
        try:
            async for event in self._stub(address).ForwardWatch(request, metadata=signed):
                yield event
        except grpc.RpcError as error:
            raise self._unreachable(address, error) from error

    def reason(self, status: bytes) -> str:
        """The reason in a refusal."""
        info = error_details_pb2.ErrorInfo()
        for detail in status_pb2.Status.FromString(status).details:
            if detail.Unpack(info):
                return str(info.reason)
        return ""

    def _unreachable(self, address: str, error: Any) -> PeerUnreachable:
        code = error.code()
        if code is grpc.StatusCode.PERMISSION_DENIED:
            # Nobody's traffic goes wrong by itself here: somebody has to correct a setting.
            log.error("peer_refused", address=address, detail="it does not know this node's node_key")
        return PeerUnreachable(f"{address}: {code.name}: {error.details() or code.name}")

    async def close(self) -> None:
        """Close every channel."""
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()
        self._stubs.clear()
