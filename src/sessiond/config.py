"""Settings: frozen data, units in the names, one place where defaults stand. Opens nothing and starts nothing."""

from __future__ import annotations

import difflib
import ipaddress
import os
import re
import socket
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from sessiond.errors import Invalid


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a daemon starts with. Every field is a key of sessiond.toml and, as SESSIOND_<KEY>, of the environment."""

    data_dir: str = "sessiond-data"
    cloud: str = ""
    listen: str = "127.0.0.1:7443"
    unix_socket: str = ""
    workers: int = 0
    advertise: str = ""
    node_name: str = ""
    node_key: str = ""
    s3_endpoint: str = ""
    s3_region: str = ""
    s3_path_style: bool | None = None
    s3_checksum: str = "crc32c"
    s3_tags: str = ""
    s3_sse: str = ""
    s3_kms_key: str = ""
    hash_key: str = ""
    map_size_bytes: int = 64 * 1024**3
    readers_max: int = 1024
    turn_bytes_max: int = 1024**2
    request_bytes_max: int = 8 * 1024**2
    concurrent_calls_max: int = 4096
    watchers_max: int = 20_000
    flush_interval_ms: int = 1000
    flush_waiting_ms: int = 35_000
    flush_threads: int = 4
    commit_group_max: int = 64
    lease_ms: int = 4000
    serve_unconfirmed: bool = True
    idle_release_ms: int = 300_000
    evict_at_percent: int = 70
    drain_grace_ms: int = 30_000
    store_connect_timeout_ms: int = 2000
    store_read_timeout_ms: int = 10_000
    default_budget_tokens: int = 0
    log_level: str = "info"

    def __repr__(self) -> str:
        """Every setting, secrets left out: a traceback or a log must not give them away."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        values.update((name, "...") for name in SECRETS if values[name])
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    @property
    def cloud_url(self) -> str:
        """The cloud tier's URL: as set, else a folder beside the hot tier's."""
        return self.cloud or f"file://{Path(self.data_dir).absolute() / 'cloud'}"

    @property
    def hot_dir(self) -> Path:
        """Where the LMDB environment lives."""
        return Path(self.data_dir).absolute() / "hot"

    @property
    def node(self) -> str:
        """The node's name: as set, else the host's."""
        return self.node_name or socket.gethostname()

    def address(self, port: int = 0) -> str:
        """Where other nodes reach this one: `advertise`, else `listen`, under the host's name if that is every address.

        port: the one that was taken, where `listen` leaves it open.
        """
        if self.advertise:
            host, _, number = self.advertise.rpartition(":")
            return f"[{host}]:{number}" if ":" in host and not host.startswith("[") else self.advertise
        if self.listen.startswith("unix:"):
            return self.listen
        host, _, number = self.listen.rpartition(":")
        return f"{socket.gethostname() if host in EVERY_ADDRESS else host}:{port if port and number == '0' else number}"

    @property
    def object_tags(self) -> dict[str, str]:
        """The tags of s3_tags. Raises ValueError for what is none."""
        return parse_tags(self.s3_tags)


SECRETS = ("hash_key", "node_key")
# Hosts to listen on that are none to be reached at.
EVERY_ADDRESS = ("0.0.0.0", "::", "[::]", "*")

# S3 allows 10 tags; one is the object's kind. Lengths and characters: "Categorizing your storage using tags".
TAGS_MAX = 9
TAG_KEY_CHARACTERS_MAX = 128
TAG_VALUE_CHARACTERS_MAX = 256
_TAG = re.compile(r"[A-Za-z0-9 +\-._:/@]*")


def parse_tags(text: str) -> dict[str, str]:
    """Tags written as `team=chat,env=prod`. Raises ValueError with what is wrong."""
    tags: dict[str, str] = {}
    for item in text.split(",") if text else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key:
            raise ValueError(f"{item!r} is not key=value")
        for part, limit in ((key, TAG_KEY_CHARACTERS_MAX), (value, TAG_VALUE_CHARACTERS_MAX)):
            if len(part) > limit or not _TAG.fullmatch(part):
                raise ValueError(f"{part[:80]!r} is not at most {limit} of A-Z a-z 0-9 space + - . _ : / @")
        if key.lower().startswith("aws:") or key == "sessiond-kind":
            raise ValueError(f"the tag {key!r} is reserved")
        if key in tags:
            raise ValueError(f"the tag {key!r} is there twice")
        tags[key] = value
    if len(tags) > TAGS_MAX:
        raise ValueError(f"{len(tags)} tags are more than {TAGS_MAX}")
    return tags


