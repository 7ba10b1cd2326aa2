"""What SessionService's calls mean: create, read, resume, append, update, list.

It promises the order of things: claim before the first acknowledgement, token counts before any lock, fsync before a
reply, the lease looked at last. It knows no gRPC and starts no thread of its own.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.layout import PREFIX_BYTES
from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, Manifest
from sessiond.core.state import State
from sessiond.errors import (
    REASONS,
    Conflict,
    Corrupt,
    Exhausted,
    NotFound,
    SessiondError,
    Unavailable,
    Unimplemented,
)
from sessiond.service import context as contexts
from sessiond.service import reset
from sessiond.service.context import ColdSource, HotSource, Source, Standing
from sessiond.service.ownership import (
    INLINE_COUNT_BYTES_MAX,
    OWN_ATTEMPTS_MAX,
    REASON_LOST,
    Call,
    OwnedElsewhere,
    Ownership,
    Parts,
    Succession,
    check_user,
    draining,
    not_found,
    out_of_reach,
    unreachable,
)
from sessiond.service.pages import open_page, seal_page
from sessiond.service.prepare import (
    Spec,
    check_metadata,
    check_policy,
    check_position,
    check_session_id,
    check_user_id,
    invalid,
    policy_proto,
    prepare_turn,
    prepare_turns,
)
from sessiond.tiers.cloud.bucket import refusal
from sessiond.tiers.cloud.store import StoreError
from sessiond.tiers.hot import blobs as hot_blobs
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, Transaction
from sessiond.tiers.hot.rows import (
    DURABILITY_CLOUD,
    DURABILITY_EDGE,
    PHASE_CLAIMING,
    PHASE_DOUBTED,
    PHASE_FENCED,
    PHASE_OWNED,
    PHASE_RELEASING,
    Head,
    decode_committed,
    unwrap_text,
)
from sessiond.tiers.hydrate import (
    Cold,
    first_manifest,
    indexed_session,
    orphan_frames,
)
from sessiond.tiers.pins import is_gone
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

LIST_PAGE_MAX: Final = 200
LIST_PAGE_DEFAULT: Final = 50
TURNS_PAGE_MAX: Final = 1000
TURNS_PAGE_DEFAULT: Final = 100
# Below the 4 MiB that a gRPC client takes by default.
PAGE_BYTES_MAX: Final = 3 * 1024**2
CONFLICT_TAIL_BYTES_MAX: Final = 1024**2
# A read that keeps finding the session changed under it gives up.
ATTEMPTS_MAX: Final = 64
# Sessions that are warmed at one time; a hint beyond that is passed over.
WARMING_MAX: Final = 256
# A hint waits for so long to hear that there is no such session, or that another node owns it.
WARM_WAIT_S: Final = 0.1
# Left of a caller's deadline for the reply itself.
REPLY_MARGIN_MS: Final = 20

Result = TypeVar("Result")


class Sessions:
    """SessionService, without the wire."""

    def __init__(self, parts: Parts, ownership: Ownership | None = None) -> None:
        self._parts = parts
        self._hot = parts.hot
        self._own = self.ownership = ownership or Ownership(parts)
        self.rungs = dict.fromkeys(("HOT", "CLOUD", "PARTIAL", "RESET"), 0)
        self.turns_appended = 0
        self._warming: set[asyncio.Future[None]] = set()
        # How another node is asked, where there are others; the daemon sets it.
        self.ask: reset.Ask | None = None

    def _hash(self, call: Call, session_id: str) -> bytes:
        return rules.session_hash(self._parts.bucket.hash_key, call.tenant, check_session_id(session_id))

    # Create, get, list -------------------------------------------------------------------------------------------

    async def create(self, call: Call, request: session_pb2.CreateSessionRequest) -> session_pb2.CreateSessionResponse:
        """Make a session, or return the one that has this id already."""
        session_id = request.session_id or str(uuid.uuid4())
        h = self._hash(call, session_id)
        check_user_id(request.user_id)
        policy = check_policy(request.policy)
        metadata = check_metadata(dict(request.metadata), "metadata")
        if self._own.draining:
            raise draining()
        self._own.check_not_fenced()
        now_ms = self._parts.latest_ms()
        if request.created_at_unix_ms >= 1 << 47:
            raise invalid("INVALID_CONTEXT", "created_at_unix_ms", "it lies beyond the year 6429")
        birth = new_birth(request.created_at_unix_ms or now_ms, metadata)
        known = self._own.peek(h)
        created = False
        if known is None or known.phase == PHASE_CLAIMING:
            manifest = first_manifest(
                self._parts.node, call.tenant, session_id, request.user_id, h, birth, policy, now_ms
            )
            created = await self._own.create(self._parts.claims.create, manifest)
        try:
            session = await self.describe(call, h, session_id, request.user_id)
        except NotFound as error:
            if error.reason == "SESSION_DELETED":
                raise
            raise Conflict(
                "SESSION_EXISTS",
                f"The session id {session_id!r} is taken.",
                {"session_id": session_id},
                [("session_id", "taken")],
            ) from error
        return session_pb2.CreateSessionResponse(session=session, created=created)

    async def get(self, call: Call, request: session_pb2.GetSessionRequest) -> session_pb2.GetSessionResponse:
        """A session without its turns."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        session = await self.describe(call, h, request.session_id, request.user_id)
        return session_pb2.GetSessionResponse(session=session)

    async def describe(self, call: Call, h: bytes, session_id: str, user_id: str) -> session_pb2.Session:
        """A session by its owner's rows, or by the cloud tier where nobody owns it. Raises as finding it does."""
        await self._own.settle_doubt(h)
        tenure = self._own.tenure()
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is not None and head.phase == PHASE_OWNED:
                self._own.admit(session_id, head, user_id)
                log.check_newest(transaction, h, head)
                manifest = decode_committed(h, transaction.get("manifests", h))
                state, missing = states.decode(head.state), self._missing(head.loss)
                return self._session_proto(head.session, head.user, manifest, state, head, missing, tenure)
        cold = await self._own.cold(h, session_id, user_id)
        return self.describe_cold(cold.manifest, await self._own.succession(call, cold))

    def describe_cold(self, manifest: Manifest, found: Succession) -> session_pb2.Session:
        """A session by its manifest. found: what taking it would mean."""
        missing = self._missing([*manifest.loss, *([found.loss] if found.loss else [])])
        if found.unseen:
            missing.append(unreachable(manifest))
        state = states.decode(manifest.state)
        return self._session_proto(manifest.session, manifest.user, manifest, state, None, missing, 0)

    def _session_proto(
        self,
        session_id: str,
        user_id: str,
        manifest: Manifest,
        state: State,
        head: Head | None,
        missing: list[context_pb2.MissingRange],
        tenure: int,
    ) -> session_pb2.Session:
        birth = manifest.birth
        lifecycle = self._own.lifecycle(head or manifest)
        owner = manifest.owner
        return session_pb2.Session(
            session_id=session_id,
            user_id=user_id,
            created_at_unix_ms=int(birth.get("created_ms", 0)),
            last_append_at_unix_ms=state.time_ms,
            policy=policy_proto(head.policy if head else manifest.policy),
            state=contexts.state_proto(state),
            pins=contexts.pin_protos(state),
            lifecycle=session_pb2.LIFECYCLE_ARCHIVED
            if lifecycle == LIFECYCLE_ARCHIVED
            else session_pb2.LIFECYCLE_ACTIVE,
            head=contexts.head_position(state),
            cloud_seq=head.cloud_seq if head else manifest.head,
            epoch=head.epoch if head else manifest.epoch,
            checkpoint=contexts.checkpoint_header(state),
            expires_at_unix_ms=head.expires_ms if head else manifest.expires_ms,
            live_messages=state.live_messages,
            live_tokens_o200k=state.live_tokens[0],
            live_tokens_cl100k=state.live_tokens[1],
            forked_from_session_id=str(birth.get("forked_from", "")),
            forked_at=turn_pb2.TurnPosition(
                epoch=int(birth["forked_epoch"]),
                seq=int(birth["forked_seq"]),
                chain=bytes(birth.get("forked_chain", b"")),
            )
            if birth.get("forked_from")
            else None,
            reset_of_session_id=str(birth.get("reset_of", "")),
            missing=missing,
            owner_node=self._parts.node.name if head else (str(owner[1]) if owner else ""),
            ownership=self._own.standing(tenure) if head else context_pb2.OWNERSHIP_CONFIRMED,
        )

    async def list_sessions(
        self, call: Call, request: session_pb2.ListSessionsRequest
    ) -> session_pb2.ListSessionsResponse:
        """Sessions of a user or of the tenant, from the index in the cloud tier, oldest first within a user."""
        user = request.user_id if request.HasField("user_id") else None
        if user is not None:
            check_user_id(user)
        size = page_size(request.page_size, LIST_PAGE_DEFAULT, LIST_PAGE_MAX)
        prefix = self._parts.bucket.user_prefix(call.tenant, user)
        query = b"sessions" + prefix.encode()
        start_after = ""
        if request.page_token:
            place = open_page(self._parts.bucket.hash_key, query, request.page_token)
            start_after = prefix + str(place[0])

        def page() -> list[str]:
            try:
                return [row.key for row in self._parts.store.list(prefix, start_after, size)]
            except StoreError as error:
                raise refusal(error) from error

        try:
            keys = await self._own.off_loop(page)
        except Unavailable:
            return self._list_hot(call, user, size, query, request.page_token and start_after)
        hashes = [bytes.fromhex(key.rsplit("-", 1)[1]) for key in keys]
        found = await asyncio.gather(*(self._listed(call, key, h) for key, h in zip(keys, hashes, strict=True)))
        response = session_pb2.ListSessionsResponse()
        for item in found:
            if isinstance(item, session_pb2.Session):
                response.sessions.append(item)
            elif item is not None:
                response.unreadable.append(item)
        if len(keys) == size:
            response.next_page_token = seal_page(self._parts.bucket.hash_key, query, [keys[-1].removeprefix(prefix)])
        return response

    def _list_hot(
        self, call: Call, user: str | None, size: int, query: bytes, start_after: str
    ) -> session_pb2.ListSessionsResponse:
        """The sessions that this node owns: all that can be said while the index in the cloud tier can't be read."""
        bucket = self._parts.bucket
        prefix = bucket.tenant_hash(call.tenant) + (bucket.user_hash(call.tenant, user) if user is not None else b"")
        # Both indexes are in the same order, so that a listing may change from one to the other between two pages.
        start = b"" if not start_after else _users_key(start_after) + b"\0"
        response = session_pb2.ListSessionsResponse(incomplete=True)
        last = ""
        tenure = self._own.tenure()
        with self._hot.read() as transaction:
            for key, name in transaction.scan("users", prefix, start):
                h = key[-16:]
                try:
                    head = log.read_head(transaction, h)
                except Corrupt as error:
                    response.unreadable.add(session_id=unwrap_text(h, "users", name), reason=error.reason)
                    continue
                if head is None or head.phase != PHASE_OWNED or self._own.lifecycle(head) == LIFECYCLE_DELETED:
                    continue
                if len(response.sessions) == size:
                    response.next_page_token = seal_page(bucket.hash_key, query, [last])
                    break
                last = bucket.user_index_key(head.tenant, head.user, head.created_ms, h).removeprefix(
                    bucket.user_prefix(call.tenant, user)
                )
                manifest = decode_committed(h, transaction.get("manifests", h))
                state, missing = states.decode(head.state), self._missing(head.loss)
                response.sessions.append(
                    self._session_proto(head.session, head.user, manifest, state, head, missing, tenure)
                )
        return response

    async def _listed(
        self, call: Call, key: str, h: bytes
    ) -> session_pb2.Session | session_pb2.UnreadableSession | None:
        try:
            await self._own.settle_doubt(h)
            tenure = self._own.tenure()
            with self._hot.read() as transaction:
                head = log.read_head(transaction, h)
                if head is not None and head.phase == PHASE_OWNED:
                    manifest = decode_committed(h, transaction.get("manifests", h))
                    if not self._is_indexed_by(key, manifest) or self._own.lifecycle(head) == LIFECYCLE_DELETED:
                        return None
                    missing = self._missing(head.loss)
                    return self._session_proto(
                        head.session, head.user, manifest, states.decode(head.state), head, missing, tenure
                    )
            cold = await self._own.load(h)
            # A row of the index without a manifest is a creation that was never acknowledged.
            if cold is None or self._own.lifecycle(cold.manifest) == LIFECYCLE_DELETED:
                return None
            if not self._is_indexed_by(key, cold.manifest):
                return None
            try:
                found = await self._own.succession(call, cold)
            except OwnedElsewhere:
                found = out_of_reach(cold.manifest)  # nobody is asked for the sake of a list: it shows what is flushed
            return self.describe_cold(cold.manifest, found)
        except Corrupt as error:
            name = await self._own.off_loop(indexed_session, self._parts.store, key)
            return session_pb2.UnreadableSession(session_id=name, reason=error.reason)

    def _is_indexed_by(self, key: str, manifest: Manifest) -> bool:
        """Whether a row of the index is the session's own, and not left by a creation that came second."""
        created_ms = int(manifest.birth.get("created_ms", 0))
        return key == self._parts.bucket.user_index_key(manifest.tenant, manifest.user, created_ms, manifest.h)

    # Resume ------------------------------------------------------------------------------------------------------

    async def resume(self, call: Call, request: session_pb2.ResumeSessionRequest) -> bytes:
        """The active context within a budget: ActiveContext's wire bytes."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        check_position(request.highest_acked, "highest_acked")
        new_id = request.reset_to_session_id
        if not new_id:
            return await self._resume(call, h, request)
        check_session_id(new_id, "reset_to_session_id")
        if new_id == request.session_id:
            raise invalid("INVALID_SESSION_ID", "reset_to_session_id", "it is the id of the session that is lost")
        if request.read_only:
            what = "it makes a session, which read_only rules out"
            raise invalid("INVALID_CONTEXT", "reset_to_session_id", what)
        try:
            return await self._resume(call, h, request)
        except Corrupt as error:
            if not reset.is_for_good(error):
                raise
            lost = error
        return await self._reset(call, h, request, lost)

    async def _reset(self, call: Call, h: bytes, request: session_pb2.ResumeSessionRequest, lost: Corrupt) -> bytes:
        """Make a session in the place of a lost one, and resume that; the same again once it is there."""
        parts, new_id = self._parts, request.reset_to_session_id
        elsewhere = await reset.asked_elsewhere(parts, self._own, self.ask, call, request, lost)
        if elsewhere is not None:
            return session_pb2.ResumeSessionResponse.FromString(elsewhere).context.SerializeToString()
        left = await reset.what_is_left(parts, self._own, h, request.session_id, request.user_id)
        new_h = self._hash(call, new_id)
        if self._own.draining:
            raise draining()
        self._own.check_not_fenced()
        known = self._own.peek(new_h)
        if known is None or known.phase == PHASE_CLAIMING:
            now_ms = parts.latest_ms()
            birth = new_birth(now_ms, left.metadata) | {"reset_of": request.session_id}
            manifest = first_manifest(parts.node, call.tenant, new_id, left.user, new_h, birth, left.policy, now_ms)
            await self._own.create(parts.claims.create, manifest)
        await reset.check_linked(parts, self._own, new_h, new_id, request.session_id)
        fresh = session_pb2.ResumeSessionRequest(session_id=new_id, user_id=request.user_id, context=request.context)
        return await self._resume(call, new_h, fresh, reset_of=request.session_id)

    async def _resume(
        self, call: Call, h: bytes, request: session_pb2.ResumeSessionRequest, reset_of: str = ""
    ) -> bytes:
        if request.HasField("accept_missing"):
            await self._accept_missing(call, h, request)
        spec: Spec | None = None
        fetched = False
        unread: list[context_pb2.MissingRange] = []
        for _ in range(ATTEMPTS_MAX):
            tenure = self._own.tenure()
            with self._hot.read() as transaction:
                head = log.read_head(transaction, h)
                if head is not None and head.phase == PHASE_OWNED:
                    self._own.admit(request.session_id, head, request.user_id)
                    if spec is None:
                        spec = self._inline_spec(request.context, head.policy)
                    if spec is not None:
                        state = states.decode(head.state)
                        source = HotSource(transaction, h, head)
                        standing = self._standing(request, head, state, source, tenure)
                        if fetched and standing.rung == context_pb2.RUNG_HOT:
                            standing.rung = context_pb2.RUNG_CLOUD
                        note_unread(standing, unread)
                        note_reset(standing, reset_of)
                        try:
                            reply = contexts.build(source, h, state, spec, standing)
                        except log.HistoryNeeded as error:
                            needed = error
                        else:
                            self._count_rung(standing.rung)
                            self._own.note_resumed(h)
                            break
            if head is None or head.phase != PHASE_OWNED:
                if head is not None and head.phase == PHASE_DOUBTED:
                    await self._own.settle_doubt(h)
                    continue
                return await self._resume_cold(call, h, request, reset_of)
            if spec is None:
                spec = await self._spec(request.context, head.policy)
                continue
            try:
                await self._own.backfill(h, needed)
            except Corrupt as error:
                with self._hot.read() as transaction:
                    manifest = decode_committed(h, transaction.get("manifests", h))
                await self._pass_over(manifest, needed.last_seq, unread, error)
            fetched = True
        else:
            raise Unavailable("NOT_OWNER", f"Session {request.session_id!r} keeps changing.", retry_after_ms=100)
        if request.HasField("highest_acked") and head.loss:
            await self._note_reached(h, request)
        return reply

    def _count_rung(self, rung: int) -> None:
        """A context was served from this rung."""
        self.rungs[context_pb2.Rung.Name(rung).removeprefix("RUNG_")] += 1

    def _inline_spec(self, proto: context_pb2.ContextSpec, policy: dict[str, Any]) -> Spec | None:
        """The checked spec if it needs no counting worth a thread, else None."""
        if proto.ByteSize() > INLINE_COUNT_BYTES_MAX:
            return None
        return Spec(proto, policy, self._parts.tokenizer, self._parts.default_budget_tokens, "context")

    async def _spec(self, proto: context_pb2.ContextSpec, policy: dict[str, Any]) -> Spec:
        parts = self._parts
        return await self._own.counted(
            proto.ByteSize(), Spec, proto, policy, parts.tokenizer, parts.default_budget_tokens, "context"
        )

    def _missing(self, loss: list[list[int]]) -> list[context_pb2.MissingRange]:
        return contexts.missing_ranges(loss)

    def _standing(
        self, request: session_pb2.ResumeSessionRequest, head: Head, state: State, source: Source | None, tenure: int
    ) -> Standing:
        """How a hot session is served: HOT, or PARTIAL where something is or may be missing."""
        standing = Standing(
            rung=context_pb2.RUNG_HOT,
            ownership=self._own.standing(tenure),
            node=self._parts.node.name,
            head_seq=head.head_seq,
            cloud_seq=head.cloud_seq,
        )
        self._judge(standing, request, head.loss, state, source)
        return standing

    def _judge(
        self,
        standing: Standing,
        request: session_pb2.ResumeSessionRequest,
        loss: list[list[int]],
        state: State,
        source: Source | None,
    ) -> None:
        """Fill in what is missing, from what was lost and from what the caller knows."""
        acked = request.highest_acked
        knows = request.HasField("highest_acked")
        proved = self._proved(source, state, acked) if knows else None
        accepts = request.accept_missing if request.HasField("accept_missing") else -1
        for row in loss:
            epoch, after_seq, reason, accepted = row[:4]
            if knows and acked.epoch <= epoch:
                if proved or (proved is None and acked.seq <= after_seq):
                    continue  # all that this caller had acknowledged is in the log
                if proved is None and not accepted and acked.seq <= standing.head_seq:
                    continue  # by seq alone: it was appended again since
                if accepted and accepts != epoch:
                    # Others went on without these turns; whoever had them acknowledged must hear of it.
                    lost = context_pb2.MissingRange(first_seq=after_seq + 1, last_seq=acked.seq, epoch=epoch)
                    lost.reason = reason  # type: ignore[assignment]
                    standing.missing.append(lost)
                    continue
            standing.missing += self._missing([row])
        beyond = knows and acked.seq > standing.head_seq
        unlike = proved is False and not beyond and not standing.missing and accepts != acked.epoch
        if beyond or unlike:
            standing.stale = True
            gone = context_pb2.MissingRange(
                first_seq=standing.head_seq + 1 if beyond else acked.seq,
                last_seq=acked.seq,
                epoch=acked.epoch,
                reason=REASON_LOST,
            )
            if gone not in standing.missing:
                standing.missing.append(gone)
        version = state.boundary[0] << 32 | state.boundary[1]
        if request.known_checkpoint_version > version:
            standing.stale = True
        if standing.missing:
            standing.rung = context_pb2.RUNG_PARTIAL
            first = standing.missing[0]
            standing.notice = (
                "The end of this conversation may be missing: "
                f"messages after number {first.first_seq - 1} were not all recovered."
            )

    def _proved(self, source: Source | None, state: State, acked: turn_pb2.TurnPosition) -> bool | None:
        """Whether the log holds what a caller had acknowledged, where its chain can tell; None where it can't."""
        if source is None or not acked.chain or not acked.seq:
            return None
        try:
            return contexts.holds(source, state, acked)
        except log.HistoryNeeded:
            return None

    async def _accept_missing(self, call: Call, h: bytes, request: session_pb2.ResumeSessionRequest) -> None:
        """Go on without turns of an epoch that may be missing; durable before the reply."""
        if request.read_only:
            what = "it changes the session, which read_only rules out"
            raise invalid("INVALID_CONTEXT", "accept_missing", what)
        await self._own.take(call, h, request.session_id, request.user_id)
        await self._settle_loss(h, lambda row: row[0] == request.accept_missing, accepted=True)

    async def _note_reached(self, h: bytes, request: session_pb2.ResumeSessionRequest) -> None:
        """A caller had turns acknowledged that were lost, and the log has reached them again: they were re-appended."""
        acked = request.highest_acked
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is None:
                return
            source = HotSource(transaction, h, head)
            if acked.chain and not self._proved(source, states.decode(head.state), acked):
                return

        def reached(row: list[int]) -> bool:
            return acked.epoch <= row[0] and row[1] < acked.seq <= head.head_seq and not row[3]

        if any(map(reached, head.loss)):
            await self._settle_loss(h, reached, accepted=False)

    async def _settle_loss(self, h: bytes, settled: Callable[[list[int]], bool], *, accepted: bool) -> None:
        """Mark losses as accepted, or forget those that were made good."""
        now_ms = self._parts.clock_ms()

        def operation(transaction: Transaction) -> None:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_OWNED:
                return
            if accepted:
                kept = [[*row[:3], 1] if settled(row) else row for row in head.loss]
                of_blobs = hot_blobs.accept_loss(transaction, h, settled)
            else:
                kept, of_blobs = [row for row in head.loss if not settled(row)], False
            if kept != head.loss or of_blobs:
                head.loss = kept
                head.changes += 1
                log.write_head(transaction, h, head, now_ms)

        await self._hot.run(operation)

    async def _pass_over(
        self, manifest: Manifest, seq: int, unread: list[context_pb2.MissingRange], error: Corrupt
    ) -> None:
        """Note that the parent's segment with this turn can't be read, so that a fork is served without it.

        Raises the error where it is about a segment of the session's own, or was noted before.
        """
        rows = await self._own.off_loop(self._parts.segments.rows, manifest)
        row = next((row for row in rows if row[1] <= seq <= row[2]), None)
        if row is None or not row[8] or not reset.is_for_good(error):
            raise error
        first, last, reason = int(row[1]), int(row[2]), context_pb2.MISSING_REASON_SEGMENT_UNREADABLE
        gone = error.reason == "MISSING_SEGMENT" and await self._own.off_loop(is_gone, self._parts.store, row[8])
        if gone:
            theirs = [other for other in rows if other[8] == row[8]]
            first, last, reason = int(theirs[0][1]), int(theirs[-1][2]), context_pb2.MISSING_REASON_PARENT_ERASED
        if any(known.first_seq <= seq <= known.last_seq for known in unread):
            raise error
        unread.append(context_pb2.MissingRange(first_seq=first, last_seq=last, reason=reason))

    async def _resume_cold(
        self, call: Call, h: bytes, request: session_pb2.ResumeSessionRequest, reset_of: str
    ) -> bytes:
        """Serve a session from the cloud tier, and claim it behind the reply where no live node owns it."""
        cold = await self._own.cold(h, request.session_id, request.user_id)
        manifest = cold.manifest
        spec = await self._spec(request.context, manifest.policy)
        state = states.decode(manifest.state)
        standing = Standing(
            rung=context_pb2.RUNG_CLOUD,
            ownership=context_pb2.OWNERSHIP_CONFIRMED,
            node=self._parts.node.name,
            head_seq=manifest.head,
            cloud_seq=manifest.head,
        )
        losses = list(manifest.loss)
        # What is read-only needs no owner.
        claimable = self._own.lifecycle(manifest) == LIFECYCLE_ACTIVE
        found = await self._own.succession(call, cold)
        if found.loss is not None:
            losses.append(found.loss)
        source = ColdSource(manifest)
        self._judge(standing, request, losses, state, source)
        if found.unseen:
            standing.rung = context_pb2.RUNG_PARTIAL
            standing.ownership = context_pb2.OWNERSHIP_UNCONFIRMED
            standing.missing.append(unreachable(manifest))
            standing.notice = standing.notice or "The newest part of this conversation can't be reached at the moment."
        note_reset(standing, reset_of)
        unread: list[context_pb2.MissingRange] = []
        for _ in range(ATTEMPTS_MAX * 16):
            try:
                reply = contexts.build(source, h, state, spec, standing)
                break
            except log.HistoryNeeded as error:
                needed = error
            try:
                fetched = await self._own.off_loop(self._parts.segments.covering, manifest, needed.first_seq)
                source.add(*fetched)
            except Corrupt as error:
                await self._pass_over(manifest, needed.first_seq, unread, error)
                note_unread(standing, unread[-1:])
        else:
            raise Unavailable("STORE_UNAVAILABLE", "The window needs too many segments.")
        if (
            claimable
            and found.takeable
            and not request.read_only
            and not self._own.draining
            and not self._parts.lease.lost
        ):
            self._own.start_claim(h, cold, found.loss)
            self._own.note_resumed(h)
        self._count_rung(standing.rung)
        return reply

    # Warm --------------------------------------------------------------------------------------------------------

    async def warm(self, call: Call, request: session_pb2.WarmSessionRequest) -> session_pb2.WarmSessionResponse:
        """Have a session hot soon; the reply does not wait for it. Only a session that is not there is refused."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        head = self._own.peek(h)
        if head is not None and head.phase == PHASE_OWNED:
            self._own.admit(request.session_id, head, request.user_id)
            self._own.note_resumed(h)
            return session_pb2.WarmSessionResponse(hot=True)
        if self._own.draining or len(self._warming) >= WARMING_MAX or self._hot.is_full():
            return session_pb2.WarmSessionResponse()
        looking = asyncio.ensure_future(self._look_to_warm(call, h, request))
        self._warming.add(looking)
        looking.add_done_callback(self._warmed)
        await asyncio.wait({looking}, timeout=WARM_WAIT_S)
        if looking.done() and isinstance(looking.exception(), (NotFound, OwnedElsewhere)):
            looking.result()
        return session_pb2.WarmSessionResponse()

    def _warmed(self, task: asyncio.Future[None]) -> None:
        self._warming.discard(task)
        if not task.cancelled():
            task.exception()  # a hint: whoever resumes the session hears of it

    async def _look_to_warm(self, call: Call, h: bytes, request: session_pb2.WarmSessionRequest) -> None:
        await self._own.settle_doubt(h)
        cold = await self._own.cold(h, request.session_id, request.user_id)
        if self._own.lifecycle(cold.manifest) != LIFECYCLE_ACTIVE:
            return  # what is read-only needs no owner
        found = await self._own.succession(call, cold)
        if found.takeable and not self._own.draining and not self._parts.lease.lost:
            claiming = self._own.start_claim(h, cold, found.loss)
            self._own.note_resumed(h)
            filling = asyncio.ensure_future(self._fill_warm(h, claiming))
            self._warming.add(filling)
            filling.add_done_callback(self._warmed)

    async def _fill_warm(self, h: bytes, claiming: asyncio.Task[bool]) -> None:
        """Fetch the newest turns of a session whose manifest has none: a fork, or one whose newest turn is large."""
        await asyncio.shield(claiming)
        head = self._own.peek(h)
        if head is not None and head.phase == PHASE_OWNED and 1 < head.hot_first == head.head_seq + 1:
            await self._own.backfill(h, log.HistoryNeeded(head.head_seq, head.head_seq))

    # Append ------------------------------------------------------------------------------------------------------

    async def append(self, call: Call, request: session_pb2.AppendTurnRequest) -> tuple[bytes | None, Any]:
        """Append turns; (ActiveContext's wire bytes or None, the rest of AppendTurnResponse)."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        check_durability(request.durability)
        check_position(request.expected, "expected")
        self._own.check_not_fenced()
        if request.conflict_mode not in session_pb2.ConflictMode.values():
            raise invalid("INVALID_CONTEXT", "conflict_mode", f"{request.conflict_mode} is no conflict mode")
        if request.writer_token:
            raise not_served("writer_token")
        turns = await self._own.counted(
            request.ByteSize(),
            prepare_turns,
            request.turns,
            self._parts.bucket.hash_key,
            self._parts.tokenizer,
            self._parts.turn_bytes_max,
        )
        expected = (request.expected.epoch, request.expected.seq) if request.HasField("expected") else None
        spec: Spec | None = None
        if request.HasField("context"):
            # A context that can't be made must be refused before anything is appended; the session's policy decides.
            await self._own.take(call, h, request.session_id, request.user_id, writes=True)
            spec = await self._spec(request.context, self._policy(h))
            if spec.new_message is not None:
                raise invalid("INVALID_CONTEXT", "context.new_message", "an append's new message is among its turns")
        response = session_pb2.AppendTurnResponse()
        try:
            done = await self._append(call, h, request.session_id, request.user_id, turns, expected, None)
        except Conflict as error:
            if error.reason != "EXPECTED_MISMATCH" or request.conflict_mode != session_pb2.CONFLICT_MODE_RETURN_TAIL:
                raise
            assert expected is not None
            return None, await self._conflict(h, request.session_id, self._shared_seq(h, expected))
        head = done.head
        if max(request.durability, head.min_durability) >= DURABILITY_CLOUD:
            await self._reach(call, h, done)
            head = self._own.peek(h) or head
        self._fill(response, done, head)
        if spec is None:
            return None, response
        resume = session_pb2.ResumeSessionRequest(session_id=request.session_id, context=request.context)
        try:
            return await self.resume(call, resume), response
        except SessiondError as error:
            response.context_error.CopyFrom(item_error(error))
            return None, response

    def _policy(self, h: bytes) -> dict[str, Any]:
        head = self._own.peek(h)
        return head.policy if head is not None else {}

    async def _append(
        self,
        call: Call,
        h: bytes,
        session_id: str,
        user_id: str,
        turns: Any,
        expected: tuple[int, int] | None,
        state_etag: tuple[int, int] | None,
    ) -> log.Appended:
        weight_bytes = sum(len(turn.body) for turn in turns)

        def operation(transaction: Transaction) -> log.Appended | log.HistoryNeeded:
            now_ms, running_ms = self._parts.clock_ms(), self._parts.running_ms()

            def birth() -> dict[str, str]:
                return dict(decode_committed(h, transaction.get("manifests", h)).birth["metadata"])

            try:
                clocks = self._parts.expiry_ms, self._parts.latest_ms
                return log.append(
                    transaction, h, session_id, turns, expected, state_etag, now_ms, running_ms, *clocks, birth
                )
            except log.HistoryNeeded as needed:
                return needed

        for _ in range(ATTEMPTS_MAX):
            await self._own.take(call, h, session_id, user_id, writes=True)
            if self._hot.is_full():
                raise hot_tier_full(self._hot)
            tenure = self._own.tenure()
            try:
                outcome = await self._hot.run(operation, weight_bytes)
            except Unavailable as error:
                if error.reason != "NOT_OWNER":
                    raise
                continue  # released in between: take it again, or hear that this node takes none any more
            if isinstance(outcome, log.Appended):
                outcome.tenure = tenure
                self.turns_appended += sum(not turn.duplicate for turn in outcome.turns)
                return outcome
            await self._own.backfill(h, outcome)
        raise Unavailable("NOT_OWNER", f"Session {session_id!r} keeps changing hands.", {"session_id": session_id})

    async def _reach(self, call: Call, h: bytes, done: log.Appended) -> None:
        """Wait until the turns are committed in the cloud tier. Raises Unavailable CLOUD_NOT_COMMITTED; they stay."""
        last_seq = max(turn.seq for turn in done.turns)
        detail, remedy, retry_after_ms = "the cloud tier did not confirm in time.", "", None
        for _ in range(ATTEMPTS_MAX):
            head = self._own.peek(h)
            same = head is not None and head.epoch == done.head.epoch
            if head is not None and same and head.cloud_seq >= last_seq and head.changes_flushed >= done.head.changes:
                return
            if head is None or head.epoch != done.head.epoch or head.phase not in (PHASE_OWNED, PHASE_RELEASING):
                detail = "the session changed hands."
                break
            try:
                await wait_until(asyncio.wrap_future(self._parts.flusher.request(h)), self._remaining_ms(call))
            except TimeoutError:
                break
            except SessiondError as error:
                detail = error.message
                if isinstance(error, Corrupt):
                    remedy, retry_after_ms = error.remedy, 0  # sending the turn again could not complete it
                break
        positions = ",".join(f"{turn.epoch}:{turn.seq}" for turn in done.turns[:16])
        raise Unavailable(
            "CLOUD_NOT_COMMITTED",
            f"Turn {last_seq} is not committed in the cloud tier: {detail}",
            {
                "seq": str(last_seq),
                "epoch": str(done.turns[-1].epoch),
                "positions": positions,
                "durability": "DURABILITY_EDGE",
            },
            remedy=remedy,
            retry_after_ms=retry_after_ms,
        )

    def _remaining_ms(self, call: Call) -> int | None:
        if call.deadline_ms is None:
            return None
        return max(0, call.deadline_ms - self._parts.boot_ms() - REPLY_MARGIN_MS)

    def _fill(self, response: session_pb2.AppendTurnResponse, done: log.Appended, head: Head) -> None:
        state = states.decode(head.state)
        duplicates = sum(turn.duplicate for turn in done.turns)
        response.outcome = (
            session_pb2.APPEND_OUTCOME_DUPLICATE
            if duplicates == len(done.turns)
            else session_pb2.APPEND_OUTCOME_APPENDED
        )
        response.turns.extend(appended_proto(turn) for turn in done.turns)
        response.head.CopyFrom(contexts.head_position(state))
        response.cloud_seq = head.cloud_seq
        response.checkpoint_version = state.boundary[0] << 32 | state.boundary[1]
        last_seq = max(turn.seq for turn in done.turns)
        response.durability = turn_pb2.DURABILITY_CLOUD if head.cloud_seq >= last_seq else turn_pb2.DURABILITY_EDGE
        response.ownership = self._own.standing(done.tenure)
        response.missing.extend(self._missing(head.loss))

    def _shared_seq(self, h: bytes, expected: tuple[int, int]) -> int:
        """Up to where a caller who believes in this head shares our log: a later epoch may have begun below its seq."""
        epoch, seq = expected
        with self._hot.read() as transaction:
            value = transaction.get("manifests", h)
            epochs = decode_committed(h, value).epochs if value is not None and epoch else []
        return min([seq, *(int(row[2]) - 1 for row in epochs if row[0] > epoch)])

    async def _conflict(self, h: bytes, session_id: str, after_seq: int) -> session_pb2.AppendTurnResponse:
        tenure = self._own.tenure()
        try:
            frames, reached, head = await self._read_turns(h, after_seq + 1, 0, CONFLICT_TAIL_BYTES_MAX, TURNS_PAGE_MAX)
        except NotFound:
            # It was here when the append was refused, and went between the two.
            what = f"Session {session_id!r} is changing hands."
            raise Unavailable("NOT_OWNER", what, {"session_id": session_id}, retry_after_ms=100) from None
        conflict = session_pb2.AppendConflict.FromString(frames)
        state = states.decode(head.state)
        conflict.head.CopyFrom(contexts.head_position(state))
        conflict.truncated = reached < head.head_seq
        return session_pb2.AppendTurnResponse(
            outcome=session_pb2.APPEND_OUTCOME_CONFLICT,
            conflict=conflict,
            head=conflict.head,
            cloud_seq=head.cloud_seq,
            checkpoint_version=state.boundary[0] << 32 | state.boundary[1],
            ownership=self._own.standing(tenure),
            missing=self._missing(head.loss),
        )

    async def update(self, call: Call, request: session_pb2.UpdateSessionRequest) -> session_pb2.UpdateSessionResponse:
        """Append a state turn."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        check_durability(request.durability)
        self._own.check_not_fenced()
        turn = turn_pb2.TurnInput(turn_id=request.turn_id, state=request.change)
        prepared = await self._own.counted(
            turn.ByteSize(),
            prepare_turn,
            turn,
            self._parts.bucket.hash_key,
            self._parts.tokenizer,
            self._parts.turn_bytes_max,
            "",
            "change",
        )
        etag = parse_etag(request.etag) if request.etag else None
        # A session that turns to CLOUD only, or away from it, is so in both tiers before anybody hears of it.
        durability = DURABILITY_CLOUD if prepared.policy is not None else request.durability
        done = await self._append(call, h, request.session_id, request.user_id, [prepared], None, etag)
        if max(durability, done.head.min_durability) >= DURABILITY_CLOUD:
            await self._reach(call, h, done)
        return session_pb2.UpdateSessionResponse(
            session=await self.describe(call, h, request.session_id, request.user_id),
            appended=appended_proto(done.turns[0]),
        )

    # Delete ------------------------------------------------------------------------------------------------------

    async def delete(self, call: Call, request: session_pb2.DeleteSessionRequest) -> session_pb2.DeleteSessionResponse:
        """End a session for ever: its tombstone is in the cloud tier before the reply."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        self._own.check_not_fenced()
        head = self._own.peek(h)
        if head is not None and head.lifecycle == LIFECYCLE_DELETED and head.phase != PHASE_FENCED:
            check_user(request.session_id, head.user, request.user_id)  # begun by an earlier call, and not done yet
        elif not await self._mark_deleted(call, h, request.session_id, request.user_id):
            return session_pb2.DeleteSessionResponse(deleted=False)
        try:
            await wait_until(
                asyncio.wrap_future(self._parts.flusher.request(h, release=True)), self._remaining_ms(call)
            )
        except (TimeoutError, SessiondError) as error:
            head = self._own.peek(h)
            if head is None or head.tombstoned:
                # The tombstone stands; what it leaves behind is removed as soon as the store answers again.
                return session_pb2.DeleteSessionResponse(deleted=True)
            detail = error.message if isinstance(error, SessiondError) else "the cloud tier did not confirm in time."
            raise Unavailable(
                "DELETE_NOT_COMMITTED",
                f"The deletion of session {request.session_id!r} is not committed in the cloud tier: {detail}",
                {"session_id": request.session_id},
            ) from error
        return session_pb2.DeleteSessionResponse(deleted=True)

    async def _mark_deleted(self, call: Call, h: bytes, session_id: str, user_id: str) -> bool:
        """Have the rows ask for a tombstone; False if the session was deleted before. Raises as owning it does."""

        def operation(transaction: Transaction) -> bool:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_OWNED:
                return False
            head.lifecycle = LIFECYCLE_DELETED
            head.changes += 1
            log.write_head(transaction, h, head, self._parts.clock_ms(), False)
            return True

        for _ in range(OWN_ATTEMPTS_MAX):
            try:
                await self._own.take(call, h, session_id, user_id)
            except NotFound as error:
                if error.reason != "SESSION_DELETED":
                    raise
                return False
            if await self._hot.run(operation):
                return True
        raise Unavailable("NOT_OWNER", f"Session {session_id!r} keeps changing hands.", {"session_id": session_id})

    # Transcript and checkpoints ----------------------------------------------------------------------------------

    async def list_turns(
        self, call: Call, request: session_pb2.ListTurnsRequest
    ) -> tuple[bytes, session_pb2.ListTurnsResponse]:
        """One page of the transcript: (frames, the rest of ListTurnsResponse)."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        size = page_size(request.page_size, TURNS_PAGE_DEFAULT, TURNS_PAGE_MAX)
        query = b"turns" + h
        first_seq, last_seq = max(1, request.first_seq), request.last_seq
        if request.page_token:
            place = open_page(self._parts.bucket.hash_key, query, request.page_token)
            first_seq, last_seq = int(place[0]), int(place[1])
        elif last_seq and last_seq < first_seq:
            raise invalid("INVALID_CONTEXT", "last_seq", f"{last_seq} is below first_seq {first_seq}")
        response = session_pb2.ListTurnsResponse()
        await self._own.settle_doubt(h)
        tenure = self._own.tenure()
        try:
            frames, reached, head = await self._read_turns(h, first_seq, last_seq, PAGE_BYTES_MAX, size)
            self._own.admit(request.session_id, head, request.user_id)
            standing = self._standing(session_pb2.ResumeSessionRequest(), head, states.decode(head.state), None, tenure)
            if first_seq < head.hot_first and standing.rung == context_pb2.RUNG_HOT:
                standing.rung = context_pb2.RUNG_CLOUD
            epoch = states.decode(head.state).epoch
        except NotFound:
            cold = await self._own.cold(h, request.session_id, request.user_id)
            frames, reached, standing, epoch = await self._cold_turns(call, cold, first_seq, last_seq, size)
        last_seq = last_seq or standing.head_seq
        response.receipt.CopyFrom(
            context_pb2.Receipt(
                rung=standing.rung,  # type: ignore[arg-type]
                ownership=standing.ownership,  # type: ignore[arg-type]
                missing=standing.missing,
                head=turn_pb2.TurnPosition(epoch=epoch, seq=standing.head_seq),
                cloud_seq=standing.cloud_seq,
                notice=standing.notice,
                node=standing.node,
            )
        )
        if reached >= first_seq:
            response.receipt.verbatim.add(first_seq=first_seq, last_seq=reached)
        if reached < min(last_seq, standing.head_seq):
            response.next_page_token = seal_page(self._parts.bucket.hash_key, query, [reached + 1, last_seq])
        return frames, response

    async def _read_turns(
        self, h: bytes, first_seq: int, last_seq: int, bytes_max: int, turns_max: int
    ) -> tuple[bytes, int, Head]:
        """(frames, last seq in them, head) of an owned session. Raises NotFound if it is not hot here."""
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is None or head.phase != PHASE_OWNED:
                raise not_found("")
            log.check_newest(transaction, h, head)
            last = min(last_seq or head.head_seq, head.head_seq, first_seq + turns_max - 1)
            if first_seq > last:
                return b"", first_seq - 1, head
            if first_seq >= head.hot_first:
                frames, reached = log.frames_between(transaction, h, first_seq, last, bytes_max)
                return frames, reached, head
            manifest = decode_committed(h, transaction.get("manifests", h))
        last = min(last, head.hot_first - 1)
        frames, reached = await self._own.off_loop(self._parts.segments.between, manifest, first_seq, last, bytes_max)
        return frames, reached, head

    async def _cold_turns(
        self, call: Call, cold: Cold, first_seq: int, last_seq: int, turns_max: int
    ) -> tuple[bytes, int, Standing, int]:
        manifest = cold.manifest
        standing = Standing(
            rung=context_pb2.RUNG_CLOUD,
            ownership=context_pb2.OWNERSHIP_CONFIRMED,
            node=self._parts.node.name,
            head_seq=manifest.head,
            cloud_seq=manifest.head,
        )
        losses = list(manifest.loss)
        state = states.decode(manifest.state)
        found = await self._own.succession(call, cold)
        losses += [found.loss] if found.loss else []
        if found.unseen:
            standing.missing.append(unreachable(manifest))
        self._judge(standing, session_pb2.ResumeSessionRequest(), losses, state, ColdSource(manifest))
        last = min(last_seq or manifest.head, manifest.head, first_seq + turns_max - 1)
        if first_seq > last:
            return b"", first_seq - 1, standing, state.epoch
        frames, reached = await self._own.off_loop(
            self._parts.segments.between, manifest, first_seq, last, PAGE_BYTES_MAX
        )
        return frames, reached, standing, state.epoch

    async def list_orphans(
        self, call: Call, request: session_pb2.ListOrphansRequest
    ) -> tuple[bytes, session_pb2.ListOrphansResponse]:
        """Acknowledged turns that are not in the log: (frames, the rest of ListOrphansResponse)."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        query = b"orphans" + h
        index, after_seq = 0, 0
        if request.page_token:
            place = open_page(self._parts.bucket.hash_key, query, request.page_token)
            index, after_seq = int(place[0]), int(place[1])
        await self._own.settle_doubt(h)
        orphans: list[Any] | None = None
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is not None and head.phase == PHASE_OWNED:
                self._own.admit(request.session_id, head, request.user_id)
                orphans = decode_committed(h, transaction.get("manifests", h)).orphans
                entries = log.turn_ids(transaction, h, head.head_seq)
        if orphans is None:
            cold = await self._own.cold(h, request.session_id, request.user_id)
            await self._own.succession(call, cold)
            orphans, entries = cold.manifest.orphans, cold.manifest.turn_ids
        response = session_pb2.ListOrphansResponse()
        # Oldest first, and one object a page: each has turns of its own epoch.
        rows = sorted(orphans, key=lambda row: (int(row[1]), int(row[2])))
        if index >= len(rows):
            return b"", response
        frames = await self._own.off_loop(orphan_frames, self._parts.store, h, rows[index])
        kept, reached = missing_turns(h, frames, entries, after_seq, PAGE_BYTES_MAX)
        place = [index, reached] if reached else [index + 1, 0]
        if place[0] < len(rows):
            response.next_page_token = seal_page(self._parts.bucket.hash_key, query, place)
        return kept, response

    async def list_checkpoints(
        self, call: Call, request: session_pb2.ListCheckpointsRequest
    ) -> session_pb2.ListCheckpointsResponse:
        """The newest checkpoints, newest first."""
        h = self._hash(call, request.session_id)
        check_user_id(request.user_id)
        saved: list[tuple[int, bytes]] | None = None
        await self._own.settle_doubt(h)
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
            if head is not None and head.phase == PHASE_OWNED:
                self._own.admit(request.session_id, head, request.user_id)
                saved = log.checkpoints(transaction, h, head.saved)
        if saved is None:
            cold = await self._own.cold(h, request.session_id, request.user_id)
            await self._own.succession(call, cold)
            saved = [(int(version), bytes(content)) for version, content in cold.manifest.checkpoints]
        response = session_pb2.ListCheckpointsResponse()
        for _, content in sorted(saved, reverse=True):
            state = states.decode(content)
            header = contexts.checkpoint_header(state)
            assert header is not None
            header.digest = core_digest(content)
            response.checkpoints.add(
                header=header, content=content, state=contexts.state_proto(state), pins=contexts.pin_protos(state)
            )
        return response


def _users_key(index_key: str) -> bytes:
    """The hot tier's key of a row of the index by user, as bucket.user_index_key names it."""
    _, tenant, user, rest = index_key.split("/")
    created, h = rest.split("-")
    return bytes.fromhex(tenant) + bytes.fromhex(user) + int(created, 16).to_bytes(8, "big") + bytes.fromhex(h)


def missing_turns(h: bytes, frames: bytes, entries: bytes, after_seq: int, bytes_max: int) -> tuple[bytes, int]:
    """(frames whose turn_ids are not among the entries, the seq to go on after; 0 if that was all)."""
    pieces: list[bytes] = []
    size = 0
    for header in core.scan_frames(h, frames):
        frame = frames[header.offset : header.end]
        if header.seq <= after_seq:
            continue
        turn = turn_pb2.Turn.FromString(bytes(frame[PREFIX_BYTES:]))
        if log.find_turn_id(entries, rules.turn_id_hash(h, turn.turn_id)):
            continue
        if pieces and size + len(frame) > bytes_max:
            return b"".join(pieces), header.seq - 1
        pieces.append(bytes(frame))
        size += len(frame)
    return b"".join(pieces), 0


def new_birth(created_ms: int, metadata: dict[str, str]) -> dict[str, Any]:
    """The birth of a session of its own: no fork, and in the place of none."""
    return {
        "created_ms": created_ms,
        "metadata": metadata,
        "forked_from": "",
        "forked_epoch": 0,
        "forked_seq": 0,
        "reset_of": "",
    }


def note_unread(standing: Standing, unread: list[context_pb2.MissingRange]) -> None:
    """Turns of a fork's parent that can't be read are missing."""
    if not unread:
        return
    standing.missing += unread
    standing.unread += [(missing.first_seq, missing.last_seq) for missing in unread]
    if standing.rung != context_pb2.RUNG_RESET:
        standing.rung = context_pb2.RUNG_PARTIAL
    first, last = unread[-1].first_seq, unread[-1].last_seq
    standing.notice = standing.notice or f"Messages {first} to {last} of this conversation can't be read any more."


def note_reset(standing: Standing, reset_of: str) -> None:
    """The session stands in the place of a lost one."""
    if reset_of:
        standing.rung, standing.reset_of, standing.notice = context_pb2.RUNG_RESET, reset_of, reset.NOTICE


def core_digest(content: bytes) -> bytes:
    """16 bytes that name a checkpoint's content."""
    return rules.next_chain(b"", content)


def check_durability(durability: int) -> None:
    """Raises Invalid if it is no Durability."""
    if durability not in (0, DURABILITY_EDGE, DURABILITY_CLOUD):
        raise invalid("INVALID_CONTEXT", "durability", f"{durability} is no durability")


def hot_tier_full(hot: Environment) -> SessiondError:
    """The refusal of a full map."""
    used, size = hot.used_bytes()
    return Exhausted(
        "HOT_TIER_FULL",
        f"The hot tier uses {used} of {size} bytes.",
        {"used_bytes": str(used), "map_size_bytes": str(size)},
    )


def not_served(field: str) -> Unimplemented:
    """The refusal of a field of the contract that this release does not serve."""
    return Unimplemented(
        "NOT_SERVED_YET",
        f"{field} is part of the contract but not served by this release.",
        fields=[(field, "not served yet")],
    )


def page_size(asked: int, default: int, limit: int) -> int:
    """The page size to use. Raises Invalid INVALID_PAGE_SIZE."""
    if asked > limit:
        raise invalid("INVALID_PAGE_SIZE", "page_size", f"{asked} is above {limit}")
    return asked or default


def parse_etag(etag: str) -> tuple[int, int]:
    """(epoch, seq) of a state's etag. Raises Invalid."""
    epoch, dash, seq = etag.partition("-")
    if not dash or not (epoch + seq).isascii() or not epoch.isdigit() or not seq.isdigit() or len(etag) > 40:
        raise invalid("INVALID_STATE_CHANGE", "etag", f"{etag!r} is no etag of a state")
    return int(epoch), int(seq)


def appended_proto(turn: log.Placed) -> session_pb2.AppendedTurn:
    """Where one turn ended up, as the wire has it."""
    return session_pb2.AppendedTurn(
        turn_id=turn.turn_id,
        position=turn_pb2.TurnPosition(epoch=turn.epoch, seq=turn.seq, chain=turn.chain),
        duplicate=turn.duplicate,
        append_time_unix_ms=turn.time_ms,
        tokens_o200k=turn.tokens[0],
        tokens_cl100k=turn.tokens[1],
    )


_CODES: Final = {
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "NOT_FOUND": 5,
    "ALREADY_EXISTS": 6,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "ABORTED": 10,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "DATA_LOSS": 15,
}


def item_error(error: SessiondError) -> session_pb2.ItemError:
    """A refusal as one item of a reply."""
    return session_pb2.ItemError(
        code=_CODES[REASONS[error.reason].status],
        reason=error.reason,
        message=str(error),
        metadata=error.metadata,
        retry_after_ms=error.retry_after_ms or 0,
    )


async def wait_until(work: Awaitable[Result], timeout_ms: int | None) -> Result:
    """The result of the work, or TimeoutError; the work goes on."""
    future = asyncio.ensure_future(work)
    return await asyncio.wait_for(asyncio.shield(future), None if timeout_ms is None else timeout_ms / 1000)
