"""Flips bits in LMDB's file under a child process that reads, appends and reads again, as a daemon would.

A process of its own, for LMDB may crash: `python -m tests.e2e.raw_flips DATA_DIR SEED COUNT [leaf] [blind]`. It prints
one JSON line a flip: {"region", "at", "bit", "outcome", "what"}; outcome: refused, harmless, wrong, crashed, hung.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

from sessiond import core
from sessiond.core import rules
from sessiond.errors import SessiondError
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hot.rows import decode_committed

MAP_BYTES = 1024**3
HANG_S = 20
PAGE = 4096
APPENDS = 3


def regions(data: bytes) -> dict[str, list[tuple[int, int]]]:
    """Where what stands in the file, as (first byte, end): LMDB's own pages by kind, and the rest by what they hold."""
    found: dict[str, list[tuple[int, int]]] = {"meta": [(0, 152), (PAGE, PAGE + 152)]}
    number = 2
    while number < len(data) // PAGE:
        at = number * PAGE
        _, _, flags, lower, upper = struct.unpack_from("<QHHHH", data, at)
        if flags & 0x04:  # overflow: one value over several pages
            pages = struct.unpack_from("<I", data, at + 12)[0]
            found.setdefault("overflow header", []).append((at, at + 16))
            found.setdefault("values", []).append((at + 16, at + pages * PAGE))
            number += max(1, pages)
            continue
        kind = "branch" if flags & 0x01 else "leaf" if flags & 0x02 else "other"
        found.setdefault(f"{kind} header", []).append((at, at + max(16, min(lower, PAGE))))
        if kind == "leaf" and upper < PAGE:
            found.setdefault("leaf nodes", []).append((at + upper, at + PAGE))
        number += 1
    return found


def choose(rng: random.Random, data: bytes, count: int, wanted: str) -> list[tuple[str, int, int]]:
    """(region, byte, bit) of each flip: as many in each region, however small; in those named so, or in all."""
    places = {name: found for name, found in regions(data).items() if name.startswith(wanted)}
    chosen = []
    for number in range(count):
        name = sorted(places)[number % len(places)]
        first, end = rng.choice(places[name])
        chosen.append((name, rng.randrange(first, end), rng.randrange(8)))
    return chosen


def read_all(hot: Environment, sessions: list[bytes]) -> dict[str, Any]:
    """Every session through the functions that serve it: its answer, None where there is none, or the refusal."""
    answers: dict[str, Any] = {}
    for h in sessions:
        try:
            with hot.read() as transaction:
                head = log.read_head(transaction, h)
                if head is None:
                    answers[h.hex()] = None  # the service looks in the cloud tier, and says PARTIAL
                    continue
                frames, reached = b"", head.hot_first - 1
                while reached < head.head_seq:
                    piece, reached = log.frames_between(transaction, h, reached + 1, head.head_seq, 1 << 20)
                    frames += piece
                log.check_newest(transaction, h, head)
                saved = log.checkpoints(transaction, h, head.saved)
                ids = log.turn_ids(transaction, h, head.head_seq)
                manifest = decode_committed(h, transaction.get("manifests", h))
                core.scan_frames(h, frames)
                said = [head.state, frames, b"".join(content for _, content in saved), ids]
                answers[h.hex()] = [head.head_seq, manifest.mutation, *(sha256(part).hexdigest() for part in said)]
        except (SessiondError, log.HistoryNeeded) as error:
            answers[h.hex()] = {"refused": str(error)}
    return answers


def append(hot: Environment, h: bytes, number: int) -> bool:
    """One append as the service makes it; whether there was a session to append to."""
    body = bytes([0xA2, 0x01, 4]) + b"new%d" % number + bytes([0xAA, 0x01, 6, 0x0A, 4, 0x0A, 2]) + b"hi"
    digest = rules.body_digest(b"key", 1, 2, 1, body)
    turn = log.PreparedTurn(f"new{number}", 1, 2, 1, body, digest, (5, 5, 0), (1, 1, 0))

    def operation(transaction: Any) -> bool:
        head = log.read_head(transaction, h)
        if head is not None:
            log.append(transaction, h, head.session, [turn], None, None, 1, 1, lambda: 1, lambda: 1, dict)
        return head is not None

    return hot.run_blocking(operation, len(body))


