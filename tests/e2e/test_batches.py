"""BatchResumeSessions and BatchAppendTurns over the port: every item as the single call, and none spoils another."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from sessiond import config
from sessiond.testing import Daemon, running_daemon
from sessiond.transport.wire import embed
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests.e2e.test_watch import Watch
from tests.fault.world import until
from tests.wire import Refusal, Wire, assistant, message, refusal, user

# Nothing is flushed on its own within a test, so that a reply is the same from one call to the next.
NEVER_MS = 3_600_000
MIB = 1024**2
RETRYABLE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


@pytest.fixture(scope="module", params=[0, 2], ids=["one-process", "workers"])
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    settings = {"flush_interval_ms": NEVER_MS, "flush_waiting_ms": NEVER_MS, "workers": request.param}
    with running_daemon(**settings) as running:
        yield running


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    made = Wire(daemon.address)
    yield made
    made.close()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A session id of the test's own, and the beginning of others."""
    return f"batch-{request.node.originalname.removeprefix('test_')[:64]}"


def asked(session: str, budget_tokens: int = 4000, **fields: Any) -> session_pb2.ResumeSessionRequest:
    spec = context_pb2.ContextSpec(budget_tokens=budget_tokens)
    return session_pb2.ResumeSessionRequest(session_id=session, context=spec, **fields)


def given(session: str, *turns: turn_pb2.TurnInput, **fields: Any) -> session_pb2.AppendTurnRequest:
    return session_pb2.AppendTurnRequest(session_id=session, turns=turns, **fields)


def resume(wire: Wire, *requests: Message, timeout: float = 60) -> list[session_pb2.BatchResumeSessionsItem]:
    batch = session_pb2.BatchResumeSessionsRequest(requests=requests)
    return list(wire.sessions.BatchResumeSessions(batch, timeout=timeout).items)


def append(wire: Wire, *requests: Message, timeout: float = 60) -> list[session_pb2.BatchAppendTurnsItem]:
    batch = session_pb2.BatchAppendTurnsRequest(requests=requests)
    return list(wire.sessions.BatchAppendTurns(batch, timeout=timeout).items)


def raw(wire: Wire, method: str) -> Any:
    return wire.channel.unary_unary(f"/sessiond.v1.SessionService/{method}")


def check_same(item: session_pb2.ItemError, single: Refusal) -> None:
    """The item is refused in every word as the single call was."""
    assert (item.code, item.reason, item.message) == (single.code.value[0], single.reason, single.message)
    assert dict(item.metadata) == single.metadata
    assert item.retry_after_ms == single.retry_ms


def talk(wire: Wire, session: str, turns: int = 6) -> None:
    wire.create(session)
    said = [(assistant if n % 2 else user)(f"t{n}", f"turn {n} " + "word " * 20) for n in range(turns)]
    wire.append(session, *said)


# Items ---------------------------------------------------------------------------------------------------------------


def test_each_resume_has_the_outcome_of_a_single_call(wire: Wire, name: str) -> None:
    talk(wire, f"{name}-a")
    talk(wire, f"{name}-b", 2)
    wire.create(f"{name}-ada", user_id="ada")
    spec = {"budget_tokens": 500, "strategy": turn_pb2.STRATEGY_SUMMARY}
    requests = [
        asked(f"{name}-a"),
        asked("never-made"),
        asked(f"{name}-b", 1000),
        asked(""),
        asked(f"{name}-a", 5),
        asked(f"{name}-ada", user_id="bob"),
        session_pb2.ResumeSessionRequest(session_id=f"{name}-a", context=context_pb2.ContextSpec(**spec)),
        asked(f"{name}-ada", user_id="ada"),
        # The same session again is one more item.
        asked(f"{name}-a"),
    ]
    items = resume(wire, *requests)
    refused = [place for place, item in enumerate(items) if item.HasField("error")]
    assert refused == [1, 3, 4, 5, 6]
    for place, request in enumerate(requests):
        if place in refused:
            assert not items[place].HasField("context")
            check_same(items[place].error, refusal(wire.sessions.ResumeSession, request, timeout=30))
        else:
            single = wire.sessions.ResumeSession(request, timeout=30)
            assert items[place].context.receipt.rung == context_pb2.RUNG_HOT
            assert items[place].context == single.context
    assert [items[place].error.reason for place in refused] == [
        "SESSION_NOT_FOUND",
        "INVALID_SESSION_ID",
        "BUDGET_TOO_SMALL",
        "SESSION_NOT_FOUND",
        "NOT_SERVED_YET",
    ]


