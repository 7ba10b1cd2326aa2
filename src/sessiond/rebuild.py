"""`sessiond rebuild`: makes a stopped node's hot tier anew from the cloud tier.

It promises that the next start finds every session that this node name owned, hot, with what may be missing said; that
acknowledged turns which only the old hot tier has are never given up unasked; and that it can be killed at any moment
and run again. The old hot tier is moved aside, never deleted, and a deleted session never comes back.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sessiond import offline
from sessiond.config import Settings
from sessiond.core.blobs import equals
from sessiond.core.manifest import LIFECYCLE_DELETED, Manifest
from sessiond.errors import Denied, NotFound, SessiondError
from sessiond.service.ownership import REASON_LOST
from sessiond.tiers.cloud.bucket import Bucket
from sessiond.tiers.cloud.store import ObjectStore
from sessiond.tiers.hot import blobs, log
from sessiond.tiers.hot.datafile import require_unused
from sessiond.tiers.hot.environment import Environment, Reader
from sessiond.tiers.hot.rows import DURABILITY_CLOUD, PHASE_CLAIMING, PHASE_OWNED
from sessiond.tiers.hot.survey import survey
from sessiond.tiers.hydrate import Claims, Node, load

# Stands in a hot tier that a rebuild has not finished; nobody else looks at it.
MARK: Final = "rebuilding"
CLAIMS_MAX: Final = 16
# What became of one session.
CLAIMED, HELD, RELEASED, OTHERS, DELETED, ABSENT = "claimed", "held", "released", "others", "deleted", "absent"


@dataclass(slots=True)
class Report:
    """What a rebuild did. sessions: counts by what became of them; unreadable: (session hash, reason, message).

    aside: where the old hot tier is, if there was one. may_miss: claimed sessions that may lack turns.
    abandoned: (sessions, turns) of the old hot tier that the cloud tier lacks.
    """

    aside: str = ""
    continued: bool = False
    claimed: int = 0
    may_miss: int = 0
    already: int = 0
    released: int = 0
    of_other_nodes: int = 0
    deleted: int = 0
    abandoned: tuple[int, int] = (0, 0)
    unreadable: list[tuple[str, str, str]] = field(default_factory=list)
    limited: bool = False


def rebuild(
    settings: Settings,
    *,
    every: bool = False,
    user: str | None = None,
    limit: int = 0,
    abandon_unflushed: bool = False,
    tenant: str = "default",
    told: Callable[[str], None] = lambda line: None,
) -> Report:
    """Make the hot tier anew and fill it with this node's sessions. every: released ones as well. limit: 0 for none.

    Raises Unavailable HOT_TIER_IN_USE or NODE_NAME_IN_USE, Denied UNFLUSHED_TURNS, and as either tier does.
    """
    report = Report()
    require_unused(settings.hot_dir)
    with ExitStack() as opened:
        store, bucket = opened.enter_context(offline.cloud_tier(settings))
        report.continued = (settings.hot_dir / MARK).exists()
        if not report.continued:
            # Before anything is moved: the name may be held by a daemon on another machine.
            with offline.node_name(settings, store) as name:
                _clear_the_place(settings, report, abandon_unflushed, name.before, told)
        old = _old_tier(settings.hot_dir)
        if old is not None:
            opened.callback(old.close)
        hot = opened.enter_context(offline.hot_tier(settings, bucket))
        name = opened.enter_context(offline.node_name(settings, store, hot))
        claims = Claims(hot, store, bucket, Node(hot.incarnation, settings.node, settings.address()), time.sleep)
        opened.callback(claims.close)
        filling = _Filling(settings, store, hot, claims, every, report, old)
        filling.run(_wanted(store, bucket, tenant, user), limit, name.still_held, told)
        (settings.hot_dir / MARK).unlink(missing_ok=True)
        offline.settle_folder(settings.hot_dir)
    return report


def _clear_the_place(
    settings: Settings,
    report: Report,
    abandon_unflushed: bool,
    before: dict[str, Any],
    told: Callable[[str], None],
) -> None:
    """Move an existing hot tier aside, unless it has turns that nothing else has, and begin an empty one.

    before: what the lease said of the hot tier that the node's name stood for.
    """
    hot_dir = settings.hot_dir
    believed = False
    if (hot_dir / "data.mdb").exists():
        found = survey(hot_dir, lambda sessions: told(f"looked at {sessions} sessions of the old hot tier"))
        report.abandoned = found.unflushed
        sessions, turns = found.unflushed
        damaged = f" Damaged rows of {len(found.damaged)} sessions may hold more." if found.damaged else ""
        if not abandon_unflushed and (sessions or found.damaged):
            raise Denied(
                "UNFLUSHED_TURNS",
                f"The hot tier in {hot_dir} has {turns} turns of {sessions} sessions that the cloud tier lacks."
                f"{damaged}",
                {"path": str(hot_dir), "sessions": str(sessions), "turns": str(turns)},
            )
        if not abandon_unflushed and found.unusable:
            raise Denied(
                "UNFLUSHED_TURNS",
                f"The hot tier in {hot_dir} can't be read, so nobody knows what only it has: {found.unusable}.",
                {"path": str(hot_dir)},
                remedy="Keep a copy for whoever may read it; then run sessiond repair, which moves it aside, or pass"
                " --abandon-unflushed.",
            )
        believed = not found.unusable and not found.damaged and _is_newest(hot_dir, before)
    if hot_dir.exists():
        report.aside = str(offline.move_aside(hot_dir))
    # The mark comes first: whoever finds it finishes this, and moves nothing aside again.
    fresh = hot_dir.with_name(f"{hot_dir.name}.{MARK}")
    fresh.mkdir(parents=True, exist_ok=True)
    with open(fresh / MARK, "w", encoding="utf-8") as file:
        file.write(report.aside if believed else "")
        file.flush()
        os.fsync(file.fileno())
    offline.settle_folder(fresh)
    os.rename(fresh, hot_dir)
    offline.settle_folder(hot_dir.parent)


def _is_newest(hot_dir: Path, before: dict[str, Any]) -> bool:
    """Whether the node's name stood for this very copy of a hot tier until the end: its rows can be believed."""
    reader = Reader(hot_dir)
    try:
        return bool(
            before.get("incarnation") == reader.incarnation and int(before.get("txn", 0)) <= reader.transaction_id
        )
    finally:
        reader.close()