# Reader slots of the daemon's own process, and of each worker; every one is taken for the time of a read.
READERS_OWN = 64
READERS_OF_WORKER = 8
# sockaddr_un has 108 bytes, the last of which ends the path.
SOCKET_PATH_BYTES_MAX = 107

_RANGES: dict[str, tuple[int, int]] = {
    "workers": (0, 64),
    "map_size_bytes": (16 * 1024**2, 16 * 1024**4),
    "readers_max": (64, 65_536),
    "turn_bytes_max": (1024, 16 * 1024**2),
    "request_bytes_max": (4096, 32 * 1024**2),
    "concurrent_calls_max": (1, 1_000_000),
    "watchers_max": (0, 1_000_000),
    "flush_interval_ms": (1, 3_600_000),
    "flush_waiting_ms": (0, 3_600_000),
    "flush_threads": (1, 64),
    "commit_group_max": (1, 1024),
    "lease_ms": (500, 600_000),
    "idle_release_ms": (0, 30 * 86_400_000),
    "evict_at_percent": (10, 80),
    "drain_grace_ms": (0, 3_600_000),
    "store_connect_timeout_ms": (10, 600_000),
    "store_read_timeout_ms": (10, 600_000),
    "default_budget_tokens": (0, 2**31 - 1),
}
_TYPES = get_type_hints(Settings)
_KEYS = tuple(Settings.__struct_fields__)
# Names under SESSIOND_ that are not settings.
_OTHER_VARIABLES = {"SERVER", "PURE", "DEBUG", "CONFIG"}


