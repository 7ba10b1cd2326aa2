"""Forks over the port: the windows of a fresh log of the same turns; nothing of the parent is copied or lost."""

from __future__ import annotations

import contextlib
import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from sessiond import config
from sessiond.demo import sample
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, state_pb2, turn_pb2
from sessiond.verify import verify
from tests import airline
from tests.e2e import stores
from tests.wire import CLOUD, HOT, PARTIAL, Refusal, Wire, assistant, message, refusal, tool_call, tool_result, user

NEVER_MS = 3_600_000
BUDGETS = (700, 4000, 200_000)
# Of one turn that fills a segment by itself: the next flush seals what stands before it.
LARGE = "word " * 14_000
ERASED = context_pb2.MISSING_REASON_PARENT_ERASED
UNREADABLE = context_pb2.MISSING_REASON_SEGMENT_UNREADABLE
# A turn as it is made for one session: a summary names a chain, which begins with the session.
Maker = Callable[[Wire, str], turn_pb2.TurnInput]


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
    plain.ClearField("context_etag")
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
    for turn in plain.summaries:
        turn.summary.ClearField("covered_chain")
        turn.ClearField("body_digest")
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


# Everything that a log can hold -------------------------------------------------------------------------------------


def said(turn: turn_pb2.TurnInput) -> Maker:
    return lambda _wire, _session: turn


def summary(turn_id: str, last: int) -> Maker:
    def make(wire: Wire, session: str) -> turn_pb2.TurnInput:
        page = session_pb2.ListTurnsRequest(session_id=session, first_seq=last, last_seq=last)
        chain = wire.sessions.ListTurns(page).turns[0].chain
        turn = turn_pb2.TurnInput(turn_id=turn_id)
        turn.summary.text, turn.summary.covered_chain = f"what was said up to {last}", chain
        turn.summary.covered.first_seq, turn.summary.covered.last_seq = 1, last
        return turn

    return make


def rewind(turn_id: str, to_seq: int) -> Maker:
    return said(turn_pb2.TurnInput(turn_id=turn_id, rewind=turn_pb2.Rewind(to_seq=to_seq)))


def change(turn_id: str, rng: random.Random) -> Maker:
    turn = turn_pb2.TurnInput(turn_id=turn_id)
    turn.state.mode = rng.choice(("chat", "voice"))
    turn.state.flags["vip"] = rng.random() < 0.5
    turn.state.metadata["n"] = turn_id
    turn.state.pins.add(key=rng.choice("abc"), value=f"fact {turn_id}")
    return said(turn)


def some_turns(rng: random.Random, prefix: str, present: int) -> list[Maker]:
    """A few turns that may stand behind `present` others, whatever these are."""
    kind = rng.choice(("talk", "talk", "tool", "open", "system", "state", "summary", "rewind", "large", "milestone"))
    text = f"{prefix} " * rng.choice((1, 20, 200))
    if kind == "tool":
        calls = tool_call(f"{prefix}c", ("c1", "look"), ("c2", "ask"))
        turns = [
            user(f"{prefix}u", text),
            calls,
            tool_result(f"{prefix}1", "c2", text),
            tool_result(f"{prefix}2", "c1"),
        ]
        return [said(turn) for turn in (*turns, assistant(f"{prefix}a", text))]
    if kind == "open":
        return [said(user(f"{prefix}u", text)), said(tool_call(f"{prefix}c", ("c9", "never")))]
    if kind == "system":
        return [said(message(f"{prefix}s", turn_pb2.ROLE_SYSTEM, text)), said(user(f"{prefix}u", "so?"))]
    if kind == "state":
        return [change(f"{prefix}z", rng)]
    if kind == "summary" and present:
        return [summary(f"{prefix}y", rng.randint(1, present)), said(user(f"{prefix}u", "go on"))]
    if kind == "rewind" and present:
        return [rewind(f"{prefix}r", rng.randint(0, present)), said(user(f"{prefix}u", "again"))]
    if kind == "large":
        return [said(user(f"{prefix}u", LARGE)), said(assistant(f"{prefix}a", "noted"))]
    if kind == "milestone":
        return [said(turn_pb2.TurnInput(turn_id=f"{prefix}m", milestone=turn_pb2.Milestone(label=prefix)))]
    return [said(user(f"{prefix}u", text)), said(assistant(f"{prefix}a", text))]


