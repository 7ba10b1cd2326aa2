"""What every gRPC server of a node is made with, whichever of its processes it stands in."""

from __future__ import annotations

from typing import Final

from sessiond.v1 import admin_pb2, node_pb2, session_pb2, state_pb2

# Above every limit of ours, whose refusals carry details; the transport's own does not.
TRANSPORT_BYTES_MAX: Final = 64 * 1024**2
SERVICES: Final = (
    session_pb2.DESCRIPTOR.services_by_name["SessionService"],
    state_pb2.DESCRIPTOR.services_by_name["StateService"],
    admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    node_pb2.DESCRIPTOR.services_by_name["NodeService"],
)
# Until identities are verified, every caller is of this tenant.
TENANT: Final = "default"


def rpcs_max(concurrent_calls_max: int, watchers_max: int) -> int:
    """Twice our own limits and room for health: what is above ours must get as far as its details."""
    return 2 * (concurrent_calls_max + watchers_max) + 64


def server_options(rpcs: int, shares_port: bool) -> list[tuple[str, int]]:
    """Options of a server. shares_port: with other processes of this node."""
    return [
        ("grpc.max_receive_message_length", TRANSPORT_BYTES_MAX),
        ("grpc.max_send_message_length", TRANSPORT_BYTES_MAX),
        # A second daemon on the port must be told, not given half of the calls.
        ("grpc.so_reuseport", int(shares_port)),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 5),
        # Beyond 1,000 calls that came and were not taken up yet gRPC cancels new ones at random, and says not
        # why: thousands of devices come back at once after a restart.
        ("grpc.server.max_pending_requests", rpcs),
        ("grpc.server.max_pending_requests_hard_limit", rpcs),
    ]
