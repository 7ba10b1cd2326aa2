"""Commits whose answers are lost, late or never come: what was acknowledged stays, and no epoch is taken twice.

Real hot tiers, flushers, claims and sessions in this process, over a folder that answers as a test tells it to. After
every scenario the world is counted: each acknowledged turn is in the log, in a listed orphan or in some node's rows.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import pytest

from sessiond import core
from sessiond.core import envelope, rules
from sessiond.core import state as states
from sessiond.core.manifest import KEPT_BYTES_MAX, Manifest, decode_meta
from sessiond.daemon import doubt_all
from sessiond.errors import Corrupt, SessiondError, Unavailable
from sessiond.service.ownership import Call, Parts
from sessiond.service.sessions import Sessions
from sessiond.tiers import flush as flushing
from sessiond.tiers.cloud.bucket import open_bucket
from sessiond.tiers.cloud.folder import FolderStore
from sessiond.tiers.cloud.store import Ambiguous, Listed, ObjectStore, Stored, StoreUnavailable
from sessiond.tiers.flush import Flushed, Flusher
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hot.rows import (
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASED,
    PHASE_RELEASING,
    Head,
)
from sessiond.tiers.hydrate import Claims, Node, Segments, load
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

S = "s"
CLOUD = turn_pb2.DURABILITY_CLOUD
START_MS = 1_800_000_000_000
DAY_MS = 86_400_000
# Nothing here takes long; whoever waits longer waits for ever.
PATIENCE_S = 20.0
TOKENIZER = Tokenizer()

Result = TypeVar("Result")
Land = Callable[[], str]
# A turn as its acknowledgement proves it: session's hash, epoch, seq, chain.
Proof = tuple[bytes, int, int, bytes]


class Killed(Exception):
    """The process ends here, as far as its rows can tell."""


class FaultyStore(ObjectStore):
    """A folder whose answers a test decides. on_put(key, land): what a put answers; `land` applies it to the folder."""

    def __init__(self, folder: FolderStore) -> None:
        self.folder = folder
        self.url = folder.url
        self.on_put: Callable[[str, Land], str] | None = None
        self.on_get: Callable[[str], None] | None = None
        self.on_delete: Callable[[str], None] | None = None
        self.committed: list[Manifest] = []

    def get(self, key: str, first_byte: int | None = None, last_byte: int | None = None) -> Stored:
        if self.on_get is not None:
            self.on_get(key)
        return self.folder.get(key, first_byte, last_byte)

    def put(self, key: str, body: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        def land() -> str:
            etag = self.folder.put(key, body, if_absent=if_absent, if_match=if_match)
            if is_manifest(key):
                meta, payload = envelope.unseal(body, envelope.KIND_MANIFEST, key)
                self.committed.append(decode_meta(meta, payload, key))
            return etag

        return land() if self.on_put is None else self.on_put(key, land)

    def delete(self, key: str) -> None:
        if self.on_delete is not None:
            self.on_delete(key)
        self.folder.delete(key)

    def list(self, prefix: str, start_after: str = "", limit: int = 1000) -> Iterator[Listed]:
        return self.folder.list(prefix, start_after, limit)

    def close(self) -> None:
        """The folder outlives its nodes; the world closes it."""

    def heal(self) -> None:
        self.on_put = self.on_get = self.on_delete = None


def is_manifest(key: str) -> bool:
    return key.startswith("m/")


def unsent(key: str, land: Land) -> str:
    raise StoreUnavailable(key, "down")


def unreadable(key: str) -> None:
    raise StoreUnavailable(key, "down")


def lost_answers(landing: Iterable[bool]) -> Callable[[str, Land], str]:
    """Every put is ambiguous; whether it lands is said one by one, and none does afterwards."""
    turns = iter(landing)

    def on_put(key: str, land: Land) -> str:
        if next(turns, False):
            land()
        raise Ambiguous(key, "timeout")

    return on_put


def killed_once_landed(key: str, land: Land) -> str:
    land()
    if is_manifest(key):
        raise Killed
    return "unused"


class HeldLease:
    """A lease that this node holds all along."""

    lost = fenced = False
    tenure = fences = 0

    def is_valid(self) -> bool:
        return True


class Clock:
    """Wall time, moved by hand."""

    def __init__(self) -> None:
        self.now_ms = START_MS

    def __call__(self) -> int:
        return self.now_ms


class LiveNode:
    """One node: a hot tier of its own, in a folder of its own, over the world's store."""

    def __init__(self, world: World, hot_name: str, name: str, flush_interval_ms: int) -> None:
        self.world = world
        self.hot_name = hot_name
        self.clock = world.clock
        store, bucket = world.store, world.bucket
        self.hot = Environment(world.path / hot_name, 1 << 30, 128, 64)
        self.node = Node(self.hot.incarnation, name, "here")
        self.flusher = Flusher(self.hot, store, bucket, self.node, flush_interval_ms, 2, self.clock, lambda _: None)
        self.claims = Claims(self.hot, store, bucket, self.node, lambda _: None)
        self.executors = [ThreadPoolExecutor(8), ThreadPoolExecutor(2)]
        self.call = Call("default", None)
        self.sessions = Sessions(
            Parts(
                hot=self.hot,
                store=store,
                bucket=bucket,
                node=self.node,
                lease=HeldLease(),  # type: ignore[arg-type]
                flusher=self.flusher,
                claims=self.claims,
                segments=Segments(store),
                tokenizer=TOKENIZER,
                executor=self.executors[0],
                counting=self.executors[1],
                clock_ms=self.clock,
                expiry_ms=self.clock,
                latest_ms=self.clock,
                running_ms=self.clock,
                turn_bytes_max=1 << 20,
                default_budget_tokens=0,
            )
        )

    # Calls as a client makes them ------------------------------------------------------------------------------

    def create(self) -> None:
        self.world.run(self.sessions.create(self.call, session_pb2.CreateSessionRequest(session_id=S)))

    def append(self, *turns: turn_pb2.TurnInput, durability: int = 0) -> session_pb2.AppendTurnResponse:
        return self.world.run(self.appending(*turns, durability=durability))

    async def appending(self, *turns: turn_pb2.TurnInput, durability: int = 0) -> session_pb2.AppendTurnResponse:
        request = session_pb2.AppendTurnRequest(session_id=S, turns=turns, durability=durability)  # type: ignore[arg-type]
        _, response = await self.sessions.append(self.call, request)
        self.world.acknowledged(response)
        return response  # type: ignore[no-any-return]

    def resume(self, **fields: Any) -> context_pb2.ActiveContext:
        request = session_pb2.ResumeSessionRequest(
            session_id=S, context=context_pb2.ContextSpec(budget_tokens=200_000), **fields
        )
        reply = self.world.run(self.sessions.resume(self.call, request))
        self.world.run(self.sessions.ownership.settle())
        return context_pb2.ActiveContext.FromString(reply)

    # What the node does by itself ------------------------------------------------------------------------------

    def flush(self) -> Flushed:
        return self.flusher.flush(self.world.h)

    def release(self) -> Flushed:
        return self.flusher.flush(self.world.h, release=True)

    def take_over(self) -> bool:
        """Claim the session from whoever has it, as an operator who knows that he is gone."""
        cold = load(self.world.store.folder, self.world.h)
        assert cold is not None
        return self.claims.claim(cold, [cold.manifest.epoch, cold.manifest.head, 1, 0], self.clock())

    @property
    def head(self) -> Head:
        with self.hot.read() as transaction:
            head = log.read_head(transaction, self.world.h)
        assert head is not None
        return head

    def proofs(self) -> set[Proof]:
        """Every turn in this node's rows."""
        found: set[Proof] = set()
        with self.hot.read() as transaction:
            for _, frames in transaction.scan("turns", self.world.h):
                found |= proofs_in(self.world.h, bytes(frames))
        return found

    def close(self) -> None:
        self.world.run(self.sessions.ownership.settle())
        self.flusher.stop()
        self.claims.close()
        for executor in self.executors:
            executor.shutdown(wait=True)
        self.hot.close()


