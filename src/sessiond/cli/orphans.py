"""`sessiond orphans`: acknowledged turns that are not in a session's log, and appending them again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from sessiond.cli import connect, exits, output
from sessiond.cli.resume import message_text
from sessiond.v1 import turn_pb2

if TYPE_CHECKING:
    from sessiond.client import Reappended

NOT_TRIED = "not tried: it acts on the rest of the session"


@click.command()
@click.argument("session")
@click.option("--reappend", is_flag=True, help="Append the messages and milestones among them again.")
@click.option("--user", default="", metavar="U", help="The user whose session it must be.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(session: str, reappend: bool, user: str, as_json: bool, server: str | None, timeout: float) -> int:
    """Show the turns that a node had acknowledged for SESSION before another took over and went on without them.

    With --reappend those that only say something (messages of user, assistant and tool, milestones) are appended again,
    at the end, under their own turn_ids; the others are named. Exit code 9 if some could not be appended.
    """
    outcome: Reappended | None = None
    with connect.client(server, timeout) as client:
        turns = list(client.list_orphans(session, user_id=user))
        if reappend:
            outcome = client.reappend(session, user_id=user)
    if as_json:
        output.print_json(_as_json(turns, outcome))
    elif outcome is None:
        output.table(("epoch:seq", "kind", "appended", "turn_id", "text"), [_row(turn) for turn in turns])
    else:
        for done in outcome.appended:
            print(f"{done.turn_id}  {done.position.epoch}:{done.position.seq}")
        for turn, error in outcome.left:
            why = exits.line_of(error) if error is not None else NOT_TRIED
            print(f"sessiond: {turn.turn_id} ({_kind(turn)}): {output.printable(why)}", file=sys.stderr)
    return exits.INCOMPLETE if outcome is not None and outcome.left else exits.OK


def _kind(turn: turn_pb2.Turn) -> str:
    if turn.HasField("message"):
        return output.enum_text(turn_pb2.Role, turn.role, "ROLE_")
    return output.enum_text(turn_pb2.TurnKind, turn.kind, "TURN_KIND_")


def _row(turn: turn_pb2.Turn) -> tuple[object, ...]:
    text = message_text(turn.message) or turn.summary.text or turn.milestone.label
    at = output.time_text(turn.append_time_unix_ms)
    return f"{turn.epoch}:{turn.seq}", _kind(turn), at, turn.turn_id, output.start_of(text)


def _as_json(turns: list[turn_pb2.Turn], outcome: Reappended | None) -> dict[str, object]:
    told: dict[str, object] = {"turns": [output.plain(turn) for turn in turns]}
    if outcome is not None:
        told["appended"] = [output.plain(done) for done in outcome.appended]
        told["left"] = [
            {"turn_id": turn.turn_id, "kind": _kind(turn), "reason": error.reason if error is not None else ""}
            for turn, error in outcome.left
        ]
    return told
