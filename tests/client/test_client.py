"""The client, sync and asyncio alike: against real daemons, and a scripted server for what no daemon says today."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from sessiond import client as api
from sessiond.client import (
    AppendResult,
    Client,
    ClientError,
    Conflict,
    Context,
    Corrupt,
    Denied,
    Exhausted,
    Invalid,
    NotFound,
    SessiondError,
    Unavailable,
    Unimplemented,
    assistant,
    from_anthropic,
    from_openai,
    milestone,
    rewind,
    state_change,
    summary,
    system,
    tool_result,
    user,
)
from sessiond.client.turns import to_turns, usage_proto
from sessiond.client.unconfirmed import Unconfirmed
from sessiond.errors import REASONS
from sessiond.testing import Daemon, StartFailed, running_daemon
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from tests.client.servers import OnLoop, Scripted, accept, refuse

pytest_plugins = ["sessiond.testing"]

# Nothing is flushed on its own within a test.
NEVER_MS = 3_600_000
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "You are a travel agent."},
    {"role": "user", "content": "Two flights, please."},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "find", "arguments": '{"to": "LIS"}'}},
            {"id": "b", "type": "function", "function": {"name": "find", "arguments": '{"to": "OPO"}'}},
        ],
    },
    {"role": "tool", "tool_call_id": "b", "content": "OPO at 9"},
    {"role": "tool", "tool_call_id": "a", "content": ""},
    {"role": "assistant", "content": "Found one.", "refusal": None},
]


@pytest.fixture(params=[Client, OnLoop], ids=["sync", "asyncio"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running_daemon(flush_interval_ms=50) as daemon:
        yield daemon


@pytest.fixture
def client(kind: Any, daemon: Daemon) -> Iterator[Any]:
    with kind(daemon.address) as client:
        yield client


@pytest.fixture
def session(client: Any) -> str:
    return str(client.create_session().session_id)


# What goes in comes out ------------------------------------------------------------------------------------------


def test_an_openai_conversation_comes_back_equal_and_as_anthropic(client: Any, session: str) -> None:
    done = client.append(session, CONVERSATION)
    assert (done.outcome, done.head.seq, len(done.turns)) == ("APPENDED", 6, 6)
    context = client.resume(session, 4000)
    assert context.to_openai() == CONVERSATION
    rendered = context.to_anthropic()
    assert rendered["system"][0]["text"] == "You are a travel agent."
    assert [message["role"] for message in rendered["messages"]] == ["user", "assistant", "user", "assistant"]
    assert (context.rung, context.ownership, list(context.missing), context.notice) == ("HOT", "CONFIRMED", [], "")
    assert context.head == done.head
    assert 0 < context.tokens.total <= 4000


def test_an_append_returns_the_context_that_a_resume_would(client: Any, session: str) -> None:
    done = client.append(session, [user("Hello"), assistant("Hi")], context={"budget_tokens": 500, "strategy": "FULL"})
    assert done.context.to_openai() == client.resume(session, 500, strategy="FULL").to_openai()
    assert done.context_error is None
    refused = client.append(session, user("A long message " * 50), context=api.context_spec(50))
    assert refused.outcome == "APPENDED"
    assert refused.context is None
    assert isinstance(refused.context_error, Invalid)
    assert refused.context_error.reason == "BUDGET_TOO_SMALL"
    assert int(refused.context_error.metadata["minimum_budget_tokens"]) > 50


def test_every_maker_makes_a_turn_that_the_daemon_takes(client: Any, session: str) -> None:
    client.append(
        session,
        [
            system("Be brief."),
            user("What time is it?", name="ada", device_id="phone", created_at_unix_ms=5, labels={"a": "b"}),
            assistant(
                tool_calls=[("c1", "clock", "{}"), turn_pb2.ToolCall(call_id="c2", name="clock")],
                model="m",
                tokens={"o200k_base": 9},
                usage={"prompt_tokens": 7, "completion_tokens": 2},
                time_to_first_token_ms=2**40,
            ),
            tool_result("c1", "noon"),
            tool_result("c2", is_error=True),
            assistant("Noon", status="INTERRUPTED"),
            milestone("told", "the time"),
            state_change(flags={"seen": True}, mode="chat", metadata={"k": "v"}, pins={"name": "Ada"}),
            from_anthropic({"role": "user", "content": [{"type": "text", "text": "Thanks"}]}),
            from_openai({"role": "assistant", "content": "You're welcome"}),
            user([turn_pb2.Part(text="And "), turn_pb2.Part(text="now?")]),
            rewind(10, "REGENERATE"),
        ],
    )
    turns = list(client.list_turns(session))
    assert [turn_pb2.TurnKind.Name(turn.kind).removeprefix("TURN_KIND_") for turn in turns] == [
        *["MESSAGE"] * 6,
        "MILESTONE",
        "STATE",
        *["MESSAGE"] * 3,
        "REWIND",
    ]
    assert turns[2].o200k.tokens == 9
    assert (turns[2].meta.usage.prompt_tokens, turns[2].meta.usage.output_tokens) == (7, 2)
    assert turns[1].meta.labels == {"a": "b"}
    assert turns[5].status == turn_pb2.TURN_STATUS_INTERRUPTED
    client.append(session, summary("They asked for the time.", turns[9]))
    context = client.resume(session, 4000)
    assert context.proto.state.mode == "chat"
    assert [(pin.key, pin.value) for pin in context.proto.pins] == [("name", "Ada")]
    assert client.get_session(session).checkpoint.summarised.last_seq == 10


def test_the_new_message_is_counted_and_not_stored(client: Any, session: str) -> None:
    client.append(session, user("One"))
    plain = client.resume(session, 4000)
    for message in ("Two", {"role": "user", "content": "Two"}, turn_pb2.Message(parts=[turn_pb2.Part(text="Two")])):
        context = client.resume(session, 4000, new_message=message, instructions="Be kind.", encoding="cl100k_base")
        assert context.to_openai() == [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "One"},
            {"role": "user", "content": "Two"},
        ]
        assert context.tokens.total > plain.tokens.total
    assert client.get_session(session).head.seq == 1


def test_lists_go_through_every_page(client: Any) -> None:
    user_id = str(uuid.uuid4())
    made = [client.create_session(user_id=user_id).session_id for _ in range(5)]
    assert {found.session_id for found in client.list_sessions(user_id, page_size=2)} == set(made)
    assert set(made) <= {found.session_id for found in client.list_sessions()}
    page = client.list_sessions_page(user_id, page_size=2)
    assert len(page.sessions) == 2
    assert page.next_page_token
    client.append(made[0], [user(str(n)) for n in range(7)])
    assert [turn.seq for turn in client.list_turns(made[0], page_size=3)] == [1, 2, 3, 4, 5, 6, 7]
    assert [turn.seq for turn in client.list_turns(made[0], first_seq=2, last_seq=4)] == [2, 3, 4]
    assert client.list_turns_page(made[0], page_size=2).receipt.head.seq == 7


def test_a_list_says_how_it_was_served(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        session = client.create_session().session_id
        client.append(session, user("x"))
        turns = client.list_turns(session)
        assert [turn.seq for turn in turns] == [1]
        assert turns.page.receipt.rung == context_pb2.RUNG_HOT


def test_state_is_changed_under_its_etag_only(client: Any, session: str) -> None:
    before = client.get_session(session)
    after = client.update_session(session, metadata={"lang": "pt"}, etag=before.state.etag)
    assert after.state.metadata == {"lang": "pt"}
    with pytest.raises(Conflict) as refused:
        client.update_session(session, metadata={"lang": "de"}, etag=before.state.etag)
    assert refused.value.reason == "STATE_ETAG_MISMATCH"
    assert client.update_session(session, metadata_removed=["lang"], etag=after.state.etag).state.metadata == {}


def test_a_conflict_can_come_with_the_turns_that_the_caller_lacks(client: Any, session: str) -> None:
    first = client.append(session, user("One"))
    client.append(session, assistant("Two"))
    done = client.append(session, user("Other"), expected=first, return_tail_on_conflict=True)
    assert done.outcome == "CONFLICT"
    assert [turn.message.parts[0].text for turn in done.conflict.turns] == ["Two"]
    assert client.append(session, user("Three"), expected=(0, 2)).head.seq == 3


def test_creating_again_returns_the_same_session_with_its_policy(client: Any) -> None:
    policy = {"min_durability": "CLOUD", "budget_tokens": 300, "strategy": "full", "encoding": "cl100k_base"}
    made = client.create_session(f"again:{uuid.uuid4()}", policy=policy, metadata={"a": "b"})
    again = client.create_session(made.session_id)
    assert again == made
    assert made.policy.min_durability == turn_pb2.DURABILITY_CLOUD
    done = client.append(made.session_id, [user("x"), assistant("y")])
    assert (done.durability, done.cloud_seq) == ("CLOUD", 2)
    context = client.resume(made.session_id)
    assert context.tokens.budget == 300
    assert context.proto.strategy == turn_pb2.STRATEGY_FULL
    assert len(client.list_checkpoints(made.session_id)) == 1


def test_flush_and_status_reach_the_node(client: Any, session: str, daemon: Daemon) -> None:
    client.append(session, user("x"))
    client.flush(session)
    assert client.get_session(session).cloud_seq == 1
    status = client.get_status()
    assert status.phase == admin_pb2.NODE_PHASE_SERVING
    assert status.hot.path == str(daemon.data_dir / "hot")


def test_the_server_comes_from_the_environment(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESSIOND_SERVER", daemon.address)
    with Client() as client:
        assert client.get_status().phase == admin_pb2.NODE_PHASE_SERVING


def test_a_context_above_the_transports_own_limit_arrives(client: Any, session: str) -> None:
    text = "word " * 180_000
    for _ in range(6):
        client.append(session, user(text, turn_id=""), context=None)
    context = client.within(30.0).resume(session, 2_000_000, strategy="FULL")
    assert context.proto.ByteSize() > 4 * 1024**2
    assert len(context.turns) == 6


# Turn ids --------------------------------------------------------------------------------------------------------


def test_a_turn_without_an_id_is_given_one_for_good(client: Any, session: str) -> None:
    turn = turn_pb2.TurnInput(role=turn_pb2.ROLE_USER, message=turn_pb2.Message(parts=[turn_pb2.Part(text="x")]))
    assert client.append(session, turn).outcome == "APPENDED"
    assert turn.turn_id
    assert client.append(session, turn).outcome == "DUPLICATE"
    assert client.append(session, user("x")).outcome == "APPENDED"


def test_what_is_no_turn_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(TypeError, match=r"turns\[1\] is a str"):
        to_turns([user("x"), "y"])  # type: ignore[list-item]
    with pytest.raises(Invalid) as refused:
        to_turns({"role": "nobody", "content": "x"})
    assert refused.value.fields[0][0] == "turns[0].role"


def test_usage_is_read_from_each_providers_report() -> None:
    assert usage_proto(
        {"prompt_tokens": 100, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 60}}
    ) == turn_pb2.Usage(prompt_tokens=100, cached_tokens=60, output_tokens=5)
    assert usage_proto(
        {"input_tokens": 10, "cache_read_input_tokens": 60, "cache_creation_input_tokens": 30, "output_tokens": 5}
    ) == turn_pb2.Usage(prompt_tokens=100, cached_tokens=60, output_tokens=5)
    assert usage_proto({"prompt_tokens": 3, "prompt_tokens_details": None, "cost_usd_micros": 2}) == turn_pb2.Usage(
        prompt_tokens=3, cost_usd_micros=2
    )


# Part of a context -----------------------------------------------------------------------------------------------


def test_an_unmodified_context_is_the_one_before_under_a_new_receipt(client: Any, session: str) -> None:
    client.append(session, CONVERSATION)
    whole = client.resume(session, 4000)
    client.flush(session)
    short = client.resume(session, 4000, context_etag=whole.etag)
    assert short.not_modified
    assert short.proto.ByteSize() < 150
    with pytest.raises(Invalid, match="merge"):
        short.to_openai()
    merged = short.merge(whole)
    assert merged.to_openai() == CONVERSATION
    assert merged.cloud_seq == 6
    assert merged.proto.receipt.verbatim == whole.proto.receipt.verbatim
    assert merged.proto.receipt.stable_prefix == whole.proto.receipt.stable_prefix
    assert whole.merge(merged) is whole
    with pytest.raises(Invalid, match="not the one"):
        short.merge(client.resume(session, 3999))
    client.append(session, user("More"))
    assert not client.resume(session, 4000, context_etag=whole.etag).not_modified


def test_a_delta_completes_the_context_before(client: Any, session: str) -> None:
    client.append(session, CONVERSATION)
    held = client.resume(session, 4000)
    client.append(session, [user("And back?"), assistant("Sold out.")])
    delta = client.resume(session, 4000, since=held.last_position)
    assert [turn.seq for turn in delta.turns] == [7, 8]
    with pytest.raises(Invalid, match="merge"):
        delta.to_anthropic()
    whole = client.resume(session, 4000)
    assert delta.merge(held).to_openai() == whole.to_openai()
    assert list(delta.merge(held).turns) == list(whole.turns)
    with pytest.raises(Invalid, match="in neither"):
        delta.merge(Context(context_pb2.ActiveContext()))
    with pytest.raises(Invalid, match="itself only part"):
        delta.merge(delta)


def test_a_delta_leaves_out_what_a_rewind_superseded(client: Any, session: str) -> None:
    client.append(session, [user("One"), assistant("Two"), user("Three"), assistant("Four")])
    held = client.resume(session, 4000)
    client.append(session, [rewind(2), user("Three, edited")])
    delta = client.resume(session, 4000, since=held.last_position)
    assert [turn.seq for turn in delta.turns] == [6]
    assert [turn.seq for turn in delta.merge(held).turns] == [1, 2, 6]
    client.append(session, rewind(1))
    delta = client.resume(session, 4000, since=held.last_position)
    assert [turn.seq for turn in delta.merge(held).turns] == [1]


def test_the_last_turn_that_is_held_may_be_named_in_several_ways(client: Any, session: str) -> None:
    assert client.resume(session, 4000).last_position is None
    client.append(session, [user("One"), assistant("Two")])
    held = client.resume(session, 4000)
    last = held.turns[-1]
    assert held.last_position == turn_pb2.TurnPosition(epoch=last.epoch, seq=2, chain=last.chain)
    assert len(last.chain) == 16
    appended = client.append(session, user("Three"), context={"budget_tokens": 4000, "since": held.last_position})
    for since in (held.last_position, last, 2, turn_pb2.TurnPosition(epoch=last.epoch, seq=2)):
        delta = client.resume(session, 4000, since=since)
        assert (delta.delta, [turn.seq for turn in delta.turns]) == (True, [3])
        assert [turn.seq for turn in delta.merge(held).turns] == [1, 2, 3]
    assert [turn.seq for turn in appended.context.merge(held).turns] == [1, 2, 3]
    # A chain proves it whatever the epoch.
    assert client.resume(session, 4000, since=turn_pb2.TurnPosition(epoch=77, seq=2, chain=last.chain)).delta


def test_since_a_turn_that_the_log_has_not_is_the_whole_window(client: Any, session: str) -> None:
    client.append(session, [user("One"), assistant("Two"), user("Three")])
    held = client.resume(session, 4000)
    at = held.last_position
    for other in (
        turn_pb2.TurnPosition(epoch=at.epoch, seq=2, chain=at.chain),
        turn_pb2.TurnPosition(epoch=at.epoch, seq=3, chain=bytes(16)),
        turn_pb2.TurnPosition(epoch=at.epoch + 1, seq=3),
        turn_pb2.TurnPosition(epoch=at.epoch, seq=9),
    ):
        whole = client.resume(session, 4000, since=other)
        assert (whole.delta, [turn.seq for turn in whole.turns]) == (False, [1, 2, 3])
        assert whole.merge(held) is whole


def test_positions_come_with_their_chain_and_are_sent_with_it(client: Any, session: str) -> None:
    done = client.append(session, [user("One"), assistant("Two")])
    turns = list(client.list_turns(session))
    assert [placed.position.chain for placed in done.turns] == [turn.chain for turn in turns]
    context = client.resume(session, 4000, highest_acked=done)
    assert done.head.chain == context.head.chain == client.get_session(session).head.chain == turns[-1].chain
    assert context.rung == "HOT"
    assert client.resume(session, 4000, highest_acked=turns[-1]).rung == "HOT"
    other = turn_pb2.TurnPosition(epoch=done.head.epoch, seq=2, chain=bytes(16))
    assert client.resume(session, 4000, highest_acked=other).rung == "PARTIAL"


def test_what_a_request_says_of_a_position() -> None:
    calls = Client("127.0.0.1:1").calls
    at = turn_pb2.TurnPosition(epoch=3, seq=7, chain=bytes(range(16)))
    turn = turn_pb2.Turn(epoch=3, seq=7, chain=at.chain)
    result = AppendResult(session_pb2.AppendTurnResponse(head=at))
    for given, sent in ((at, at), (turn, at), (7, turn_pb2.TurnPosition(seq=7))):
        request: Any = calls.resume("s", 100, since=given, highest_acked=given).request
        assert (request.context.since, request.highest_acked) == (sent, sent)
    request = calls.resume("s", 100, highest_acked=result).request
    assert request.highest_acked == at
    assert not request.context.HasField("since")
    assert api.context_spec(100, since=turn).since == at


def test_a_delta_is_not_built_on_turns_that_may_be_other_ones_now() -> None:
    def turn(seq: int, epoch: int) -> turn_pb2.Turn:
        return turn_pb2.Turn(seq=seq, epoch=epoch, prev_live_seq=seq - 1, chain=bytes([seq]) * 16)

    def context(
        turns: list[turn_pb2.Turn],
        epoch: int,
        cloud_seq: int,
        delta: bool,
        since: turn_pb2.TurnPosition | None = None,
    ) -> Context:
        head = turn_pb2.TurnPosition(epoch=epoch, seq=turns[-1].seq)
        return Context(
            context_pb2.ActiveContext(
                turns=turns,
                delta=delta,
                window=turn_pb2.SeqRange(first_seq=1, last_seq=turns[-1].seq),
                receipt=context_pb2.Receipt(head=head, cloud_seq=cloud_seq),
            ),
            since,
        )

    provisional = context([turn(1, 1), turn(2, 1)], epoch=1, cloud_seq=1, delta=False)
    committed = context([turn(1, 1), turn(2, 1)], epoch=1, cloud_seq=2, delta=False)
    after = context([turn(3, 2)], epoch=2, cloud_seq=2, delta=True)
    with pytest.raises(Invalid, match="changed hands"):
        after.merge(provisional)
    assert [turn.seq for turn in after.merge(committed).turns] == [1, 2, 3]
    # With the chain, the delta itself is the proof that these are the same ones.
    proven = context([turn(3, 2)], epoch=2, cloud_seq=2, delta=True, since=provisional.last_position)
    assert [turn.seq for turn in proven.merge(provisional).turns] == [1, 2, 3]
    for unproven in (turn_pb2.TurnPosition(epoch=1, seq=2), turn_pb2.TurnPosition(epoch=1, seq=2, chain=b"x" * 16)):
        with pytest.raises(Invalid, match="changed hands"):
            context([turn(3, 2)], epoch=2, cloud_seq=2, delta=True, since=unproven).merge(provisional)


# Crashes ---------------------------------------------------------------------------------------------------------


class Cut:
    """A TCP relay that, once armed, lets nobody hear of the next reply: `before` its connection ends, and `after`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._armed: tuple[Callable[[], None], Callable[[], None]] | None = None
        self.done = threading.Event()
        self.done.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
        assert self.done.wait(60)
        self.done.clear()
        self._armed = before, after

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                near.close()
                continue
            self._sockets.append(far)
            threading.Thread(target=self._to_daemon, args=(near, far), daemon=True).start()
            threading.Thread(target=self._to_client, args=(far, near), daemon=True).start()

    def _to_daemon(self, near: socket.socket, far: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := near.recv(65536):
                far.sendall(data)
        self._end(near, far)

    def _to_client(self, far: socket.socket, near: socket.socket) -> None:
        """Frame by frame: 3 bytes of length, 1 of type (1 is HEADERS), 5 more, payload."""
        with contextlib.suppress(OSError):
            reader = far.makefile("rb")
            while head := reader.read(9):
                if head[3] == 1 and self._armed is not None:
                    (before, after), self._armed = self._armed, None
                    before()
                    self._end(near, far)
                    after()
                    self.done.set()
                    return
                near.sendall(head + reader.read(int.from_bytes(head[:3])))
        self._end(near, far)

    @staticmethod
    def _end(*sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def cut_daemon() -> Iterator[tuple[Daemon, Cut]]:
    with running_daemon(flush_interval_ms=NEVER_MS) as daemon:
        cut = Cut(daemon.port)
        yield daemon, cut
        assert cut.done.wait(60)
        cut.close()


def test_an_append_whose_reply_was_lost_with_the_daemon_is_applied_once(
    kind: Any, cut_daemon: tuple[Daemon, Cut]
) -> None:
    daemon, cut = cut_daemon
    with kind(cut.address, timeout_s=30.0) as client:
        session = client.create_session().session_id
        client.append(session, user("One"))
        cut.arm(daemon.kill, daemon.start)
        done = client.append(session, {"role": "assistant", "content": "Two"}, expected=(0, 1))
        assert (done.outcome, done.head.seq) == ("DUPLICATE", 2)
        cut.arm(daemon.kill, daemon.start)
        changed = client.update_session(session, metadata={"k": "v"}, etag=client.get_session(session).state.etag)
        assert changed.head.seq == 3
        cut.arm(daemon.kill, daemon.start)
        made = client.create_session(user_id="cut")
        assert [turn.seq for turn in client.list_turns(session)] == [1, 2, 3]
        assert [found.session_id for found in client.list_sessions("cut")] == [made.session_id]


def test_without_retries_a_lost_reply_is_an_error_that_says_so(kind: Any, cut_daemon: tuple[Daemon, Cut]) -> None:
    daemon, cut = cut_daemon
    with kind(cut.address, retry_s=0) as client:
        session = client.create_session().session_id
        cut.arm(daemon.kill)
        turn = user("One")
        with pytest.raises(Unavailable) as lost:
            client.append(session, turn)
        assert lost.value.reason == "SERVER_UNREACHABLE"
        assert cut.address in str(lost.value)
        daemon.start()
        assert client.within(10.0).append(session, turn).outcome == "DUPLICATE"


def test_writers_that_live_through_crashes_find_each_turn_once_and_in_order() -> None:
    with running_daemon(flush_interval_ms=20) as daemon, Client(daemon.address, timeout_s=30.0) as client:
        sessions = [client.create_session().session_id for _ in range(4)]
        progress = threading.Semaphore(0)

        def write(session: str) -> list[str]:
            sent = []
            for number in range(30):
                turn = user(f"{number}")
                client.append(session, turn)
                sent.append(turn.turn_id)
                progress.release()
            return sent

        with futures.ThreadPoolExecutor() as pool:
            writers = [pool.submit(write, session) for session in sessions]
            for _ in range(2):
                for _ in range(25):
                    assert progress.acquire(timeout=30)
                daemon.kill()
                daemon.start()
            sent = [writer.result(timeout=60) for writer in writers]
        for session, ids in zip(sessions, sent, strict=True):
            assert [turn.turn_id for turn in client.list_turns(session)] == ids


def test_turns_lost_with_the_disk_are_sent_again(kind: Any) -> None:
    with running_daemon(flush_interval_ms=NEVER_MS) as daemon, kind(daemon.address, resend=True) as client:
        session = client.create_session().session_id
        client.append(session, [user("One"), assistant("Two")])
        client.flush(session)
        client.append(session, [user("Three"), assistant("Four")])
        client.update_session(session, pins={"name": "Ada"})
        client.append(session, {"role": "user", "content": "Five"})
        before, transcript = client.resume(session, 4000), list(client.list_turns(session))
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.start()
        partial = client.resume(session, 4000)
        assert (partial.rung, partial.missing[0].first_seq) == ("PARTIAL", 3)
        assert partial.notice
        assert len(partial.turns) == 2
        whole = client.resend(session, 4000)
        assert (whole.rung, list(whole.missing), whole.notice) == ("HOT", [], "")
        assert whole.to_openai() == before.to_openai()
        assert [turn.turn_id for turn in client.list_turns(session)] == [turn.turn_id for turn in transcript]
        # Nothing is appended twice, and another client is told the same.
        assert client.resend(session, 4000).head.seq == len(transcript)
        with Client(daemon.address) as other:
            assert other.resume(session, 4000).rung == "HOT"


def test_resend_is_only_for_clients_that_keep_turns(client: Any, session: str) -> None:
    with pytest.raises(ValueError, match="resend=True"):
        client.resend(session, 4000)


def placed(turn: turn_pb2.TurnInput, seq: int, epoch: int = 1) -> tuple[turn_pb2.TurnInput, session_pb2.AppendedTurn]:
    return turn, session_pb2.AppendedTurn(position=position(seq, epoch))


def position(seq: int, epoch: int = 1) -> turn_pb2.TurnPosition:
    return turn_pb2.TurnPosition(epoch=epoch, seq=seq, chain=bytes([epoch, seq]) * 8)


def kept_ids(unconfirmed: Unconfirmed, session: str) -> list[str]:
    return [turn.turn_id for turn in unconfirmed.kept(session)[0]]


def test_what_is_kept_is_what_the_cloud_tier_lacks() -> None:
    unconfirmed = Unconfirmed()
    a, b, c = user("a", turn_id="a"), user("b", turn_id="b"), user("c", turn_id="c")
    unconfirmed.acknowledged("s", [placed(a, 1), placed(b, 2)], 1, 0, [])
    assert kept_ids(unconfirmed, "s") == ["a", "b"]
    unconfirmed.acknowledged("s", [placed(c, 3)], 1, 1, [])
    assert kept_ids(unconfirmed, "s") == ["b", "c"]
    assert unconfirmed.kept("s")[1] == position(3)
    # A new owner whose predecessor's turns may be missing: these stay, until they are back or given up.
    lost = context_pb2.MissingRange(first_seq=2, epoch=1, possible_only=True)
    d = user("d", turn_id="d")
    unconfirmed.acknowledged("s", [placed(d, 2, epoch=2)], 2, 1, [lost])
    assert kept_ids(unconfirmed, "s") == ["b", "c", "d"]
    assert unconfirmed.kept("s")[1] == position(3)
    unconfirmed.acknowledged("s", [placed(user("e", turn_id="e"), 3, epoch=2)], 2, 2, [])
    assert kept_ids(unconfirmed, "s") == ["e"]
    assert unconfirmed.kept("other") == ([], turn_pb2.TurnPosition())


def test_nothing_is_kept_beside_a_gap() -> None:
    unconfirmed = Unconfirmed()
    unconfirmed.acknowledged("s", [placed(user("a"), 1)], 1, 0, [])
    unconfirmed.acknowledged("s", [placed(user("c"), 3)], 1, 0, [])
    assert kept_ids(unconfirmed, "s") == []
    unconfirmed.acknowledged("s", [placed(user("d", turn_id="d"), 4)], 1, 3, [])
    assert kept_ids(unconfirmed, "s") == ["d"]


def test_what_is_kept_has_limits() -> None:
    few = Unconfirmed(turns_max=2)
    few.acknowledged("s", [placed(user("x"), seq) for seq in (1, 2)], 1, 0, [])
    assert len(kept_ids(few, "s")) == 2
    few.acknowledged("s", [placed(user("x"), 3)], 1, 0, [])
    assert kept_ids(few, "s") == []
    one = Unconfirmed(sessions_max=1)
    small = Unconfirmed(bytes_max=100)
    for unconfirmed in (one, small):
        unconfirmed.acknowledged("s", [placed(user("x" * 40), 1)], 1, 0, [])
        assert kept_ids(unconfirmed, "s")
        unconfirmed.acknowledged("t", [placed(user("x" * 40), 1)], 1, 0, [])
        assert not kept_ids(unconfirmed, "s")
        assert kept_ids(unconfirmed, "t")


# Refusals of a real daemon ---------------------------------------------------------------------------------------


def test_each_refusal_is_of_its_kind_with_field_figures_and_remedy(client: Any, session: str) -> None:
    client.append(session, user("One", turn_id="one"))

    def refused(kind: type[SessiondError], reason: str, call: Callable[[], object]) -> SessiondError:
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.reason == reason
        assert not isinstance(caught.value, ClientError)
        assert caught.value.remedy == REASONS[reason].remedy
        assert str(caught.value).count(caught.value.remedy) == 1
        return caught.value

    missing = refused(NotFound, "SESSION_NOT_FOUND", lambda: client.get_session("nobody"))
    assert missing.metadata == {"session_id": "nobody"}
    refused(NotFound, "SESSION_NOT_FOUND", lambda: client.resume(session, 4000, user_id="eve"))
    malformed = refused(Invalid, "INVALID_SESSION_ID", lambda: client.get_session("!"))
    assert malformed.fields[0][0] == "session_id"
    refused(Invalid, "INVALID_BUDGET", lambda: client.resume(session))
    orphan = refused(Invalid, "TOOL_RESULT_WITHOUT_CALL", lambda: client.append(session, tool_result("c", "x")))
    assert orphan.fields[0][0].startswith("turns[0]")
    mismatch = refused(Conflict, "EXPECTED_MISMATCH", lambda: client.append(session, user("x"), expected=(1, 9)))
    assert mismatch.metadata["head_seq"] == "1"
    refused(Conflict, "TURN_ID_REUSED", lambda: client.append(session, user("Other", turn_id="one")))
    full = {str(n): "word " * 400 for n in range(8)}
    refused(Exhausted, "PINS_FULL", lambda: client.update_session(session, pins=full))
    refused(Unimplemented, "NOT_SERVED_YET", lambda: client.resume(session, 4000, strategy="SUMMARY"))
    assert [turn.turn_id for turn in client.list_turns(session)] == ["one"]


def test_an_unknown_name_of_an_enum_is_refused_with_those_that_there_are(client: Any, session: str) -> None:
    with pytest.raises(Invalid, match="none of FULL, LAST_N, SUMMARY, HYBRID, RECALL"):
        client.resume(session, 4000, strategy="EVERYTHING")
    with pytest.raises(Invalid, match="policy"):
        client.create_session(policy={"budget": 3})
    with pytest.raises(Invalid, match="budget_tokens"):
        client.resume(session, -1)


def test_a_number_that_its_field_does_not_take_is_refused_with_the_fields_name(client: Any, session: str) -> None:
    for field, call in (
        ("seq", lambda: client.fork_session(session, seq=-1)),
        ("checkpoint_version", lambda: client.fork_session(session, checkpoint_version=2**64)),
        ("after.seq", lambda: client.watch(session, after=-1)),
        ("after.epoch", lambda: client.watch(session, after=(2**32, 1))),
        ("highest_acked.seq", lambda: client.resume(session, 4000, highest_acked=-1)),
        ("accept_missing", lambda: client.resume(session, 4000, accept_missing=-1)),
        ("last_seq", lambda: client.list_turns_page(session, last_seq=-1)),
        ("expected_version", lambda: client.put_state("k", b"", session_id=session, expected_version=-1)),
    ):
        with pytest.raises(Invalid) as refused:
            call()
        assert refused.value.fields[0][0] == field


def test_a_damaged_manifest_is_corrupt_and_a_draining_node_unavailable(kind: Any) -> None:
    with running_daemon(flush_interval_ms=20) as daemon, kind(daemon.address) as client:
        sessions = [client.create_session(user_id="ada").session_id for _ in range(2)]
        for session in sessions:
            client.append(session, user("x"), durability="CLOUD")
        daemon.terminate()
        daemon.lose_hot_tier()
        manifests = sorted((daemon.data_dir / "cloud").glob("**/m/**/*"))
        damaged = next(path for path in manifests if path.is_file() and sessions[0].encode() in path.read_bytes())
        content = damaged.read_bytes()
        damaged.write_bytes(content[:-20] + bytes(byte ^ 0xFF for byte in content[-20:]))
        daemon.start()
        with pytest.raises(Corrupt) as corrupt:
            client.resume(sessions[0], 4000)
        assert corrupt.value.reason.startswith("CORRUPT_")
        assert client.resume(sessions[1], 4000).rung == "CLOUD"
        assert [found.session_id for found in client.list_sessions_page("ada").sessions] == [sessions[1]]
        with pytest.raises(Corrupt, match="can't be read"):
            list(client.list_sessions("ada"))
        progress = list(client.drain(grace_ms=5000))
        assert progress[-1].done
        with pytest.raises(Unavailable) as draining:
            client.within(5.0, 0.0).append(sessions[1], user("y"))
        assert draining.value.reason == "NODE_DRAINING"
        assert draining.value.retry_after_ms == 1000


def test_a_server_that_is_not_there_is_unavailable_and_named(kind: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    with kind(address, timeout_s=1.0) as client:
        for call in (client.get_status, lambda: list(client.drain())):
            with pytest.raises(Unavailable, match=address) as refused:
                call()
            assert refused.value.reason == "SERVER_UNREACHABLE"


# What no daemon says today ---------------------------------------------------------------------------------------


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("code", "kind_of"),
    [
        ("INVALID_ARGUMENT", Invalid),
        ("OUT_OF_RANGE", Invalid),
        ("NOT_FOUND", NotFound),
        ("ALREADY_EXISTS", Conflict),
        ("ABORTED", Conflict),
        ("DATA_LOSS", Corrupt),
        ("INTERNAL", Corrupt),
        ("UNKNOWN", Corrupt),
        ("RESOURCE_EXHAUSTED", Exhausted),
        ("PERMISSION_DENIED", Denied),
        ("UNAUTHENTICATED", Denied),
        ("FAILED_PRECONDITION", Denied),
        ("UNIMPLEMENTED", Unimplemented),
        ("CANCELLED", Unavailable),
        ("DEADLINE_EXCEEDED", Unavailable),
    ],
)
def test_a_reason_of_a_newer_daemon_is_an_error_of_its_statuss_kind_and_never_tried_again(
    kind: Any, scripted: Scripted, code: str, kind_of: type[SessiondError]
) -> None:
    scripted.script = [refuse(grpc.StatusCode[code], "BRAND_NEW"), refuse(grpc.StatusCode[code])]
    with kind(scripted.address) as client:
        with pytest.raises(kind_of) as foreign:
            client.append("s", user("x"))
        assert isinstance(foreign.value, ClientError)
        assert (foreign.value.status, foreign.value.reason) == (code, "BRAND_NEW")
        assert (foreign.value.message, foreign.value.remedy) == ("It is so.", "Do it.")
        assert str(foreign.value) == "It is so. Do it."
        # Without details, as a proxy refuses. A node that ends cancels what it was doing: that is tried again.
        if code != "CANCELLED":
            with pytest.raises(kind_of):
                client.append("s", user("x"))
    assert len(scripted.requests) == (1 if code == "CANCELLED" else 2)


def test_a_reason_that_no_call_gives_yet_is_of_its_kind(kind: Any, scripted: Scripted) -> None:
    scripted.script = [refuse(grpc.StatusCode.FAILED_PRECONDITION, "SESSION_ARCHIVED")]
    with kind(scripted.address) as client, pytest.raises(Denied) as denied:
        client.append("s", user("x"))
    assert not isinstance(denied.value, ClientError)
    assert denied.value.reason == "SESSION_ARCHIVED"


def test_only_what_says_that_waiting_helps_is_tried_again_and_not_before(kind: Any, scripted: Scripted) -> None:
    scripted.script = [
        refuse(grpc.StatusCode.UNAVAILABLE, "NODE_STARTING", 300),
        refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 200),
        refuse(grpc.StatusCode.UNAVAILABLE),
        accept,
    ]
    with kind(scripted.address) as client:
        assert client.append("s", {"role": "user", "content": "x"}).outcome == "APPENDED"
    times = [at for at, _, _ in scripted.requests]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[0] >= 0.3
    assert gaps[1] >= 0.2
    assert sum(gaps) < 8
    # Byte for byte the same: the turn_id was minted once.
    assert len({request for _, request, _ in scripted.requests}) == 1
    assert all(metadata["x-session-id"] == "s" for _, _, metadata in scripted.requests)


def test_a_call_that_a_server_gave_up_is_tried_again(kind: Any, scripted: Scripted) -> None:
    scripted.script = [refuse(grpc.StatusCode.CANCELLED), accept]
    with kind(scripted.address) as client:
        assert client.append("s", user("x")).outcome == "APPENDED"
    assert len({request for _, request, _ in scripted.requests}) == 1
    assert len(scripted.requests) == 2


def test_a_call_that_is_under_way_when_its_client_is_closed_is_not_tried_again(scripted: Scripted) -> None:
    begun = threading.Event()

    def hang(context: grpc.ServicerContext) -> bytes:
        begun.set()
        scripted.release.wait(30)
        return b""

    scripted.script = [hang]
    client = Client(scripted.address)
    with futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.append, "s", user("x"))
        assert begun.wait(20)
        client.close()
        with pytest.raises(Unavailable) as cancelled:
            call.result(20)
        scripted.release.set()
    assert cancelled.value.reason == "CANCELLED"
    assert len(scripted.requests) == 1
    with pytest.raises(ValueError, match="closed"):
        client.append("s", user("x"))