def put(wire: Wire, session: str, makers: list[Maker]) -> bool:
    """Append turns one by one; False where the log as it stands does not take them: none of them is there then."""
    first, *others = makers
    try:
        wire.append(session, first(wire, session))
    except grpc.RpcError as error:
        refused = Refusal(error).reason
    else:
        for make in others:
            wire.append(session, make(wire, session))
        return True
    assert refused == "INVALID_REWIND"
    return False


@pytest.mark.parametrize("seed", range(2))
def test_a_family_of_forks_says_what_fresh_logs_of_the_same_turns_say(daemon: Daemon, seed: int) -> None:
    rng = random.Random(seed)
    wire = Wire(daemon.address)
    logs: dict[str, list[Maker]] = {"root": []}
    gone: set[str] = set()
    wire.create("root", user_id="ada", metadata={"of": "root"})
    for step in range(45):
        alive = [name for name in logs if name not in gone]
        name = rng.choice(alive)
        action = rng.choice(("put", "put", "put", "fork", "fork", "release", "delete", "kill"))
        if action == "put" or not logs[name]:
            makers = some_turns(rng, f"{step}-", len(logs[name]))
            logs[name] += makers if put(wire, name, makers) else []
        elif action == "fork":
            seq = rng.randint(1, len(logs[name]))
            assert fork(wire, name, f"fork-{step}", seq).created
            logs[f"fork-{step}"] = logs[name][:seq]
        elif action == "release":
            wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=[name]))
        elif action == "delete" and len(alive) > 2:
            assert delete(wire, name)
            gone.add(name)
        elif action == "kill":
            wire.close()
            daemon.kill()
            daemon.restart()
            wire = Wire(daemon.address)
    alive = [name for name in logs if name not in gone]
    assert len(alive) > 3
    for name in alive:
        wire.create(f"{name}-fresh", user_id="ada", metadata={"of": "root"})
        assert put(wire, f"{name}-fresh", logs[name])
    check_family(wire, alive)
    check_clean(daemon)
    wire.close()
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    wire = Wire(daemon.address)
    check_family(wire, alive)
    check_family(wire, alive)  # and again from the rows that the first look claimed
    for name in alive:
        delete(wire, name)
    names = [*logs, *(f"{name}-fresh" for name in alive)]
    for name in alive:
        delete(wire, f"{name}-fresh")
    assert {name: objects(daemon, name) for name in names} == {name: [] for name in names}
    wire.close()
    assert daemon.terminate() == 0
    check_clean(daemon)


def check_family(wire: Wire, names: list[str]) -> None:
    for name in names:
        for budget in BUDGETS:
            assert answered(wire, name, budget) == answered(wire, f"{name}-fresh", budget), (name, budget)
        mine, fresh = list(wire.turns(name)), list(wire.turns(f"{name}-fresh"))
        assert [(turn.seq, turn.turn_id, turn.kind, turn.flags) for turn in mine] == [
            (turn.seq, turn.turn_id, turn.kind, turn.flags) for turn in fresh
        ]
        assert [turn.epoch for turn in mine] == sorted(turn.epoch for turn in mine)


# What is asked and what is refused ----------------------------------------------------------------------------------


def talk(wire: Wire, session: str, count: int = 8, **fields: object) -> list[turn_pb2.TurnInput]:
    """A session of some exchanges behind a system turn."""
    wire.create(session, **fields)
    turns = [message("t1", turn_pb2.ROLE_SYSTEM, "Be brief.")]
    turns += [(assistant if n % 2 else user)(f"t{n}", f"number {n}") for n in range(2, count + 1)]
    for first in range(0, count, 200):
        wire.append(session, *turns[first : first + 200])
    return turns


