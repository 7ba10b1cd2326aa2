"""The other nodes of the bucket, by their leases: who lives, who moved, and who is gone for good.

It promises that a node is called gone only once its hot tier can serve nothing as its own: its lease was fenced by a
definite conditional write after it had stood still for three lease times by this node's clock, or its name is held for
another hot tier. It never decides about a session, and asks the store only about nodes that somebody doubts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sessiond.core import envelope
from sessiond.errors import Corrupt
from sessiond.tiers.cloud.bucket import lease_key, refusal
from sessiond.tiers.cloud.lease import STANDSTILL_LEASES, boot_clock_ms, fenced_body
from sessiond.tiers.cloud.store import Ambiguous, ObjectNotFound, ObjectStore, PreconditionLost, StoreError
from sessiond.tiers.hydrate import Node

# Its lease changed since it was looked at last, or is looked at for the first time.
ALIVE: Final = "alive"
# Its lease stands still, not yet for long enough; or what became of the fence is not known.
SILENT: Final = "silent"
# It can serve nothing as its own any more, unless it takes its name anew and writes each manifest first.
GONE: Final = "gone"

# A look that found nobody gone serves those who ask within this share of a lease.
LOOKS_PER_LEASE: Final = 8
NODES_MAX: Final = 1000
# Clocks of nodes may differ by some seconds.
LIVING_LEASES: Final = 5


@dataclass(frozen=True, slots=True)
class Owner:
    """A node as a manifest names it. incarnation: 16 bytes. address: where peers reach it, HOST:PORT."""

    incarnation: bytes
    name: str
    address: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a node. owner: as its lease names it now; None where it has none, or has another hot tier."""

    state: str
    owner: Owner | None = None


@dataclass(slots=True)
class _Seen:
    """A lease as it was seen. since_ms: when it was first seen so; at_ms: when it was last looked at."""

    etag: str
    since_ms: int
    at_ms: int
    verdict: Verdict
    incarnation: bytes


class Peers:
    """Looks at other nodes' leases, and fences those that stood still."""

    def __init__(
        self,
        store: ObjectStore,
        node: Node,
        lease_ms: int,
        clock_ms: Callable[[], int] = boot_clock_ms,
        on_fence: Callable[[Owner], None] = lambda owner: None,
    ) -> None:
        """on_fence: told, on the calling thread, of each node whose lease this one fenced."""
        self._store = store
        self._node = node
        self._lease_ms = lease_ms
        self._clock_ms = clock_ms
        self._on_fence = on_fence
        self._seen: dict[str, _Seen] = {}
        self.fenced = 0

    def verdict(self, owner: Owner) -> Verdict:
        """Whether an owner lives, by its lease. GONE is always by a look that began after the call did.

        Blocks. Raises Unavailable and Denied as the store does, Corrupt.
        """
        now_ms = self._clock_ms()
        seen = self._seen.get(owner.name)
        if (
            seen is not None
            and seen.incarnation == owner.incarnation
            and seen.verdict.state != GONE
            and now_ms - seen.at_ms < self._lease_ms // LOOKS_PER_LEASE
            and now_ms - seen.since_ms < STANDSTILL_LEASES * self._lease_ms
        ):
            return seen.verdict
        try:
            return self._look(owner)
        except StoreError as error:
            raise refusal(error) from error

    def _look(self, owner: Owner) -> Verdict:
        sent_ms = self._clock_ms()
        key = lease_key(owner.name)
        try:
            found = self._store.get(key)
        except ObjectNotFound:
            holder, etag = {}, ""
        else:
            holder, etag = envelope.unseal(found.body, envelope.KIND_LEASE, key)[0], found.etag
        answered_ms = self._clock_ms()
        if holder and holder.get("incarnation") != owner.incarnation:
            return self._note(owner, etag, sent_ms, answered_ms, Verdict(GONE))
        named = owner_of(holder) if holder else None
        if holder.get("fenced"):
            return self._note(owner, etag, sent_ms, answered_ms, Verdict(GONE, named))
        known = self._seen.get(owner.name)
        stood_ms = sent_ms - known.since_ms if known is not None and known.etag == etag else -1
        patience_ms = STANDSTILL_LEASES * int(holder.get("lease_ms", self._lease_ms))
        if holder.get("released") or stood_ms >= patience_ms:
            state = self._fence(key, holder, etag, owner)
            return self._note(owner, etag, sent_ms, answered_ms, Verdict(state, named))
        # The first look says nothing yet: whoever asks has tried the node and had no answer.
        state = ALIVE if known is not None and known.etag != etag else SILENT
        return self._note(owner, etag, sent_ms, answered_ms, Verdict(state, named))

    def _note(self, owner: Owner, etag: str, sent_ms: int, answered_ms: int, verdict: Verdict) -> Verdict:
        known = self._seen.get(owner.name)
        # Still since the answer that first showed it, not since the question.
        since_ms = known.since_ms if known is not None and known.etag == etag else answered_ms
        self._seen[owner.name] = _Seen(etag, since_ms, sent_ms, verdict, owner.incarnation)
        return verdict

    def _fence(self, key: str, holder: dict[str, Any], etag: str, owner: Owner) -> str:
        """Write over a lease that stood still, so that it can never be renewed; GONE only if that is definite."""
        body = fenced_body(holder, owner.name, owner.incarnation, self._node.name, self._node.incarnation)
        try:
            if etag:
                self._store.put(key, body, if_match=etag)
            else:
                self._store.put(key, body, if_absent=True)
        except (PreconditionLost, Ambiguous):
            return SILENT  # the next look tells what stands there
        self.fenced += 1
        self._on_fence(owner)
        return GONE

    def living(self) -> list[Owner]:
        """Other nodes whose lease is neither fenced nor released and was renewed lately, by their clocks: a guess that
        harms nothing where it is wrong. One LIST, one GET each.

        Blocks. Raises as the store does.
        """
        found: list[tuple[int, Owner]] = []
        try:
            for row in list(self._store.list(lease_key(""), limit=NODES_MAX)):
                with contextlib.suppress(ObjectNotFound, Corrupt):
                    holder = envelope.unseal(self._store.get(row.key).body, envelope.KIND_LEASE, row.key)[0]
                    if not holder.get("released") and not holder.get("fenced"):
                        found.append((int(holder.get("seen_ms", 0)), owner_of(holder)))
        except StoreError as error:
            raise refusal(error) from error
        # This node's own is among them, renewed a moment ago: one that is far behind it may be gone.
        newest_ms = max((seen_ms for seen_ms, _ in found), default=0) - LIVING_LEASES * self._lease_ms
        return [owner for seen_ms, owner in found if owner.name != self._node.name and seen_ms >= newest_ms]


def owner_of(holder: dict[str, Any]) -> Owner:
    """The node that a lease names."""
    return Owner(bytes(holder.get("incarnation", b"")), str(holder.get("node", "")), str(holder.get("address", "")))
