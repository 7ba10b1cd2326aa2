"""The hot path: calls about sessions that this node owns and holds, from request bytes to reply bytes, from LMDB alone.

It promises the very answer that the general path (`service.sessions`) would give, or none: whatever is rare (a refusal,
a session that is not hot, something that may be missing, history to be fetched) is declined before anything was done,
and the general path answers. It asks no store, no other node and no lock, so that any process on the environment can
serve it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.expiry import lifecycle_at
from sessiond.core.manifest import LIFECYCLE_DELETED
from sessiond.core.state import State
from sessiond.errors import SessiondError
from sessiond.service import context as contexts
from sessiond.service.context import HotSource, Standing
from sessiond.service.ownership import INLINE_COUNT_BYTES_MAX
from sessiond.service.prepare import Spec
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Environment
from sessiond.tiers.hot.rows import PHASE_OWNED, Head
from sessiond.tokens import Tokenizer
from sessiond.v1 import context_pb2, session_pb2, turn_pb2

# Requests above this are counted on a thread, which the general path does.
REQUEST_BYTES_MAX: Final = INLINE_COUNT_BYTES_MAX
# Specs that were checked before: a gateway asks for the same window again and again.
SPECS_MAX: Final = 1024
SPEC_BYTES_MAX: Final = 512

_POLICY: Final = ("budget_tokens", "strategy", "encoding")


class LeaseView(Protocol):
    """What a process knows of its node's lease; in the process that holds it, the lease itself."""

    @property
    def tenure(self) -> int:
        """Rises whenever what was known of ownership before says nothing any more."""

    def is_valid(self) -> bool:
        """Whether no other node can have fenced this one."""


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
        expiry_ms: Callable[[], int],
        note_resumed: Callable[[bytes], None],
        count_rung: Callable[[int], None],
    ) -> None:
        """note_resumed: told of every session that was read. count_rung: told of each reply's rung."""
        self._hot = hot
        self._hash_key = hash_key
        self._tokenizer = tokenizer
        self._lease = lease
        self._node = node
        self._default_budget_tokens = default_budget_tokens
        self._serve_unconfirmed = serve_unconfirmed
        self._expiry_ms = expiry_ms
        self._note_resumed = note_resumed
        self._count_rung = count_rung
        self._specs: dict[Any, Spec] = {}

    # Resume ----------------------------------------------------------------------------------------------------------

    def resume(self, raw: bytes, tenant: str) -> bytes | None:
        """The ResumeSessionResponse's wire bytes for a ResumeSessionRequest's; None where the general path answers."""
        if len(raw) > REQUEST_BYTES_MAX:
            return None
        try:
            request = session_pb2.ResumeSessionRequest.FromString(raw)
            if request.HasField("accept_missing") or request.reset_to_session_id:
                return None
            h = rules.session_hash(self._hash_key, tenant, request.session_id)
            tenure = self._lease.tenure
            with self._hot.read() as transaction:
                head = log.read_head(transaction, h)
                if head is None or head.loss or not self._is_served(head, request.user_id):
                    return None
                spec = self._spec(request.context, head.policy)
                state = states.decode(head.state)
                source = HotSource(transaction, h, head)
                if request.HasField("highest_acked") and not _is_there(source, state, request.highest_acked):
                    return None
                if self._lease.is_valid() and self._lease.tenure == tenure:
                    ownership = context_pb2.OWNERSHIP_CONFIRMED
                elif self._serve_unconfirmed:
                    ownership = context_pb2.OWNERSHIP_UNCONFIRMED
                else:
                    return None
                rung = context_pb2.RUNG_HOT
                standing = Standing(rung, ownership, self._node, head.head_seq, head.cloud_seq)
                if request.known_checkpoint_version:
                    standing.stale = request.known_checkpoint_version > state.boundary[0] << 32 | state.boundary[1]
                context = contexts.build(source, h, state, spec, standing)
        except (SessiondError, log.HistoryNeeded, DecodeError):
            return None
        self._count_rung(rung)
        self._note_resumed(h)
        return core.encode_message((1, context))

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
