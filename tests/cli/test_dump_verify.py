"""`dump` and `verify` without a daemon: what they show, what they keep to themselves, and damage that they find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sessiond.client import Client, assistant, user
from sessiond.testing import Daemon, running_daemon
from tests.cli.command import Ran, run
from tests.e2e import stores

SECRET = "the secret of the user"


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data of a daemon that was killed: one session in the cloud tier and ahead of it, with a segment."""
    data = tmp_path_factory.mktemp("dump") / "data"
    with running_daemon(data_dir=data, flush_interval_ms=3_600_000) as daemon, Client(daemon.address) as client:
        client.create_session("told", user_id="ann", metadata={"note": SECRET})
        for number in range(3):
            client.append("told", [user(f"{SECRET} " + "word " * 8000, turn_id=f"u{number}"), assistant("fine")])
        client.update_session("told", pins={"fact": SECRET})
        client.flush()
        client.append("told", user(SECRET, turn_id="unflushed"))
        daemon.kill()
        yield data


@pytest.fixture
def data(left_behind: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(left_behind, tmp_path / "data")
    return tmp_path / "data"


def objects(data: Path, kind: str) -> list[Path]:
    return sorted(path for path in (data / "cloud" / kind).rglob("*") if path.is_file())


def dump(*argv: object) -> Ran:
    return run("dump", *argv)


def test_every_object_is_decoded(left_behind: Path) -> None:
    (manifest,) = objects(left_behind, "m")
    shown = dump(manifest, "--json").json
    assert (shown["header"]["kind"], shown["meta"]["session"], shown["meta"]["user"]) == ("manifest", "told", "ann")
    assert shown["meta"]["head"] == 7
    assert shown["meta"]["state"]["live_messages"] == 6
    frames = shown["inline_frames"]
    assert frames[-1]["kind"] == "state"
    assert [frame["seq"] for frame in frames] == list(range(frames[0]["seq"], 8))
    segments = objects(left_behind, "s")
    assert segments
    for segment in segments:
        shown = dump(segment, "--json").json
        assert shown["header"]["kind"] == "segment"
        assert shown["frames"][0]["turn_id"] == f"u{(shown['frames'][0]['seq'] - 1) // 2}"
        assert shown["frames"][0]["flags"] == ["cut", "exchange"]
    (lease,) = objects(left_behind, "n")
    assert dump(lease, "--json").json["meta"]["released"] is False
    (row,) = objects(left_behind, "u")
    assert dump(row, "--json").json["meta"]["session"] == "told"
    bucket = dump(left_behind / "cloud" / "bucket.json", "--json").json["bucket"]
    assert bucket["format"] == 1
    assert json.loads((left_behind / "cloud" / "bucket.json").read_text())["hash_key"] not in json.dumps(bucket)
    assert dump(manifest).out.startswith("file: ")


def test_the_hot_tier_is_shown_without_a_cloud_tier_or_key(left_behind: Path, tmp_path: Path) -> None:
    shutil.copytree(left_behind / "hot", tmp_path / "hot")
    listed = dump("--data-dir", tmp_path, "--json").json["hot"]
    (session,) = listed["sessions"]
    assert (session["session"], session["phase"], session["head_seq"], session["cloud_seq"]) == ("told", "owned", 8, 7)
    shown = dump("--data-dir", tmp_path, "--session", "told", "--json").json["hot"]
    assert shown["head"]["state"]["pins"]["fact"]["tokens"]
    frames = [frame for row in shown["rows"] for frame in row["frames"]]
    assert [frame["seq"] for frame in frames] == list(range(frames[0]["seq"], 9))
    assert frames[-1]["turn_id"] == "unflushed"
    assert [entry["seq"] for entry in shown["turn_ids"]] == list(range(1, 9))
    assert [checkpoint["version"] for checkpoint in shown["checkpoints"]] == ["1:2", "1:4", "1:6"]
    assert dump("--data-dir", tmp_path, "--session", shown["h"], "--json").json["hot"]["head"]["session"] == "told"
    assert dump("--data-dir", tmp_path, "--session", "absent").code == 3


def test_the_manifest_of_a_session_is_found_by_its_id(left_behind: Path) -> None:
    cloud = (left_behind / "cloud").as_uri()
    both = dump("--data-dir", left_behind, "--cloud", cloud, "--session", "told", "--json").json
    assert both["hot"]["h"] == both["cloud"]["meta"]["h"]
    alone = dump("--data-dir", left_behind / "absent", "--cloud", cloud, "--session", "told", "--json").json
    assert list(alone) == ["cloud"]
    assert dump("--cloud", cloud, "--data-dir", left_behind / "absent", "--session", "absent").code == 3


def test_what_users_wrote_is_shown_only_on_request(left_behind: Path) -> None:
    cloud = (left_behind / "cloud").as_uri()
    places = [[path] for kind in "msnu" for path in objects(left_behind, kind)]
    places.append(["--data-dir", left_behind, "--cloud", cloud, "--session", "told"])
    for place in places:
        for form in ([], ["--json"]):
            assert SECRET not in dump(*place, *form).out
    (manifest,) = objects(left_behind, "m")
    for place in ([manifest], places[-1]):
        for form in ([], ["--json"]):
            assert SECRET in dump(*place, *form, "--bodies").out


def test_dump_changes_nothing(left_behind: Path) -> None:
    def all_bytes() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes()
            for path in left_behind.rglob("*")
            if path.is_file() and path.name != "lock.mdb"
        }

    before = all_bytes()
    dump("--data-dir", left_behind, "--cloud", (left_behind / "cloud").as_uri(), "--session", "told")
    run("verify", "--data-dir", left_behind)
    assert all_bytes() == before


