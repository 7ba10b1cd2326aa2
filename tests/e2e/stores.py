"""A node's two tiers as files: one made by a real daemon, copies of it to damage, and what a reader sees of one."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import lmdb

from sessiond.core import crc32c, rules
from sessiond.testing import running_daemon
from sessiond.tiers.cloud.bucket import Bucket, open_bucket
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.hot.environment import TABLES
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from tests.wire import Refusal, Wire, assistant, message, tool_call, tool_result, user

TENANT = "default"
NEVER_MS = 3_600_000


def talk(wire: Wire, session: str, sealed: bool) -> None:
    """A conversation with some of everything; sealed: so long that its beginning is in a segment."""
    wire.create(session, user_id="ada", metadata={"of": session})
    wire.append(
        session,
        message("t1", turn_pb2.ROLE_SYSTEM, f"You are {session}."),
        user("t2", "What is the weather?"),
        tool_call("t3", ("c1", "weather")),
        tool_result("t4", "c1", "sunny"),
        assistant("t5", "It is sunny."),
    )
    for number in range(4 if sealed else 0):
        wire.append(session, user(f"u{number}", f"{number} of {session} " * 1500), assistant(f"a{number}", "Noted."))
    change = turn_pb2.StateChange(mode="chat", flags={"vip": True})
    change.pins.add(key="city", value="Paris")
    wire.append(session, turn_pb2.TurnInput(turn_id="pin", state=change))
    for number in range(6):
        wire.append(session, user(f"v{number}", f"And then, {number}?"), assistant(f"b{number}", f"Then {number}."))


def make(data_dir: Path, sessions: list[str], sealed: bool, drained: bool) -> None:
    """The tiers of a daemon that held these sessions: drained, or killed with all of them flushed and owned."""
    with running_daemon(data_dir, flush_interval_ms=NEVER_MS) as daemon:
        with contextlib.closing(Wire(daemon.address)) as wire:
            for session in sessions:
                talk(wire, session, sealed)
            wire.admin.Flush(admin_pb2.FlushRequest())
        if drained:
            assert daemon.terminate() == 0
        else:
            daemon.kill()


def copy(source: Path, target: Path) -> Path:
    """A copy of a data directory, to be damaged."""
    shutil.copytree(source, target)
    return target


def bucket(data_dir: Path) -> Bucket:
    """The identity of a data directory's own folder store."""
    store = FolderStore(data_dir / "cloud")
    try:
        return open_bucket(store, b"", 0, make=False)
    finally:
        store.close()


def hash_of(data_dir: Path, session: str) -> bytes:
    """The session's hash in every key."""
    return rules.session_hash(bucket(data_dir).hash_key, TENANT, session)


@contextlib.contextmanager
def environment(data_dir: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The hot tier's LMDB environment, beside its daemon or without one, and its tables."""
    env = lmdb.open(str(data_dir / "hot"), max_dbs=len(TABLES), map_size=1024**3, lib_version=0)
    try:
        yield env, {name: env.open_db(name.encode()) for name in TABLES}
    finally:
        env.close()


@contextlib.contextmanager
def rows(data_dir: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A write transaction on the hot tier, and its tables."""
    with environment(data_dir) as (env, tables), env.begin(write=True) as transaction:
        yield transaction, tables


def cut_short(path: Path) -> None:
    """Cut LMDB's file within the pages that its newest commit refers to; behind these there is room kept ahead."""
    stored = path.read_bytes()
    newest = max((0, 4096), key=lambda at: int.from_bytes(stored[at + 144 : at + 152], "little"))
    last_page = int.from_bytes(stored[newest + 136 : newest + 144], "little")
    path.write_bytes(stored[: (last_page + 1) * 4096 * 2 // 3])


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder by the sha256 of its bytes, without locks."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock.mdb" and ".locks" not in path.parts and ".tmp" not in path.parts
    }


def newer(stored: bytes) -> bytes:
    """An object as a later release might write it: its header verifies and this release must not read it."""
    head = bytearray(stored)
    head[8:12] = (2).to_bytes(2, "little") + (2).to_bytes(2, "little")
    table = 64 + 4 * int.from_bytes(head[36:40], "little")
    head[60:64] = crc32c(bytes(head[:60]) + bytes(head[64:table])).to_bytes(4, "little")
    return bytes(head)


# What a reader sees -------------------------------------------------------------------------------------------------


def look(wire: Wire, session: str) -> dict[str, Any]:
    """Every read of one session: its answer, without what says from where it came, or its refusal."""

    def resume(budget: int, **fields: object) -> Any:
        return lambda: plain(wire.resume(session, budget, read_only=True, **fields))

    def described() -> bytes:
        found = wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id=session), timeout=30).session
        for name in ("cloud_seq", "epoch", "owner_node", "ownership", "missing"):
            found.ClearField(name)
        return found.SerializeToString(deterministic=True)

    def checkpoints() -> bytes:
        request = session_pb2.ListCheckpointsRequest(session_id=session)
        return wire.sessions.ListCheckpoints(request, timeout=30).SerializeToString(deterministic=True)

    def listed() -> bytes:
        page = wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ada", page_size=200), timeout=30)
        named = [found.session_id for found in page.sessions]
        assert session in named or page.unreadable, f"{session} is listed no more"
        return b"listed"

    reads = {
        "get": described,
        "resume": resume(2000),
        "resume-large": resume(100_000),
        "resume-last": resume(2000, spec={"strategy": turn_pb2.STRATEGY_LAST_N, "last_exchanges": 2}),
        "turns": lambda: b"".join(turn.SerializeToString(deterministic=True) for turn in wire.turns(session, 5)),
        "checkpoints": checkpoints,
        "list": listed,
    }
    return {name: outcome(read) for name, read in reads.items()}


def outcome(read: Any) -> Any:
    try:
        return read()
    except grpc.RpcError as error:
        return Refusal(error)


def plain(context: context_pb2.ActiveContext) -> bytes:
    """A context without what may differ between rungs."""
    for name in ("receipt", "context_etag"):
        context.ClearField(name)
    return context.SerializeToString(deterministic=True)
