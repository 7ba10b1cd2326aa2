"""What ForkSession means: a new session that begins with the turns of another one, up to a turn of it.

It promises that the range is pinned in the parent by a definite commit before the fork exists, and that the same call
again finishes what was cut short or finds it done. It knows no gRPC.
"""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any, Final

from sessiond.core import forks, rules
from sessiond.core.layout import FLAG_BOUNDARY, Header
from sessiond.core.manifest import LIFECYCLE_DELETED, PINS_MAX, Manifest
from sessiond.errors import Conflict, Corrupt, Exhausted, Unavailable
from sessiond.service.ownership import (
    OWN_ATTEMPTS_MAX,
    Call,
    OwnedElsewhere,
    Ownership,
    Parts,
    Succession,
    check_user,
    draining,
)
from sessiond.service.prepare import check_session_id, check_user_id, invalid
from sessiond.service.sessions import Sessions, wait_until
from sessiond.tiers import fork as forking
from sessiond.tiers import pins
from sessiond.tiers.blobs import copy_blobs
from sessiond.tiers.hot import log
from sessiond.tiers.hot.rows import PHASE_CLAIMING, PHASE_OWNED, decode_committed
from sessiond.v1 import session_pb2

# Left of a caller's deadline for the reply itself.
REPLY_MARGIN_MS: Final = 20
# A parent whose blobs are written all the time is read so often.
BLOBS_ATTEMPTS_MAX: Final = 4


