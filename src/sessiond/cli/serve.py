"""`sessiond serve`: runs the daemon in this process until SIGTERM, SIGINT, a drain that ends it or a failed disk."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import sys
from typing import Any

import click

from sessiond.cli import exits, settings


@click.command()
@settings.options()
def command(config_path: str | None, **given: Any) -> int:
    """Run the daemon of this node until SIGTERM or Ctrl-C, then drain it.

    Every option is also a key of the configuration file and, as SESSIOND_KEY, of the environment. Without any of them
    it listens on 127.0.0.1:7443 and keeps everything in ./sessiond-data.

    Exit code 0 after a clean drain: every turn is in the cloud tier and every session released. 9 after a drain that
    was not: the turns are safe on this node's disk, start the daemon there again. 5 when the disk itself failed: see to
    it first. Other codes: see sessiond --help.
    """
    loaded = settings.load(config_path, given)
    # A page of the map that the disk can't give, or that the file has lost, ends the process by SIGBUS: where, is told.
    faulthandler.enable()
    _raise_file_limit()
    # gRPC's own lines on standard error are no JSON, and say nothing that the daemon's do not.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    daemon = _import_daemon()
    return exits.OK if daemon.serve(loaded) else exits.INCOMPLETE


def _raise_file_limit() -> None:
    """As many connections as the administrator allows; the soft limit is a relic of select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A sandbox may forbid it: then what was given must do.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _import_daemon() -> Any:
    """The daemon's module, without rich: structlog would load it for a console renderer that the daemon never uses."""
    absent = object()
    before = sys.modules.get("rich", absent)
    if before is absent:
        sys.modules["rich"] = None  # type: ignore[assignment]  # makes `import rich` fail
    try:
        import structlog  # noqa: F401
    finally:
        if before is absent:
            del sys.modules["rich"]
    from sessiond import daemon

    return daemon
