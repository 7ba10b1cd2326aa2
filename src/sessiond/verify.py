"""`sessiond verify`: gathers one view per session from both tiers and runs every invariant over it.

It only reads, so it is safe beside a live daemon: what looks wrong is read again before it is reported. It never mends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sessiond.config import Settings
from sessiond.core import invariants, rules
from sessiond.core.invariants import HotView, View
from sessiond.core.manifest import LIFECYCLE_DELETED, Manifest
from sessiond.errors import Corrupt, NotFound, SessiondError
from sessiond.tiers.cloud.bucket import Bucket, open_bucket, refusal
from sessiond.tiers.cloud.open import open_store
from sessiond.tiers.cloud.store import ObjectStore, StoreError
from sessiond.tiers.hot import log
from sessiond.tiers.hot.environment import Reader
from sessiond.tiers.hot.rows import PHASE_OWNED, PHASE_RELEASED, PHASE_RELEASING, Head, decode_committed, decode_head
from sessiond.tiers.hydrate import Segments, load

READ_AGAIN_MAX = 3
READ_AGAIN_WAIT_S = 0.3


@dataclass(frozen=True, slots=True)
class Violation:
    """One invariant that one session breaks. session_id: its hash in hexadecimal where the id can't be read."""

    invariant: str
    session_id: str
    explanation: str


def verify(
    settings: Settings, progress: Callable[[int, int], None], session: str | None = None, tenant: str = "default"
) -> list[Violation]:
    """Check every session of a node's hot tier and of its cloud tier, or one. progress: called with (checked, total).

    Raises as opening either tier does, and NotFound if the one session is in neither.
    """
    store = open_store(
        settings.cloud_url,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        path_style=settings.s3_path_style,
        connect_timeout_ms=settings.store_connect_timeout_ms,
        read_timeout_ms=settings.store_read_timeout_ms,
    )
    hot = Reader(settings.hot_dir) if (settings.hot_dir / "data.mdb").exists() else None
    try:
        bucket = open_bucket(store, bytes.fromhex(settings.hash_key), 0, make=False)
        checker = _Checker(store, bucket, hot)
        if session is not None:
            wanted = [rules.session_hash(bucket.hash_key, tenant, session)]
        else:
            wanted = sorted(checker.hot_hashes() | checker.cloud_hashes())
        found: list[Violation] = []
        for index, h in enumerate(wanted):
            progress(index, len(wanted))
            name, violations = checker.check(h)
            if session is not None and name is None and not violations:
                raise NotFound("SESSION_NOT_FOUND", f"There is no session {session!r}.", {"session_id": session})
            found += [Violation(invariant, name or h.hex(), explanation) for invariant, explanation in violations]
        progress(len(wanted), len(wanted))
        return found
    finally:
        if hot is not None:
            hot.close()
        store.close()


