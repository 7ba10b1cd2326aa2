"""`sessiond doctor` on sound and broken nodes: each result by name, its remedy, the exit code of the first failure."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from sessiond.cli import exits
from sessiond.testing import free_port, running_daemon
from sessiond.v1 import admin_pb2
from tests.cli.command import Ran, process, run, start
from tests.e2e import stores
from tests.fault.proxy import PASS, Asked, Fault, running_proxy
from tests.seaweed import Seaweed, seaweed
from tests.wire import Wire, user

MAP = 256 * 1024**2
__all__ = ["seaweed"]


def doctor(data_dir: Path, *argv: object) -> Ran:
    return run("doctor", "--json", "--data-dir", data_dir, "--map-size-bytes", MAP, *argv)


def checks(ran: Ran) -> dict[str, dict[str, Any]]:
    found = {row["check"]: row for row in ran.json["checks"]}
    assert len(found) == len(ran.json["checks"]), "a check was made twice"
    for row in found.values():
        assert row["seen"]
        # Whatever is not right has a remedy, and a failure a reason with its exit code.
        assert bool(row["remedy"]) == (row["outcome"] != "PASS")
        assert bool(row["reason"]) == (row["outcome"] == "FAIL") == (row["exit_code"] != exits.OK)
    first = next((row["exit_code"] for row in ran.json["checks"] if row["outcome"] == "FAIL"), exits.OK)
    assert ran.code == first
    return found


def failures(ran: Ran) -> dict[str, str]:
    return {name: row["reason"] for name, row in checks(ran).items() if row["outcome"] == "FAIL"}


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("drained") / "data"
    stores.make(data_dir, ["s"], sealed=False, drained=True)
    return data_dir


@pytest.fixture
def copy(drained: Path, tmp_path: Path) -> Path:
    return stores.copy(drained, tmp_path / "data")


def listen() -> tuple[str, str]:
    return "--listen", f"127.0.0.1:{free_port()}"


# Sound nodes ----------------------------------------------------------------------------------------------------------


def test_a_node_that_was_never_started_passes_and_nothing_is_made(tmp_path: Path) -> None:
    ran = doctor(tmp_path / "data", *listen())
    assert failures(ran) == {}
    assert ran.code == exits.OK
    assert list(tmp_path.iterdir()) == []


def test_a_stopped_node_passes_and_nothing_is_changed(copy: Path) -> None:
    before = stores.contents(copy)
    found = checks(doctor(copy, *listen()))
    assert {row["outcome"] for row in found.values()} == {"PASS"}
    assert "1 sessions" in found["hot tier"]["seen"]
    assert stores.contents(copy) == before
    assert "released" in found["node name"]["seen"]


def test_beside_its_running_daemon_it_passes_and_the_daemon_goes_on(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data") as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.create("s")
        found = checks(doctor(tmp_path / "data", "--listen", daemon.address))
        assert {row["outcome"] for row in found.values()} <= {"PASS", "WARN"}
        assert "is ready" in found["listen address"]["seen"]
        assert "has it open" in found["hot tier"]["seen"]
        assert f"process {daemon.pid}" in found["node name"]["seen"]
        assert wire.append("s", user("t1", "Hello.")).head.seq == 1
        assert daemon.terminate() == exits.OK


def test_every_line_says_what_was_seen_and_the_last_one_counts(copy: Path) -> None:
    ran = run("doctor", "--data-dir", copy, *listen(), "--map-size-bytes", MAP)
    *lines, last = ran.out.splitlines()
    assert last == f"{len(lines)} passed, 0 warnings, 0 failed"
    assert all(line.startswith("PASS  ") and ": " in line for line in lines)


# Broken ones ----------------------------------------------------------------------------------------------------------


def test_a_wrong_setting_is_the_first_and_only_failure(tmp_path: Path) -> None:
    ran = doctor(tmp_path / "data", "--lease-ms", 1)
    assert failures(ran) == {"settings": "INVALID_CONFIG"}
    assert ran.code == exits.USAGE


def test_a_damaged_vocabulary_fails_and_the_rest_is_still_checked(tmp_path: Path) -> None:
    import sessiond

    source = tmp_path / "src" / "sessiond"
    shutil.copytree(Path(sessiond.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    path = source / "tokens" / "vocab" / "o200k_base.vocab"
    path.write_bytes(path.read_bytes()[:-1])
    ran = process("doctor", "--json", "--data-dir", tmp_path / "data", *listen(), PYTHONPATH=str(tmp_path / "src"))
    assert failures(ran) == {"vocabularies": "DAMAGED_VOCABULARY"}
    assert checks(ran)["conditional writes"]["outcome"] == "PASS"
    # And without its compiled core at all.
    for module in (source / "core").glob("_kernel*.so"):
        module.unlink()
    ran = process("doctor", "--json", "--data-dir", tmp_path / "data", PYTHONPATH=str(tmp_path / "src"))
    assert failures(ran) == {"installation": "INTERNAL"}
    assert ran.code == exits.INTERNAL


def test_a_data_folder_that_cannot_be_written_fails(tmp_path: Path) -> None:
    cloud = ("--cloud", (tmp_path / "cloud").as_uri())
    assert failures(doctor(Path("/proc/sessiond-data"), *listen(), *cloud)) == {"data folder": "UNWRITABLE_FOLDER"}
    (tmp_path / "file").write_text("a file")
    found = failures(doctor(tmp_path / "file" / "data", *listen(), *cloud))
    assert found == {"data folder": "UNWRITABLE_FOLDER"}


def test_a_folder_for_the_cloud_tier_that_cannot_be_made_fails(tmp_path: Path) -> None:
    ran = doctor(tmp_path / "data", *listen(), "--cloud", "file:///proc/sessiond-cloud")
    assert failures(ran) == {"cloud tier": "UNWRITABLE_FOLDER"}
    assert ran.code == exits.DENIED


@pytest.mark.parametrize("damage", ["cut", "meta", "number", "format"])
def test_a_damaged_hot_tier_fails_and_names_repair(copy: Path, damage: str) -> None:
    path = copy / "hot" / "data.mdb"
    stored = bytearray(path.read_bytes())
    if damage == "cut":
        stores.cut_short(path)
    elif damage == "meta":
        path.write_bytes(stored[:16] + b"\0" + stored[17:])
    elif damage == "number":
        # The meta page before the last would win: a commit would be undone.
        older = min((0, 1), key=lambda page: int.from_bytes(stored[4096 * page + 144 :][:8], "little"))
        stored[4096 * older + 144 + 3] ^= 1
        path.write_bytes(stored)
    else:
        with stores.rows(copy) as (transaction, tables):
            transaction.put(b"format", (7).to_bytes(4, "big"), db=tables["meta"])
    found = doctor(copy, *listen())
    reasons = {"cut": "HOT_TIER_TRUNCATED", "format": "NEWER_FORMAT"}
    assert failures(found)["hot tier"] == reasons.get(damage, "CORRUPT_HOT_ROW")
    assert found.code == exits.CORRUPT
    if damage != "format":
        assert "sessiond repair" in checks(found)["hot tier"]["remedy"]


def test_the_hot_tier_of_another_store_fails(copy: Path, tmp_path: Path) -> None:
    with running_daemon(tmp_path / "other"):
        pass
    ran = doctor(copy, *listen(), "--cloud", (tmp_path / "other" / "cloud").as_uri())
    assert failures(ran) == {"hot tier's store": "WRONG_STORE"}


def test_another_hash_key_fails(copy: Path) -> None:
    assert failures(doctor(copy, *listen(), "--hash-key", "11" * 32)) == {"bucket and key": "WRONG_HASH_KEY"}


def test_an_address_that_somebody_else_has_fails(copy: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ran = doctor(copy, "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
        assert failures(ran) == {"listen address": "PORT_IN_USE"}
        assert ran.code == exits.UNAVAILABLE
    with running_daemon(tmp_path / "other") as other:
        ran = doctor(copy, "--listen", other.address)
        assert failures(ran) == {"listen address": "PORT_IN_USE"}
        assert str(tmp_path / "other") in checks(ran)["listen address"]["seen"]


def test_an_address_of_another_machine_fails_as_such(tmp_path: Path) -> None:
    # Of a block that is kept for documents: no machine has it.
    ran = doctor(tmp_path / "data", "--listen", "192.0.2.1:7443")
    assert failures(ran) == {"listen address": "PORT_IN_USE"}
    assert "not an address of this machine" in checks(ran)["listen address"]["seen"]
    assert "Stop the other process" not in checks(ran)["listen address"]["remedy"]


def test_a_daemon_that_waits_for_its_bucket_is_no_stranger(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    address = listen()
    cloud = ("--cloud", "s3://nobody/x", "--s3-endpoint", "http://127.0.0.1:9", "--s3-region", "us-east-1")
    waiting = start("serve", "--data-dir", copy, "--map-size-bytes", MAP, *address, *cloud)
    try:
        # It says so once it answers.
        assert waiting.stderr is not None
        assert any('"store_awaited"' in line for line in waiting.stderr)
        ran = doctor(copy, *address, *cloud)
    finally:
        waiting.kill()
        waiting.communicate()
    assert failures(ran) == {"cloud tier": "STORE_UNAVAILABLE"}
    row = checks(ran)["listen address"]
    assert row["outcome"] == "WARN"
    assert "is starting" in row["seen"]
    assert "waits for the cloud tier" in row["seen"]


def test_a_node_name_that_a_live_daemon_holds_fails(copy: Path, tmp_path: Path) -> None:
    cloud = (copy / "cloud").as_uri()
    with running_daemon(tmp_path / "other", cloud, node_name="n1") as other:
        ran = doctor(tmp_path / "mine", *listen(), "--cloud", cloud, "--node-name", "n1")
        assert failures(ran) == {"node name": "NODE_NAME_IN_USE"}
        assert str(other.pid) in checks(ran)["node name"]["seen"]


def test_a_damaged_bucket_or_lease_fails(copy: Path) -> None:
    [lease] = (copy / "cloud" / "n").iterdir()
    stored = bytearray(lease.read_bytes())
    stored[len(stored) // 2] ^= 1
    lease.write_bytes(stored)
    assert failures(doctor(copy, *listen())) == {"node name": "CORRUPT_MANIFEST"}
    (copy / "cloud" / "bucket.json").write_text("{}")
    ran = doctor(copy, *listen())
    assert failures(ran) == {"bucket and key": "CORRUPT_MANIFEST"}
    # What a missing one needs, a damaged one needs too.
    remedy = checks(ran)["bucket and key"]["remedy"]
    assert "backup" in remedy
    assert "verify" not in remedy
    (copy / "cloud" / "bucket.json").unlink()
    assert checks(doctor(copy, *listen()))["bucket and key"]["remedy"] == remedy


def test_a_store_that_is_not_there_fails_and_the_node_is_still_checked(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")
    ran = doctor(
        copy, *listen(), "--cloud", "s3://nobody/x", "--s3-endpoint", "http://127.0.0.1:9", "--s3-region", "us-east-1"
    )
    assert failures(ran) == {"cloud tier": "STORE_UNAVAILABLE"}
    assert checks(ran)["hot tier"]["outcome"] == "PASS"
    remedy = checks(ran)["cloud tier"]["remedy"]
    assert all(word in remedy for word in ("--s3-endpoint", "DNS", "firewall"))


def test_no_credentials_at_all_fail_before_anything_is_sent(
    seaweed: Seaweed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    options = ("--cloud", "s3://some/x", "--s3-endpoint", seaweed.endpoint, "--s3-region", "us-east-1")
    ran = doctor(tmp_path / "data", *listen(), *options)
    assert failures(ran) == {"cloud tier": "STORE_DENIED"}
    assert "credentials" in checks(ran)["cloud tier"]["remedy"]
    # Of what was not asked nothing is said.
    assert "clock" not in checks(ran)
    assert ran.code == exits.DENIED


@pytest.mark.parametrize("url", ["file://data/x", "file:data/x", "file:///data?x", "data/x"])
def test_a_cloud_tier_that_serve_refuses_fails_with_the_same_words(tmp_path: Path, url: str) -> None:
    served = process("serve", "--data-dir", tmp_path / "data", *listen(), "--cloud", url)
    ran = doctor(tmp_path / "data", *listen(), "--cloud", url)
    assert failures(ran) == {"cloud tier": "INVALID_CONFIG"}
    row = checks(ran)["cloud tier"]
    assert row["exit_code"] == served.code
    assert row["seen"] in served.err
    assert row["remedy"] in served.err


# A bucket on S3 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def s3(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """(client, bucket, options of the command) of a bucket of the test's own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", seaweed.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", seaweed.secret_key)
    client = boto3.session.Session().client(
        "s3", endpoint_url=seaweed.endpoint, region_name="us-east-1", config=Config(s3={"addressing_style": "path"})
    )
    bucket = f"doctor-{os.urandom(6).hex()}"
    client.create_bucket(Bucket=bucket)
    options = ("--cloud", f"s3://{bucket}/at", "--s3-endpoint", seaweed.endpoint, "--s3-region", "us-east-1")
    with contextlib.closing(client):
        yield client, bucket, options