def test_a_fork_is_made_once_and_says_where_it_is_from(wire: Wire) -> None:
    policy = turn_pb2.SessionPolicy(budget_tokens=900, min_durability=turn_pb2.DURABILITY_CLOUD)
    talk(wire, "a", user_id="ada", policy=policy, metadata={"k": "v"})
    parent = list(wire.turns("a"))
    first = fork(wire, "a", "b", 5, user_id="ada")
    again = fork(wire, "a", "b", 5)
    assert (first.created, again.created) == (True, False)
    assert again.session == first.session == get(wire, "b")
    made = first.session
    assert (made.forked_from_session_id, made.forked_at.seq, made.forked_at.epoch) == ("a", 5, 1)
    assert made.forked_at.chain == parent[4].chain
    assert (made.policy, made.user_id, dict(made.state.metadata)) == (policy, "ada", {"k": "v"})
    assert (made.head.seq, made.cloud_seq, made.epoch) == (5, 5, 2)
    assert wire.sessions.ListSessions(session_pb2.ListSessionsRequest(user_id="ada")).sessions[1] == made
    assert (wire.resume("b").receipt.rung, len(wire.resume("b").turns)) == (HOT, 4)
    # Each goes its own way, and a position of the one is none of the other.
    mine, theirs = wire.append("b", user("n1", "left")), wire.append("a", user("n1", "right"))
    assert (mine.head.seq, mine.head.epoch, theirs.head.seq, theirs.head.epoch) == (6, 2, 9, 1)
    assert mine.checkpoint_version >> 32 <= mine.head.epoch
    assert [turn.turn_id for turn in wire.turns("b")] == ["t1", "t2", "t3", "t4", "t5", "n1"]
    assert fork(wire, "a", "", 5).session.session_id not in ("a", "b", "")


def test_versions_rise_from_the_parents_checkpoint_to_the_forks(wire: Wire) -> None:
    talk(wire, "a")
    checkpoints = wire.sessions.ListCheckpoints(session_pb2.ListCheckpointsRequest(session_id="a")).checkpoints
    for number, known in enumerate(checkpoints):
        made = fork(wire, "a", f"f{number}", checkpoint_version=known.header.version).session
        known.header.ClearField("digest")  # only ListCheckpoints has it
        assert made.checkpoint == known.header
        found = wire.sessions.ListCheckpoints(session_pb2.ListCheckpointsRequest(session_id=f"f{number}")).checkpoints
        assert [each.content for each in found] == [each.content for each in checkpoints[number:]]
        again = [user(f"u{number}", "next"), assistant(f"a{number}", "done")]
        assert wire.append(f"f{number}", *again).checkpoint_version > known.header.version


def test_a_fork_that_can_not_be_made_is_refused_by_name(wire: Wire) -> None:
    talk(wire, "a", user_id="ada")
    talk(wire, "other", user_id="eve")
    fork(wire, "a", "b", 5)
    delete(wire, fork(wire, "a", "c", 5).session.session_id)
    version = (1 << 32) | 4
    for reason, field, call in (
        ("INVALID_FORK", "at", lambda: fork(wire, "a", "new")),
        ("INVALID_FORK", "at", lambda: fork(wire, "a", "new", 9)),
        ("INVALID_FORK", "checkpoint_version", lambda: fork(wire, "a", "new", checkpoint_version=version)),
        ("INVALID_FORK", "checkpoint_version", lambda: fork(wire, "a", "new", checkpoint_version=5)),
        ("INVALID_FORK", "checkpoint_version", lambda: fork(wire, "a", "new", checkpoint_version=(7 << 32) | 5)),
        ("INVALID_SESSION_ID", "new_session_id", lambda: fork(wire, "a", "n w", 5)),
        ("SESSION_EXISTS", "new_session_id", lambda: fork(wire, "a", "other", 5)),
        ("SESSION_EXISTS", "new_session_id", lambda: fork(wire, "a", "b", 4)),
        ("SESSION_EXISTS", "new_session_id", lambda: fork(wire, "other", "b", 5)),
        ("SESSION_EXISTS", "new_session_id", lambda: fork(wire, "a", "a", 5)),
        ("SESSION_EXISTS", "new_session_id", lambda: fork(wire, "a", "b", 5, user_id="eve")),
        ("SESSION_NOT_FOUND", None, lambda: fork(wire, "a", "new", 5, user_id="eve")),
        ("SESSION_NOT_FOUND", None, lambda: fork(wire, "nobody", "new", 5)),
        ("SESSION_DELETED", None, lambda: fork(wire, "a", "c", 5)),
    ):
        refused = refusal(call)
        assert (refused.reason, refused.fields) == (reason, [field] if field else [])
    assert refusal(get, wire, "new").reason == "SESSION_NOT_FOUND"


