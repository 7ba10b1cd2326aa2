"""`sessiond verify`: runs every invariant over a node's hot tier and its cloud tier, and explains what is broken."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from sessiond.cli import exits, output, settings

PROGRESS_EVERY_S = 0.5


class _Progress:
    """Counts on standard error: one moving line on a terminal, nothing elsewhere."""

    def __init__(self) -> None:
        self.total = 0
        self._shown_at = 0.0
        self._on_terminal = sys.stderr.isatty()

    def __call__(self, checked: int, total: int) -> None:
        self.total = total
        now = time.monotonic()
        if self._on_terminal and (checked == total or now - self._shown_at > PROGRESS_EVERY_S):
            self._shown_at = now
            end = "\n" if checked == total else ""
            print(f"\rchecked {checked} of {total} sessions", end=end, file=sys.stderr, flush=True)


@click.command()
@click.option("--session", metavar="ID", help="Check only this session.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings.options(*settings.TIERS)
def command(session: str | None, as_json: bool, config_path: str | None, **given: Any) -> int:
    """Run the invariants over the hot tier and the cloud tier, reading every segment; safe beside a running daemon.

    It changes nothing. Exit code 0 if everything holds, 1 if something does not; each violation says which invariant,
    which session, what was found and what to do.
    """
    loaded = settings.load(config_path, given)
    settings.require_cloud_tier(loaded)
    from sessiond import verify

    progress = _Progress()
    violations = verify.verify(loaded, progress, session)
    if as_json:
        rows = [
            {"invariant": found.invariant, "session_id": found.session_id, "explanation": found.explanation}
            for found in violations
        ]
        output.print_json({"checked_sessions": progress.total, "violations": rows})
    else:
        for found in violations:
            print(f"{found.invariant}  {output.printable(found.session_id)}  {output.printable(found.explanation)}")
        print(f"{progress.total} sessions checked, {len(violations)} violations")
    return exits.INTERNAL if violations else exits.OK
