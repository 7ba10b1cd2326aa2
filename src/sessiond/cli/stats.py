"""`sessiond stats`: what a daemon is doing: its phase, both tiers, calls by outcome, resumes by rung."""

from __future__ import annotations

import click

from sessiond.cli import connect, output
from sessiond.v1 import admin_pb2


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(as_json: bool, server: str | None, timeout: float) -> None:
    """Show what the daemon is doing."""
    with connect.client(server, timeout) as client:
        status = client.get_status()
    if as_json:
        output.print_json(output.plain(status))
        return
    output.facts(_facts(status))
    print()
    output.table(
        ("rung", "resumes"),
        [(row.rung, row.count) for row in status.rungs if row.count],
        right=("resumes",),
        title="Resumes",
    )
    print()
    output.table(
        ("method", "status", "reason", "calls"),
        [(row.method, row.status, row.reason or "-", row.count) for row in status.calls],
        right=("calls",),
        title="Calls",
    )
    print()
    output.table(
        ("request", "outcome", "count", "bytes"),
        [(row.kind, row.outcome, row.count, output.bytes_text(row.bytes)) for row in status.cloud.requests],
        right=("count", "bytes"),
        title="Requests to the cloud tier",
    )


def _facts(status: admin_pb2.GetStatusResponse) -> list[tuple[str, object]]:
    hot, cloud, group = status.hot, status.cloud, status.group_commit
    used = f"{output.bytes_text(hot.map_used_bytes)} of {output.bytes_text(hot.map_size_bytes)}"
    mean = group.appends / group.commits if group.commits else 0.0
    return [
        ("node", status.node),
        ("version", f"{status.version}, core {'compiled' if status.compiled_core else 'in plain Python'}"),
        ("phase", output.enum_text(admin_pb2.NodePhase, status.phase, "NODE_PHASE_")),
        ("started", output.time_text(status.started_at_unix_ms)),
        ("memory", output.bytes_text(status.resident_bytes)),
        ("hot tier", f"{hot.path}: {hot.sessions} sessions, {used}, {hot.readers} readers"),
        ("not flushed", f"{hot.dirty_sessions} sessions, the oldest for {hot.oldest_dirty_ms} ms"),
        ("commits", f"{group.commits} of {mean:.1f} writes each, at most {group.group_max}"),
        ("cloud tier", f"{cloud.url}: {'reachable' if cloud.reachable else 'NOT REACHABLE'}"),
        ("lease", "valid" if cloud.lease_valid else "NOT VALID"),
        ("last error", cloud.last_error or "-"),
        ("incarnation", status.incarnation.hex()),
        ("store", cloud.store_id.hex()),
    ]
