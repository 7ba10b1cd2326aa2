"""`sessiond state`: versioned blobs of a session or of a user, by hand or from a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sessiond.cli import connect, exits, output, ranges
from sessiond.errors import Invalid
from sessiond.v1 import context_pb2, state_pb2, turn_pb2

Command = TypeVar("Command", bound=Callable[..., Any])


def _scoped(command: Command) -> Command:
    """Add --session and --user: one of them says whose blobs are meant."""
    command = click.option(
        "--user", default="", metavar="U", help="The user whose blobs are meant; with --session, whose it must be."
    )(command)
    return click.option("--session", default="", metavar="ID", help="The session whose blobs are meant.")(command)


def _durable(command: Command) -> Command:
    return click.option(
        "--durability", type=click.Choice(["edge", "cloud"]), help="How safe it must be.  [default: the policy's]"
    )(command)


def _as_json(command: Command) -> Command:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def _check_scope(session: str, user: str) -> None:
    if not session and not user:
        raise click.UsageError("Say whose blobs are meant: --session ID or --user U.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Read, write, delete and list versioned blobs beside a session or a user."""


@command.command()
@click.argument("key")
@_scoped
@click.option("--out", metavar="FILE", help="Write the content there.  [default: standard output]")
@_as_json
@connect.options
def get(key: str, session: str, user: str, out: str | None, as_json: bool, server: str | None, timeout: float) -> int:
    """Print the content of the blob KEY, or with --json its header. Exit code 9 if a newer write may be missing."""
    _check_scope(session, user)
    with connect.client(server, timeout) as client:
        found = client.get_state(key, session_id=session, user_id=user)
    if as_json:
        output.print_json({"header": output.plain(found.header), "missing": [output.plain(m) for m in found.missing]})
    elif out is None:
        sys.stdout.buffer.write(found.content)
        sys.stdout.buffer.flush()
    if out is not None:
        try:
            Path(out).write_bytes(found.content)
        except OSError as error:
            what = error.strerror or type(error).__name__
            raise Invalid("INVALID_INPUT_FILE", f"{out} can't be written: {what}.", fields=[("--out", what)]) from error
    return _told(found.missing)


@command.command()
@click.argument("key")
@click.argument("file", metavar="FILE")
@_scoped
@click.option("--expected", type=ranges.UINT64, metavar="V", help="Only over this version; 0 if there is none.")
@click.option("--media-type", default="", metavar="T", help="What it is, such as application/json.")
@click.option("--label", "labels", multiple=True, metavar="NAME=VALUE", help="A label; may be given several times.")
@_durable
@click.option(
    "--write-id", default="", metavar="ID", help="Idempotency key; the same again changes nothing.  [default: minted]"
)
@_as_json
@connect.options
def put(
    key: str,
    file: str,
    session: str,
    user: str,
    expected: int | None,
    media_type: str,
    labels: tuple[str, ...],
    durability: str | None,
    write_id: str,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> None:
    """Write the content of FILE (- is standard input) as the blob KEY, and print its version."""
    _check_scope(session, user)
    for label in labels:
        if "=" not in label:
            raise click.UsageError(f"{label!r} is no label: say NAME=VALUE.")
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        what = error.strerror or type(error).__name__
        raise Invalid("INVALID_INPUT_FILE", f"{file} can't be read: {what}.", fields=[("FILE", what)]) from error
    with connect.client(server, timeout) as client:
        header = client.put_state(
            key,
            content,
            session_id=session,
            user_id=user,
            expected_version=expected,
            media_type=media_type,
            labels=dict(label.split("=", 1) for label in labels),
            durability=(durability or "").upper(),
            write_id=write_id,
        )
    if as_json:
        output.print_json(output.plain(header))
    else:
        print(f"{header.version}  {output.enum_text(turn_pb2.Durability, header.durability, 'DURABILITY_').upper()}")


@command.command()
@click.argument("key")
@_scoped
@click.option("--expected", type=ranges.UINT64_FROM_1, metavar="V", help="Only this version.")
@_durable
@_as_json
@connect.options
def delete(
    key: str,
    session: str,
    user: str,
    expected: int | None,
    durability: str | None,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> None:
    """Delete the blob KEY."""
    _check_scope(session, user)
    with connect.client(server, timeout) as client:
        deleted = client.delete_state(
            key,
            session_id=session,
            user_id=user,
            expected_version=expected,
            durability=(durability or "").upper(),
        )
    if as_json:
        output.print_json({"key": key, "deleted": deleted})
    else:
        print("deleted" if deleted else "there was none")


@command.command(name="list")
@_scoped
@click.option("--prefix", default="", metavar="P", help="Only keys that start with this.")
@click.option(
    "--accept-missing", type=ranges.UINT32, metavar="EPOCH", help="Go on without what may be missing up to it."
)
@_as_json
@connect.options
def list_(
    session: str,
    user: str,
    prefix: str,
    accept_missing: int | None,
    as_json: bool,
    server: str | None,
    timeout: float,
) -> int:
    """List blobs by key, without their content. Exit code 9 if a write may be missing."""
    _check_scope(session, user)
    headers: list[state_pb2.StateHeader] = []
    token = ""
    with connect.client(server, timeout) as client:
        while True:
            page = client.list_states_page(
                session_id=session, user_id=user, key_prefix=prefix, page_token=token, accept_missing=accept_missing
            )
            headers += page.headers
            token = page.next_page_token
            if not token:
                break
    if as_json:
        for header in headers:
            print(json.dumps(output.plain(header), ensure_ascii=False))
    else:
        rows = [
            (
                header.key,
                header.version,
                header.size_bytes,
                output.time_text(header.updated_at_unix_ms),
                output.enum_text(turn_pb2.Durability, header.durability, "DURABILITY_").upper(),
                header.media_type or "-",
            )
            for header in headers
        ]
        output.table(("key", "version", "bytes", "written", "durability", "media type"), rows, ("version", "bytes"))
    return _told(page.missing)


def _told(missing: Any) -> int:
    """Say what may be missing; the exit code."""
    for lost in missing:
        why = output.enum_text(context_pb2.MissingReason, lost.reason, "MISSING_REASON_").replace("_", " ")
        what = f"writes above version {lost.after_version} may be missing since epoch {lost.epoch}: {why}"
        print(f"sessiond: {what}", file=sys.stderr)
    return exits.INCOMPLETE if missing else exits.OK
