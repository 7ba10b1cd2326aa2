"""`sessiond release`: has a daemon give sessions up, flushed, so that any node may take them."""

from __future__ import annotations

import click

from sessiond.cli import connect, exits, output


@click.command()
@click.argument("sessions", nargs=-1, required=True, metavar="SESSION...")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(sessions: tuple[str, ...], as_json: bool, server: str | None, timeout: float) -> int:
    """Have the daemon flush and release each SESSION. Exit code 9 if it could not release some of them."""
    with connect.client(server, timeout) as client:
        done = client.release(sessions)
    if as_json:
        output.print_json(output.plain(done))
    else:
        print(f"{done.released_sessions} sessions released, {len(done.failures)} failed")
        for session, reason in sorted(done.failures.items()):
            print(f"{output.printable(session)}  {reason}")
    return exits.INCOMPLETE if done.failures else exits.OK
