"""Ten thousand flipped bits over every kind of file and object: each is refused by name or changes nothing.

Every kind goes through the functions that read it in a daemon or a command; a table says what became of the flips. With
the checksums taken out the same count must find wrong content: so this instrument shows that it can see.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sessiond.cli import dump, exits
from sessiond.core import envelope
from sessiond.errors import SessiondError
from sessiond.testing import running_daemon
from sessiond.tiers.cloud.bucket import lease_key, open_bucket, orphan_key, segment_index_key
from sessiond.tiers.cloud.fit import PASSED_KEY, ensure_fit
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.lease import Lease
from sessiond.tiers.hot import environment, log, rows
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.survey import survey
from sessiond.tiers.hydrate import Segments, indexed_session, load
from sessiond.tokens import VOCAB_DIR, Tokenizer
from sessiond.v1 import admin_pb2, turn_pb2
from sessiond.verify import read_orphan
from tests.cli.command import environment as process_environment
from tests.cli.command import run
from tests.e2e import stores
from tests.wire import PARTIAL, Wire, user

SEED = 20261120
SESSION = "flipped-and-sealed"
OTHERS = [f"inline-{number:02}" for number in range(24)]
FLIPS_MIN = 10_000
RAW_FLIPS = 800
RAW_PROCESSES = 2


@dataclass(frozen=True)
class Kind:
    """One kind of bytes: where they stand, and how they are read. read: what a reader is told of them."""

    name: str
    stored: bytes
    write: Callable[[bytes], None]
    read: Callable[[], Any]
    flips: int


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiers of a daemon that was killed: one session with a segment, many without, one that expires."""
    data_dir = tmp_path_factory.mktemp("node") / "data"
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            stores.talk(wire, SESSION, sealed=True)
            for session in OTHERS:
                stores.talk(wire, session, sealed=False)
            policy = turn_pb2.SessionPolicy()
            policy.expiry.ttl_ms = 40 * 86_400_000
            wire.create("expires", user_id="ada", policy=policy)
            wire.admin.Flush(admin_pb2.FlushRequest())
            wire.append(SESSION, user("late", "Only on the node."))
        daemon.kill()
    return data_dir


def flipped(rng: random.Random, stored: bytes, count: int) -> Iterator[bytes]:
    """Copies of these bytes with one bit flipped, half of them in front, where the structure is; each bit once."""
    bits = 8 * len(stored)
    chosen = rng.sample(range(bits), count) if count < bits else list(range(bits))
    for number, bit in enumerate(chosen):
        if number % 2 and bits > 8 * 200 and count < bits:
            bit %= 8 * 160
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def judge(kind: Kind, rng: random.Random) -> Counter[str]:
    """How many flips were refused, harmless and wrong."""
    kind.write(kind.stored)
    sound = kind.read()
    outcomes: Counter[str] = Counter()
    for damaged in flipped(rng, kind.stored, kind.flips):
        kind.write(damaged)
        try:
            answer = kind.read()
        except (SessiondError, log.HistoryNeeded):
            outcomes["detected"] += 1
        except Exception:
            # Only where the checks are taken out: a reader that trusts them meets what it was never to meet.
            outcomes["wrong"] += 1
        else:
            outcomes["harmless" if answer == sound else "wrong"] += 1
    kind.write(kind.stored)
    return outcomes


# Objects and files ----------------------------------------------------------------------------------------------------


