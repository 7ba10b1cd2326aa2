"""`sessiond sessions`: the list of sessions, a user's or all, page by page so that it never holds more than one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import click

from sessiond.cli import connect, exits, output
from sessiond.cli.export import INCOMPLETE_LIST
from sessiond.v1 import context_pb2, session_pb2

PAGE_SESSIONS = 200
COLUMNS = ("session", "user", "turns", "tokens", "created", "newest", "state")


@click.command()
@click.option("--user", metavar="U", help="Only this user's.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object a line.")
@connect.options
def command(user: str | None, limit: int | None, as_json: bool, server: str | None, timeout: float) -> int:
    """List sessions, a user's oldest first. Exit code 9 if one can't be read, or there may be others."""
    unreadable: list[session_pb2.UnreadableSession] = []
    incomplete = False
    with connect.client(server, timeout) as client:

        def all_pages() -> Iterator[session_pb2.Session]:
            nonlocal incomplete
            token, left = "", limit
            while left is None or left > 0:
                size = PAGE_SESSIONS if left is None else min(left, PAGE_SESSIONS)
                page = client.list_sessions_page(user, page_size=size, page_token=token)
                unreadable.extend(page.unreadable)
                incomplete = incomplete or page.incomplete
                yield from page.sessions
                left = None if left is None else left - len(page.sessions)
                token = page.next_page_token
                if not token:
                    return

        if as_json:
            for session in all_pages():
                print(json.dumps(output.plain(session), ensure_ascii=False))
        else:
            output.table(COLUMNS, [_row(session) for session in all_pages()], right=("turns", "tokens"))
    for row in unreadable:
        print(f"sessiond: session {row.session_id or '(id unreadable)'}: {row.reason}", file=sys.stderr)
    if incomplete:
        print(f"sessiond: {INCOMPLETE_LIST}", file=sys.stderr)
    return exits.INCOMPLETE if unreadable or incomplete else exits.OK


def _row(session: session_pb2.Session) -> tuple[object, ...]:
    return (
        session.session_id,
        session.user_id or "-",
        session.head.seq,
        session.live_tokens_o200k,
        output.time_text(session.created_at_unix_ms),
        output.time_text(session.last_append_at_unix_ms),
        _standing(session),
    )


def _standing(session: session_pb2.Session) -> str:
    if any(lost.reason != context_pb2.MISSING_REASON_OWNER_UNREACHABLE for lost in session.missing):
        return "may lack turns"
    if session.missing:
        # A list asks no other node: what its owner has flushed is shown, and it may have more.
        return f"as {output.printable(session.owner_node)} flushed it"
    return "in the cloud tier" if session.cloud_seq >= session.head.seq else "-"
