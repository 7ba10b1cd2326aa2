"""The degradation ladder on one node: released sessions come back whole, lost ones say what may be missing."""

from __future__ import annotations

import shutil
import time

import grpc
import pytest

from sessiond import config
from sessiond.core import envelope
from sessiond.testing import Daemon, running_daemon
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, turn_pb2
from sessiond.verify import verify
from tests import airline
from tests.airline import needs_airline
from tests.wire import CLOUD, HOT, PARTIAL, Refusal, Wire, assistant, refusal, user

# Nothing is flushed on its own within a test.
NEVER_MS = 3_600_000


def fill(wire: Wire, session: str, count: int, first: int = 1, **fields: object) -> session_pb2.AppendTurnResponse:
    turns = [(user if n % 2 else assistant)(f"t{n}", f"{session} says number {n}") for n in range(first, first + count)]
    return wire.append(session, *turns, **fields)


def served(context: context_pb2.ActiveContext) -> bytes:
    """A context without what may differ between rungs."""
    copy = context_pb2.ActiveContext()
    copy.CopyFrom(context)
    copy.ClearField("receipt")
    copy.ClearField("context_etag")
    return copy.SerializeToString(deterministic=True)


def wait_until_hot(wire: Wire, session: str) -> context_pb2.ActiveContext:
    """Ask until the claim behind an earlier answer is committed; each answer on the way must say CLOUD."""
    for _ in range(2000):
        context = wire.resume(session)
        if context.receipt.rung == HOT:
            return context
        assert context.receipt.rung == CLOUD
    raise AssertionError(f"{session} never became hot")


def clean(daemon: Daemon) -> None:
    settings = config.load(None, {}, {"data_dir": str(daemon.data_dir), "cloud": daemon.cloud})
    assert verify(settings, lambda *_: None) == []


@needs_airline
def test_all_conversations_survive_a_drain_and_the_loss_of_the_hot_tier_with_the_same_contexts() -> None:
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        before = {}
        for name, messages in airline.conversations():
            wire.create(name)
            wire.append(name, *(airline.to_turn(f"{n}", message) for n, message in enumerate(messages)))
            before[name] = wire.resume(name)
            assert before[name].receipt.rung == HOT
        assert len(before) == 200
        wire.close()
        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        daemon.restart()
        wire = Wire(daemon.address)
        for name, context in before.items():
            cold = wire.resume(name)
            assert cold.receipt.rung == CLOUD
            assert not cold.receipt.missing
            assert cold.receipt.ownership == context_pb2.OWNERSHIP_CONFIRMED
            assert served(cold) == served(context)
        for name, context in before.items():
            assert served(wait_until_hot(wire, name)) == served(context)
        wire.close()
        assert daemon.terminate() == 0
        clean(daemon)


