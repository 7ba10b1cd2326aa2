"""The hot path gives the very bytes that the general path gives, or declines and has done nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sessiond.daemon import doubt_all
from sessiond.errors import SessiondError
from sessiond.service.hotpath import HotPath
from sessiond.transport.wire import embed
from sessiond.v1 import context_pb2, session_pb2, turn_pb2
from tests.tiers.test_commits import TOKENIZER, LiveNode, S, World, assistant, user

TENANT = "default"
STEPS = 80


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    try:
        yield made
    finally:
        made.close()


def hot_path(node: LiveNode, **other: Any) -> HotPath:
    parts = node.sessions._parts
    return HotPath(
        node.hot,
        parts.bucket.hash_key,
        TOKENIZER,
        other.pop("lease", parts.lease),
        parts.node.name,
        default_budget_tokens=other.pop("default_budget_tokens", 0),
        serve_unconfirmed=other.pop("serve_unconfirmed", True),
        turn_bytes_max=parts.turn_bytes_max,
        clock_ms=node.clock,
        expiry_ms=node.clock,
        latest_ms=node.clock,
        running_ms=node.clock,
        note_resumed=lambda h: None,
        note_appended=lambda h, turns: None,
        rungs={"HOT": 0},
    )


def general_resume(node: LiveNode, request: session_pb2.ResumeSessionRequest) -> bytes | None:
    """The general path's reply; None where it refuses."""
    try:
        context = node.world.run(node.sessions.resume(node.call, request))
    except SessiondError:
        return None
    return embed(1, context)


def random_turns(rng: random.Random, number: int, node: LiveNode) -> list[turn_pb2.TurnInput]:
    """What comes next in a conversation of every kind of turn."""
    name = f"t{number}"
    text = rng.choice(("ok", "ü" * 30, "And what about the day after tomorrow? " * rng.choice((1, 5, 40))))
    head = node.head
    match rng.randrange(12):
        case 0:
            turn = turn_pb2.TurnInput(turn_id=name, role=turn_pb2.ROLE_SYSTEM)
            turn.message.parts.add(text="Be kind. " * rng.choice((1, 20)))
            return [turn]
        case 1:
            call = turn_pb2.TurnInput(turn_id=name, role=turn_pb2.ROLE_ASSISTANT)
            call.message.parts.add(tool_call=turn_pb2.ToolCall(call_id=name, name="look", arguments='{"a": 1}'))
            answer = turn_pb2.TurnInput(turn_id=f"{name}r", role=turn_pb2.ROLE_TOOL)
            answer.message.parts.add().tool_result.call_id = name
            return [user(f"{name}u"), call, answer, assistant(f"{name}a")]
        case 2:
            change = turn_pb2.StateChange(metadata={"k": name}, flags={"f": True}, mode=rng.choice(("", "m")))
            return [turn_pb2.TurnInput(turn_id=name, state=change)]
        case 3:
            change = turn_pb2.StateChange(pins=[turn_pb2.PinnedFact(key=rng.choice("ab"), value=text[:200])])
            return [turn_pb2.TurnInput(turn_id=name, state=change)]
        case 4:
            return [turn_pb2.TurnInput(turn_id=name, milestone=turn_pb2.Milestone(label=name))]
        case 5 if head.head_seq > 4:
            to_seq = rng.randrange(head.head_seq - 3, head.head_seq)
            return [turn_pb2.TurnInput(turn_id=name, rewind=turn_pb2.Rewind(to_seq=to_seq))]
        case _:
            said = turn_pb2.TurnInput(turn_id=f"{name}a", role=turn_pb2.ROLE_ASSISTANT)
            said.message.parts.add(text=text)
            return [user(name), said][: rng.choice((1, 2, 2))]


def random_request(rng: random.Random, position: turn_pb2.TurnPosition) -> session_pb2.ResumeSessionRequest:
    request = session_pb2.ResumeSessionRequest(session_id=S, known_checkpoint_version=rng.choice((0, 0, 1 << 60)))
    spec = request.context
    spec.budget_tokens = rng.choice((30, 200, 1000, 4000, 100_000))
    spec.reserve_tokens = rng.choice((0, 0, 10))
    spec.strategy = rng.choice((0, 0, turn_pb2.STRATEGY_FULL, turn_pb2.STRATEGY_LAST_N, turn_pb2.STRATEGY_HYBRID))
    spec.last_exchanges = 2 if spec.strategy == turn_pb2.STRATEGY_LAST_N else 0
    spec.encoding = rng.choice((0, turn_pb2.ENCODING_CL100K_BASE))
    if rng.random() < 0.2:
        spec.instructions = rng.choice(("", "Be brief."))
    if rng.random() < 0.2:
        spec.new_message.parts.add(text="And now?")
    if rng.random() < 0.3:
        request.highest_acked.CopyFrom(position)
        if rng.random() < 0.3:
            request.highest_acked.chain = rng.choice((b"", bytes(16)))
    if rng.random() < 0.2:
        spec.since.seq = rng.randrange(position.seq + 2)
    return request


@pytest.mark.parametrize("seed", range(4))
def test_a_resume_is_byte_for_byte_the_general_paths(world: World, seed: int) -> None:
    rng = random.Random(seed)
    node = world.node()
    quick = hot_path(node)
    node.create()
    answered = asked = 0
    etag = ""
    for number in range(STEPS):
        try:
            reply = node.append(*random_turns(rng, number, node))
        except SessiondError:
            continue  # a rewind into what was rewound, or more pins than fit
        if rng.random() < 0.1:
            node.flush()
        for _ in range(4):
            request = random_request(rng, rng.choice((reply.head, reply.turns[0].position)))
            if rng.random() < 0.2:
                request.context.context_etag = etag
            found = quick.resume(request.SerializeToString(), TENANT)
            wanted = general_resume(node, request)
            asked += wanted is not None
            if found is None:
                continue
            answered += 1
            assert wanted is not None, "the general path refuses this"
            assert found == wanted
            etag = session_pb2.ResumeSessionResponse.FromString(found).context.context_etag
    assert answered > 0.8 * asked > STEPS, f"only {answered} of {asked} were answered"


