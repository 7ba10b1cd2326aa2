"""What `sessiond verify`, `dump` and `export` say of a store that lost something or is damaged; a sound one passes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from sessiond.cli import exits
from sessiond.core import envelope
from sessiond.core import manifest as manifests
from sessiond.core.invariants import EXPLANATIONS_MAX
from sessiond.testing import running_daemon
from sessiond.tiers.cloud.bucket import orphan_key
from sessiond.v1 import admin_pb2, session_pb2, turn_pb2
from tests.cli.command import Ran, run
from tests.e2e import stores
from tests.wire import Wire, user

Found = list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data directory of a daemon that was drained: one session in a manifest alone, one with a segment."""
    data_dir = tmp_path_factory.mktemp("drained") / "data"
    stores.make(data_dir, ["sealed"], sealed=True, drained=True)
    stores.make(data_dir, ["inline"], sealed=False, drained=True)
    return data_dir


@pytest.fixture
def copy(drained: Path, tmp_path: Path) -> Path:
    return stores.copy(drained, tmp_path / "data")


def verify(data_dir: Path, *argv: str) -> Ran:
    return run("verify", "--json", "--data-dir", data_dir, "--cloud", (data_dir / "cloud").as_uri(), *argv)


def found_in(data_dir: Path, *argv: str) -> Found:
    """(invariant, session, explanation) of every violation."""
    ran = verify(data_dir, *argv)
    rows = [(row["invariant"], row["session_id"], row["explanation"]) for row in ran.json["violations"]]
    assert ran.code == (exits.INTERNAL if rows else exits.OK)
    return rows


def lose_manifest(data_dir: Path, session: str) -> str:
    """Remove a session's manifest; its hash."""
    h = stores.hash_of(data_dir, session).hex()
    (data_dir / "cloud" / "m" / h).unlink()
    return h


def test_a_released_session_without_its_manifest_is_told(copy: Path) -> None:
    assert found_in(copy) == []
    lose_manifest(copy, "inline")
    for argv in ((), ("--session", "inline")):
        ((invariant, session, explanation),) = found_in(copy, *argv)
        assert (invariant, session) == ("I2", "inline")
        assert "released" in explanation
        assert "no manifest" in explanation
    assert found_in(copy, "--session", "sealed") == []


def test_segments_without_a_manifest_are_told_without_the_hot_tier(copy: Path) -> None:
    shutil.rmtree(copy / "hot")
    assert found_in(copy) == []
    h = lose_manifest(copy, "sealed")
    expected = [("I2", h, "the cloud tier has segments without a manifest")]
    assert found_in(copy) == expected
    assert found_in(copy, "--session", "sealed") == expected
    assert verify(copy, "--session", "absent").code == exits.NOT_FOUND


def test_a_row_of_the_index_by_user_may_stand_alone(copy: Path) -> None:
    """A creation that was never acknowledged leaves one."""
    shutil.rmtree(copy / "hot")
    lose_manifest(copy, "inline")
    assert found_in(copy) == []


