"""Who owns a session, and how this node comes to: finding it, claiming it, taking it over, and letting callers at it.

It promises that a session is served as owned only after its claim is committed in both tiers, that a session of another
live node is never taken, and that one claim of a session is on its way at a time. It knows no gRPC.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, Protocol, TypeVar

from sessiond import core
from sessiond.core.expiry import lifecycle_at
from sessiond.core.manifest import LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, Manifest
from sessiond.errors import Corrupt, NotFound, SessiondError, Unavailable
from sessiond.tiers.cloud.bucket import Bucket
from sessiond.tiers.cloud.lease import Lease, boot_clock_ms
from sessiond.tiers.cloud.store import ObjectStore
from sessiond.tiers.flush import Flusher
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hot.rows import (
    DURABILITY_CLOUD,
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASING,
    Head,
    decode_committed,
)
from sessiond.tiers.hydrate import Claims, Cold, Node, Segments, claimed_epoch, is_claim_of, is_stranded, load
from sessiond.tiers.peers import GONE, Owner, Verdict
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2

OWN_ATTEMPTS_MAX: Final = 12
# Sessions of which it is remembered when they were last read; others go by their newest turn.
RESUMED_MAX: Final = 65_536
READ_MAX: Final = 4096
# Requests up to this are counted on the loop: a thread costs more (bench/README.md), and 4 KiB take below half a ms.
INLINE_COUNT_BYTES_MAX: Final = 4096

REASON_LOST: Final = context_pb2.MISSING_REASON_HOT_TIER_LOST
REASON_UNREACHABLE: Final = context_pb2.MISSING_REASON_OWNER_UNREACHABLE

Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Call:
    """Who calls, and how long they wait.

    deadline_ms: by boot_clock_ms, None for no limit. forwarded: another node sent the call on; it is answered here or
    nowhere. unreachable: an owner that was asked already, and did not answer. redirects: the caller would rather be
    told where to go than be forwarded.
    """

    tenant: str
    deadline_ms: int | None
    forwarded: bool = False
    unreachable: Owner | None = None
    redirects: bool = False


class OwnedElsewhere(Unavailable):
    """Another live node owns the session; nothing was done. owner: which."""

    def __init__(self, session_id: str, owner: Owner) -> None:
        where = {"session_id": session_id, "owner_node": owner.name, "owner_address": owner.address}
        super().__init__("NOT_OWNER", f"Session {session_id!r} is owned by node {owner.name!r}.", where)
        self.owner = owner


class Judge(Protocol):
    """Says what became of other nodes; `tiers.peers.Peers` in a daemon."""

    def verdict(self, owner: Owner) -> Verdict:
        """Whether the owner lives, by its lease as it is read now. Blocks. Raises as the store does."""
        ...

    def living(self) -> list[Owner]:
        """The other nodes that hold their leases. Blocks. Raises as the store does."""
        ...


@dataclass
class Parts:
    """What the service works with; `daemon` wires it."""

    hot: Environment
    store: ObjectStore
    bucket: Bucket
    node: Node
    lease: Lease
    flusher: Flusher
    claims: Claims
    segments: Segments
    tokenizer: Tokenizer
    executor: Executor
    counting: Executor
    clock_ms: Callable[[], int]
    expiry_ms: Callable[[], int]
    latest_ms: Callable[[], int]
    running_ms: Callable[[], int]
    turn_bytes_max: int
    default_budget_tokens: int
    serve_unconfirmed: bool = True
    # None: this node knows no others, and takes none of their sessions.
    peers: Judge | None = None
    boot_ms: Callable[[], int] = boot_clock_ms


@dataclass(frozen=True, slots=True)
class Succession:
    """What taking a session now would mean.

    loss: the row to add, turns that its last owner may have acknowledged. takeable: False while its owner may be alive
    and can't be asked.
    """

    loss: list[int] | None
    takeable: bool
    # The owner may have turns that the cloud tier lacks, and can't be asked.
    unseen: bool = False


@dataclass
class Moves:
    """How sessions came to this node, since the start."""

    claims: int = 0
    steals: int = 0
    rescues: dict[str, int] = field(default_factory=dict)


class _Looks(Generic[Key, Result]):
    """Reads that callers share, each getting one that began after it asked: two at a time for one key, at most."""

    def __init__(self) -> None:
        self._begun = 0
        self._running: dict[Key, asyncio.Task[tuple[int, Result | SessiondError]]] = {}

    async def look(self, key: Key, read: Callable[[], Awaitable[Result]]) -> Result:
        """What a read finds that begins from now on. Raises as it does."""
        asked = self._begun
        while True:
            task = self._running.get(key)
            if task is None:
                task = self._running[key] = asyncio.ensure_future(self._read(key, read))
            begun, found = await asyncio.shield(task)
            if begun <= asked:
                continue
            if isinstance(found, SessiondError):
                raise found
            return found

    async def _read(self, key: Key, read: Callable[[], Awaitable[Result]]) -> tuple[int, Result | SessiondError]:
        self._begun += 1
        begun = self._begun
        try:
            return begun, await read()
        except SessiondError as error:
            return begun, error
        finally:
            # Before anybody hears of it: one who comes later must find no read that is over.
            self._running.pop(key, None)


class Ownership:
    """The sessions of this node, and the way to those that are not."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._hot = parts.hot
        self._loads: _Looks[bytes, Cold | None] = _Looks()
        self._verdicts: _Looks[tuple[str, bytes], Verdict] = _Looks()
        self._claiming: dict[bytes, asyncio.Task[bool]] = {}
        self._settling: dict[bytes, asyncio.Task[None]] = {}
        self.creating: set[asyncio.Future[bool]] = set()
        self.draining = False
        self.moves = Moves()
        # Called when this node has taken a session over turns of its own that no log has: (hash, their epoch).
        self.on_reclaimed: Callable[[bytes, int], Awaitable[None]] = _nothing
        # When sessions were last read, the newest last: reading writes nothing. Those read just now have no date yet.
        self._resumed_ms: dict[bytes, int] = {}
        self._read: set[bytes] = set()
        self._dating = threading.Lock()

    async def off_loop(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of work that asks the store; a thread waits for it."""
        return await asyncio.get_running_loop().run_in_executor(self._parts.executor, work, *arguments)

    async def counted(self, size_bytes: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """The result of work that counts tokens of so many bytes."""
        if size_bytes <= INLINE_COUNT_BYTES_MAX:
            return work(*arguments)
        # A pool of its own: a store that hangs must not hold up appends to sessions that are hot.
        return await asyncio.get_running_loop().run_in_executor(self._parts.counting, work, *arguments)

    # Finding a session -------------------------------------------------------------------------------------------

    async def load(self, h: bytes) -> Cold | None:
        """The session as the cloud tier has it, by a GET that began after this call: one from before may lack what was
        acknowledged elsewhere since. Callers that wait at the same time share one.
        """
        return await self._loads.look(h, lambda: self._load(h))

    async def _load(self, h: bytes) -> Cold | None:
        tenure = self.tenure()
        cold = await self.off_loop(load, self._parts.store, h)
        return None if cold is None else replace(cold, tenure=tenure)

    async def cold(self, h: bytes, session_id: str, user_id: str) -> Cold:
        """The cloud tier's copy of a session that is not hot here. Raises NotFound, Unavailable, Corrupt."""
        head = self.peek(h)
        if head is not None and head.phase == PHASE_RELEASING:
            # A release that was cut short, or that a drain waits for: until it is done, only the rows here have it all.
            await asyncio.wrap_future(self._parts.flusher.request(h, release=True))
        cold = await self.load(h)
        if cold is None:
            raise not_found(session_id)
        check_user(session_id, cold.manifest.user, user_id)
        if cold.manifest.lifecycle == LIFECYCLE_DELETED:
            if head is not None and not (head.lifecycle == LIFECYCLE_DELETED and head.tombstoned):
                await self.off_loop(self._parts.claims.note_deleted, h)
            raise log.deleted(session_id)
        if self.lifecycle(cold.manifest) == LIFECYCLE_DELETED:
            raise log.deleted(session_id)
        return cold

    def lifecycle(self, what: Head | Manifest) -> int:
        """Where a session is in its life now; its time may have come before anybody wrote that down."""
        if not what.expires_ms:
            return what.lifecycle
        return lifecycle_at(what.lifecycle, what.policy, what.expires_ms, self._parts.expiry_ms())

    def admit(self, session_id: str, head: Head, user_id: str) -> None:
        """Let a caller at a session that this node owns. Raises NotFound."""
        check_user(session_id, head.user, user_id)
        if self.lifecycle(head) == LIFECYCLE_DELETED:
            raise log.deleted(session_id)

    def resumed_ms(self, h: bytes) -> int:
        """When the session was last read from the hot tier, never too early; 0 if that is not known any more."""
        self._note_read()
        return self._resumed_ms.get(h, 0)

    def note_resumed(self, h: bytes) -> None:
        """The session was read just now."""
        self._read.add(h)
        if len(self._read) >= READ_MAX:
            self._note_read()

    def _note_read(self) -> None:
        """Date what was read since the last time: once for all, for a clock takes longer than the rest."""
        if not self._read:
            return
        with self._dating:
            # Upkeep asks on a thread of its own: what is read meanwhile is in the next set.
            read, self._read = self._read, set()
            now_ms = self._parts.running_ms()
            for h in list(read):
                self._resumed_ms.pop(h, None)
                self._resumed_ms[h] = now_ms
            while len(self._resumed_ms) > RESUMED_MAX:
                del self._resumed_ms[next(iter(self._resumed_ms))]

    def peek(self, h: bytes) -> Head | None:
        """The session's head row, whatever its phase."""
        with self._hot.read() as transaction:
            return log.read_head(transaction, h)

    async def settle_doubt(self, h: bytes) -> None:
        """After this returns the session is not doubted: ours, released or fenced. Raises as the store does."""
        head = self.peek(h)
        if head is None or head.phase != PHASE_DOUBTED:
            return
        task = self._settling.get(h)
        if task is None:
            task = asyncio.ensure_future(self.off_loop(self._parts.flusher.settle_doubt, h))
            self._settling[h] = task
            task.add_done_callback(lambda _: self._settling.pop(h, None))
        await asyncio.shield(task)

    # Taking a session ------------------------------------------------------------------------------------------------

    async def succession(self, call: Call, cold: Cold) -> Succession:
        """What taking this session now would mean, by its manifest as it was just read.

        Raises OwnedElsewhere where its owner is to be asked first, and as the store does.
        """
        manifest = cold.manifest
        if manifest.owner is None:
            return Succession(None, True)
        owner = Owner(bytes(manifest.owner[0]), str(manifest.owner[1]), str(manifest.owner[2]))
        node, asked = self._parts.node, call.unreachable
        if owner.incarnation == node.incarnation:
            head = self.peek(manifest.h)
            known = head is not None and head.phase != PHASE_FENCED
            ours = head is not None and (
                manifest.epoch in (head.epoch, claimed_epoch(head)) or is_claim_of(head, manifest)
            )
            if known and ours:
                # A claim of our own is on its way into the rows, or a release on its way out.
                return Succession(None, True)
        elif owner.name == node.name and self._parts.lease.is_valid():
            pass  # this node holds its name, and not its rows: the owner's hot tier is gone
        elif owner.name != node.name and (asked is None or asked.incarnation != owner.incarnation):
            raise OwnedElsewhere(manifest.session, owner)
        elif self._parts.peers is None:
            return out_of_reach(manifest)
        else:
            # After the manifest, never before: a node that came back writes the manifest before it serves from it.
            verdict = await self._verdict(owner)
            # A node that may be taken for gone itself takes nothing: two of them could take turns without end.
            if verdict.state != GONE or not self._parts.lease.is_valid():
                moved = verdict.owner if verdict.state != GONE else None
                if moved is not None and asked is not None and moved.address != asked.address:
                    raise OwnedElsewhere(manifest.session, moved)
                return out_of_reach(manifest)
        if int(manifest.policy.get("min_durability", 0)) == DURABILITY_CLOUD:
            return Succession(None, True)
        return Succession([manifest.epoch, manifest.head, REASON_LOST, 0], True)

    async def _verdict(self, owner: Owner) -> Verdict:
        """What became of a node, by a look that began after this call; callers that wait at the same time share one."""
        peers = self._parts.peers
        assert peers is not None
        return await self._verdicts.look((owner.name, owner.incarnation), lambda: self.off_loop(peers.verdict, owner))

    async def settle(self) -> None:
        """Return once no creation or claim is on its way; after `draining` is set, none begins."""
        while self.creating or self._claiming:
            await asyncio.wait({*self.creating, *self._claiming.values()})

    async def create(self, work: Callable[..., bool], *arguments: Any) -> bool:
        """Whether work made a session; it goes on where the caller gives up, and a drain waits for it."""
        creating = asyncio.ensure_future(self.off_loop(work, *arguments))
        self.creating.add(creating)
        creating.add_done_callback(self.creating.discard)
        return await asyncio.shield(creating)

    def start_claim(self, h: bytes, cold: Cold, loss: list[int] | None) -> asyncio.Task[bool]:
        """Take the session; one claim at a time."""
        task = self._claiming.get(h)
        if task is None:
            task = asyncio.ensure_future(self._claim(h, cold, loss))
            self._claiming[h] = task
            task.add_done_callback(lambda done: self._claim_done(h, done))
        return task

    def _claim_done(self, h: bytes, task: asyncio.Task[bool]) -> None:
        self._claiming.pop(h, None)
        if not task.cancelled():
            task.exception()  # whoever awaits it sees it; a background claim is tried again by the next call

    async def _claim(self, h: bytes, cold: Cold, loss: list[int] | None) -> bool:
        head = self.peek(h)
        if (
            head is not None
            and head.phase == PHASE_CLAIMING
            and await self.off_loop(self._parts.claims.resume_claim, cold, head)
        ):
            return True
        taken = await self.off_loop(self._parts.claims.claim, cold, loss, self._parts.clock_ms())
        if taken:
            self.moves.claims += 1
            self.moves.steals += cold.manifest.owner is not None
            if head is not None and is_stranded(head):
                # This node's own turns, from before it was fenced: into the log before anybody can append to it.
                await self.on_reclaimed(h, head.epoch)
        return taken

    async def settle_claim(self, h: bytes) -> None:
        """Learn what became of a claim that nobody has asked for since; its rows are owned in doubt, or gone, after it.

        Raises as the store does; it is asked again.
        """
        head = self.peek(h)
        if head is None or head.phase != PHASE_CLAIMING or h in self._claiming:
            return
        cold = await self.load(h)
        if cold is None or await self.off_loop(self._parts.claims.resume_claim, cold, head):
            return  # a creation may land yet; nobody but this node would look for it
        if cold.etag != head.etag and not is_stranded(head):
            # Another write stands there: what was sent here can't land any more.
            await self.off_loop(self._parts.claims.forget, h)

    async def take(
        self, call: Call, h: bytes, session_id: str, user_id: str, *, writes: bool = False, drains: bool = True
    ) -> None:
        """Return once this node owns the session and holds its rows. writes: in order to append to it. drains: a node
        that drains takes nothing; False for what it must take in order to leave nothing behind.

        Raises OwnedElsewhere, NotFound, Unavailable, Corrupt, Denied SESSION_ARCHIVED.
        """
        for attempt in range(OWN_ATTEMPTS_MAX):
            await self.settle_doubt(h)
            head = self.peek(h)
            if head is not None and head.phase == PHASE_OWNED:
                self.admit(session_id, head, user_id)
                return
            if self.draining and drains:
                raise await self._gone(call, h, session_id, user_id)
            claiming = self._claiming.get(h)
            if claiming is None:
                cold = await self.cold(h, session_id, user_id)
                if writes and self.lifecycle(cold.manifest) == LIFECYCLE_ARCHIVED:
                    raise log.archived(session_id)  # before a claim that would change nothing
                found = await self.succession(call, cold)
                if not found.takeable:
                    raise owner_unreachable(cold.manifest)
                claiming = self.start_claim(h, cold, found.loss)
            if not await asyncio.shield(claiming):
                await asyncio.sleep(min(0.25, 0.005 * 2**attempt))
        raise Unavailable("NOT_OWNER", f"Session {session_id!r} keeps changing hands.", {"session_id": session_id})

    async def _gone(self, call: Call, h: bytes, session_id: str, user_id: str) -> SessiondError:
        """Why a node that drains does not serve a session: another one may have it already."""
        try:
            await self.succession(call, await self.cold(h, session_id, user_id))
        except (OwnedElsewhere, NotFound) as error:
            return error
        except SessiondError:
            pass
        return draining()

    async def backfill(self, h: bytes, needed: log.HistoryNeeded) -> None:
        """Fetch the segment just below the hot rows, and put it in front of them; a single turn further back alone."""
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            value = transaction.get("manifests", h)
            if head is None or value is None:
                return  # released meanwhile: the caller looks again
            if needed.first_seq >= head.hot_first:
                try:
                    log.frame_at(transaction, h, needed.first_seq)
                except log.HistoryNeeded:
                    what = f"Turn {needed.first_seq} of session {h.hex()} is missing from its rows."
                    raise Corrupt("CORRUPT_HOT_ROW", what) from None
                return  # somebody else fetched it
            manifest = decode_committed(h, value)
        last_seq = head.hot_first - 1
        alone = needed.first_seq if needed.first_seq == needed.last_seq < last_seq else 0

        def fetch() -> None:
            if alone:
                _, _, frames = self._parts.segments.covering(manifest, alone)
                header = next(found for found in core.scan_frames(h, frames) if found.seq == alone)
                frame = frames[header.offset : header.end]
                self._hot.run_blocking(lambda txn: log.keep_frame(txn, h, alone, frame), len(frame))
                return
            first_seq, _, frames = self._parts.segments.covering(manifest, last_seq)
            self._hot.run_blocking(lambda txn: log.backfill_rows(txn, h, frames, first_seq), len(frames))

        await self.off_loop(fetch)

    def tenure(self) -> int:
        """Rises whenever this node is fenced, and again before it holds its lease anew. Taken before rows are read."""
        return self._parts.lease.tenure

    def standing(self, tenure: int) -> context_pb2.Ownership:
        """How sure this node is of what it owns, at this moment. tenure: from before the rows were read that a reply
        speaks of; a lease that was taken anew since says nothing about them.

        Raises Unavailable LEASE_LAPSED.
        """
        if self._parts.lease.is_valid() and tenure == self._parts.lease.tenure:
            return context_pb2.OWNERSHIP_CONFIRMED
        if not self._parts.serve_unconfirmed:
            raise Unavailable("LEASE_LAPSED", "The node's lease has lapsed.")
        return context_pb2.OWNERSHIP_UNCONFIRMED

    def check_not_fenced(self) -> None:
        """Raises Unavailable EPOCH_FENCED once another daemon has this node's name."""
        if self._parts.lease.lost:
            raise Unavailable("EPOCH_FENCED", "Another daemon took over this node's name.")


async def _nothing(h: bytes, epoch: int) -> None:
    """What is done where nobody rescues."""


def not_found(session_id: str) -> NotFound:
    """There is no such session, or it is another user's."""
    return NotFound("SESSION_NOT_FOUND", f"There is no session {session_id!r}.", {"session_id": session_id})


def check_user(session_id: str, actual: str, named: str) -> None:
    """A request that names another user sees no session. Raises NotFound."""
    if named and named != actual:
        raise not_found(session_id)


def draining() -> Unavailable:
    """The refusal of a node on its way out."""
    return Unavailable("NODE_DRAINING", "This node is draining.")


def owner_unreachable(manifest: Manifest) -> SessiondError:
    """The refusal where the owner does not answer and may be alive."""
    owner = manifest.owner or [b"", "", ""]
    return Unavailable(
        "OWNER_UNREACHABLE",
        f"Session {manifest.session!r} is owned by node {owner[1]!r}, which does not answer.",
        {"session_id": manifest.session, "owner_node": str(owner[1]), "owner_address": str(owner[2])},
    )


def out_of_reach(manifest: Manifest) -> Succession:
    """What can be said of a session whose owner can't be asked. One that admits only CLOUD appends is all there."""
    return Succession(None, False, int(manifest.policy.get("min_durability", 0)) != DURABILITY_CLOUD)


def unreachable(manifest: Manifest) -> context_pb2.MissingRange:
    """Turns that the present owner may have and that can't be read from here."""
    return context_pb2.MissingRange(
        first_seq=manifest.head + 1, epoch=manifest.epoch, reason=REASON_UNREACHABLE, possible_only=True
    )