@pytest.mark.parametrize("seed", range(3))
def test_an_append_is_the_general_paths_append(world: World, seed: int) -> None:
    """Whichever of the two appends first: the other finds every turn there, and says the same of it."""
    rng = random.Random(seed)
    node = world.node()
    quick = hot_path(node)
    node.create()
    done = 0
    for number in range(STEPS):
        request = session_pb2.AppendTurnRequest(session_id=S, turns=random_turns(rng, number, node))
        if rng.random() < 0.2:
            request.expected.seq = node.head.head_seq
        again = session_pb2.AppendTurnRequest(session_id=S, turns=request.turns)
        if rng.random() < 0.5:
            try:
                _, first = world.run(node.sessions.append(node.call, request))
            except SessiondError:
                assert world.run(quick.append(request.SerializeToString(), TENANT)) is None
                continue
            raw = world.run(quick.append(again.SerializeToString(), TENANT))
            assert raw is not None
            second = session_pb2.AppendTurnResponse.FromString(raw)
        else:
            raw = world.run(quick.append(request.SerializeToString(), TENANT))
            if raw is None:
                with pytest.raises(SessiondError):
                    world.run(node.sessions.append(node.call, request))
                continue
            first = session_pb2.AppendTurnResponse.FromString(raw)
            _, second = world.run(node.sessions.append(node.call, again))
        world.acknowledged(first)
        assert first.outcome == session_pb2.APPEND_OUTCOME_APPENDED
        assert second.outcome == session_pb2.APPEND_OUTCOME_DUPLICATE
        for turn in second.turns:
            assert turn.duplicate
            turn.ClearField("duplicate")
        second.outcome = first.outcome
        assert first == second
        done += 1
    assert done > STEPS / 2
    world.check()


class Lapsed:
    lost = False
    tenure = 3

    def is_valid(self) -> bool:
        return False


def test_without_a_lease_nothing_is_confirmed(world: World) -> None:
    node = world.node()
    node.create()
    request = session_pb2.ResumeSessionRequest(session_id=S, context=context_pb2.ContextSpec(budget_tokens=900))
    append = session_pb2.AppendTurnRequest(session_id=S, turns=[user("t1")])
    told = hot_path(node, lease=Lapsed())
    raw = told.resume(request.SerializeToString(), TENANT)
    assert raw is not None
    receipt = session_pb2.ResumeSessionResponse.FromString(raw).context.receipt
    assert receipt.ownership == context_pb2.OWNERSHIP_UNCONFIRMED
    raw = world.run(told.append(append.SerializeToString(), TENANT))
    assert raw is not None
    assert session_pb2.AppendTurnResponse.FromString(raw).ownership == context_pb2.OWNERSHIP_UNCONFIRMED
    refusing = hot_path(node, lease=Lapsed(), serve_unconfirmed=False)
    assert refusing.resume(request.SerializeToString(), TENANT) is None


RARE: dict[str, dict[str, Any]] = {
    "another session": {"session_id": "other"},
    "no id": {"session_id": ""},
    "no caller's id": {"session_id": "~user/ann"},
    "another user": {"user_id": "eve"},
}


@pytest.mark.parametrize("name", RARE)
def test_what_a_caller_may_not_have_is_declined(world: World, name: str) -> None:
    node = world.node()
    node.create()
    quick = hot_path(node, default_budget_tokens=900)
    fields = {"session_id": S, **RARE[name]}
    assert quick.resume(session_pb2.ResumeSessionRequest(session_id=S).SerializeToString(), TENANT) is not None
    assert quick.resume(session_pb2.ResumeSessionRequest(**fields).SerializeToString(), TENANT) is None
    append = session_pb2.AppendTurnRequest(turns=[user("t1")], **fields)
    assert world.run(quick.append(append.SerializeToString(), TENANT)) is None
    # Nor does the general path let him.
    with pytest.raises(SessiondError):
        world.run(node.sessions.append(node.call, append))
    assert general_resume(node, session_pb2.ResumeSessionRequest(**fields)) is None
    assert node.head.head_seq == 0


def test_what_another_may_own_or_may_lack_turns_is_declined(world: World) -> None:
    node = world.node()
    node.create()
    node.append(user("t1"), assistant("t2"))
    quick = hot_path(node, default_budget_tokens=900)
    resume = session_pb2.ResumeSessionRequest(session_id=S).SerializeToString()
    append = session_pb2.AppendTurnRequest(session_id=S, turns=[user("t3")])
    assert quick.resume(resume, TENANT) is not None
    for fields in ({"durability": turn_pb2.DURABILITY_CLOUD}, {"writer_token": "w"}, {"conflict_mode": 9}):
        rare = session_pb2.AppendTurnRequest(session_id=S, turns=[user("t3")], **fields)
        assert world.run(quick.append(rare.SerializeToString(), TENANT)) is None
    node.flush()
    doubt_all(node.hot)
    assert quick.resume(resume, TENANT) is None
    assert world.run(quick.append(append.SerializeToString(), TENANT)) is None
    other = world.node("other", "n2")
    assert other.take_over()
    # n1's turns may be missing, as far as n2 knows.
    theirs = hot_path(other, default_budget_tokens=900)
    assert other.head.loss
    assert theirs.resume(resume, TENANT) is None
    assert world.run(theirs.append(append.SerializeToString(), TENANT)) is None
    assert other.head.head_seq == 2
