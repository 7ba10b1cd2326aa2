"""Conversations as JSON lines: read for `import`, written for `export`, so that what went in comes out equal.

A line is {"id", "messages"} with optional "user", "metadata", "created_at" and further fields, or a plain list of
messages. Reading takes one line at a time and repairs none.

What a session can't hold as it was written travels in the session's metadata under KEPT_KEY, as a JSON object of the
line's own fields: the id where the session's differs, the times in their own notation, metadata that is not a flat map
of texts, fields that sessiond does not know.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

from sessiond.errors import Invalid, SessiondError
from sessiond.v1 import session_pb2

LINE_BYTES_MAX: Final = 256 * 1024**2
# Leaves room for an application's own metadata below the daemon's limit of 16 KiB.
KEPT_BYTES_MAX: Final = 12 * 1024
KEPT_KEY: Final = "sessiond.import"
STDIN: Final = "-"
SESSION_ID_BYTES_MAX: Final = 128
_SESSION_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
# As OpenAI names the time of a thread or message, and of a completion; the first that can be read counts.
_TIME_FIELDS: Final = ("created_at", "created", "timestamp")
# A number above this is milliseconds: as seconds it would lie beyond the year 5000.
_SECONDS_MAX: Final = 10**11
_TIME_MS_MAX: Final = 1 << 47


@dataclass(slots=True)
class Conversation:
    """One line. place: FILE:LINE. key: its id as text. created_ms: 0 if it has no time. dropped: fields not kept."""

    place: str
    key: str
    messages: list[Any]
    user: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)
    created_ms: int = 0
    dropped: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Malformed:
    """A line that is no conversation. place: FILE:LINE."""

    place: str
    error: SessiondError


def wrong(place: str, what: str) -> Invalid:
    """The refusal of a line."""
    return Invalid("INVALID_INPUT_FILE", f"{place}: {what}.", {"place": place}, [(place, what)])


# Reading -------------------------------------------------------------------------------------------------------------


class Source:
    """A file of conversations. path: '-' is standard input; gzip is recognised by its first bytes."""

    def __init__(self, path: str) -> None:
        """Raises Invalid INVALID_INPUT_FILE if it can't be opened."""
        self.name = "stdin" if path == STDIN else path
        # The same for a file and its compressed form: ids that are made from it must not change.
        self._stem = "stdin" if path == STDIN else Path(path).name.removesuffix(".gz")
        self.size_bytes = 0
        if path == STDIN:
            self._file: Any = sys.stdin.buffer
            return
        try:
            self._file = open(path, "rb")  # noqa: SIM115  # close() closes it
            self.size_bytes = os.fstat(self._file.fileno()).st_size
            self._file.peek(1)
        except OSError as error:
            what = error.strerror or type(error).__name__
            raise Invalid(
                "INVALID_INPUT_FILE",
                f"{path} can't be read: {what}.",
                {"file": path},
                [(path, what)],
                remedy="Name a file that can be read.",
            ) from error

    def position_bytes(self) -> int:
        """How far it was read, of size_bytes."""
        return int(self._file.tell()) if self.size_bytes and not self._file.closed else self.size_bytes

    def close(self) -> None:
        """Let go of the file."""
        if self.name != "stdin":
            self._file.close()

    def __iter__(self) -> Iterator[Conversation | Malformed]:
        """The lines, in order. Raises Invalid INVALID_INPUT_FILE if it can't be read to its end."""
        number = 0
        stream = _unpacked(self._file)
        while True:
            place = f"{self.name}:{number + 1}"
            try:
                raw = stream.readline(LINE_BYTES_MAX + 1)
                if len(raw) > LINE_BYTES_MAX:
                    while raw and not raw.endswith(b"\n"):
                        raw = stream.readline(1 << 20)
                    number += 1
                    yield Malformed(place, wrong(place, f"the line has more than {LINE_BYTES_MAX} bytes"))
                    continue
            except (OSError, EOFError, zlib.error) as error:
                raise wrong(place, f"it can't be read on: {error}") from error
            if not raw:
                return
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            try:
                yield parse(raw, place, f"{self._stem}-{number}")
            except Invalid as error:
                yield Malformed(place, error)


def _unpacked(stream: Any) -> io.BufferedIOBase:
    buffered = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
    packed = buffered.peek(2)[:2] == b"\x1f\x8b"
    unpacked = gzip.GzipFile(fileobj=buffered) if packed else buffered
    return cast(io.BufferedIOBase, unpacked)


