"""Turns that a fenced node had acknowledged: brought into the log once, or listed where it went on without them. Blobs,
brought back where nobody wrote over them since.

It promises that a fenced node drops its rows only when their turns are committed in the cloud tier, as turns of the log
or as a listed orphan, and that no turn is applied twice. It never decides who owns a session.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from functools import partial
from itertools import islice
from typing import Any, Final

import msgpack

from sessiond import core
from sessiond.core import blobs as blob_rules
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.layout import HEADER_BYTES, PREFIX_BYTES
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_DELETED
from sessiond.errors import SessiondError, Unavailable, reason_of
from sessiond.service.ownership import Call, Ownership, Parts
from sessiond.service.prepare import prepare_turn
from sessiond.service.router import PeerTransport, PeerUnreachable
from sessiond.tiers.blobs import fetch
from sessiond.tiers.hot import blobs as hot_blobs
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Transaction
from sessiond.tiers.hot.log import PreparedTurn
from sessiond.tiers.hot.rows import (
    PHASE_CLAIMING,
    PHASE_FENCED,
    PHASE_OWNED,
    Head,
    decode_committed,
    encode_committed,
)
from sessiond.tiers.hydrate import is_stranded, load, read_orphan
from sessiond.tiers.peers import Owner
from sessiond.tokens import Tokenizer
from sessiond.v1 import node_pb2, turn_pb2

APPLIED: Final = node_pb2.RESCUE_OUTCOME_APPLIED
KNOWN: Final = node_pb2.RESCUE_OUTCOME_KNOWN
LISTED: Final = node_pb2.RESCUE_OUTCOME_LISTED
DELETED: Final = node_pb2.RESCUE_OUTCOME_DELETED
ATTEMPTS_MAX: Final = 8
# How long the owner may take to commit what it was offered.
OFFER_S: Final = 30.0
EVERY_S: Final = 0.5
IN_FLIGHT_MAX: Final = 8
QUEUE_MAX: Final = 1024
# A session whose turns could not be brought anywhere is tried again after so long.
RETRY_FIRST_S: Final = 1.0
RETRY_LAST_S: Final = 30.0
BODY_DERIVED: Final = 27


class Rescues:
    """Both ends of a rescue: offering what this node was fenced with, and taking what others offer."""

    def __init__(self, parts: Parts, ownership: Ownership, peers: PeerTransport) -> None:
        self._parts = parts
        self._hot = parts.hot
        self._own = ownership
        self._peers = peers
        self._due: dict[bytes, float] = {}
        self._backoff_s: dict[bytes, float] = {}
        # What is due, gathered so many at a time.
        self._queue: deque[bytes] = deque()
        self._offering: dict[bytes, asyncio.Task[None]] = {}
        self.outcomes: Counter[str] = Counter()
        self.last_error = ""

    # Offering --------------------------------------------------------------------------------------------------------

    def note(self, h: bytes) -> None:
        """A session is fenced here and has turns that the cloud tier lacks. From any thread."""
        self._due.setdefault(h, 0.0)

    async def run(self) -> None:
        """Offer what is noted, until cancelled. A node that drains says when: `settle`."""
        while True:
            if not self._own.draining:
                self.offer_due()
            if len(self._offering) < IN_FLIGHT_MAX:
                await asyncio.sleep(EVERY_S)
            else:
                await asyncio.wait(self._offering.values(), return_when=asyncio.FIRST_COMPLETED)

    def offer_due(self) -> None:
        """Begin to offer what is due now."""
        if not self._queue:
            now_s = self._parts.boot_ms() / 1000
            self._queue.extend(islice((h for h, due_s in list(self._due.items()) if due_s <= now_s), QUEUE_MAX))
        self._begin(self._queue)

    async def settle(self) -> None:
        """Offer everything that is noted, once, and return when that is done."""
        left = deque(self._due)
        while left or self._offering:
            self._begin(left)
            if self._offering:
                await asyncio.wait(self._offering.values(), return_when=asyncio.FIRST_COMPLETED)

    def _begin(self, waiting: deque[bytes]) -> None:
        """Begin with as many as there is room for."""
        while waiting and len(self._offering) < IN_FLIGHT_MAX:
            h = waiting.popleft()
            if h in self._due and h not in self._offering:
                task = self._offering[h] = asyncio.ensure_future(self._try(h))
                task.add_done_callback(partial(self._ended, h))

    def _ended(self, h: bytes, task: asyncio.Task[None]) -> None:
        del self._offering[h]

    async def _try(self, h: bytes) -> None:
        try:
            await self.offer(h)
        except Exception as error:  # whatever it is, the rows stay, and another time comes
            self.last_error = reason_of(error)
            wait_s = min(RETRY_LAST_S, 2 * self._backoff_s.get(h, RETRY_FIRST_S / 2))
            self._backoff_s[h] = wait_s
            self._due[h] = self._parts.boot_ms() / 1000 + wait_s
        else:
            self._due.pop(h, None)
            self._backoff_s.pop(h, None)

    async def offer(self, h: bytes) -> None:
        """Bring a fenced session's turns into its log, or have them listed; then drop the rows here. The turns behind a
        claim that was cut short likewise: whoever owns the session meanwhile has no other way to them.

        Raises Unavailable, Corrupt, PeerUnreachable; the rows stay then.
        """
        head = self._own.peek(h)
        if head is not None and head.phase == PHASE_CLAIMING and not is_stranded(head):
            await self._own.settle_claim(h)
        if head is None or not (head.phase == PHASE_FENCED or is_stranded(head)):
            return
        blobs = await self._own.off_loop(self._parts.claims.put_fenced_blobs, h)
        lacks_nothing = head.head_seq <= head.cloud_seq and blobs is None
        orphan = await self._own.off_loop(self._parts.claims.put_orphan, h)
        if orphan is None and head.head_seq > head.cloud_seq:
            return  # changed meanwhile, or more than one object holds: kept on the node, and verify says so
        cold = await self._own.off_loop(load, self._parts.store, h)
        if cold is None:
            return
        if cold.manifest.lifecycle == LIFECYCLE_DELETED:
            await self._own.off_loop(self._parts.claims.note_deleted, h)
            self.outcomes["DELETED"] += 1
            return
        request = node_pb2.RescueRequest(session_hash=h, epoch=head.epoch)
        if lacks_nothing:
            if not any(row[0] == head.epoch for row in cold.manifest.loss):
                await self._drop(h, head)
                return
            # Whoever took the session could not know that nothing was lost with it.
            request.from_incarnation, request.head_seq = self._parts.node.incarnation, head.head_seq
        if orphan is not None:
            name, _, first, last, sha256 = orphan
            request.orphan, request.sha256 = str(name), bytes(sha256)
            request.turns.CopyFrom(turn_pb2.SeqRange(first_seq=int(first), last_seq=int(last)))
        if blobs is not None:
            request.blobs = msgpack.packb([blobs.before, blobs.after], use_bin_type=True)
        session, user = cold.manifest.session, cold.manifest.user
        call = Call(cold.manifest.tenant, None, forwarded=True)
        owner = cold.manifest.owner
        if owner is not None and bytes(owner[0]) != self._parts.node.incarnation:
            there = Owner(bytes(owner[0]), str(owner[1]), str(owner[2]))
            request.incarnation = there.incarnation
            try:
                response = await self._peers.rescue(there.address, request, OFFER_S)
                self._count(response.outcome)
                await self._drop(h, head)
                return
            except PeerUnreachable:
                call = Call(cold.manifest.tenant, None, forwarded=True, unreachable=there)
        # Nobody owns it, or whoever does is gone: it is taken, over the rows that are in the orphan now.
        await self._own.take(call, h, session, user, drains=False)
        if request.orphan and blobs is None and not self._is_listed(h, request.orphan):
            return  # brought into the log with the claim
        self._count((await self.apply(request)).outcome)

    async def reclaimed(self, h: bytes, epoch: int) -> None:
        """Apply turns of this node over which it took a session, before anybody appends; what fails stays listed."""
        with self._hot.read() as transaction:
            value = transaction.get("manifests", h)
            rows = [] if value is None else decode_committed(h, value).orphans
        for row in rows:
            if int(row[1]) != epoch:
                continue
            turns = turn_pb2.SeqRange(first_seq=int(row[2]), last_seq=int(row[3]))
            request = node_pb2.RescueRequest(
                session_hash=h, orphan=str(row[0]), epoch=epoch, turns=turns, sha256=bytes(row[4])
            )
            try:
                self._count((await self.apply(request)).outcome)
            except SessiondError as error:
                self.last_error = error.reason

    def _is_listed(self, h: bytes, orphan: str) -> bool:
        with self._hot.read() as transaction:
            value = transaction.get("manifests", h)
            return value is not None and any(row[0] == orphan for row in decode_committed(h, value).orphans)

    def _count(self, outcome: int) -> None:
        self.outcomes[node_pb2.RescueOutcome.Name(outcome).removeprefix("RESCUE_OUTCOME_")] += 1

    async def _drop(self, h: bytes, was: Head) -> None:
        bucket = self._parts.bucket

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is None or (head.phase, head.epoch, head.head_seq) != (was.phase, was.epoch, was.head_seq):
                return
            log.drop_session(transaction, h, bucket.users_key(head.tenant, head.user, head.created_ms, h))

        await self._hot.run(operation)

    # Taking ----------------------------------------------------------------------------------------------------------

    async def apply(self, request: node_pb2.RescueRequest) -> node_pb2.RescueResponse:
        """Take turns that a fenced node offers, as this session's owner: into the log if it did not go on without them,
        else into its list of orphans. Committed in the cloud tier on return.

        Raises Unavailable NOT_OWNER, Corrupt, and as the store does; nothing is lost then, and it is offered again.
        """
        h = bytes(request.session_hash)
        await self._own.settle_doubt(h)
        taken = await self._apply_blobs(h, request) if request.blobs else False
        if request.from_incarnation:
            await self._hot.run(partial(_nothing_lost, h=h, request=request, now_ms=self._parts.clock_ms()))
        if not request.orphan:
            await asyncio.wrap_future(self._parts.flusher.request(h))
            return node_pb2.RescueResponse(outcome=APPLIED if taken else KNOWN)
        row = [request.orphan, request.epoch, request.turns.first_seq, request.turns.last_seq, bytes(request.sha256)]
        frames, incarnation = await self._own.off_loop(read_orphan, self._parts.store, h, row)
        turns = await self._own.counted(
            len(frames), restored, h, frames, self._parts.bucket.hash_key, self._parts.tokenizer
        )
        clocks = self._parts.expiry_ms, self._parts.latest_ms

        def operation(transaction: Transaction) -> int | log.HistoryNeeded:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_OWNED:
                raise Unavailable("NOT_OWNER", f"This node does not own session {h.hex()} now.", {"hash": h.hex()})
            if head.lifecycle == LIFECYCLE_DELETED:
                return DELETED
            entries = log.turn_ids(transaction, h, head.head_seq)
            left = [turn for turn in turns if not _is_known(entries, h, turn[1])]
            outcome = KNOWN
            if left:
                outcome = LISTED
                if head.lifecycle == LIFECYCLE_ACTIVE and _follows(head, *left[0]):
                    now_ms, running_ms = self._parts.clock_ms(), self._parts.running_ms()

                    def birth() -> dict[str, str]:
                        return dict(decode_committed(h, transaction.get("manifests", h)).birth["metadata"])

                    prepared = [turn for _, turn in left]
                    try:
                        log.append(
                            transaction, h, head.session, prepared, None, None, now_ms, running_ms, *clocks, birth
                        )
                        outcome = APPLIED
                    except log.HistoryNeeded as needed:
                        return needed
                    except Unavailable:
                        raise
                    except SessiondError:
                        outcome = LISTED  # the log refuses what it would have taken then: somebody has to look
            self._note(transaction, h, row, outcome, incarnation)
            return outcome

        for _ in range(ATTEMPTS_MAX):
            done = await self._hot.run(operation, len(frames))
            if isinstance(done, int):
                break
            await self._own.backfill(h, done)
        else:
            raise Unavailable("NOT_OWNER", f"Session {h.hex()} keeps changing.", {"hash": h.hex()})
        await asyncio.wrap_future(self._parts.flusher.request(h))
        return node_pb2.RescueResponse(outcome=done)  # type: ignore[arg-type]

    async def _apply_blobs(self, h: bytes, request: node_pb2.RescueRequest) -> bool:
        """Take blobs that a fenced node offers, those that were not written since; whether there were any.

        Raises Unavailable NOT_OWNER, Corrupt, and as the store does.
        """
        before, after = msgpack.unpackb(request.blobs, raw=False, strict_map_key=True)
        rescue = blob_rules.Rescue(request.epoch, before, after)
        with self._hot.read() as transaction:
            versions = {key: blob.version for key, blob in hot_blobs.read_blobs(transaction, h)}
            moot = rescue.is_moot(hot_blobs.read_ledger(transaction, h) or blob_rules.Ledger())
        contents: dict[int, bytes] = {}
        for _, row in [] if moot else rescue.taken(versions):
            if row is not None:
                contents[int(row[1])] = await self._own.off_loop(fetch, self._parts.store, h, row)

        def operation(transaction: Transaction) -> bool:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_OWNED:
                raise Unavailable("NOT_OWNER", f"This node does not own session {h.hex()} now.", {"hash": h.hex()})
            if head.lifecycle != LIFECYCLE_ACTIVE:
                return False
            return hot_blobs.take_rescued(transaction, h, rescue, contents, self._parts.clock_ms())

        return await self._hot.run(operation, 1 + sum(map(len, contents.values())))

    def _note(self, transaction: Transaction, h: bytes, row: list[Any], outcome: int, incarnation: bytes) -> None:
        """Write down what became of an orphan: in the list, or out of it, and whether anything is missing still."""
        head = log.read_head(transaction, h)
        assert head is not None
        manifest = decode_committed(h, transaction.get("manifests", h))
        others = [known for known in manifest.orphans if known[0] != row[0]]
        manifest.orphans = [*others, row] if outcome == LISTED else others
        if outcome != LISTED and [row[1], incarnation] in [[known[0], bytes(known[1])] for known in manifest.epochs]:
            # All that was acknowledged in that epoch is in the log: these were the rows of its owner, to the last. An
            # older copy of its disk is another hot tier, and may lack what came after the copy.
            head.loss = [loss for loss in head.loss if not (loss[0] == row[1] and loss[1] + 1 >= row[2])]
        head.changes += 1
        transaction.put("manifests", h, encode_committed(h, manifest))
        log.write_head(transaction, h, head, self._parts.clock_ms())


def _nothing_lost(transaction: Transaction, h: bytes, request: node_pb2.RescueRequest, now_ms: int) -> None:
    """Forget a loss where the hot tier that owned the epoch says that there was none. Raises Unavailable NOT_OWNER."""
    head = log.read_head(transaction, h)
    if head is None or head.phase != PHASE_OWNED:
        raise Unavailable("NOT_OWNER", f"This node does not own session {h.hex()} now.", {"hash": h.hex()})
    epochs = decode_committed(h, transaction.get("manifests", h)).epochs
    if [request.epoch, request.from_incarnation] not in [[row[0], bytes(row[1])] for row in epochs]:
        return
    kept = [row for row in head.loss if row[0] != request.epoch or row[1] < request.head_seq]
    if kept != head.loss:
        head.loss = kept
        head.changes += 1
        log.write_head(transaction, h, head, now_ms)


def _is_known(entries: bytes, h: bytes, turn: PreparedTurn) -> bool:
    found = log.find_turn_id(entries, rules.turn_id_hash(h, turn.turn_id))
    return found is not None


def _follows(head: Head, turn: tuple[int, bytes], prepared: PreparedTurn) -> bool:
    """Whether a turn, by (seq, chain) as it was acknowledged, is the one after this head."""
    seq, chain = turn
    return head.head_seq == seq - 1 and rules.next_chain(states.decode(head.state).chain, prepared.digest) == chain


def restored(
    h: bytes, frames: bytes, hash_key: bytes, tokenizer: Tokenizer
) -> list[tuple[tuple[int, bytes], PreparedTurn]]:
    """((seq, chain), turn ready to be appended) of each frame, under its own turn_id. Raises Corrupt."""
    found: list[tuple[tuple[int, bytes], PreparedTurn]] = []
    for header in core.scan_frames(h, frames):
        body = frames[header.offset + HEADER_BYTES : header.end]
        turn = turn_pb2.Turn.FromString(bytes(frames[header.offset + PREFIX_BYTES : header.end]))
        again = turn_pb2.TurnInput(turn_id=turn.turn_id, role=turn.role, status=turn.status)
        which = turn.WhichOneof("body")
        if which is not None:
            getattr(again, which).CopyFrom(getattr(turn, which))
        if turn.HasField("meta"):
            again.meta.CopyFrom(turn.meta)
        prepared = prepare_turn(again, hash_key, tokenizer, 1 << 30, "turns")
        # What was acknowledged counts, to the byte: what is made anew may differ by a field that nobody knows here.
        prepared.body = rules.without_field(body, BODY_DERIVED)
        prepared.digest = header.digest
        prepared.tokens, prepared.sources = header.tokens, header.sources
        found.append(((header.seq, header.chain), prepared))
    return found
