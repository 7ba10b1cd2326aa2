"""The list of commands and what surrounds each: lazily imported, errors told once, exit codes.

Only click is imported here; a command's own needs load when it is called, so that `serve` starts fast.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

import click

from sessiond import __version__, errors
from sessiond.cli import exits
from sessiond.errors import SessiondError

# Name to one line of help; the code is in sessiond.cli.<name>, as `command`.
COMMANDS: Final = {
    "serve": "Run the daemon of this node.",
    "import": "Import conversations of the OpenAI chat format, one JSON line each.",
    "export": "Write sessions as the JSON lines that import takes.",
    "append": "Append one message to a session.",
    "resume": "Show the active context of a session within a token budget.",
    "sessions": "List sessions.",
    "show": "Show a session and its checkpoints.",
    "orphans": "Show acknowledged turns that are not in a session's log, and append them again.",
    "fork": "Make a session that begins with the turns of another one.",
    "watch": "Print the turns of a session as they come.",
    "delete": "Delete sessions for ever.",
    "state": "Read, write, delete and list blobs of a session or of a user.",
    "stats": "Show what a daemon is doing.",
    "flush": "Have a daemon write everything that its cloud tier lacks.",
    "release": "Have a daemon flush and release sessions, so that another node may take them.",
    "drain": "Have a daemon flush and release every session.",
    "verify": "Run the invariants over the hot tier and the cloud tier.",
    "doctor": "Check everything that a daemon needs, and say what to do about it.",
    "repair": "Move what is damaged aside, with the daemon stopped.",
    "rebuild": "Make the hot tier anew from the cloud tier, with the daemon stopped.",
    "dump": "Decode an object file of the cloud tier, or a session's rows in the hot tier.",
    "version": "Show the versions of sessiond and what it stands on.",
}
_MODULES: Final = {"import": "import_"}


class _Commands(click.Group):
    """Commands by name, each imported when it is called; the list of them costs no import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sessiond.cli.{_MODULES.get(cmd_name, cmd_name)}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), what) for code, what in exits.MEANINGS.items()])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, message="sessiond %(version)s")
def group() -> None:
    """Durable, budgeted sessions for stateless models: the daemon, and what talks to it."""


def main(argv: list[str]) -> int:
    """Run one command; its exit code."""
    # Before the parser has read it: a wrong option must be told in JSON as well.
    as_json = "--json" in argv
    try:
        if "_SESSIOND_COMPLETE" in os.environ:
            group.main(args=argv, prog_name="sessiond")
        # Not group.main, which would make a plain 1 of a broken pipe.
        with group.make_context("sessiond", list(argv)) as context:
            code = group.invoke(context)
        sys.stdout.flush()
        return code if isinstance(code, int) else exits.OK
    except SessiondError as error:
        return exits.tell(error, as_json)
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        print("sessiond: stopped", file=sys.stderr)
        return exits.INTERRUPTED
    except click.ClickException as error:
        return _usage(error, as_json)
    except BrokenPipeError:
        # What is still buffered must not fail a second time when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.BROKEN_PIPE
    except Exception as error:
        return exits.tell(exits.defect(error), as_json)


def _usage(error: click.ClickException, as_json: bool) -> int:
    if as_json:
        option = getattr(error, "option_name", None) or getattr(getattr(error, "param", None), "name", None) or ""
        told = errors.Invalid(
            "INVALID_CONFIG",
            error.format_message(),
            fields=[(str(option), error.format_message())],
            remedy="See sessiond COMMAND --help.",
        )
        exits.tell(told, as_json)
    else:
        error.show()
    return exits.USAGE
