"""What docs/routing publishes for routers, and docs/operations.md for operators, is what nodes and clients go by."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from sessiond.cli import stats
from sessiond.client.ring import POINTS_MIN
from sessiond.client.routes import SERVICE_CONFIG, SESSION_HEADER
from sessiond.config import Settings
from sessiond.transport.server import READINESS
from sessiond.v1 import admin_pb2, session_pb2, state_pb2

DOCS = Path(__file__).resolve().parents[2] / "docs"
ROUTING = DOCS / "routing"


def find(value: Any, key: str) -> list[Any]:
    """Every value under a key, however deep."""
    found: list[Any] = []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += [inner] if name == key else []
            found += find(inner, key)
    elif isinstance(value, list):
        for inner in value:
            found += find(inner, key)
    return found


def test_the_service_config_is_the_clients_with_repeats_for_what_is_about_sessions() -> None:
    published = json.loads((ROUTING / "service-config.json").read_text())
    (policy, fallback) = published["loadBalancingConfig"]
    assert [policy] == SERVICE_CONFIG["loadBalancingConfig"]
    assert fallback == {"round_robin": {}}
    assert published["healthCheckConfig"] == SERVICE_CONFIG["healthCheckConfig"] == {"serviceName": READINESS}
    (methods,) = published["methodConfig"]
    services = {
        service.full_name
        for module in (session_pb2, state_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    }
    assert {name["service"] for name in methods["name"]} == services
    assert methods["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE"]


def test_envoy_and_istio_hash_what_clients_send_and_ask_for_readiness() -> None:
    envoy = yaml.safe_load((ROUTING / "envoy.yaml").read_text())
    assert find(envoy, "header_name") == [SESSION_HEADER]
    assert find(envoy, "grpc_health_check") == [{"service_name": READINESS}]
    assert find(envoy, "lb_policy") == ["RING_HASH"]
    assert find(envoy, "minimum_ring_size") == [POINTS_MIN]
    assert len(find(envoy, "http2_protocol_options")) == 1
    # Nodes behind the listener that callers' default leads to.
    addresses = find(envoy, "socket_address")
    port = int(Settings().listen.rpartition(":")[2])
    assert {place["port_value"] for place in addresses} == {port}
    istio = yaml.safe_load((ROUTING / "istio.yaml").read_text())
    assert find(istio, "httpHeaderName") == [SESSION_HEADER]
    assert find(istio, "minimumRingSize") == [POINTS_MIN]


def test_operators_are_told_about_fields_and_lines_that_there_are() -> None:
    text = (DOCS / "operations.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+) \| (`[^|]*) \|", text[text.index("## What to look at") :], re.MULTILINE)
    fields = {field.name for field in admin_pb2.OwnershipStatus.DESCRIPTOR.fields} | {"lease_valid"}
    named = {name for _, names in rows for name in re.findall(r"`([a-z_]+)`", names)}
    assert named == fields
    lines = {name for name, _ in stats._facts(admin_pb2.GetStatusResponse())} | {"calls forwarded to other nodes"}
    assert {line for line, _ in rows} <= lines
    for name in ("advertise", "node_key", "node_name", "hash_key", "cloud", "serve_unconfirmed", "lease_ms"):
        assert f"`{name}" in text
        assert name in Settings.__struct_fields__


def test_istio_is_told_of_the_service_that_the_chart_makes() -> None:
    chart = yaml.safe_load((DOCS.parent / "helm" / "sessiond" / "Chart.yaml").read_text())
    host = yaml.safe_load((ROUTING / "istio.yaml").read_text())["spec"]["host"]
    # Of the release `edge` in the namespace `chat`, as tests/deploy/test_helm.py renders it.
    assert host == f"edge-{chart['name']}.chat.svc.cluster.local"