def test_a_reply_is_the_very_bytes_of_single_calls_put_together(wire: Wire, name: str) -> None:
    sessions = [f"{name}-{n}" for n in range(5)]
    for count, session in enumerate(sessions):
        talk(wire, session, 2 * count + 2)
    requests = [asked(session).SerializeToString() for session in sessions]
    singles = [raw(wire, "ResumeSession")(request, timeout=30) for request in requests]
    batched = raw(wire, "BatchResumeSessions")(b"".join(embed(1, request) for request in requests), timeout=30)
    assert batched == b"".join(embed(1, single) for single in singles)
    # What was appended before is answered as it was the first time.
    requests = [given(session, user("t0", "turn 0 " + "word " * 20)).SerializeToString() for session in sessions]
    singles = [raw(wire, "AppendTurn")(request, timeout=30) for request in requests]
    batched = raw(wire, "BatchAppendTurns")(b"".join(embed(1, request) for request in requests), timeout=30)
    assert batched == b"".join(embed(1, embed(1, single)) for single in singles)


def test_each_append_has_the_outcome_of_a_single_call(wire: Wire, name: str) -> None:
    for part in "abcde":
        talk(wire, f"{name}-{part}", 2)
    tail = {"conflict_mode": session_pb2.CONFLICT_MODE_RETURN_TAIL}
    stale = turn_pb2.TurnPosition(seq=1)
    requests = [
        given(f"{name}-a", user("new", "one more")),
        given("never-made", user("new", "one more")),
        given(f"{name}-b", user("t0", "other words")),
        given(f"{name}-b", user("after-a-refusal", "one more")),
        given(f"{name}-c", user("new", "one more"), expected=stale),
        given(f"{name}-c", user("new", "one more"), expected=stale, **tail),
        given(f"{name}-d", turn_pb2.TurnInput(turn_id="new", role=turn_pb2.ROLE_USER)),
        given(f"{name}-d", message("new", turn_pb2.ROLE_UNSPECIFIED, "x")),
        given(f"{name}-d"),
        given(f"{name}-e", user("new", "one more"), context=context_pb2.ContextSpec(budget_tokens=500)),
    ]
    items = append(wire, *requests)
    reasons = [item.error.reason for item in items]
    assert reasons == [
        *("", "SESSION_NOT_FOUND", "TURN_ID_REUSED", "", "EXPECTED_MISMATCH", ""),
        *("EMPTY_TURN", "INVALID_TURN", "NO_TURNS", ""),
    ]
    for request, item in zip(requests, items, strict=True):
        if item.HasField("error"):
            assert not item.HasField("response")
            check_same(item.error, refusal(wire.sessions.AppendTurn, request, timeout=30))
    assert items[5].response.outcome == session_pb2.APPEND_OUTCOME_CONFLICT
    assert [turn.seq for turn in items[5].response.conflict.turns] == [2]
    assert items[9].response.context == wire.resume(f"{name}-e", 500)
    for place in (0, 3, 9):
        assert items[place].response.outcome == session_pb2.APPEND_OUTCOME_APPENDED
        assert items[place].response.head.seq == 3
    for part, last in zip("abcde", ("new", "after-a-refusal", "t1", "t1", "new"), strict=True):
        assert list(wire.turns(f"{name}-{part}"))[-1].turn_id == last


