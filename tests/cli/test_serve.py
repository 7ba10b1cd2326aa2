"""`sessiond serve`: every setting is an option, a refused start is one clear line with its exit code, and a clean drain
ends with 0.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from sessiond.cli import exits, settings
from sessiond.config import Settings
from sessiond.testing import free_port, running_daemon
from tests.cli.command import ROOT, Ran, environment, process, run, start

# The serving process of these tests: a small map, a port of its own.
SMALL = ("--map-size-bytes", 16 * 1024**2)


def serve(data_dir: Path, *options: object, **added: str) -> Ran:
    """A start that is expected to fail."""
    return process("serve", "--data-dir", data_dir, "--listen", f"127.0.0.1:{free_port()}", *SMALL, *options, **added)


def told(ran: Ran) -> str:
    """The line for people; the daemon's own log lines are JSON."""
    (line,) = [line for line in ran.err.splitlines() if not line.startswith("{")]
    assert line.startswith("sessiond: ")
    return line


def until(stream: IO[str], event: str) -> dict:
    for line in stream:
        if line.startswith("{") and json.loads(line)["event"] == event:
            return json.loads(line)
    raise AssertionError(f"it never said {event!r}")


@pytest.fixture
def used_data(tmp_path: Path) -> Path:
    """The data of a daemon that ran."""
    with running_daemon(data_dir=tmp_path / "data", map_size_bytes=16 * 1024**2):
        pass
    return tmp_path / "data"


def test_every_setting_is_an_option_with_its_own_help() -> None:
    shown = run("serve", "--help").out
    for name in Settings.__struct_fields__:
        assert f"--{name.replace('_', '-')}" in shown
        assert settings.HELP[name]
    assert set(settings.HELP) == set(Settings.__struct_fields__)
    assert "--no-s3-path-style" in shown


def test_options_go_before_the_environment_and_that_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sessiond.toml"
    file.write_text('node_name = "file"\nlease_ms = 700\nlog_level = "error"\n')
    from sessiond.config import load

    given = {"node_name": "option", "lease_ms": None, "log_level": None, "s3_path_style": None}
    loaded = load(str(file), {"SESSIOND_LEASE_MS": "800", "SESSIOND_NODE_NAME": "environment"}, given)
    assert (loaded.node_name, loaded.lease_ms, loaded.log_level) == ("option", 800, "error")


def test_a_clean_drain_ends_with_0_and_starts_again(tmp_path: Path) -> None:
    port = free_port()
    for _ in range(2):
        options = ("--data-dir", tmp_path / "data", "--listen", f"127.0.0.1:{port}", "--node-name", "n1", *SMALL)
        daemon = start("serve", *options)
        try:
            assert daemon.stderr is not None
            serving = until(daemon.stderr, "serving")
            assert serving["port"] == port
            server = ("--server", f"127.0.0.1:{port}")
            assert run("append", "kept", "--text", "hello", "--create", *server).code == 0
            assert run("stats", "--json", *server).json["node"] == "n1"
            daemon.send_signal(signal.SIGTERM)
            out, _ = daemon.communicate(timeout=60)
        finally:
            daemon.kill()
            daemon.wait()
        assert (daemon.returncode, out) == (exits.OK, "")


def test_a_drain_that_can_not_flush_ends_with_9(tmp_path: Path) -> None:
    port = free_port()
    cloud = tmp_path / "cloud"
    options = ("--data-dir", tmp_path / "data", "--cloud", cloud.as_uri(), "--listen", f"127.0.0.1:{port}", *SMALL)
    daemon = start("serve", *options, "--drain-grace-ms", 500, "--flush-interval-ms", 3_600_000)
    try:
        assert daemon.stderr is not None
        until(daemon.stderr, "serving")
        server = ("--server", f"127.0.0.1:{port}")
        assert run("append", "a", "--text", "hello", "--create", *server).code == 0
        cloud.rename(tmp_path / "away")
        daemon.send_signal(signal.SIGTERM)
        _, err = daemon.communicate(timeout=60)
    finally:
        daemon.kill()
        daemon.wait()
    assert daemon.returncode == exits.INCOMPLETE
    assert "Traceback" not in err


def test_an_unknown_key_names_the_one_that_was_meant(tmp_path: Path) -> None:
    file = tmp_path / "sessiond.toml"
    file.write_text('lisen = "127.0.0.1:1"\n')
    ran = serve(tmp_path, "--config", file)
    assert ran.code == exits.USAGE
    line = told(ran)
    for part in ("UNKNOWN_CONFIG_KEY", "'lisen'", str(file), "Did you mean 'listen'?", "correct its spelling"):
        assert part in line
    as_environment = serve(tmp_path, SESSIOND_LISEN="x")
    assert as_environment.code == exits.USAGE
    assert "SESSIOND_LISEN" in told(as_environment)


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--hash-key", "not hexadecimal", "hash_key"),
        ("--hash-key", "abcd", "hash_key"),
        ("--node-key", "ab" * 65, "node_key"),
        ("--advertise", "0.0.0.0:7443", "advertise"),
        ("--lease-ms", "1", "lease_ms"),
        ("--log-level", "loud", "log_level"),
        ("--node-name", "a/b", "node_name"),
        ("--cloud", "ftp://x", "cloud"),
        ("--cloud", "file://relative/path", "cloud"),
        ("--map-size-bytes", "17000001", "map_size_bytes"),
    ],
)
def test_a_wrong_value_names_its_setting(tmp_path: Path, option: str, value: str, field: str) -> None:
    ran = serve(tmp_path, option, value)
    assert ran.code == exits.USAGE
    line = told(ran)
    assert "INVALID_CONFIG" in line
    assert field in line


