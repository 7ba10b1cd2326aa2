"""Exit codes, and how an error is told: one line with reason, field and remedy, or one JSON object. Raises nothing."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, Final

from sessiond import errors
from sessiond.errors import SessiondError

OK: Final = 0
INTERNAL: Final = 1
USAGE: Final = 2
NOT_FOUND: Final = 3
CONFLICT: Final = 4
UNAVAILABLE: Final = 5
CORRUPT: Final = 6
EXHAUSTED: Final = 7
DENIED: Final = 8
INCOMPLETE: Final = 9
INTERRUPTED: Final = 130
BROKEN_PIPE: Final = 141

# docs/cli.md and `sessiond --help` show this table.
MEANINGS: Final = {
    OK: "done",
    INTERNAL: "a defect of sessiond, or verify found violations",
    USAGE: "the command, the configuration, the file or the request is wrong",
    NOT_FOUND: "there is no such session, user or bucket",
    CONFLICT: "somebody else was first, or the same key names something else",
    UNAVAILABLE: "the daemon or the store can't be reached, or can't do it now; try again",
    CORRUPT: "bytes that were read back do not verify, or are of a newer release",
    EXHAUSTED: "a limit is reached: disk, map, calls at once",
    DENIED: "not allowed: permissions, credentials, an archived session",
    INCOMPLETE: "done in part: some conversations failed or may lack turns, or a drain was not clean",
    INTERRUPTED: "stopped by Ctrl-C",
    BROKEN_PIPE: "the reader of standard output went away",
}

_KINDS: Final[dict[type[SessiondError], int]] = {
    errors.NotFound: NOT_FOUND,
    errors.Conflict: CONFLICT,
    errors.Invalid: USAGE,
    errors.Unavailable: UNAVAILABLE,
    errors.Corrupt: CORRUPT,
    errors.Exhausted: EXHAUSTED,
    errors.Denied: DENIED,
    errors.Unimplemented: USAGE,
}
_REASONS: Final = {"INTERNAL": INTERNAL, "VIOLATIONS_FOUND": INTERNAL}


def code_of(error: SessiondError) -> int:
    """The exit code of an error: its kind's, but for a defect and for violations."""
    return _REASONS.get(error.reason) or next(
        (code for kind, code in _KINDS.items() if isinstance(error, kind)), INTERNAL
    )


def line_of(error: SessiondError) -> str:
    """The error in one line: reason, what happened, which field, what to do."""
    told = []
    for name, what in error.fields:
        # The message often says it already.
        new = [text for text in (name, what) if text and text.rstrip(".") not in error.message]
        told += [": ".join(new)] if new else []
    where = f" [{'; '.join(told)}]" if told else ""
    return " ".join(f"{error.reason}: {error.message}{where} {error.remedy}".split())


def json_of(error: SessiondError) -> dict[str, Any]:
    """The error as JSON has it."""
    return {
        "reason": error.reason,
        "kind": next((kind.__name__ for kind in _KINDS if isinstance(error, kind)), type(error).__name__),
        "message": error.message,
        "remedy": error.remedy,
        "fields": [{"field": name, "description": what} for name, what in error.fields],
        "metadata": error.metadata,
        "retry_after_ms": error.retry_after_ms,
        "exit_code": code_of(error),
    }


def tell(error: SessiondError, as_json: bool) -> int:
    """Write the error to standard error; its exit code."""
    if as_json:
        print(json.dumps({"error": json_of(error)}, ensure_ascii=False), file=sys.stderr, flush=True)
    else:
        print(f"sessiond: {line_of(error)}", file=sys.stderr, flush=True)
    return code_of(error)


def defect(error: Exception) -> SessiondError:
    """An error that nobody foresaw, as one that can be told; its traceback only where SESSIOND_DEBUG asks for it."""
    if os.environ.get("SESSIOND_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    remedy = "This is a defect of sessiond; run it again with SESSIOND_DEBUG=1 and report what it prints."
    return errors.Corrupt("INTERNAL", f"{type(error).__name__}: {error}{place}.", remedy=remedy)
