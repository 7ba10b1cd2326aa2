"""`sessiond doctor`: every precondition of a daemon tried by hand, a line for each: what was seen and what to do."""

from __future__ import annotations

from typing import Any

import click

from sessiond.cli import exits, output, settings
from sessiond.errors import Corrupt, SessiondError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@settings.options()
def command(as_json: bool, config_path: str | None, **given: Any) -> int:
    """Check settings, installation, disk, hot tier, address, cloud tier and bucket, beside a daemon or without one.

    Takes the options of serve, so that it checks what serve would start with. Exit code 0 if nothing failed, else that
    of the first failure. It changes nothing but probe objects and files of its own, which it removes.
    """
    try:
        loaded = settings.load(config_path, given)
    except SessiondError as error:
        return _end([_row("settings", "FAIL", error.message, error.remedy, error)], as_json)
    try:
        from sessiond import doctor
    except ImportError as error:
        # The compiled core, as a rule: a daemon without it does not start either.
        told = Corrupt("INTERNAL", f"Part of the installation is missing: {error}.", remedy="Install sessiond again.")
        return _end([_row("installation", "FAIL", told.message, told.remedy, told)], as_json)
    rows = [_row("settings", "PASS", f"node {loaded.node!r}, data in {loaded.data_dir}, cloud {loaded.cloud_url}")]
    if not as_json:
        _print(rows[0])
    for check in doctor.examine(loaded):
        rows.append(_row(check.name, check.outcome, check.seen, check.remedy, check.error))
        if not as_json:
            _print(rows[-1])
    return _end(rows, as_json, shown=True)


def _row(name: str, outcome: str, seen: str, remedy: str = "", error: SessiondError | None = None) -> dict[str, Any]:
    return {
        "check": name,
        "outcome": outcome,
        "seen": seen,
        "remedy": remedy,
        "reason": error.reason if error else "",
        "exit_code": exits.code_of(error) if error else exits.OK,
    }


def _print(row: dict[str, Any]) -> None:
    reason = f" ({row['reason']})" if row["reason"] else ""
    print(f"{row['outcome']}  {row['check']}: {output.printable(row['seen'])}{reason}", flush=True)
    if row["remedy"]:
        print(f"      {output.printable(row['remedy'])}", flush=True)


def _end(rows: list[dict[str, Any]], as_json: bool, shown: bool = False) -> int:
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("PASS", "WARN", "FAIL")}
    if as_json:
        output.print_json({"checks": rows, "counts": {name.lower(): count for name, count in counts.items()}})
    else:
        for row in () if shown else rows:
            _print(row)
        print(f"{counts['PASS']} passed, {counts['WARN']} warnings, {counts['FAIL']} failed")
    return next((int(row["exit_code"]) for row in rows if row["outcome"] == "FAIL"), exits.OK)
