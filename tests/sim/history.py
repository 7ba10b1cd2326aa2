"""Everything that was said and done in a world, and what it must have been: the invariants that speak of time.

Turns are told apart by (session, seq, chain): the chain proves the whole log up to a turn, so that two logs are
compared by walking back from their heads. What can be read off the tiers is held by `sessiond.verify` at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

from sessiond import core
from sessiond.core import envelope, invariants
from sessiond.core import manifest as manifests
from sessiond.core import state as states
from sessiond.core.manifest import LIFECYCLE_DELETED, Manifest
from sessiond.tiers.compact import row_key
from sessiond.v1 import context_pb2, turn_pb2

if TYPE_CHECKING:
    from tests.sim.node import Disk
    from tests.sim.schedule import Host, Schedule

CONFIRMED = context_pb2.OWNERSHIP_CONFIRMED
CLOUD = turn_pb2.DURABILITY_CLOUD
EXPLANATIONS_MAX = 5

Place = tuple[int, bytes]


@dataclass(slots=True)
class Known:
    """One turn that was appended somewhere, whether or not it is in the log now."""

    before: bytes | None
    turn_id: str
    # A turn that was rescued or sent again has the same chain under another epoch.
    epochs: set[int]
    # The disks that it was written to, and when.
    disks: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class Op:
    """One call of a device, from when it was first sent to when an answer was believed. us are the world's."""

    device: str
    kind: str
    session: str
    sent_us: int
    done_us: int
    node: str
    ownership: int = 0
    durability: int = 0
    head: Place | None = None
    turns: list[tuple[str, int, int, bytes, bool]] = field(default_factory=list)
    missing: list[tuple[int, int, int]] = field(default_factory=list)
    expected: tuple[int, int] | None = None
    highest: tuple[int, int, bytes] | None = None
    accepts: int | None = None
    reason: str = ""
    # By whose rows it was answered, where the reply claims the rung HOT.
    hot_at: str = ""

    def told(self) -> str:
        """What was asked and answered, for a trace."""
        if self.reason:
            return f"{self.kind}: {self.reason}"
        turns = " ".join(f"{name}@{epoch}:{seq}{'=' * again}" for name, epoch, seq, _, again in self.turns)
        head = f" head {self.head[0]}:{self.head[1].hex()[:6]}" if self.head is not None else ""
        sure = {1: "CONFIRMED", 2: "UNCONFIRMED"}.get(self.ownership, "")
        asked = f" highest {self.highest[:2]}" if self.highest is not None else ""
        asked += f" expected {self.expected}" if self.expected is not None else ""
        asked += f" accepts {self.accepts}" if self.accepts is not None else ""
        durability = {1: "EDGE", 2: "CLOUD"}.get(self.durability, "")
        lacks = f" missing {self.missing}" if self.missing else ""
        return f"{self.kind} {turns}{asked} ->{head} {sure} {durability} via {self.node}{lacks}"

    def __str__(self) -> str:
        turns = ",".join(f"{name}@{epoch}:{seq}" for name, epoch, seq, _, _ in self.turns)
        return f"{self.device} {self.kind} {self.session} {turns} via {self.node} at {self.done_us / 1e6:.3f} s"


@dataclass
class Told:
    """A session as the world knows it."""

    name: str
    h: bytes
    known: dict[Place, Known] = field(default_factory=dict)
    landed: list[tuple[int, Place]] = field(default_factory=list)
    present: Manifest | None = None
    named: frozenset[str] = frozenset()
    ops: list[Op] = field(default_factory=list)
    created_us: int | None = None
    deleted_us: int | None = None
    expires: bool = False
    # Who the manifest named as its owner, since when.
    owners: list[tuple[int, str]] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        """Whether its tombstone stands."""
        return self.present is not None and self.present.lifecycle == LIFECYCLE_DELETED

    def path(self, head: Place) -> list[tuple[Place, Known]]:
        """The log that ends at this head, newest first, as far as it is known."""
        found: list[tuple[Place, Known]] = []
        place: Place | None = head
        while place is not None and place[0] > 0:
            turn = self.known.get(place)
            if turn is None:
                break
            found.append((place, turn))
            place = None if turn.before is None else (place[0] - 1, turn.before)
        return found