class _Checker:
    def __init__(self, store: ObjectStore, bucket: Bucket, hot: Reader | None) -> None:
        self._store = store
        self._bucket = bucket
        self._hot = hot
        self._segments = Segments(store)

    def hot_hashes(self) -> set[bytes]:
        """Every session with a head row."""
        if self._hot is None:
            return set()
        with self._hot.read() as transaction:
            return {bytes(key) for key, _ in transaction.scan("heads", b"")}

    def cloud_hashes(self) -> set[bytes]:
        """Every session with a manifest or with segments."""
        found: set[bytes] = set()
        for prefix in ("m/", "s/"):
            for key in self._keys(prefix):
                with contextlib.suppress(ValueError):
                    found.add(bytes.fromhex(key.split("/")[1]))
        return found

    def _keys(self, prefix: str, limit: int = 1000) -> Iterator[str]:
        start_after = ""
        while True:
            try:
                keys = [row.key for row in self._store.list(prefix, start_after, limit)]
            except StoreError as error:
                raise refusal(error) from error
            yield from keys
            if len(keys) < limit:
                return
            start_after = keys[-1]

    def check(self, h: bytes) -> tuple[str | None, list[tuple[str, str]]]:
        """(session id, violations); the id is None if the session is nowhere."""
        name: str | None = None
        violations: list[tuple[str, str]] = []
        for attempt in range(READ_AGAIN_MAX):
            name, violations = self._check_once(h)
            if not violations:
                break
            # Between the reads of the two tiers a live daemon may have moved on; what stays wrong is wrong.
            if attempt + 1 < READ_AGAIN_MAX:
                time.sleep(READ_AGAIN_WAIT_S)
        return name, violations

    def _check_once(self, h: bytes) -> tuple[str | None, list[tuple[str, str]]]:
        unreadable: list[str] = []
        head, hot, hot_frames, base = self._read_hot(h, unreadable)
        cloud: Manifest | None = None
        try:
            cold = load(self._store, h)
            cloud = cold.manifest if cold else None
        except Corrupt as error:
            unreadable.append(error.message)
        if hot is None:
            # Released, fenced or half claimed: the cloud tier has the truth.
            left, head = head, None
        else:
            left = None
        if cloud is None and head is None:
            if unreadable:
                return None, [("I11", text) for text in unreadable]
            broken = [("I2", text) for text in self._without_manifest(h, left)]
            return left.session if left and broken else None, broken
        if cloud is not None and cloud.lifecycle == LIFECYCLE_DELETED:
            return cloud.session, []
        pieces: list[bytes] = []
        checked: dict[int, bytes] = {}
        if cloud is not None:
            self._read_cloud(cloud, unreadable, pieces, checked)
        turns = [turn for piece in pieces for turn in self._turns(h, piece, unreadable)]
        for turn in turns:
            checked[turn.header.seq] = turn.header.chain
        if hot is not None:
            first = hot.hot_first
            turns = [turn for turn in turns if turn.header.seq < first]
            turns += [turn for turn in self._turns(h, hot_frames, unreadable) if turn.header.seq >= first]
        if hot is not None and cloud is not None:
            owner = cloud.owner[0] if cloud.owner else b""
            if not owner and head is not None and head.phase == PHASE_RELEASING:
                # A crash came between the store's answer to a release and our row: whose release was it?
                owner = cloud.epochs[-1][1]
            hot.ours = bool(cloud.epoch == hot.epoch and self._hot and owner == self._hot.incarnation)
        manifest = cloud or base
        assert manifest is not None or head is not None
        view = View(
            h=h,
            hash_key=self._bucket.hash_key,
            tenant=head.tenant if head else manifest.tenant if manifest else "",
            session=head.session if head else manifest.session if manifest else "",
            birth_metadata=dict(manifest.birth.get("metadata", {})) if manifest else {},
            log=turns,
            head_seq=head.head_seq if head else manifest.head if manifest else 0,
            state=head.state if head else manifest.state if manifest else b"",
            hot=hot,
            cloud=cloud,
            cloud_checked_seqs=checked,
            unreadable=unreadable,
        )
        return view.session, list(invariants.check(view))

    def _without_manifest(self, h: bytes, left: Head | None) -> Iterator[str]:
        """What should not be where there is no manifest. left: the head row of a session that the node does not own.

        A row in the index by user may stand alone: a creation that was never acknowledged.
        """
        if left is not None and left.phase == PHASE_RELEASED and left.head_seq > 0:
            yield f"the node released it at turn {left.head_seq} and the cloud tier has no manifest of it"
        if next(self._keys(f"s/{h.hex()}/", 1), None) is not None:
            yield "the cloud tier has segments without a manifest"

    def _turns(self, h: bytes, frames: bytes, unreadable: list[str]) -> list[invariants.Turn]:
        try:
            return invariants.view_turns(h, frames)
        except Corrupt as error:
            unreadable.append(error.message)
            return []

    def _read_hot(self, h: bytes, unreadable: list[str]) -> tuple[Head | None, HotView | None, bytes, Manifest | None]:
        if self._hot is None:
            return None, None, b"", None
        with self._hot.read() as transaction:
            try:
                value = transaction.get("heads", h)
                if value is None:
                    return None, None, b"", None
                head = decode_head(h, value)
            except Corrupt as error:
                unreadable.append(error.message)
                return None, None, b"", None
            if head.phase not in (PHASE_OWNED, PHASE_RELEASING):
                return head, None, b"", None
            view = HotView(head.epoch, True, True, head.head_seq, head.cloud_seq, head.hot_first, head.state)
            base: Manifest | None = None
            pieces: list[bytes] = []
            try:
                for key, value in transaction.scan("turns", h):
                    row = bytes(value)
                    first_seq = int.from_bytes(key[16:], "big")
                    view.row_sizes.append((first_seq, len(row), len(invariants.view_turns(h, row))))
                    if first_seq >= head.hot_first:
                        pieces.append(row)
                view.checkpoints = log.checkpoints(transaction, h)
                view.turn_ids = log.turn_ids(transaction, h)
                stored = transaction.get("manifests", h)
                base = decode_committed(h, stored) if stored is not None else None
            except SessiondError as error:
                unreadable.append(error.message)
            return head, view, b"".join(pieces), base

    def _read_cloud(
        self, manifest: Manifest, unreadable: list[str], pieces: list[bytes], checked: dict[int, bytes]
    ) -> None:
        try:
            for turn in invariants.view_turns(manifest.h, manifest.payload):
                checked[turn.header.seq] = turn.header.chain
            inline_from = manifest.inline_first
            for row in self._segments.rows(manifest):
                frames = self._segments.frames(manifest, row)
                turns = invariants.view_turns(manifest.h, frames)
                for turn in turns:
                    checked[turn.header.seq] = turn.header.chain
                cut = next((turn.header.offset for turn in turns if turn.header.seq >= inline_from), len(frames))
                pieces.append(frames[:cut])
            pieces.append(manifest.inline_frames)
        except SessiondError as error:
            unreadable.append(error.message)
