"""The `sessiond` command: arguments in, exit code out. It shows no traceback and explains every error.

Where to read: `app` names the commands, each has a file of its own; `exits` says which exit code an error has.
"""

from __future__ import annotations


def run(argv: list[str]) -> int:
    """Run one command; its exit code. Whatever goes wrong is one line on standard error, JSON with --json."""
    from sessiond.cli.app import main

    return main(argv)
