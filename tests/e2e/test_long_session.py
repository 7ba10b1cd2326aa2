"""One session of 5,308 real turns: the budget holds, no exchange is torn, and history costs nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.testing import running_daemon
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests import airline
from tests.airline import needs_airline
from tests.oracle import from_turn_protos
from tests.wire import CLOUD, HOT, Wire, user

STRATEGIES = {
    "FULL": turn_pb2.STRATEGY_FULL,
    "LAST_N": turn_pb2.STRATEGY_LAST_N,
    "HYBRID": turn_pb2.STRATEGY_HYBRID,
}


def append_all(wire: Wire, session: str, turns: list[turn_pb2.TurnInput]) -> None:
    for start in range(0, len(turns), 128):
        wire.append(session, *turns[start : start + 128])


@pytest.fixture(scope="module")
def chained():
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        wire.create("all")
        turns = list(airline.chained())
        append_all(wire, "all", turns)
        log = list(wire.turns("all"))
        yield wire, log, daemon
        wire.close()


@needs_airline
def test_a_resume_of_5308_turns_holds_at_most_its_budget_and_tears_no_exchange(chained) -> None:
    wire, log, _ = chained
    assert len(log) == 5308
    assert sum(turn.role == turn_pb2.ROLE_SYSTEM for turn in log) == 200
    oracle = from_turn_protos(log)
    for strategy, number in STRATEGIES.items():
        for budget in (2000, 4000, 16_000, 100_000):
            for encoding in (turn_pb2.ENCODING_O200K_BASE, turn_pb2.ENCODING_CL100K_BASE):
                spec = {"strategy": number, "encoding": encoding, "last_exchanges": 3 if strategy == "LAST_N" else 0}
                context = wire.resume("all", budget, spec=spec)
                last = 3 if strategy == "LAST_N" else 0
                wanted = oracle.window(budget, encoding=int(encoding), strategy=strategy, last_exchanges=last)
                assert [turn.seq for turn in context.turns] == wanted["seqs"]
                assert context.tokens.tail == wanted["tail_tokens"]
                assert context.tokens.total == wanted["total_tokens"] <= budget
                assert oracle.torn_exchange(wanted["seqs"]) is None
                # Of 200 system prompts only the newest is instructions, and none is in the tail.
                assert context.instructions.seq == max(t.seq for t in log if t.role == turn_pb2.ROLE_SYSTEM)
                assert all(turn.role != turn_pb2.ROLE_SYSTEM for turn in context.turns)


@needs_airline
def test_every_stored_checkpoint_is_a_replay_in_any_batching_and_what_the_oracle_says(chained) -> None:
    wire, _, daemon = chained
    rng = random.Random(1)
    hash_key = bytes.fromhex(
        json.loads(Path(daemon.cloud.removeprefix("file://"), "bucket.json").read_text())["hash_key"]
    )
    names = ["all"]
    for name, messages in airline.conversations():
        names.append(name)
        wire.create(name)
        wire.append(name, *(airline.to_turn(f"{n}", message) for n, message in enumerate(messages)))
    checked = 0
    for name in names:
        h = rules.session_hash(hash_key, "default", name)
        frames = raw_frames(wire, name)
        saved = wire.sessions.ListCheckpoints(session_pb2.ListCheckpointsRequest(session_id=name)).checkpoints
        versions = [checkpoint.header.version for checkpoint in saved]
        assert versions == sorted(versions, reverse=True)
        turns = context_pb2.ActiveContext.FromString(b"".join(frames)).turns
        assert len(saved) == min(5, sum(bool(turn.flags & 4) for turn in turns))
        oracle = from_turn_protos(list(turns))
        for checkpoint in saved if name != "all" else saved[:1]:
            cursor = checkpoint.header.replay_cursor
            state, done = states.genesis(h, {}), 0
            while done < cursor:
                step = min(cursor - done, rng.choice((1, 2, 7, 64, 1000)))
                state = core.replay(h, state, b"".join(frames[done : done + step]))
                done += step
            assert state == checkpoint.content
            wanted = oracle.checkpoint(cursor)
            found = states.decode(state)
            assert found.cursor == wanted["replay_cursor"]
            assert (found.instructions or [0])[0] == wanted["instructions_seq"]
            assert found.exchanges == wanted["exchanges"]
            assert found.live_messages == wanted["live_messages"]
            assert found.live_tokens[:2] == [wanted["live_tokens"][1], wanted["live_tokens"][2]]
            assert found.last_live_seq == wanted["last_live_seq"]
            assert [entry[1] for entry in found.open_calls] == wanted["open_calls"]
            assert (found.pins, found.flags, found.mode) == (wanted["pins"], wanted["flags"], wanted["mode"])
            checked += 1
    assert checked > 900


def raw_frames(wire: Wire, name: str) -> list[bytes]:
    """The frames of a session as they came over the port."""
    call = wire.channel.unary_unary("/sessiond.v1.SessionService/ListTurns")
    frames: list[bytes] = []
    token = ""
    while True:
        request = session_pb2.ListTurnsRequest(session_id=name, page_size=1000, page_token=token)
        raw = call(request.SerializeToString(), timeout=60)
        at = 0
        while at < len(raw) and raw[at] == 0x0A:
            size = sum((raw[at + 1 + index] & 0x7F) << 7 * index for index in range(5))
            frames.append(raw[at : at + 6 + size])
            at += 6 + size
        token = session_pb2.ListTurnsResponse.FromString(raw).next_page_token
        if not token:
            return frames


@needs_airline
def test_a_window_beyond_the_manifest_comes_back_from_segments(chained) -> None:
    """After a drain and the loss of the disk, even 100,000 tokens of one session are the same turns as before."""
    wire, _, daemon = chained
    before = {budget: wire.resume("all", budget) for budget in (4000, 16_000, 100_000, 1_000_000)}
    wire.close()
    assert daemon.terminate() == 0
    daemon.lose_hot_tier()
    daemon.restart()
    wire = Wire(daemon.address)
    for budget, context in before.items():
        cold = wire.resume("all", budget, read_only=True)
        assert cold.receipt.rung == CLOUD
        assert [turn.chain for turn in cold.turns] == [turn.chain for turn in context.turns]
        assert cold.tokens == context.tokens
    # Once hot, older turns are fetched in front of the rows, and stay.
    wire.resume("all")
    wire.append("all", user("one-more", "and now?"))
    for _ in range(2):
        assert len(wire.resume("all", 1_000_000).turns) == len(before[1_000_000].turns) + 1
    assert wire.resume("all", 1_000_000).receipt.rung == HOT
    assert [turn.seq for turn in wire.turns("all")] == list(range(1, 5310))
    wire.close()