def test_a_kill_with_the_loss_of_the_disk_is_partial_until_accepted() -> None:
    with running_daemon(flush_interval_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("a")
        fill(wire, "a", 6)
        wire.admin.Flush(admin_pb2.FlushRequest())
        acked = fill(wire, "a", 4, first=7)
        assert (acked.head.seq, acked.cloud_seq) == (10, 6)
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.restart()
        wire = Wire(daemon.address)
        for _ in range(3):
            lost = wire.resume("a")
            assert lost.receipt.rung == PARTIAL
            assert lost.receipt.notice
            (missing,) = lost.receipt.missing
            assert (missing.first_seq, missing.last_seq, missing.epoch) == (7, 0, 1)
            assert missing.reason == context_pb2.MISSING_REASON_HOT_TIER_LOST
            assert missing.possible_only
            assert [turn.seq for turn in lost.turns] == [1, 2, 3, 4, 5, 6]
        # A caller that knows what it was told learns exactly what is gone.
        told = wire.resume("a", highest_acked=turn_pb2.TurnPosition(epoch=1, seq=10))
        assert told.receipt.rung == PARTIAL
        assert told.receipt.stale
        assert [(m.first_seq, m.last_seq) for m in told.receipt.missing if m.last_seq] == [(7, 10)]
        assert fill(wire, "a", 2, first=21).missing
        session = wire.sessions.GetSession(session_pb2.GetSessionRequest(session_id="a")).session
        assert [m.epoch for m in session.missing] == [1]
        accepted = wire.resume("a", accept_missing=1)
        assert accepted.receipt.rung == HOT
        assert not accepted.receipt.missing
        # Whoever had the lost turns acknowledged still hears of it, until they accept it as well.
        assert wire.resume("a", highest_acked=turn_pb2.TurnPosition(epoch=1, seq=6)).receipt.rung == HOT
        mourner = {"highest_acked": turn_pb2.TurnPosition(epoch=1, seq=8)}
        late = wire.resume("a", **mourner).receipt
        assert late.rung == PARTIAL
        assert [(m.first_seq, m.last_seq, m.possible_only) for m in late.missing] == [(7, 8, False)]
        assert wire.resume("a", **mourner, accept_missing=1).receipt.rung == HOT
        # Accepted stays accepted, over a restart and in both tiers.
        daemon.kill()
        daemon.restart()
        wire = Wire(daemon.address)
        assert wire.resume("a").receipt.rung == HOT
        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        daemon.restart()
        wire = Wire(daemon.address)
        assert wire.resume("a").receipt.rung == CLOUD
        wire.close()
        daemon.terminate()
        clean(daemon)


def test_re_appended_turns_make_a_lost_session_whole_again_and_are_applied_once() -> None:
    with running_daemon(flush_interval_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("a")
        fill(wire, "a", 4)
        wire.admin.Flush(admin_pb2.FlushRequest())
        fill(wire, "a", 4, first=5)
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.restart()
        wire = Wire(daemon.address)
        highest = turn_pb2.TurnPosition(epoch=1, seq=8)
        assert wire.resume("a", highest_acked=highest).receipt.rung == PARTIAL
        # The client sends all that it has again: four are known, four were lost.
        again = fill(wire, "a", 8)
        assert [turn.duplicate for turn in again.turns] == [True] * 4 + [False] * 4
        assert [turn.position.seq for turn in again.turns] == list(range(1, 9))
        assert [turn.position.epoch for turn in again.turns] == [1] * 4 + [2] * 4
        assert wire.resume("a", highest_acked=highest).receipt.rung == HOT
        assert wire.resume("a").receipt.rung == HOT
        assert [turn.turn_id for turn in wire.turns("a")] == [f"t{n}" for n in range(1, 9)]
        wire.close()
        daemon.terminate()
        clean(daemon)


def test_a_session_of_cloud_only_appends_is_complete_after_the_loss_of_the_disk() -> None:
    with running_daemon(flush_interval_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("a", policy=turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_CLOUD))
        reply = fill(wire, "a", 6)
        assert reply.durability == turn_pb2.DURABILITY_CLOUD
        assert reply.cloud_seq == 6
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.restart()
        wire = Wire(daemon.address)
        context = wire.resume("a", highest_acked=reply.head)
        assert context.receipt.rung == CLOUD
        assert not context.receipt.missing
        assert len(context.turns) == 6
        wait_until_hot(wire, "a")
        wire.close()


def test_a_policy_that_is_relaxed_counts_only_once_it_is_in_the_cloud() -> None:
    with running_daemon(flush_interval_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("a", policy=turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_CLOUD))
        change = turn_pb2.StateChange(policy=turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_EDGE))
        request = session_pb2.UpdateSessionRequest(session_id="a", turn_id="p", change=change)
        wire.sessions.UpdateSession(request)
        assert fill(wire, "a", 2).durability == turn_pb2.DURABILITY_EDGE
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.restart()
        wire = Wire(daemon.address)
        # The two EDGE turns are gone, and the session no longer claims to have nothing to lose.
        assert wire.resume("a").receipt.rung == PARTIAL
        wire.close()


@pytest.mark.parametrize("damage", ["gone", "flipped"])
def test_with_the_cloud_tier_unreadable_as_well_the_error_is_honest(damage: str) -> None:
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        wire.create("a")
        fill(wire, "a", 4)
        wire.admin.Flush(admin_pb2.FlushRequest())
        daemon.kill()
        daemon.lose_hot_tier()
        daemon.restart()
        cloud = daemon.data_dir / "cloud"
        wire = Wire(daemon.address)
        if damage == "gone":
            cloud.rename(daemon.data_dir / "elsewhere")
            refused = refusal(wire.resume, "a")
            assert refused.code.name == "UNAVAILABLE"
            assert refused.reason == "STORE_UNAVAILABLE"
            assert refused.retry_ms > 0
            # What the store does not answer is unknown, not absent.
            assert refusal(wire.resume, "never-made").reason == "STORE_UNAVAILABLE"
            (daemon.data_dir / "elsewhere").rename(cloud)
            assert wire.resume("a").receipt.rung == PARTIAL
        else:
            (path,) = (cloud / "m").iterdir()
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
            refused = refusal(wire.resume, "a")
            assert refused.code.name == "DATA_LOSS"
            assert refused.reason == "CORRUPT_MANIFEST"
            assert refusal(fill, wire, "a", 1, first=50).reason == "CORRUPT_MANIFEST"
        wire.close()


def test_a_drained_node_keeps_reading_and_takes_nothing() -> None:
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        wire.create("a")
        fill(wire, "a", 4)
        *_, last = wire.admin.Drain(admin_pb2.DrainRequest())
        assert (last.done, last.clean, last.remaining_sessions) == (True, True, 0)
        refused = refusal(fill, wire, "a", 1, first=9)
        assert refused.reason == "NODE_DRAINING"
        assert refused.retry_ms > 0
        assert wire.resume("a").receipt.rung == CLOUD
        assert wire.resume("a").receipt.rung == CLOUD
        status = wire.admin.GetStatus(admin_pb2.GetStatusRequest())
        assert status.phase == admin_pb2.NODE_PHASE_DRAINED
        wire.close()
        assert daemon.terminate() == 0


@pytest.mark.parametrize("lease_ms", [600_000, 500])
def test_an_old_disk_put_back_is_not_served_as_if_nothing_had_happened(lease_ms: int) -> None:
    """Seen at once where the lease tells how far the disk had come, else as soon as the manifest is met."""
    with running_daemon(flush_interval_ms=NEVER_MS, lease_ms=lease_ms, node_name="n") as daemon:
        wire = Wire(daemon.address)
        wire.create("a")
        fill(wire, "a", 4)
        wire.admin.Flush(admin_pb2.FlushRequest())
        # A snapshot under the running daemon: one from before its start would be told by the start itself.
        shutil.copytree(daemon.data_dir / "hot", daemon.data_dir / "copy")
        reply = fill(wire, "a", 4, first=5)
        wire.admin.Flush(admin_pb2.FlushRequest())
        if lease_ms == 500:
            lease = daemon.data_dir / "cloud" / "n" / "n"
            before, deadline = lease.read_bytes(), time.monotonic() + 30
            while lease.read_bytes() == before:
                assert time.monotonic() < deadline
        daemon.kill()
        shutil.rmtree(daemon.data_dir / "hot")
        (daemon.data_dir / "copy").rename(daemon.data_dir / "hot")
        daemon.restart()
        wire = Wire(daemon.address)
        if lease_ms != 500:
            # The caller's knowledge shows that the rows are old.
            context = wire.resume("a", highest_acked=reply.head)
            assert context.receipt.rung == PARTIAL
            assert context.receipt.stale
            # The manifest of our own epoch is ahead of our rows: it is never overwritten.
            fill(wire, "a", 1, first=90)
            answer = wire.admin.Flush(admin_pb2.FlushRequest())
            assert dict(answer.failures) == {"HISTORY_DIVERGED": 1}
        # What the cloud tier has counts, and the reply says that there may have been more.
        context = wire.resume("a")
        assert context.receipt.rung == PARTIAL
        assert [turn.turn_id for turn in context.turns] == [f"t{n}" for n in range(1, 9)]
        # A caller whose newest turn is proved to be there misses nothing.
        assert wire.resume("a", highest_acked=reply.head).receipt.rung in (HOT, CLOUD)
        assert fill(wire, "a", 1, first=91).head.seq == 9
        wire.resume("a", accept_missing=1)
        wire.close()
        assert daemon.terminate() == 0
        clean(daemon)


def test_create_is_idempotent_and_a_mismatched_user_sees_nothing() -> None:
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        assert wire.create("a", user_id="ann").created
        assert not wire.create("a", user_id="ann").created
        assert refusal(wire.create, "a", user_id="bob").reason == "SESSION_EXISTS"
        # Creations that came second leave no second row in a listing.
        rows = wire.sessions.ListSessions(session_pb2.ListSessionsRequest()).sessions
        assert [session.session_id for session in rows] == ["a"]
        assert refusal(wire.resume, "a", user_id="bob").reason == "SESSION_NOT_FOUND"
        assert refusal(wire.resume, "b").reason == "SESSION_NOT_FOUND"
        minted = wire.create("").session.session_id
        assert len(minted) == 36
        wire.close()


def test_sessions_are_listed_by_user_and_a_listing_without_the_cloud_tier_says_that_it_is_incomplete() -> None:
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        for index in range(7):
            wire.create(f"a{index}", user_id="ann", created_at_unix_ms=1000 + index)
        wire.create("b", user_id="bob")

        def listed(**fields: object) -> list[session_pb2.ListSessionsResponse]:
            pages, token = [], ""
            while True:
                request = session_pb2.ListSessionsRequest(page_size=3, page_token=token, **fields)
                pages.append(wire.sessions.ListSessions(request))
                token = pages[-1].next_page_token
                if not token:
                    return pages

        def ids(pages: list[session_pb2.ListSessionsResponse]) -> list[str]:
            return [session.session_id for page in pages for session in page.sessions]

        assert ids(listed(user_id="ann")) == [f"a{index}" for index in range(7)]
        assert ids(listed(user_id="nobody")) == []
        assert sorted(ids(listed())) == [*(f"a{index}" for index in range(7)), "b"]
        assert not any(page.incomplete for page in listed())
        cloud = daemon.data_dir / "cloud"
        cloud.rename(daemon.data_dir / "elsewhere")
        assert ids(listed(user_id="ann")) == [f"a{index}" for index in range(7)]
        assert all(page.incomplete for page in listed(user_id="ann"))
        (daemon.data_dir / "elsewhere").rename(cloud)
        wire.close()


def test_a_damaged_session_is_listed_by_its_name_as_unreadable() -> None:
    with running_daemon() as daemon:
        wire = Wire(daemon.address)
        wire.create("whole")
        wire.create("hurt")
        assert daemon.terminate() == 0
        daemon.lose_hot_tier()
        for path in (daemon.data_dir / "cloud" / "m").iterdir():
            raw = bytearray(path.read_bytes())
            if b"hurt" in raw:
                raw[-1] ^= 1
                path.write_bytes(raw)
        daemon.restart()
        wire = Wire(daemon.address)
        page = wire.sessions.ListSessions(session_pb2.ListSessionsRequest())
        assert [session.session_id for session in page.sessions] == ["whole"]
        assert [(item.session_id, item.reason) for item in page.unreadable] == [("hurt", "CORRUPT_MANIFEST")]
        wire.close()


def test_too_many_calls_at_once_are_refused_with_details_and_a_retry() -> None:
    with running_daemon(concurrent_calls_max=1, flush_interval_ms=NEVER_MS) as daemon:
        wire = Wire(daemon.address)
        wire.create("a", policy=turn_pb2.SessionPolicy(min_durability=turn_pb2.DURABILITY_CLOUD))
        body = "word " * 100_000
        request = session_pb2.AppendTurnRequest(session_id="a", turns=[user(f"t{n}", body) for n in range(4)])
        slow = wire.sessions.AppendTurn.future(request, timeout=60)
        refused = None
        while refused is None and not slow.done():
            try:
                wire.resume("a")
            except grpc.RpcError as error:
                refused = Refusal(error)
        assert refused is not None
        assert (refused.code.name, refused.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
        assert refused.retry_ms > 0
        assert slow.result().head.seq == 4
        wire.close()


def test_a_hot_tier_that_comes_back_after_another_took_its_place_owns_nothing_unseen() -> None:
    with running_daemon(flush_interval_ms=NEVER_MS, node_name="n") as first:
        wire = Wire(first.address)
        for name in ("a", "b"):
            wire.create(name)
            fill(wire, name, 4)
        wire.admin.Flush(admin_pb2.FlushRequest())
        fill(wire, "a", 2, first=5)
        first.kill()
        wire.close()
        with running_daemon(cloud=first.cloud, node_name="n") as second:
            wire = Wire(second.address)
            assert wire.resume("a").receipt.rung == PARTIAL
            assert wire.resume("a", accept_missing=1).receipt.rung == HOT
            fill(wire, "a", 2, first=31)
            assert second.terminate() == 0
            wire.close()
        first.restart()
        wire = Wire(first.address)
        # "a" went on elsewhere: what the manifest says counts, not the rows of before.
        context = wire.resume("a", highest_acked=turn_pb2.TurnPosition(epoch=2, seq=6))
        assert context.receipt.rung == CLOUD
        assert [turn.turn_id for turn in context.turns] == ["t1", "t2", "t3", "t4", "t31", "t32"]
        # It can be written again here, and what only this disk had is kept where it can be found.
        assert fill(wire, "a", 1, first=41).head.seq == 7
        (orphan,) = (first.data_dir / "cloud" / "o").rglob("*-*")
        meta, frames = envelope.unseal(orphan.read_bytes(), envelope.KIND_ORPHAN, orphan.name)
        assert meta["session"] == "a"
        assert [t.turn_id for t in context_pb2.ActiveContext.FromString(frames).turns] == ["t5", "t6"]
        # "b" was nobody else's in between.
        assert wire.resume("b").receipt.rung == HOT
        assert fill(wire, "b", 1, first=5).head.seq == 5
        wire.close()
        assert first.terminate() == 0
        clean(first)
