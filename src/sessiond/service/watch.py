"""WatchSession: what is appended to a session, told to everybody who watches it, on whichever node it is owned.

It promises that a watcher gets every turn of the log once and in order, as the stored bytes, that turns which a lost
hot tier took back are named by the turns that stand in their place, and that a watcher costs no thread, no read
transaction while nothing happens, and no memory that grows with how slowly it reads: each has a place in the log and is
served from there. A notification carries nothing but the session; whoever is woken looks at the head row.

One Feed per watched session looks where the session is served from: this node's rows; the cloud tier, for what is
read-only or can't be reached otherwise; or the owner, by one stream however many watch here. A session that nobody owns
is claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.layout import FRAME_TAG, PREFIX_BYTES, Header
from sessiond.core.manifest import LIFECYCLE_ARCHIVED, LIFECYCLE_DELETED, Manifest
from sessiond.core.state import State
from sessiond.errors import Corrupt, Exhausted, NotFound, SessiondError, Unavailable
from sessiond.service import context as contexts
from sessiond.service.ownership import (
    Call,
    OwnedElsewhere,
    Ownership,
    Parts,
    check_user,
    draining,
    unreachable,
)
from sessiond.service.prepare import check_position, check_session_id, check_user_id
from sessiond.service.router import PeerUnreachable
from sessiond.tiers.hot import log
from sessiond.tiers.hot.rows import PHASE_CLAIMING, PHASE_OWNED, Head, decode_committed
from sessiond.tiers.hydrate import Cold
from sessiond.tiers.peers import Owner
from sessiond.v1 import context_pb2, node_pb2, session_pb2, turn_pb2

# Turns of one event, unless a single turn is larger; far below what a gRPC client takes by default.
EVENT_BYTES_MAX: Final = 1024**2
# Turns that a commit brought are kept up to this size until everybody who was up to date has them.
NEWEST_BYTES_MAX: Final = 64 * 1024
# Turns that came from another node and are kept here; older ones are asked for again.
RELAYED_BYTES_MAX: Final = 32 * 1024
# Between two attempts to find a session; the first comes at once.
PAUSE_FIRST_S: Final = 0.05
PAUSE_MAX_S: Final = 1.0
# A session that was released here is left alone so long: whoever had it released may want it elsewhere.
RELEASED_S: Final = 1.0
# Nobody appends to what is read-only; only its deletion is news.
ARCHIVED_S: Final = 60.0
# A peer that says nothing for so long is taken to be out of reach.
PEER_S: Final = 2.0
PROBES_MAX: Final = 2

WATCH: Final = "WatchSession"
_CHANGED: Final = session_pb2.WatchSessionResponse(epoch_changed=True).SerializeToString()
_DELETED: Final = session_pb2.WatchSessionResponse(deleted=True).SerializeToString()


class PeerStreams(Protocol):
    """The way to other nodes; `transport.peers` in a daemon."""

    async def call(self, address: str, request: node_pb2.ForwardRequest, timeout_s: float) -> node_pb2.ForwardResponse:
        """Send one forwarded call. Raises PeerUnreachable."""
        ...

    def watch(
        self, address: str, request: node_pb2.ForwardWatchRequest
    ) -> AsyncIterator[node_pb2.ForwardWatchResponse]:
        """The events of a watch on another node. Raises PeerUnreachable."""
        ...


class _Moved(Exception):
    """The session is not where it was read from any more; the feed is being told."""


class _Source:
    """Where turns are read from. epochs: rows as in the manifest. cloud_seq: as it was when this was made."""

    owned = False

    def __init__(self, epochs: list[list[Any]], cloud_seq: int) -> None:
        self.epochs = epochs
        self.cloud_seq = cloud_seq

    async def read(self, first_seq: int, last_seq: int) -> tuple[bytes, int]:
        """(frames, last seq in them) of consecutive turns, about EVENT_BYTES_MAX at most but at least one turn."""
        raise NotImplementedError

    async def at(self, seq: int) -> tuple[int, bytes]:
        """(epoch, chain) of a turn."""
        frames, _ = await self.read(seq, seq)
        header = core.scan_frames(self.h, frames)[0]
        return header.epoch, header.chain

    h: bytes

    async def shared(self, known: turn_pb2.TurnPosition, head_seq: int) -> int:
        """Up to which turn the log is the one that somebody knows who was at this position: by the chain, else by the
        epoch, else by the seq alone. The position's own seq where all of it is; else a seq below which all surely is.
        """
        if not known.seq:
            return 0
        if known.seq <= head_seq:
            if not known.chain and not known.epoch:
                return known.seq
            epoch, chain = await self.at(known.seq)
            if (chain == known.chain) if known.chain else (epoch == known.epoch):
                return known.seq
        # The log has another turn there, or none.
        limit = known.seq - 1 if known.seq <= head_seq else head_seq
        if not known.epoch:
            return 0 if known.chain else limit
        if not self.epochs or known.epoch + 1 < self.epochs[0][0]:
            return 0  # the rows that would tell are gone
        if known.epoch > self.epochs[-1][0]:
            return min(limit, self.cloud_seq)  # a later owner began with what was committed, at least
        # Every later owner began where the log that it was given ended, and that was a log of the owner before.
        firsts = [int(row[2]) for row in self.epochs if row[0] > known.epoch]
        if not firsts and known.seq <= head_seq:
            firsts = [int(row[2]) for row in self.epochs if row[0] == known.epoch]
        return min([limit, *(first - 1 for first in firsts)])


class _Owned(_Source):
    """The rows of this node, and the segments below them."""

    owned = True

    def __init__(self, own: Ownership, parts: Parts, h: bytes, head: Head, epochs: list[list[Any]]) -> None:
        super().__init__(epochs, head.cloud_seq)
        self.h = h
        self.epoch = head.epoch
        self._own = own
        self._parts = parts

    async def read(self, first_seq: int, last_seq: int) -> tuple[bytes, int]:
        with self._parts.hot.read() as transaction:
            head = log.read_head(transaction, self.h)
            if head is None or head.phase != PHASE_OWNED or head.epoch != self.epoch:
                raise _Moved
            if first_seq >= head.hot_first:
                try:
                    return log.frames_between(transaction, self.h, first_seq, last_seq, EVENT_BYTES_MAX)
                except log.HistoryNeeded as needed:
                    what = f"Turn {needed.first_seq} of session {self.h.hex()} is missing from its rows."
                    raise Corrupt("CORRUPT_HOT_ROW", what) from None
            manifest = decode_committed(self.h, transaction.get("manifests", self.h))
        last_seq = min(last_seq, head.hot_first - 1)
        between = self._parts.segments.between
        return await self._own.off_loop(between, manifest, first_seq, last_seq, EVENT_BYTES_MAX)


class _Cold(_Source):
    """The cloud tier, as one manifest says."""

    def __init__(self, own: Ownership, parts: Parts, manifest: Manifest) -> None:
        super().__init__(manifest.epochs, manifest.head)
        self.h = manifest.h
        self._own = own
        self._parts = parts
        self._manifest = manifest

    async def read(self, first_seq: int, last_seq: int) -> tuple[bytes, int]:
        between = self._parts.segments.between
        return await self._own.off_loop(between, self._manifest, first_seq, last_seq, EVENT_BYTES_MAX)


class _Relayed(_Source):
    """The newest turns that came from the owner; it is asked again for older ones."""

    def __init__(self, feed: Feed, owner: Owner, manifest: Manifest) -> None:
        super().__init__(manifest.epochs, manifest.head)
        self.h = feed.h
        self.owner = owner
        self._feed = feed
        self._chunks: deque[tuple[int, int, bytes]] = deque()
        self._size_bytes = 0

    def add(self, headers: list[Header], frames: bytes) -> None:
        """Keep turns that came; those that they stand in the place of go."""
        while self._chunks and self._chunks[-1][1] >= headers[0].seq:
            self._size_bytes -= len(self._chunks.pop()[2])
        self._chunks.append((headers[0].seq, headers[-1].seq, frames))
        self._size_bytes += len(frames)
        while self._size_bytes > RELAYED_BYTES_MAX and len(self._chunks) > 1:
            self._size_bytes -= len(self._chunks.popleft()[2])

    async def read(self, first_seq: int, last_seq: int) -> tuple[bytes, int]:
        for first, last, frames in self._chunks:
            if first <= first_seq <= last:
                start = 0
                if first < first_seq:
                    start = next(
                        header.offset for header in core.scan_frames(self.h, frames) if header.seq == first_seq
                    )
                return frames[start:], last
        request = session_pb2.ListTurnsRequest(
            session_id=self._feed.session_id, first_seq=first_seq, last_seq=last_seq, page_size=1000
        )
        answer = await self._feed.ask(self.owner, "ListTurns", request.SerializeToString())
        frames = split_frames(answer)[0]
        headers = core.scan_frames(self.h, frames)
        if not headers or headers[0].seq != first_seq:
            raise _out_of_reach(self._feed.session_id, self.owner)
        end = len(headers)
        while end > 1 and headers[end - 1].end > EVENT_BYTES_MAX:
            end -= 1
        return frames[: headers[end - 1].end], headers[end - 1].seq


@dataclass(slots=True)
class _View:
    """A session as it is told at one moment. marks: every event's fields but turns and epoch_changed. readable_seq: how
    far turns can be read, which is below the head while a backlog is on its way from the owner, or it can't be reached.
    """

    source: _Source
    head_seq: int
    readable_seq: int
    marks: bytes


class Feed:
    """One watched session on this node: where it is served from, and who is told."""

    __slots__ = (
        "_epoch",
        "_joining",
        "_last_seq",
        "_newest",
        "_newest_due",
        "_poked",
        "_position",
        "_reading",
        "_task",
        "_watches",
        "ended",
        "h",
        "session_id",
        "settled",
        "tenant",
        "turned_back",
        "user",
        "view",
        "watchers",
    )

    def __init__(self, watches: Watches, h: bytes, session_id: str, tenant: str) -> None:
        self._watches = watches
        self.h = h
        self.session_id = session_id
        self.tenant = tenant
        # Whose the session is; None while nobody knows.
        self.user: str | None = None
        self.watchers: set[Watcher] = set()
        self.view: _View | None = None
        # False while nobody knows where the session is served from; what was told stays told.
        self.settled = False
        # Rises whenever what was told before is not the log any more, or its owner changed.
        self.turned_back = 0
        # Why nothing more is told.
        self.ended: SessiondError | None = None
        # The newest turn that was there to be told, and the epoch at that time.
        self._position: turn_pb2.TurnPosition | None = None
        self._epoch = 0
        self._newest: tuple[int, int, bytes] | None = None
        self._newest_due = 0
        self._joining: list[asyncio.Future[None]] = []
        self._poked = asyncio.Event()
        self._reading: asyncio.Task[tuple[Owner | None, float]] | None = None
        self._task: asyncio.Task[None] | None = asyncio.ensure_future(self._follow())

    # Who is told ---------------------------------------------------------------------------------------------------

    async def ready(self) -> _View:
        """What is to be told now. Raises why it can't be known, once an attempt to find the session has failed."""
        while not (self.settled and self.view is not None) and self.ended is None:
            future = asyncio.get_running_loop().create_future()
            self._joining.append(future)
            await future
        if self.ended is not None:
            raise self.ended
        assert self.view is not None
        return self.view

    async def admit(self, user_id: str) -> None:
        """Let a caller at the session, deleted or not. Raises NotFound if it is not this user's, and as cold does."""
        if user_id and self.user is None:
            await self._watches.own.cold(self.h, self.session_id, user_id)
        elif self.user is not None:
            check_user(self.session_id, self.user, user_id)

    def elsewhere(self) -> Unavailable:
        """The answer to whoever wants this node's own rows or nothing."""
        if self.view is not None and isinstance(self.view.source, _Relayed):
            return OwnedElsewhere(self.session_id, self.view.source.owner)
        what = f"This node does not own session {self.session_id!r} now."
        return Unavailable("NOT_OWNER", what, {"session_id": self.session_id})

    def close(self) -> None:
        """Nobody watches any more."""
        for task in (self._task, self._reading):
            if task is not None:
                task.cancel()

    def _wake(self) -> None:
        joining, self._joining = self._joining, []
        for future in joining:
            if not future.done():
                future.set_result(None)
        for watcher in self.watchers:
            watcher.wake()

    def refuse(self, error: SessiondError) -> None:
        """An attempt failed: those who just came are told; the others wait for the next."""
        joining, self._joining = self._joining, []
        for future in joining:
            if not future.done():
                future.set_exception(error)

    def _end(self, error: SessiondError) -> None:
        self.ended = error
        self._watches.forget(self)
        self._wake()

    def _publish(self, view: _View, position: turn_pb2.TurnPosition, epoch: int, shared_seq: int | None) -> None:
        """Tell this from now on. shared_seq: up to where the log is the one that was told so far; None if it is."""
        if self._position is not None and (epoch != self._epoch or shared_seq is not None):
            self.turned_back += 1
            for watcher in self.watchers:
                watcher.turn_back(shared_seq)
        self.view, self._position, self._epoch = view, position, epoch
        self.settled = True
        self._wake()

    async def read(self, view: _View, first_seq: int, last_seq: int) -> tuple[bytes, int]:
        """Turns for one event, as _Source.read. Raises _Moved, and as the tiers do."""
        newest = self._newest
        if newest is not None and newest[0] == first_seq and newest[1] <= last_seq and view.source.owned:
            self._newest_due -= 1
            if self._newest_due <= 0:
                self._newest = None
            return newest[2], newest[1]
        return await view.source.read(first_seq, last_seq)

    # This node's rows ------------------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Something about the session was committed here."""
        if self.ended is not None:
            return
        source = self.view.source if self.view is not None and self.settled else None
        try:
            if isinstance(source, _Owned):
                if not self._look(source, None):
                    # Those who watch from other nodes must not wait for this one: they look where it went.
                    self._unsettle(let_go=True)
            elif source is not None and self._is_owned():
                self._unsettle()
            else:
                self._poked.set()
        except Corrupt as error:
            self._end(error)
        except SessiondError:
            self._unsettle(PAUSE_FIRST_S)

    def _is_owned(self) -> bool:
        head = self._watches.own.peek(self.h)
        return head is not None and head.phase == PHASE_OWNED

    def _unsettle(self, pause_s: float = 0.0, let_go: bool = False) -> None:
        """Look anew where the session is served from."""
        self.settled = False
        if self._task is not None:
            self._task.cancel()
        self._poked.clear()
        self._task = asyncio.ensure_future(self._follow(pause_s, let_go))
        self._wake()

    def _look(self, source: _Owned, shared_seq: int | None) -> bool:
        """Tell how the rows stand; False if this node does not own the session any more, or owns it anew."""
        view, due = self.view, self._position.seq if self._position is not None else 0
        with self._watches.parts.hot.read() as transaction:
            head = log.read_head(transaction, self.h)
            if head is None or head.phase != PHASE_OWNED or head.epoch != source.epoch:
                return False
            if self._watches.own.lifecycle(head) == LIFECYCLE_DELETED:
                self._end(log.deleted(self.session_id))
                return True
            log.check_newest(transaction, self.h, head)
            frames = b""
            if view is not None and view.source is source and due < head.head_seq and due + 1 >= head.hot_first:
                frames, last = log.frames_between(transaction, self.h, due + 1, head.head_seq, EVENT_BYTES_MAX)
        if frames and len(frames) <= NEWEST_BYTES_MAX:
            self._newest = due + 1, last, frames
            self._newest_due = sum(watcher.seq == due for watcher in self.watchers)
        source.cloud_seq = head.cloud_seq
        state = states.decode(head.state)
        marks = _marks(state, head.cloud_seq, contexts.missing_ranges(head.loss))
        if view is not None and view.source is source and marks == view.marks and self.settled:
            return True
        position = contexts.head_position(state)
        self._publish(_View(source, head.head_seq, head.head_seq, marks), position, head.epoch, shared_seq)
        return True

    async def _serve_owned(self) -> bool:
        """Serve from this node's rows, if it owns the session."""
        watches = self._watches
        with watches.parts.hot.read() as transaction:
            head = log.read_head(transaction, self.h)
            if head is None or head.phase != PHASE_OWNED:
                return False
            epochs = decode_committed(self.h, transaction.get("manifests", self.h)).epochs
        self.user = head.user
        source = _Owned(watches.own, watches.parts, self.h, head, epochs)
        try:
            shared_seq = await self._shared(source, head.head_seq)
        except _Moved:
            return False
        return self._look(source, shared_seq)

    async def _shared(self, source: _Source, head_seq: int) -> int | None:
        """Up to where a log is the one that was told so far; None if all of it is."""
        if self._position is None:
            return None
        shared_seq = await source.shared(self._position, head_seq)
        return None if shared_seq == self._position.seq else shared_seq

    # Somewhere else --------------------------------------------------------------------------------------------------

    async def _leave_alone(self) -> None:
        """Wait until the session is this node's again, or nobody else seems to want it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RELEASED_S):
                while not self._is_owned():
                    self._poked.clear()
                    await self._poked.wait()

    async def _follow(self, pause_s: float = 0.0, let_go: bool = False) -> None:
        """Find where the session is served from, again and again while that is not this node's rows. let_go: this node
        owned it a moment ago.
        """
        asked: Owner | None = None
        failures = 0
        if let_go:
            await self._leave_alone()
        while True:
            if pause_s:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._poked.wait(), pause_s)
            self._poked.clear()
            try:
                found = await self._step(asked)
                if found is None or self.ended is not None:
                    return
                asked, pause_s = found
                failures = failures + 1 if pause_s else 0
                pause_s = max(pause_s, min(PAUSE_MAX_S, pause_s * 2 ** min(failures, 8)))
            except NotFound as error:
                self._end(error)
                return
            except SessiondError as error:
                self.refuse(error)
                asked, failures = None, failures + 1
                pause_s = min(PAUSE_MAX_S, PAUSE_FIRST_S * 2 ** min(failures, 8))
            except Exception as error:
                self._end(Corrupt("INTERNAL", f"Watching failed for an unforeseen reason: {type(error).__name__}."))
                raise

    async def _step(self, asked: Owner | None) -> tuple[Owner | None, float] | None:
        """One attempt. None once this node's rows serve it; else an owner that did not answer, and seconds to wait."""
        own = self._watches.own
        await own.settle_doubt(self.h)
        if await self._serve_owned():
            return None
        call = Call(self.tenant, None, unreachable=asked)
        cold = await own.cold(self.h, self.session_id, "")
        self.user = cold.manifest.user
        archived = own.lifecycle(cold.manifest) == LIFECYCLE_ARCHIVED
        try:
            found = await own.succession(call, cold)
            if found.takeable and not archived:
                await own.take(call, self.h, self.session_id, "")
                return None if await self._serve_owned() else (None, PAUSE_FIRST_S)
        except OwnedElsewhere as elsewhere:
            return await self._relay(elsewhere, cold.manifest)
        await self._serve_cold(cold, out_of_reach=not found.takeable)
        return None, ARCHIVED_S if archived else PAUSE_MAX_S

    async def _serve_cold(self, cold: Cold, out_of_reach: bool) -> None:
        """Serve what the cloud tier has: of what is read-only, or of a session whose owner can't be reached."""
        manifest, watches = cold.manifest, self._watches
        source = _Cold(watches.own, watches.parts, manifest)
        state = states.decode(manifest.state)
        missing = contexts.missing_ranges(manifest.loss)
        if out_of_reach:
            missing.append(unreachable(manifest))
        known = self._position
        if known is not None and manifest.epoch == self._epoch and manifest.head < known.seq:
            # The owner had more, and nobody took the session from it: what was told stays as it is.
            assert self.view is not None
            told = session_pb2.WatchSessionResponse.FromString(self.view.marks)
            del told.missing[:]
            told.missing.extend(missing)
            view = _View(source, known.seq, manifest.head, told.SerializeToString())
            self._publish(view, known, self._epoch, None)
            return
        shared_seq = await self._shared(source, manifest.head)
        view = _View(source, manifest.head, manifest.head, _marks(state, manifest.head, missing))
        self._publish(view, contexts.head_position(state), manifest.epoch, shared_seq)

    # The owner, on another node --------------------------------------------------------------------------------------

    def _forward(self, owner: Owner, method: str, request: bytes) -> node_pb2.ForwardRequest:
        node = self._watches.parts.node
        return node_pb2.ForwardRequest(
            method=method, request=request, tenant=self.tenant, incarnation=owner.incarnation, from_node=node.name
        )

    async def ask(self, owner: Owner, method: str, request: bytes) -> bytes:
        """A call of this node's own, answered by the owner. Raises Unavailable OWNER_UNREACHABLE if it is not."""
        peers = self._watches.peers
        assert peers is not None
        try:
            answer = await peers.call(owner.address, self._forward(owner, method, request), PEER_S)
        except PeerUnreachable as error:
            raise _out_of_reach(self.session_id, owner) from error
        if answer.not_owner or answer.status:
            raise _out_of_reach(self.session_id, owner)
        return answer.reply

    async def knock(self, owner: Owner) -> None:
        """Have any answer of the owner's node. Raises PeerUnreachable."""
        peers = self._watches.peers
        assert peers is not None
        request = session_pb2.GetSessionRequest(session_id=self.session_id).SerializeToString()
        await peers.call(owner.address, self._forward(owner, "GetSession", request), PEER_S)

    async def _relay(self, elsewhere: OwnedElsewhere, manifest: Manifest) -> tuple[Owner | None, float]:
        """Tell what the owner tells, until it tells no more; the owner if it does not answer, and seconds to wait."""
        owner, watches = elsewhere.owner, self._watches
        if watches.peers is None:
            raise elsewhere
        self._reading = reading = asyncio.ensure_future(self._read_from(watches.peers, owner, manifest))
        watches.probes.add(self, owner)
        try:
            await asyncio.wait({reading})
        finally:
            watches.probes.remove(self, owner)
            self._reading = None
            if not reading.done():
                reading.cancel()
        if self.ended is None:
            self.settled = False
            self._wake()
        if reading.cancelled():
            return owner, 0.0  # the node stopped answering while the stream was open
        return reading.result()

    def lose(self) -> None:
        """The node that it is relayed from does not answer any more."""
        if self._reading is not None:
            self._reading.cancel()

    async def _read_from(self, peers: PeerStreams, owner: Owner, manifest: Manifest) -> tuple[Owner | None, float]:
        source = _Relayed(self, owner, manifest)
        request = session_pb2.WatchSessionRequest(session_id=self.session_id, after=self._position)
        call = self._forward(owner, WATCH, request.SerializeToString())
        stream = peers.watch(owner.address, node_pb2.ForwardWatchRequest(call=call))
        told = False
        try:
            while True:
                try:
                    event = (await asyncio.wait_for(anext(stream), None if told else PEER_S)).event
                except StopAsyncIteration:
                    return None, 0.0 if told else PAUSE_MAX_S
                except (TimeoutError, PeerUnreachable):
                    return owner, 0.0
                if event.not_owner:
                    return None, 0.0 if told else PAUSE_FIRST_S
                if event.status:
                    # It is on its way out, or refuses for a while; whoever owns the session then is found anew.
                    return None, PAUSE_FIRST_S * 4
                self._retell(source, event.reply, manifest.epoch, told)
                told = True
                if self.ended is not None:
                    return None, 0.0
        finally:
            with contextlib.suppress(Exception):
                await stream.aclose()  # type: ignore[attr-defined]

    def _retell(self, source: _Relayed, raw: bytes, epoch: int, told: bool) -> None:
        """One event of the owner's. told: it is not the first of its stream."""
        frames, rest = split_frames(raw)
        event = session_pb2.WatchSessionResponse.FromString(rest)
        if event.deleted:
            self._end(log.deleted(self.session_id))
            return
        headers = core.scan_frames(self.h, frames) if frames else []
        changed, event.epoch_changed = event.epoch_changed, False
        known = self._position
        shared_seq = None
        if changed and known is not None:
            first = headers[0].seq - 1 if headers else event.head.seq
            shared_seq = first if first < known.seq else None
        if headers:
            source.add(headers, frames)
            last = headers[-1]
            position = turn_pb2.TurnPosition(epoch=last.epoch, seq=last.seq, chain=last.chain)
        elif known is None or shared_seq is not None:
            position = event.head
        else:
            position = known
        source.cloud_seq = event.cloud_seq
        if told:
            # By how much it rose nobody said; a guess that is too low tells it twice at worst.
            epoch = self._epoch + 1 if changed else self._epoch
        view = _View(source, event.head.seq, position.seq, event.SerializeToString())
        self._publish(view, position, epoch, shared_seq)