class Forks:
    """ForkSession, without the wire."""

    def __init__(self, parts: Parts, ownership: Ownership, sessions: Sessions) -> None:
        self._parts = parts
        self._own = ownership
        self._sessions = sessions
        # Forks that are being made: whoever asks for the same one meanwhile finds it afterwards.
        self._making: dict[bytes, asyncio.Event] = {}

    async def fork(self, call: Call, request: session_pb2.ForkSessionRequest) -> session_pb2.ForkSessionResponse:
        """Make a fork, or return the one that has this id and was forked at this turn already."""
        key = self._parts.bucket.hash_key
        h = rules.session_hash(key, call.tenant, check_session_id(request.session_id))
        check_user_id(request.user_id)
        session_id = request.new_session_id or str(uuid.uuid4())
        check_session_id(session_id, "new_session_id")
        epoch, seq = place(request)
        if session_id == request.session_id:
            raise exists(session_id)
        fork_h = rules.session_hash(key, call.tenant, session_id)
        self._own.check_not_fenced()
        while (making := self._making.get(fork_h)) is not None:
            await making.wait()
        made = self._making[fork_h] = asyncio.Event()
        try:
            return await self._fork(call, request, h, fork_h, session_id, epoch, seq)
        finally:
            del self._making[fork_h]
            made.set()

    async def _fork(
        self,
        call: Call,
        request: session_pb2.ForkSessionRequest,
        h: bytes,
        fork_h: bytes,
        session_id: str,
        epoch: int,
        seq: int,
    ) -> session_pb2.ForkSessionResponse:
        if request.new_session_id and (known := await self._known(call, request, fork_h, epoch, seq)):
            return session_pb2.ForkSessionResponse(session=known, created=False)
        if self._own.draining:
            raise draining()
        for attempt in range(BLOBS_ATTEMPTS_MAX):
            parent, at = await self._pinned(call, request, h, fork_h, session_id, epoch, seq)
            try:
                made = await self._own.off_loop(self._make, parent, at, fork_h, session_id)
                break
            except Corrupt as error:
                # A blob that was written again meanwhile; by the next manifest its object is another one.
                if error.reason != "MISSING_BLOB" or attempt == BLOBS_ATTEMPTS_MAX - 1:
                    raise
        created = await self._own.create(self._create, made)
        session = await self._known(call, request, fork_h, epoch, seq)
        if session is None:
            raise Unavailable("STORE_UNAVAILABLE", f"The fork {session_id!r} was made and can't be found.")
        return session_pb2.ForkSessionResponse(session=session, created=created)

    def _make(self, parent: Manifest, at: Header, h: bytes, session_id: str) -> forking.Fork:
        parts = self._parts
        made = forking.make(parts.segments, parts.node, parent, at, h, session_id, parts.latest_ms())
        made.manifest.state_keys = copy_blobs(parts.store, parent, made.manifest, parts.claims.put_object)
        return made

    def _create(self, made: forking.Fork) -> bool:
        if made.index is not None:
            self._parts.claims.put_object(*made.index)
        return self._parts.claims.create(made.manifest, made.rows)

    async def _known(
        self, call: Call, request: session_pb2.ForkSessionRequest, h: bytes, epoch: int, seq: int
    ) -> session_pb2.Session | None:
        """The session that has the new id, if it is this very fork; None if there is none.

        Raises Conflict SESSION_EXISTS if it is another session, NotFound SESSION_DELETED.
        """
        head = self._own.peek(h)
        if head is not None and head.phase == PHASE_OWNED:
            with self._parts.hot.read() as transaction:
                manifest = decode_committed(h, transaction.get("manifests", h))
        else:
            cold = await self._own.load(h)
            if cold is None:
                return None
            manifest = cold.manifest
        session_id = manifest.session
        if manifest.lifecycle == LIFECYCLE_DELETED:
            raise log.deleted(session_id)
        birth = manifest.birth
        same = birth.get("forked_from") == request.session_id and forks.forked_seq(birth) == seq
        if not same or (epoch and epoch != birth.get("forked_epoch")):
            raise exists(session_id)
        if request.user_id and manifest.user != request.user_id:
            raise exists(session_id)
        if head is not None and head.phase == PHASE_CLAIMING:
            await self._own.take(call, h, session_id, "")  # begun by an earlier call of this node, and cut short
        try:
            return await self._sessions.describe(call, h, session_id, "")
        except OwnedElsewhere:
            return self._sessions.describe_cold(manifest, Succession(None, False))

    async def _pinned(
        self,
        call: Call,
        request: session_pb2.ForkSessionRequest,
        h: bytes,
        fork_h: bytes,
        session_id: str,
        epoch: int,
        seq: int,
    ) -> tuple[Manifest, Header]:
        """(the parent's manifest with the range pinned in it, the turn that is forked at).

        Raises as taking the parent does, Invalid INVALID_FORK, Exhausted TOO_MANY_FORKS.
        """
        parts = self._parts
        pin = [fork_h, session_id, 1, seq, parts.clock_ms()]
        for _ in range(OWN_ATTEMPTS_MAX):
            await self._own.take(call, h, request.session_id, request.user_id)
            head = self._own.peek(h)
            if head is None or head.phase != PHASE_OWNED:
                continue
            if seq > head.head_seq:
                what = f"turn {seq} is not in the log, whose newest is turn {head.head_seq}"
                raise invalid("INVALID_FORK", "at", what, head_seq=str(head.head_seq))
            unneeded = await self._unneeded(h)
            future = parts.flusher.request(h, pins=partial(_repinned, pin, unneeded))
            try:
                await wait_until(asyncio.wrap_future(future), self._remaining_ms(call))
            except TimeoutError:
                what = f"The cloud tier did not confirm in time that session {request.session_id!r} can be forked."
                raise Unavailable("STORE_UNAVAILABLE", what) from None
            cold = await self._own.load(h)
            if cold is None or not pins.is_pinned(cold.manifest, fork_h, seq):
                continue  # it changed hands in between, or is deleted: the next look tells
            check_user(request.session_id, cold.manifest.user, request.user_id)
            if cold.manifest.lifecycle == LIFECYCLE_DELETED:
                raise log.deleted(request.session_id)
            at = await self._own.off_loop(forking.turn_at, parts.segments, cold.manifest, seq)
            if epoch and (at.epoch != epoch or not at.flags & FLAG_BOUNDARY):
                what = f"there is no checkpoint of epoch {epoch} at turn {seq}"
                raise invalid("INVALID_FORK", "checkpoint_version", what)
            return cold.manifest, at
        what = f"Session {request.session_id!r} keeps changing hands."
        raise Unavailable("NOT_OWNER", what, {"session_id": request.session_id})

    async def _unneeded(self, h: bytes) -> set[bytes]:
        """Forks whose pins can go, looked for only where there is no room for another. Raises Exhausted."""
        with self._parts.hot.read() as transaction:
            manifest = decode_committed(h, transaction.get("manifests", h))
        if len(manifest.pins) < PINS_MAX:
            return set()
        needed = await self._own.off_loop(pins.needed, self._parts.store, manifest, self._parts.clock_ms())
        if len(needed) >= PINS_MAX:
            what = f"Session {manifest.session!r} has {len(needed)} forks; the limit is {PINS_MAX}."
            raise Exhausted("TOO_MANY_FORKS", what, {"session_id": manifest.session, "limit": str(PINS_MAX)})
        return {bytes(pin[0]) for pin in manifest.pins} - {bytes(pin[0]) for pin in needed}

    def _remaining_ms(self, call: Call) -> int | None:
        if call.deadline_ms is None:
            return None
        return max(0, call.deadline_ms - self._parts.boot_ms() - REPLY_MARGIN_MS)


def _repinned(pin: list[Any], unneeded: set[bytes], known: list[Any]) -> list[Any]:
    kept = [row for row in known if bytes(row[0]) not in unneeded] if unneeded else known
    return pins.with_pin(kept, pin)


def place(request: session_pb2.ForkSessionRequest) -> tuple[int, int]:
    """(epoch, seq) of the turn to fork after; epoch 0 where it was named by its seq. Raises Invalid INVALID_FORK."""
    named = request.WhichOneof("at")
    if named is None:
        raise invalid("INVALID_FORK", "at", "neither a seq nor a checkpoint's version is given")
    if named == "seq":
        epoch, seq = 0, request.seq
    else:
        epoch, seq = request.checkpoint_version >> 32, request.checkpoint_version & 0xFFFFFFFF
        if not epoch:
            raise invalid("INVALID_FORK", "checkpoint_version", f"{request.checkpoint_version} names no epoch")
    if not seq:
        raise invalid("INVALID_FORK", named, "turns count from 1")
    return epoch, seq


def exists(session_id: str) -> Conflict:
    """The id that a fork is to have is another session's."""
    return Conflict(
        "SESSION_EXISTS",
        f"The session id {session_id!r} is taken.",
        {"session_id": session_id},
        [("new_session_id", "taken")],
    )
