"""Looks through a whole hot tier for damage, in a process of its own, because LMDB may crash on a damaged page.

It promises that whoever asks outlives what it finds, and that a session it calls sound was read through the very checks
that serve it. It never changes anything.

LMDB's pages carry no checksums. So the file is judged on three levels:

1. `file_damage` reads size and meta pages as plain bytes: what must hold before anybody maps the file.
2. The structure of every tree, and that each page is either reachable once or free, by lmdb.verify; only while nobody
   writes. A pointer that leads to an older page, whose rows all verify, is seen here and nowhere else.
3. Every row by its own checksum, and each session's rows against one another.
"""

from __future__ import annotations

import json
import os
import selectors
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgpack
from lmdb import verify as structure

from sessiond import core
from sessiond.core import state as states
from sessiond.core.layout import FRAME_TAG
from sessiond.core.manifest import LIFECYCLE_DELETED, TURN_ID_ENTRY_BYTES, TURN_IDS_MAX
from sessiond.errors import Corrupt
from sessiond.tiers.hot import blobs, log
from sessiond.tiers.hot.datafile import DATA_FILE, alone, file_damage
from sessiond.tiers.hot.environment import Reader, Transaction
from sessiond.tiers.hot.rows import (
    IDS_PER_CHUNK,
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASED,
    PHASE_RELEASING,
    Head,
    decode_committed,
    decode_head,
    unwrap,
)

# Tables whose keys begin with a session's hash.
SESSION_TABLES: Final = ("heads", "turns", "ids", "checkpoints", "manifests", "dirty", "states", "blobs")
# Sessions looked at in one read transaction: a long one would keep a live daemon from using pages again.
BATCH_SESSIONS: Final = 500
# A damaged tree can lead LMDB round in circles: a survey that says nothing for so long is taken for that.
QUIET_MAX_S: Final = 60.0
STRUCTURE_BYTES_PER_S: Final = 4 * 1024**2
TELL_EVERY_S: Final = 1.0
# Of one session, and of the structure.
FINDINGS_MAX: Final = 20

_PHASES: Final = {PHASE_CLAIMING, PHASE_OWNED, PHASE_RELEASING, PHASE_RELEASED, PHASE_FENCED, PHASE_DOUBTED}
# Phases whose rows are the session as it was acknowledged.
HELD_PHASES: Final = frozenset({PHASE_OWNED, PHASE_RELEASING, PHASE_DOUBTED, PHASE_FENCED})


@dataclass
class Survey:
    """What was found. unusable: why the environment as a whole can't be trusted, empty if it can.

    damaged: by session hash, what is wrong with its rows. unflushed: (sessions, turns) of which the cloud tier
    lacks something, as far as head rows can be read. index: keys of rows in `users` that do not verify.
    """

    unusable: str = ""
    sessions: int = 0
    unflushed: tuple[int, int] = (0, 0)
    damaged: dict[bytes, list[str]] = field(default_factory=dict)
    index: list[bytes] = field(default_factory=list)


