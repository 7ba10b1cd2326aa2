"""`sessiond watch`: the turns of a session as they come, for as long as it lives."""

from __future__ import annotations

import json
import sys

import click

from sessiond.cli import connect, output, ranges
from sessiond.cli.export import missing_text
from sessiond.cli.resume import message_text
from sessiond.v1 import session_pb2, turn_pb2


@click.command()
@click.argument("session")
@click.option("--after", type=ranges.UINT64, metavar="SEQ", help="Begin behind this turn; 0 for all of them.")
@click.option("--user", default="", metavar="U", help="The user whose session it must be.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each turn, one a line.")
@connect.options
def command(session: str, after: int | None, user: str, as_json: bool, server: str | None, timeout: float) -> None:
    """Print the turns of SESSION as they are appended, until it is deleted; Ctrl-C ends it.

    It goes on by itself after a lost connection, and when the session moves to another node.
    """
    with connect.client(server, timeout) as client, client.watch(session, after=after, user_id=user) as watch:
        missing: list[str] = []
        for event in watch:
            _tell_changes(event)
            told = [missing_text(lost) for lost in event.missing]
            for text in told:
                if text not in missing:
                    _note(f"missing: {text}")
            if missing and not told and not event.deleted:
                _note("nothing is missing any more")
            missing = told
            for turn in event.turns:
                print(json.dumps(output.plain(turn), ensure_ascii=False) if as_json else _line(turn), flush=True)


def _tell_changes(event: session_pb2.WatchSessionResponse) -> None:
    if event.deleted:
        _note("the session was deleted")
    elif event.epoch_changed:
        first = event.turns[0].seq if event.turns else event.head.seq + 1
        _note(f"the session has a new owner; turns from {first} on that were shown before do not count")


def _note(text: str) -> None:
    print(f"sessiond: {text}", file=sys.stderr, flush=True)


def _line(turn: turn_pb2.Turn) -> str:
    what = output.enum_text(turn_pb2.Role, turn.role, "ROLE_") if turn.HasField("message") else ""
    what = what or output.enum_text(turn_pb2.TurnKind, turn.kind, "TURN_KIND_")
    if turn.HasField("message"):
        text = message_text(turn.message)
    elif turn.HasField("summary"):
        text = turn.summary.text
    elif turn.HasField("milestone"):
        text = turn.milestone.label
    elif turn.HasField("rewind"):
        text = f"back to {turn.rewind.to_seq}"
    else:
        text = ""
    return f"{turn.seq}  {what}  {output.printable(text)}".rstrip()
