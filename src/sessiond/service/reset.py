"""RESET, the last rung: on the caller's request a new session in the place of one whose history can't be read for good.

It promises that a session which any node can still serve is served, and that a new one is linked to the one it replaces
and made once. What may come back by waiting is never given up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from sessiond.core import state as states
from sessiond.core.manifest import LIFECYCLE_DELETED
from sessiond.errors import REASONS, Conflict, Corrupt, Unavailable
from sessiond.service.ownership import Call, Ownership, Parts, check_user
from sessiond.tiers.hot import log
from sessiond.tiers.hot.rows import PHASE_OWNED, PHASE_RELEASING, decode_committed
from sessiond.tiers.hydrate import load
from sessiond.tiers.peers import Owner
from sessiond.v1 import session_pb2

NOTICE: Final = "The earlier conversation could not be recovered. This is a new one, and it knows nothing of that one."

# Has another node answer a resume; the reply's wire bytes, None if it can't read the session either.
# Raises SessiondError where it does not say.
Ask = Callable[[Call, Owner, session_pb2.ResumeSessionRequest], Awaitable[bytes | None]]


@dataclass(slots=True)
class Left:
    """What can still be said of a session whose history can't be read."""

    user: str
    policy: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def is_for_good(error: Corrupt) -> bool:
    """Whether waiting, or another release, can't help."""
    return REASONS[error.reason].status == "DATA_LOSS"


async def asked_elsewhere(
    parts: Parts, own: Ownership, ask: Ask | None, call: Call, request: session_pb2.ResumeSessionRequest, error: Corrupt
) -> bytes | None:
    """The reply of a node that has the session hot although its manifest can't be read; None if there is none.

    Raises the error itself where a node can't be asked: it may have the session.
    """
    if error.reason != "CORRUPT_MANIFEST" or parts.peers is None or ask is None:
        return None  # a manifest that can be read names the owner, and that is this node or nobody
    plain = session_pb2.ResumeSessionRequest()
    plain.CopyFrom(request)
    plain.reset_to_session_id = ""
    for owner in await own.off_loop(parts.peers.living):
        try:
            reply = await ask(call, owner, plain)
        except Unavailable:
            raise error from None
        if reply is not None:
            return reply
    return None


async def what_is_left(parts: Parts, own: Ownership, h: bytes, session_id: str, user_id: str) -> Left:
    """Policy, user and metadata by the rows, else by the manifest, else only what the request says.

    Raises NotFound if it is another user's, Unavailable.
    """
    left = Left(user_id)
    with contextlib.suppress(Corrupt), parts.hot.read() as transaction:
        head = log.read_head(transaction, h)
        if head is not None and head.phase in (PHASE_OWNED, PHASE_RELEASING):
            left = Left(head.user, dict(head.policy))
            with contextlib.suppress(Corrupt):
                left.metadata = dict(states.decode(head.state).metadata)
            check_user(session_id, left.user, user_id)
            return left
    with contextlib.suppress(Corrupt):
        cold = await own.off_loop(load, parts.store, h)
        if cold is not None:
            manifest = cold.manifest
            left = Left(manifest.user, dict(manifest.policy), dict(manifest.birth.get("metadata", {})))
            with contextlib.suppress(Corrupt):
                left.metadata = dict(states.decode(manifest.state).metadata)
            check_user(session_id, left.user, user_id)
    return left


async def check_linked(parts: Parts, own: Ownership, h: bytes, session_id: str, lost_id: str) -> None:
    """The session that has the new id is the one that a RESET made.

    Raises Conflict SESSION_EXISTS, NotFound SESSION_DELETED, Unavailable.
    """
    head = own.peek(h)
    if head is not None and head.phase == PHASE_OWNED:
        with parts.hot.read() as transaction:
            birth = decode_committed(h, transaction.get("manifests", h)).birth
    else:
        cold = await own.load(h)
        if cold is None:
            raise Unavailable("STORE_UNAVAILABLE", f"The session {session_id!r} was made and can't be found.")
        if cold.manifest.lifecycle == LIFECYCLE_DELETED:
            raise log.deleted(session_id)
        birth = cold.manifest.birth
    if birth.get("reset_of") != lost_id:
        raise Conflict(
            "SESSION_EXISTS",
            f"The session id {session_id!r} is taken.",
            {"session_id": session_id},
            [("reset_to_session_id", "taken")],
        )