def test_a_retry_of_a_turn_of_the_parent_is_a_duplicate_in_the_fork(wire: Wire) -> None:
    turns = talk(wire, "a", 1100)
    fork(wire, "a", "b", 1090)
    for at in (80, 1000, 1089):
        (found,) = wire.append("b", turns[at]).turns
        assert (found.duplicate, found.position.seq, found.position.epoch) == (True, at + 1, 1)
    changed = user("t1000", "something else")
    assert refusal(wire.append, "b", changed).reason == "TURN_ID_REUSED"
    # What the parent appended later is none of the fork's; nor is what lies behind the horizon.
    assert not wire.append("b", turns[1095]).turns[0].duplicate
    assert wire.append("b", turns[10]).head.seq == 1092


def test_a_tool_call_that_is_open_where_it_is_forked_is_answered_in_each(wire: Wire) -> None:
    wire.create("a")
    wire.append("a", user("t1", "look"), tool_call("t2", ("c1", "look")), tool_result("t3", "c1", "here"))
    fork(wire, "a", "b", 2)
    wire.append("b", tool_result("n3", "c1", "there"), assistant("n4", "done"))
    assert refusal(wire.append, "a", tool_result("t4", "c1", "twice")).reason == "TOOL_RESULT_WITHOUT_CALL"
    assert [turn.turn_id for turn in wire.resume("b").turns] == ["t1", "t2", "n3", "n4"]


def test_a_fork_takes_the_blobs_of_its_parent_along_and_each_keeps_its_own(daemon: Daemon, wire: Wire) -> None:
    def put_state(session: str, value: bytes) -> int:
        scope = state_pb2.StateScope(session_id=session)
        request = state_pb2.PutStateRequest(scope=scope, key="plan", content=value, write_id=f"{session}-{value!r}")
        return wire.states.PutState(request, timeout=30).header.version

    def get_state(session: str) -> bytes:
        scope = state_pb2.StateScope(session_id=session)
        return wire.states.GetState(state_pb2.GetStateRequest(scope=scope, key="plan"), timeout=30).content

    talk(wire, "a")
    put_state("a", b"one")
    put_state("a", b"two")
    fork(wire, "a", "b", 5)
    assert (get_state("a"), get_state("b")) == (b"two", b"two")
    put_state("b", b"mine")
    assert delete(wire, "a")
    fork(wire, "b", "c", 3)
    wire = restart_without_rows(daemon, wire)
    assert (get_state("b"), get_state("c")) == (b"mine", b"mine")
    wire.close()
    assert daemon.terminate() == 0
    check_clean(daemon)


def test_a_forks_time_to_live_begins_with_it(wire: Wire) -> None:
    day = 86_400_000
    expiry = turn_pb2.Expiry(ttl_ms=day, mode=turn_pb2.EXPIRY_MODE_FIXED, action=turn_pb2.EXPIRY_ACTION_ARCHIVE)
    talk(wire, "a", 5)
    born = get(wire, "a").created_at_unix_ms
    talk(wire, "old", 5, created_at_unix_ms=born - 2 * day)
    change = turn_pb2.StateChange(policy=turn_pb2.SessionPolicy(expiry=expiry))
    wire.sessions.UpdateSession(session_pb2.UpdateSessionRequest(session_id="old", turn_id="p", change=change))
    assert get(wire, "old").lifecycle == session_pb2.LIFECYCLE_ARCHIVED
    made = fork(wire, "old", "new", 4).session
    assert made.lifecycle == session_pb2.LIFECYCLE_ACTIVE
    assert born + day <= made.expires_at_unix_ms <= made.created_at_unix_ms + day
    assert wire.append("new", user("n5", "still here")).head.seq == 5
    assert get(wire, "old").lifecycle == session_pb2.LIFECYCLE_ARCHIVED


