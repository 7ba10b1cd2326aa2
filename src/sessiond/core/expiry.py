"""When a session expires, as a pure function of its policy and two times. Never reads a clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sessiond.core.manifest import LIFECYCLE_ACTIVE, LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED

DAY_MS: Final = 86_400_000
# A hundred years: what is meant to last longer has no time to live.
TTL_MS_MAX: Final = 100 * 365 * DAY_MS

# Equal to the enums ExpiryMode and ExpiryAction of turn.proto.
MODE_SLIDING: Final = 1
MODE_FIXED: Final = 2
ACTION_ARCHIVE: Final = 1
ACTION_DELETE: Final = 2


def expires_ms(policy: Mapping[str, Any], created_ms: int, appended_ms: int) -> int:
    """When a session with this policy expires, in ms since 1970; 0 for never.

    appended_ms: when its newest turn was appended, or when it was made: created_ms may be said by an import.
    """
    expiry = policy.get("expiry")
    if not expiry:
        return 0
    since_ms = created_ms if expiry.get("mode") == MODE_FIXED else max(created_ms, appended_ms)
    return int(since_ms + expiry["ttl_ms"])


def expired_lifecycle(policy: Mapping[str, Any]) -> int:
    """What becomes of an expired session under this policy: LIFECYCLE_ARCHIVED or LIFECYCLE_DELETED."""
    expiry = policy.get("expiry") or {}
    return LIFECYCLE_DELETED if expiry.get("action") == ACTION_DELETE else LIFECYCLE_ARCHIVED


def lifecycle_at(lifecycle: int, policy: Mapping[str, Any], expires_at_ms: int, now_ms: int) -> int:
    """The lifecycle that a reader must see: an active session is over at its time, whenever that is written down."""
    if lifecycle == LIFECYCLE_ACTIVE and 0 < expires_at_ms <= now_ms:
        return expired_lifecycle(policy)
    return lifecycle


def day_of(at_ms: int) -> int:
    """The day, counted from 1970 in UTC, whose row of the expiry index names a session that expires then."""
    return at_ms // DAY_MS