def test_a_bucket_passes_and_keeps_nothing_of_the_doctor(s3: Any, tmp_path: Path) -> None:
    client, bucket, options = s3
    ran = doctor(tmp_path / "data", *listen(), *options)
    assert failures(ran) == {}
    found = checks(ran)
    assert found["conditional writes"]["outcome"] == "PASS"
    assert found["versioning"]["outcome"] == "WARN"
    assert "Contents" not in client.list_objects_v2(Bucket=bucket)
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    assert checks(doctor(tmp_path / "data", *listen(), *options))["versioning"]["outcome"] == "PASS"


def test_a_lifecycle_rule_that_would_delete_what_a_session_needs_fails(s3: Any, tmp_path: Path) -> None:
    client, bucket, options = s3
    expected = {"at/probe/": "PASS", "at/n/": "WARN"}
    for covered in ("", "at/s/00", "at/bucket.json", "at/u/", "at/x/", "at/n/", "at/probe/"):
        days = 7 if covered == "at/n/" else 3650
        rule = {"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": covered}, "Expiration": {"Days": days}}
        client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration={"Rules": [rule]})
        ran = doctor(tmp_path / "data", *listen(), *options)
        if covered in expected:
            assert failures(ran) == {}
            assert checks(ran)["lifecycle rules"]["outcome"] == expected[covered]
        else:
            assert failures(ran) == {"lifecycle rules": "STORE_UNFIT"}, covered
            assert "'tidy'" in checks(ran)["lifecycle rules"]["seen"]


