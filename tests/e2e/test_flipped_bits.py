"""Flipped bits anywhere in the two tiers: a read answers exactly as before or refuses by name, and verify sees them.

Never other content, never NOT_FOUND, never a crash. Thousands of flips go to the functions that every byte passes on
its way in; some hundreds to a daemon. Seeded, so that a failure can be had again.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import sessiond.verify
from sessiond import config, core
from sessiond.cli import exits
from sessiond.core import envelope
from sessiond.core import manifest as manifests
from sessiond.errors import Corrupt, SessiondError
from sessiond.testing import StartFailed, running_daemon
from sessiond.tiers.cloud.bucket import Bucket, manifest_key, open_bucket, segment_key
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.store import Stored
from sessiond.tiers.hot.environment import META_FORMAT, META_INCARNATION, META_STORE, Environment
from sessiond.tiers.hot.rows import decode_committed, decode_head, unwrap
from sessiond.tiers.hydrate import Segments, load
from sessiond.v1 import admin_pb2, context_pb2, session_pb2
from tests.e2e import stores
from tests.wire import Refusal, Wire, assistant, message, refusal, tool_call, user

SEED = 20261120
SEALED = [f"sealed-{number}" for number in range(14)]
INLINE = [f"inline-{number}" for number in range(40)]
# What a read of damaged bytes may answer besides the right thing, each with DATA_LOSS.
REASONS = {"CORRUPT_FRAME", "CORRUPT_HOT_ROW", "CORRUPT_MANIFEST", "CORRUPT_SEGMENT", "MISSING_SEGMENT"}


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiers of a drained daemon."""
    data_dir = tmp_path_factory.mktemp("drained") / "data"
    stores.make(data_dir, SEALED, sealed=True, drained=True)
    return data_dir


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiers of a daemon that was killed while it owned its sessions."""
    data_dir = tmp_path_factory.mktemp("killed") / "data"
    stores.make(data_dir, INLINE, sealed=False, drained=False)
    return data_dir


def flips(rng: random.Random, data: bytes, count: int, most: int = 1) -> Iterator[bytes]:
    """`count` copies of data with 1 to `most` bits flipped each, half of them in front, where the structure is."""
    for _ in range(count):
        damaged = bytearray(data)
        for _ in range(rng.randint(1, most)):
            near = min(len(data), 160) if rng.random() < 0.5 else len(data)
            damaged[rng.randrange(near)] ^= 1 << rng.randrange(8)
        if damaged != data:
            yield bytes(damaged)


def every_flip(data: bytes) -> Iterator[bytes]:
    """A copy of data for each of its bits, with that bit flipped."""
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def detected(read: Callable[[], object], *reasons: str) -> None:
    with pytest.raises(Corrupt) as failure:
        read()
    assert failure.value.reason in reasons


# The functions that every byte passes --------------------------------------------------------------------------------


def objects(data_dir: Path) -> dict[str, tuple[int, bytes]]:
    """One object of each kind in an envelope: (kind, bytes)."""
    cloud = data_dir / "cloud"
    h = stores.hash_of(data_dir, SEALED[0]).hex()
    index = next(path for path in (cloud / "u").rglob("*") if path.name.endswith(h))
    return {
        "manifest": (envelope.KIND_MANIFEST, (cloud / "m" / h).read_bytes()),
        "segment": (envelope.KIND_SEGMENT, next((cloud / "s" / h).iterdir()).read_bytes()),
        "user index": (envelope.KIND_USER_INDEX, index.read_bytes()),
        "lease": (envelope.KIND_LEASE, next((cloud / "n").iterdir()).read_bytes()),
    }


@pytest.mark.parametrize("name", ["manifest", "segment", "user index", "lease"])
def test_no_flip_in_an_object_passes_its_envelope(drained: Path, name: str) -> None:
    kind, stored = objects(drained)[name]
    reason = "CORRUPT_SEGMENT" if name == "segment" else "CORRUPT_MANIFEST"
    rng = random.Random(SEED)
    envelope.unseal(stored, kind, name)
    small = every_flip(stored) if len(stored) < 1000 else every_flip_of_the_header(stored)
    for damaged in [*small, *flips(rng, stored, 2000, most=1), *flips(rng, stored, 1000, most=8)]:
        detected(lambda damaged=damaged: envelope.unseal(damaged, kind, name), reason)  # type: ignore[misc]
    for _ in range(500):
        cut = stored[: rng.randrange(len(stored))]
        detected(lambda cut=cut: envelope.unseal(cut, kind, name), reason)  # type: ignore[misc]
    detected(lambda: envelope.unseal(stored + b"\0", kind, name), reason)


def every_flip_of_the_header(stored: bytes) -> list[bytes]:
    return [head + stored[100:] for head in every_flip(stored[:100])]


def test_no_flip_in_a_manifest_passes_its_decoder(drained: Path) -> None:
    h = stores.hash_of(drained, SEALED[0])
    _, stored = objects(drained)["manifest"]
    other = stores.hash_of(drained, SEALED[1])
    for damaged in flips(random.Random(SEED), stored, 2000, most=3):
        detected(lambda damaged=damaged: manifests.unseal(damaged, "m", h), "CORRUPT_MANIFEST")  # type: ignore[misc]
    # The whole object of a neighbour is sound, and still none of ours.
    detected(lambda: manifests.unseal(stored, "m", other), "CORRUPT_MANIFEST")


def test_no_flip_in_a_frame_passes_the_scan(drained: Path) -> None:
    h = stores.hash_of(drained, SEALED[0])
    _, stored = objects(drained)["manifest"]
    frames = manifests.unseal(stored, "m", h).inline_frames
    first = core.scan_frames(h, frames)[0]
    one = frames[first.offset : first.end]
    for damaged in [*every_flip(one), *flips(random.Random(SEED), frames, 3000, most=4)]:
        detected(lambda damaged=damaged: core.scan_frames(h, damaged), "CORRUPT_FRAME")  # type: ignore[misc]
    # And no frame passes as another session's.
    detected(lambda: core.scan_frames(stores.hash_of(drained, SEALED[1]), one), "CORRUPT_FRAME")


@pytest.mark.parametrize("table", ["heads", "ids", "checkpoints", "manifests", "users"])
def test_no_flip_in_a_row_passes_its_checksum(killed: Path, tmp_path: Path, table: str) -> None:
    h = stores.hash_of(killed, INLINE[0])
    value = dict(rows_of(stores.copy(killed, tmp_path / "data"), h))[table][1]
    unwrap(h, table, value)
    rng = random.Random(SEED)
    for damaged in [*every_flip(value[:64]), *flips(rng, value, 1500, most=4), b"", value[:3], value[:-1]]:
        full = damaged + value[64:] if len(damaged) == 64 < len(value) else damaged
        detected(lambda full=full: unwrap(h, table, full), "CORRUPT_HOT_ROW")  # type: ignore[misc]
        if table == "heads":
            detected(lambda full=full: decode_head(h, full), "CORRUPT_HOT_ROW")  # type: ignore[misc]
        if table == "manifests":
            detected(lambda full=full: decode_committed(h, full), "CORRUPT_HOT_ROW")  # type: ignore[misc]
    # Nor does a sound row as another session's, or as one of another table.
    detected(lambda: unwrap(bytes(16), table, value), "CORRUPT_HOT_ROW")
    detected(lambda: unwrap(h, "turns", value), "CORRUPT_HOT_ROW")


class One:
    """A store with nothing but a bucket.json."""

    url = "one:"

    def __init__(self, body: bytes) -> None:
        self.body = body

    def get(self, key: str) -> Stored:
        assert key == "bucket.json"
        return Stored(self.body, "etag")


def test_no_flip_in_a_bucket_is_believed(drained: Path) -> None:
    stored = (drained / "cloud" / "bucket.json").read_bytes()

    def opened(body: bytes) -> Bucket:
        return open_bucket(One(body), b"", 0, make=False)  # type: ignore[arg-type]

    sound = opened(stored)
    reasons = []
    for damaged in [*every_flip(stored), *flips(random.Random(SEED), stored, 1000, most=4)]:
        try:
            found = opened(damaged)
        except SessiondError as error:
            reasons.append(error.reason)
        else:
            assert found == sound
    assert len(reasons) > 3000
    # A format of 3, 5 or 9 reads like one: how it would be summed up is not known here.
    assert set(reasons) <= {"CORRUPT_MANIFEST", "NEWER_FORMAT"}


def open_hot(data_dir: Path, store_id: bytes) -> None:
    hot = Environment(data_dir / "hot", 1024**3, 64, 8)
    try:
        hot.bind_store(store_id)
    finally:
        hot.close()


@pytest.mark.parametrize("name", [META_FORMAT, META_INCARNATION, META_STORE])
def test_no_flip_in_the_hot_tiers_identity_is_believed(killed: Path, tmp_path: Path, name: bytes) -> None:
    data_dir = stores.copy(killed, tmp_path / "data")
    store_id = stores.bucket(data_dir).store_id
    with stores.rows(data_dir) as (transaction, tables):
        sound = transaction.get(name, db=tables["meta"])
    for damaged in every_flip(sound):
        with stores.rows(data_dir) as (transaction, tables):
            transaction.put(name, damaged, db=tables["meta"])
        with pytest.raises(SessiondError) as failure:
            open_hot(data_dir, store_id)
        assert failure.value.reason in {META_STORE: ("WRONG_STORE",)}.get(name, ("CORRUPT_HOT_ROW", "NEWER_FORMAT"))


def test_no_flip_in_a_segment_passes_its_reader(drained: Path, tmp_path: Path) -> None:
    """Name, envelope and frames each stand guard; the frames even where the first two were made to fit."""
    data_dir = stores.copy(drained, tmp_path / "data")
    store = FolderStore(data_dir / "cloud")
    h = stores.hash_of(data_dir, SEALED[0])
    cold = load(store, h)
    assert cold is not None
    [row] = cold.manifest.segments
    [path] = (data_dir / "cloud" / "s" / h.hex()).iterdir()
    stored = path.read_bytes()
    assert Segments(store).frames(cold.manifest, row)
    for damaged in flips(random.Random(SEED), stored, 300):
        path.write_bytes(damaged)
        detected(lambda: Segments(store).frames(cold.manifest, row), "CORRUPT_SEGMENT")
    meta, payload = envelope.unseal(stored, envelope.KIND_SEGMENT, "s")
    # Sound, and not what the name says.
    path.write_bytes(envelope.seal(envelope.KIND_SEGMENT, {**meta, "chain": bytes(16)}, payload))
    detected(lambda: Segments(store).frames(cold.manifest, row), "CORRUPT_SEGMENT")
    for damaged in flips(random.Random(SEED), payload, 50):
        body = envelope.seal(envelope.KIND_SEGMENT, meta, damaged)
        named = [*row[:3], hashlib.sha256(body).digest(), len(body), *row[5:]]
        store.put(segment_key(h, named[0], named[1], named[3]), body)
        detected(lambda named=named: Segments(store).frames(cold.manifest, named), "CORRUPT_FRAME")  # type: ignore[misc]
    path.unlink()
    detected(lambda: Segments(store).frames(cold.manifest, row), "MISSING_SEGMENT")
    store.close()


# A daemon over damaged tiers ------------------------------------------------------------------------------------------


def judge(found: dict[str, Any], sound: dict[str, Any], what: str) -> int:
    """How many reads were refused; fails on one that answered with anything else than before."""
    refused = 0
    for name, answer in found.items():
        if isinstance(answer, Refusal):
            assert answer.code is grpc.StatusCode.DATA_LOSS, f"{what}, {name}: {answer.code} {answer.message}"
            assert answer.reason in REASONS, f"{what}, {name}: {answer.reason}"
            assert answer.metadata["remedy"]
            refused += 1
        else:
            assert answer == sound[name], f"{what}, {name}: another answer than before"
    return refused


def look_at_all(address: str, sessions: list[str]) -> dict[str, dict[str, Any]]:
    with contextlib.closing(Wire(address)) as wire:
        return {session: stores.look(wire, session) for session in sessions}


def violations(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """The invariants that verify finds violated, by session."""
    monkeypatch.setattr(sessiond.verify, "READ_AGAIN_WAIT_S", 0)
    settings = config.load(None, {}, {"data_dir": str(data_dir)})
    found: dict[str, set[str]] = {}
    for violation in sessiond.verify.verify(settings, lambda *_: None):
        assert violation.explanation
        found.setdefault(violation.session_id, set()).add(violation.invariant)
    return found


def test_a_daemon_over_damaged_objects_answers_right_or_refuses_and_verify_names_them(
    drained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = stores.copy(drained, tmp_path / "data")
    shutil.rmtree(data_dir / "hot")
    with running_daemon(data_dir) as daemon:
        sound = look_at_all(daemon.address, SEALED)
        # Nothing was claimed: the reads were told to take nothing.
        daemon.kill()
    assert not any(isinstance(answer, Refusal) for found in sound.values() for answer in found.values())
    assert violations(data_dir, monkeypatch) == {}

    rng = random.Random(SEED)
    cloud = data_dir / "cloud"
    manifests_hit, segments_hit, indexes_hit = SEALED[:5], SEALED[5:10], SEALED[10:12]
    for session in SEALED:
        h = stores.hash_of(data_dir, session).hex()
        if session in manifests_hit:
            damage(rng, cloud / "m" / h)
        elif session in segments_hit:
            damage(rng, next((cloud / "s" / h).iterdir()))
        elif session in indexes_hit:
            damage(rng, next(path for path in (cloud / "u").rglob("*") if path.name.endswith(h)))
    before = stores.contents(cloud)
    shutil.rmtree(data_dir / "hot")
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        for session, found in look_at_all(daemon.address, SEALED).items():
            refused = judge(found, sound[session], session)
            # A damaged manifest leaves nothing to read but the listing; a damaged segment all but the old turns.
            expected = 6 if session in manifests_hit else 2 if session in segments_hit else 0
            assert refused == expected, session
        for session in manifests_hit:
            for call in (
                lambda session=session: wire.append(session, user("new", "x")),  # type: ignore[misc]
                lambda session=session: wire.append(session, user("t2", "What is the weather?")),  # type: ignore[misc]
                lambda session=session: wire.resume(session),  # type: ignore[misc]
                lambda session=session: wire.resume(session, accept_missing=9),  # type: ignore[misc]
                lambda session=session: wire.create(session, user_id="ada"),  # type: ignore[misc]
            ):
                assert refusal(call).reason == "CORRUPT_MANIFEST"
        page = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ada", page_size=200))
        assert {found.session_id for found in page.unreadable} == set(manifests_hit)
        assert {found.reason for found in page.unreadable} == {"CORRUPT_MANIFEST"}
        assert [found.session_id for found in page.sessions] == SEALED[5:]
        assert wire.admin.GetStatus(admin_pb2.GetStatusRequest()).phase == admin_pb2.NODE_PHASE_SERVING
        daemon.kill()
    after = stores.contents(cloud)
    assert {name: after[name] for name in before if not name.startswith("n/")} == {
        name: digest for name, digest in before.items() if not name.startswith("n/")
    }
    found = violations(data_dir, monkeypatch)
    # A session whose manifest can't be read is named by its hash.
    named = {stores.hash_of(data_dir, session).hex() for session in manifests_hit} | {*segments_hit, *indexes_hit}
    assert set(found) == named
    assert all("I11" in invariants for invariants in found.values())


def damage(rng: random.Random, path: Path) -> None:
    path.write_bytes(next(flips(rng, path.read_bytes(), 100)))


def rows_of(data_dir: Path, h: bytes) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    """(table, (key, value)) of every row of a session."""
    with stores.rows(data_dir) as (transaction, tables):
        found = list(session_rows(transaction, tables, h))
    yield from found


def session_rows(transaction: Any, tables: dict[str, Any], h: bytes) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    for table in ("heads", "turns", "ids", "checkpoints", "manifests", "users"):
        for key, value in transaction.cursor(db=tables[table]):
            if bytes(key).startswith(h) or (table == "users" and bytes(key).endswith(h)):
                yield table, (bytes(key), bytes(value))


TABLES = ("heads", "turns", "ids", "checkpoints", "manifests", "users")


def test_a_daemon_over_damaged_rows_answers_right_or_refuses_and_verify_names_them(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_dir = stores.copy(killed, tmp_path / "data")
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        sound = look_at_all(daemon.address, INLINE)
        daemon.kill()
    assert not any(isinstance(answer, Refusal) for found in sound.values() for answer in found.values())
    assert violations(data_dir, monkeypatch) == {}

    rng = random.Random(SEED)
    hit: dict[str, str] = {}
    hashes = {session: stores.hash_of(data_dir, session) for session in INLINE}
    with stores.rows(data_dir) as (transaction, tables):
        for number, session in enumerate(INLINE[:-2]):
            table = hit[session] = TABLES[number % len(TABLES)]
            key, value = rng.choice(
                [row for name, row in session_rows(transaction, tables, hashes[session]) if name == table]
            )
            transaction.put(key, next(flips(rng, value, 100)), db=tables[table])
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS, drain_grace_ms=2000) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            for session, found in look_at_all(daemon.address, INLINE).items():
                table = hit.get(session, "")
                refused = judge(found, sound[session], f"{session} ({table})")
                least = {"heads": 6, "turns": 1, "checkpoints": 1, "manifests": 1}.get(table, 0)
                assert least <= refused <= 6, f"{session} ({table}): {refused} reads refused"
                if not least:
                    assert refused == 0, f"{session} ({table})"
            for session, table in hit.items():
                append_to_damaged(wire, session, table)
            reply = wire.admin.Flush(admin_pb2.FlushRequest())
            assert set(reply.failures) <= REASONS
            assert wire.admin.GetStatus(admin_pb2.GetStatusRequest()).phase == admin_pb2.NODE_PHASE_SERVING
        # What can't be released is left on the disk, and the exit code says so.
        assert daemon.terminate() == exits.INCOMPLETE
    found = violations(data_dir, monkeypatch)
    read_by_verify = {session for session, table in hit.items() if table in ("heads", "turns")}
    assert read_by_verify <= set(found)
    assert all("I11" in found[session] for session in read_by_verify)


def append_to_damaged(wire: Wire, session: str, table: str) -> None:
    """A turn that is there is never appended again, and whatever can't be judged is refused by name."""
    for turn in (tool_call("t3", ("c1", "weather")), user("v0", "And then, 0?"), message("new", 2, "More.")):
        try:
            reply = wire.append(session, turn)
        except grpc.RpcError as error:
            found = Refusal(error)
            assert found.reason in REASONS, f"{session} ({table}): {found.reason}"
            assert found.code is grpc.StatusCode.DATA_LOSS
        else:
            assert reply.turns[0].duplicate == (turn.turn_id != "new"), f"{session} ({table})"