def test_an_item_of_other_bytes_is_refused_alone(wire: Wire, name: str) -> None:
    talk(wire, name)
    good = asked(name).SerializeToString()
    not_text = session_pb2.ResumeSessionRequest(session_id=name, user_id="ada").SerializeToString()
    not_text = not_text.replace(b"ada", b"\xff\xfe\xfd")
    sent = b"".join(embed(1, item) for item in (good, b"\xff\xff\xff", not_text, good))
    reply = raw(wire, "BatchResumeSessions")(sent, timeout=30)
    items = session_pb2.BatchResumeSessionsResponse.FromString(reply).items
    assert [item.error.reason for item in items] == ["", "MALFORMED_REQUEST", "INVALID_UTF8", ""]
    check_same(items[1].error, refusal(raw(wire, "ResumeSession"), b"\xff\xff\xff", timeout=30))
    check_same(items[2].error, refusal(raw(wire, "ResumeSession"), not_text, timeout=30))
    assert items[0].context == items[3].context == wire.resume(name)
    broken = embed(1, given(name, user("new", "x")).SerializeToString()[:-1] + b"\xff")
    fine = embed(1, given(name, user("fine", "x")).SerializeToString())
    reply = raw(wire, "BatchAppendTurns")(broken + fine, timeout=30)
    items = session_pb2.BatchAppendTurnsResponse.FromString(reply).items
    assert [item.error.reason for item in items] == ["INVALID_UTF8", ""]
    assert [turn.turn_id for turn in wire.turns(name)][-2:] == ["t5", "fine"]


def test_fields_that_this_release_does_not_know_are_passed_over(wire: Wire, name: str) -> None:
    talk(wire, name)
    item = embed(1, asked(name).SerializeToString())
    # A varint, a text, 4 bytes, 8 bytes, and a group: fields 9 to 13.
    unknown = b"\x48\x96\x01" + embed(10, b"later") + b"\x5d1234" + b"\x6112345678"
    for sent in (unknown + item + unknown, item + b"\x6b\x08\x01\x6c"):
        reply = raw(wire, "BatchResumeSessions")(sent, timeout=30)
        items = session_pb2.BatchResumeSessionsResponse.FromString(reply).items
        assert [found.context.window.last_seq for found in items] == [6]


# Order, repeats ------------------------------------------------------------------------------------------------------


def test_appends_to_one_session_keep_their_order_whatever_each_takes(wire: Wire, name: str) -> None:
    sessions = [f"{name}-{n}" for n in range(3)]
    for session in sessions:
        wire.create(session)
    # Large ones are counted on a thread of their own, small ones at once: unordered, these would come first.
    texts = ["word " * (3000 if n % 3 == 0 else 1) for n in range(24)]
    requests = [given(session, user(f"o{n}", text)) for n, text in enumerate(texts) for session in sessions]
    items = append(wire, *requests)
    assert all(item.response.outcome == session_pb2.APPEND_OUTCOME_APPENDED for item in items)
    for number, session in enumerate(sessions):
        own = items[number :: len(sessions)]
        assert [item.response.head.seq for item in own] == list(range(1, 25))
        assert [turn.turn_id for turn in wire.turns(session)] == [f"o{n}" for n in range(24)]


def test_a_repeated_batch_is_applied_once(wire: Wire, name: str) -> None:
    sessions = [f"{name}-{n}" for n in range(20)]
    for session in sessions:
        wire.create(session)
    requests = [given(session, user("once", "x"), assistant("twice", "y")) for session in sessions]
    first, second = append(wire, *requests), append(wire, *requests, *requests)
    for place, item in enumerate(second):
        assert item.response.outcome == session_pb2.APPEND_OUTCOME_DUPLICATE
        was = first[place % len(sessions)].response
        assert [turn.position for turn in item.response.turns] == [turn.position for turn in was.turns]
    for session in sessions:
        assert [turn.turn_id for turn in wire.turns(session)] == ["once", "twice"]


def test_appends_of_a_batch_share_commits(wire: Wire, name: str) -> None:
    sessions = [f"{name}-{n}" for n in range(64)]
    for session in sessions:
        wire.create(session)
    before = wire.admin.GetStatus(admin_pb2.GetStatusRequest()).group_commit.commits
    append(wire, *(given(session, user("t", "x")) for session in sessions))
    commits = wire.admin.GetStatus(admin_pb2.GetStatusRequest()).group_commit.commits - before
    assert commits <= 32