class World:
    """A cloud tier, the nodes over it, and a memory of everything that was acknowledged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = Clock()
        self.runner = asyncio.Runner()
        self.store = FaultyStore(FolderStore(path / "cloud"))
        self.bucket = open_bucket(self.store, b"", 1)
        self.h = rules.session_hash(self.bucket.hash_key, "default", S)
        self.nodes: list[LiveNode] = []
        self.acked: set[Proof] = set()
        self.acked_cloud: set[Proof] = set()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(asyncio.wait_for(work, PATIENCE_S))

    def node(self, hot_name: str = "hot", name: str = "n1", flush_interval_ms: int = 1000) -> LiveNode:
        node = LiveNode(self, hot_name, name, flush_interval_ms)
        self.nodes.append(node)
        return node

    def restart(self, node: LiveNode) -> LiveNode:
        """The same hot tier in a new process, whose lease was somebody else's in between."""
        node.close()
        self.nodes.remove(node)
        again = self.node(node.hot_name, node.node.name)
        doubt_all(again.hot)
        return again

    def acknowledged(self, response: session_pb2.AppendTurnResponse) -> None:
        turns = {(self.h, turn.position.epoch, turn.position.seq, turn.position.chain) for turn in response.turns}
        self.acked |= turns
        if response.durability == CLOUD:
            self.acked_cloud |= turns
        # Now, too: a later flush would hide that a reply said too much.
        assert self.acked_cloud <= self.log_proofs()
        assert response.cloud_seq <= self.manifest.head

    @property
    def manifest(self) -> Manifest:
        cold = load(self.store.folder, self.h)
        assert cold is not None
        return cold.manifest

    def log_proofs(self) -> set[Proof]:
        """Every turn in the cloud tier's log."""
        manifest = self.manifest
        frames, last = Segments(self.store.folder).between(manifest, 1, manifest.head, 1 << 30)
        assert last == manifest.head
        return proofs_in(self.h, frames)

    def orphan_proofs(self) -> set[Proof]:
        """Every turn in an orphan that the manifest lists."""
        found: set[Proof] = set()
        for key, _, first, last, sha256 in self.manifest.orphans:
            body = self.store.folder.get(key).body
            assert hashlib.sha256(body).digest() == sha256
            _, frames = envelope.unseal(body, envelope.KIND_ORPHAN, key)
            proofs = proofs_in(self.h, frames)
            assert {seq for _, _, seq, _ in proofs} == set(range(first, last + 1))
            found |= proofs
        return found

    def check(self) -> None:
        """The promises that hold after everything that can happen."""
        logged = self.log_proofs()
        kept = logged.union(self.orphan_proofs(), *(node.proofs() for node in self.nodes))
        assert self.acked, "nothing was acknowledged, so nothing was tested"
        assert self.acked <= kept
        assert self.acked_cloud <= logged
        for before, after in pairwise(self.store.committed):
            assert after.epoch >= before.epoch
            assert after.mutation > before.mutation
            # Nor does the log ever become shorter.
            assert after.head >= before.head
        assert all(before[0] < after[0] for before, after in pairwise(self.manifest.epochs))
        assert self.manifest.epoch == self.store.committed[-1].epoch
        assert all(node.head.epoch <= self.manifest.epoch for node in self.nodes)

    def close(self) -> None:
        self.store.heal()
        for node in self.nodes:
            node.close()
        self.runner.close()
        self.store.folder.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A world of one session, counted when the scenario is over."""
    made = World(tmp_path)
    try:
        yield made
        made.store.heal()
        made.check()
    finally:
        made.close()


def proofs_in(h: bytes, frames: bytes) -> set[Proof]:
    return {(h, header.epoch, header.seq, header.chain) for header in core.scan_frames(h, frames)}


def message(turn_id: str, role: int, text: str) -> turn_pb2.TurnInput:
    content = turn_pb2.Message(parts=[turn_pb2.Part(text=text)])
    return turn_pb2.TurnInput(turn_id=turn_id, role=role, message=content)  # type: ignore[arg-type]


def user(turn_id: str, text: str = "hi") -> turn_pb2.TurnInput:
    return message(turn_id, turn_pb2.ROLE_USER, text)


def assistant(turn_id: str, text: str = "ok") -> turn_pb2.TurnInput:
    return message(turn_id, turn_pb2.ROLE_ASSISTANT, text)


def system(turn_id: str, text: str) -> turn_pb2.TurnInput:
    return message(turn_id, turn_pb2.ROLE_SYSTEM, text)


@contextmanager
def refused(reason: str) -> Iterator[None]:
    with pytest.raises(SessiondError) as refusal:
        yield
    assert refusal.value.reason == reason


def talk(world: World, hot_name: str = "hot", name: str = "n1") -> LiveNode:
    """A node with the session and its first two turns."""
    node = world.node(hot_name, name)
    node.create()
    node.append(user("t1"), assistant("t2"))
    return node


def fenced(world: World) -> LiveNode:
    """A node that acknowledged turns 3 and 4, was taken over before it flushed them, and knows it; nobody owns it."""
    node = talk(world, "first")
    node.flush()
    node.append(user("t3"), assistant("t4"))
    other = world.node("second", "n2")
    assert other.take_over()
    assert other.release().released
    doubt_all(node.hot)
    assert node.head.phase == PHASE_DOUBTED
    node.flush()
    assert node.head.phase == PHASE_FENCED
    return node


# Answers that are lost ---------------------------------------------------------------------------------------------


def test_a_write_whose_answer_was_lost_is_never_taken_for_a_successors(world: World) -> None:
    first, second = talk(world, "first", "n1"), world.node("second", "n2")

    def on_put(key: str, land: Land) -> str:
        land()
        world.store.heal()
        assert second.take_over()
        raise Ambiguous(key, "timeout")

    world.store.on_put = on_put
    with refused("EPOCH_FENCED"):
        first.flush()
    assert first.head.phase == PHASE_FENCED
    assert first.head.etag != second.head.etag
    second.append(user("b1"))
    with refused("NOT_OWNER"):
        first.append(user("a3"))
    first.flush()
    assert world.manifest.owner == [second.hot.incarnation, "n2", "here"]
    assert second.flush().cloud_seq == 3
    assert second.head.phase == PHASE_OWNED


def test_a_write_that_landed_without_an_answer_is_settled_as_it_stands(world: World) -> None:
    node = talk(world)
    world.store.on_put = lost_answers([True])
    assert node.flush() == Flushed(2, True, False)
    world.store.heal()
    assert node.head.mutation == world.manifest.mutation
    assert node.flush() == Flushed(2, False, False)


def test_a_release_with_unknown_outcome_keeps_appends_out_until_it_is_known(world: World) -> None:
    node = talk(world)
    world.store.on_put, world.store.on_get = lost_answers([True]), unreadable
    with refused("COMMIT_UNKNOWN"):
        node.release()
    assert node.head.phase == PHASE_RELEASING
    assert world.manifest.owner is None
    with pytest.raises(Unavailable):
        node.append(user("t3"), assistant("t4"))
    assert node.head.phase == PHASE_RELEASING
    assert node.head.head_seq == 2
    world.store.heal()
    node.append(user("t3"), assistant("t4"))
    assert node.head.phase == PHASE_OWNED
    assert world.manifest.epoch == 2
    node.flush()
    context = node.resume(read_only=True)
    assert context.receipt.rung == context_pb2.RUNG_HOT
    assert len(context.turns) == 4
    assert not context.receipt.missing


def test_a_release_that_surely_never_left_leaves_the_session_open_to_appends(world: World) -> None:
    node = talk(world)
    world.store.on_put = unsent
    with refused("STORE_UNAVAILABLE"):
        node.release()
    assert node.head.phase == PHASE_OWNED
    node.append(user("t3"))


def test_a_late_body_under_the_same_mutation_is_not_taken_for_a_newer_one(world: World) -> None:
    node = talk(world)
    late: list[Land] = []

    def delayed(key: str, land: Land) -> str:
        late.append(land)
        raise Ambiguous(key, "timeout")

    world.store.on_put = delayed
    with refused("COMMIT_UNKNOWN"):
        node.flush()
    node.append(user("t3"), assistant("t4"))
    answers = iter([late[0]])

    def overtaken(key: str, land: Land) -> str:
        older = next(answers, None)
        if older is None:
            return land()
        older()
        raise Ambiguous(key, "timeout")

    world.store.on_put = overtaken
    response = node.append(user("t5"), durability=CLOUD)
    assert response.durability == CLOUD
    assert response.cloud_seq == world.manifest.head == 5
    assert [manifest.head for manifest in world.store.committed] == [0, 2, 5]


# Ends of processes -------------------------------------------------------------------------------------------------


def test_a_release_that_landed_before_a_crash_is_believed_after_it(world: World) -> None:
    node = talk(world)
    world.store.on_put = killed_once_landed
    with pytest.raises(Killed):
        node.release()
    world.store.heal()
    assert node.head.phase == PHASE_RELEASING
    node = world.restart(node)
    response = node.append(user("t3"))
    assert (response.head.epoch, response.head.seq, response.cloud_seq) == (2, 3, 2)
    assert node.head.phase == PHASE_OWNED
    assert not world.manifest.loss
    assert not world.manifest.orphans
    node.flush()
    assert node.flusher.dirty() == (0, 0)


def test_a_flush_that_landed_before_a_crash_is_caught_up_where_the_head_is_not_hot(world: World) -> None:
    node = talk(world, "first")
    node.append(user("t3"), assistant("t4", "k " * 40_000))
    node.flush()
    node = world.node("second")  # the node's disk was replaced, so turns may be missing
    assert [len(node.resume().receipt.missing) for _ in range(2)] == [1, 1]
    node.release()
    node.resume()
    assert node.head.hot_first > node.head.head_seq
    node.resume(accept_missing=1)
    assert node.head.is_dirty
    world.store.on_put = killed_once_landed
    with pytest.raises(Killed):
        node.flush()
    world.store.heal()
    assert node.head.mutation < world.manifest.mutation
    assert node.flush().cloud_seq == 4
    assert node.head.phase == PHASE_OWNED
    assert not node.head.is_dirty
    assert [row[3] for row in world.manifest.loss] == [1]


def test_nothing_is_committed_again_over_a_failed_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = talk(world)
    disk = FailingDisk(node.hot._env)
    begun, gate = threading.Event(), threading.Event()
    ran: list[int] = []

    def write(number: int) -> Callable[[Transaction], None]:
        def operation(transaction: Transaction) -> None:
            ran.append(number)
            transaction.put("users", b"%d" % number, b"")

        return operation

    def hold(_: Transaction) -> bool:
        begun.set()
        return gate.wait(PATIENCE_S)

    async def scenario() -> list[Any]:
        # While the first commit is held, the others queue up, to be committed as one group.
        held = asyncio.ensure_future(node.hot.run(hold))
        assert await asyncio.to_thread(begun.wait, PATIENCE_S)
        others = [asyncio.ensure_future(node.hot.run(write(number))) for number in range(3)]
        await asyncio.sleep(0)  # each has put itself into the queue
        monkeypatch.setattr(node.hot, "_env", disk)
        gate.set()
        assert await held
        return await asyncio.gather(*others, return_exceptions=True)

    outcomes = world.run(scenario())
    assert [outcome.reason for outcome in outcomes] == ["HOT_TIER_FAILED"] * 3
    assert disk.failures == 1
    assert ran == [0, 1, 2]
    with refused("HOT_TIER_FAILED"):
        node.append(user("t3"))
    monkeypatch.undo()
    node = world.restart(node)
    with node.hot.read() as transaction:
        assert not [key for key, _ in transaction.scan("users", b"") if len(key) == 1]
    node.append(user("t3"))


class FailingDisk:
    """An LMDB environment whose commits come back with an I/O error."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.failures = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    @contextmanager
    def begin(self, write: bool = False, **options: Any) -> Iterator[Any]:
        transaction = self._environment.begin(write=write, **options)
        try:
            yield transaction
        finally:
            transaction.abort()
        if write:
            self.failures += 1
            raise lmdb.DiskError("mdb_txn_commit: Input/output error")


