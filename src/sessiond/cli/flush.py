"""`sessiond flush`: has a daemon write what its cloud tier lacks, and waits for it."""

from __future__ import annotations

import click

from sessiond.cli import connect, exits, output


@click.command()
@click.option("--session", default="", metavar="ID", help="Only this session.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(session: str, as_json: bool, server: str | None, timeout: float) -> int:
    """Have the daemon write everything that its cloud tier lacks. Exit code 9 if it could not write some of it."""
    with connect.client(server, timeout) as client:
        done = client.flush(session)
    if as_json:
        output.print_json(output.plain(done))
    else:
        print(f"{done.flushed_sessions} sessions flushed, {done.failed_sessions} failed")
        for reason, count in sorted(done.failures.items()):
            print(f"{reason}  {count}")
    return exits.INCOMPLETE if done.failed_sessions else exits.OK