def test_a_bucket_that_is_not_there_fails(s3: Any, tmp_path: Path) -> None:
    _, _, options = s3
    ran = doctor(tmp_path / "data", *listen(), *options, "--cloud", "s3://doctor-absent/x")
    assert failures(ran) == {"cloud tier": "BUCKET_NOT_FOUND"}
    assert ran.code == exits.NOT_FOUND


def test_a_bucket_json_that_is_neither_read_nor_made_says_what_the_store_said(
    s3: Any, seaweed: Seaweed, tmp_path: Path
) -> None:
    _, bucket, options = s3

    def refuses_to_found(asked: Asked) -> Fault:
        return Fault("503") if (asked.method, asked.key) == ("PUT", "bucket.json") else PASS

    with running_proxy(seaweed.endpoint, bucket, "at", refuses_to_found) as proxy:
        given = (*options, "--s3-endpoint", proxy.endpoint)
        ran = process("serve", "--data-dir", tmp_path / "data", "--map-size-bytes", MAP, *listen(), *given)
    assert ran.code == exits.UNAVAILABLE
    told = ran.err.rpartition("neither be read nor made; the store's last answer: ")[2]
    assert told.startswith("503 ")
    # The store's own full stop is not doubled.
    assert "By the proxy. " in told


def test_wrong_credentials_fail_with_the_permissions_named(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, options = s3
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    ran = doctor(tmp_path / "data", *listen(), *options)
    assert failures(ran)["permission to put"] == "STORE_DENIED"
    assert "s3:PutObject" in checks(ran)["permission to put"]["remedy"]
    assert ran.code == exits.DENIED
    assert json.loads(ran.out)["counts"]["fail"] >= 1


def test_a_daemon_that_lost_its_store_is_told(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "data", lease_ms=500) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        shutil.move(tmp_path / "data" / "cloud", tmp_path / "away")
        for _ in range(100_000):
            if not wire.admin.GetStatus(admin_pb2.GetStatusRequest()).cloud.reachable:
                break
        found = doctor(tmp_path / "data", "--listen", daemon.address)
        assert failures(found) == {"hot tier's store": "WRONG_STORE"}
        assert checks(found)["listen address"]["outcome"] == "WARN"
        assert "no cloud tier" in checks(found)["listen address"]["seen"]
        assert not (tmp_path / "data" / "cloud").exists()
        shutil.move(tmp_path / "away", tmp_path / "data" / "cloud")
