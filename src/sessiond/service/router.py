"""Calls to the node that owns their session: answered here where it is ours, forwarded once where it is not.

It promises that a call is forwarded to a live owner only, never by a node that it was forwarded to, within the caller's
deadline and under the tenant that was verified at the door; and that an owner which does not answer is never waited for
longer than its lease shows a sign of life. It decides nothing about a session: `ownership` does.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from sessiond.core import rules
from sessiond.errors import REASONS, SessiondError, Unavailable
from sessiond.service.ownership import Call, OwnedElsewhere, Ownership, Parts, draining
from sessiond.tiers.hot.rows import PHASE_OWNED, PHASE_RELEASING
from sessiond.tiers.peers import ALIVE, GONE, Owner
from sessiond.v1 import node_pb2, session_pb2

# Sessions of which it is remembered who owned them last.
HINTS_MAX: Final = 262_144
# A session that was asked for through one other node so often in a row, and never directly, belongs there. Sprayed
# calls never come to that: with three nodes by a chance of one in 3^32.
VISITS_MAX: Final = 32
# ... and for so long: a burst says little.
VISITS_MS: Final = 10_000
# For so long a session that was let go for a node is not taken back when that node asks for it here.
GIVEN_MS: Final = 5_000
GIVEN_MAX: Final = 4096
# A use that no session has had yet.
NEVER_MS: Final = (1 << 63) - 1
# A session that changes hands while it is looked for, and a node that drains, are tried again so often.
ATTEMPTS_MAX: Final = 24
# An owner that did not answer is asked again this often, by one call; the others hear at once that it does not.
SILENT_RETRY_MS: Final = 250
SILENT_MAX: Final = 1024
# Left of a caller's deadline for what comes behind a forwarded call.
MARGIN_MS: Final = 30
# The longest that a call without a deadline waits for another node.
PATIENCE_MS: Final = 30_000
# Refusals of an owner that say that it is none any more.
MOVED: Final = frozenset(("NOT_OWNER", "EPOCH_FENCED", "NODE_DRAINING", "NODE_STARTING"))

Work = Callable[[Call, Any], Awaitable[bytes]]


class PeerUnreachable(Exception):
    """Another node could not be reached, or did not answer in time; whether it did what was asked is not known."""


class Refused(SessiondError):
    """What the owner refused, to be passed on as it came. status: a google.rpc.Status."""

    def __init__(self, status: bytes, reason: str) -> None:
        Exception.__init__(self, reason)
        self.status = status
        self.reason = reason


class PeerTransport(Protocol):
    """Calls other nodes; `transport.peers` in a daemon."""

    async def call(self, address: str, request: node_pb2.ForwardRequest, timeout_s: float) -> node_pb2.ForwardResponse:
        """Send one forwarded call. Raises PeerUnreachable."""
        ...

    async def rescue(self, address: str, request: node_pb2.RescueRequest, timeout_s: float) -> node_pb2.RescueResponse:
        """Offer turns to a session's owner. Raises PeerUnreachable, Unavailable."""
        ...

    def reason(self, status: bytes) -> str:
        """The reason in a refusal."""
        ...


@dataclass(slots=True)
class _Silence:
    """An owner that did not answer. asked_ms: when it was last tried."""

    asked_ms: int