def test_forks_made_while_turns_come_in_are_each_a_prefix(daemon: Daemon, wire: Wire) -> None:
    talk(wire, "a", 20)
    stop = threading.Event()

    def write() -> int:
        with contextlib.closing(Wire(daemon.address)) as writer:
            number = 0
            while not stop.is_set():
                number += 1
                writer.append("a", user(f"w{number}", f"and {number} " * 60), assistant(f"r{number}", "yes"))
            return 20 + 2 * number

    with ThreadPoolExecutor(5) as pool:
        writing = pool.submit(write)
        try:
            made = list(
                pool.map(lambda n: fork(wire, "a", f"f{n}", get(wire, "a").head.seq - n % 3).session, range(24))
            )
            same = list(pool.map(lambda n: fork(wire, "a", "same", 15), range(4)))
        finally:
            stop.set()
        written = writing.result(30)
    assert sum(each.created for each in same) == 1
    parent = [(turn.seq, turn.turn_id, turn.chain) for turn in wire.turns("a")]
    assert len(parent) == written
    assert len({session.head.seq for session in made}) > 3
    for session in made:
        found = [(turn.seq, turn.turn_id, turn.chain) for turn in wire.turns(session.session_id)]
        assert found == parent[: session.forked_at.seq]
    check_clean(daemon)


# Parents that end --------------------------------------------------------------------------------------------------


def grow(wire: Wire, session: str, count: int, prefix: str = "g") -> None:
    """Exchanges of which each is sealed into a segment of its own."""
    for number in range(count):
        wire.append(session, user(f"{prefix}{number}", f"{number} {LARGE}"), assistant(f"{prefix}a{number}", "noted"))
        assert not wire.admin.Flush(admin_pb2.FlushRequest(session_id=session)).failures


def restart_without_rows(daemon: Daemon, wire: Wire) -> Wire:
    wire.close()
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    return Wire(daemon.address)


def test_what_a_fork_needs_of_a_deleted_parent_stays_until_the_last_fork_is_deleted(daemon: Daemon, wire: Wire) -> None:
    talk(wire, "a", 4)
    grow(wire, "a", 3)
    fork(wire, "a", "b", 8)
    grow(wire, "b", 2, "b")
    fork(wire, "b", "c", 11)
    whole = {name: told(wire.resume(name, 200_000)) for name in "bc"}
    assert delete(wire, "a")
    assert refusal(wire.resume, "a").reason == "SESSION_DELETED"
    assert refusal(fork, wire, "a", "d", 5).reason == "SESSION_DELETED"
    # Asked again, the call that made it finds it, though its parent is gone.
    assert not fork(wire, "a", "b", 8).created
    kept = objects(daemon, "a")
    assert kept
    wire = restart_without_rows(daemon, wire)
    assert {name: told(wire.resume(name, 200_000)) for name in "bc"} == whole
    check_clean(daemon)
    assert delete(wire, "b")
    wire = restart_without_rows(daemon, wire)
    assert told(wire.resume("c", 200_000)) == whole["c"]
    assert objects(daemon, "a") == kept
    assert objects(daemon, "b")
    check_clean(daemon)
    assert delete(wire, "c")
    assert [objects(daemon, name) for name in "abc"] == [[], [], []]
    wire.close()
    assert daemon.terminate() == 0
    check_clean(daemon)


def test_deleting_a_fork_takes_nothing_from_its_parent(daemon: Daemon, wire: Wire) -> None:
    talk(wire, "a", 4)
    grow(wire, "a", 2)
    fork(wire, "a", "b", 7)
    grow(wire, "b", 1, "b")
    before, context = objects(daemon, "a"), told(wire.resume("a", 200_000))
    assert delete(wire, "b")
    assert (objects(daemon, "a"), objects(daemon, "b")) == (before, [])
    assert told(wire.resume("a", 200_000)) == context
    assert delete(wire, "a")
    assert objects(daemon, "a") == []
    check_clean(daemon)


