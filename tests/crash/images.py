"""Crash images of a recorded run, each held against what the run's clients had been told by then.

It never decides anything by chance that a seed and a number do not give again: an image is named by its run, the seed
and its number, and any of them can be made and judged alone.

    python -m tests.crash.images RUN --seed S --count N          judge the images 0 to N - 1
    python -m tests.crash.images RUN --seed S --only I --keep D  judge image I and leave its two tiers in folder D

A run is a folder with `trace`, written by recorder.c, and `run.json`: the recorded folder, and every acknowledgement
with the place in the trace's order at which a client had it in hands. Images are judged in a process of their own,
because a torn map may end the process that reads it.

What has to hold in every image:

- the hot tier opens, every row of every table can be read, and once more after the product wrote to it;
- every turn that a client held an acknowledgement of is in the log, under its turn_id, epoch, seq and chain; no
  version of a checkpoint is lower than one that was told; what was told to be in the cloud tier is there;
- `sessiond.verify` finds both tiers clean, with every invariant over every session.

One image in `daemon_every` is also written to a folder, checked by `sessiond verify` as a whole, and served by a real
daemon: every acknowledged turn comes over the port, and every session can be appended to.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sessiond import config
from sessiond.core import invariants, rules
from sessiond.core import state as states
from sessiond.core.manifest import Manifest
from sessiond.errors import SessiondError
from sessiond.testing import running_daemon
from sessiond.tiers.cloud.bucket import BUCKET_KEY, Bucket, open_bucket
from sessiond.tiers.cloud.store import Listed, ObjectNotFound, ObjectStore, Stored
from sessiond.tiers.hot.environment import TABLES, Environment, Reader
from sessiond.tiers.hot.log import read_head
from sessiond.tiers.hydrate import load
from sessiond.verify import _Checker, verify
from tests.crash.disk import FSYNC, WRITE, Body, Choice, Disk, Trace, read_trace
from tests.wire import Wire, assistant, user

TENANT = "default"
MAP_SIZE_BYTES = 64 * 1024**2
# Of a report; one cause may show in every image.
VIOLATIONS_MAX = 10
PROGRESS_EVERY = 500
# Tables whose keys begin with a session's hash.
SESSION_TABLES = ("heads", "turns", "ids", "checkpoints", "manifests", "dirty")


@dataclass(slots=True)
class Ack:
    """What a client was told. instant: the number of events after which it had the answer in hands.

    turns: (turn_id, epoch, seq, chain in hexadecimal). cloud_seq: what the answer counted as committed.
    """

    session: str
    instant: int
    turns: list[tuple[str, int, int, str]]
    version: int
    cloud_seq: int


@dataclass(slots=True)
class Run:
    """A recorded run."""

    folder: Path
    trace: Trace
    acks: list[Ack]
    sessions: list[str]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Raises TraceRefused."""
        told = json.loads((folder / "run.json").read_text())
        trace = read_trace(folder / "trace", told["folder"])
        acks = [Ack(**{**row, "instant": trace.instant(row["instant"])}) for row in told["acks"]]
        acks.sort(key=lambda ack: ack.instant)
        return cls(folder, trace, acks, sorted({ack.session for ack in acks}))


@dataclass(slots=True)
class Report:
    """What came of the images of a run. violations: [number, sentence]."""

    images: int = 0
    distinct: int = 0
    sessions_checked: int = 0
    daemons: int = 0
    acks: int = 0
    seconds: float = 0.0
    violations: list[tuple[int, str]] = field(default_factory=list)


@dataclass(slots=True)
class Found:
    """One session as an image holds it. satisfied: how many of its acknowledgements, oldest first, hold."""

    satisfied: int
    violations: list[str]


@dataclass(slots=True)
class HotImage:
    """What was read of an image of the hot tier: per session the digest of its rows. failure: why it can't be read."""

    rows: dict[bytes, bytes]
    failure: str = ""


class ImageStore(ObjectStore):
    """The objects of an image, to read only."""

    url = "image:"

    def __init__(self, objects: dict[str, Choice]) -> None:
        self.objects = objects
        self._keys = sorted(objects)

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        if key not in self.objects:
            raise ObjectNotFound(key, "not in the image")
        body = self.objects[key].bytes()
        if first_byte is not None and last_byte is not None:
            body = body[first_byte : last_byte + 1]
        return Stored(body, "")

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        keys = [key for key in self._keys if key.startswith(prefix) and key > start_after]
        return iter([Listed(key, 0) for key in keys[:limit]])

    def close(self) -> None:
        """Nothing to let go of."""


