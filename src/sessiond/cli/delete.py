"""`sessiond delete`: ends sessions for ever, in both tiers."""

from __future__ import annotations

import click

from sessiond.cli import connect, output


@click.command()
@click.argument("sessions", nargs=-1, required=True, metavar="SESSION...")
@click.option("--user", default="", metavar="U", help="The user whose sessions they must be.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(sessions: tuple[str, ...], user: str, yes: bool, as_json: bool, server: str | None, timeout: float) -> None:
    """Delete each SESSION with its turns, in both tiers. A tombstone stays, so that nobody ever uses the id again."""
    if not yes:
        click.confirm(f"Delete {len(sessions)} session(s) for ever?", abort=True, err=True)
    with connect.client(server, timeout) as client:
        for session in sessions:
            deleted = client.delete_session(session, user_id=user)
            if as_json:
                output.print_json({"session_id": session, "deleted": deleted})
            else:
                print(f"{output.printable(session)}  {'deleted' if deleted else 'was deleted before'}")