def objects(data_dir: Path) -> Iterator[Kind]:
    cloud = data_dir / "cloud"
    store = FolderStore(cloud)
    h = stores.hash_of(data_dir, SESSION)
    cold = load(store, h)
    assert cold is not None
    manifest = cold.manifest
    [row] = manifest.segments

    def at(key: str) -> tuple[bytes, Callable[[bytes], Any]]:
        path = cloud / key
        return path.read_bytes(), path.write_bytes

    def refuse_damage(found: Any) -> Any:
        if dump._damaged(found):
            raise AssertionRefused
        return found

    yield Kind("manifest", *at(f"m/{h.hex()}"), lambda: load(store, h).manifest, 1500)  # type: ignore[union-attr]
    segment = next((cloud / "s" / h.hex()).iterdir())
    yield Kind("segment", *at(f"s/{h.hex()}/{segment.name}"), lambda: Segments(store).frames(manifest, row), 1000)

    body = envelope.seal(envelope.KIND_SEGMENT_INDEX, {"v": 1, "h": h, "rows": [row]})
    name = segment_index_key(h, 9, sha256(body).digest())
    store.put(name, body)
    indexed = replace(manifest, index=[name, 1, 9, 1])
    yield Kind("segment index", *at(name), lambda: Segments(store).rows(indexed), 700)

    body = envelope.seal(envelope.KIND_ORPHAN, {"v": 1, "h": h, "epoch": 1}, manifest.inline_frames)
    digest = sha256(body).digest()
    orphan = [orphan_key(h, 1, 1, digest), 1, manifest.inline_first, manifest.head, digest]
    store.put(str(orphan[0]), body)
    yield Kind("orphan", *at(str(orphan[0])), lambda: read_orphan(h, orphan, store.get(str(orphan[0])).body), 700)

    key = str(next((cloud / "u").rglob(f"*-{h.hex()}")).relative_to(cloud))
    yield Kind("user index", *at(key), lambda: told(indexed_session(store, key)), 700)

    expiry = next(path for path in (cloud / "x").rglob("*") if path.is_file())
    yield Kind(
        "expiry row",
        *at(str(expiry.relative_to(cloud))),
        lambda: refuse_damage(dump.object_file(expiry, True)),
        500,
    )

    [lease] = (cloud / "n").iterdir()

    def acquire() -> Any:
        taker = Lease(store, lease.name, bytes(16), "", 500, lambda: None, wait=lambda _: None)
        return taker._holder(store.get(lease_key(lease.name)).body)

    yield Kind("lease", *at(f"n/{lease.name}"), acquire, 600)
    yield Kind("bucket.json", *at("bucket.json"), lambda: open_bucket(store, b"", 0, make=False), 700)
    yield Kind("probe mark", *at(PASSED_KEY), lambda: ensure_fit(store), 16)

    vocabulary = data_dir / "vocab"
    shutil.copytree(VOCAB_DIR, vocabulary)
    path = vocabulary / "o200k_base.vocab"
    yield Kind(
        "vocabulary", path.read_bytes(), path.write_bytes, lambda: Tokenizer(vocabulary).verify_vocabularies(), 150
    )

    moved = stores.copy(data_dir, data_dir.with_name("moved"))
    with stores.rows(moved) as (transaction, tables):
        value = bytearray(transaction.get(h, db=tables["heads"]))
        value[9] ^= 1
        transaction.put(h, bytes(value), db=tables["heads"])
    assert run("repair", "--data-dir", moved, "--map-size-bytes", 1024**3).code == exits.OK
    [aside] = (moved / "aside").iterdir()
    yield Kind("rows moved aside", aside.read_bytes(), aside.write_bytes, lambda: refuse_damage(shown(aside)), 700)


def shown(path: Path) -> dict[str, Any]:
    """What dump says of a file of rows; the damage for which it was moved is no news."""
    found = dump.object_file(path, True)
    for row in found.get("rows", ()):
        if row["table"] == "heads":
            row.pop("damage", None)
    return found


class AssertionRefused(log.HistoryNeeded):
    """What was shown says that it is damaged."""

    def __init__(self) -> None:
        super().__init__(0, 0)


def told(name: str) -> str:
    if not name:
        raise AssertionRefused  # a listing that knows no name says that the session can't be read
    return name


# Rows of each table ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def row_kinds(data_dir: Path) -> Iterator[list[Kind]]:
    """Rows of the sealed session, in one transaction that is never committed."""
    h = stores.hash_of(data_dir, SESSION)
    with stores.environment(data_dir) as (env, tables):
        raw = env.begin(write=True)
        transaction = Transaction(raw, tables)
        head = log.read_head(transaction, h)
        assert head is not None

        def frames() -> bytes:
            log.check_newest(transaction, h, head)
            return log.frames_between(transaction, h, head.hot_first, head.head_seq, 1 << 24)[0]

        def users() -> str:
            return told(rows.unwrap_text(h, "users", transaction.get("users", users_key)))

        readers: dict[str, tuple[Callable[[], Any], int]] = {
            "heads": (lambda: log.read_head(transaction, h), 600),
            "turns": (frames, 600),
            "ids": (lambda: log.turn_ids(transaction, h, head.head_seq), 500),
            "checkpoints": (lambda: log.checkpoints(transaction, h, head.saved), 500),
            "manifests": (lambda: rows.decode_committed(h, transaction.get("manifests", h)), 500),
            "users": (users, 300),
            # Only the key says anything about content; the value says when to look.
            "dirty": (lambda: [key for key, _ in transaction.scan("dirty", b"")], 72),
            "meta": (lambda: environment._incarnation(transaction, data_dir), 160),
        }
        users_key = next(key for key, _ in transaction.scan("users", b"") if key.endswith(h))
        keys = {"users": users_key, "meta": environment.META_INCARNATION}
        kinds = []
        for table, (read, flips) in readers.items():
            key = keys.get(table) or next(key for key, _ in transaction.scan(table, h))

            def write(value: bytes, table: str = table, key: bytes = key) -> None:
                transaction.put(table, key, value)

            kinds.append(Kind(f"row of {table}", bytes(transaction.get(table, key)), write, read, flips))
        try:
            yield kinds
        finally:
            raw.abort()


# LMDB's own file ------------------------------------------------------------------------------------------------------


