"""`sessiond delete`: ends sessions for ever, in both tiers."""

from __future__ import annotations

import sys

import click

from sessiond.cli import connect, exits, output
from sessiond.errors import SessiondError


@click.command()
@click.argument("sessions", nargs=-1, required=True, metavar="SESSION...")
@click.option("--user", default="", metavar="U", help="The user whose sessions they must be.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(sessions: tuple[str, ...], user: str, yes: bool, as_json: bool, server: str | None, timeout: float) -> int:
    """Delete each SESSION with its turns, in both tiers. A tombstone stays, so that nobody ever uses the id again.

    Exit code 0 if all of them are deleted, now or before; else that of the first that could not be.
    """
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("Nobody can be asked here: say --yes.")
        click.confirm(f"Delete {len(sessions)} session(s) for ever?", abort=True, err=True)
    rows: list[dict[str, object]] = []
    first: SessiondError | None = None
    with connect.client(server, timeout) as client:
        for session in sessions:
            try:
                rows.append({"session_id": session, "deleted": client.delete_session(session, user_id=user)})
            except SessiondError as error:
                first = first or error
                rows.append({"session_id": session, "reason": error.reason, "message": str(error)})
    if as_json:
        output.print_json({"sessions": rows})
    for row in [] if as_json else rows:
        done = "deleted" if row.get("deleted") else "was deleted before"
        print(f"{output.printable(str(row['session_id']))}  {row.get('message', done)}")
    return exits.code_of(first) if first is not None else exits.OK