class History:
    """The memory of one world."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._by_hash: dict[bytes, Told] = {}
        self.sessions: dict[str, Told] = {}
        self.violations: list[tuple[str, str]] = []
        self._owners: dict[tuple[bytes, int], bytes] = {}
        self._lost: set[str] = set()
        # Disks in whose place a copy was put: the disk that it is on, and when it was taken.
        self._restored: dict[str, tuple[str, int]] = {}
        self.acks = self.reads = self.confirmed = self.steals = 0
        # Called with a node's name, and who fenced it.
        self.fenced: Callable[[str, Host], None] = lambda name, by: None
        # Objects that came back after their session had ended, by a write that was on its way all along.
        self.stragglers: set[str] = set()

    def add(self, name: str, h: bytes, expires: bool) -> None:
        told = Told(name, h, expires=expires)
        self.sessions[name] = self._by_hash[h] = told

    def broken(self, invariant: str, what: str) -> None:
        if sum(name == invariant for name, _ in self.violations) < EXPLANATIONS_MAX:
            self._schedule.note("checker", f"{invariant} {what}")
            self.violations.append((invariant, what))

    # What the tiers do ------------------------------------------------------------------------------------------------

    def disk_lost(self, disk: Disk) -> None:
        self._lost.add(disk.name)

    def disk_restored(self, before: Disk, after: Disk, taken_us: int) -> None:
        """What was on the one up to then is on the other."""
        self._restored[before.name] = (after.name, taken_us)

    def _survives(self, turn: Known) -> bool:
        """Whether some disk that this turn was written to still holds it, as far as disks go."""
        for name, at_us in turn.disks:
            while name in self._restored and at_us <= self._restored[name][1]:
                name = self._restored[name][0]
            if name not in self._lost:
                return True
        return False

    def appended(self, host: Host, h: bytes, before: bytes, turns: list[tuple[str, int, int, bytes]]) -> None:
        """A transaction of some node puts turns into its rows: (turn_id, epoch, seq, chain) of the fresh ones."""
        told = self._by_hash.get(h)
        if told is None:
            return
        for turn_id, epoch, seq, chain in turns:
            known = told.known.setdefault((seq, chain), Known(before, turn_id, set()))
            known.epochs.add(epoch)
            if known.before is None:
                known.before = before
            known.disks.append((host.disk_name, self._schedule.now_us))
            before = chain

    def put(self, host: Host, key: str, body: bytes, late: bool) -> None:
        kind = key[:2]
        if kind == "m/":
            self._manifest(host, key, body)
        elif kind == "n/":
            if b"fenced" in body:
                self.fenced(key[2:], host)
        elif kind in ("s/", "o/", "u/", "x/"):
            name = key[2:34] if kind in ("s/", "o/") else key[-32:]
            told = self._by_hash.get(bytes.fromhex(name))
            ended = told is None or told.ended
            # A row of an index is a hint: a creation that is under way while somebody deletes may write it last.
            if ended and (late or kind in ("u/", "x/")):
                self.stragglers.add(key)

    def _manifest(self, host: Host, key: str, body: bytes) -> None:
        meta, payload = envelope.unseal(body, envelope.KIND_MANIFEST, key)
        manifest = manifests.decode_meta(meta, payload, key)
        told = self._by_hash.get(manifest.h)
        if told is None:
            self.broken("I12", f"a manifest of a session that nobody made: {key}")
            return
        before, writer = told.present, manifest.epochs[-1][1]
        what = f"{told.name}: {host.name} wrote epoch {manifest.epoch} mutation {manifest.mutation}"
        told.present = manifest
        life = {1: "active", 2: "archived", 3: "DELETED"}[manifest.lifecycle]
        owned = str(manifest.owner[1]) if manifest.owner is not None else "nobody"
        told.owners.append((self._schedule.now_us, owned))
        stands = f"epoch {manifest.epoch} mutation {manifest.mutation} head {manifest.head} of {owned} {life}"
        self._schedule.note("store", f"{told.name}: {stands} loss {manifest.loss} orphans {len(manifest.orphans)}")
        owner = self._owners.setdefault((manifest.h, manifest.epoch), writer)
        if owner != writer:
            self.broken("I5", f"{what} as another incarnation than the epoch's first")
        if before is not None:
            self.steals += manifest.epoch > before.epoch and before.owner is not None
            if manifest.epoch < before.epoch:
                self.broken("I5", f"{what} over epoch {before.epoch}")
            if manifest.mutation <= before.mutation:
                self.broken("I4", f"{what} over mutation {before.mutation}")
            # A tombstone may be written once more: without the pins of forks that are gone, or by whoever hears late.
            if before.lifecycle == LIFECYCLE_DELETED != manifest.lifecycle:
                self.broken("I13", f"{what} over a tombstone")
            if manifest.head < before.head:
                self.broken("I4", f"{what} with head {manifest.head} over head {before.head}")
            olds, news = ([int(row[0]) for row in m.checkpoints] for m in (before, manifest))
            if manifest.lifecycle != LIFECYCLE_DELETED and olds and (not news or news[-1] < olds[-1]):
                self.broken("I7", f"{what} with checkpoint {news[-1:]} after {olds[-1]}")
        if manifest.lifecycle == LIFECYCLE_DELETED:
            told.named = frozenset()
            return
        self._learn(told, manifest.inline_frames)
        if manifest.head:
            told.landed.append((manifest.head, (manifest.head, states.decode(manifest.state).chain)))
        names = [row_key(manifest, row) for row in manifest.segments] + [str(row[0]) for row in manifest.orphans]
        told.named = frozenset(names + ([str(manifest.index[0])] if manifest.index else []))

    def _learn(self, told: Told, frames: bytes) -> None:
        """Turns that came into the log otherwise than by an append: from an orphan."""
        headers = core.scan_frames(told.h, frames)
        if not headers or (headers[-1].seq, headers[-1].chain) in told.known:
            return
        before: bytes | None = None
        for turn in invariants.view_turns(told.h, frames):
            place = (turn.header.seq, turn.header.chain)
            known = told.known.get(place)
            if known is None:
                told.known[place] = Known(before, invariants.turn_id_of(turn.body), {turn.header.epoch})
            else:
                known.before = known.before or before
                known.epochs.add(turn.header.epoch)
            before = turn.header.chain

    def deleted(self, host: Host, key: str) -> None:
        if key[:2] in ("s/", "o/"):
            told = self._by_hash.get(bytes.fromhex(key[2:34]))
            if told is not None and key in told.named:
                self.broken("I10", f"{told.name}: {host.name} deleted {key[:2]}, which the manifest names")
        elif key[:2] == "m/":
            self.broken("I10", f"{host.name} deleted the manifest {key}")

    # What devices are told --------------------------------------------------------------------------------------------

    def done(self, op: Op) -> None:
        """A device believes an answer."""
        told = self.sessions[op.session]
        told.ops.append(op)
        self._schedule.note(op.device, op.told())
        if op.kind == "delete" and not op.reason and told.deleted_us is None:
            told.deleted_us = op.done_us
        if op.kind == "create" and not op.reason and told.created_us is None:
            told.created_us = op.done_us
        if op.kind == "append" and not op.reason:
            self.acks += 1
        if op.head is not None:
            self.reads += 1
            self.confirmed += op.ownership == CONFIRMED

    def check(self, on_disks: dict[bytes, set[str]], in_orphans: dict[bytes, set[str]]) -> None:
        """Hold everything that was said against what there is. The two: turn_ids by session, outside the logs."""
        for told in self.sessions.values():
            self._check_present(told)
            if not told.ended:
                self._check_log(told, on_disks.get(told.h, set()), in_orphans.get(told.h, set()))
            self._check_order(told, told.ended)

    def _check_present(self, told: Told) -> None:
        for op in told.ops:
            if (
                told.deleted_us is not None
                and op.sent_us > told.deleted_us
                and not op.reason
                and "delete" not in op.kind
            ):
                self.broken("I13", f"{op}: answered, and the session was deleted at {told.deleted_us / 1e6:.3f} s")
            if op.reason == "SESSION_NOT_FOUND" and told.created_us is not None and op.sent_us > told.created_us:
                self.broken("I9", f"{op}: no such session, which was made at {told.created_us / 1e6:.3f} s")
            if op.reason == "SESSION_DELETED" and not told.expires:
                asked = [other.sent_us for other in told.ops if other.kind == "delete"] + told_deletes(told)
                if not asked:
                    self.broken("I13", f"{op}: deleted, and nobody asked for that")

    def _check_log(self, told: Told, on_disks: set[str], in_orphans: set[str]) -> None:
        manifest = told.present
        if manifest is None:
            if told.created_us is not None:
                self.broken("I2", f"{told.name}: made, and there is no manifest")
            return
        final = (manifest.head, states.decode(manifest.state).chain)
        path = told.path(final)
        if len(path) != manifest.head:
            self.broken("I4", f"{told.name}: the log's history is known for {len(path)} of {manifest.head} turns only")
            return
        chains = {place[0]: place[1] for place, _ in path}
        ids = {turn.turn_id for _, turn in path}
        if len(ids) != len(path):
            twice = [name for name, after in pairwise(sorted(turn.turn_id for _, turn in path)) if name == after]
            self.broken("I3", f"{told.name}: applied twice: {twice}")
        for head, place in told.landed:
            if chains.get(head) != place[1]:
                self.broken("I4", f"{told.name}: a manifest ended with turn {head}, which the last does not extend")
                break
        for op in told.ops:
            if op.kind != "append" or op.reason:
                continue
            for turn_id, epoch, seq, chain, _ in op.turns:
                if op.durability == CLOUD:
                    if chains.get(seq) != chain and turn_id not in ids:
                        self.broken("I2", f"{op}: CLOUD-acked turn {turn_id} at {epoch}:{seq} is not in the log")
                elif turn_id not in ids and turn_id not in on_disks and turn_id not in in_orphans:
                    known = told.known.get((seq, chain))
                    if known is not None and not self._survives(known):
                        continue
                    self.broken("I1", f"{op}: acked turn {turn_id} at {epoch}:{seq} is nowhere")

    def _check_order(self, told: Told, ended: bool) -> None:
        """I8, I9: a confirmed reply has every turn that was acknowledged before it was asked for, or says so."""
        acks = [op for op in told.ops if op.kind == "append" and not op.reason and op.turns]
        accepted = [op for op in told.ops if op.accepts is not None]
        reached = [op for op in told.ops if op.highest is not None]
        for op in told.ops:
            if op.head is None or op.reason:
                continue
            if op.kind == "append" and op.expected is not None:
                self._check_expected(told, op)
            if op.ownership != CONFIRMED:
                continue
            if op.hot_at and op.hot_at not in owners_between(told, op.sent_us, op.done_us):
                self.broken("I8", f"{op}: served HOT by {op.hot_at}, which did not own it then")
            path = told.path(op.head)
            if len(path) != op.head[0]:
                if not ended:
                    self.broken("I8", f"{op}: nobody appended what its head {op.head[0]} proves")
                continue
            ids = {turn.turn_id for _, turn in path}
            for ack in acks:
                if ack.done_us >= op.sent_us or ack is op:
                    continue
                for turn_id, epoch, seq, _, _ in ack.turns:
                    if turn_id in ids:
                        continue
                    what = (
                        f"{op}: lacks turn {turn_id}, acked at {epoch}:{seq} by {ack.node}, {ack.done_us / 1e6:.3f} s"
                    )
                    if ack.durability == CLOUD:
                        self.broken("I2", f"{what}, durability CLOUD")
                        continue
                    if any(first <= seq and at >= epoch for at, first, _ in op.missing):
                        continue
                    if op.highest is not None and (ack.device != op.device or not op.highest[2]):
                        continue  # a caller is told of what it knows itself, and without a chain it knows little
                    if any(other.sent_us < op.done_us and (other.accepts or 0) >= epoch for other in accepted):
                        continue
                    if any(
                        other.sent_us < op.done_us and other.highest is not None and other.highest[0] <= epoch
                        for other in reached
                        if other is not op
                    ):
                        continue
                    self.broken("I9", what)

    def _check_expected(self, told: Told, op: Op) -> None:
        assert op.expected is not None
        fresh = [turn for turn in op.turns if not turn[4]]
        if not fresh or len(fresh) != len(op.turns):
            return
        _, _, seq, chain, _ = fresh[0]
        turn = told.known.get((seq, chain))
        before = told.known.get((seq - 1, turn.before or b"")) if turn is not None else None
        epochs = before.epochs if before is not None else set()
        if seq - 1 != op.expected[1] or (op.expected[0] and epochs and op.expected[0] not in epochs):
            self.broken("I8", f"{op}: expected {op.expected}, and stands behind {sorted(epochs)}:{seq - 1}")


def owners_between(told: Told, first_us: int, last_us: int) -> set[str]:
    """Who owned a session at any moment of a time, by its manifests."""
    before = [owner for at_us, owner in told.owners if at_us <= first_us][-1:]
    return {*before, *(owner for at_us, owner in told.owners if first_us < at_us <= last_us)}


def told_deletes(told: Told) -> list[int]:
    """When deletions were asked for that nobody heard an answer of."""
    return [op.sent_us for op in told.ops if op.kind == "asked to delete"]
