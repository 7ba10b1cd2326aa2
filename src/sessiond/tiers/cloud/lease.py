"""A node's lease: one object that says which hot tier this node name stands for, renewed while the daemon lives.

It promises that two live daemons never hold the same node name, and that `is_valid` is true only within the lease after
a definite renewal. It never decides about a session.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from sessiond.core import envelope
from sessiond.errors import Corrupt, SessiondError, Unavailable
from sessiond.tiers.cloud.bucket import lease_key, start_refusal
from sessiond.tiers.cloud.store import Ambiguous, ObjectNotFound, ObjectStore, PreconditionLost, StoreError

# DESIGN.md, "Steal": the lease object must have stood still for this many lease times.
STANDSTILL_LEASES = 3
LEASES_READ_MAX = 100
# So many attempts to take a name may end without a known outcome.
ACQUIRE_ATTEMPTS_MAX = 20


def boot_clock_ms() -> int:
    """Milliseconds since boot, time asleep included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""


def process_identity() -> dict[str, Any]:
    """What tells this process from any other on this boot of this machine."""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
        return {
            "boot_id": _read("/proc/sys/kernel/random/boot_id"),
            "machine_id": _read("/etc/machine-id"),
            "pid_namespace": namespace,
            "pid": os.getpid(),
            "start_ticks": _start_ticks(os.getpid()),
        }
    return {"boot_id": "", "machine_id": "", "pid_namespace": "", "pid": os.getpid(), "start_ticks": 0}


def _start_ticks(pid: int) -> int:
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return 0
    state, *rest = stat[stat.rindex(")") + 2 :].split()
    return 0 if state in "ZX" else int(rest[18])


def is_alive(holder: dict[str, Any]) -> bool | None:
    """Whether the process that wrote this lease lives: True, False, or None where it can't be known from here."""
    mine = process_identity()
    if holder.get("boot_id") == mine["boot_id"] and mine["boot_id"]:
        if holder.get("pid_namespace") != mine["pid_namespace"]:
            return None
        ticks = _start_ticks(int(holder.get("pid", 0)))
        return ticks != 0 and ticks == holder.get("start_ticks")
    # Another boot, or another machine: images are cloned with their machine-id, so it proves nothing.
    return None


def fenced_body(holder: dict[str, Any], node: str, incarnation: bytes, by_node: str, by_incarnation: bytes) -> bytes:
    """The lease object that ends a lease from outside: what its holder wrote, {} for nothing, and who fenced it."""
    fields = holder or {"v": 1, "node": node, "incarnation": incarnation, "address": ""}
    by = {"node": by_node, "incarnation": by_incarnation, "id": os.urandom(16)}
    return envelope.seal(envelope.KIND_LEASE, {**fields, "fenced": by})


def last_seen_ms(store: ObjectStore) -> int:
    """When any node of the bucket was last seen alive, by their clocks; 0 if none was. Raises as the store does."""
    seen = 0
    try:
        for row in list(store.list(lease_key(""), limit=LEASES_READ_MAX)):
            with contextlib.suppress(ObjectNotFound, Corrupt):
                holder, _ = envelope.unseal(store.get(row.key).body, envelope.KIND_LEASE, row.key)
                seen = max(seen, int(holder.get("seen_ms", 0)))
    except StoreError as error:
        raise start_refusal(error) from error
    return seen


