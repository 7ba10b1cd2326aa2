"""`sessiond verify`: runs every invariant over a node's hot tier and its cloud tier, and explains what is broken."""

from __future__ import annotations

import re
from typing import Any, Final

import click

from sessiond.cli import exits, output, settings

# What repair never touches: it has no other source.
_HISTORY: Final = re.compile(r"\b[msob]/[0-9a-f]{32}|\b(manifest|segment|orphan)\b")


@click.command()
@click.option("--session", metavar="ID", help="Check only this session.")
@click.option("--progress", is_flag=True, help="Tell every few seconds how far it has come, also without a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings.options(*settings.TIERS)
def command(session: str | None, progress: bool, as_json: bool, config_path: str | None, **given: Any) -> int:
    """Run the invariants over the hot tier and the cloud tier, reading every segment; safe beside a running daemon.

    It changes nothing. Exit code 0 if everything holds, 1 if something does not; each violation says which invariant,
    which session, what was found and what to do.
    """
    loaded = settings.load(config_path, given)
    settings.require_cloud_tier(loaded)
    from sessiond import verify

    shown = output.Progress(lines=progress)
    report = verify.Report()
    verify.verify(loaded, lambda checked, _: shown(f"checked {checked} sessions"), session, report=report)
    shown.done()
    objects, size = report.garbage
    if as_json:
        rows = [
            {"invariant": found.invariant, "session_id": found.session_id, "explanation": found.explanation}
            for found in report.violations
        ]
        counts = {"archived_sessions": report.archived, "deleted_sessions": report.deleted}
        garbage = {"unnamed_objects": objects, "unnamed_bytes": size}
        output.print_json({"checked_sessions": report.checked, "violations": rows, **counts, **garbage})
    else:
        for found in report.violations:
            name = output.printable(found.session_id) or "-"
            print(f"{found.invariant}  {name}  {output.printable(found.explanation)}")
        if objects:
            print(f"{objects} objects ({output.bytes_text(size)}) that no manifest names; they harm nothing")
        print(f"{report.checked} sessions checked, {len(report.violations)} violations")
        if report.violations:
            print(_what_to_do([found.explanation for found in report.violations]))
    return exits.INTERNAL if report.violations else exits.OK


def _what_to_do(explanations: list[str]) -> str:
    """One line, which names only what applies: rows can be made again, history can only be put back."""
    history = [bool(_HISTORY.search(text)) for text in explanations]
    steps = []
    if not all(history):
        steps.append("rows of the hot tier and of the indexes: stop the daemon and run sessiond repair")
    if any(history):
        steps.append("objects of the cloud tier: put the sound older version back, see docs/s3.md")
    return f"What to do: {'; '.join(steps)}"