def load(path: str | None, environment: Mapping[str, str], options: Mapping[str, Any]) -> Settings:
    """Settings from a TOML file, then SESSIOND_ variables, then command-line options; later ones win.

    options: by field name; None means not given. Raises Invalid UNKNOWN_CONFIG_KEY or INVALID_CONFIG, naming the key.
    """
    values: dict[str, Any] = {}
    if path:
        try:
            with open(path, "rb") as file:
                values = tomllib.load(file)
        except OSError as error:
            raise Invalid(
                "INVALID_CONFIG",
                f"The configuration file {path} can't be read: {error.strerror}.",
                fields=[("config", str(error.strerror))],
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise Invalid(
                "INVALID_CONFIG",
                f"The configuration file {path} is not TOML: {error}.",
                fields=[("config", str(error))],
            ) from error
        for key in values:
            if key not in _KEYS:
                raise _unknown(key, f"in {path}")
    for name, text in environment.items():
        if not name.startswith("SESSIOND_") or name.removeprefix("SESSIOND_") in _OTHER_VARIABLES:
            continue
        key = name.removeprefix("SESSIOND_").lower()
        if key not in _KEYS:
            raise _unknown(key, f"in the environment as {name}")
        values[key] = _from_text(key, text, name)
    values.update({key: value for key, value in options.items() if value is not None})
    try:
        settings = msgspec.convert(values, Settings, strict=True)
    except msgspec.ValidationError as error:
        raise Invalid(
            "INVALID_CONFIG", f"The configuration is wrong: {error}.", fields=[("config", str(error))]
        ) from error
    return check(settings)


def check(settings: Settings) -> Settings:
    """The same settings, if every value is within its range. Raises Invalid INVALID_CONFIG."""
    for key, (low, high) in _RANGES.items():
        value = getattr(settings, key)
        if not low <= value <= high:
            raise _wrong(key, f"{value} is outside {low}..{high}")
    if settings.request_bytes_max < settings.turn_bytes_max:
        raise _wrong("request_bytes_max", f"{settings.request_bytes_max} is below turn_bytes_max")
    readers = READERS_OWN + READERS_OF_WORKER * settings.workers
    if settings.readers_max < readers:
        raise _wrong("readers_max", f"{settings.readers_max} is below {readers}, which {settings.workers} workers need")
    if settings.map_size_bytes % 4096:
        raise _wrong("map_size_bytes", "it is no multiple of 4,096")
    host, _, port = settings.listen.rpartition(":")
    if not settings.listen.startswith("unix:") and (not host or not port.isdigit() or int(port) > 65535):
        raise _wrong("listen", f"{settings.listen!r} is not HOST:PORT")
    if settings.workers and settings.listen.startswith("unix:"):
        raise _wrong("workers", f"{settings.workers} processes can't share {settings.listen!r}: use HOST:PORT")
    if settings.unix_socket and (what := _no_socket(settings.unix_socket)):
        raise _wrong("unix_socket", f"{settings.unix_socket!r} {what}")
    if settings.advertise and (what := _not_advertised(settings.advertise)):
        raise _wrong("advertise", f"{settings.advertise!r} {what}")
    for key in ("hash_key", "node_key"):
        if not (text := getattr(settings, key)):
            continue
        try:
            secret = bytes.fromhex(text)
        except ValueError:
            raise _wrong(key, "it is not hexadecimal") from None
        if not 16 <= len(secret) <= 64:
            raise _wrong(key, f"it has {len(secret)} bytes; 16 to 64 are needed")
    if settings.s3_checksum not in ("crc32c", "sha256", "none"):
        raise _wrong("s3_checksum", f"{settings.s3_checksum!r} is none of crc32c, sha256, none")
    try:
        parse_tags(settings.s3_tags)
    except ValueError as error:
        raise _wrong("s3_tags", str(error)) from None
    if settings.s3_sse not in ("", "AES256", "aws:kms"):
        raise _wrong("s3_sse", f"{settings.s3_sse!r} is neither empty nor AES256 nor aws:kms")
    if settings.s3_kms_key and settings.s3_sse != "aws:kms":
        raise _wrong("s3_kms_key", "it is only for s3_sse aws:kms")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise _wrong("log_level", f"{settings.log_level!r} is none of debug, info, warning, error")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", settings.node):
        what = f"{settings.node!r} is not 1 to 128 letters, digits, '.', '_' and '-' of ASCII, a letter or digit first"
        raise _wrong("node_name", what)
    return settings


def _no_socket(path: str) -> str:
    """Why there can be no socket at this path; empty if nothing is known against it."""
    if not path.startswith("/"):
        return "is not an absolute path"
    size_bytes = len(os.fsencode(path))
    if size_bytes > SOCKET_PATH_BYTES_MAX:
        return f"has {size_bytes} bytes; the path of a socket has {SOCKET_PATH_BYTES_MAX} at most"
    return ""


def _not_advertised(address: str) -> str:
    """Why other nodes can't reach a node at this address; empty if nothing is known against it."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) <= 65535:
        return "is not HOST:PORT"
    if host in EVERY_ADDRESS:
        return "is every address of this machine: name the one that other nodes reach it at"
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", host):
        try:
            ipaddress.IPv6Address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
        except ValueError:
            return "is not HOST:PORT"
    return ""


def _unknown(key: str, where: str) -> Invalid:
    close = difflib.get_close_matches(key, _KEYS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return Invalid(
        "UNKNOWN_CONFIG_KEY", f"There is no setting {key!r} ({where}).{hint}", {"key": key}, [(key, "unknown setting")]
    )


def _wrong(key: str, what: str) -> Invalid:
    return Invalid("INVALID_CONFIG", f"The setting {key} is wrong: {what}.", {"key": key}, [(key, what)])


def _from_text(key: str, text: str, name: str) -> Any:
    kind = _TYPES[key]
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise _wrong(key, f"{name}={text!r} is no whole number") from None
    if kind in (bool, bool | None):
        if text.lower() in ("1", "true", "yes"):
            return True
        if text.lower() in ("0", "false", "no"):
            return False
        raise _wrong(key, f"{name}={text!r} is neither true nor false")
    return text


def from_environment(path: str | None, options: Mapping[str, Any]) -> Settings:
    """`load` with this process's environment."""
    return load(path or os.environ.get("SESSIOND_CONFIG"), os.environ, options)