class Lease:
    """The lease of one node. `acquire` once, then `start`; `is_valid` from any thread."""

    def __init__(
        self,
        store: ObjectStore,
        node: str,
        incarnation: bytes,
        address: str,
        lease_ms: int,
        on_lost: Callable[[], None],
        wait: Callable[[float], object] = time.sleep,
        clock_ms: Callable[[], int] = boot_clock_ms,
        transaction_id: Callable[[], int] = lambda: 0,
        on_fenced: Callable[[], None] = lambda: None,
    ) -> None:
        """on_lost: another daemon has the name. on_fenced: another node took this one for gone; what this node owned
        must be in doubt on disk when it returns, before the lease is taken again.
        """
        self._store = store
        self._key = lease_key(node)
        self._lease_ms = lease_ms
        self._on_lost = on_lost
        self._on_fenced = on_fenced
        self._wait = wait
        self._clock_ms = clock_ms
        self._transaction_id = transaction_id
        self._etag = ""
        self._renewals = 0
        self._valid_until_ms = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._fields: dict[str, Any] = {
            "v": 1,
            "node": node,
            "incarnation": incarnation,
            "address": address,
            "lease_ms": lease_ms,
            "released": False,
            # Tells a write of this very lease from any other, of the same process as well.
            "start_id": os.urandom(16),
            **process_identity(),
        }
        self.lost = False
        # True from the moment at which a fence is seen until the lease is held again.
        self.fenced = False
        # Rises when a fence is seen, and again before the lease is taken anew: what was under way before, or read rows
        # before, must neither settle as owned nor call itself confirmed after.
        self.tenure = 0
        # How often this node was fenced.
        self.fences = 0
        # Called whenever any of what is_valid, tenure and lost say has changed, before anything follows from it.
        self.on_change: Callable[[], None] = lambda: None
        # What time it is, for a successor whose clock says something else; 0 until somebody knows.
        self.seen_ms: Callable[[], int] = lambda: 0

    def acquire(self, before: Callable[[dict[str, Any] | None], None] = lambda holder: None) -> None:
        """Take the node's name. A predecessor that is provably gone, or stood still long enough, is fenced by it.

        before: called ahead of each attempt to write, with what the holder before had written, None if there was none.
        What it does must be on disk when it returns: once the name is ours nobody sees that holder again.
        Raises Unavailable NODE_NAME_IN_USE or COMMIT_UNKNOWN, Corrupt CORRUPT_MANIFEST or NEWER_FORMAT, and as the
        store does.
        """
        stood_still_since: tuple[str, int] | None = None
        changes = unclear = 0
        while True:
            sent_ms = self._clock_ms()
            try:
                found = self._store.get(self._key)
            except ObjectNotFound:
                found = None
            except StoreError as error:
                raise start_refusal(error) from error
            try:
                if found is None:
                    before(None)
                    self._write(self._clock_ms(), if_absent=True)
                    return
                holder = self._holder(found.body)
                # An attempt of this very start may have landed without an answer: it is no holder before.
                if not self._is_this(holder) or holder.get("fenced"):
                    ended = holder.get("released") or holder.get("fenced")
                    alive = False if ended else is_alive(holder)
                    mine = holder.get("pid") == os.getpid() and holder.get("start_ticks") == self._fields["start_ticks"]
                    if alive and not mine:
                        raise self._in_use(holder)
                    if alive is None:
                        wait_ms = STANDSTILL_LEASES * int(holder.get("lease_ms", self._lease_ms))
                        if stood_still_since is None or stood_still_since[0] != found.etag:
                            stood_still_since = (found.etag, sent_ms)
                            changes += 1
                            if changes > STANDSTILL_LEASES:
                                raise self._in_use(holder)
                        if sent_ms - stood_still_since[1] < wait_ms:
                            self._wait(min(wait_ms, self._lease_ms) / 4000)
                            continue
                    self._renewals = int(holder.get("renewals", 0))
                    self.seen_ms = partial(int, holder.get("seen_ms", 0))
                    before(holder)
                self._write(self._clock_ms(), if_match=found.etag)
                return
            except (PreconditionLost, Ambiguous) as error:
                unclear += 1
                if unclear == ACQUIRE_ATTEMPTS_MAX:
                    raise start_refusal(error) from error
                self._wait(0.05)  # read again and see who it was
            except StoreError as error:
                raise start_refusal(error) from error

    def _is_this(self, holder: dict[str, Any]) -> bool:
        """Whether this very object wrote it, or it was written over one of this object's that had gone."""
        absent = "start_id" not in holder and holder.get("incarnation") == self._fields["incarnation"]
        return bool(holder.get("start_id") == self._fields["start_id"] or (absent and holder.get("fenced")))

    def _holder(self, body: bytes) -> dict[str, Any]:
        try:
            return envelope.unseal(body, envelope.KIND_LEASE, self._key)[0]
        except Corrupt as error:
            if error.reason == "CORRUPT_MANIFEST":
                error.remedy = "Make sure that no daemon serves under this node name, then run sessiond repair."
            raise

    def _in_use(self, holder: dict[str, Any]) -> Unavailable:
        return Unavailable(
            "NODE_NAME_IN_USE",
            f"Process {holder.get('pid')} serves as node {self._fields['node']!r} on this bucket.",
            {"node": str(self._fields["node"]), "pid": str(holder.get("pid"))},
            [("node_name", "in use by a live process")],
        )

    def _write(self, sent_ms: int, *, if_absent: bool = False, if_match: str | None = None) -> None:
        self._renewals += 1
        # txn: how far the hot tier had come. A copy that was put back is behind it, and is another hot tier.
        moving = {"renewals": self._renewals, "txn": self._transaction_id(), "seen_ms": self.seen_ms()}
        body = envelope.seal(envelope.KIND_LEASE, {**self._fields, **moving})
        self._etag = self._store.put(self._key, body, if_absent=if_absent, if_match=if_match)
        self._valid_until_ms = sent_ms + self._lease_ms
        self.on_change()

    def rename(self, incarnation: bytes) -> None:
        """Hold the name, from the next write on, for another incarnation of this process's hot tier."""
        self._fields["incarnation"] = incarnation

    def start(self) -> None:
        """Renew in the background, three times a lease."""
        self._thread = threading.Thread(target=self._renew_loop, name="lease", daemon=True)
        self._thread.start()

    def _renew_loop(self) -> None:
        while not self._stop.wait(self._lease_ms / 3000):
            with contextlib.suppress(Exception):  # whatever it is, the next renewal comes; until then the lease lapses
                self.renew()
            if self.lost:
                self._on_lost()
                return

    def renew(self) -> bool:
        """One renewal; whether it was definite. Sets `lost` once another incarnation holds the name."""
        sent_ms = self._clock_ms()
        try:
            return self._renewed(sent_ms, self._etag)
        except PreconditionLost:
            try:
                found = self._store.get(self._key)
                holder, _ = envelope.unseal(found.body, envelope.KIND_LEASE, self._key)
            except Exception:
                return False
            if not self._is_this(holder):
                self.lost = True
                self.on_change()
                return False
            if holder.get("fenced"):
                return self._take_again(found.etag)
            # An earlier renewal had landed without an answer: on from there.
            try:
                return self._renewed(self._clock_ms(), found.etag)
            except StoreError:
                return False
        except StoreError:
            return False

    def _renewed(self, sent_ms: int, etag: str) -> bool:
        self._write(sent_ms, if_match=etag)
        if self.fenced:
            self.fenced = False
            self.on_change()
        return True

    def _take_again(self, etag: str) -> bool:
        """Hold the name anew after a fence; whether it is held. What was owned is doubted first, on disk."""
        self._valid_until_ms = 0
        self.fenced = True
        self.fences += 1
        self.tenure += 1
        # Whatever process answers from these rows hears of it before they are doubted.
        self.on_change()
        try:
            self._on_fenced()
        except SessiondError:
            return False  # nothing is taken again before that is done: the next renewal tries
        # What began between the fence and this moment belongs to neither time.
        self.tenure += 1
        self.on_change()
        # From here on a write of ours whose answer is lost is told from the fence by its start.
        self._fields["start_id"] = os.urandom(16)
        self._etag = etag
        try:
            return self._renewed(self._clock_ms(), etag)
        except StoreError:
            return False

    @property
    def valid_until_ms(self) -> int:
        """Until when the newest definite renewal holds, by the boot clock; 0 if it does not."""
        return 0 if self.lost or self.fenced else self._valid_until_ms

    def is_valid(self) -> bool:
        """Whether no other node can have fenced this one."""
        return not self.lost and not self.fenced and self._clock_ms() < self._valid_until_ms

    def stop(self, released: bool) -> None:
        """Stop renewing; released: say that nothing is owned any more, so that a successor need not wait."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if released and not self.lost:
            self._fields["released"] = True
            with contextlib.suppress(StoreError):
                self._write(self._clock_ms(), if_match=self._etag)