def test_a_repeat_that_would_come_too_late_is_not_waited_for(kind: Any, scripted: Scripted) -> None:
    scripted.script = [refuse(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", 60_000)] * 2
    with kind(scripted.address) as client:
        started = time.monotonic()
        with pytest.raises(Unavailable) as late:
            client.append("s", user("x"))
        assert time.monotonic() - started < 8
        assert (late.value.reason, late.value.retry_after_ms) == ("STORE_UNAVAILABLE", 60_000)
        with pytest.raises(Unavailable):
            client.within(100.0, 1.0).append("s", user("x"))
        assert time.monotonic() - started < 30
    assert len(scripted.requests) == 2


def test_a_call_ends_at_its_deadline_and_says_what_it_had_heard(kind: Any, scripted: Scripted) -> None:
    def hang(context: grpc.ServicerContext) -> bytes:
        scripted.release.wait(30)
        return b""

    scripted.script = [hang, refuse(grpc.StatusCode.UNAVAILABLE, "NODE_STARTING", 10), hang]
    with kind(scripted.address, timeout_s=0.5) as client:
        started = time.monotonic()
        with pytest.raises(Unavailable, match="not known") as late:
            client.append("s", user("x"))
        assert late.value.reason == "DEADLINE_TOO_SHORT"
        assert 0.4 < time.monotonic() - started < 10
        with pytest.raises(Unavailable) as late:
            client.append("s", user("x"))
        assert late.value.reason == "NODE_STARTING"
        assert time.monotonic() - started < 20


# docs/clients.md -------------------------------------------------------------------------------------------------


def test_the_examples_of_the_guide_run_one_after_the_other(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SESSIOND_SERVER", daemon.address)
    guide = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", guide, re.DOTALL | re.MULTILINE)
    namespace: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, "docs/clients.md", "exec"), namespace)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("HOT ")
    assert "What is my name?" in said[1]
    assert said[2].startswith("4 ")
    assert said[3] == "[1, 2, 3, 4]"
    assert said[4:7] == ["[{'role': 'user', 'content': 'Hello'}]"] * 3
    assert said[7].startswith("There is no session 'no-such-session'.")
    assert said[8].startswith("SESSION_NOT_FOUND {'session_id': 'no-such-session'}")
    assert said[9] == "Lisbon, Porto"


# sessiond.testing ------------------------------------------------------------------------------------------------


def test_the_fixture_gives_a_daemon_of_the_tests_own(sessiond_daemon: Daemon) -> None:
    with Client(sessiond_daemon.address) as client:
        assert client.get_status().hot.sessions == 0
    assert '"serving"' in sessiond_daemon.log()


def test_a_daemon_keeps_data_and_address_over_every_way_to_stop(tmp_path: Path) -> None:
    with running_daemon(tmp_path / "kept", node_name="n1", flush_interval_ms=NEVER_MS) as daemon:
        address, pids = daemon.address, [daemon.pid]
        with Client(address) as client:
            session = client.create_session().session_id
            client.append(session, user("x"))
            daemon.kill()
            with pytest.raises(RuntimeError, match="stopped"):
                _ = daemon.pid
            daemon.start()
            with pytest.raises(RuntimeError, match="Stop the daemon"):
                daemon.lose_hot_tier()
            with pytest.raises(RuntimeError, match="running already"):
                daemon.start()
            pids.append(daemon.pid)
            daemon.restart()
            pids.append(daemon.pid)
            assert len(set(pids)) == 3
            assert daemon.address == address
            assert client.get_status().node == "n1"
            assert len(list(client.list_turns(session))) == 1
            assert daemon.terminate() == 0
    assert (tmp_path / "kept" / "hot").exists()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_daemon_that_can_not_start_says_why_and_leaves_nothing(daemon: Daemon) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"port": daemon.port}, "PORT_IN_USE"),
        ({"cloud": "s4://x"}, "INVALID_CONFIG"),
        ({"map_size_bytes": 1}, "INVALID_CONFIG"),
    ]
    for settings, reason in cases:
        with pytest.raises(StartFailed) as failed, running_daemon(**settings):
            pass
        assert failed.value.exit_code not in (None, 0)
        assert failed.value.reason == reason
        assert reason in str(failed.value)
    with Client(daemon.address) as client:
        assert client.get_status().hot.path == str(daemon.data_dir / "hot")


def test_a_daemon_goes_with_the_block_that_failed() -> None:
    with contextlib.suppress(ZeroDivisionError), running_daemon() as daemon:
        pid = daemon.pid
        raise ZeroDivisionError
    assert not Path(f"/proc/{pid}").exists()
    assert not daemon.data_dir.exists()


def test_the_client_and_testing_work_without_the_daemons_libraries() -> None:
    program = "import json, sys\nimport sessiond.client, sessiond.testing\nprint(json.dumps(sorted(sys.modules)))\n"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, env=os.environ)
    modules = set(json.loads(out.stdout))
    assert not modules & {"lmdb", "boto3", "tiktoken", "msgpack", "msgspec", "structlog", "pytest", "sessiond.core"}
