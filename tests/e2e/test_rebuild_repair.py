"""`sessiond rebuild` and `repair`, told by what a daemon serves afterwards: nothing is lost silently or made worse."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sessiond.cli import exits
from sessiond.core import envelope
from sessiond.core import manifest as manifests
from sessiond.testing import running_daemon
from sessiond.tiers.hot.survey import read_rows
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.cli.command import Ran, environment, run
from tests.e2e import stores
from tests.wire import CLOUD, HOT, PARTIAL, Refusal, Wire, assistant, user

SESSIONS = [f"s-{number:02}" for number in range(12)]
LOST = context_pb2.MISSING_REASON_HOT_TIER_LOST
OPTIONS = ("--map-size-bytes", 1024**3)


@pytest.fixture(scope="module")
def flushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiers of a daemon that was killed while it owned its sessions, all of them flushed."""
    data_dir = tmp_path_factory.mktemp("flushed") / "data"
    stores.make(data_dir, SESSIONS, sealed=False, drained=False)
    return data_dir


@pytest.fixture(scope="module")
def ahead(flushed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two turns of the first three sessions that the cloud tier lacks."""
    data_dir = stores.copy(flushed, tmp_path_factory.mktemp("ahead") / "data")
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            for session in SESSIONS[:3]:
                wire.append(session, user("late-1", f"Only on the node, of {session}."), assistant("late-2", "Yes."))
        daemon.kill()
    return data_dir


def rebuild(data_dir: Path, *argv: object) -> Ran:
    return run("rebuild", "--json", "--data-dir", data_dir, *OPTIONS, *argv)


def repair(data_dir: Path, *argv: object) -> Ran:
    return run("repair", "--json", "--data-dir", data_dir, *OPTIONS, *argv)


def look(data_dir: Path, sessions: list[str] = SESSIONS, **settings: Any) -> dict[str, dict[str, Any]]:
    """What a daemon over these tiers answers; it is killed afterwards, so that it changes as little as it can."""
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS, **settings) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            found = {session: stores.look(wire, session) for session in sessions}
        daemon.kill()
    return found


def refused(found: dict[str, dict[str, Any]]) -> dict[str, set[str]]:
    named = {
        session: {answer.reason for answer in answers.values() if isinstance(answer, Refusal)}
        for session, answers in found.items()
    }
    return {session: reasons for session, reasons in named.items() if reasons}


def clean(data_dir: Path) -> bool:
    ran = run("verify", "--json", "--data-dir", data_dir)
    return ran.code == exits.OK and ran.json["violations"] == []


def hot_folders(data_dir: Path) -> list[Path]:
    return sorted(data_dir.glob("hot.aside-*"))


# Rebuild --------------------------------------------------------------------------------------------------------------


def test_rebuild_makes_every_owned_session_hot_again_and_whole(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    sound = look(stores.copy(flushed, tmp_path / "sound"))
    old = stores.contents(data_dir / "hot")
    report = rebuild(data_dir)
    assert report.code == exits.OK, report.err
    assert (report.json["claimed"], report.json["may_miss"], report.json["unreadable"]) == (len(SESSIONS), 0, [])
    [aside] = hot_folders(data_dir)
    assert report.json["aside"] == str(aside)
    assert stores.contents(aside) == old
    assert clean(data_dir)
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            for session in SESSIONS:
                receipt = wire.resume(session).receipt
                assert (receipt.rung, list(receipt.missing)) == (HOT, [])
                assert stores.look(wire, session) == sound[session]
                duplicate = wire.append(session, user("t2", "What is the weather?"))
                assert duplicate.outcome == session_pb2.APPEND_OUTCOME_DUPLICATE
                assert wire.append(session, user("new", "On we go.")).head.seq > 0
        assert daemon.terminate() == exits.OK
    assert clean(data_dir)


def test_rebuild_after_the_disk_was_lost_says_what_may_be_missing(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            wire.create("safe", policy=turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_CLOUD))
            wire.append("safe", user("t1", "Committed."))
        daemon.kill()
    shutil.rmtree(data_dir / "hot")
    report = rebuild(data_dir)
    assert report.code == exits.INCOMPLETE
    assert (report.json["claimed"], report.json["may_miss"]) == (len(SESSIONS) + 1, len(SESSIONS))
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        for session in SESSIONS:
            receipt = wire.resume(session).receipt
            assert receipt.rung == PARTIAL
            [missing] = receipt.missing
            assert (missing.reason, missing.possible_only) == (LOST, True)
            assert missing.first_seq == receipt.cloud_seq + 1
        # A session that admits only CLOUD appends has none to miss.
        receipt = wire.resume("safe").receipt
        assert (receipt.rung, list(receipt.missing)) == (HOT, [])


def test_rebuild_refuses_to_give_up_turns_that_only_the_old_hot_tier_has(ahead: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(ahead, tmp_path / "data")
    before = stores.contents(data_dir / "hot")
    ran = rebuild(data_dir)
    assert ran.error["reason"] == "UNFLUSHED_TURNS"
    assert ran.error["metadata"] == {"path": str(data_dir / "hot"), "sessions": "3", "turns": "6"}
    assert "--abandon-unflushed" in ran.error["remedy"]
    assert stores.contents(data_dir / "hot") == before
    assert hot_folders(data_dir) == []
    # The old hot tier goes on as if nobody had asked.
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        assert [turn.turn_id for turn in wire.turns(SESSIONS[0])][-2:] == ["late-1", "late-2"]
        assert daemon.terminate() == exits.OK


def test_rebuild_that_abandons_turns_says_which_sessions_miss_some(ahead: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(ahead, tmp_path / "data")
    ran = rebuild(data_dir, "--abandon-unflushed")
    assert ran.code == exits.INCOMPLETE
    assert (ran.json["abandoned"], ran.json["may_miss"]) == ([3, 6], 3)
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        rungs = {session: wire.resume(session).receipt.rung for session in SESSIONS}
    assert rungs == {session: PARTIAL if session in SESSIONS[:3] else HOT for session in SESSIONS}
    # What was given up is still in the folder that was moved.
    [aside] = hot_folders(data_dir)
    (tmp_path / "old").mkdir()
    shutil.move(aside, tmp_path / "old" / "hot")
    shown = run("dump", "--data-dir", tmp_path / "old", "--session", SESSIONS[0], "--json").json["hot"]
    assert [frame["turn_id"] for row in shown["rows"] for frame in row["frames"]][-2:] == ["late-1", "late-2"]


def test_a_rebuild_that_is_killed_goes_on_where_it_was(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    sound = look(stores.copy(flushed, tmp_path / "sound"))
    # Each gets a little further than the one before, and none to the end.
    for after_claims in range(3):
        assert kill_rebuild(data_dir, after_claims)
        assert (data_dir / "hot" / "rebuilding").exists()
    ran = rebuild(data_dir)
    assert ran.code == exits.OK, ran.out
    assert ran.json["continued"]
    assert ran.json["claimed"] + ran.json["already"] == len(SESSIONS)
    assert len(hot_folders(data_dir)) == 1
    assert not (data_dir / "hot" / "rebuilding").exists()
    assert clean(data_dir)
    assert look(data_dir) == sound


def kill_rebuild(data_dir: Path, after_claims: int) -> bool:
    """Start a rebuild in a process of its own and SIGKILL it at its nth claim; whether it was killed."""
    code = (
        "import os, signal, sys\n"
        "from sessiond import cli, rebuild\n"
        "from sessiond.tiers.hydrate import Claims\n"
        "rebuild.CLAIMS_MAX = 1\n"
        "claim, claims = Claims.claim, []\n"
        "def counted(self, *arguments):\n"
        "    done = claim(self, *arguments)\n"
        "    claims.append(done)\n"
        f"    if len(claims) > {after_claims}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return done\n"
        "Claims.claim = counted\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    argv = ["rebuild", "--data-dir", str(data_dir), *map(str, OPTIONS)]
    ended = subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment(), capture_output=True, timeout=60, check=False
    )
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr.decode()
    return ended.returncode == -signal.SIGKILL


def test_a_daemon_started_over_an_unfinished_rebuild_serves_every_session(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    sound = look(stores.copy(flushed, tmp_path / "sound"))
    assert kill_rebuild(data_dir, 2)
    assert look(data_dir) == sound


def test_rebuild_takes_only_what_it_is_told_to(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    stores.make(data_dir, SESSIONS[:4], sealed=False, drained=True)
    assert rebuild(data_dir).json["released"] == 4
    assert rebuild(data_dir, "--all", "--user", "nobody").json["claimed"] == 0
    limited = rebuild(data_dir, "--all", "--user", "ada", "--limit", 3).json
    assert (limited["claimed"], limited["limited"], limited["may_miss"]) == (3, True, 0)
    assert rebuild(data_dir, "--all").json["claimed"] == 4
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        assert {wire.resume(session).receipt.rung for session in SESSIONS[:4]} == {HOT}


def test_rebuild_reads_around_damage_and_names_it(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    h = stores.hash_of(data_dir, SESSIONS[0])
    path = data_dir / "cloud" / "m" / h.hex()
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 1
    path.write_bytes(stored)
    ran = rebuild(data_dir)
    assert ran.code == exits.INCOMPLETE
    assert [row[:2] for row in ran.json["unreadable"]] == [[h.hex(), "CORRUPT_MANIFEST"]]
    assert ran.json["claimed"] == len(SESSIONS) - 1
    assert path.read_bytes() == bytes(stored)


def test_a_deleted_session_does_not_come_back_by_a_rebuild(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    bury(data_dir, SESSIONS[0])
    shutil.rmtree(data_dir / "hot")
    ran = rebuild(data_dir, "--all")
    assert (ran.json["deleted"], ran.json["claimed"]) == (1, len(SESSIONS) - 1)
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        found = stores.look(wire, SESSIONS[1])
        assert not isinstance(found["turns"], Refusal)
        for answer in (stores.outcome(lambda: wire.resume(SESSIONS[0])),):
            assert isinstance(answer, Refusal)
            assert answer.reason in ("SESSION_DELETED", "SESSION_NOT_FOUND")


def bury(data_dir: Path, session: str) -> None:
    """Put a tombstone where a session was."""
    h = stores.hash_of(data_dir, session)
    path = data_dir / "cloud" / "m" / h.hex()
    manifest = manifests.unseal(path.read_bytes(), "m", h)
    manifest.lifecycle, manifest.owner, manifest.payload = manifests.LIFECYCLE_DELETED, None, b""
    manifest.kept, manifest.kept_bytes, manifest.segments, manifest.checkpoints = [], 0, [], []
    manifest.turn_ids, manifest.inline_first = b"", manifest.head + 1
    path.write_bytes(manifests.seal(manifest))
    for row in (data_dir / "cloud" / "u").rglob(f"*-{h.hex()}"):
        row.unlink()
    shutil.rmtree(data_dir / "cloud" / "s" / h.hex(), ignore_errors=True)


@pytest.mark.parametrize("command", ["rebuild", "repair"])
def test_neither_runs_beside_a_daemon(tmp_path: Path, command: str) -> None:
    with running_daemon(tmp_path / "data", node_name="n1") as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        wire.create("s")
        ran = run(command, "--json", "--data-dir", tmp_path / "data", "--node-name", "n1")
        assert (ran.error["reason"], ran.code) == ("HOT_TIER_IN_USE", exits.UNAVAILABLE)
        if command == "rebuild":
            # On another machine, by the same name.
            ran = run(command, "--json", "--data-dir", tmp_path / "b", "--cloud", daemon.cloud, "--node-name", "n1")
            assert ran.error["reason"] == "NODE_NAME_IN_USE"
            assert not (tmp_path / "b").exists()
        assert wire.append("s", user("t1", "Hello.")).head.seq == 1
        assert daemon.terminate() == exits.OK


# Repair ---------------------------------------------------------------------------------------------------------------


def test_repair_of_what_is_sound_changes_nothing(ahead: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(ahead, tmp_path / "data")
    before = stores.contents(data_dir)
    for argv in (["--dry-run"], []):
        ran = repair(data_dir, *argv)
        assert ran.code == exits.OK
        assert (ran.json["moved"], ran.json["hurt"]) == ([], [])
        assert ran.json["looked"] == {
            "hot_sessions": len(SESSIONS),
            "manifests": len(SESSIONS),
            "index_rows": len(SESSIONS),
        }
    assert stores.contents(data_dir) == before


@pytest.mark.parametrize("damage", ["cut", "meta", "branch"])
def test_a_hot_tier_that_cannot_be_opened_is_moved_aside_and_the_node_serves_again(
    ahead: Path, tmp_path: Path, damage: str
) -> None:
    data_dir = stores.copy(ahead, tmp_path / "data")
    path = data_dir / "hot" / "data.mdb"
    stored = bytearray(path.read_bytes())
    if damage == "cut":
        stores.cut_short(path)
        stored = bytearray(path.read_bytes())
    elif damage == "meta":
        stored[16:24] = bytes(8)
    else:
        # The roots of all tables, wherever they stand.
        for at in range(0, len(stored), 4096):
            if stored[at + 10] & 0x02 and b"checkpoints" in stored[at : at + 4096]:
                stored[at + 12 : at + 20] = b"\xff" * 8
    path.write_bytes(stored)
    before = stores.contents(data_dir)
    planned = repair(data_dir, "--dry-run").json["moved"]
    assert stores.contents(data_dir) == before
    [moved] = repair(data_dir).json["moved"]
    assert moved["what"] == planned[0]["what"] == "hot tier"
    [aside] = hot_folders(data_dir)
    assert moved["to"] == str(aside)
    assert (aside / "data.mdb").read_bytes() == bytes(stored)
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        for session in SESSIONS:
            receipt = wire.resume(session).receipt
            assert receipt.rung == PARTIAL
            assert receipt.missing[0].reason == LOST
        assert daemon.terminate() == exits.OK
    assert clean(data_dir)


TABLES = ("heads", "turns", "ids", "checkpoints", "manifests")


def damage_row(data_dir: Path, session: str, table: str) -> None:
    h = stores.hash_of(data_dir, session)
    with stores.rows(data_dir) as (transaction, tables):
        rows = [(bytes(k), bytearray(v)) for k, v in transaction.cursor(db=tables[table]) if bytes(k).startswith(h)]
        key, value = rows[0]
        value[len(value) // 2] ^= 8
        transaction.put(key, bytes(value), db=tables[table])


def test_sessions_with_damaged_rows_come_back_from_the_cloud_tier_and_the_others_stay(
    ahead: Path, tmp_path: Path
) -> None:
    data_dir = stores.copy(ahead, tmp_path / "data")
    sound = look(stores.copy(ahead, tmp_path / "sound"))
    # The first three have turns that the cloud tier lacks; the third of them is left alone.
    hit = {SESSIONS[0]: "turns", SESSIONS[1]: "heads"}
    hit.update(zip(SESSIONS[3:8], TABLES, strict=True))
    for session, table in hit.items():
        damage_row(data_dir, session, table)
    named = {session: stores.hash_of(data_dir, session).hex() for session in SESSIONS}
    assert set(refused(look(stores.copy(data_dir, tmp_path / "hurt")))) >= {SESSIONS[0], SESSIONS[1]}

    before = stores.contents(data_dir)
    planned = repair(data_dir, "--dry-run").json["moved"]
    assert stores.contents(data_dir) == before
    moved = repair(data_dir).json["moved"]
    by_session = {row["to"].rsplit("-", 1)[1].removesuffix(".rows"): row for row in moved}
    assert set(by_session) == {named[session] for session in hit}
    assert len(planned) == len(moved)
    for session in (SESSIONS[0], SESSIONS[1]):
        assert len(by_session[named[session]]["unflushed"]) == 2
        # What was acknowledged and is in no log can be read from the file that is named.
        shown = run("dump", by_session[named[session]]["to"], "--bodies", "--json")
        assert f"Only on the node, of {session}." in shown.out
    assert {row["what"] for row in moved} == {"session"}

    with running_daemon(data_dir, flush_interval_ms=stores.NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            for session in SESSIONS:
                receipt = wire.resume(session).receipt
                # Where the head row is sound and everything was flushed, nothing can be missing.
                proved = hit.get(session) not in (None, "heads") and session not in SESSIONS[:3]
                if session not in hit:
                    assert (receipt.rung, list(receipt.missing)) == (HOT, []), session
                elif proved:
                    assert (receipt.rung, list(receipt.missing)) == (CLOUD, []), session
                else:
                    assert receipt.rung == PARTIAL, session
                    assert receipt.missing[0].first_seq == receipt.cloud_seq + 1
                if session not in SESSIONS[:2] and not (session in hit and not proved):
                    assert stores.look(wire, session) == sound[session]
            for session in SESSIONS[:3]:
                reply = wire.append(session, user("late-1", f"Only on the node, of {session}."))
                duplicate = reply.outcome == session_pb2.APPEND_OUTCOME_DUPLICATE
                assert duplicate == (session == SESSIONS[2])
        assert daemon.terminate() == exits.OK
    assert clean(data_dir)


def test_no_row_is_deleted_before_its_copy_is_durable(ahead: Path, tmp_path: Path) -> None:
    """Killed between the file and the transaction, a repair has changed nothing; the next one does all of it."""
    data_dir = stores.copy(ahead, tmp_path / "data")
    damage_row(data_dir, SESSIONS[0], "turns")
    rows = dict(rows_of(data_dir, SESSIONS[0]))
    code = (
        "import os, signal, sys\n"
        "from sessiond import cli\n"
        "from sessiond.tiers.hot.environment import Environment\n"
        "run = Environment.run_blocking\n"
        "def killed(self, operation, weight_bytes=0):\n"
        "    if 'move' in operation.__qualname__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return run(self, operation, weight_bytes)\n"
        "Environment.run_blocking = killed\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )
    argv = ["repair", "--data-dir", str(data_dir), *map(str, OPTIONS)]
    ended = subprocess.run([sys.executable, "-c", code, *argv], env=environment(), capture_output=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    [path] = (data_dir / "aside").iterdir()
    meta, payload = envelope.unseal(path.read_bytes(), envelope.KIND_ROWS, path.name)
    assert meta["h"] == stores.hash_of(data_dir, SESSIONS[0])
    kept = read_rows(payload)
    assert {(table, key) for table, found in kept.items() for key, _ in found} == {
        (table, key) for table, (key, _) in rows_of(data_dir, SESSIONS[0])
    }
    assert {table for table, _ in rows_of(data_dir, SESSIONS[0])} == set(rows)
    [moved] = repair(data_dir).json["moved"]
    assert len(moved["unflushed"]) == 2
    assert rows_of(data_dir, SESSIONS[0]) == []
    assert len(list((data_dir / "aside").iterdir())) == 2


def rows_of(data_dir: Path, session: str) -> list[tuple[str, tuple[bytes, bytes]]]:
    h = stores.hash_of(data_dir, session)
    found = []
    with stores.rows(data_dir) as (transaction, tables):
        for table in (*TABLES, "users", "dirty"):
            for key, value in transaction.cursor(db=tables[table]):
                if bytes(key).startswith(h) or (table == "users" and bytes(key).endswith(h)):
                    found.append((table, (bytes(key), bytes(value))))
    return found


def test_damaged_rows_of_the_index_are_copied_and_made_again(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    cloud = data_dir / "cloud"
    hit, gone, stray = sorted((cloud / "u").rglob("*-*"))[:3]
    sound = {path: path.read_bytes() for path in (hit, gone)}
    flip(hit)
    gone.unlink()
    # One that leads nowhere: a creation that was never acknowledged, damaged as well.
    (cloud / "m" / stray.name.rsplit("-", 1)[1]).unlink()
    flip(stray)
    damaged = {path: path.read_bytes() for path in (hit, stray)}
    shutil.rmtree(data_dir / "hot")
    ran = repair(data_dir)
    assert {row["name"] for row in ran.json["moved"]} == {str(path.relative_to(cloud)) for path in (hit, gone, stray)}
    assert {path: path.read_bytes() for path in sound} == sound
    assert not stray.exists()
    for path, body in damaged.items():
        assert (cloud / "aside" / path.relative_to(cloud)).read_bytes() == body
    assert repair(data_dir).json["moved"] == []


@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_row_of_the_expiry_index_is_made_again_as_it_was(tmp_path: Path, damage: str) -> None:
    data_dir = tmp_path / "data"
    with running_daemon(data_dir) as daemon, contextlib.closing(Wire(daemon.address)) as wire:
        policy = turn_pb2.SessionPolicy()
        policy.expiry.ttl_ms = 40 * 86_400_000
        wire.create("expires", policy=policy)
        wire.append("expires", user("t1", "Not for long."))
        assert daemon.terminate() == exits.OK
    [path] = [path for path in (data_dir / "cloud" / "x").rglob("*") if path.is_file()]
    sound = path.read_bytes()
    if damage == "flip":
        flip(path)
    else:
        path.unlink()
    [moved] = repair(data_dir).json["moved"]
    assert moved["name"] == str(path.relative_to(data_dir / "cloud"))
    assert path.read_bytes() == sound
    assert clean(data_dir)


def test_a_row_of_the_index_whose_manifest_is_damaged_too_is_left_where_it_is(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    shutil.rmtree(data_dir / "hot")
    row = sorted((data_dir / "cloud" / "u").rglob("*-*"))[0]
    flip(row)
    flip(data_dir / "cloud" / "m" / row.name.rsplit("-", 1)[1])
    before = stores.contents(data_dir)
    ran = repair(data_dir)
    assert (ran.code, ran.json["moved"], len(ran.json["hurt"])) == (exits.CORRUPT, [], 2)
    assert stores.contents(data_dir) == before


def flip(path: Path) -> None:
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 2] ^= 16
    path.write_bytes(stored)


def test_a_damaged_lease_of_a_dead_node_is_moved_aside_and_the_node_starts(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    [path] = (data_dir / "cloud" / "n").iterdir()
    flip(path)
    damaged = path.read_bytes()
    [moved] = repair(data_dir, "--lease-ms", 500).json["moved"]
    assert moved["what"] == "lease"
    assert (data_dir / "cloud" / "aside" / "n" / path.name).read_bytes() == damaged
    assert refused(look(data_dir)) == {}


def test_manifests_and_segments_are_never_touched_and_each_is_named(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    stores.make(data_dir, ["sealed-one", "sealed-two"], sealed=True, drained=True)
    cloud = data_dir / "cloud"
    one, two = (stores.hash_of(data_dir, session).hex() for session in ("sealed-one", "sealed-two"))
    [segment] = (cloud / "s" / one).iterdir()
    flip(segment)
    flip(cloud / "m" / two)
    before = stores.contents(data_dir)
    ran = repair(data_dir)
    assert ran.code == exits.CORRUPT
    assert ran.json["moved"] == []
    assert {row["name"] for row in ran.json["hurt"]} == {str(segment.relative_to(cloud)), f"m/{two}"}
    assert all("Restore" in row["remedy"] for row in ran.json["hurt"])
    assert stores.contents(data_dir) == before


def test_a_hot_tier_of_a_newer_format_is_left_alone(flushed: Path, tmp_path: Path) -> None:
    data_dir = stores.copy(flushed, tmp_path / "data")
    with stores.rows(data_dir) as (transaction, tables):
        transaction.put(b"format", (9).to_bytes(4, "big"), db=tables["meta"])
    before = stores.contents(data_dir)
    assert repair(data_dir).error["reason"] == "NEWER_FORMAT"
    assert rebuild(data_dir).error["reason"] == "NEWER_FORMAT"
    assert stores.contents(data_dir / "hot") == {
        name.removeprefix("hot/"): digest for name, digest in before.items() if name.startswith("hot/")
    }
    assert os.listdir(data_dir) == ["cloud", "hot"] or sorted(os.listdir(data_dir)) == ["cloud", "hot"]