def _old_tier(hot_dir: Path) -> Reader | None:
    """The hot tier that was moved aside, if its rows are to be believed."""
    aside = (hot_dir / MARK).read_text(encoding="utf-8")
    return Reader(Path(aside)) if aside else None


def _wanted(store: ObjectStore, bucket: Bucket, tenant: str, user: str | None) -> Iterator[bytes]:
    """The sessions to look at: of one user by the index, else every manifest, a page of keys at a time."""
    prefix = "m/" if user is None else bucket.user_prefix(tenant, user)
    for row in offline.listed(store, prefix):
        try:
            h = bytes.fromhex(row.key.rsplit("/", 1)[1].rsplit("-", 1)[-1])
        except ValueError:
            continue
        if len(h) == 16:
            yield h


class _Filling:
    """Claims sessions, several at a time."""

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        hot: Environment,
        claims: Claims,
        every: bool,
        report: Report,
        old: Reader | None,
    ) -> None:
        self._node = settings.node
        self._store = store
        self._hot = hot
        self._claims = claims
        self._every = every
        self._report = report
        self._old = old

    def run(
        self, wanted: Iterator[bytes], limit: int, still_held: Callable[[], None], told: Callable[[str], None]
    ) -> None:
        """Claim what is to be claimed; counts and refusals go into the report. Raises if the store is away."""
        counts: Counter[str] = Counter()
        report = self._report
        under_way: dict[Future[tuple[str, bool]], bytes] = {}

        def settle(block: bool) -> None:
            done = wait(under_way, return_when=FIRST_COMPLETED).done if block else [f for f in under_way if f.done()]
            for future in done:
                h = under_way.pop(future)
                try:
                    outcome, may_miss = future.result()
                except SessiondError as error:
                    if error.reason in ("STORE_UNAVAILABLE", "STORE_DENIED"):
                        raise
                    report.unreadable.append((h.hex(), error.reason, error.message))
                    continue
                counts[outcome] += 1
                report.may_miss += may_miss

        with ThreadPoolExecutor(max_workers=CLAIMS_MAX, thread_name_prefix="rebuild") as pool:
            try:
                for h in wanted:
                    # Exactly: those under way may all turn out to be claims.
                    while under_way and limit and counts[CLAIMED] + len(under_way) >= limit:
                        settle(True)
                    if limit and counts[CLAIMED] >= limit:
                        report.limited = True
                        break
                    still_held()
                    under_way[pool.submit(self._fill, h)] = h
                    settle(len(under_way) >= CLAIMS_MAX)
                    told(f"{counts[CLAIMED]} sessions claimed, {sum(counts.values())} looked at")
                while under_way:
                    settle(True)
            finally:
                for future in under_way:
                    future.cancel()
        report.claimed, report.already, report.released = counts[CLAIMED], counts[HELD], counts[RELEASED]
        report.of_other_nodes, report.deleted = counts[OTHERS], counts[DELETED]

    def _fill(self, h: bytes) -> tuple[str, bool]:
        """(what became of a session, whether it may lack turns)."""
        cold = load(self._store, h)
        if cold is None:
            return ABSENT, False
        manifest = cold.manifest
        if manifest.lifecycle == LIFECYCLE_DELETED:
            return DELETED, False
        if manifest.owner is None and not self._every:
            return RELEASED, False
        if manifest.owner is not None and manifest.owner[1] != self._node:
            return OTHERS, False
        with self._hot.read() as transaction:
            head = log.read_head(transaction, h)
        if head is not None and head.phase == PHASE_OWNED:
            return HELD, False
        if head is not None and head.phase == PHASE_CLAIMING and self._claims.resume_claim(cold, head):
            return CLAIMED, any(not row[3] for row in manifest.loss)
        loss = self._loss(manifest)
        if not self._claims.claim(cold, loss, time.time_ns() // 1_000_000):
            raise NotFound("SESSION_NOT_FOUND", f"Session {manifest.session!r} was taken by somebody else meanwhile.")
        return CLAIMED, loss is not None or any(not row[3] for row in manifest.loss)

    def _loss(self, manifest: Manifest) -> list[int] | None:
        """The row that a daemon would add which lost its disk: turns that the old hot tier may have acknowledged."""
        if manifest.owner is None or int(manifest.policy.get("min_durability", 0)) == DURABILITY_CLOUD:
            return None
        if self._old is not None and manifest.owner[0] == self._old.incarnation:
            with self._old.read() as transaction:
                head = log.read_head(transaction, manifest.h)
                ledger = blobs.read_ledger(transaction, manifest.h)
            flushed = head is not None and head.head_seq <= manifest.head
            if head is not None and head.epoch == manifest.epoch and flushed and equals(ledger, manifest.state_keys):
                return None  # the old rows are there to tell: nothing was acknowledged behind the manifest
        return [manifest.epoch, manifest.head, REASON_LOST, 0]