@pytest.mark.parametrize("kind", ["m", "s", "n", "u"])
def test_a_flipped_bit_is_told_and_the_header_still_shown(data: Path, kind: str) -> None:
    path = objects(data, kind)[0]
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 4
    path.write_bytes(body)
    ran = dump(path, "--json")
    assert ran.code == 6
    assert ran.json["header"]["version"] == 1
    assert "checksum" in ran.json["damage"]


def test_verify_finds_nothing_wrong_with_what_a_kill_left_behind(left_behind: Path) -> None:
    ran = run("verify", "--data-dir", left_behind, "--json")
    assert (ran.code, ran.json["checked_sessions"], ran.json["violations"]) == (0, 1, [])
    assert run("verify", "--data-dir", left_behind, "--session", "told").out == "1 sessions checked, 0 violations\n"
    assert run("verify", "--data-dir", left_behind, "--session", "absent").code == 3


def test_verify_explains_damage_and_ends_with_1(data: Path) -> None:
    segment = objects(data, "s")[0]
    body = bytearray(segment.read_bytes())
    body[-100] ^= 1
    segment.write_bytes(body)
    ran = run("verify", "--data-dir", data, "--json")
    assert ran.code == 1
    (violation, *_) = ran.json["violations"]
    assert (violation["session_id"], violation["invariant"]) == ("told", "I11")
    assert segment.name in violation["explanation"]
    plain = run("verify", "--data-dir", data)
    assert plain.code == 1
    assert "I11  told  " in plain.out
    last = plain.out.splitlines()[-1]
    assert "docs/s3.md" in last
    assert "sessiond repair" not in last


def test_a_damaged_manifest_is_not_said_to_be_missing(data: Path) -> None:
    manifest = objects(data, "m")[0]
    body = bytearray(manifest.read_bytes())
    body[-1] ^= 1
    manifest.write_bytes(body)
    found = run("verify", "--data-dir", data, "--json").json["violations"]
    assert found
    assert {row["invariant"] for row in found} == {"I11"}
    manifest.unlink()
    found = run("verify", "--data-dir", data, "--json").json["violations"]
    assert ("I2", True) in {(row["invariant"], "has no manifest" in row["explanation"]) for row in found}


def test_a_damaged_row_is_left_to_repair(data: Path) -> None:
    with stores.rows(data) as (transaction, tables):
        [(key, row)] = transaction.cursor(db=tables["heads"])
        transaction.put(bytes(key), bytes(row[:-1]) + bytes([row[-1] ^ 1]), db=tables["heads"])
    last = run("verify", "--data-dir", data).out.splitlines()[-1]
    assert "sessiond repair" in last
    assert "docs/s3.md" not in last
    told = run("repair", "--dry-run", "--data-dir", data).out
    assert "would be moved to" in told
    assert ".," not in told
    assert ".;" not in told


def test_both_work_beside_a_running_daemon(daemon: Daemon, client: Client) -> None:
    client.create_session("beside")
    client.append("beside", user("hello"))
    assert run("verify", "--data-dir", daemon.data_dir).code == 0
    shown = dump("--data-dir", daemon.data_dir, "--session", "beside", "--json").json["hot"]
    assert shown["head"]["head_seq"] == 1


def test_another_key_than_the_buckets_is_refused(left_behind: Path) -> None:
    options = ("--data-dir", left_behind, "--hash-key", "00" * 32)
    assert run("verify", *options).err.startswith("sessiond: WRONG_HASH_KEY")
    assert dump(*options, "--cloud", (left_behind / "cloud").as_uri(), "--session", "told").code == 2
