"""`sessiond drain`: has a daemon stop taking work, flush and release every session, and shows how far it is."""

from __future__ import annotations

import sys

import click

from sessiond.cli import connect, exits, output, ranges
from sessiond.v1 import admin_pb2


@click.command()
@click.option("--grace-ms", type=ranges.UINT64, default=0, metavar="N", help="The most to spend.  [default: its own]")
@click.option("--shut-down", is_flag=True, help="End the daemon when it is done.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(grace_ms: int, shut_down: bool, as_json: bool, server: str | None, timeout: float) -> int:
    """Have the daemon flush and release every session; it takes no work from then on.

    Exit code 0 if everything is in the cloud tier and released, 9 if not.
    """
    last = admin_pb2.DrainResponse()
    with connect.client(server, timeout) as client:
        for last in client.drain(grace_ms, shut_down=shut_down):
            if not last.done:
                print(f"{last.released_sessions} released, {last.remaining_sessions} remaining", file=sys.stderr)
    if as_json:
        output.print_json(output.plain(last))
    else:
        outcome = "drained" if last.clean else "not drained"
        print(
            f"{outcome}: {last.released_sessions} sessions released, {last.remaining_sessions} remaining,"
            f" {last.failed_sessions} failed"
        )
        for reason, count in sorted(last.failures.items()):
            print(f"{reason}  {count}")
    return exits.OK if last.done and last.clean else exits.INCOMPLETE