# The value of a users row names a session whose other rows can't be read; its key says the rest.
@pytest.mark.parametrize("table", [table for table in TABLES if table != "users"])
def test_verify_names_a_session_with_a_flipped_row(
    killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    data_dir = stores.copy(killed, tmp_path / "data")
    rng = random.Random(SEED)
    sessions = INLINE[:6]
    hashes = {session: stores.hash_of(data_dir, session) for session in sessions}
    with stores.rows(data_dir) as (transaction, tables):
        for session in sessions:
            rows = [row for name, row in session_rows(transaction, tables, hashes[session]) if name == table]
            key, value = rng.choice(rows)
            transaction.put(key, next(flips(rng, value, 100)), db=tables[table])
    found = violations(data_dir, monkeypatch)
    assert set(found) == set(sessions)
    assert all("I11" in invariants for invariants in found.values())


def test_rows_flipped_and_mended_under_a_running_daemon_are_never_answered_wrong(killed: Path, tmp_path: Path) -> None:
    """Nothing of a session is remembered outside the rows: damage shows at once, and so does its repair."""
    data_dir = stores.copy(killed, tmp_path / "data")
    session = INLINE[0]
    h = stores.hash_of(data_dir, session)
    rng = random.Random(SEED)
    refused = dict.fromkeys(TABLES, 0)
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire, stores.environment(data_dir) as (env, tables):
            sound = stores.look(wire, session)
            with env.begin() as transaction:
                rows = list(session_rows(transaction, tables, h))
            for number in range(240):
                table = TABLES[number % len(TABLES)]
                key, value = rng.choice([row for name, row in rows if name == table])
                write(env, tables[table], key, next(flips(rng, value, 100, most=3)))
                refused[table] += judge(stores.look(wire, session), sound, f"flip {number} in {table}")
                write(env, tables[table], key, value)
            assert judge(stores.look(wire, session), sound, "mended") == 0
        daemon.kill()
    assert all(refused[table] for table in ("heads", "turns", "checkpoints", "manifests"))


def write(env: Any, table: Any, key: bytes, value: bytes) -> None:
    with env.begin(write=True) as transaction:
        transaction.put(key, value, db=table)


# The lease and the bucket under a daemon ------------------------------------------------------------------------------


def test_a_damaged_lease_refuses_the_start_and_says_what_to_do(drained: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(drained, tmp_path / "data")
    [path] = (data_dir / "cloud" / "n").iterdir()
    damage(random.Random(SEED), path)
    with pytest.raises(StartFailed) as failure, running_daemon(data_dir):
        pass
    assert failure.value.reason == "CORRUPT_MANIFEST"
    assert failure.value.exit_code == exits.CORRUPT
    assert f"n/{path.name}" in failure.value.log
    assert "run sessiond repair" in failure.value.log
    path.unlink()
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        assert wire.resume(SEALED[0]).receipt.ownership == context_pb2.OWNERSHIP_CONFIRMED


def test_a_lease_damaged_under_a_daemon_makes_it_unconfirmed_and_loses_nothing(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", lease_ms=500) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.create("s")
        assert wire.append("s", user("t1", "Hello.")).ownership == context_pb2.OWNERSHIP_CONFIRMED
        [path] = (tmp_path / "data" / "cloud" / "n").iterdir()
        damage(random.Random(SEED), path)
        wait_until_the_lease_lapsed(wire)
        reply = wire.append("s", assistant("t2", "Hello!"))
        assert reply.ownership == context_pb2.OWNERSHIP_UNCONFIRMED
        assert wire.resume("s").receipt.ownership == context_pb2.OWNERSHIP_UNCONFIRMED
        assert [turn.turn_id for turn in wire.turns("s")] == ["t1", "t2"]


def wait_until_the_lease_lapsed(wire: Wire) -> None:
    for _ in range(100_000):
        if not wire.admin.GetStatus(admin_pb2.GetStatusRequest()).cloud.lease_valid:
            return
    raise AssertionError("the lease is valid still")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_bucket_refuses_the_start(drained: Path, tmp_path: Path, seed: int) -> None:
    data_dir = stores.copy(drained, tmp_path / "data")
    path = data_dir / "cloud" / "bucket.json"
    stored = bytearray(path.read_bytes())
    # Within the store's id, so that it is no other white space.
    stored[stored.index(b'"store_id": "') + 20 + seed] ^= 1
    path.write_bytes(stored)
    with pytest.raises(StartFailed) as failure, running_daemon(data_dir):
        pass
    assert failure.value.reason == "CORRUPT_MANIFEST"
    assert "bucket.json" in failure.value.log


def test_a_manifest_damaged_under_its_owner_is_never_overwritten(killed: Path, tmp_path: Path) -> None:
    """The rows are whole, so reads go on; what must reach the cloud tier says that it does not."""
    data_dir = stores.copy(killed, tmp_path / "data")
    session = INLINE[0]
    path = data_dir / "cloud" / manifest_key(stores.hash_of(data_dir, session))
    with running_daemon(data_dir, flush_interval_ms=50, drain_grace_ms=2000) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            sound = stores.look(wire, session)
            damage(random.Random(SEED), path)
            damaged = path.read_bytes()
            found = refusal(wire.append, session, user("new", "x"), durability=2)
            assert found.reason == "CLOUD_NOT_COMMITTED"
            assert "CORRUPT_MANIFEST" in found.message or "damaged" in found.message
            assert found.metadata["durability"] == "DURABILITY_EDGE"
            reply = wire.admin.Flush(admin_pb2.FlushRequest(session_id=session))
            assert dict(reply.failures) == {"CORRUPT_MANIFEST": 1}
            again = stores.look(wire, session)
            assert again["checkpoints"] == sound["checkpoints"]
            assert isinstance(again["turns"], bytes)
            assert again["turns"].startswith(sound["turns"])
        assert daemon.terminate() == exits.INCOMPLETE
    assert path.read_bytes() == damaged
