"""Forks over the port: the windows of a fresh log of the same turns; nothing of the parent is copied or lost."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.demo import sample
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests import airline
from tests.e2e import stores
from tests.wire import Refusal, Wire

NEVER_MS = 3_600_000
BUDGETS = (700, 4000, 200_000)
SEALED = 64 * 1024


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with running_daemon(tmp_path / "data", flush_interval_ms=NEVER_MS) as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    with contextlib.closing(Wire(daemon.address)) as wire:
        yield wire


def fork(wire: Wire, session: str, new: str, seq: int = 0, **fields: object) -> session_pb2.ForkSessionResponse:
    at = {"seq": seq} if seq else {}
    request = session_pb2.ForkSessionRequest(session_id=session, new_session_id=new, **at, **fields)
    return wire.sessions.ForkSession(request, timeout=30)


def get(wire: Wire, session: str, **fields: object) -> session_pb2.Session:
    request = session_pb2.GetSessionRequest(session_id=session, **fields)
    return wire.sessions.GetSession(request, timeout=30).session


def delete(wire: Wire, session: str) -> bool:
    return wire.sessions.DeleteSession(session_pb2.DeleteSessionRequest(session_id=session), timeout=30).deleted


def told(context: context_pb2.ActiveContext) -> context_pb2.ActiveContext:
    """A context without what must differ between two sessions of the same turns: chains, epochs, times, where from."""
    plain = context_pb2.ActiveContext()
    plain.CopyFrom(context)
    for name in ("context_etag",):
        plain.ClearField(name)
    ranges = [*context.receipt.verbatim], [*context.receipt.omitted], [*context.receipt.summarised]
    prefix = context.receipt.stable_prefix
    plain.ClearField("receipt")
    for mine, theirs in zip(
        (plain.receipt.verbatim, plain.receipt.omitted, plain.receipt.summarised), ranges, strict=True
    ):
        mine.extend(theirs)
    plain.receipt.stable_prefix.tokens, plain.receipt.stable_prefix.turns = prefix.tokens, prefix.turns
    if plain.HasField("checkpoint"):
        for name in ("version", "epoch", "chain", "taken_at_unix_ms", "digest"):
            plain.checkpoint.ClearField(name)
    if plain.HasField("state"):
        plain.state.ClearField("etag")
    for turn in (*plain.turns, *plain.summaries, *([plain.instructions] if plain.HasField("instructions") else [])):
        for name in ("epoch", "append_time_unix_ms", "chain", "crc32c"):
            turn.ClearField(name)
    for pin in plain.pins:
        pin.set_at.ClearField("epoch")
    return plain


def answered(wire: Wire, session: str, budget: int) -> context_pb2.ActiveContext | dict[str, str]:
    """What a resume tells of a session, or the figures of its refusal."""
    try:
        return told(wire.resume(session, budget))
    except grpc.RpcError as error:
        return Refusal(error).metadata


def check_clean(daemon: Daemon) -> None:
    """`sessiond verify` beside whatever runs."""
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    assert [(found.invariant, found.explanation) for found in verify(settings, lambda *_: None)] == []


def objects(daemon: Daemon, session: str) -> list[str]:
    """The segments and orphans that a session has in the cloud tier."""
    h = stores.hash_of(daemon.data_dir, session).hex()
    root = daemon.data_dir / "cloud"
    return sorted(path.name for kind in ("s", "o") for path in (root / kind / h).glob("*"))


def conversations() -> list[tuple[str, list[turn_pb2.TurnInput]]]:
    if airline.PATH.exists():
        given = airline.conversations()
        chosen = [given[0], max(given, key=lambda each: len(each[1])), given[7]]
    else:
        chosen = [(f"sample-{n}", json.loads(line)["messages"]) for n, line in enumerate(list(sample.lines())[:3])]
    return [(name, [airline.to_turn(f"{name}-{n}", m) for n, m in enumerate(messages)]) for name, messages in chosen]


def test_every_fork_of_real_conversations_is_a_fresh_import_of_the_same_turns(daemon: Daemon, wire: Wire) -> None:
    for name, turns in conversations():
        wire.create(name, user_id="ada")
        wire.append(name, *turns)
        for seq in range(1, len(turns) + 1):
            wire.create(f"{name}-fresh-{seq}", user_id="ada")
            wire.append(f"{name}-fresh-{seq}", *turns[:seq])
            made = fork(wire, name, f"{name}-fork-{seq}", seq)
            assert made.created
            assert (made.session.head.seq, made.session.cloud_seq, made.session.user_id) == (seq, seq, "ada")
            for budget in BUDGETS:
                fresh = answered(wire, f"{name}-fresh-{seq}", budget)
                assert answered(wire, f"{name}-fork-{seq}", budget) == fresh, (name, seq, budget)
    check_clean(daemon)