class Watcher:
    """One stream of WatchSession. `next` until it returns None or raises, then `close`, whichever way it ends."""

    __slots__ = (
        "_after",
        "_changed",
        "_feed",
        "_marks",
        "_told_end",
        "_user",
        "_watches",
        "_woken",
        "forwarded",
        "rows_only",
        "seq",
    )

    def __init__(self, watches: Watches, feed: Feed, call: Call, request: session_pb2.WatchSessionRequest) -> None:
        self._watches = watches
        self._feed = feed
        self._user = request.user_id
        self._after = request.after if request.HasField("after") else None
        self._woken = asyncio.Event()
        self._changed = False
        # What was told last; None before the first event.
        self._marks: bytes | None = None
        self._told_end = False
        self.forwarded = call.forwarded
        # Another node asks for what this one owns, or the caller would rather go to the owner.
        self.rows_only = call.forwarded or call.redirects
        # The turn that was told last; -1 before it is known where to begin.
        self.seq = -1

    def wake(self) -> None:
        """There may be something to tell."""
        self._woken.set()

    def turn_back(self, shared_seq: int | None) -> None:
        """The epoch changed. shared_seq: what was told above it is not in the log any more."""
        self._changed = True
        if shared_seq is not None and self.seq > shared_seq:
            self.seq = shared_seq

    async def next(self) -> bytes | None:
        """The next event's wire bytes; None after the last.

        Raises NotFound, Unavailable (NODE_DRAINING, OwnedElsewhere, NOT_OWNER and as the store does), Corrupt.
        """
        feed = self._feed
        if self.seq < 0:
            await self._begin()
        while True:
            self._woken.clear()
            if feed.ended is not None:
                return self._last()
            if self._watches.draining and not self.forwarded:
                raise draining()
            view = feed.view if feed.settled else None
            if self.rows_only and (view is None or not view.source.owned):
                raise feed.elsewhere()
            if view is not None:
                event = await self._event(view)
                if event is not None:
                    return event
            await self._woken.wait()

    async def _begin(self) -> None:
        """Find the place to begin at. Raises as next does."""
        feed = self._feed
        while True:
            try:
                view = await feed.ready()
            except NotFound:
                await feed.admit(self._user)
                raise
            await feed.admit(self._user)
            if self.rows_only and not view.source.owned:
                raise feed.elsewhere()
            if self._after is None:
                self._changed, self.seq = False, view.head_seq
                return
            try:
                shared_seq = await view.source.shared(self._after, view.head_seq)
            except _Moved:
                continue
            if feed.view is not None and feed.view.source is view.source:
                if shared_seq != self._after.seq and isinstance(view.source, _Owned):
                    self._check_not_behind(view.source, self._after)
                self._changed = shared_seq != self._after.seq
                self.seq = shared_seq
                return

    def _check_not_behind(self, source: _Owned, after: turn_pb2.TurnPosition) -> None:
        """A node that can't prove that it owns the session takes nothing back from who saw turns of a later owner."""
        if after.epoch > source.epoch and not self._watches.parts.lease.is_valid():
            what = f"Turn {after.seq} is of epoch {after.epoch}; this node knows epoch {source.epoch}."
            raise Unavailable("EPOCH_FENCED", what, {"session_id": self._feed.session_id})

    def _last(self) -> bytes | None:
        assert self._feed.ended is not None
        if self._feed.ended.reason != "SESSION_DELETED" or self._marks is None:
            raise self._feed.ended
        if self._told_end:
            return None
        self._told_end = True
        return _DELETED

    async def _event(self, view: _View) -> bytes | None:
        feed, frames, last = self._feed, b"", self.seq
        upto = min(view.head_seq, view.readable_seq)
        if self.seq < upto:
            turned_back = feed.turned_back
            try:
                frames, last = await feed.read(view, self.seq + 1, upto)
            except _Moved:
                return None
            if feed.turned_back != turned_back:
                self._woken.set()  # these turns may not be the log's any more
                return None
        elif self._marks == view.marks and not self._changed:
            return None
        self.seq, self._marks = last, view.marks
        event = frames + view.marks
        if self._changed:
            self._changed = False
            event += _CHANGED
        return event

    def close(self) -> None:
        """Let go of the session."""
        self._watches.leave(self, self._feed)