def parse(raw: bytes, place: str, derived_id: str) -> Conversation:
    """One line. derived_id: its id if it has none. Raises Invalid INVALID_INPUT_FILE."""
    try:
        line = json.loads(raw.decode(), parse_constant=_no_constant, parse_float=_finite)
    except UnicodeDecodeError as error:
        raise wrong(place, f"byte {error.start} of the line is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise wrong(place, f"it is not JSON: {error.msg} at character {error.pos}") from error
    except (ValueError, RecursionError) as error:
        raise wrong(place, f"it is not JSON: {error}") from error
    if isinstance(line, list):
        return Conversation(place, derived_id, line)
    if not isinstance(line, dict):
        raise wrong(place, "it is neither an object nor a list of messages")
    messages = line.pop("messages", None)
    if not isinstance(messages, list):
        what = "is missing" if messages is None else "is not a list"
        raise wrong(place, f'"messages" {what}')
    try:
        return _from_object(line, messages, place, derived_id)
    except UnicodeEncodeError as error:
        raise wrong(place, f"a text holds a lone surrogate at character {error.start}") from error


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large a number")
    return number


def _from_object(line: dict[str, Any], messages: list[Any], place: str, derived_id: str) -> Conversation:
    conversation = Conversation(place, derived_id, messages)
    identity = line.pop("id", None)
    if isinstance(identity, str) and identity:
        conversation.key = identity
    elif isinstance(identity, int) and not isinstance(identity, bool):
        conversation.key = str(identity)
        conversation.kept["id"] = identity
    elif identity is not None:
        raise wrong(place, '"id" is neither a text nor a whole number')
    conversation.key.encode()
    user = line.pop("user", None)
    if isinstance(user, str) and user:
        conversation.user = user
        user.encode()
    elif user is not None:
        conversation.kept["user"] = user
    if "metadata" in line:
        metadata = line.pop("metadata")
        if _is_flat(metadata):
            conversation.metadata = metadata
        else:
            conversation.kept["metadata"] = metadata
    conversation.created_ms = first_time_ms(line)
    for name, value in line.items():
        conversation.kept[name] = value
        if len(_compact(conversation.kept).encode()) > KEPT_BYTES_MAX:
            del conversation.kept[name]
            conversation.dropped.append(name)
    _compact(conversation.metadata).encode()
    return conversation


def _is_flat(metadata: Any) -> bool:
    return (
        isinstance(metadata, dict)
        and bool(metadata)
        and KEPT_KEY not in metadata
        and all(name and isinstance(value, str) for name, value in metadata.items())
    )


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def first_time_ms(source: dict[str, Any]) -> int:
    """The time of a line or message in milliseconds since 1970 UTC; 0 if it has none that can be read."""
    return next((ms for name in _TIME_FIELDS if (ms := _time_ms(source.get(name)))), 0)


def _time_ms(value: Any) -> int:
    """Seconds or milliseconds since 1970, or ISO 8601 (UTC unless it says otherwise)."""
    if isinstance(value, str):
        try:
            parsed = datetime.fromisoformat(value)
            ms = round((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp() * 1000)
        except (ValueError, OverflowError):
            return 0
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        ms = round(value * 1000 if abs(value) < _SECONDS_MAX else min(value, _TIME_MS_MAX))
    else:
        return 0
    return ms if 0 < ms < _TIME_MS_MAX else 0


# Names ---------------------------------------------------------------------------------------------------------------


def session_id_of(prefix: str, key: str) -> str:
    """The session's id: prefix and conversation id, or where that is no session id its allowed part and a digest."""
    named = prefix + key
    if _SESSION_ID.fullmatch(named):
        return named
    digest = hashlib.sha256(named.encode()).hexdigest()[:16]
    allowed = re.sub(r"[^A-Za-z0-9._:@-]", "_", named)
    if not allowed[:1].isalnum():
        allowed = "c" + allowed
    return f"{allowed[: SESSION_ID_BYTES_MAX - len(digest) - 1]}-{digest}"


class TurnIds:
    """The turn ids of consecutive messages. Each is made from every message up to its own, so that one that is found
    again says that the whole conversation up to there is the same.
    """

    def __init__(self, seed: str) -> None:
        self._digest = hashlib.blake2b(seed.encode(), digest_size=12).digest()
        self.count = 0

    def next(self, message: Any) -> str:
        """The turn id of the next message."""
        text = json.dumps(message, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
        data = self._digest + text.encode("utf-8", "surrogatepass")
        self._digest = hashlib.blake2b(data, digest_size=12).digest()
        self.count += 1
        return f"import-{self.count - 1}-{self._digest.hex()}"


# Writing -------------------------------------------------------------------------------------------------------------


def session_metadata(conversation: Conversation, session_id: str) -> dict[str, str]:
    """What the session's metadata holds so that `line_of` gives the line back."""
    kept = dict(conversation.kept)
    if session_id != conversation.key:
        kept.setdefault("id", conversation.key)
    return {**conversation.metadata, **({KEPT_KEY: _compact(kept)} if kept else {})}


def line_of(session: session_pb2.Session, messages: Sequence[Any]) -> str:
    """A session as one JSON line, without its line end."""
    metadata = dict(sorted(session.state.metadata.items()))
    line: dict[str, Any] = {"id": session.session_id}
    kept: Any = None
    if KEPT_KEY in metadata:
        try:
            kept = json.loads(metadata[KEPT_KEY])
        except ValueError:
            kept = None
        if isinstance(kept, dict):
            del metadata[KEPT_KEY]
    if session.user_id:
        line["user"] = session.user_id
    if metadata:
        line["metadata"] = metadata
    if isinstance(kept, dict):
        line.update(kept)
    line["messages"] = list(messages)
    return json.dumps(line, ensure_ascii=False)