def test_a_damaged_manifest_is_told_for_the_session_that_is_named(copy: Path) -> None:
    shutil.rmtree(copy / "hot")
    path = copy / "cloud" / "m" / stores.hash_of(copy, "sealed").hex()
    flip(path, path.stat().st_size // 2)
    assert {invariant for invariant, _, _ in found_in(copy, "--session", "sealed")} == {"I11"}


@pytest.fixture
def owned(tmp_path: Path) -> Path:
    """A daemon's data, killed with one flushed session that it owns."""
    with running_daemon(tmp_path / "data", flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            wire.create("s")
            for number in range(40):
                wire.append("s", user(f"t{number}", f"{number}"))
            wire.admin.Flush(admin_pb2.FlushRequest())
        daemon.kill()
    return tmp_path / "data"


def test_a_damaged_row_of_turns_is_not_told_as_lacking_dedupe_entries(owned: Path) -> None:
    assert found_in(owned) == []
    damage_first_turn(owned)
    found = found_in(owned)
    assert "I11" in {invariant for invariant, _, _ in found}
    assert [row for row in found if "dedupe" in row[2]] == []


def damage_first_turn(data_dir: Path) -> None:
    with stores.rows(data_dir) as (transaction, tables):
        with transaction.cursor(db=tables["turns"]) as cursor:
            assert cursor.first()
            key, value = bytes(cursor.key()), bytearray(cursor.value())
        value[len(value) // 2] ^= 1
        transaction.put(key, bytes(value), db=tables["turns"])


def test_one_cause_at_every_turn_is_told_in_a_few_lines(owned: Path) -> None:
    """Another key: no body matches its digest. bucket.json is made to agree with it."""
    sound = json.loads((owned / "cloud" / "bucket.json").read_text())
    (owned / "cloud" / "bucket.json").write_text(json.dumps(rekeyed(sound)))
    told = [explanation for invariant, _, explanation in found_in(owned) if invariant == "I4"]
    assert len(told) == EXPLANATIONS_MAX + 1
    assert told[-1] == f"and {40 - EXPLANATIONS_MAX} more"


def rekeyed(fields: dict[str, object]) -> dict[str, object]:
    from sessiond.tiers.cloud import bucket

    key = b"\x5a" * 32
    fields = {**fields, "hash_key": key.hex(), "hash_key_check": bucket._check_value(key)}
    return {**fields, "checksum": bucket._checksum(fields)}


# Other readers of damage ---------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    stored = bytearray(path.read_bytes())
    stored[at] ^= 1
    path.write_bytes(stored)


def test_dump_tells_a_flipped_bit_in_the_buckets_identity_and_keeps_its_key(copy: Path) -> None:
    path = copy / "cloud" / "bucket.json"
    sound = path.read_bytes()
    key = json.loads(sound)["hash_key"]
    assert run("dump", path).code == exits.OK
    # In a value, in the name of the key, and in what makes it JSON.
    for place in (sound.index(b"store_id") + 13, sound.index(b'"hash_key"') + 1, sound.index(b":")):
        path.write_bytes(sound)
        flip(path, place)
        ran = run("dump", path)
        assert ran.code == exits.CORRUPT, ran.out
        assert "damage" in ran.out
        assert key not in ran.out + ran.err


def test_export_leaves_a_damaged_session_out_also_where_it_is_named(copy: Path) -> None:
    path = copy / "cloud" / "m" / stores.hash_of(copy, "sealed").hex()
    flip(path, path.stat().st_size // 2)
    shutil.rmtree(copy / "hot")
    with running_daemon(copy) as daemon:
        for argv in (["sealed", "inline"], ["inline", "sealed"]):
            ran = run("export", *argv, "--server", daemon.address)
            assert [line["id"] for line in ran.lines] == ["inline"]
            assert ran.code == exits.INCOMPLETE
            assert "session sealed left out: CORRUPT_MANIFEST" in ran.err


# Deletions, indexes, orphans, what is left over ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drained daemon's data: one session deleted and swept, one that expires, one archived, one plain."""
    data_dir = tmp_path_factory.mktemp("swept") / "data"
    with running_daemon(data_dir, flush_interval_ms=50) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        policy = turn_pb2.SessionPolicy()
        policy.expiry.ttl_ms = 40 * 86_400_000
        for name in ("gone-and-swept", "plain-and-sealed"):
            stores.talk(wire, name, sealed=True)
        wire.create("expires", user_id="ada", policy=policy)
        wire.append("expires", user("t1", "Not for long."))
        h = stores.hash_of(data_dir, "gone-and-swept").hex()
        wire.admin.Flush(admin_pb2.FlushRequest())
        kept = {name: (data_dir / "cloud" / name).read_bytes() for name in names_of(data_dir, h)}
        wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id="gone-and-swept"))
        for _ in range(100_000):
            wire.admin.GetStatus(admin_pb2.GetStatusRequest())
            if names_of(data_dir, h) == [f"m/{h}"]:
                break
        assert daemon.terminate() == exits.OK
    (data_dir / "kept").mkdir()
    for name, body in kept.items():
        path = data_dir / "kept" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return data_dir


def names_of(data_dir: Path, h: str) -> list[str]:
    cloud = data_dir / "cloud"
    return sorted(
        str(path.relative_to(cloud))
        for path in cloud.rglob("*")
        if path.is_file() and h in str(path) and ".tmp" not in path.parts
    )


def test_a_deleted_an_expiring_and_a_plain_session_pass(swept: Path) -> None:
    ran = verify(swept)
    assert (ran.code, ran.json["violations"]) == (exits.OK, [])
    assert (ran.json["checked_sessions"], ran.json["deleted_sessions"], ran.json["unnamed_objects"]) == (3, 1, 0)
    assert verify(swept, "--session", "gone-and-swept").code == exits.OK


@pytest.mark.parametrize("kind", ["s", "u", "o"])
def test_what_a_deletion_left_in_the_cloud_tier_is_told(swept: Path, tmp_path: Path, kind: str) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    h = stores.hash_of(data_dir, "gone-and-swept").hex()
    if kind == "o":
        put(data_dir / "cloud" / "o" / h / f"00000001-0000000000000001-{'0' * 64}", b"anything")
    else:
        found = next(path for path in (data_dir / "kept" / kind).rglob("*") if path.is_file())
        put(data_dir / "cloud" / found.relative_to(data_dir / "kept"), found.read_bytes())
    for argv in ((), ("--session", "gone-and-swept")):
        ((invariant, session, explanation),) = found_in(data_dir, *argv)
        assert (invariant, session) == ("I13", "gone-and-swept")
        assert f"{kind}/" in explanation


def put(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def test_rows_of_a_deleted_session_in_the_hot_tier_are_told(swept: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    h = stores.hash_of(data_dir, "gone-and-swept")
    with stores.rows(data_dir) as (transaction, tables):
        transaction.put(h + bytes(4), b"some ids", db=tables["ids"])
    found = found_in(data_dir)
    assert {(invariant, session) for invariant, session, _ in found} == {
        ("I11", "gone-and-swept"),
        ("I13", "gone-and-swept"),
    }


def test_a_row_of_the_expiry_index_that_a_deletion_left_is_told(swept: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    [row] = [path for path in (data_dir / "cloud" / "x").rglob("*") if path.is_file()]
    put(row.with_name(stores.hash_of(data_dir, "gone-and-swept").hex()), row.read_bytes())
    ((invariant, session, explanation),) = found_in(data_dir)
    assert (invariant, session) == ("I13", "gone-and-swept")
    assert "x/" in explanation


@pytest.mark.parametrize(("kind", "session"), [("u", "plain-and-sealed"), ("u", "expires"), ("x", "expires")])
def test_a_row_that_an_index_lacks_is_told(swept: Path, tmp_path: Path, kind: str, session: str) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    h = stores.hash_of(data_dir, session).hex()
    [row] = [path for path in (data_dir / "cloud" / kind).rglob("*") if path.is_file() and h in path.name]
    stored = row.read_bytes()
    row.unlink()
    assert [(invariant, named) for invariant, named, _ in found_in(data_dir)] == [("I9", session)]
    flip_in = bytearray(stored)
    flip_in[-1] ^= 1
    row.write_bytes(flip_in)
    assert {invariant for invariant, _, _ in found_in(data_dir)} == {"I11"}


def test_objects_that_no_manifest_names_are_counted_and_are_no_violation(swept: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    h = stores.hash_of(data_dir, "plain-and-sealed").hex()
    put(data_dir / "cloud" / "s" / h / f"00000009-0000000000000001-{'a' * 64}", bytes(1000))
    ran = verify(data_dir)
    assert (ran.code, ran.json["unnamed_objects"], ran.json["unnamed_bytes"]) == (exits.OK, 1, 1000)


@pytest.mark.parametrize("damage", ["none", "flip", "remove"])
def test_the_orphans_that_a_manifest_lists_are_read(swept: Path, tmp_path: Path, damage: str) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    path = data_dir / "cloud" / "m" / stores.hash_of(data_dir, "expires").hex()
    h = bytes.fromhex(path.name)
    manifest = manifests.unseal(path.read_bytes(), "m", h)
    meta = {"v": 1, "h": h, "epoch": 1, "first": 1, "last": 1}
    body = envelope.seal(envelope.KIND_ORPHAN, meta, manifest.inline_frames)
    name = orphan_key(h, 1, 1, hashlib.sha256(body).digest())
    manifest.orphans = [[name, 1, 1, 1, hashlib.sha256(body).digest()]]
    path.write_bytes(manifests.seal(manifest))
    if damage != "remove":
        stored = bytearray(body)
        stored[-9] ^= damage == "flip"
        put(data_dir / "cloud" / name, bytes(stored))
    found = found_in(data_dir)
    assert [(invariant, session) for invariant, session, _ in found] == (
        [] if damage == "none" else [("I11", "expires")]
    )


def test_damage_that_belongs_to_no_session_is_told(swept: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(swept, tmp_path / "data")
    for path in (next((data_dir / "cloud" / "n").iterdir()), data_dir / "cloud" / "probe" / "passed-1"):
        flip(path, path.stat().st_size // 2)
    assert [(invariant, session) for invariant, session, _ in found_in(data_dir)] == [("I11", ""), ("I11", "")]


def test_an_unflushed_session_that_the_flusher_would_not_find_is_told(owned: Path) -> None:
    with running_daemon(owned, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            wire.append("s", user("late", "Only here."))
        daemon.kill()
    assert found_in(owned) == []
    with stores.rows(owned) as (transaction, tables):
        assert transaction.delete(stores.hash_of(owned, "s"), db=tables["dirty"])
    ((invariant, session, explanation),) = found_in(owned)
    assert (invariant, session) == ("I1", "s")
    assert "flusher" in explanation


def test_a_hot_tier_that_crashes_its_reader_is_told_and_the_cloud_tier_still_checked(owned: Path) -> None:
    path = owned / "hot" / "data.mdb"
    stored = bytearray(path.read_bytes())
    for at in range(8192, len(stored), 4096):
        stored[at + 12 : at + 16] = b"\xff\x00\xff\x7f"
    path.write_bytes(stored)
    ran = verify(owned)
    ((row,), checked) = ran.json["violations"], ran.json["checked_sessions"]
    assert (row["invariant"], row["session_id"], checked) == ("I11", "", 1)
    assert "can't be trusted" in row["explanation"]


def test_more_sessions_than_a_page_holds_are_each_checked_once(
    owned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sessiond import verify as module

    data_dir = tmp_path / "many"
    stores.make(data_dir, [f"s{number}" for number in range(7)], sealed=False, drained=False)
    monkeypatch.setattr(module, "KEYS_PER_PAGE", 2)
    monkeypatch.setattr(module, "HASHES_PER_READ", 2)
    for tiers in ("both", "cloud"):
        ran = verify(data_dir)
        assert (ran.json["checked_sessions"], ran.json["violations"]) == (7, []), tiers
        shutil.rmtree(data_dir / "hot", ignore_errors=True)