def survey(hot_dir: Path, told: Callable[[int], None] = lambda sessions: None) -> Survey:
    """Look through a hot tier. told: called with the sessions that were looked at so far.

    The structure is checked only while nobody has the environment open. Raises OSError if the file can't be read, and
    Corrupt NEWER_FORMAT.
    """
    damage = file_damage(hot_dir)
    if damage:
        return Survey(unusable=damage)
    quiet_max_s = QUIET_MAX_S + (hot_dir / DATA_FILE).stat().st_size / STRUCTURE_BYTES_PER_S
    process = subprocess.Popen(
        [sys.executable, "-m", "sessiond.tiers.hot.survey", str(hot_dir)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdout is not None
    found: Survey | None = None
    pending, heard_at = b"", time.monotonic()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(TELL_EVERY_S):
                    if time.monotonic() - heard_at > quiet_max_s:
                        return Survey(unusable="LMDB did not come to an end with it")
                    continue
                piece = os.read(process.stdout.fileno(), 1 << 16)
                if not piece:
                    break
                heard_at = time.monotonic()
                *lines, pending = (pending + piece).split(b"\n")
                for line in lines:
                    said = json.loads(line)
                    if "looked" in said:
                        told(said["looked"])
                    elif "newer" in said:
                        raise Corrupt("NEWER_FORMAT", said["newer"], {"path": str(hot_dir)})
                    else:
                        found = _parsed(said)
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    if code < 0:
        return Survey(unusable=f"LMDB crashed on it (signal {-code})")
    if found is None:
        return Survey(unusable=f"reading it failed (exit code {code})")
    return found


def _parsed(said: dict[str, Any]) -> Survey:
    return Survey(
        unusable=said["unusable"],
        sessions=said["sessions"],
        unflushed=(said["unflushed"][0], said["unflushed"][1]),
        damaged={bytes.fromhex(h): list(found) for h, found in said["damaged"].items()},
        index=[bytes.fromhex(key) for key in said["index"]],
    )


# What is left of damaged rows -----------------------------------------------------------------------------------------


def next_frame(h: bytes, value: bytes, offset: int) -> int | None:
    """Where the next frame that verifies begins, at or after the offset; the checksum tells it from anything else."""
    while (offset := value.find(bytes([FRAME_TAG]), offset)) >= 0:
        with suppress(Corrupt, ValueError):
            core.read_frame(h, value, offset)
            return offset
        offset += 1
    return None


def read_rows(payload: bytes) -> dict[str, list[tuple[bytes, bytes]]]:
    """The rows in the payload of a file of rows. Raises ValueError if it is none."""
    tables: Any = msgpack.unpackb(payload, raw=False, strict_map_key=True)
    return {str(table): [(bytes(key), bytes(value)) for key, value in rows] for table, rows in tables.items()}


# In the process of its own --------------------------------------------------------------------------------------------


def look_through(hot_dir: Path, told: Callable[[int], None]) -> Survey:
    """The survey itself, in a process that may crash on it."""
    found = Survey()
    with alone(hot_dir) as is_alone:
        if is_alone:
            try:
                wrong = [str(text) for text in structure.verify(str(hot_dir))]  # type: ignore[no-untyped-call]
            except (structure.VerifyError, struct.error, IndexError) as error:
                wrong = [str(error)]
            if wrong:
                found.unusable = f"its trees are damaged: {wrong[0]}" + (
                    f" (and {len(wrong) - 1} more)" if wrong[1:] else ""
                )
                return found
    try:
        reader = Reader(hot_dir)
    except Corrupt as error:
        if error.reason == "NEWER_FORMAT":
            raise
        found.unusable = error.message
        return found
    try:
        start: bytes | None = b""
        while start is not None:
            with reader.read() as transaction:
                start = _batch(transaction, start, found)
            told(found.sessions)
        with reader.read() as transaction:
            for key, value in transaction.scan("users", b""):
                try:
                    unwrap(key[-16:], "users", value)
                except Corrupt:
                    found.index.append(key)
    finally:
        reader.close()
    return found


def _batch(transaction: Transaction, start: bytes, found: Survey) -> bytes | None:
    """Look at some sessions from hash `start` on; where to go on, or None."""
    for index, h in enumerate(hashes(transaction, start)):
        if index == BATCH_SESSIONS:
            return h
        wrong, head = session_damage(transaction, h)
        found.sessions += 1
        if wrong:
            found.damaged[h] = wrong[:FINDINGS_MAX]
        # A deletion that the cloud tier does not know of yet counts too: without it the session would come back.
        if head is not None and head.is_dirty and (head.phase in HELD_PHASES or head.lifecycle == LIFECYCLE_DELETED):
            turns = head.head_seq - head.cloud_seq
            found.unflushed = (found.unflushed[0] + 1, found.unflushed[1] + max(0, turns))
    return None


def hashes(transaction: Transaction, start: bytes = b"") -> Iterator[bytes]:
    """Every session with a row in any table, ascending, from `start` on; keys that are none are cut or padded."""
    cursors = [transaction.cursor(table) for table in SESSION_TABLES if table in transaction.tables]
    due = start
    while True:
        standing = [bytes(cursor.key())[:16] for cursor in cursors if cursor.set_range(due)]
        if not standing:
            return
        h = min(standing)
        yield h
        # The next possible hash; behind the last one there is none.
        following = int.from_bytes(h.ljust(16, b"\0"), "big") + 1
        if following >> 128:
            return
        due = max(following.to_bytes(16, "big"), h + b"\0" if len(h) < 16 else b"")


def session_damage(transaction: Transaction, h: bytes) -> tuple[list[str], Head | None]:
    """(what is wrong with a session's rows, its head row if that can be read)."""
    wrong: list[str] = []
    head: Head | None = None
    value = transaction.get("heads", h) if len(h) == 16 else None
    if value is not None:
        try:
            head = decode_head(h, value)
            if head.phase not in _PHASES:
                wrong.append(f"the head row has the unknown phase {head.phase}")
        except Corrupt as error:
            wrong.append(error.message)
    else:
        wrong.append("rows without a head row")
    for found in _damaged_rows(transaction, h, head if not wrong else None):
        wrong.append(found)
        if len(wrong) == FINDINGS_MAX:
            break
    return wrong, head


def _damaged_rows(transaction: Transaction, h: bytes, head: Head | None) -> Iterator[str]:
    held = head is not None and head.phase in HELD_PHASES and head.lifecycle != LIFECYCLE_DELETED
    last = 0
    for key, value in transaction.scan("turns", h):
        first_seq = int.from_bytes(key[16:], "big")
        try:
            headers = core.scan_frames(h, value)
        except Corrupt as error:
            yield f"row {first_seq} of turns: {error.message}"
            continue
        if not headers or headers[0].seq != first_seq:
            yield f"row {first_seq} of turns begins with another turn"
        elif held and head is not None and first_seq >= head.hot_first and first_seq != max(last + 1, head.hot_first):
            yield f"turns {max(last + 1, head.hot_first)} to {first_seq - 1} are missing from their rows"
        last = headers[-1].seq if headers else last
    if held and head is not None and head.hot_first <= head.head_seq and last != head.head_seq:
        yield f"the rows end at turn {last} and the head is turn {head.head_seq}"
    try:
        entries = b"".join(_ids(transaction, h))
        seqs = [int.from_bytes(entries[at + 16 : at + 24], "big") for at in range(0, len(entries), TURN_ID_ENTRY_BYTES)]
        if held and head is not None:
            due = list(range(head.head_seq - len(seqs) + 1, head.head_seq + 1))
            if seqs != due or len(seqs) < min(head.head_seq, TURN_IDS_MAX):
                yield f"the turn ids do not reach back from turn {head.head_seq} without a gap"
    except Corrupt as error:
        yield error.message
    try:
        for version, content in log.checkpoints(transaction, h, head.saved if held and head else None):
            boundary = states.decode(content).boundary
            if boundary[0] << 32 | boundary[1] != version:
                yield f"the checkpoint {version} holds another version"
    except Corrupt as error:
        yield error.message
    yield from blobs.damage(transaction, h)
    committed = transaction.get("manifests", h) if len(h) == 16 else None
    if committed is not None or held:
        try:
            decode_committed(h, committed)
        except Corrupt as error:
            yield error.message


def _ids(transaction: Transaction, h: bytes) -> Iterator[bytes]:
    for key, value in transaction.scan("ids", h):
        entries = unwrap(h, "ids", value)
        chunk = int.from_bytes(key[16:], "big")
        first = int.from_bytes(entries[16:24], "big")
        if len(entries) % TURN_ID_ENTRY_BYTES or (first - 1) // IDS_PER_CHUNK != chunk:
            raise Corrupt("CORRUPT_HOT_ROW", f"The chunk {chunk} of turn ids of session {h.hex()} holds other turns.")
        yield entries


def main(hot_dir: str) -> None:
    """Survey a hot tier and say as JSON lines on standard output what was found."""
    last_told = 0.0

    def told(sessions: int) -> None:
        nonlocal last_told
        if time.monotonic() - last_told > TELL_EVERY_S:
            last_told = time.monotonic()
            print(json.dumps({"looked": sessions}), flush=True)

    try:
        found = look_through(Path(hot_dir), told)
    except Corrupt as error:
        print(json.dumps({"newer": error.message}), flush=True)
        return
    said = {
        "unusable": found.unusable,
        "sessions": found.sessions,
        "unflushed": found.unflushed,
        "damaged": {h.hex(): wrong for h, wrong in found.damaged.items()},
        "index": [key.hex() for key in found.index],
    }
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
