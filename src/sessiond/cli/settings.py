"""Command-line options for the daemon's settings, one for each field of `config.Settings`. Opens nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints
from urllib.parse import unquote, urlsplit

import click

from sessiond import config
from sessiond.config import Settings
from sessiond.errors import Invalid, NotFound

Command = TypeVar("Command", bound=Callable[..., Any])

HELP: Final = {
    "data_dir": "Folder of the hot tier, and of the cloud tier unless --cloud names another.",
    "cloud": "The cloud tier: file:///folder or s3://bucket/prefix. Default: a folder in the data directory.",
    "listen": "Address to serve on: HOST:PORT or unix:PATH.",
    "unix_socket": "Path of a Unix socket to serve on as well; empty for none.",
    "workers": "Processes that answer calls, up to 64; 0 answers everything in one process.",
    "advertise": "HOST:PORT at which other nodes reach this one. Default: --listen, or the host's name with its port.",
    "node_name": "Name of this node, unique among those that share the cloud tier. Default: the host's name.",
    "s3_endpoint": "URL of an S3-compatible store; empty for AWS.",
    "s3_region": "Region of the bucket.",
    "s3_path_style": "Address buckets by path instead of by host name. Default: by path with an endpoint.",
    "s3_checksum": "Checksum of each body: crc32c, sha256, or none for a store that takes neither.",
    "s3_tags": "Tags of every object, as team=chat,env=prod; its kind is added.",
    "s3_sse": "Encryption by the store: AES256 or aws:kms; empty leaves it to the bucket.",
    "s3_kms_key": "Key for aws:kms; empty takes the account's own.",
    "hash_key": "Hexadecimal key, 16 to 64 bytes, that hides ids in object names; better as SESSIOND_HASH_KEY.",
    "node_key": "Hexadecimal secret, 16 to 64 bytes, that the nodes of a bucket share; better as SESSIOND_NODE_KEY.",
    "map_size_bytes": "Size of the hot tier's map: the most that it can grow to.",
    "readers_max": "Reader slots of the hot tier.",
    "turn_bytes_max": "The largest turn that is taken.",
    "request_bytes_max": "The largest request that is taken.",
    "concurrent_calls_max": "Calls at one time; more are refused.",
    "watchers_max": "Streams of WatchSession at one time; more are refused.",
    "flush_interval_ms": "How long a turn waits at most before it is sent to the cloud tier.",
    "flush_waiting_ms": "How long a turn may wait at most whose exchange has no answer yet.",
    "flush_threads": "Sessions that are flushed at one time.",
    "commit_group_max": "The most appends that share one fsync.",
    "lease_ms": "How long this node's lease holds without renewal.",
    "serve_unconfirmed": "Go on serving, marked UNCONFIRMED, while the lease can't be renewed; else refuse.",
    "idle_release_ms": "A session unused for so long is released; 0 releases none.",
    "evict_at_percent": "Share of the map above which released sessions are evicted, the least recently used first.",
    "drain_grace_ms": "The most that a drain may take.",
    "store_connect_timeout_ms": "Longest wait for a connection to the cloud tier.",
    "store_read_timeout_ms": "Longest wait for an answer of the cloud tier.",
    "default_budget_tokens": "Budget of a resume that names none and whose session has none; 0 refuses it.",
    "log_level": "debug, info, warning or error.",
}
# What finds and opens the two tiers, for commands that need no daemon.
TIERS: Final = ("data_dir", "cloud", "s3_endpoint", "s3_region", "s3_path_style", "hash_key")


def options(*names: str) -> Callable[[Command], Command]:
    """Add --config and an option for each named setting, or for all; values arrive by field name, None if not given."""
    types = get_type_hints(Settings)
    wanted = names or Settings.__struct_fields__
    defaults = dict(zip(Settings.__struct_fields__, Settings.__struct_defaults__, strict=True))

    def add(command: Command) -> Command:
        for name in reversed(wanted):
            flag = f"--{name.replace('_', '-')}"
            text = HELP.get(name, f"The setting {name}.")
            if types[name] in (bool, bool | None):
                command = click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)(command)
                continue
            if defaults[name] not in ("", 0):
                text += f"  [default: {defaults[name]}]"
            kind: Any = int if types[name] is int else str
            metavar = "N" if kind is int else "TEXT"
            command = click.option(flag, name, type=kind, metavar=metavar, default=None, help=text)(command)
        source = "TOML file with settings; SESSIOND_ variables go before it, options before these."
        return click.option("--config", "config_path", metavar="FILE", help=source)(command)

    return add


def load(config_path: str | None, given: dict[str, Any]) -> Settings:
    """The settings from file, environment and options. Raises Invalid UNKNOWN_CONFIG_KEY or INVALID_CONFIG."""
    return config.from_environment(config_path, given)


def has_hot_tier(settings: Settings) -> bool:
    """Whether there is a hot tier in the data directory."""
    return (settings.hot_dir / "data.mdb").exists()


def require_hot_tier(settings: Settings) -> None:
    """Raises Invalid INVALID_CONFIG if there is no hot tier: a reader must not make one."""
    if not has_hot_tier(settings):
        what = f"there is no hot tier in {settings.hot_dir}"
        raise Invalid("INVALID_CONFIG", f"The setting data_dir is wrong: {what}.", fields=[("data_dir", what)])


def require_cloud_tier(settings: Settings) -> None:
    """Raises NotFound BUCKET_NOT_FOUND if the cloud tier is a folder that is not there: a reader must not make it."""
    url = urlsplit(settings.cloud_url)
    if url.scheme == "file" and not Path(unquote(url.path)).is_dir():
        what = f"there is no folder {unquote(url.path)}"
        raise NotFound("BUCKET_NOT_FOUND", f"The cloud tier is missing: {what}.", fields=[("cloud", what)])