# Clocks ------------------------------------------------------------------------------------------------------------


def test_a_clock_that_steps_back_a_day_after_a_failure_holds_no_flush_up(world: World) -> None:
    node = world.node(flush_interval_ms=10)
    node.create()
    node.append(user("t1"), assistant("t2"))
    failed, landed = threading.Event(), threading.Event()

    def down(key: str, land: Land) -> str:
        failed.set()
        raise StoreUnavailable(key, "down")

    def up(key: str, land: Land) -> str:
        etag = land()
        landed.set()
        return etag

    world.store.on_put = down
    world.clock.now_ms += 1000
    node.flusher.start()
    assert failed.wait(PATIENCE_S)
    world.clock.now_ms -= DAY_MS
    world.store.on_put = up
    assert landed.wait(PATIENCE_S)
    node.flusher.stop()
    assert node.flusher.dirty() == (0, 0)
    assert world.manifest.head == 2


# Sizes -------------------------------------------------------------------------------------------------------------


def test_a_session_that_grows_faster_than_it_is_sealed_is_committed_whole(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = talk(world)
    node.flush()
    monkeypatch.setattr(flushing, "SEAL_ROUNDS_MAX", 2)
    monkeypatch.setattr(flushing, "SEGMENT_BYTES_MAX", 100_000)
    for number in range(6):
        node.append(user(f"x{number}", "y" * 70_000))
    assert node.flush() == Flushed(8, True, False)
    manifest = world.manifest
    assert manifest.head == 8
    assert states.decode(manifest.state).cursor == 8
    assert manifest.state == node.head.state
    assert len(manifest.turn_ids) == 8 * 24
    assert node.flush() == Flushed(8, False, False)


def test_instructions_too_large_to_be_kept_hold_no_later_commit_up(world: World) -> None:
    node = world.node()
    node.create()
    node.append(system("s0", "y " * 40_000))
    for number in range(6):
        node.append(user(f"q{number}", "z " * 4000), assistant(f"r{number}", "k " * 4000))
    assert node.release().released
    assert world.manifest.kept_bytes <= KEPT_BYTES_MAX
    node.append(user("n1"))
    assert node.head.hot_first > 1
    assert node.flush().cloud_seq == 14
    assert node.append(user("n2"), durability=CLOUD).durability == CLOUD
    assert node.release().released
    assert node.resume().instructions.turn_id == "s0"


def test_a_rewind_reaches_below_the_rows_of_a_session_that_was_taken_again(world: World) -> None:
    node = world.node()
    node.create()
    node.append(system("s0", "be kind"))
    for number in range(60):
        node.append(user(f"q{number}", "z " * 400), assistant(f"r{number}", "k " * 400))
    node.release()
    node.append(user("n1"))
    head = node.head
    to_seq = head.head_seq - 14
    assert head.hot_first > 1
    response = node.append(turn_pb2.TurnInput(turn_id="rw", rewind=turn_pb2.Rewind(to_seq=to_seq)))
    assert response.outcome == session_pb2.APPEND_OUTCOME_APPENDED
    assert states.decode(node.head.state).last_live_seq == to_seq
    node.flush()


# Rows that only a fenced node has ----------------------------------------------------------------------------------


def test_rows_of_a_fenced_session_survive_a_lost_claim(world: World) -> None:
    node = fenced(world)
    cold = load(world.store, world.h)
    assert cold is not None
    assert world.nodes[1].claims.claim(cold, None, 6)
    world.nodes[1].release()
    assert not node.claims.claim(cold, None, 7)
    head = node.head
    assert (head.phase, head.head_seq, head.cloud_seq, head.claim) == (PHASE_FENCED, 4, 2, None)
    assert not world.manifest.orphans
    assert world.acked <= node.proofs()


def test_rows_of_a_fenced_session_are_listed_once_an_outage_in_a_claim_is_over(world: World) -> None:
    node = fenced(world)
    stop_claim(world, node)
    node.append(user("x1"))
    assert node.head.phase == PHASE_OWNED
    assert [row[1:4] for row in world.manifest.orphans] == [[1, 3, 4]]
    node.flush()
    assert world.acked <= world.log_proofs() | world.orphan_proofs()


def test_rows_of_a_fenced_session_survive_a_creation_over_a_claim_cut_short(world: World) -> None:
    node = fenced(world)
    stop_claim(world, node)
    node.create()
    assert node.head.head_seq == 4
    assert world.acked <= node.proofs()


def stop_claim(world: World, node: LiveNode) -> None:
    """Have a claim go as far as its intent and its orphan, and no further."""

    def on_put(key: str, land: Land) -> str:
        return unsent(key, land) if is_manifest(key) else land()

    world.store.on_put = on_put
    with refused("STORE_UNAVAILABLE"):
        node.append(user("x1"))
    world.store.heal()
    assert node.head.phase == PHASE_CLAIMING


def test_a_log_that_left_the_manifests_is_kept_and_never_written_over_it(world: World) -> None:
    node = talk(world, "first")
    older = {path.name: path.read_bytes() for path in (world.path / "first").iterdir()}
    node.append(user("t3"), assistant("t4"))
    node.flush()
    node.close()
    world.nodes.remove(node)
    for name, content in older.items():  # a copy of the disk is put back
        (world.path / "first" / name).write_bytes(content)
    node = world.node("first")
    assert node.append(user("z3"), assistant("z4")).head.seq == 4
    with pytest.raises(Corrupt) as refusal:
        node.flush()
    assert refusal.value.reason == "HISTORY_DIVERGED"
    assert node.head.phase == PHASE_FENCED


# Calls that overtake each other ------------------------------------------------------------------------------------


def test_a_creation_that_is_answered_late_settles_over_nothing_newer(world: World) -> None:
    node = world.node()
    landed, index = threading.Event(), threading.Event()
    index_rows: list[str] = []

    def on_put(key: str, land: Land) -> str:
        if key.startswith("u/"):
            index_rows.append(key)
            if len(index_rows) == 1:
                index.wait(PATIENCE_S)
        etag = land()
        if is_manifest(key):
            landed.set()
        return etag

    world.store.on_put = on_put

    async def scenario() -> None:
        request = session_pb2.CreateSessionRequest(session_id=S)
        creating = asyncio.ensure_future(node.sessions.create(node.call, request))
        try:
            assert await asyncio.to_thread(landed.wait, PATIENCE_S)
            await node.appending(user("t1"), assistant("t2"))
            await asyncio.to_thread(node.release)
        finally:
            index.set()
        await creating

    world.run(scenario())
    assert (node.head.phase, node.head.head_seq) == (PHASE_RELEASED, 2)
    assert world.manifest.owner is None
    context = node.resume()
    assert context.receipt.rung == context_pb2.RUNG_CLOUD
    assert len(context.turns) == 2
    assert not context.receipt.missing