class Examiner:
    """Makes and judges images of one run. What an equal image or an equal session proved is not proved again."""

    def __init__(self, run: Run, seed: int, room: Path) -> None:
        self.run = run
        self.seed = seed
        self.report = Report()
        self._room = room
        self._disk = Disk(run.trace)
        self._hot = f"{run.trace.folder}/hot"
        self._cloud = f"{run.trace.folder}/cloud"
        self._acks: dict[str, list[Ack]] = defaultdict(list)
        for ack in run.acks:
            self._acks[ack.session].append(ack)
        self._instants = [ack.instant for ack in run.acks]
        self._commits = self._inside_commits()
        self._images: set[tuple[Any, ...]] = set()
        self._hot_images: dict[Any, HotImage] = {}
        self._sessions: dict[tuple[bytes, ...], Found] = {}
        self._buckets: dict[bytes, Bucket] = {}

    def _inside_commits(self) -> list[int]:
        """The instants at which something of the hot tier's file is in flight."""
        found: list[int] = []
        files: set[int] = set()
        in_flight = 0
        for index, (operation, is_end) in enumerate(self.run.trace.events):
            if is_end and operation.opened and operation.paths[0] == f"{self._hot}/data.mdb":
                files.add(operation.opened)
            if operation.file in files and operation.kind == WRITE:
                in_flight += not is_end
                in_flight -= is_end and operation.durable
            elif operation.file in files and operation.kind == FSYNC and is_end:
                in_flight = 0
            if in_flight:
                found.append(index + 1)
        return found

    def instant_of(self, number: int) -> int:
        """Where in the run image `number` is taken: while the daemon first starts, anywhere, inside a commit, or
        just when an answer had arrived.
        """
        rng = random.Random(f"{self.seed}:{number}:instant")
        how = rng.random()
        if how < 0.1:  # the first start, at which names and the first pages come to the disk
            return rng.randint(0, self._instants[0])
        if how < 0.25:
            return rng.randint(0, len(self.run.trace.events))
        if how < 0.8 and self._commits:
            return rng.choice(self._commits)
        return rng.choice(self._instants)

    def examine(
        self,
        numbers: list[int],
        daemon_every: int = 0,
        fail_fast: bool = False,
        keep: Path | None = None,
        share: int = 0,
        shares: int = 1,
    ) -> Report:
        """Judge the images of these numbers, or of one of so many shares of them."""
        started = time.monotonic()
        order = sorted((self.instant_of(number), number) for number in numbers)
        # Neighbours in time hold the same sessions, so each process takes a stretch; later ones hold more turns.
        first, last = (round(len(order) * (at / shares) ** 0.8) for at in (share, share + 1))
        for instant, number in order[first:last]:
            self._disk.advance(instant)
            # Whoever started this process reads which image ended it, if one does.
            (self._room / "image").write_text(str(number))
            served = bool(daemon_every) and number % daemon_every == 0
            for sentence in self._examine_one(number, served, keep):
                if len(self.report.violations) < VIOLATIONS_MAX:
                    self.report.violations.append((number, f"after {instant} events: {sentence}"))
            self.report.images += 1
            if self.report.images % PROGRESS_EVERY == 0:
                print(f"share {share + 1} of {shares}: {self.report.images} of {last - first}", file=sys.stderr)
            if self.report.violations and fail_fast:
                break
        self.report.distinct = len(self._images)
        self.report.sessions_checked = len(self._sessions)
        self.report.acks = len(self.run.acks)
        self.report.seconds = time.monotonic() - started
        return self.report

    def _examine_one(self, number: int, served: bool, keep: Path | None) -> Iterator[str]:
        rng = random.Random(f"{self.seed}:{number}:image")
        target = self._disk.pick_path(f"{self._hot}/data.mdb", rng)
        data = self._disk.pick_bytes(target, rng) if isinstance(target, Body) else None
        tree = self._disk.pick_tree(self._cloud, rng, without=(".tmp", ".locks"))
        objects = {name: self._disk.pick_bytes(body, rng) for name, body in tree.items()}
        self._images.add((data.key if data else None, *(choice.key for choice in objects.values())))
        folder = self._room / "hot"
        rewrites = number % 10 == 0 or served
        hot = self._read_hot(data, folder, rewrites)
        if hot.failure:
            yield hot.failure
        else:
            yield from self._judge(hot, data, folder, ImageStore(objects))
        if served or keep:
            place = keep or self._room / "served"
            self._write_tiers(place, data, objects, rng)
            if served:
                yield from self._serve(place)
            if keep is None:
                shutil.rmtree(place)

    # The hot tier

    def _read_hot(self, data: Choice | None, folder: Path, rewrites: bool) -> HotImage:
        key = data.key if data else None
        known = self._hot_images.get(key)
        if known is not None and not rewrites:
            return known
        _lay_hot(folder, data)
        found = HotImage({})
        try:
            if data is not None:
                found.rows = _rows(folder)
            if rewrites:
                _write_to(folder, found)
        except Exception as error:
            found.failure = f"the hot tier can't be used: {type(error).__name__}: {error}"
        self._hot_images[key] = found
        return found

    def _judge(self, hot: HotImage, data: Choice | None, folder: Path, store: ImageStore) -> Iterator[str]:
        due = {session: self._due(session) for session in self.run.sessions}
        try:
            bucket = self._bucket(store)
        except SessiondError as error:
            yield f"the cloud tier does not open: {error}"
            return
        if bucket is None:
            if any(due.values()):
                yield f"{sum(due.values())} answers were given and there is no {BUCKET_KEY}"
            return
        laid = False
        for session in self.run.sessions:
            h = rules.session_hash(bucket.hash_key, TENANT, session)
            key = (h, hot.rows.get(h, b""), *_object_digests(store, h))
            found = self._sessions.get(key)
            if found is None:
                if data and not laid:
                    _lay_hot(folder, data)
                    laid = True
                found = self._sessions[key] = self._check_session(session, h, bucket, folder if data else None, store)
            yield from found.violations
            if found.satisfied < due[session]:
                yield f"session {session}: an answer does not hold: {asdict(self._acks[session][found.satisfied])}"

    def _due(self, session: str) -> int:
        """How many answers about the session had arrived by now."""
        return sum(ack.instant <= self._disk.now for ack in self._acks[session])

    def _bucket(self, store: ImageStore) -> Bucket | None:
        choice = store.objects.get(BUCKET_KEY)
        if choice is None:
            return None
        content = choice.bytes()
        if content not in self._buckets:
            self._buckets[content] = open_bucket(store, b"", 0, make=False)
        return self._buckets[content]

    def _check_session(self, session: str, h: bytes, bucket: Bucket, folder: Path | None, store: ImageStore) -> Found:
        reader = None
        try:
            reader = Reader(folder) if folder else None
            _, violations = _Checker(store, bucket, reader)._check_once(h)
            sentences = [f"session {session}: {invariant}: {sentence}" for invariant, sentence in violations]
            turns, version = _read_log(reader, h) if reader else ({}, 0)
            cold = load(store, h)
            return Found(self._satisfied(session, turns, version, cold.manifest if cold else None), sentences)
        except SessiondError as error:
            return Found(0, [f"session {session}: {error}"])
        finally:
            if reader is not None:
                reader.close()

    def _satisfied(
        self, session: str, turns: dict[str, tuple[int, int, str]], version: int, manifest: Manifest | None
    ) -> int:
        for index, ack in enumerate(self._acks[session]):
            holds = manifest is not None and manifest.head >= ack.cloud_seq and version >= ack.version
            if not holds or any(turns.get(turn_id) != tuple(rest) for turn_id, *rest in ack.turns):
                return index
        return len(self._acks[session])

    # The whole machine

    def _write_tiers(self, place: Path, data: Choice | None, objects: dict[str, Choice], rng: random.Random) -> None:
        """Both tiers as files, with the folder store's own: its locks with their notes, and bodies on their way in."""
        cloud = place / "cloud"
        cloud.mkdir(parents=True)
        own = self._disk.pick_tree(self._cloud, rng)
        held = {name: self._disk.pick_bytes(body, rng) for name, body in own.items() if name.startswith(".")}
        for name, choice in {**objects, **held}.items():
            path = cloud / name
            path.parent.mkdir(parents=True, exist_ok=True)
            choice.lay(path)
        _lay_hot(place / "hot", data)

    def _serve(self, place: Path) -> Iterator[str]:
        """The image under a real daemon, between two looks of `sessiond verify` at the whole of it."""
        self.report.daemons += 1
        due = {session: self._acks[session][: self._due(session)] for session in self.run.sessions}
        if (place / "cloud" / BUCKET_KEY).exists() and (place / "hot" / "data.mdb").exists():
            yield from _verify(place, "the image")
        try:
            with running_daemon(place, map_size_bytes=MAP_SIZE_BYTES, lease_ms=500, flush_interval_ms=20) as daemon:
                wire = Wire(daemon.address)
                for session, acks in due.items():
                    if acks:
                        yield from _ask(wire, session, acks)
                wire.close()
                daemon.kill()
        except Exception as error:
            yield f"a daemon on the image: {type(error).__name__}: {error}"
            return
        yield from _verify(place, "the image after a daemon served it")