def test_a_config_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    ran = serve(tmp_path, "--config", tmp_path / "absent.toml")
    assert ran.code == exits.USAGE
    assert str(tmp_path / "absent.toml") in told(ran)
    broken = tmp_path / "broken.toml"
    broken.write_text("= nothing")
    assert "is not TOML" in told(serve(tmp_path, "--config", broken))


def test_a_port_in_use_is_told_and_nothing_is_touched(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        ran = process("serve", "--data-dir", tmp_path / "data", "--listen", address, *SMALL)
    assert ran.code == exits.UNAVAILABLE
    line = told(ran)
    for part in ("PORT_IN_USE", address, "listen on another port"):
        assert part in line
    assert not (tmp_path / "data" / "hot").exists()


@pytest.mark.parametrize("which", ["data_dir", "cloud"])
def test_an_unwritable_folder_is_denied(tmp_path: Path, which: str) -> None:
    if os.geteuid() == 0:
        # root writes everywhere, but not below a file.
        folder = tmp_path / "file" / "data"
        (tmp_path / "file").write_text("")
    else:
        folder = tmp_path / "locked" / "data"
        (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    options = ("--cloud", (tmp_path / "cloud").as_uri()) if which == "data_dir" else ("--cloud", folder.as_uri())
    ran = serve(folder if which == "data_dir" else tmp_path / "data", *options)
    assert ran.code == exits.DENIED
    line = told(ran)
    assert "UNWRITABLE_FOLDER" in line
    assert str(folder) in line
    assert "choose another folder" in line


def test_another_hash_key_than_the_buckets_is_refused(used_data: Path) -> None:
    ran = serve(used_data, SESSIOND_HASH_KEY="00" * 32)
    assert ran.code == exits.USAGE
    line = told(ran)
    assert "WRONG_HASH_KEY" in line
    assert "hash_key" in line


def test_a_hot_tier_of_another_bucket_is_refused(used_data: Path, tmp_path: Path) -> None:
    ran = serve(used_data, "--cloud", (tmp_path / "other").as_uri())
    assert ran.code == exits.USAGE
    assert "WRONG_STORE" in told(ran)


def test_a_bucket_of_a_newer_release_is_refused(used_data: Path) -> None:
    file = used_data / "cloud" / "bucket.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "format": 99}))
    ran = serve(used_data)
    assert ran.code == exits.CORRUPT
    line = told(ran)
    assert "NEWER_FORMAT" in line
    assert "upgrade" in line


def test_a_hot_tier_of_a_newer_release_is_refused(used_data: Path) -> None:
    program = (
        "import lmdb, sys\n"
        "with lmdb.open(sys.argv[1], max_dbs=16, lib_version=0) as env, env.begin(write=True) as txn:\n"
        "    txn.put(b'format', (99).to_bytes(4, 'big'), db=env.open_db(b'meta', txn=txn))\n"
    )
    subprocess.run([sys.executable, "-c", program, str(used_data / "hot")], check=True, env=environment())
    ran = serve(used_data)
    assert ran.code == exits.CORRUPT
    assert "NEWER_FORMAT" in told(ran)
    assert run("dump", "--data-dir", used_data).code == exits.CORRUPT
    assert run("verify", "--data-dir", used_data).code == exits.CORRUPT


def test_a_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "src" / "sessiond"
    shutil.copytree(ROOT / "src" / "sessiond", package, ignore=shutil.ignore_patterns("__pycache__"))
    vocabulary = package / "tokens" / "vocab" / "o200k_base.vocab"
    body = bytearray(vocabulary.read_bytes())
    body[len(body) // 2] ^= 1
    vocabulary.write_bytes(body)
    ran = serve(tmp_path, PYTHONPATH=str(tmp_path / "src"))
    assert ran.code == exits.CORRUPT
    line = told(ran)
    assert "DAMAGED_VOCABULARY" in line
    assert "o200k_base" in line


def test_a_second_daemon_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with running_daemon(cloud=(tmp_path / "cloud").as_uri(), node_name="twin"):
        ran = serve(tmp_path / "data", "--cloud", (tmp_path / "cloud").as_uri(), "--node-name", "twin")
    assert ran.code == exits.UNAVAILABLE
    assert "NODE_NAME_IN_USE" in told(ran)


def test_serve_starts_without_what_only_other_commands_need() -> None:
    program = (
        "import sys\n"
        "from sessiond import cli\n"
        "from sessiond.cli import serve\n"
        "import_daemon = serve._import_daemon\n"
        "class Served:\n"
        "    def serve(self, settings):\n"
        "        print(' '.join({module.split('.')[0] for module in sys.modules}))\n"
        "        print(*(module for module in sys.modules if module.startswith('sessiond.')))\n"
        "        import rich\n"
        "        return True\n"
        "serve._import_daemon = lambda: import_daemon() and Served()\n"
        "sys.exit(cli.run(['serve']))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True)
    packages, modules = (line.split() for line in ran.stdout.splitlines())
    assert {"grpc", "lmdb", "structlog", "sessiond"} <= set(packages)
    assert not {"rich", "boto3", "botocore"} & set(packages)
    assert "sessiond.daemon" in modules
    assert not [module for module in modules if module.startswith("sessiond.client")]


def test_help_needs_neither_a_daemon_nor_its_parts() -> None:
    program = (
        "import sys\n"
        "from sessiond.cli import run\n"
        "assert run(['--help']) == 0\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('rich', 'boto3', 'grpc', 'lmdb', 'structlog')])\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
