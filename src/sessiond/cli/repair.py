"""`sessiond repair`: moves damaged things aside on a stopped node, and says what it moved and what it left."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from sessiond.cli import exits, output, settings


@click.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be moved.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings.options()
def command(dry_run: bool, as_json: bool, config_path: str | None, **given: Any) -> int:
    """Move what is damaged aside: a hot tier that can't be opened, sessions with damaged rows, rows of the indexes.

    The node's daemon must be stopped. Nothing is removed before a copy of it is durable, what is sound is left alone,
    and manifests and segments are never touched: those that are damaged are named with what to do. Exit code 0 if
    nothing is damaged any more, 6 if something is left that only a backup can mend.
    """
    loaded = settings.load(config_path, given)
    settings.require_cloud_tier(loaded)
    from sessiond import repair

    progress = output.Progress()
    report = repair.repair(loaded, dry_run, progress)
    progress.done()
    if as_json:
        output.print_json(asdict(report))
    else:
        _show(report)
    return exits.CORRUPT if report.hurt else exits.OK


def _show(report: Any) -> None:
    verb = "would be moved" if report.dry_run else "moved"
    for moved in report.moved:
        to = f", {verb} to {moved.to}" if moved.to else ""
        damage = moved.damage.replace(".; ", "; ").rstrip(".")
        print(f"{moved.what} {output.printable(moved.name)}: {output.printable(damage)}{to}")
        if moved.unflushed:
            print(f"  {len(moved.unflushed)} acknowledged turns that the cloud tier lacks verify in that file")
        if moved.then and not report.dry_run:
            print(f"  {output.printable(moved.then)}")
    for hurt in report.hurt:
        print(f"left as it is: {output.printable(hurt.name)}: {output.printable(hurt.damage)}")
        print(f"  {output.printable(hurt.remedy)}")
    looked = report.looked
    print(
        f"{looked['hot_sessions']} sessions of the hot tier, {looked['manifests']} manifests and"
        f" {looked['index_rows']} rows of the indexes looked at; {len(report.moved)} {verb}, {len(report.hurt)} left"
    )
