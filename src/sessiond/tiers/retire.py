"""The end of a session: the tombstone that stays, the objects that go, and the index of what expires on which day.

It promises that nothing is removed before the manifest that gives it up is definite, and that a row of the expiry
index stands before the manifest that needs it. It never lists the bucket: only one session's objects, or past days.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from sessiond.core import blobs, envelope
from sessiond.core.expiry import day_of
from sessiond.core.manifest import EPOCH_ROWS_MAX, LIFECYCLE_ACTIVE, LIFECYCLE_DELETED, Manifest
from sessiond.tiers.cloud.bucket import Bucket, refusal
from sessiond.tiers.cloud.store import ObjectStore, StoreError
from sessiond.tiers.hot.rows import DURABILITY_CLOUD, Head


def tombstone(manifest: Manifest) -> Manifest:
    """The manifest that stays for ever: whose the id was, and nothing of what was said; pins of forks stay with it."""
    birth: dict[str, Any] = {
        "created_ms": manifest.birth.get("created_ms", 0),
        "metadata": {},
        "forked_from": "",
        "forked_epoch": 0,
        "forked_seq": 0,
        "reset_of": "",
    }
    if manifest.birth.get("parent"):
        birth["parent"] = manifest.birth["parent"]  # what it kept there is let go of, now or in another try
    return replace(
        manifest,
        owner=None,
        birth=birth,
        policy={},
        state=b"",
        checkpoints=[],
        turn_ids=b"",
        segments=[],
        index=None,
        kept=[],
        kept_bytes=0,
        inline_first=manifest.head + 1,
        loss=[],
        lifecycle=LIFECYCLE_DELETED,
        expires_ms=0,
        orphans=[],
        state_keys={},
        extra={},
        payload=b"",
    )


def remove_objects(
    store: ObjectStore, bucket: Bucket, h: bytes, was: Head | Manifest, objects_max: int, pinned_seq: int = 0
) -> bool:
    """Remove what a tombstone left behind: segments, orphans, blobs, rows that name the session. Whether all of it.

    It lists the session's own prefixes, so that objects go too that no manifest ever named; of these at
    most objects_max, to go on another time. was: the session, before its tombstone or after. pinned_seq: segments that
    begin up to this turn stay, for forks name them. Raises as the store does.
    """
    created_ms = was.created_ms if isinstance(was, Head) else int(was.birth.get("created_ms", 0))
    left = objects_max
    try:
        for prefix in (f"s/{h.hex()}/", f"o/{h.hex()}/", f"b/{h.hex()}/"):
            start_after = ""
            while True:
                asked = left + 1
                keys = [row.key for row in store.list(prefix, start_after, asked)]
                for key in keys:
                    if 0 < first_seq_of(key) <= pinned_seq:
                        continue
                    if left == 0:
                        return False
                    store.delete(key)
                    left -= 1
                if len(keys) < asked:
                    break
                start_after = keys[-1]
        store.delete(bucket.user_index_key(was.tenant, was.user, created_ms, h))
        if was.expires_ms:
            store.delete(bucket.expiry_key(was.tenant, day_of(was.expires_ms), h))
    except StoreError as error:
        raise refusal(error) from error
    return True


def first_seq_of(key: str) -> int:
    """The first turn of a segment, by its key as bucket.segment_key makes it; 0 for the key of anything else."""
    parts = key.split("/")[-1].split("-")
    try:
        return int(parts[1], 16) if key.startswith("s/") and len(parts[0]) == 8 and len(parts) == 3 else 0
    except ValueError:
        return 0


def put_expiry_row(store: ObjectStore, bucket: Bucket, manifest: Manifest) -> None:
    """Say in the index on which day a session expires; for a tombstone that is about to be written, on which day
    somebody should look whether all that it leaves behind is gone. Raises as the store does.
    """
    day = day_of(manifest.written_ms if manifest.lifecycle == LIFECYCLE_DELETED else manifest.expires_ms)
    meta = {"v": 1, "tenant": manifest.tenant, "session": manifest.session, "h": manifest.h, "day": day}
    # Whatever becomes of this write, the row is a hint: the manifest decides.
    store.put(bucket.expiry_key(manifest.tenant, day, manifest.h), envelope.seal(envelope.KIND_EXPIRY, meta))


def needs_row(before: Manifest | None, after: Manifest) -> bool:
    """Whether the index lacks the day on which `after` expires. before: what was committed last."""
    if not after.expires_ms or after.lifecycle != LIFECYCLE_ACTIVE:
        return False
    return before is None or not before.expires_ms or day_of(before.expires_ms) != day_of(after.expires_ms)


def leaves_row(before: Manifest, after: Manifest) -> bool:
    """Whether the row for the day of `before` has no use any more once `after` is committed."""
    if not before.expires_ms:
        return False
    gone = after.lifecycle != LIFECYCLE_ACTIVE or not after.expires_ms
    return gone or day_of(before.expires_ms) != day_of(after.expires_ms)


def ended(manifest: Manifest, incarnation: bytes, lifecycle: int, loss: list[int] | None, now_ms: int) -> Manifest:
    """The manifest that ends a session which nobody owns: it takes the next epoch and gives it up at once.

    lifecycle: archived or deleted. loss: a row to add because its last owner was lost with its hot tier.
    """
    epoch, mutation = manifest.epoch + 1, manifest.mutation + 1
    lossy = loss is not None and int(manifest.policy.get("min_durability", 0)) != DURABILITY_CLOUD
    end = replace(
        manifest,
        mutation=mutation,
        write_id=os.urandom(8),
        epoch=epoch,
        epochs=[*manifest.epochs, [epoch, incarnation, manifest.head + 1, mutation]][-EPOCH_ROWS_MAX:],
        owner=None,
        lifecycle=lifecycle,
        loss=[*manifest.loss, *([loss] if lossy and loss else [])],
        state_keys=blobs.with_loss(manifest.state_keys, loss if lossy else None),
        written_ms=now_ms,
    )
    return tombstone(end) if lifecycle == LIFECYCLE_DELETED else end
