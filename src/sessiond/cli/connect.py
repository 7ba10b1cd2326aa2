"""How commands reach a daemon: --server, --timeout, and one client for as long as the command runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from sessiond.client import Client

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULT_SERVER: Final = "127.0.0.1:7443"
DEFAULT_TIMEOUT_S: Final = 30.0
# Long enough for a connection that was lost, short enough for a daemon that is not there.
RETRY_S: Final = 1.0


def options(command: Command) -> Command:
    """Add --server and --timeout; they arrive as server and timeout."""
    command = click.option(
        "--timeout",
        type=click.FloatRange(min=0, min_open=True),
        metavar="SECONDS",
        default=DEFAULT_TIMEOUT_S,
        show_default=True,
        help="The longest wait for one answer.",
    )(command)
    return click.option(
        "--server",
        metavar="HOST:PORT",
        default=None,
        help=f"The daemon to talk to, or several of one bucket: HOST:PORT,HOST:PORT.  [env var: SESSIOND_SERVER;"
        f" default: {DEFAULT_SERVER}]",
    )(command)


def client(server: str | None, timeout_s: float, retry_s: float = RETRY_S) -> Client:
    """A client of the daemon, to be closed by `with`. retry_s: how long a call that found no daemon is tried again."""
    from sessiond.client import Client

    return Client(server, timeout_s=timeout_s, retry_s=min(retry_s, timeout_s))