def own_and_shared(wire: Wire) -> list[str]:
    """A fork "b" with old turns of its parent "a" and newer ones of its own; the ids of its own turns."""
    talk(wire, "a", 4)
    grow(wire, "a", 2)
    fork(wire, "a", "b", 8)
    own = [user("n1", "of my own"), assistant("n2", "yes"), user("n3", "and so"), assistant("n4", "on")]
    wire.append("b", *own)
    return [turn.turn_id for turn in own]


def erase(daemon: Daemon, session: str) -> None:
    """What is left of a session that was erased: its tombstone."""
    h = stores.hash_of(daemon.data_dir, session).hex()
    for path in (daemon.data_dir / "cloud" / "s" / h).glob("*"):
        path.unlink()


def test_a_fork_whose_parent_was_erased_is_partial_and_never_without_its_own_turns(daemon: Daemon, wire: Wire) -> None:
    own = own_and_shared(wire)
    assert delete(wire, "a")
    wire = restart_without_rows(daemon, wire)
    erase(daemon, "a")
    for budget in (700, 3000, 200_000) * 2:
        found = wire.resume("b", budget)
        assert found.receipt.rung == PARTIAL
        assert [(m.first_seq, m.last_seq, m.reason) for m in found.receipt.missing] == [(1, 8, ERASED)]
        assert found.receipt.notice
        assert [turn.turn_id for turn in found.turns] == own
        assert not found.HasField("instructions")
        assert [(part.first_seq, part.last_seq) for part in found.receipt.omitted] == []
        assert found.tokens.total <= budget
    # A delta of what the caller has anyway, and turns that go on.
    newest = found.turns[-1]
    since = turn_pb2.TurnPosition(epoch=newest.epoch, seq=newest.seq, chain=newest.chain)
    assert not wire.resume("b", 3000, spec={"since": since}).turns
    assert wire.append("b", user("n5", "still?"), context=context_pb2.ContextSpec(budget_tokens=3000)).context.turns
    assert [turn.turn_id for turn in wire.resume("b", 3000).turns] == [*own, "n5"]
    # Where the window needs nothing of the parent's, nothing is missing from it.
    given = wire.resume("b", 30, spec={"instructions": "Be brief."})
    assert (given.receipt.rung, [turn.turn_id for turn in given.turns]) == (HOT, ["n3", "n4", "n5"])
    last = wire.resume("b", 3000, spec={"strategy": turn_pb2.STRATEGY_LAST_N, "last_exchanges": 1})
    assert [turn.turn_id for turn in last.turns] == ["n5"]
    too_small = refusal(wire.resume, "b", 8)
    assert too_small.reason == "BUDGET_TOO_SMALL"
    assert wire.resume("b", int(too_small.metadata["minimum_budget_tokens"])).turns