def test_a_watcher_hears_of_every_turn_of_a_batch(wire: Wire, name: str) -> None:
    for part in "ab":
        talk(wire, f"{name}-{part}", 2)
    watches = [Watch(wire, f"{name}-{part}") for part in "ab"]
    for watch in watches:
        watch.next()
    append(wire, *(given(f"{name}-{part}", user(f"n{n}", "x")) for n in range(5) for part in "ab"))
    for watch in watches:
        watch.until(lambda event: event.head.seq == 7)
        assert [turn.turn_id for turn in watch.log] == [f"n{n}" for n in range(5)]
        watch.stream.cancel()


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_counted_beside_their_calls(name: str, workers: int) -> None:
    with running_daemon(workers=workers) as daemon:
        wire = Wire(daemon.address)

        def counts() -> dict[tuple[str, str, str], int]:
            rows = wire.admin.GetStatus(admin_pb2.GetStatusRequest()).calls
            return {(row.method, row.status, row.reason): row.count for row in rows if row.method.startswith("Batch")}

        talk(wire, name)
        resume(wire, asked(name), asked(name), asked("never-made"))
        resume(wire, asked(name), asked(name))
        expected = {
            ("BatchResumeSessions", "OK", ""): 2,
            ("BatchResumeSessions/item", "OK", ""): 4,
            ("BatchResumeSessions/item", "NOT_FOUND", "SESSION_NOT_FOUND"): 1,
        }
        # A worker tells what it answered a moment later.
        until(lambda: counts() == expected, f"the items are counted, not {counts()}")
        wire.close()


# Limits --------------------------------------------------------------------------------------------------------------


def test_a_batch_has_1_to_256_items(wire: Wire, name: str) -> None:
    talk(wire, name)
    for call, request in ((resume, asked(name, 60)), (append, given(name, user("many", "x")))):
        for count in (0, 257):
            found = refusal(call, wire, *[request] * count)
            assert (found.reason, found.fields) == ("INVALID_BATCH", ["requests"])
            assert (found.metadata["count"], found.metadata["limit"]) == (str(count), "256")
        assert "1 to 256" in found.metadata["remedy"]
    assert [turn.turn_id for turn in wire.turns(name)][-1] == "t5"
    assert all(item.HasField("context") for item in resume(wire, *[asked(name, 500)] * 256))
    items = append(wire, *[given(name, user("many", "x"))] * 256)
    assert [item.response.outcome for item in items] == [session_pb2.APPEND_OUTCOME_APPENDED] + [
        session_pb2.APPEND_OUTCOME_DUPLICATE
    ] * 255


def test_a_batch_of_too_many_bytes_is_refused_as_a_whole(name: str) -> None:
    with running_daemon(request_bytes_max=65536, turn_bytes_max=65536) as daemon:
        wire = Wire(daemon.address)
        talk(wire, name, 2)
        largest = given(name, user("large", ""))
        largest.turns[0].message.parts[0].text = "x" * (65536 - largest.ByteSize() - 12)
        found = refusal(append, wire, given(name, user("small", "x")), largest)
        assert (found.reason, found.fields) == ("REQUEST_TOO_LARGE", ["requests"])
        assert found.metadata["limit_bytes"] == "65536"
        assert int(found.metadata["size_bytes"]) > 65536
        assert "fewer requests" in found.metadata["remedy"]
        assert [turn.turn_id for turn in wire.turns(name)] == ["t0", "t1"]
        # In two calls both go through.
        assert append(wire, given(name, user("small", "x")))[0].response.head.seq == 3
        assert append(wire, largest)[0].response.head.seq == 4
        wire.close()


def large(wire: Wire, session: str, size_mib: int) -> None:
    wire.create(session)
    for n in range(size_mib):
        turn = user(f"l{n}", "x" * (MIB - 1000))
        for encoding in (turn_pb2.ENCODING_O200K_BASE, turn_pb2.ENCODING_CL100K_BASE):
            turn.supplied_tokens.add(encoding=encoding, tokens=1000)
        wire.append(session, turn)