def look(folder: Path, sessions: list[bytes]) -> dict[str, Any]:
    """What a node sees of its hot tier when it starts, and after some appends to its last session."""
    try:
        hot = Environment(folder, MAP_BYTES, 64, 8)
    except SessiondError as error:
        return {"refused": error.reason}
    before = read_all(hot, sessions)
    refusal, steps = "", [before[sessions[-1].hex()]]
    for number in range(APPENDS):
        try:
            appended = append(hot, sessions[-1], number)
        except (SessiondError, log.HistoryNeeded) as error:
            refusal = str(error)
            break
        if not appended:
            break  # its head row is gone, as `before` says
        steps.append(read_all(hot, sessions[-1:])[sessions[-1].hex()])
    after = read_all(hot, sessions)
    hot.close()
    return {"before": before, "after": after, "steps": steps, "refusal": refusal}


def in_child(folder: Path, sessions: list[bytes]) -> tuple[str, dict[str, Any]]:
    """(how the child ended, what it saw)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(HANG_S)
            os.close(reading)
            with os.fdopen(writing, "w") as out:
                json.dump(look(folder, sessions), out)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as answered:
        said = answered.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGALRM:
        return "hung", {}
    return ("", json.loads(said)) if code == 0 else ("crashed", {})


def judge(seen: dict[str, Any], sound: dict[str, Any]) -> tuple[str, str]:
    """(outcome, what)."""
    if "refused" in seen:
        return "refused", str(seen["refused"])
    refused = [seen["refusal"]] if seen["refusal"] else []
    # The session that was appended to stands where its acknowledged appends left it.
    acked = len(seen["steps"]) - 1
    last = list(sound["after"])[-1]
    for moment in ("before", "after"):
        for h, answer in seen[moment].items():
            due = sound["steps"][acked] if moment == "after" and h == last else sound[moment][h]
            if answer is None or isinstance(answer, dict):
                refused.append(f"{h}: {answer}")
            elif answer != due:
                places = [place for place, pair in enumerate(zip(answer, due, strict=True)) if pair[0] != pair[1]]
                return "wrong", f"{moment} {h} places {places}"
    return ("refused", refused[0][:200]) if refused else ("harmless", "")


def blind() -> None:
    """Take out what notices that LMDB hides a row, or brings an older one back."""
    turn_ids, checkpoints = log.turn_ids, log.checkpoints
    log.turn_ids = lambda transaction, h, head_seq=None: turn_ids(transaction, h)
    log.checkpoints = lambda transaction, h, saved=None: checkpoints(transaction, h)
    log.check_newest = lambda transaction, h, head: None


def main(data_dir: str, seed: int, count: int, wanted: str) -> None:
    source = Path(data_dir) / "hot"
    data = (source / "data.mdb").read_bytes()
    # Without the room that is kept behind the last page: there is nothing in it to be damaged.
    newest = max((0, PAGE), key=lambda at: struct.unpack_from("<Q", data, at + 144)[0])
    data = data[: (struct.unpack_from("<Q", data, newest + 136)[0] + 1) * PAGE]
    # In memory where that is possible: thousands of commits, none of which has to last.
    shared = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="flipped-", dir=shared if os.access(shared, os.W_OK) else data_dir))

    def fresh(stored: bytes) -> None:
        (folder / "lock.mdb").unlink(missing_ok=True)
        (folder / "data.mdb").write_bytes(stored)

    fresh(data)
    hot = Environment(folder, MAP_BYTES, 64, 8)
    with hot.read() as transaction:
        sessions = [bytes(key) for key, _ in transaction.scan("heads", b"")]
    hot.close()
    fresh(data)
    _, sound = in_child(folder, sessions)
    for region, at, bit in choose(random.Random(seed), data, count, wanted):
        damaged = bytearray(data)
        damaged[at] ^= 1 << bit
        fresh(bytes(damaged))
        ended, seen = in_child(folder, sessions)
        outcome, what = (ended, "") if ended else judge(seen, sound)
        print(json.dumps({"region": region, "at": at, "bit": bit, "outcome": outcome, "what": what}), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    if "blind" in sys.argv[4:]:
        blind()
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), "leaf" if "leaf" in sys.argv[4:] else "")