def test_a_segment_of_the_parent_that_can_not_be_read_is_named(daemon: Daemon, wire: Wire) -> None:
    own = own_and_shared(wire)
    wire = restart_without_rows(daemon, wire)
    h = stores.hash_of(daemon.data_dir, "a").hex()
    names = sorted(path.name for path in (daemon.data_dir / "cloud" / "s" / h).glob("*"))
    damaged = daemon.data_dir / "cloud" / "s" / h / names[-1]
    first_seq = int(names[-1].split("-")[1], 16)
    stored = bytearray(damaged.read_bytes())
    stored[len(stored) // 2] ^= 1
    damaged.write_bytes(stored)
    found = wire.resume("b", 200_000)
    assert [(m.first_seq, m.last_seq, m.reason) for m in found.receipt.missing] == [(first_seq, 8, UNREADABLE)]
    assert [turn.turn_id for turn in found.turns] == own
    assert found.instructions.turn_id == "t1"
    # A fork without turns of its own has no window that does without.
    assert refusal(fork, wire, "a", "c", 8).code is grpc.StatusCode.DATA_LOSS


def test_a_fork_that_lost_its_disk_says_so_and_its_parent_does_not(daemon: Daemon, wire: Wire) -> None:
    talk(wire, "a", 6)
    fork(wire, "a", "b", 4)
    acked = wire.append("b", user("n5", "not flushed")).head
    wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=["a"]))
    daemon.kill()
    wire.close()
    daemon.lose_hot_tier()
    daemon.restart()
    wire = Wire(daemon.address)
    lost = wire.resume("b").receipt
    assert [(m.first_seq, m.epoch) for m in lost.missing] == [(5, acked.epoch)]
    assert wire.resume("a").receipt.rung in (HOT, CLOUD)
    # A fork below the loss has none of it; one above has it, with what became of it.
    wire.append("b", user("m5", "in its place"), assistant("m6", "yes"))
    assert not fork(wire, "b", "below", 4).session.missing
    assert [m.epoch for m in fork(wire, "b", "above", 6).session.missing] == [acked.epoch]
    # Accepting one epoch's loss in the one accepts nothing in the other, nor another epoch's.
    assert wire.resume("above", accept_missing=acked.epoch + 1).receipt.rung == PARTIAL
    assert wire.resume("above", accept_missing=acked.epoch).receipt.rung == HOT
    assert wire.resume("b").receipt.rung == PARTIAL
    mourner = wire.resume("above", highest_acked=acked).receipt
    assert [(m.first_seq, m.last_seq, m.epoch) for m in mourner.missing] == [(5, 5, acked.epoch)]
    wire = restart_without_rows(daemon, wire)
    assert wire.resume("above").receipt.rung == CLOUD
    assert fork(wire, "above", "after", 6).created
    assert wire.resume("after").receipt.rung in (HOT, CLOUD)
    wire.close()
    assert daemon.terminate() == 0
    check_clean(daemon)


# Hints --------------------------------------------------------------------------------------------------------------


def warm(wire: Wire, session: str, **fields: object) -> bool:
    return wire.sessions.WarmSession(session_pb2.WarmSessionRequest(session_id=session, **fields), timeout=30).hot


def test_a_hint_makes_a_cold_session_hot_and_refuses_only_what_is_not_there(daemon: Daemon, wire: Wire) -> None:
    talk(wire, "a", 6, user_id="ada")
    grow(wire, "a", 1)
    fork(wire, "a", "b", 8)
    assert warm(wire, "a")
    wire = restart_without_rows(daemon, wire)
    assert not warm(wire, "a", user_id="ada")
    assert not warm(wire, "b")
    for name in "ab":
        for _ in range(2000):
            if warm(wire, name):
                break
        assert wire.resume(name, 3000, spec={"instructions": "x"}).receipt.rung in (HOT, CLOUD)
    assert refusal(warm, wire, "nobody").reason == "SESSION_NOT_FOUND"
    assert refusal(warm, wire, "a", user_id="eve").reason == "SESSION_NOT_FOUND"
    delete(wire, "a")
    assert refusal(warm, wire, "a").reason == "SESSION_DELETED"


def test_a_hint_is_answered_where_every_other_call_is_refused_for_overload(tmp_path: Path) -> None:
    with (
        running_daemon(tmp_path / "data", concurrent_calls_max=1) as daemon,
        contextlib.closing(Wire(daemon.address)) as wire,
    ):
        talk(wire, "a", 4)
        hints, appends = [], []
        for n in range(60):
            append = session_pb2.AppendTurnRequest(session_id="a", turns=[user(f"x{n}", "x " * 300)])
            appends.append(wire.sessions.AppendTurn.future(append, timeout=30))
            hints.append(wire.sessions.WarmSession.future(session_pb2.WarmSessionRequest(session_id="a"), timeout=30))
        refused = [Refusal(call.exception()).reason for call in appends if call.exception() is not None]
        assert set(refused) == {"OVERLOADED"}
        assert [hint.exception() for hint in hints] == [None] * 60
