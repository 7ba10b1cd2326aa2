"""What `sessiond verify`, `dump` and `export` say of a store that lost something or is damaged; a sound one passes."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from sessiond.cli import exits
from sessiond.core.invariants import EXPLANATIONS_MAX
from sessiond.testing import running_daemon
from sessiond.v1 import admin_pb2
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