def test_replies_beyond_32_mib_are_left_out_and_said_so(wire: Wire, name: str) -> None:
    large(wire, name, 7)
    talk(wire, f"{name}-small")
    items = resume(wire, *[asked(name, 100_000)] * 6, asked(f"{name}-small"))
    assert [item.error.reason for item in items] == [""] * 4 + ["BATCH_REPLY_FULL"] * 3
    assert all(item.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0] for item in items[4:])
    assert items[3].context.tokens.tail == 7000
    # An append is made whatever room there is for the context that results.
    spec = context_pb2.ContextSpec(budget_tokens=100_000)
    items = append(wire, *(given(name, user(f"n{n}", "x"), context=spec) for n in range(6)))
    assert [item.response.outcome for item in items] == [session_pb2.APPEND_OUTCOME_APPENDED] * 6
    assert [item.response.context_error.reason for item in items] == [""] * 4 + ["BATCH_REPLY_FULL"] * 2
    assert [item.response.HasField("context") for item in items] == [True] * 4 + [False] * 2
    assert [turn.turn_id for turn in wire.turns(name)][-6:] == [f"n{n}" for n in range(6)]


def test_conflicts_beyond_32_mib_keep_their_heads(wire: Wire, name: str) -> None:
    large(wire, name, 1)
    tail = {"conflict_mode": session_pb2.CONFLICT_MODE_RETURN_TAIL, "expected": turn_pb2.TurnPosition(seq=0)}
    items = append(wire, *[given(name, user("new", "x"), **tail)] * 40)
    told = [item.response.conflict for item in items]
    assert all(conflict.head.seq == 1 for conflict in told)
    assert [len(conflict.turns) for conflict in told] == [1] * 32 + [0] * 8
    assert [conflict.truncated for conflict in told] == [False] * 32 + [True] * 8


@pytest.mark.parametrize("calls_max", [1, 8])
def test_items_take_the_places_of_calls_that_are_free_and_give_them_back(name: str, calls_max: int) -> None:
    with running_daemon(concurrent_calls_max=calls_max) as daemon:
        wire = Wire(daemon.address)
        sessions = [f"{name}-{n}" for n in range(8)]
        for session in sessions:
            wire.create(session)
        for n in range(3):
            items = append(wire, *(given(session, user(f"t{n}", "x")) for session in sessions))
            assert [item.response.head.seq for item in items] == [n + 1] * 8
            assert all(item.HasField("context") for item in resume(wire, *map(asked, sessions)))
        assert wire.resume(sessions[0]).window.last_seq == 3
        # Each waits for its flush, so that all of them are under way at the same time.
        cloud = {"durability": turn_pb2.DURABILITY_CLOUD}
        slow = [
            wire.sessions.AppendTurn.future(given(session, user("slow", "x"), **cloud), timeout=60)
            for session in sessions[:calls_max]
        ]
        assert [call.result().head.seq for call in slow] == [4] * calls_max
        wire.close()


# Cold, draining, killed ----------------------------------------------------------------------------------------------


def test_sessions_that_are_cold_are_resumed_beside_hot_ones(tmp_path: Path, name: str) -> None:
    with running_daemon(tmp_path, flush_interval_ms=20) as daemon:
        wire = Wire(daemon.address)
        sessions = [f"{name}-{n}" for n in range(12)]
        for session in sessions:
            talk(wire, session)
        released = wire.admin.Release(admin_pb2.ReleaseRequest(session_ids=sessions[::2]), timeout=60)
        assert released.released_sessions == 6
        items = resume(wire, *map(asked, sessions), *map(asked, sessions))
        rungs = [item.context.receipt.rung for item in items[:12]]
        assert rungs == [context_pb2.RUNG_CLOUD, context_pb2.RUNG_HOT] * 6
        texts = [[turn.turn_id for turn in item.context.turns] for item in items]
        assert texts == [[f"t{n}" for n in range(6)]] * 24
        wire.close()