def _lay_hot(folder: Path, data: Choice | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("data.mdb", "lock.mdb"):
        (folder / name).unlink(missing_ok=True)
    if data is not None:
        data.lay(folder / "data.mdb")


def _rows(folder: Path) -> dict[bytes, bytes]:
    """Every row of every table, as one digest per session. Raises what reading them raises."""
    found: dict[bytes, Any] = {}
    reader = Reader(folder)
    try:
        with reader.read() as transaction:
            for table in TABLES:
                of_session = table in SESSION_TABLES
                for key, value in transaction.scan(table, b""):
                    h = key[:16] if of_session else b""
                    digest = found.get(h)
                    if digest is None:
                        digest = found[h] = hashlib.blake2b(digest_size=16)
                    digest.update(b"%b %d %b %d " % (table.encode(), len(key), key, len(value)))
                    digest.update(value)
    finally:
        reader.close()
    return {h: digest.digest() for h, digest in found.items()}


def _write_to(folder: Path, before: HotImage) -> None:
    """Have the product write to the image: the lists of free pages have to be sound as well."""
    environment = Environment(folder, MAP_SIZE_BYTES, 64, 64)
    try:
        environment.mint_incarnation()
    finally:
        environment.close()
    after = _rows(folder)
    changed = [h.hex() for h, digest in before.rows.items() if h and after.get(h) != digest]
    if changed:
        before.failure = f"a write to the image changed the rows of sessions {changed}"


def _object_digests(store: ImageStore, h: bytes) -> list[bytes]:
    found = []
    for prefix in (f"m/{h.hex()}", f"s/{h.hex()}/", f"o/{h.hex()}/"):
        for row in store.list(prefix):
            choice = store.objects[row.key]
            torn = b"" if choice.size < 0 else choice.bytes()
            found.append(row.key.encode() + choice.body.content_digest() + torn)
    return found


def _read_log(reader: Reader, h: bytes) -> tuple[dict[str, tuple[int, int, str]], int]:
    """(turn_id -> epoch, seq and chain; version of the checkpoint) of a session in the hot tier. Raises Corrupt."""
    turns: dict[str, tuple[int, int, str]] = {}
    with reader.read() as transaction:
        head = read_head(transaction, h)
        if head is None:
            return turns, 0
        for _, value in transaction.scan("turns", h):
            for turn in invariants.view_turns(h, bytes(value)):
                header = turn.header
                turns[invariants.turn_id_of(turn.body)] = (header.epoch, header.seq, header.chain.hex())
        boundary = states.decode(head.state).boundary
    return turns, boundary[0] << 32 | boundary[1]


def _verify(place: Path, what: str) -> Iterator[str]:
    settings = config.load(None, {}, {"data_dir": str(place)})
    try:
        for row in verify(settings, lambda *_: None):
            yield f"verify of {what}: session {row.session_id}: {row.invariant}: {row.explanation}"
    except SessiondError as error:
        yield f"verify of {what}: {error}"


def _ask(wire: Wire, session: str, acks: list[Ack]) -> Iterator[str]:
    """What the port says of a session, and whether it can be written to."""
    told = {turn_id: tuple(rest) for ack in acks for turn_id, *rest in ack.turns}
    head = max((seq for _, seq, _ in told.values()), default=0)
    context = wire.resume(session, budget_tokens=1_000_000)
    if context.receipt.missing:
        yield f"session {session}: a resume names missing turns: {context.receipt.missing}"
    if context.checkpoint.version < max(ack.version for ack in acks):
        yield f"session {session}: a resume gives checkpoint version {context.checkpoint.version}"
    found = {turn.turn_id: (turn.epoch, turn.seq) for turn in wire.turns(session)}
    for turn_id, (epoch, seq, _) in told.items():
        if found.get(turn_id) != (epoch, seq):
            yield f"session {session}: the port gives {found.get(turn_id)} for {turn_id} of {(epoch, seq)}"
    added = wire.append(session, user("after-1", "Still there?"), assistant("after-2", "Still here."))
    if added.head.seq < head + 2:
        yield f"session {session}: an append after the crash is at turn {added.head.seq} and {head} was acknowledged"


# Command line --------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Judge images and print the report as JSON; 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash.images", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of one image, instead of --count")
    parser.add_argument("--share", type=int, default=0, help="which of --shares, for several processes at once")
    parser.add_argument("--shares", type=int, default=1)
    parser.add_argument("--daemon-every", type=int, default=0)
    parser.add_argument("--fail-fast", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--room", type=Path, help="an empty folder for the images, on a fast disk")
    given = parser.parse_args(argv)
    numbers = [given.only] if given.only is not None else list(range(given.count))
    with contextlib.ExitStack() as held:
        room = given.room or Path(held.enter_context(tempfile.TemporaryDirectory(dir=fast_folder())))
        examiner = Examiner(Run.read(given.run), given.seed, room)
        report = examiner.examine(numbers, given.daemon_every, given.fail_fast, given.keep, given.share, given.shares)
    print(json.dumps(asdict(report)))
    return 1 if report.violations else 0


def fast_folder() -> str | None:
    """Where images are laid: in memory if there is such a place, because their own fsyncs prove nothing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