class Router:
    """The way of a client's call to its session."""

    def __init__(self, parts: Parts, ownership: Ownership, peers: PeerTransport, lease_ms: int) -> None:
        self._parts = parts
        self._own = ownership
        self._peers = peers
        self._lease_ms = lease_ms
        self._hints: OrderedDict[bytes, Owner] = OrderedDict()
        self._silent: dict[bytes, _Silence] = {}
        self._successors: list[Owner] = []
        # By whom a session was last asked for through another node, how often in a row, and since when.
        self._visits: OrderedDict[bytes, tuple[str, int, int]] = OrderedDict()
        self._given: OrderedDict[bytes, tuple[str, int]] = OrderedDict()
        self.let_go = 0
        self.counts: Counter[tuple[str, str]] = Counter()

    async def call(self, method: str, call: Call, request: Any, raw: bytes, work: Work) -> bytes:
        """The reply's wire bytes. work: answers the call on this node. Raises SessiondError, Refused among them."""
        h = self._hash(call, request)
        if call.forwarded or h is None:
            return await work(call, request)
        hint = self._hints.get(h)
        if hint is not None and not call.redirects and not self._is_ours(h):
            try:
                reply = await self._forward(method, call, raw, h, hint)
                if reply is not None:
                    return reply
            except PeerUnreachable:
                call = replace(call, unreachable=hint)
        for attempt in range(ATTEMPTS_MAX):
            try:
                reply = await work(call, request)
            except OwnedElsewhere as found:
                if call.redirects:
                    raise
                owner = found.owner
            except Unavailable as error:
                successor = await self._successor(h) if error.reason == "NODE_DRAINING" else None
                if successor is None:
                    raise
                owner = successor
            else:
                if hint is not None:
                    self._hints.pop(h, None)
                self.asked_here(h)
                return reply
            try:
                answer = await self._forward(method, call, raw, h, owner)
                if answer is not None:
                    return answer
                # It is not the owner, or not any more: the cloud tier knows who is.
                await self._pause(call, attempt)
            except PeerUnreachable:
                if self._own.draining:
                    self._successors = [node for node in self._successors if node.name != owner.name]
                call = replace(call, unreachable=owner)
        raise Unavailable("NOT_OWNER", "The session keeps changing hands.", {"hash": h.hex()})

    def _hash(self, call: Call, request: Any) -> bytes | None:
        """The session that a request is about; None where it names none."""
        session_id = getattr(request, "session_id", "")
        if not session_id:
            scope = getattr(request, "scope", None)
            session_id = scope.session_id if scope is not None else ""
            if scope is not None and scope.user_id:
                session_id = rules.user_session(scope.user_id)
        if not session_id:
            return None
        return rules.session_hash(self._parts.bucket.hash_key, call.tenant, session_id)

    def _is_ours(self, h: bytes) -> bool:
        head = self._own.peek(h)
        return head is not None and head.phase in (PHASE_OWNED, PHASE_RELEASING)

    def visited(self, method: str, call: Call, request: Any, node: str) -> None:
        """A call that another node forwarded was answered here. A session that nobody asks for but through one and the
        same node is let go, so that that node takes it: what routes by the session leads there.
        """
        h = self._hash(call, request)
        if h is None or method == "WarmSession":
            return
        now_ms = self._parts.boot_ms()
        before, count, since_ms = self._visits.pop(h, (node, 0, now_ms))
        count, since_ms = (count + 1, since_ms) if before == node else (1, now_ms)
        if count >= VISITS_MAX and now_ms - since_ms >= VISITS_MS and self._is_ours(h):
            self.let_go += 1
            self._given[h] = node, self._parts.boot_ms() + GIVEN_MS
            if len(self._given) > GIVEN_MAX:
                self._given.popitem(last=False)
            self._parts.flusher.release_unused(h, NEVER_MS)
            return
        self._visits[h] = node, count, since_ms
        if len(self._visits) > HINTS_MAX:
            self._visits.popitem(last=False)

    def asked_here(self, h: bytes) -> None:
        """A session was asked for by a caller of this node's own: not only through another one."""
        if self._visits:
            self._visits.pop(h, None)

    def is_given(self, call: Call, request: Any, node: str) -> bool:
        """Whether a session was let go for this node a moment ago: then it is not taken back on its behalf."""
        h = self._hash(call, request)
        given = self._given.get(h) if h is not None else None
        if h is None or given is None or given[0] != node:
            return False
        head = self._own.peek(h)
        if head is not None and head.phase == PHASE_OWNED:
            return False  # not let go yet, or another caller came first
        if given[1] < self._parts.boot_ms():
            del self._given[h]
            return False
        return True

    def owner_hint(self, h: bytes) -> Owner | None:
        """Who owned the session when a call was forwarded last."""
        return self._hints.get(h)

    def _note(self, h: bytes, owner: Owner) -> None:
        self._hints[h] = owner
        self._hints.move_to_end(h)
        if len(self._hints) > HINTS_MAX:
            self._hints.popitem(last=False)

    # Forwarding ------------------------------------------------------------------------------------------------------

    async def _forward(self, method: str, call: Call, raw: bytes, h: bytes, owner: Owner) -> bytes | None:
        """The owner's reply; None if it is not the owner any more. Raises Refused, PeerUnreachable."""
        now_ms = self._parts.boot_ms()
        silence = self._silent.get(owner.incarnation)
        if silence is not None:
            if now_ms - silence.asked_ms < SILENT_RETRY_MS:
                raise PeerUnreachable(f"{owner.name} did not answer a moment ago")
            silence.asked_ms = now_ms
            if not await self._lives(owner):
                raise PeerUnreachable(f"{owner.name} does not answer, and its lease stands still")
        request = node_pb2.ForwardRequest(
            method=method,
            request=raw,
            tenant=call.tenant,
            incarnation=owner.incarnation,
            from_node=self._parts.node.name,
        )
        try:
            response = await self._asked(call, owner, request, self._lease_ms // 2 if silence else PATIENCE_MS)
        except PeerUnreachable:
            if len(self._silent) >= SILENT_MAX:
                self._silent.clear()
            self._silent.setdefault(owner.incarnation, _Silence(self._parts.boot_ms()))
            self._hints.pop(h, None)
            self.counts[(owner.name, "unreachable")] += 1
            raise
        self._silent.pop(owner.incarnation, None)
        if response.not_owner:
            self._hints.pop(h, None)
            self.counts[(owner.name, "not_owner")] += 1
            return None
        if response.status:
            reason = self._peers.reason(response.status)
            if reason in MOVED:
                self._hints.pop(h, None)
                self.counts[(owner.name, "not_owner")] += 1
                return None
            self._note(h, owner)
            self.counts[(owner.name, "refused")] += 1
            raise Refused(response.status, reason)
        self._note(h, owner)
        self.counts[(owner.name, "answered")] += 1
        return bytes(response.reply)

    async def _asked(
        self, call: Call, owner: Owner, request: node_pb2.ForwardRequest, patience_ms: int
    ) -> node_pb2.ForwardResponse:
        """The owner's answer. While none comes its lease is looked at: an owner that is slow renews it, one that stands
        still is not waited for. Raises PeerUnreachable.
        """
        left_ms = min(self._left_ms(call), patience_ms)
        ends_ms = self._parts.boot_ms() + left_ms
        asking = asyncio.ensure_future(self._peers.call(owner.address, request, left_ms / 1000))
        # Where it is given up, nobody else hears of what becomes of it.
        asking.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            while True:
                done, _ = await asyncio.wait({asking}, timeout=min(left_ms, self._lease_ms / 2) / 1000)
                if done:
                    return asking.result()
                left_ms = ends_ms - self._parts.boot_ms()
                if left_ms <= MARGIN_MS or not await self._lives(owner):
                    raise PeerUnreachable(f"{owner.name} does not answer")
        finally:
            if not asking.done():
                asking.cancel()

    async def ask_to_resume(self, call: Call, node: Owner, request: session_pb2.ResumeSessionRequest) -> bytes | None:
        """A node's reply to a resume that may be its own to answer; None if it can't read the session either.

        Raises Refused as it does to a call that only its owner judges, Unavailable where it does not say.
        """
        forward = node_pb2.ForwardRequest(
            method="ResumeSession",
            request=request.SerializeToString(),
            tenant=call.tenant,
            incarnation=node.incarnation,
            from_node=self._parts.node.name,
        )
        where = {"session_id": request.session_id, "owner_node": node.name}
        try:
            response = await self._asked(call, node, forward, PATIENCE_MS)
        except PeerUnreachable as error:
            raise Unavailable("OWNER_UNREACHABLE", f"Node {node.name!r} does not answer.", where) from error
        if not response.status:
            return None if response.not_owner else bytes(response.reply)
        reason = self._peers.reason(response.status)
        status = REASONS[reason].status if reason in REASONS else "UNAVAILABLE"
        if status == "DATA_LOSS":
            return None
        if status in ("NOT_FOUND", "INVALID_ARGUMENT"):
            raise Refused(response.status, reason)
        raise Unavailable("OWNER_UNREACHABLE", f"Node {node.name!r} does not say whether it has it.", where)

    async def _lives(self, owner: Owner) -> bool:
        """Whether the owner's lease moves, as far as can be seen: where the store says nothing, nobody is given up."""
        if self._parts.peers is None:
            return True
        try:
            verdict = await self._own.off_loop(self._parts.peers.verdict, owner)
            if verdict.state == ALIVE:
                return True
            if verdict.state == GONE:
                return False
            # Seen for the first time, or unmoved. It is renewed three times a lease: another look tells which.
            await asyncio.sleep(self._lease_ms / 2000)
            return (await self._own.off_loop(self._parts.peers.verdict, owner)).state == ALIVE
        except SessiondError:
            return True

    def _left_ms(self, call: Call) -> int:
        if call.deadline_ms is None:
            return PATIENCE_MS
        return max(0, call.deadline_ms - self._parts.boot_ms() - MARGIN_MS)

    async def _pause(self, call: Call, attempt: int) -> None:
        """Give a hand-over the time of a commit. Raises Unavailable once the caller's time is up."""
        pause_ms = min(200, 5 * 2 ** min(attempt, 6))
        if self._left_ms(call) < pause_ms:
            raise Unavailable("NOT_OWNER", "The session is changing hands.")
        await asyncio.sleep(pause_ms / 1000)

    # Draining --------------------------------------------------------------------------------------------------------

    async def find_successors(self) -> None:
        """Learn which nodes may take what this one gives up. Called when a drain begins."""
        if self._parts.peers is not None:
            try:
                self._successors = await self._own.off_loop(self._parts.peers.living)
            except SessiondError:
                self._successors = []

    async def _successor(self, h: bytes) -> Owner | None:
        """The node to which a node that drains sends a call, once its session is released here; None if there is none.

        By rendezvous hashing, so that several nodes that drain agree.
        """
        if not self._successors:
            return None
        head = self._own.peek(h)
        if head is not None and head.phase in (PHASE_OWNED, PHASE_RELEASING):
            try:
                await asyncio.wrap_future(self._parts.flusher.request(h, release=True))
            except SessiondError:
                raise draining() from None
        weights = ((hashlib.blake2b(h + node.name.encode(), digest_size=8).digest(), node) for node in self._successors)
        return max(weights, key=lambda pair: pair[0])[1]