class _Probes:
    """Asks each node that sessions are relayed from whether it answers: a stream of one that stands still is silent."""

    def __init__(self) -> None:
        self._feeds: dict[Owner, set[Feed]] = {}
        self._tasks: dict[Owner, asyncio.Task[None]] = {}

    def add(self, feed: Feed, owner: Owner) -> None:
        """A session is relayed from there."""
        self._feeds.setdefault(owner, set()).add(feed)
        if owner not in self._tasks:
            self._tasks[owner] = asyncio.ensure_future(self._probe(owner))

    def remove(self, feed: Feed, owner: Owner) -> None:
        """It is not any more."""
        feeds = self._feeds.get(owner, set())
        feeds.discard(feed)
        if not feeds and owner in self._tasks:
            self._feeds.pop(owner, None)
            self._tasks.pop(owner).cancel()

    async def _probe(self, owner: Owner) -> None:
        failures = 0
        while True:
            await asyncio.sleep(PEER_S)
            try:
                await next(iter(self._feeds[owner])).knock(owner)
                failures = 0
            except PeerUnreachable:
                failures += 1
            if failures >= PROBES_MAX:
                for feed in list(self._feeds[owner]):
                    feed.lose()


class Watches:
    """Every WatchSession of this node."""

    def __init__(self, parts: Parts, own: Ownership, watchers_max: int, peers: PeerStreams | None = None) -> None:
        self.parts = parts
        self.own = own
        self.peers = peers
        self.probes = _Probes()
        self.draining = False
        self.count = 0
        self._watchers_max = watchers_max
        self._feeds: dict[bytes, Feed] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        parts.hot.on_commit = self._committed

    async def open(self, call: Call, request: session_pb2.WatchSessionRequest) -> Watcher:
        """A stream for this request. Raises Invalid, Exhausted OVERLOADED, Unavailable, and as the store does."""
        session_id = check_session_id(request.session_id)
        check_user_id(request.user_id)
        check_position(request.after, "after")
        if self.draining and not call.forwarded:
            raise draining()
        self.own.check_not_fenced()
        h = rules.session_hash(self.parts.bucket.hash_key, call.tenant, session_id)
        if call.forwarded:
            # Served from here or from nowhere: what this node does not own it must not go and take.
            await self.own.settle_doubt(h)
            head = self.own.peek(h)
            if head is None or head.phase not in (PHASE_OWNED, PHASE_CLAIMING):
                what = f"This node does not own session {session_id!r}."
                raise Unavailable("NOT_OWNER", what, {"session_id": session_id})
        if self.count >= self._watchers_max:
            raise Exhausted("OVERLOADED", f"{self.count} streams watch sessions of this node.")
        feed = self._feeds.get(h)
        if feed is None:
            self._loop = asyncio.get_running_loop()
            feed = self._feeds[h] = Feed(self, h, session_id, call.tenant)
        watcher = Watcher(self, feed, call, request)
        feed.watchers.add(watcher)
        self.count += 1
        return watcher

    def leave(self, watcher: Watcher, feed: Feed) -> None:
        """A stream has ended."""
        if watcher not in feed.watchers:
            return
        feed.watchers.discard(watcher)
        self.count -= 1
        if not feed.watchers:
            feed.close()
            self.forget(feed)

    def forget(self, feed: Feed) -> None:
        """Whoever asks for the session from here on is told anew."""
        if self._feeds.get(feed.h) is feed:
            del self._feeds[feed.h]

    def is_watched(self, h: bytes) -> bool:
        """Whether somebody watches the session here; from any thread."""
        return h in self._feeds

    def drain(self) -> None:
        """End every stream of a client; other nodes' go on for as long as this one owns what they ask for."""
        self.draining = True
        for feed in list(self._feeds.values()):
            feed.refuse(draining())
            for watcher in list(feed.watchers):
                watcher.wake()

    def _committed(self, hashes: Collection[bytes]) -> None:
        """On the commit thread, after the fsync and before anybody is answered. The seam for commits of other
        processes: they have nothing else to tell but which sessions changed.
        """
        watched = [h for h in hashes if h in self._feeds]
        if watched and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody watches any more
                self._loop.call_soon_threadsafe(self.changed, watched)

    def changed(self, hashes: Collection[bytes] | None) -> None:
        """The head rows of these sessions were written; None: of any."""
        for h in list(self._feeds) if hashes is None else hashes:
            feed = self._feeds.get(h)
            if feed is not None:
                feed.poke()


