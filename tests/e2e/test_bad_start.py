"""A daemon that can't start says why, changes nothing and exits with its reason's code; newer formats are refused.

It holds the part of must-show 7 that comes before the first request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest

import sessiond
from sessiond import cli, config
from sessiond.cli import exits
from sessiond.core import envelope
from sessiond.core import manifest as manifests
from sessiond.errors import REASONS, SessiondError
from sessiond.testing import StartFailed, running_daemon
from sessiond.tiers.hot.environment import META_FORMAT
from sessiond.v1 import session_pb2
from tests.e2e import stores
from tests.wire import CLOUD, Refusal, Wire, user

SOURCE = Path(sessiond.__file__).parent


# Of a bucket.json that is missing, and of a damaged one.
RESTORE = "Restore bucket.json from a backup"


def refused(reason: str, *words: str, remedy: str = "", **options: Any) -> StartFailed:
    """The failure of a start that must fail for this reason; its log names the words and the remedy: the reason's own
    if none is given.
    """
    with pytest.raises(StartFailed) as failure, running_daemon(**options):
        pass
    found = failure.value
    assert found.reason == reason, found.log
    assert found.exit_code == exits.code_of(REASONS[reason].kind(reason, ""))
    for word in (*words, remedy or REASONS[reason].remedy):
        assert word in found.log
    assert "Traceback" not in found.log
    return found


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


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [("flush_intervall_ms", "flush_interval_ms"), ("datadir", "data_dir"), ("s3_endpont", "s3_endpoint")],
)
def test_an_unknown_key_is_refused_and_the_close_one_suggested(key: str, meant: str, tmp_path: Path) -> None:
    refused("UNKNOWN_CONFIG_KEY", repr(key), f"Did you mean {meant!r}?", data_dir=tmp_path / "data", **{key: 5})
    variable = f"SESSIOND_{key.upper()}"
    refused("UNKNOWN_CONFIG_KEY", variable, repr(meant), data_dir=tmp_path / "data", env={variable: "5"})
    assert not (tmp_path / "data").exists()


def test_an_unknown_key_like_no_other_is_refused_without_a_suggestion() -> None:
    assert "Did you mean" not in refused("UNKNOWN_CONFIG_KEY", "'zzz'", zzz=1).log


def test_an_unknown_option_of_the_command_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--flush-intervall-ms", "5"]) == exits.USAGE
    assert "--flush-interval-ms" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("listen", "nowhere", "HOST:PORT"),
        ("listen", "127.0.0.1:70000", "HOST:PORT"),
        ("listen", ":7443", "HOST:PORT"),
        ("map_size_bytes", 5, "outside"),
        ("map_size_bytes", 1024**3 + 1, "multiple of 4,096"),
        ("map_size_bytes", "64 GiB", "int"),
        ("turn_bytes_max", 0, "outside"),
        ("turn_bytes_max", 9 * 1024**2, "below turn_bytes_max"),
        ("request_bytes_max", 64 * 1024**2, "outside"),
        ("concurrent_calls_max", 0, "outside"),
        ("flush_interval_ms", -1, "outside"),
        ("flush_threads", 65, "outside"),
        ("lease_ms", 1, "outside"),
        ("default_budget_tokens", 2**31, "outside"),
        ("hash_key", "not hexadecimal", "hexadecimal"),
        ("hash_key", "00" * 15, "15 bytes"),
        ("hash_key", "00" * 65, "65 bytes"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("log_level", 5, "str"),
        ("node_name", "a/b", "of ASCII"),
        ("node_name", "n" * 129, "of ASCII"),
        ("node_name", "knöten", "of ASCII"),
        ("node_name", "..", "of ASCII"),
        ("s3_path_style", "perhaps", "bool"),
    ],
)
def test_a_bad_value_is_refused_and_its_setting_named(
    key: str, value: object, words: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sessiond.toml"
    path.write_text(f"data_dir = {json.dumps(str(tmp_path / 'data'))}\n{key} = {json.dumps(value)}\n")
    assert cli.run(["serve", "--config", str(path)]) == exits.USAGE
    told = capfd.readouterr().err
    # request_bytes_max is the one that has to hold a turn.
    for word in ("INVALID_CONFIG", "request_bytes_max" if "below" in words else key, words):
        assert word in told
    assert REASONS["INVALID_CONFIG"].remedy in told
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SESSIOND_LEASE_MS", "soon", "no whole number"),
        ("SESSIOND_LEASE_MS", "", "no whole number"),
        ("SESSIOND_S3_PATH_STYLE", "perhaps", "neither true nor false"),
        ("SESSIOND_LISTEN", "nowhere", "HOST:PORT"),
    ],
)
def test_a_bad_variable_is_refused_and_named(name: str, value: str, words: str) -> None:
    with pytest.raises(SessiondError) as failure:
        config.load(None, {name: value}, {})
    assert failure.value.reason == "INVALID_CONFIG"
    assert words in failure.value.message
    assert name.removeprefix("SESSIOND_").lower() in failure.value.message


@pytest.mark.parametrize("content", [b"lease_ms = ", b"\xff\xfe", b"[[[", b"lease_ms = 1\nlease_ms = 2"])
def test_a_file_that_is_no_toml_is_refused(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sessiond.toml"
    path.write_bytes(content)
    assert cli.run(["serve", "--config", str(path)]) == exits.USAGE
    told = capfd.readouterr().err
    assert "INVALID_CONFIG" in told
    assert str(path) in told


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["serve", "--config", str(tmp_path / "absent.toml")]) == exits.USAGE
    assert "No such file" in capfd.readouterr().err


@pytest.mark.parametrize("cloud", ["ftp://somewhere/x", "file://relative/x", "s3://", "file:///x?y=1", "nothing"])
def test_a_cloud_that_is_no_store_is_refused(cloud: str) -> None:
    with pytest.raises(StartFailed) as failure, running_daemon(cloud=cloud):
        pass
    assert failure.value.reason == "INVALID_CONFIG"
    assert failure.value.exit_code == exits.USAGE
    assert f"cloud = {cloud!r}" in failure.value.log


# Folders, ports, vocabularies ----------------------------------------------------------------------------------------


def test_a_data_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    cloud = f"file://{tmp_path / 'cloud'}"
    for data_dir in (tmp_path / "file" / "data", Path("/proc/sessiond-data")):
        refused("UNWRITABLE_FOLDER", str(data_dir), data_dir=data_dir, cloud=cloud)
    # Below a folder for the hot tier that is a file itself.
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "hot").write_text("a file")
    refused("UNWRITABLE_FOLDER", str(tmp_path / "data" / "hot"), data_dir=tmp_path / "data", cloud=cloud)


def test_a_cloud_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file", tmp_path / "file" / "cloud"):
        refused("UNWRITABLE_FOLDER", str(folder), data_dir=tmp_path / "data", cloud=f"file://{folder}")
    assert not (tmp_path / "data").exists()


def test_a_port_in_use_is_refused(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = refused("PORT_IN_USE", f"127.0.0.1:{port}", data_dir=tmp_path / "data", port=port)
        assert found.exit_code == exits.UNAVAILABLE
    assert not (tmp_path / "data").exists()
    refused("PORT_IN_USE", "192.0.2.1:7443", data_dir=tmp_path / "data", listen="192.0.2.1:7443")


def test_the_port_of_a_live_daemon_is_refused_and_the_daemon_goes_on(tmp_path: Path) -> None:
    with running_daemon() as first, contextlib.closing(Wire(first.address)) as wire:
        wire.create("s")
        refused("PORT_IN_USE", first.address, data_dir=tmp_path / "data", port=first.port)
        assert wire.append("s", user("t1", "Hello.")).head.seq == 1


@pytest.mark.parametrize("name", ["o200k_base", "cl100k_base"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_vocabulary_is_refused(name: str, damage: str, tmp_path: Path) -> None:
    """A whole installation with one bad file, so that nothing stands between it and the start."""
    shutil.copytree(SOURCE, tmp_path / "src" / "sessiond", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "src" / "sessiond" / "tokens" / "vocab" / f"{name}.vocab"
    packed = bytearray(path.read_bytes())
    packed[len(packed) // 2] ^= 1
    if damage == "flip":
        path.write_bytes(packed)
    elif damage == "cut":
        path.write_bytes(packed[:-1])
    else:
        path.unlink()
    env = {"PYTHONPATH": str(tmp_path / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    refused("DAMAGED_VOCABULARY", str(path), data_dir=tmp_path / "data", env=env)
    assert not (tmp_path / "data").exists()


# Another store, another key, another daemon --------------------------------------------------------------------------


def test_the_hash_key_of_another_store_is_refused(copy: Path) -> None:
    before = stores.contents(copy)
    found = refused("WRONG_HASH_KEY", "another hash key", data_dir=copy, hash_key="11" * 32)
    assert "11" * 32 not in found.log
    assert stores.contents(copy) == before


def test_a_bucket_that_was_made_with_a_configured_key_starts_with_that_key_alone(tmp_path: Path) -> None:
    data_dir, key = tmp_path / "data", "a5" * 32
    with running_daemon(data_dir, hash_key=key) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.create("s")
    assert key not in (data_dir / "cloud" / "bucket.json").read_text()
    before = stores.contents(data_dir)
    refused("WRONG_HASH_KEY", "needs a hash_key", data_dir=data_dir)
    refused("WRONG_HASH_KEY", "another hash key", data_dir=data_dir, hash_key="5a" * 32)
    assert stores.contents(data_dir) == before
    with running_daemon(data_dir, hash_key=key) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        assert not wire.create("s").created


def test_a_hot_tier_of_another_store_is_refused(copy: Path, tmp_path: Path) -> None:
    before = stores.contents(copy)
    other = f"file://{tmp_path / 'other'}"
    refused("WRONG_STORE", str(copy / "hot"), stores.bucket(copy).store_id.hex(), data_dir=copy, cloud=other)
    assert stores.contents(copy) == before
    # The other store belongs to nobody's hot tier yet, and starts with its own.
    with running_daemon(tmp_path / "fresh", cloud=other):
        pass


def test_the_node_name_of_a_live_daemon_is_refused_and_of_a_dead_one_taken_over(tmp_path: Path) -> None:
    cloud = f"file://{tmp_path / 'cloud'}"
    with running_daemon(tmp_path / "first", cloud, node_name="n1") as first:
        with contextlib.closing(Wire(first.address)) as wire:
            wire.create("s")
            found = refused(
                "NODE_NAME_IN_USE", "'n1'", str(first.pid), data_dir=tmp_path / "b", cloud=cloud, node_name="n1"
            )
            assert found.exit_code == exits.UNAVAILABLE
            assert wire.append("s", user("t1", "Hello.")).head.seq == 1
        with running_daemon(tmp_path / "second", cloud, node_name="n2"):
            pass
        first.kill()
        with running_daemon(tmp_path / "third", cloud, node_name="n1"):
            pass


# Newer formats -------------------------------------------------------------------------------------------------------


def rewrite_bucket(data_dir: Path, change: Callable[[dict[str, Any]], None], checksum: bool = True) -> None:
    path = data_dir / "cloud" / "bucket.json"
    fields = json.loads(path.read_text())
    change(fields)
    if checksum:
        del fields["checksum"]
        fields["checksum"] = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(fields))


@pytest.mark.parametrize("checksum", [True, False])
def test_a_bucket_of_a_newer_format_is_refused_and_left_alone(copy: Path, checksum: bool) -> None:
    # Also where the newer release sums up its fields in another way.
    rewrite_bucket(copy, lambda fields: fields.update(format=2, surprise=[1]), checksum)
    before = stores.contents(copy)
    refused("NEWER_FORMAT", "bucket", "format 2", data_dir=copy)
    assert stores.contents(copy) == before


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"null", b"not json", b"\xff\xfe\x00", b'{"format": "one"}', b'{"format": 1e999}']
)
def test_a_bucket_that_is_none_is_refused_and_left_alone(copy: Path, content: bytes) -> None:
    (copy / "cloud" / "bucket.json").write_bytes(content)
    before = stores.contents(copy)
    refused("CORRUPT_MANIFEST", "bucket.json", remedy=RESTORE, data_dir=copy)
    assert stores.contents(copy) == before


def test_a_bucket_whose_fields_do_not_match_their_checksum_is_refused(copy: Path) -> None:
    rewrite_bucket(copy, lambda fields: fields.update(created_unix_ms=1), checksum=False)
    refused("CORRUPT_MANIFEST", "checksum", remedy=RESTORE, data_dir=copy)


@pytest.mark.parametrize("left", ["m", "s"])
def test_a_bucket_that_lost_its_identity_is_refused_and_given_no_new_key(copy: Path, left: str) -> None:
    cloud = copy / "cloud"
    (cloud / "bucket.json").unlink()
    shutil.rmtree(cloud / {"m": "s", "s": "m"}[left])
    shutil.rmtree(copy / "hot")
    before = stores.contents(copy)
    with pytest.raises(StartFailed) as failure, running_daemon(copy):
        pass
    assert (failure.value.reason, failure.value.exit_code) == ("CORRUPT_MANIFEST", exits.CORRUPT), failure.value.log
    assert RESTORE in failure.value.log
    assert f"{left}/" in failure.value.log
    assert not (cloud / "bucket.json").exists()
    assert {name for name in stores.contents(copy) if name.startswith("cloud/")} == {
        name for name in before if name.startswith("cloud/")
    }


def test_a_hot_tier_of_a_newer_format_is_refused_and_left_alone(copy: Path) -> None:
    with stores.rows(copy) as (transaction, tables):
        transaction.put(META_FORMAT, (2).to_bytes(4, "big"), db=tables["meta"])
    before = stores.contents(copy)
    refused("NEWER_FORMAT", str(copy / "hot"), "format 2", data_dir=copy)
    assert stores.contents(copy) == before


def test_a_lease_of_a_newer_format_is_refused_and_left_alone(copy: Path) -> None:
    [lease] = (copy / "cloud" / "n").iterdir()
    lease.write_bytes(stores.newer(lease.read_bytes()))
    before = lease.read_bytes()
    refused("NEWER_FORMAT", f"n/{lease.name}", data_dir=copy)
    assert lease.read_bytes() == before


def reads_as_newer(wire: Wire, session: str, *reads: str) -> None:
    found = stores.look(wire, session)
    for name in reads:
        assert isinstance(found[name], Refusal), name
        assert found[name].reason == "NEWER_FORMAT"
        assert found[name].code is grpc.StatusCode.FAILED_PRECONDITION
        assert found[name].metadata["remedy"] == REASONS["NEWER_FORMAT"].remedy
    for name in set(found) - set(reads):
        assert isinstance(found[name], bytes), f"{name}: {found[name].reason}"


def test_a_manifest_of_a_newer_format_is_refused_and_never_overwritten(copy: Path) -> None:
    path = copy / "cloud" / "m" / stores.hash_of(copy, "inline").hex()
    path.write_bytes(stores.newer(path.read_bytes()))
    before = path.read_bytes()
    shutil.rmtree(copy / "hot")
    with running_daemon(copy) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        reads_as_newer(wire, "inline", "get", "resume", "resume-large", "resume-last", "turns", "checkpoints")
        with pytest.raises(grpc.RpcError) as refusal:
            wire.append("inline", user("new", "x"))
        assert Refusal(refusal.value).reason == "NEWER_FORMAT"
        with pytest.raises(grpc.RpcError) as refusal:
            wire.create("inline", user_id="ada")
        assert Refusal(refusal.value).reason == "NEWER_FORMAT"
        page = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ada"))
        assert [found.session_id for found in page.sessions] == ["sealed"]
        # The creation that was refused may have left a row of its own in the index.
        assert {(found.session_id, found.reason) for found in page.unreadable} == {("inline", "NEWER_FORMAT")}
        # Its neighbour is served as ever.
        assert wire.resume("sealed").receipt.rung == CLOUD
    assert path.read_bytes() == before


def test_a_segment_of_a_newer_format_is_refused_and_the_rest_of_the_session_served(copy: Path) -> None:
    h = stores.hash_of(copy, "sealed")
    manifest_path = copy / "cloud" / "m" / h.hex()
    [old] = (copy / "cloud" / "s" / h.hex()).iterdir()
    body = stores.newer(old.read_bytes())
    sha256 = hashlib.sha256(body).digest()
    (old.parent / f"{old.name.rsplit('-', 1)[0]}-{sha256.hex()}").write_bytes(body)
    old.unlink()
    manifest = manifests.unseal(manifest_path.read_bytes(), "m", h)
    manifest.segments[0][3] = sha256
    manifest_path.write_bytes(manifests.seal(manifest))
    shutil.rmtree(copy / "hot")
    with running_daemon(copy) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        reads_as_newer(wire, "sealed", "resume-large", "turns")


def test_a_state_of_a_newer_replay_rule_is_refused(copy: Path) -> None:
    h = stores.hash_of(copy, "inline")
    path = copy / "cloud" / "m" / h.hex()
    manifest = manifests.unseal(path.read_bytes(), "m", h)
    places = msgpack.unpackb(manifest.state)
    manifest.state = msgpack.packb([2, *places[1:], "a place of rule 2"])
    path.write_bytes(manifests.seal(manifest))
    shutil.rmtree(copy / "hot")
    with running_daemon(copy) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        # The checkpoints in it are of the known rule.
        reads_as_newer(wire, "inline", "get", "resume", "resume-large", "resume-last", "turns")


def test_what_a_newer_writer_added_under_a_format_that_may_be_read_is_kept(copy: Path) -> None:
    """A version above ours whose oldest reader is not, with keys and fields that nobody here knows."""
    h = stores.hash_of(copy, "inline")
    path = copy / "cloud" / "m" / h.hex()
    meta, payload = envelope.unseal(path.read_bytes(), envelope.KIND_MANIFEST, "m")
    body = bytearray(envelope.seal(envelope.KIND_MANIFEST, {**meta, "later": {"a": [1, b"2"]}}, payload))
    path.write_bytes(reversion(bytes(body), 2))
    with running_daemon(copy, flush_interval_ms=50) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.append("inline", user("new", "x"))
        assert daemon.terminate() == 0
    kept = manifests.unseal(path.read_bytes(), "m", h)
    assert kept.extra == {"later": {"a": [1, b"2"]}}
    assert kept.head == meta["head"] + 1


def reversion(stored: bytes, version: int) -> bytes:
    """The same object under another envelope version, whose oldest reader stays as it is."""
    table = 64 + 4 * int.from_bytes(stored[36:40], "little")
    head = stored[:8] + version.to_bytes(2, "little") + stored[10:60]
    crc = stores.crc32c(head + stored[64:table]).to_bytes(4, "little")
    out, at = [head, crc, stored[64:table]], table
    for index in range(int.from_bytes(stored[36:40], "little")):
        size = int.from_bytes(stored[64 + 4 * index : 68 + 4 * index], "little")
        chunk = stored[at : at + size - 4]
        seal = stores.crc32c(chunk, stores.crc32c(crc + index.to_bytes(4, "little")))
        out += [chunk, seal.to_bytes(4, "little")]
        at += size
    return b"".join(out)


# A start beside a start ----------------------------------------------------------------------------------------------


def test_of_two_daemons_that_start_at_once_on_one_folder_one_serves(tmp_path: Path) -> None:
    """Same data folder, same node name, two ports: the lease lets one in, whoever is first."""
    served, failures = threading.Event(), []
    over = threading.Event()

    def start() -> None:
        try:
            with running_daemon(tmp_path / "data"):
                served.set()
                over.wait(60)
        except StartFailed as failure:
            failures.append(failure)
            over.set()

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.is_set()
    assert [failure.reason for failure in failures] == ["HOT_TIER_IN_USE"]
