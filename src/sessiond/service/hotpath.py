"""The hot path: calls about sessions that this node owns and holds, from request bytes to reply bytes, from LMDB alone.

It promises the very answer that the general path (`service.sessions`) would give, or none: whatever is rare (a refusal,
a session that is not hot, something that may be missing, history to be fetched) is declined before anything was done,
and the general path answers. It asks no store, no other node and no lock, so that any process on the environment can
serve it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.expiry import lifecycle_at
from sessiond.core.layout import field_head
from sessiond.core.manifest import LIFECYCLE_DELETED
from sessiond.core.state import State
from sessiond.errors import SessiondError
from sessiond.service import context as contexts
from sessiond.service.context import HotSource, Standing
from sessiond.service.ownership import INLINE_COUNT_BYTES_MAX
from sessiond.service.prepare import CHAIN_BYTES, Spec, check_session_id, prepare_turns
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment, ReadFailed, Transaction
from sessiond.tiers.hot.log import PreparedTurn
from sessiond.tiers.hot.rows import DURABILITY_EDGE, PHASE_OWNED, Head, decode_committed
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

# Requests above this are counted on a thread, which the general path does.
REQUEST_BYTES_MAX: Final = INLINE_COUNT_BYTES_MAX
# Specs that were checked before: a gateway asks for the same window again and again.
SPECS_MAX: Final = 1024
SPEC_BYTES_MAX: Final = 512
TENANTS_MAX: Final = 1024

_EDGE: Final = (turn_pb2.DURABILITY_UNSPECIFIED, turn_pb2.DURABILITY_EDGE)
_CONFLICT_MODES: Final = frozenset(session_pb2.ConflictMode.values())
_POLICY: Final = ("budget_tokens", "strategy", "encoding")


class LeaseView(Protocol):
    """What a process knows of its node's lease; in the process that holds it, the lease itself."""

    @property
    def tenure(self) -> int:
        """Rises whenever what was known of ownership before says nothing any more."""

    @property
    def lost(self) -> bool:
        """Whether another daemon holds the node's name."""

    def is_valid(self) -> bool:
        """Whether no other node can have fenced this one."""


@dataclass(slots=True)
class Ready:
    """An append that waits for its commit: everything that needs no lock is done. tenure: the node's at that time."""

    request: session_pb2.AppendTurnRequest
    h: bytes
    turns: list[PreparedTurn]
    weight_bytes: int
    tenure: int
    operation: Callable[[Transaction], log.Appended | None]