def split_frames(raw: bytes) -> tuple[bytes, bytes]:
    """(turns as they are stored, the rest) of a reply that repeats turns first. Raises Corrupt CORRUPT_FRAME."""
    at = 0
    while at < len(raw) and raw[at] == FRAME_TAG:
        size = 0
        for place in range(PREFIX_BYTES - 1):
            size |= (raw[at + 1 + place] & 0x7F) << 7 * place
        at += PREFIX_BYTES + size
    if at > len(raw):
        raise Corrupt("CORRUPT_FRAME", "A reply of another node ends within a turn.")
    return raw[:at], raw[at:]


def _marks(state: State, cloud_seq: int, missing: list[context_pb2.MissingRange]) -> bytes:
    return session_pb2.WatchSessionResponse(
        head=contexts.head_position(state),
        checkpoint_version=state.boundary[0] << 32 | state.boundary[1],
        cloud_seq=cloud_seq,
        missing=missing,
    ).SerializeToString()


def _out_of_reach(session_id: str, owner: Owner) -> Unavailable:
    where = {"session_id": session_id, "owner_node": owner.name, "owner_address": owner.address}
    what = f"Session {session_id!r} is owned by node {owner.name!r}, which does not answer."
    return Unavailable("OWNER_UNREACHABLE", what, where)
