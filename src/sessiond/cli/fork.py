"""`sessiond fork`: a new session that begins with the turns of another one."""

from __future__ import annotations

import click

from sessiond.cli import connect, output, ranges
from sessiond.cli.append import parse_position


@click.command()
@click.argument("session")
@click.argument("new", required=False, default="")
@click.option("--at", type=ranges.UINT64_FROM_1, metavar="SEQ", help="The last turn to share.  [default: the newest]")
@click.option("--checkpoint", metavar="EPOCH:SEQ", help="The checkpoint to fork at, as sessiond show prints it.")
@click.option("--user", default="", metavar="U", help="The user whose session it must be.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(
    session: str,
    new: str,
    at: int | None,
    checkpoint: str | None,
    user: str,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> None:
    """Make the session NEW with the turns of SESSION up to one of them; each goes its own way from there.

    Without NEW it gets a fresh UUID. The same command again finds the fork that it made. Nothing is copied in the cloud
    tier: the fork names the segments of SESSION, and they stay for as long as the fork does.
    """
    if at is not None and checkpoint is not None:
        raise click.UsageError("Give one of --at and --checkpoint.")
    version = 0
    if checkpoint is not None:
        position = parse_position(checkpoint, "--checkpoint")
        version = position.epoch << 32 | position.seq
    with connect.client(server, timeout) as client:
        if at is None and checkpoint is None:
            at = client.get_session(session, user_id=user).head.seq
        fork = client.fork_session(session, new, seq=at or 0, checkpoint_version=version, user_id=user)
    if as_json:
        output.print_json(output.plain(fork))
        return
    where = f"{fork.forked_at.epoch}:{fork.forked_at.seq}"
    print(f"{output.printable(fork.session_id)}  forked from {output.printable(session)} at {where}")