class HotPath:
    """What of a node's calls can be answered from its rows at once."""

    def __init__(
        self,
        hot: Environment,
        hash_key: bytes,
        tokenizer: Tokenizer,
        lease: LeaseView,
        node: str,
        *,
        default_budget_tokens: int,
        serve_unconfirmed: bool,
        turn_bytes_max: int,
        clock_ms: Callable[[], int],
        expiry_ms: Callable[[], int],
        latest_ms: Callable[[], int],
        running_ms: Callable[[], int],
        note_resumed: Callable[[bytes], None],
        note_appended: Callable[[bytes, int], None],
        rungs: dict[str, int],
    ) -> None:
        """The clocks are those of `service.ownership.Parts`. note_resumed: told of every session that was read.
        note_appended: told of every session that was appended to, and of how many turns. rungs: contexts by rung.
        """
        self._hot = hot
        self._hash_key = hash_key
        self._tokenizer = tokenizer
        self._lease = lease
        self._node = node
        self._default_budget_tokens = default_budget_tokens
        self._serve_unconfirmed = serve_unconfirmed
        self._turn_bytes_max = turn_bytes_max
        self._clock_ms = clock_ms
        self._expiry_ms = expiry_ms
        self._latest_ms = latest_ms
        self._running_ms = running_ms
        self._note_resumed = note_resumed
        self._note_appended = note_appended
        self._rungs = rungs
        self._specs: dict[Any, Spec] = {}
        self._hashers: dict[str, rules.SessionHasher] = {}

    # Resume ----------------------------------------------------------------------------------------------------------

    def resume(self, raw: bytes, tenant: str) -> bytes | None:
        """The ResumeSessionResponse's wire bytes for a ResumeSessionRequest's; None where the general path answers."""
        if len(raw) > REQUEST_BYTES_MAX:
            return None
        try:
            request = session_pb2.ResumeSessionRequest.FromString(raw)
            if request.HasField("accept_missing") or request.reset_to_session_id:
                return None
            # Not only for the refusal: there are sessions that no caller can name.
            h = self._hasher(tenant)(check_session_id(request.session_id))
            tenure = self._lease.tenure
            transaction = self._hot.begin_read()
            try:
                head = log.read_head(transaction, h)
                if head is None or head.loss or not self._is_served(head, request.user_id):
                    return None
                spec = self._spec(request.context, head.policy)
                state = states.decode(head.state)
                source = HotSource(transaction, h, head)
                if request.HasField("highest_acked") and not _is_there(source, state, request.highest_acked):
                    return None
                ownership = self._ownership(tenure)
                if ownership is None:
                    return None
                rung = context_pb2.RUNG_HOT
                standing = Standing(rung, ownership, self._node, head.head_seq, head.cloud_seq)
                if request.known_checkpoint_version:
                    standing.stale = request.known_checkpoint_version > state.boundary[0] << 32 | state.boundary[1]
                pieces = contexts.build_pieces(source, h, state, spec, standing)
            finally:
                transaction.end_read()
        except (SessiondError, log.HistoryNeeded, DecodeError, ReadFailed):
            return None
        self._rungs["HOT"] += 1
        self._note_resumed(h)
        pieces.insert(0, field_head(1, sum(map(len, pieces))))
        return b"".join(pieces)

    def _hasher(self, tenant: str) -> rules.SessionHasher:
        hasher = self._hashers.get(tenant)
        if hasher is None:
            if len(self._hashers) >= TENANTS_MAX:
                self._hashers.clear()
            hasher = self._hashers[tenant] = rules.SessionHasher(self._hash_key, tenant)
        return hasher

    def _ownership(self, tenure: int) -> int | None:
        """How sure this node is of what it owns, at this moment: `Ownership.standing`; None where that would refuse."""
        if self._lease.is_valid() and self._lease.tenure == tenure:
            return context_pb2.OWNERSHIP_CONFIRMED
        return context_pb2.OWNERSHIP_UNCONFIRMED if self._serve_unconfirmed else None

    def _is_served(self, head: Head, user_id: str) -> bool:
        """Whether this node serves a session as its owner, and this caller may see it."""
        if head.phase != PHASE_OWNED or (user_id and user_id != head.user):
            return False
        lifecycle = head.lifecycle
        if head.expires_ms:
            lifecycle = lifecycle_at(lifecycle, head.policy, head.expires_ms, self._expiry_ms())
        return lifecycle != LIFECYCLE_DELETED

    def _spec(self, proto: context_pb2.ContextSpec, policy: dict[str, Any]) -> Spec:
        """The spec, checked. Raises as Spec does."""
        raw = proto.SerializeToString()
        if len(raw) > SPEC_BYTES_MAX or proto.HasField("new_message"):
            return Spec(proto, policy, self._tokenizer, self._default_budget_tokens, "context")
        key = (raw, *map(policy.get, _POLICY)) if policy else raw
        spec = self._specs.get(key)
        if spec is None:
            spec = Spec(proto, policy, self._tokenizer, self._default_budget_tokens, "context")
            if len(self._specs) >= SPECS_MAX:
                self._specs.clear()
            self._specs[key] = spec
        return spec

    # Append ----------------------------------------------------------------------------------------------------------

    async def append(self, raw: bytes, tenant: str) -> bytes | None:
        """The AppendTurnResponse's wire bytes for an AppendTurnRequest's, once it is on the disk; None where the
        general path has to answer.
        """
        ready = self.prepare(raw, tenant)
        if ready is None:
            return None
        try:
            done = await self._hot.run(ready.operation, ready.weight_bytes)
        except SessiondError:
            return None
        return None if done is None else self.finish(ready, done)

    def prepare(self, raw: bytes, tenant: str) -> Ready | None:
        """An append that is ready for its commit; None where the general path does it."""
        if len(raw) > REQUEST_BYTES_MAX or self._lease.lost:
            return None
        try:
            request = session_pb2.AppendTurnRequest.FromString(raw)
            if (
                request.durability not in _EDGE
                or request.conflict_mode not in _CONFLICT_MODES
                or request.writer_token
                or request.HasField("context")
                or self._hot.is_full()
            ):
                return None
            expected: tuple[int, int] | None = None
            if request.HasField("expected"):
                if len(request.expected.chain) not in (0, CHAIN_BYTES):
                    return None
                expected = request.expected.epoch, request.expected.seq
            h = self._hasher(tenant)(check_session_id(request.session_id))
            turns = prepare_turns(request.turns, self._hash_key, self._tokenizer, self._turn_bytes_max)
        except (SessiondError, DecodeError):
            return None

        def operation(transaction: Transaction) -> log.Appended | None:
            head = log.read_head(transaction, h)
            # What may be missing is told by the general path, and CLOUD is waited for there.
            if head is None or head.loss or head.min_durability > DURABILITY_EDGE:
                return None
            if head.phase != PHASE_OWNED or (request.user_id and request.user_id != head.user):
                return None
            now_ms, running_ms = self._clock_ms(), self._running_ms()

            def birth() -> dict[str, str]:
                return dict(decode_committed(h, transaction.get("manifests", h)).birth["metadata"])

            clocks = self._expiry_ms, self._latest_ms
            try:
                return log.append(
                    transaction, h, request.session_id, turns, expected, None, now_ms, running_ms, *clocks, birth, head
                )
            except log.HistoryNeeded:
                return None

        weight_bytes = sum(len(turn.body) for turn in turns)
        return Ready(request, h, turns, weight_bytes, self._lease.tenure, operation)

    def finish(self, ready: Ready, done: log.Appended) -> bytes | None:
        """The reply to an append that is on the disk; None where the general path would refuse to answer."""
        ownership = self._ownership(ready.tenure)
        if ownership is None:
            return None
        head, turns = done.head, done.turns
        places = done.places or states.decode_places(head.state)
        fresh = sum(not turn.duplicate for turn in turns)
        self._note_appended(ready.h, fresh)
        epoch, boundary_seq, _ = places[18]
        flushed = head.cloud_seq >= max(turn.seq for turn in turns)
        return core.encode_message(
            (
                *(2, session_pb2.APPEND_OUTCOME_APPENDED if fresh else session_pb2.APPEND_OUTCOME_DUPLICATE),
                3,
                [
                    (
                        *(1, turn.turn_id, 2, (1, turn.epoch, 2, turn.seq, 3, turn.chain), 3, turn.duplicate),
                        *(4, turn.time_ms, 5, turn.tokens[0], 6, turn.tokens[1]),
                    )
                    for turn in turns
                ],
                *(4, (1, places[2], 2, places[1], 3, places[3] if places[1] else b"")),
                *(5, head.cloud_seq, -6, epoch << 32 | boundary_seq),
                *(7, turn_pb2.DURABILITY_CLOUD if flushed else turn_pb2.DURABILITY_EDGE, 8, ownership),
            )
        )


def _is_there(source: HotSource, state: State, acked: turn_pb2.TurnPosition) -> bool:
    """Whether the log surely holds what a caller had acknowledged. Raises HistoryNeeded, Corrupt."""
    if acked.seq > state.cursor:
        return False
    if not acked.chain:
        return True
    if len(acked.chain) != len(state.chain):
        return False
    if acked.seq == state.cursor:
        return bool(acked.chain == state.chain)
    return not acked.seq or contexts.holds(source, state, acked) is True
