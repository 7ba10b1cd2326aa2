"""`sessiond version`: what is installed. It talks to no daemon."""

from __future__ import annotations

import importlib.metadata
import platform

import click

from sessiond import __version__
from sessiond.cli import output


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show the versions of sessiond, its compiled core, its contract, and the libraries that own bytes."""
    from sessiond import core
    from sessiond.v1 import session_pb2

    versions = {
        "sessiond": __version__,
        "compiled_core": core.COMPILED,
        "proto_package": session_pb2.DESCRIPTOR.package,
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: importlib.metadata.version(name) for name in ("grpcio", "protobuf", "lmdb", "msgpack", "tiktoken")},
    }
    if as_json:
        output.print_json(versions)
    else:
        output.facts((name, output.yes_no(value)) for name, value in versions.items())
