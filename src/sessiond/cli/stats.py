"""`sessiond stats`: what a daemon is doing: its phase, both tiers, calls by outcome, resumes by rung."""

from __future__ import annotations

import time
from typing import Final

import click

from sessiond.cli import connect, output
from sessiond.v1 import admin_pb2

# Dollars for a thousand requests: S3 Standard in us-east-1, https://aws.amazon.com/s3/pricing/. Deletions are free.
PUT_PRICE: Final = 0.005
GET_PRICE: Final = 0.0004
PRICE: Final = click.FloatRange(min=0)
MONTH_MS: Final = 30 * 86_400_000


@click.command()
@click.option("--put-price", type=PRICE, default=PUT_PRICE, show_default=True, metavar="N", help="Of 1,000 puts.")
@click.option("--get-price", type=PRICE, default=GET_PRICE, show_default=True, metavar="N", help="Of 1,000 gets.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(put_price: float, get_price: float, as_json: bool, server: str | None, timeout: float) -> None:
    """Show what the daemon is doing, and what its requests to the cloud tier would cost at these prices."""
    with connect.client(server, timeout) as client:
        status = client.get_status()
    if as_json:
        output.print_json({**output.plain(status), "bill": _bill(status, put_price, get_price)})
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
    if status.ownership.forwarded:
        output.table(
            ("to node", "outcome", "calls"),
            [(row.node, row.outcome, row.count) for row in status.ownership.forwarded],
            right=("calls",),
            title="Calls forwarded to other nodes",
        )
        print()
    output.table(
        ("request", "outcome", "count", "bytes"),
        [(row.kind, row.outcome, row.count, output.bytes_text(row.bytes)) for row in status.cloud.requests],
        right=("count", "bytes"),
        title="Requests to the cloud tier",
    )
    print()
    output.table(
        ("request", "about", "count"),
        [(row.kind, row.object, row.count) for row in status.cloud.objects],
        right=("count",),
        title="The same by object",
    )
    print()
    output.facts(_bill_facts(_bill(status, put_price, get_price)))


def _bill(status: admin_pb2.GetStatusResponse, put_price: float, get_price: float) -> dict[str, float]:
    """What the requests since the start cost, in the currency of the prices: for sessions, and for the lease."""
    prices = {"put": put_price / 1000, "list": put_price / 1000, "get": get_price / 1000, "delete": 0.0}
    spent = {"lease": 0.0, "sessions": 0.0}
    for row in status.cloud.objects:
        spent["lease" if row.object == "lease" else "sessions"] += row.count * prices[row.kind]
    up_ms = max(1, int(time.time() * 1000) - status.started_at_unix_ms)
    turns = status.turns_appended
    return {
        "turns_appended": turns,
        "sessions_cost": spent["sessions"],
        "cost_per_million_turns": spent["sessions"] / turns * 1e6 if turns else 0.0,
        "lease_cost_per_month": spent["lease"] / up_ms * MONTH_MS,
    }


def _bill_facts(bill: dict[str, float]) -> list[tuple[str, object]]:
    turns = f"{bill['turns_appended']:.0f} turns appended since the start"
    each = f"{bill['cost_per_million_turns']:.2f} per million turns" if bill["turns_appended"] else "no turn yet"
    return [
        ("estimated bill", f"{each}: {bill['sessions_cost']:.4f} for {turns}"),
        ("lease", f"{bill['lease_cost_per_month']:.2f} a month"),
    ]


def _worker_text(worker: admin_pb2.WorkerStatus) -> str:
    """What one worker does."""
    runs = f"process {worker.pid}" if worker.pid else "BEING STARTED AGAIN"
    done = f"{worker.answered} answered, {worker.relayed} passed on, {worker.commits} commits"
    return f"{runs}, {output.bytes_text(worker.resident_bytes)}, {done}, {worker.restarts} restarts"


def _facts(status: admin_pb2.GetStatusResponse) -> list[tuple[str, object]]:
    hot, cloud, group = status.hot, status.cloud, status.group_commit
    used = f"{output.bytes_text(hot.map_used_bytes)} of {output.bytes_text(hot.map_size_bytes)}"
    flush, upkeep, moves = status.flush, status.upkeep, status.ownership
    rescues = ", ".join(f"{count} {outcome.lower()}" for outcome, count in sorted(moves.rescues.items()))
    forwarded = sum(row.count for row in moves.forwarded)
    mean = group.appends / group.commits if group.commits else 0.0
    return [
        ("node", status.node),
        ("version", f"{status.version}, core {'compiled' if status.compiled_core else 'in plain Python'}"),
        ("phase", output.enum_text(admin_pb2.NodePhase, status.phase, "NODE_PHASE_")),
        ("started", output.time_text(status.started_at_unix_ms)),
        ("memory", output.bytes_text(status.resident_bytes)),
        *((f"worker {worker.number}", _worker_text(worker)) for worker in status.workers),
        *((f"old reader {reader.pid}", f"for {reader.age_ms} ms: the file grows") for reader in status.old_readers),
        ("hot tier", f"{hot.path}: {hot.sessions} sessions, {used}, {hot.readers} readers"),
        ("not flushed", f"{hot.dirty_sessions} sessions, the oldest for {hot.oldest_dirty_ms} ms"),
        (
            "flusher",
            f"{flush.commits} commits, {flush.in_flight} under way, {flush.merges} merges"
            + (f"; NO ANSWER for {flush.failing_ms} ms: {flush.last_error}" if flush.failing_ms else ""),
        ),
        (
            "upkeep",
            f"{upkeep.released_sessions} released, {upkeep.evicted_sessions} evicted,"
            f" {upkeep.archived_sessions} archived, {upkeep.deleted_sessions} deleted",
        ),
        ("sessions", f"{moves.owned_sessions} owned, {moves.watchers} watched streams"),
        ("came here", f"{moves.claims} that nobody owned, {moves.steals} of nodes that were gone"),
        ("other nodes", f"{forwarded} calls forwarded to them, {moves.answered_for_others} answered for them"),
        (
            "fenced",
            f"{moves.fenced} times; {moves.fenced_sessions} sessions wait to be rescued"
            + (f"; rescued: {rescues}" if rescues else ""),
        ),
        ("commits", f"{group.commits} of {mean:.1f} writes each, at most {group.group_max}"),
        ("cloud tier", f"{cloud.url}: {'reachable' if cloud.reachable else 'NOT REACHABLE'}"),
        ("clock", f"{upkeep.clock_ahead_ms} ms ahead of the clock of expiry"),
        ("lease", "valid" if cloud.lease_valid else "NOT VALID"),
        ("last error", cloud.last_error or "-"),
        ("incarnation", status.incarnation.hex()),
        ("store", cloud.store_id.hex()),
    ]
