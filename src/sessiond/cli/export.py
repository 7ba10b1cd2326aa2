"""`sessiond export`: sessions as the JSON lines that import takes, equal message by message to what was imported.

It never presents a session with a gap as whole, and leaves out only what a rewind superseded and what is no message.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import click

from sessiond.cli import connect, exits, output
from sessiond.cli.lines import line_of
from sessiond.errors import Corrupt, Exhausted, SessiondError, Unavailable
from sessiond.v1 import context_pb2, session_pb2

if TYPE_CHECKING:
    from sessiond.client import Client

PAGE_TURNS: Final = 1000
PAGE_SESSIONS: Final = 200
# Sessions that are read while one is written: what bounds memory.
AHEAD_MAX: Final = 8
INCOMPLETE_LIST: Final = "the cloud tier can't be reached: there may be sessions that this node does not hold"


@dataclass(slots=True)
class Exported:
    """One session as a line, or why it can't be one. missing: ranges that are, or may be, missing from it."""

    session_id: str
    line: str = ""
    missing: Sequence[context_pb2.MissingRange] = field(default_factory=list)
    error: SessiondError | None = None


@click.command()
@click.argument("sessions", nargs=-1, metavar="[SESSION]...")
@click.option("--user", metavar="U", help="All sessions of this user.")
@click.option("--all", "everything", is_flag=True, help="All sessions; what happens without a session or user anyway.")
@click.option("--allow-missing", is_flag=True, help="Exit with 0 although turns are, or may be, missing.")
@click.option("--json", "as_json", is_flag=True, help="Tell errors as JSON, too; the lines are JSON anyway.")
@connect.options
def command(
    sessions: tuple[str, ...],
    user: str | None,
    everything: bool,
    allow_missing: bool,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> int:
    """Write sessions to standard output as the JSON lines that import takes: all of them, a user's, or those named.

    Ordered by creation time, then id; named ones as they are named. State changes, summaries and milestones are no
    messages and are left out, as are messages that a rewind superseded.

    Exit code 9 if a session could not be read, or turns of one are, or may be, missing; standard error names them.
    """
    del as_json  # `app` reads it where it tells an error
    if sessions and (user is not None or everything):
        raise click.UsageError("Name sessions, or give --user or --all.")
    failed = 0
    with connect.client(server, timeout) as client:
        if sessions:
            for name in sessions:
                # Before anything is written: a misspelled id is not half an export.
                with contextlib.suppress(Corrupt):  # left out and named below
                    client.get_session(name)
            wanted = list(sessions)
        else:
            wanted, unreadable, incomplete = _listed(client, user)
            failed += len(unreadable) + incomplete
            if incomplete:
                _say(INCOMPLETE_LIST)
            for row in unreadable:
                _say(f"session {row.session_id or '(id unreadable)'} can't be read: {row.reason}")
        for exported in _in_order(client, wanted):
            if exported.error is not None:
                failed += 1
                _say(f"session {exported.session_id} left out: {exits.line_of(exported.error)}")
                continue
            for lost in exported.missing:
                _say(f"session {exported.session_id}: {missing_text(lost)}")
            failed += 1 if exported.missing and not allow_missing else 0
            print(exported.line)
    return exits.INCOMPLETE if failed else exits.OK


def _say(text: str) -> None:
    print(f"sessiond: {output.printable(text)}", file=sys.stderr, flush=True)


def missing_text(lost: context_pb2.MissingRange) -> str:
    """What may be missing, in words."""
    reason = output.enum_text(context_pb2.MissingReason, lost.reason, "MISSING_REASON_").replace("_", " ")
    last = f"to {lost.last_seq}" if lost.last_seq else "on"
    verb = "may be" if lost.possible_only else "are"
    return f"turns from {lost.first_seq} {last} of epoch {lost.epoch} {verb} missing: {reason}"


def _listed(client: Client, user: str | None) -> tuple[list[str], list[session_pb2.UnreadableSession], bool]:
    """(ids ordered by creation time, then id; what is listed but can't be read; whether others may exist)."""
    # A set, for a session that is made while it is listed may be listed twice.
    found: set[tuple[int, str]] = set()
    unreadable: list[session_pb2.UnreadableSession] = []
    token, incomplete = "", False
    while True:
        page = client.list_sessions_page(user, page_size=PAGE_SESSIONS, page_token=token)
        found.update((session.created_at_unix_ms, session.session_id) for session in page.sessions)
        unreadable += page.unreadable
        incomplete = incomplete or page.incomplete
        token = page.next_page_token
        if not token:
            return [session_id for _, session_id in sorted(found)], unreadable, incomplete


def _in_order(client: Client, ids: Iterable[str]) -> Iterator[Exported]:
    """Each session in the order of its id, read a few ahead."""
    with ThreadPoolExecutor(AHEAD_MAX, thread_name_prefix="export") as pool:
        ahead: deque[Future[Exported]] = deque()
        try:
            for session_id in ids:
                ahead.append(pool.submit(_exported, client, session_id))
                if len(ahead) >= AHEAD_MAX:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _exported(client: Client, session_id: str) -> Exported:
    """One session. Raises Unavailable, which ends the export: every other session would meet it too."""
    try:
        session = client.get_session(session_id)
        messages, missing = read_messages(client, session_id)
    except (Unavailable, Exhausted):
        raise
    except SessiondError as error:
        return Exported(session_id, error=error)
    return Exported(session_id, line_of(session, messages), missing)


def read_messages(client: Client, session_id: str) -> tuple[list[Any], list[context_pb2.MissingRange]]:
    """(messages in force, instructions included, oldest first; what is or may be missing). Raises SessiondError."""
    from sessiond.client.formats import openai

    in_force: list[tuple[int, list[Any]]] = []
    missing: list[context_pb2.MissingRange] = []
    token, due = "", 1
    while True:
        page = client.list_turns_page(session_id, page_size=PAGE_TURNS, page_token=token)
        for turn in page.turns:
            if turn.seq != due:
                missing.append(context_pb2.MissingRange(first_seq=due, last_seq=turn.seq - 1))
            due = turn.seq + 1
            if turn.HasField("rewind"):
                while in_force and in_force[-1][0] > turn.rewind.to_seq:
                    in_force.pop()
            elif turn.HasField("message"):
                in_force.append((turn.seq, openai.turn_to_messages(turn)))
        token = page.next_page_token
        if not token:
            missing += page.receipt.missing
            return [message for _, messages in in_force for message in messages], missing
