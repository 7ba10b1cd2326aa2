"""`sessiond rebuild`: makes a stopped node's hot tier anew from the cloud tier, and says what may be missing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from sessiond.cli import exits, output, settings


@click.command()
@click.option("--all", "every", is_flag=True, help="Take released sessions as well, not only those of this node.")
@click.option("--user", metavar="U", help="Only this user's sessions.")
@click.option("--limit", type=click.IntRange(min=1), default=None, metavar="N", help="Claim at most N sessions.")
@click.option(
    "--abandon-unflushed", is_flag=True, help="Go on although only the old hot tier has some acknowledged turns."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings.options()
def command(
    every: bool,
    user: str | None,
    limit: int | None,
    abandon_unflushed: bool,
    as_json: bool,
    config_path: str | None,
    **given: Any,
) -> int:
    """Move the hot tier in --data-dir aside, make a new one, and fill it with this node's sessions.

    The node's daemon must be stopped. It refuses where the old hot tier has acknowledged turns that the cloud tier
    lacks. It can be killed and run again. Exit code 0 if every session is in and whole, 9 if some may lack turns or
    could not be read.
    """
    loaded = settings.load(config_path, given)
    settings.require_cloud_tier(loaded)
    from sessiond import rebuild

    progress = output.Progress(lines=True)
    report = rebuild.rebuild(
        loaded, every=every, user=user, limit=limit or 0, abandon_unflushed=abandon_unflushed, told=progress
    )
    progress.done()
    if as_json:
        output.print_json(asdict(report))
    else:
        _show(report)
    return exits.INCOMPLETE if report.may_miss or report.unreadable else exits.OK


def _show(report: Any) -> None:
    if report.continued:
        print("continued a rebuild that had been cut short")
    if report.aside:
        print(f"the old hot tier is in {report.aside}")
    if report.abandoned[0]:
        print(f"{report.abandoned[1]} turns of {report.abandoned[0]} sessions are there and nowhere else")
    print(f"{report.claimed} sessions claimed, {report.may_miss} of them may lack turns, {report.already} held already")
    print(f"left alone: {report.released} released, {report.of_other_nodes} of other nodes, {report.deleted} deleted")
    for h, reason, message in report.unreadable:
        print(f"not read: {h}: {reason}: {output.printable(message)}")
    if report.limited:
        print("the limit was reached; run it again with a higher one for the rest, or let the daemon take them")
