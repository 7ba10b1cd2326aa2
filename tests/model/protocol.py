"""The ownership protocol of DESIGN.md as a model: two nodes, one session, one client that repeats itself, one store.

It promises that each action below is one atomic step of a node, of the store or of the network, and that nothing else
happens. What is left out is in README.md. Each rule that a mutant breaks has a switch in `Rules`; the protocol is the
one with every switch off.

Numbers that only matter for being equal are left out, so that the model is finite and small. An etag is whether what
is conditional on it still stands (`SENT` becomes `DEAD`, `current` becomes False, once any write lands). A lease's
start id is whether a fence was noticed since (`crossed`, `in_doubt`). A freeze is a node that takes no step; its lease
lapses meanwhile, so freezing and being cut off from the store are one fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from tests.model.explorer import Broken, Step

A, B = 0, 1
NAMES = "AB"

# Phases of a session's row, as in tiers/hot/rows.py. RELEASED rows are never believed again, so here they are no row.
CLAIMING, OWNED, RELEASING, FENCED, DOUBTED = "CLAIMING", "OWNED", "RELEASING", "FENCED", "DOUBTED"

# A conditional write on its way: can still land; landed and nothing since; landed and overwritten; can't land any more.
SENT, LANDED, LANDED_PAST, DEAD = "sent", "landed", "landed, overwritten since", "can't land"

CLAIM, FLUSH, RELEASE, TOUCH = "claim", "flush", "release", "touch"


class Orphan(NamedTuple):
    """Turns of a fenced node as one object: the first has seq `first`."""

    epoch: int
    first: int
    turns: tuple[int, ...]


class Manifest(NamedTuple):
    """What a write of the manifest says. incarnation: the epoch's, which is also the owner's while is_owned."""

    epoch: int
    incarnation: int
    is_owned: bool
    log: tuple[int, ...]
    loss: tuple[int, ...]
    orphans: tuple[Orphan, ...]


class Row(NamedTuple):
    """A session on a node's disk. current: the manifest is still the one that this row knows the etag of.

    changed: loss or orphans differ from what was committed. claimed: the epoch that a claim on its way is for.
    in_doubt: a fence was noticed since that claim's intent was written.
    """

    phase: str
    epoch: int
    log: tuple[int, ...]
    cloud_seq: int
    current: bool
    changed: bool
    loss: tuple[int, ...]
    orphans: tuple[Orphan, ...]
    claimed: int
    in_doubt: bool


class Put(NamedTuple):
    """A conditional write of the manifest that a node waits for. crossed: a fence was noticed since it was sent."""

    kind: str
    body: Manifest
    status: str
    crossed: bool


class Node(NamedTuple):
    """A node, its disk, and its lease object. Incarnations are even on A and odd on B.

    lease_valid: by the node's own clock. noticed: it knows that it was fenced and has not taken its lease again.
    late: writes that nobody waits for any more and that can still land. stale_answer: an answer that was read from the
    row, lacks an acknowledged turn, says nothing of it, and was not sent yet. seen: what only a mutant remembers.
    """

    is_up: bool
    lease_valid: bool
    noticed: bool
    incarnation: int
    lease_incarnation: int
    lease_fenced: bool
    row: Row | None
    put: Put | None
    late: tuple[Manifest, ...]
    stale_answer: bool
    seen: tuple[Any, ...]


class World(NamedTuple):
    """What the client knows, and how many faults are left. Turns are bits.

    excused: acknowledged as EDGE, and their only copy went with a disk.
    """

    edge: int
    cloud: int
    excused: int
    lapses: int
    crashes: int
    disks: int
    timeouts: int
    releases: int


class State(NamedTuple):
    """Everything. manifest: None while the session was never written."""

    manifest: Manifest | None
    a: Node
    b: Node
    world: World

    @property
    def nodes(self) -> tuple[Node, Node]:
        return (self.a, self.b)


@dataclass(frozen=True)
class Rules:
    """The protocol with every switch off. Each switch breaks one rule."""

    reply_ignores_restart_of_lease: bool = False
    touch_is_a_read: bool = False
    touch_counts_across_a_fence: bool = False
    fence_skipped: bool = False
    fence_unconditional: bool = False
    lease_read_before_manifest: bool = False
    epoch_not_raised: bool = False
    loss_row_forgotten: bool = False
    claim_settles_owned_across_a_fence: bool = False
    claim_begins_before_the_lease_is_back: bool = False
    claim_goes_on_from_what_it_read_before_a_fence: bool = False
    lease_taken_before_doubt: bool = False
    restart_believes_rows: bool = False
    ack_before_commit: bool = False
    dedupe_outside_transaction: bool = False
    release_lets_appends_in: bool = False
    release_taken_back_when_unknown: bool = False
    rows_dropped_after_unknown_release: bool = False
    cloud_ack_on_ambiguous: bool = False
    flush_unconditional: bool = False
    rescue_after_an_append: bool = False
    rescue_clears_loss_when_listed: bool = False
    rescue_drops_rows_on_answer: bool = False


SWITCHES = tuple(field.name for field in fields(Rules))


@dataclass(frozen=True)
class Bounds:
    """How much happens. turns: one letter each, E for EDGE and C for CLOUD. Others count faults of both nodes.

    zombies: the nodes whose lease may lapse. cloud_only: the session's policy admits only CLOUD.
    """

    turns: str = "EC"
    zombies: str = "AB"
    lapses: int = 0
    crashes: int = 0
    disks: int = 0
    timeouts: int = 0
    releases: int = 0

    @property
    def cloud_only(self) -> bool:
        return "E" not in self.turns

    def __str__(self) -> str:
        counts = {name: getattr(self, name) for name in ("lapses", "crashes", "disks", "timeouts", "releases")}
        return f"{self.turns}-{self.zombies}-" + "".join(f"{name[0]}{count}" for name, count in counts.items() if count)


def _bits(turns: tuple[int, ...]) -> int:
    bits = 0
    for turn in turns:
        bits |= 1 << turn
    return bits


class Sessions:
    """The model: what can happen next in a state, and what must hold in it."""

    def __init__(self, bounds: Bounds, rules: Rules = Rules()) -> None:
        self.bounds = bounds
        self.rules = rules
        self._zombies = tuple(name in bounds.zombies for name in NAMES)
        self._is_symmetric = all(self._zombies)
        self._mirrored: dict[Any, Any] = {}

    def initial(self) -> State:
        """Two nodes that hold their leases, and a session that does not exist."""
        a, b = (Node(True, True, False, i, i, False, None, None, (), False, ()) for i in (A, B))
        bounds = self.bounds
        faults = (bounds.lapses, bounds.crashes, bounds.disks, bounds.timeouts, bounds.releases)
        return State(None, a, b, World(0, 0, 0, *faults))

    # ------------------------------------------------------------------------------------------------------ symmetry

    def mirror(self, state: State) -> State | None:
        """The same state with the nodes' names exchanged; None where they are not alike."""
        if not self._is_symmetric:
            return None
        return State(
            self._mirror(state.manifest, self._mirror_manifest),
            self._mirror(state.b, self._mirror_node),
            self._mirror(state.a, self._mirror_node),
            state.world,
        )

    def _mirror(self, part: Any, how: Any) -> Any:
        other = self._mirrored.get(part)
        if other is None:
            other = self._mirrored[part] = None if part is None else how(part)
        return other

    def _mirror_manifest(self, manifest: Manifest) -> Manifest:
        return manifest._replace(incarnation=manifest.incarnation ^ 1)

    def _mirror_node(self, node: Node) -> Node:
        put = node.put
        return node._replace(
            incarnation=node.incarnation ^ 1,
            lease_incarnation=node.lease_incarnation ^ 1,
            put=put and put._replace(body=self._mirror_manifest(put.body)),
            late=tuple(sorted(self._mirror_manifest(body) for body in node.late)),
        )

    # --------------------------------------------------------------------------------------------------------- steps

    def steps(self, state: State) -> Iterator[Step]:
        """Everything that can happen next."""
        state = State(*state)
        for me in (A, B):
            node = state.nodes[me]
            yield from self._network(state, me, node)
            if not node.is_up:
                yield from self._down(state, me, node)
                continue
            yield from self._lease(state, me, node)
            yield from self._client(state, me, node)
            yield from self._answer(state, me, node)
            if node.put is None:
                yield from self._claim(state, me, node)
                yield from self._owner(state, me, node)
            yield from self._rescue(state, me, node)
            yield from self._faults(state, me, node)

    @staticmethod
    def _with(state: State, me: int, node: Node, **other: Any) -> State:
        return state._replace(a=node, **other) if me == A else state._replace(b=node, **other)

    # ------------------------------------------------------------------------------------------------------ the store

    def _land(self, state: State, me: int, body: Manifest, own: bool) -> State | Broken:
        """The store applies a conditional write. own: node `me` waits for its answer."""
        old = state.manifest
        if old is not None:
            if body.epoch < old.epoch:
                what = f"a node of epoch {body.epoch} writes a manifest of epoch {old.epoch}"
                return Broken("I6", what)
            if body.epoch == old.epoch and body.incarnation != old.incarnation:
                return Broken("I5", f"two incarnations own the session in epoch {old.epoch}")
            if body.log[: len(old.log)] != old.log:
                return Broken("I4", f"the manifest's log {old.log} becomes {body.log}")
        nodes = []
        for which, node in enumerate(state.nodes):
            put = node.put
            if put is not None:
                if own and which == me:
                    put = put._replace(status=LANDED)
                elif put.status == SENT and not (self.rules.flush_unconditional and put.kind == FLUSH):
                    put = put._replace(status=DEAD)
                elif put.status == LANDED:
                    put = put._replace(status=LANDED_PAST)
            row = node.row
            if row is not None and row.current:
                row = row._replace(current=False)
            seen = ("read, and it changed",) if node.seen[:1] == ("read",) else node.seen
            nodes.append(node._replace(put=put, row=row, late=(), seen=seen))
        return State(body, nodes[A], nodes[B], state.world)

    def _network(self, state: State, me: int, node: Node) -> Iterator[Step]:
        put = node.put
        if put is not None and put.status == SENT:
            yield Step(("lands", me, put.kind), True, self._land(state, me, put.body, True))
        for body in node.late:
            yield Step(("lands late", me, body), True, self._land(state, me, body, False))

    def _send(self, state: State, me: int, node: Node, kind: str, body: Manifest, is_current: bool) -> State:
        status = SENT if is_current or (self.rules.flush_unconditional and kind == FLUSH) else DEAD
        return self._with(state, me, node._replace(put=Put(kind, body, status, False)))

    # ------------------------------------------------------------------------------------------------------ the lease

    def _lease(self, state: State, me: int, node: Node) -> Iterator[Step]:
        lost = node.lease_fenced or node.lease_incarnation != node.incarnation
        if node.noticed:
            back = node._replace(lease_fenced=False, lease_valid=True, noticed=False)
            if self.rules.lease_taken_before_doubt:
                back = self._doubt(back)
            yield Step(("takes its lease again", me), True, self._with(state, me, back))
        elif lost and not node.noticed:
            if self.rules.lease_taken_before_doubt:
                back = node._replace(lease_fenced=False, lease_valid=True, seen=("doubt",))
                yield Step(("takes its lease again before it doubts", me), True, self._with(state, me, back))
            else:
                doubting = self._doubt(node)._replace(noticed=True)
                yield Step(("notices the fence and doubts its rows", me), True, self._with(state, me, doubting))
        elif not node.lease_valid:
            yield Step(("renews its lease", me), True, self._with(state, me, node._replace(lease_valid=True)))
        if node.seen == ("doubt",):
            doubting = self._doubt(node)._replace(seen=())
            yield Step(("doubts its rows", me), True, self._with(state, me, doubting))
        other = state.nodes[1 - me]
        # Who stood still for three leases holds none by its own clock; a renewal meanwhile has another etag.
        may_fence = not other.lease_valid or self.rules.fence_unconditional
        if may_fence and not other.lease_fenced and not self.rules.fence_skipped:
            fenced = other._replace(lease_fenced=True)
            yield Step(("fences the lease of", me, 1 - me), True, self._with(state, 1 - me, fenced))

    def _doubt(self, node: Node) -> Node:
        """Every row that is held as owned is doubted; what is on its way was sent under a lease that is gone."""
        row, put = node.row, node.put
        if row is not None and row.phase in (OWNED, RELEASING):
            row = row._replace(phase=DOUBTED)
        elif row is not None and row.phase == CLAIMING:
            row = row._replace(in_doubt=True)
        # An answer that was read before carries the start id of the lease that it was read under.
        stale = node.stale_answer and self.rules.reply_ignores_restart_of_lease
        return node._replace(row=row, put=put and put._replace(crossed=True), stale_answer=stale)

    # ----------------------------------------------------------------------------------------------------- the client

    def _client(self, state: State, me: int, node: Node) -> Iterator[Step]:
        row, world = node.row, state.world
        if row is None:
            return
        acked = world.edge | world.cloud
        # CLOUD: what a definite commit contains, asked for again or for the first time.
        for seq, turn in enumerate(row.log, 1):
            if seq <= row.cloud_seq and not world.cloud >> turn & 1:
                known = world._replace(cloud=world.cloud | 1 << turn)
                yield Step(("acknowledges as CLOUD", me, turn), True, state._replace(world=known))
        if node.seen[:1] == ("uncommitted",):
            turn = node.seen[1]
            if row.phase == OWNED and turn not in row.log:
                node = node._replace(row=row._replace(log=row.log + (turn,)))
            yield Step(("commits", me, turn), True, self._with(state, me, node._replace(seen=())))
            return
        lets_in = row.phase == OWNED or (row.phase == RELEASING and self.rules.release_lets_appends_in)
        if not lets_in:
            return
        if node.seen[:1] == ("new",):
            turn = node.seen[1]
            appended = node._replace(row=row._replace(log=row.log + (turn,)), seen=())
            yield Step(("appends what was new", me, turn), True, self._with(state, me, appended))
        for turn, durability in enumerate(self.bounds.turns):
            edge_ack = world._replace(edge=world.edge | 1 << turn, excused=world.excused & ~(1 << turn))
            if turn not in row.log:
                appended = node._replace(row=row._replace(log=row.log + (turn,)))
                if self.rules.ack_before_commit and durability == "E" and not node.seen:
                    promised = node._replace(seen=("uncommitted", turn))
                    after = self._with(state, me, promised, world=edge_ack)
                    yield Step(("acknowledges as EDGE before the commit", me, turn), True, after)
                elif durability == "E":
                    yield Step(
                        ("appends and acknowledges as EDGE", me, turn),
                        True,
                        self._with(state, me, appended, world=edge_ack),
                    )
                if self.rules.dedupe_outside_transaction and not node.seen:
                    judged = node._replace(seen=("new", turn))
                    yield Step(("finds no such turn_id", me, turn), True, self._with(state, me, judged))
                yield Step(("appends, and the answer is lost", me, turn), True, self._with(state, me, appended))
            elif durability == "E" and edge_ack != world:
                yield Step(("repeats its EDGE answer", me, turn), True, state._replace(world=edge_ack))
            if not acked >> turn & 1:
                break  # the client says the next thing once it has its answer, and repeats what it said at any time
        if not node.stale_answer and not node.lease_valid and not row.loss and acked & ~_bits(row.log):
            after = self._with(state, me, node._replace(stale_answer=True))
            yield Step(("reads its row for a resume", me), True, after)

    # --------------------------------------------------------------------------------------------- claims and steals

    def _claim(self, state: State, me: int, node: Node) -> Iterator[Step]:
        row, found = node.row, state.manifest
        if row is not None and row.phase not in (FENCED, CLAIMING):
            return
        if self.rules.claim_goes_on_from_what_it_read_before_a_fence:
            yield from self._claim_in_two_steps(state, me, node)
        if node.noticed and not self.rules.claim_begins_before_the_lease_is_back:
            return
        is_mine = found is not None and found.is_owned and found.incarnation == node.incarnation
        is_claimed = row is not None and found is not None and row.phase == CLAIMING and found.epoch == row.claimed
        if is_mine and is_claimed:
            settled = self._settle_claim(node, found, row.in_doubt, True)
            yield Step(("finds that its claim landed", me), True, self._with(state, me, settled))
            return
        epoch, loss, look = 1, False, ""
        if found is not None:
            epoch = found.epoch + 1
            if is_mine:
                loss = True  # it holds nothing of the epoch that the manifest says is its own
            elif found.is_owned:
                loss = True
                owner = state.nodes[found.incarnation & 1]
                if owner is node:
                    pass  # an incarnation before this one, on a disk that is lost
                elif owner.lease_incarnation != found.incarnation or owner.lease_fenced:
                    look = "lease"
                elif not (self.rules.fence_skipped and not owner.lease_valid) and node.seen != ("lease",):
                    return
        if self.rules.lease_read_before_manifest and loss and look == "lease" and node.seen != ("lease",):
            seen = node._replace(seen=("lease",))
            yield Step(("reads the owner's lease: fenced", me), True, self._with(state, me, seen))
        steals = loss
        if steals and not node.lease_valid:
            return  # or two nodes that were both fenced take the session from each other without end
        loss = loss and not self.bounds.cloud_only and not self.rules.loss_row_forgotten
        if steals and found is not None and self.rules.epoch_not_raised:
            epoch = found.epoch
        body = Manifest(epoch, node.incarnation, True, (), (), ())
        if found is not None:
            body = body._replace(
                log=found.log,
                loss=found.loss + (found.epoch,) if loss else found.loss,
                orphans=found.orphans,
            )
        intent = Row(CLAIMING, 0, (), 0, False, False, (), (), epoch, False)
        if row is not None and len(row.log) > row.cloud_seq:
            # What only this node has goes into an orphan that the claim lists; the rows stay until that is definite.
            orphan = Orphan(row.epoch, row.cloud_seq + 1, row.log[row.cloud_seq :])
            if orphan not in body.orphans:
                body = body._replace(orphans=body.orphans + (orphan,))
            intent = row._replace(phase=CLAIMING, claimed=epoch, in_doubt=False)
        claiming = node._replace(row=intent, seen=())
        name = "sends a claim that takes over" if steals else "sends a claim"
        yield Step((name, me, epoch), True, self._send(state, me, claiming, CLAIM, body, True))

    def _claim_in_two_steps(self, state: State, me: int, node: Node) -> Iterator[Step]:
        """Of a mutant: a fence that is noticed between reading the manifest and writing the intent goes unseen."""
        found = state.manifest
        if not node.seen and (found is None or not found.is_owned):
            seen = node._replace(seen=("read", found))
            yield Step(("reads the manifest: nobody owns it", me), True, self._with(state, me, seen))
        elif node.seen and not node.noticed:
            # What stands there by now has another etag, if anything was written: the claim then loses, and looks again.
            claiming = node._replace(row=Row(CLAIMING, 0, (), 0, False, False, (), (), 1, False), seen=())
            body = Manifest(1, node.incarnation, True, (), (), ())
            after = self._send(state, me, claiming, CLAIM, body, node.seen[0] == "read")
            yield Step(("sends a claim of what it read", me), True, after)

    def _settle_claim(self, node: Node, body: Manifest, in_doubt: bool, current: bool) -> Node:
        in_doubt = in_doubt and not self.rules.claim_settles_owned_across_a_fence
        row = Row(
            DOUBTED if in_doubt else OWNED,
            body.epoch,
            body.log,
            len(body.log),
            current,
            False,
            body.loss,
            body.orphans,
            0,
            False,
        )
        return node._replace(row=row)

    # ------------------------------------------------------------------------------------------------ what owners do

    def _owner(self, state: State, me: int, node: Node) -> Iterator[Step]:
        row, found = node.row, state.manifest
        if row is None or found is None:
            return
        body = Manifest(row.epoch, node.incarnation, True, row.log, row.loss, row.orphans)
        if row.phase == OWNED:
            if row.changed or len(row.log) > row.cloud_seq:
                yield Step(("sends a flush", me), True, self._send(state, me, node, FLUSH, body, row.current))
            if state.world.releases:
                fewer = state.world._replace(releases=state.world.releases - 1)
                releasing = node._replace(row=row._replace(phase=RELEASING))
                gone = body._replace(is_owned=False)
                after = self._send(state._replace(world=fewer), me, releasing, RELEASE, gone, row.current)
                yield Step(("begins a release", me), False, after)
        elif row.phase == RELEASING:
            gone = body._replace(is_owned=False)
            yield Step(("sends the release again", me), True, self._send(state, me, node, RELEASE, gone, row.current))
        elif row.phase == DOUBTED and not node.noticed:
            if found.epoch != row.epoch or found.incarnation != node.incarnation:
                fenced = node._replace(row=row._replace(phase=FENCED))
                yield Step(("finds that its session was taken", me), True, self._with(state, me, fenced))
            elif not found.is_owned:
                after = self._released(state, me, node, row, found)
                yield Step(("finds that its release landed", me), True, after)
            elif self.rules.touch_is_a_read:
                owned = row._replace(phase=OWNED, current=True, cloud_seq=len(found.log))
                after = self._with(state, me, node._replace(row=owned))
                yield Step(("reads that the session is its own", me), True, after)
            else:
                yield Step(("sends a touch", me), True, self._send(state, me, node, TOUCH, found, True))

    def _released(self, state: State, me: int, node: Node, row: Row, body: Manifest) -> State | Broken:
        """A release is definite: nothing is kept, unless the row has what the release does not."""
        if row.log != body.log and not self.rules.release_lets_appends_in:
            return self._with(state, me, node._replace(row=row._replace(phase=FENCED)))
        return self._drop(state, me, node, row)

    def _drop(self, state: State, me: int, node: Node, row: Row) -> State | Broken:
        """Delete a row. What it has must be elsewhere for certain."""
        kept = _bits(state.manifest.log) if state.manifest else 0
        for orphan in state.manifest.orphans if state.manifest else ():
            kept |= _bits(orphan.turns)
        if _bits(row.log) & ~kept:
            return Broken("I10", f"node {NAMES[me]} deletes {row.log}, and only {kept:b} (bits) is known to be kept")
        return self._with(state, me, node._replace(row=None))

    # ---------------------------------------------------------------------------------------------- answers to writes

    def _answer(self, state: State, me: int, node: Node) -> Iterator[Step]:
        put = node.put
        if put is None or put.status == SENT:
            return
        done = node._replace(put=None)
        landed = put.status != DEAD
        name = "hears that it landed" if landed else "hears that it lost"
        after: State | Broken
        if put.kind == CLAIM:
            after = self._with(state, me, self._claim_answered(state, done, put, landed))
        elif put.kind == TOUCH:
            after = self._with(state, me, self._touch_answered(done, put, landed))
        else:
            after = self._flush_answered(state, me, done, put, landed)
        yield Step((name, me, put.kind), True, after)

    def _claim_answered(self, state: State, node: Node, put: Put, landed: bool) -> Node:
        row = node.row
        if row is None or row.phase != CLAIMING or row.claimed != put.body.epoch:
            return node  # only over the intent that this claim left
        if landed or state.manifest == put.body:
            in_doubt = row.in_doubt or put.crossed
            return self._settle_claim(node, put.body, in_doubt, put.status != LANDED_PAST)
        if len(row.log) > row.cloud_seq:
            return node._replace(row=row._replace(phase=FENCED, claimed=0, in_doubt=False))
        return node._replace(row=None)

    def _touch_answered(self, node: Node, put: Put, landed: bool) -> Node:
        row = node.row
        counts = landed and (not put.crossed or self.rules.touch_counts_across_a_fence)
        if row is None or row.phase != DOUBTED or not counts:
            return node
        changed = (row.loss, row.orphans) != (put.body.loss, put.body.orphans)
        owned = row._replace(phase=OWNED, current=put.status == LANDED, cloud_seq=len(put.body.log), changed=changed)
        return node._replace(row=owned)

    def _flush_answered(self, state: State, me: int, node: Node, put: Put, landed: bool) -> State | Broken:
        """A flush or a release: take what is committed, or see who took the session."""
        row = node.row
        if row is None or row.epoch != put.body.epoch or row.phase in (CLAIMING, FENCED):
            return self._with(state, me, node)
        body = put.body
        if not landed:
            found = state.manifest
            assert found is not None
            if found.epoch > row.epoch:
                phase = FENCED if row.phase in (OWNED, RELEASING) else row.phase
                return self._with(state, me, node._replace(row=row._replace(phase=phase)))
            body = found  # an earlier write of this node had landed
        changed = (row.loss, row.orphans) != (body.loss, body.orphans)
        row = row._replace(
            cloud_seq=max(row.cloud_seq, len(body.log)), current=put.status in (LANDED, DEAD), changed=changed
        )
        node = node._replace(row=row)
        if not body.is_owned and row.phase == RELEASING:
            return self._released(state, me, node, row, body)
        return self._with(state, me, node)

    # --------------------------------------------------------------------------------------------------------- rescue

    def _rescue(self, state: State, me: int, node: Node) -> Iterator[Step]:
        row, found = node.row, state.manifest
        if row is None or row.phase != FENCED or found is None:
            return
        unflushed = row.log[row.cloud_seq :]
        orphan = Orphan(row.epoch, row.cloud_seq + 1, unflushed)
        is_there = not _bits(unflushed) & ~_bits(found.log) or orphan in found.orphans
        if is_there:
            yield Step(("drops what is rescued", me), True, self._drop(state, me, node, row))
            return
        host = state.nodes[1 - me]
        theirs = host.row
        if not host.is_up or theirs is None or theirs.phase != OWNED or theirs.epoch <= row.epoch:
            return
        known = not _bits(unflushed) & ~_bits(theirs.log)
        fits = theirs.log == row.log[: row.cloud_seq]
        loss = tuple(epoch for epoch in theirs.loss if epoch != row.epoch)
        name = "hands its turns to the owner, who"
        if known or fits or self.rules.rescue_after_an_append:
            fresh = tuple(turn for turn in unflushed if turn not in theirs.log)
            log = theirs.log + fresh
            after: State | Broken
            if fresh and log[row.cloud_seq : len(row.log)] != unflushed:
                after = Broken("I8", f"turns acknowledged as {row.log} are put behind later ones: {log}")
            else:
                changed = theirs.changed or loss != theirs.loss
                rescued = host._replace(row=theirs._replace(log=log, loss=loss, changed=changed))
                after = self._with(state, 1 - me, rescued)
            if after != state:
                yield Step((f"{name} applies them", me, unflushed), True, after)
        elif orphan not in theirs.orphans:
            if not self.rules.rescue_clears_loss_when_listed:
                loss = theirs.loss
            listed = theirs._replace(orphans=theirs.orphans + (orphan,), loss=loss, changed=True)
            after = self._with(state, 1 - me, host._replace(row=listed))
            yield Step((f"{name} lists them", me, unflushed), True, after)
        elif self.rules.rescue_drops_rows_on_answer:
            yield Step(("drops what the owner has", me), True, self._drop(state, me, node, row))

    # --------------------------------------------------------------------------------------------------------- faults

    def _faults(self, state: State, me: int, node: Node) -> Iterator[Step]:
        world, put = state.world, node.put
        if world.lapses and node.lease_valid and self._zombies[me]:
            fewer = world._replace(lapses=world.lapses - 1)
            lapsed = node._replace(lease_valid=False)
            yield Step(
                ("is frozen or cut off until its lease lapses", me), False, self._with(state, me, lapsed, world=fewer)
            )
        if world.timeouts and put is not None and put.status in (SENT, LANDED, LANDED_PAST):
            fewer = world._replace(timeouts=world.timeouts - 1)
            after = self._with(state, me, self._timed_out(node, put), world=fewer)
            yield Step(("hears nothing", me, put.kind), False, after)
        if world.crashes:
            fewer = world._replace(crashes=world.crashes - 1)
            yield Step(("crashes", me), False, self._with(state, me, self._stopped(node), world=fewer))
        if world.disks:
            yield Step(("is lost with its disk", me), False, self._without_disk(state, me, self._stopped(node)))

    @staticmethod
    def _adrift(node: Node) -> tuple[Manifest, ...]:
        """What can still land although nobody waits for it."""
        if node.put is None or node.put.status != SENT:
            return node.late
        return tuple(sorted({*node.late, node.put.body}))

    def _timed_out(self, node: Node, put: Put) -> Node:
        row = node.row
        after = node._replace(put=None, late=self._adrift(node))
        if row is None:
            return after
        if put.kind == FLUSH and self.rules.cloud_ack_on_ambiguous:
            after = after._replace(row=row._replace(cloud_seq=len(put.body.log)))
        if put.kind == RELEASE and row.phase == RELEASING:
            if self.rules.release_taken_back_when_unknown:
                after = after._replace(row=row._replace(phase=OWNED))
            if self.rules.rows_dropped_after_unknown_release:
                after = after._replace(row=None)
        return after

    def _stopped(self, node: Node) -> Node:
        return node._replace(
            is_up=False,
            lease_valid=False,
            noticed=False,
            put=None,
            late=self._adrift(node),
            stale_answer=False,
            seen=(),
        )

    def _without_disk(self, state: State, me: int, node: Node) -> State:
        wiped = node._replace(row=None, incarnation=node.incarnation + 2)
        after = self._with(state, me, wiped, world=state.world._replace(disks=state.world.disks - 1))
        world = after.world
        return after._replace(world=world._replace(excused=world.excused | (world.edge & ~self._held(after))))

    def _down(self, state: State, me: int, node: Node) -> Iterator[Step]:
        back = self._doubt(node) if node.lease_fenced and not self.rules.restart_believes_rows else node
        back = back._replace(is_up=True, lease_valid=True, lease_fenced=False, lease_incarnation=node.incarnation)
        yield Step(("starts again and takes its lease", me), True, self._with(state, me, back))
        if state.world.disks:
            yield Step(("loses its disk while it is down", me), False, self._without_disk(state, me, node))

    # ----------------------------------------------------------------------------------------------------- invariants

    @staticmethod
    def _held(state: State) -> int:
        """The turns that are in the log, in a listed orphan, or on a disk."""
        held = 0
        if state.manifest is not None:
            held = _bits(state.manifest.log)
            for orphan in state.manifest.orphans:
                held |= _bits(orphan.turns)
        for node in state.nodes:
            if node.row is not None:
                held |= _bits(node.row.log)
        return held

    def check(self, state: State) -> Broken | None:
        """The first invariant that does not hold here."""
        manifest, world = state.manifest, state.world
        logged = _bits(manifest.log) if manifest else 0
        acked = world.edge | world.cloud
        if world.cloud & ~logged:
            return Broken("I2", "a turn acknowledged as CLOUD is not in the log")
        if world.edge & ~world.excused & ~self._held(state):
            return Broken("I1", "a turn acknowledged as EDGE is nowhere, and no disk was lost")
        logs = [("manifest", manifest.log)] if manifest else []
        for me, node in enumerate(state.nodes):
            row = node.row
            if row is not None:
                logs.append((NAMES[me], row.log))
        for where, log in logs:
            if len(set(log)) != len(log):
                return Broken("I3", f"a turn_id was applied twice: {where} has {log}")
        if manifest and not manifest.is_owned and acked & ~logged and not manifest.loss:
            return Broken("I9", "a cold answer lacks an acknowledged turn and does not say so")
        for me, node in enumerate(state.nodes):
            row = node.row
            if not node.is_up or not node.lease_valid:
                continue
            if node.stale_answer:
                return Broken("I8", f"{NAMES[me]} answers CONFIRMED from what it read before its lease was another one")
            if row is None or row.phase != OWNED:
                continue
            if acked & ~_bits(row.log) and not row.loss:
                return Broken("I9", f"a CONFIRMED answer of {NAMES[me]} lacks an acknowledged turn and does not say so")
            if manifest is None or row.epoch != manifest.epoch or manifest.incarnation != node.incarnation:
                return Broken("I5", f"{NAMES[me]} confirms under epoch {row.epoch}, and the session is another's")
        return None

    def is_good(self, state: State) -> bool:
        """Whether the session is writable somewhere, under a valid lease and the newest epoch."""
        manifest = state.manifest
        if manifest is None or not manifest.is_owned:
            return False
        node = state.nodes[manifest.incarnation & 1]
        row = node.row
        return bool(
            node.is_up
            and node.lease_valid
            and node.incarnation == manifest.incarnation
            and row is not None
            and row.phase == OWNED
            and row.epoch == manifest.epoch
        )