def test_a_node_that_drained_refuses_items_as_it_refuses_calls(name: str) -> None:
    with running_daemon(flush_interval_ms=20) as daemon:
        wire = Wire(daemon.address)
        talk(wire, name)
        assert list(wire.admin.Drain(admin_pb2.DrainRequest(), timeout=60))[-1].done
        items = resume(wire, asked(name, read_only=True), asked("never-made"))
        assert items[0].context.receipt.rung == context_pb2.RUNG_CLOUD
        check_same(items[1].error, refusal(wire.resume, "never-made"))
        items = append(wire, given(name, user("new", "x")), given("never-made", user("new", "x")))
        assert [item.error.reason for item in items] == ["NODE_DRAINING", "SESSION_NOT_FOUND"]
        check_same(items[0].error, refusal(wire.append, name, user("new", "x")))
        wire.close()


class Writer:
    """Sends batches, each again until it is answered, and keeps what was acknowledged."""

    def __init__(self, address: str, sessions: list[str], seed: int) -> None:
        self.wire = Wire(address)
        self.rng = random.Random(seed)
        self.seed = seed
        self.sessions = sessions
        self.stop = threading.Event()
        self.changed = threading.Condition()
        self.batches = 0
        self.acked: dict[str, list[tuple[int, str]]] = {session: [] for session in sessions}
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            number = 0
            while not self.stop.is_set():
                number += 1
                requests = []
                for session in self.rng.sample(self.sessions, 16):
                    for part in range(self.rng.choice((1, 1, 2, 3))):
                        key = f"w{self.seed}-{number}-{part}"
                        text = "word " * self.rng.choice((1, 30, 1500))
                        requests.append(given(session, user(key, text), assistant(f"{key}a", text)))
                if not self._send(requests):
                    return
        except BaseException as error:
            self.failure = error
        finally:
            with self.changed:
                self.changed.notify_all()
            self.wire.close()

    def _send(self, requests: list[session_pb2.AppendTurnRequest]) -> bool:
        while requests:
            if self.stop.is_set():
                return False
            try:
                items = append(self.wire, *requests)
            except grpc.RpcError as error:
                if error.code() not in RETRYABLE:
                    raise
                self.stop.wait(0.01)
                continue
            left = []
            for request, item in zip(requests, items, strict=True):
                if item.HasField("error"):
                    assert item.error.code == grpc.StatusCode.UNAVAILABLE.value[0], item.error
                    left.append(request)
                    continue
                for turn in item.response.turns:
                    self.acked[request.session_id].append((turn.position.seq, turn.turn_id))
            requests = left
            with self.changed:
                self.batches += 1
                self.changed.notify_all()
        return True


def test_no_turn_of_a_batch_is_lost_or_doubled_by_sigkills(tmp_path: Path, name: str) -> None:
    rng = random.Random(5)
    sessions = [f"{name}-{n}" for n in range(24)]
    with running_daemon(tmp_path, flush_interval_ms=50) as daemon:
        wire = Wire(daemon.address)
        for session in sessions:
            wire.create(session)
        writers = [Writer(daemon.address, sessions, seed) for seed in range(3)]
        threads = [threading.Thread(target=writer.run) for writer in writers]
        for thread in threads:
            thread.start()
        try:
            for _ in range(6):
                writer = rng.choice(writers)
                with writer.changed:
                    due = writer.batches + rng.randrange(1, 4)
                    assert writer.changed.wait_for(
                        lambda writer=writer, due=due: writer.batches >= due or writer.failure, 60
                    )
                # In the middle of whatever batch is on its way.
                daemon.kill()
                daemon.start()
        finally:
            for writer in writers:
                writer.stop.set()
            for thread in threads:
                thread.join(60)
        assert [writer.failure for writer in writers] == [None] * 3
        assert sum(len(acked) for writer in writers for acked in writer.acked.values()) > 300
        wire.close()
        wire = Wire(daemon.address)
        for session in sessions:
            log = {turn.turn_id: turn.seq for turn in wire.turns(session)}
            assert sorted(log.values()) == list(range(1, len(log) + 1)), "a turn stands twice, or one is missing"
            for writer in writers:
                assert all(log.get(turn_id) == seq for seq, turn_id in writer.acked[session])
        assert daemon.terminate() == 0
        wire.close()
        settings = config.load(None, {}, {"data_dir": str(tmp_path)})
        assert verify(settings, lambda *_: None) == []