def raw_flips(data_dir: Path, count: int, *options: str) -> list[dict[str, Any]]:
    """What became of flips anywhere in the file, each under a process of its own that reads and appends."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.raw_flips", str(data_dir), str(SEED + number), str(count), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**process_environment(), "PYTHONPATH": "src:."},
            cwd=Path(__file__).parents[2],
        )
        for number in range(RAW_PROCESSES)
    ]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    found = [json.loads(line) for lines in printed for line in lines.splitlines()]
    assert len(found) == RAW_PROCESSES * count
    return found


def count_raw(found: list[dict[str, Any]]) -> dict[str, Counter[str]]:
    names = {"refused": "detected", "crashed": "detected", "hung": "detected"}
    table: dict[str, Counter[str]] = {}
    for row in found:
        kind = f"LMDB: {row['region']}"
        table.setdefault(kind, Counter())[names.get(row["outcome"], row["outcome"])] += 1
    return table


def with_flip(source: Path, folder: Path, row: dict[str, Any]) -> Path:
    """A copy of a node with this flip in its hot tier's file."""
    data_dir = stores.copy(source, folder)
    path = data_dir / "hot" / "data.mdb"
    stored = bytearray(path.read_bytes())
    stored[row["at"]] ^= 1 << row["bit"]
    path.write_bytes(stored)
    return data_dir


# The promises ---------------------------------------------------------------------------------------------------------


def test_of_ten_thousand_flips_none_is_served(node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_dir = stores.copy(node, tmp_path / "data")
    rng = random.Random(SEED)
    table: dict[str, Counter[str]] = {}
    for kind in objects(data_dir):
        table[kind.name] = judge(kind, rng)
    with row_kinds(data_dir) as kinds:
        table.update({kind.name: judge(kind, rng) for kind in kinds})
    raw = raw_flips(node, RAW_FLIPS // RAW_PROCESSES)
    table.update(count_raw(raw))
    total = sum(sum(outcomes.values()) for outcomes in table.values())
    with capsys.disabled():
        print(f"\n{'kind':<24}{'flips':>8}{'detected':>10}{'harmless':>10}{'wrong':>8}")
        for name, outcomes in table.items():
            counts = [outcomes[outcome] for outcome in ("detected", "harmless", "wrong")]
            print(f"{name:<24}{sum(counts):>8}{counts[0]:>10}{counts[1]:>10}{counts[2]:>8}")
        print(f"{'all':<24}{total:>8}")
    assert total >= FLIPS_MIN
    assert {name: outcomes["wrong"] for name, outcomes in table.items() if outcomes["wrong"]} == {}, [
        row for row in raw if row["outcome"] == "wrong"
    ]
    # What can be read at all is never merely harmless.
    for name in ("manifest", "segment", "segment index", "orphan", "user index", "expiry row", "lease", "vocabulary"):
        assert set(table[name]) == {"detected"}, name
    # Whatever made LMDB crash is known to the command that mends it.
    for number, row in enumerate([row for row in raw if row["outcome"] in ("crashed", "hung")][:20]):
        damaged = with_flip(node, tmp_path / f"crashed-{number}", row)
        assert survey(damaged / "hot").unusable, row
        shutil.rmtree(damaged)


def test_a_node_whose_hot_tier_crashes_it_serves_again_after_repair(node: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(node, tmp_path / "data")
    path = data_dir / "hot" / "data.mdb"
    stored = bytearray(path.read_bytes())
    for at in range(2 * 4096, len(stored), 4096):
        stored[at + 11] ^= 0x40
        stored[at + 12] ^= 0x10
        stored[at + 15] ^= 0x80
    path.write_bytes(stored)
    assert run("repair", "--data-dir", data_dir, "--map-size-bytes", 1024**3).code == exits.OK
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        receipt = wire.resume(SESSION).receipt
        assert receipt.rung == PARTIAL
        assert receipt.missing[0].first_seq == receipt.cloud_seq + 1
        assert wire.append(SESSION, user("late", "Only on the node.")).turns[0].duplicate is False


class Alike:
    """A checksum that matches any other."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_without_checksums_the_same_count_finds_wrong_content(
    node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = stores.copy(node, tmp_path / "data")
    kinds = {kind.name: kind for kind in objects(data_dir)}
    monkeypatch.setattr(envelope, "_chunk_crc", lambda *_: Alike())
    for module in (rows, log, environment):
        monkeypatch.setattr(module, "unwrap", lambda h, table, value: bytes(value[4:]))
    rng = random.Random(SEED)
    blind = ["manifest", "user index", "expiry row", "lease", "rows moved aside"]
    found = {name: judge(kinds[name], rng)["wrong"] for name in blind}
    with row_kinds(data_dir) as row_list:
        found.update({kind.name: judge(kind, rng)["wrong"] for kind in row_list if kind.name not in HELD_OTHERWISE})
    assert all(found.values()), found


# Frames carry a checksum that the compiled core checks; a row of dirty says nothing of content.
HELD_OTHERWISE = ("row of turns", "row of dirty")


def test_without_its_checks_a_flip_in_lmdbs_own_pages_is_served_wrong(node: Path) -> None:
    """Rows that a damaged page hides all verify: only what must be there beside them tells."""
    outcomes = Counter(row["outcome"] for row in raw_flips(node, 150, "leaf", "blind"))
    assert outcomes["wrong"], outcomes
