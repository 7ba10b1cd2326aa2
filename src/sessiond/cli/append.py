"""`sessiond append`: one message to a session, by hand or from a script; prints where it stands and how safe it is."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

from sessiond.cli import connect, output
from sessiond.errors import Invalid, Unavailable
from sessiond.v1 import turn_pb2

POSITION = re.compile(r"([0-9]{1,10}):([0-9]{1,20})")
# A chain is 16 bytes.
POSITION_AND_CHAIN = re.compile(POSITION.pattern + r"(?::([0-9a-fA-F]{32}))?")
CHAIN_FORM = "[:CHAINHEX] with 32 hexadecimal digits"
ROLES = ("user", "assistant", "system", "developer")


@click.command()
@click.argument("session")
@click.option("--role", type=click.Choice(ROLES), default="user", show_default=True, help="Who speaks.")
@click.option("--text", metavar="T", help="What is said.")
@click.option("--message", metavar="JSON", help="A whole OpenAI chat message; @FILE reads it from a file.")
@click.option(
    "--file", "file", metavar="F", help="A file with what is said; - is standard input, as without any of these."
)
@click.option(
    "--turn-id", metavar="ID", default="", help="Idempotency key; the same again changes nothing.  [default: minted]"
)
@click.option("--expected", metavar="EPOCH:SEQ", help="Append only if this is the newest turn; an epoch of 0 is any.")
@click.option(
    "--durability", type=click.Choice(["edge", "cloud"]), help="How safe it must be.  [default: the policy's]"
)
@click.option("--create", is_flag=True, help="Make the session first if there is none.")
@click.option("--user", default="", metavar="U", help="The user whose session it must be.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@connect.options
def command(
    session: str,
    role: str,
    text: str | None,
    message: str | None,
    file: str | None,
    turn_id: str,
    expected: str | None,
    durability: str | None,
    create: bool,
    user: str,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> None:
    """Append one message to SESSION and print its position."""
    if sum(source is not None for source in (text, message, file)) > 1:
        raise click.UsageError("Give one of --text, --message and --file.")
    turn = _turn(role, text, message, file, turn_id)
    position = parse_position(expected, "--expected") if expected is not None else None
    with connect.client(server, timeout) as client:
        if create:
            client.create_session(session, user_id=user)
        try:
            done = client.append(
                session, [turn], expected=position, durability=(durability or "").upper(), user_id=user
            )
        except Unavailable as error:
            # It may be on the node's disk: whoever says it again must be able to say that it is the same.
            error.metadata["turn_id"] = turn.turn_id
            error.remedy = f"{error.remedy} The same turn: --turn-id {turn.turn_id}"
            raise
    if as_json:
        output.print_json(output.plain(done.proto))
        return
    placed = done.turns[0]
    output.facts(
        [
            ("outcome", done.outcome.lower()),
            ("position", f"{placed.position.epoch}:{placed.position.seq}"),
            ("chain", placed.position.chain.hex() or "-"),
            ("turn_id", placed.turn_id),
            ("tokens", f"{placed.tokens_o200k} o200k_base, {placed.tokens_cl100k} cl100k_base"),
            ("durability", done.durability.lower()),
            ("cloud_seq", done.cloud_seq),
        ]
    )
    if done.missing:
        print(f"sessiond: turns of session {session} may be missing; see sessiond show {session}", file=sys.stderr)


def _turn(role: str, text: str | None, message: str | None, file: str | None, turn_id: str) -> turn_pb2.TurnInput:
    from sessiond.client import from_openai

    if message is not None:
        source = _read(message[1:], "--message") if message.startswith("@") else message
        try:
            value: Any = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise Invalid(
                "INVALID_TURN", f"--message is not JSON: {error}.", fields=[("message", str(error))]
            ) from error
        if not isinstance(value, dict):
            raise Invalid("INVALID_TURN", "--message is not a JSON object.", fields=[("message", "no object")])
    else:
        value = {"role": role, "content": _read(file or "-", "--file") if text is None else text}
    return from_openai(value, turn_id=turn_id)


def _read(path: str, option: str) -> str:
    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode()
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise Invalid(
            "INVALID_INPUT_FILE", f"{option}: {path} can't be read: {what}.", fields=[(option, what)]
        ) from error
    except UnicodeDecodeError as error:
        raise Invalid("INVALID_UTF8", f"{option}: {path} is not UTF-8.", fields=[(option, "not UTF-8")]) from error


def parse_position(text: str, option: str, *, chain: bool = False) -> turn_pb2.TurnPosition:
    """EPOCH:SEQ, with `chain` also EPOCH:SEQ:CHAINHEX. Raises UsageError."""
    found = (POSITION_AND_CHAIN if chain else POSITION).fullmatch(text)
    if found is None or int(found[1]) >= 2**32 or int(found[2]) >= 2**64:
        raise click.UsageError(f"{option} is {text!r}, not EPOCH:SEQ{CHAIN_FORM if chain else ''}.")
    return turn_pb2.TurnPosition(
        epoch=int(found[1]), seq=int(found[2]), chain=bytes.fromhex(found[3] or "") if chain else b""
    )
