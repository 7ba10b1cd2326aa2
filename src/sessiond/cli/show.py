"""`sessiond show`: one session without its turns, and its checkpoints."""

from __future__ import annotations

import json

import click

from sessiond.cli import connect, output
from sessiond.cli.export import missing_text
from sessiond.v1 import context_pb2, session_pb2, turn_pb2


@click.command()
@click.argument("session")
@click.option("--user", default="", metavar="U", help="The user whose session it must be.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(session: str, user: str, as_json: bool, server: str | None, timeout: float) -> None:
    """Show SESSION: where it stands, its state, its policy, and its newest checkpoints."""
    with connect.client(server, timeout) as client:
        found = client.get_session(session, user_id=user)
        checkpoints = client.list_checkpoints(session, user_id=user)
    if as_json:
        output.print_json(
            {"session": output.plain(found), "checkpoints": [output.plain(checkpoint) for checkpoint in checkpoints]}
        )
        return
    output.facts(_facts(found))
    print()
    output.table(
        ("checkpoint", "taken", "exchanges", "tail from", "milestone", "digest"),
        [
            (
                f"{header.version >> 32}:{header.version & 0xFFFFFFFF}",
                output.time_text(header.taken_at_unix_ms),
                header.exchanges,
                header.tail_first_seq,
                header.milestone or "-",
                header.digest.hex(),
            )
            for header in (checkpoint.header for checkpoint in checkpoints)
        ],
        right=("exchanges", "tail from"),
    )


def _facts(found: session_pb2.Session) -> list[tuple[str, object]]:
    facts: list[tuple[str, object]] = [
        ("session", found.session_id),
        ("user", found.user_id or "-"),
        ("lifecycle", output.enum_text(session_pb2.Lifecycle, found.lifecycle, "LIFECYCLE_")),
        ("created", output.time_text(found.created_at_unix_ms)),
        ("newest turn", f"{found.head.epoch}:{found.head.seq}  {output.time_text(found.last_append_at_unix_ms)}"),
        ("cloud_seq", found.cloud_seq),
        ("messages", f"{found.live_messages} in force"),
        ("tokens", f"{found.live_tokens_o200k} o200k_base, {found.live_tokens_cl100k} cl100k_base"),
        ("owner", f"{found.owner_node or 'nobody'}, epoch {found.epoch}"),
        ("ownership", output.enum_text(context_pb2.Ownership, found.ownership, "OWNERSHIP_").upper()),
        ("policy", _policy(found.policy)),
        ("mode", found.state.mode or "-"),
        ("etag", found.state.etag),
    ]
    facts += [("flag", name) for name, is_set in sorted(found.state.flags.items()) if is_set]
    facts += [
        ("metadata", f"{key} = {output.start_of(value, 80)}") for key, value in sorted(found.state.metadata.items())
    ]
    facts += [("pin", f"{pin.key} = {output.start_of(pin.value, 80)}") for pin in found.pins]
    facts += [("missing", missing_text(lost)) for lost in found.missing]
    if found.forked_from_session_id:
        facts.append(("forked from", f"{found.forked_from_session_id} at {found.forked_at.seq}"))
    if found.reset_of_session_id:
        facts.append(("in the place of", found.reset_of_session_id))
    return facts


def _policy(policy: turn_pb2.SessionPolicy) -> str:
    said = {
        name: value for name, value in output.plain(policy).items() if value and not str(value).endswith("UNSPECIFIED")
    }
    return json.dumps(said) if said else "the defaults"
