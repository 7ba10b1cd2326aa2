"""Every call of the client as data: its request, and what its reply becomes. The two clients differ only in sending.

It promises that everything a repeat must carry unchanged (session ids, turn ids) is in the request before it is first
sent. It opens no channel and waits for nothing.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, TypeVar
from urllib.parse import quote

from google.protobuf.message import Message

from sessiond.client import turns as turn_makers
from sessiond.client.context import Context, position_of
from sessiond.client.failures import Attempts, item_error, make
from sessiond.client.routes import CONNECT_MS, Route, Routes, ring_options
from sessiond.client.turns import TurnLike, enum, policy_proto, to_message, to_turns
from sessiond.client.unconfirmed import Unconfirmed
from sessiond.client.watching import Following
from sessiond.errors import Conflict, Invalid, SessiondError
from sessiond.v1 import admin_pb2, context_pb2, session_pb2, state_pb2, turn_pb2

SERVER_VARIABLE: Final = "SESSIOND_SERVER"
SERVER_DEFAULT: Final = "127.0.0.1:7443"
TIMEOUT_S: Final = 10.0
# As the daemon's own; gRPC's default of 4 MiB is below a large context.
MESSAGE_BYTES_MAX: Final = 64 * 1024**2
CHANNEL_OPTIONS: Final[dict[str, Any]] = {
    "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
    "grpc.max_send_message_length": MESSAGE_BYTES_MAX,
    # Within the daemon's limits: it takes a ping every 10 s.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
    # A daemon that restarts is back in less than a second; gRPC's own pace goes up to two minutes.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 2000,
    # The daemon stands in the same region, never behind a proxy for web pages.
    "grpc.enable_http_proxy": 0,
}
# An append takes 1 to 256 turns, in a request below the daemon's limit.
RESEND_TURNS_MAX: Final = 256
RESEND_BYTES_MAX: Final = 4 * 1024**2
# Messages that say something and change nothing else when they stand at the end of the log.
SAID: Final = (turn_pb2.ROLE_USER, turn_pb2.ROLE_ASSISTANT, turn_pb2.ROLE_TOOL)
# The longest drain that a daemon can be configured for.
DRAIN_S_MAX: Final = 3600.0

Reply = TypeVar("Reply")
Item = TypeVar("Item")
# Whatever has a place in a log: a position, a turn, (epoch, seq), a seq, or what has a `head`.
PositionLike = turn_pb2.TurnPosition | turn_pb2.Turn | tuple[int, int] | int
SinceLike = turn_pb2.TurnPosition | turn_pb2.Turn | int
ContextSpecLike = context_pb2.ContextSpec | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call(Generic[Reply]):
    """One unary call. service, method: as the proto names them. done: what the reply becomes."""

    service: str
    method: str
    request: Message
    session_id: str
    done: Callable[[Any], Reply]


class ChannelKey(NamedTuple):
    """What tells channels apart. spreads: gRPC itself chooses among the nodes behind the address."""

    address: str
    spreads: bool = False


@dataclass(frozen=True, slots=True)
class Many(Generic[Reply]):
    """Calls that go together, as many to a request as it takes. calls: a refusal in place of one that can't be made.

    serial: calls of one session are sent one after the other.
    """

    method: str
    calls: list[Call[Reply] | SessiondError]
    serial: bool


@dataclass(frozen=True, slots=True)
class Listing(Generic[Item]):
    """A list that comes in pages. page: the call for the page of a token. items: what a page holds."""

    page: Callable[[str], Call[Any]]
    items: Callable[[Any], Sequence[Item]]
    check: Callable[[Any], None] = lambda page: None


class AppendResult:
    """What became of an append. `proto` is all of it."""

    __slots__ = ("context", "proto")

    def __init__(self, proto: session_pb2.AppendTurnResponse, since: turn_pb2.TurnPosition | None = None) -> None:
        self.proto = proto
        # The context that results, if it was asked for and could be made; else see context_error.
        self.context = Context(proto.context, since) if proto.HasField("context") else None

    def __repr__(self) -> str:
        return f"<AppendResult {self.outcome}: head {self.head.epoch}:{self.head.seq}, cloud_seq {self.cloud_seq}>"

    @property
    def head(self) -> turn_pb2.TurnPosition:
        """The session's newest turn; give it as `expected` of the next append."""
        return self.proto.head

    @property
    def cloud_seq(self) -> int:
        """The highest seq that the cloud tier has committed."""
        return self.proto.cloud_seq

    @property
    def turns(self) -> Sequence[session_pb2.AppendedTurn]:
        """Where each turn stands, in the order of the request."""
        return self.proto.turns

    @property
    def outcome(self) -> str:
        """APPENDED, DUPLICATE or CONFLICT."""
        return _short(session_pb2.AppendOutcome, self.proto.outcome)

    @property
    def durability(self) -> str:
        """EDGE or CLOUD: how safe the turns are now."""
        return _short(turn_pb2.Durability, self.proto.durability)

    @property
    def missing(self) -> Sequence[context_pb2.MissingRange]:
        """Turns that are, or may be, missing from the session."""
        return self.proto.missing

    @property
    def conflict(self) -> session_pb2.AppendConflict | None:
        """The turns that the caller lacks, if the outcome is a conflict; nothing was appended then."""
        return self.proto.conflict if self.proto.HasField("conflict") else None

    @property
    def context_error(self) -> SessiondError | None:
        """Why the context could not be made although the turns were appended."""
        return item_error(self.proto.context_error) if self.proto.HasField("context_error") else None


@dataclass(slots=True)
class Reappended:
    """What became of turns that were appended again.

    appended: where they stand now, also those that stood there already. left: turns that were not appended, each with
    the daemon's refusal; None for one that was not tried, since it acts on more than itself.
    """

    appended: list[session_pb2.AppendedTurn] = field(default_factory=list)
    left: list[tuple[turn_pb2.Turn, SessiondError | None]] = field(default_factory=list)


def context_spec(
    budget_tokens: int = 0,
    *,
    reserve_tokens: int = 0,
    strategy: str | int = "",
    last_exchanges: int = 0,
    encoding: str | int = "",
    instructions: str | None = None,
    new_message: str | Mapping[str, Any] | turn_pb2.Message | None = None,
    context_etag: str = "",
    since: SinceLike | None = None,
) -> context_pb2.ContextSpec:
    """What a context should hold; whatever is not said is the session's policy's. Raises Invalid INVALID_CONTEXT.

    since: the last turn that the caller holds, as Context.last_position.
    """
    return context_pb2.ContextSpec(
        budget_tokens=_unsigned(budget_tokens, "budget_tokens"),
        reserve_tokens=_unsigned(reserve_tokens, "reserve_tokens"),
        strategy=enum(turn_pb2.Strategy, strategy or 0, "strategy"),  # type: ignore[arg-type]
        last_exchanges=_unsigned(last_exchanges, "last_exchanges"),
        encoding=enum(turn_pb2.Encoding, encoding or 0, "encoding"),  # type: ignore[arg-type]
        instructions=instructions,
        new_message=None if new_message is None else to_message(new_message),
        context_etag=context_etag,
        since=_position(since, "since"),
    )


class Calls:
    """The calls of one client: where they go, how long they may take, and what is kept of them."""

    def __init__(
        self,
        server: str | None,
        timeout_s: float,
        retry_s: float | None,
        channel_options: Mapping[str, Any] | None,
        resend: bool,
        redirects: bool,
    ) -> None:
        self.server = server or os.environ.get(SERVER_VARIABLE) or SERVER_DEFAULT
        self.routes = Routes(self.server, redirects)
        self.timeout_s = timeout_s
        self.retry_s = retry_s
        self._channel_options = channel_options or {}
        self.unconfirmed = Unconfirmed() if resend else None

    def attempts(self, call: Call[Any], *, endless: bool = False) -> Attempts:
        """The attempts at one call, from now on. endless: it is tried again for as long as that can help."""
        route = Route(self.routes, call.session_id, one_node=call.service == "AdminService")
        timeout_s, retry_s = (math.inf, None) if endless else (self.timeout_s, self.retry_s)
        return Attempts(self.server, timeout_s, retry_s, route)

    @property
    def node(self) -> ChannelKey:
        """The one node that calls about a node go to: the first that was named."""
        return ChannelKey(self.routes.servers[0])

    def channel_options(self, key: ChannelKey) -> list[tuple[str, Any]]:
        """The arguments of a channel."""
        options = dict(CHANNEL_OPTIONS)
        if key.spreads:
            options.update(ring_options())
        elif self.routes.several or self.routes.redirects:
            options["grpc.min_reconnect_backoff_ms"] = CONNECT_MS
        return list({**options, **self._channel_options}.items())

    def channel_key(self, route: Route) -> ChannelKey:
        """The channel that an attempt needs."""
        return ChannelKey(route.address, self.routes.uses_ring_of_grpc and not route.direct and not route.one_node)

    # Sessions ----------------------------------------------------------------------------------------------------

    def create_session(
        self,
        session_id: str = "",
        *,
        user_id: str = "",
        policy: turn_pb2.SessionPolicy | Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        created_at_unix_ms: int = 0,
    ) -> Call[session_pb2.Session]:
        """Make a session, or return the one that has this id already. Without an id, one is minted.

        policy: by the names of SessionPolicy, as in {"min_durability": "CLOUD", "budget_tokens": 4000}.
        """
        # Minted here, so that a repeat names the same session.
        session_id = session_id or str(uuid.uuid4())
        request = session_pb2.CreateSessionRequest(
            session_id=session_id,
            user_id=user_id,
            policy=policy_proto(policy),
            metadata=metadata or {},
            created_at_unix_ms=created_at_unix_ms,
        )
        return _session_call("CreateSession", request, lambda reply: reply.session)

    def get_session(self, session_id: str, *, user_id: str = "") -> Call[session_pb2.Session]:
        """A session without its turns."""
        request = session_pb2.GetSessionRequest(session_id=session_id, user_id=user_id)
        return _session_call("GetSession", request, lambda reply: reply.session)

    def list_sessions_page(
        self, user_id: str | None = None, *, page_size: int = 0, page_token: str = ""
    ) -> Call[session_pb2.ListSessionsResponse]:
        """One page of the sessions of a user, or of the tenant, oldest first, unreadable ones named."""
        request = session_pb2.ListSessionsRequest(
            user_id=user_id, page_size=_unsigned(page_size, "page_size"), page_token=page_token
        )
        return Call("SessionService", "ListSessions", request, "", _itself)

    def list_sessions(self, user_id: str | None = None, *, page_size: int = 0) -> Listing[session_pb2.Session]:
        """The sessions of a user, or of the tenant, oldest first within a user.

        Raises Corrupt after a page with sessions that exist but can't be read; list_sessions_page goes past them.
        """

        def page(token: str) -> Call[session_pb2.ListSessionsResponse]:
            return self.list_sessions_page(user_id, page_size=page_size, page_token=token)

        def check(reply: session_pb2.ListSessionsResponse) -> None:
            if reply.unreadable:
                first, count = reply.unreadable[0], len(reply.unreadable)
                message = f"{count} listed session(s) can't be read, the first {first.session_id!r}: {first.reason}."
                raise make("DATA_LOSS", first.reason, message, {"session_id": first.session_id, "count": str(count)})

        return Listing(page, lambda reply: reply.sessions, check)

    def delete_session(self, session_id: str, *, user_id: str = "") -> Call[bool]:
        """Delete a session for ever; False if it was deleted before. Its id can never be used again."""
        request = session_pb2.DeleteSessionRequest(session_id=session_id, user_id=user_id)
        return _session_call("DeleteSession", request, lambda reply: bool(reply.deleted))

    def update_session(
        self,
        session_id: str,
        *,
        flags: Mapping[str, bool] | None = None,
        mode: str | None = None,
        metadata: Mapping[str, str] | None = None,
        metadata_removed: Iterable[str] = (),
        pins: Mapping[str, str] | None = None,
        pins_removed: Iterable[str] = (),
        policy: turn_pb2.SessionPolicy | Mapping[str, Any] | None = None,
        etag: str = "",
        turn_id: str = "",
        durability: str | int = "",
        user_id: str = "",
    ) -> Call[session_pb2.Session]:
        """Append a state turn; what is not named stays as it was. Returns the session after it.

        etag: the `state.etag` that the change builds on; empty changes it whatever it is.
        """
        turn = turn_makers.state_change(
            flags=flags,
            mode=mode,
            metadata=metadata,
            metadata_removed=metadata_removed,
            pins=pins,
            pins_removed=pins_removed,
            policy=policy,
            turn_id=turn_id,
        )
        request = session_pb2.UpdateSessionRequest(
            session_id=session_id,
            user_id=user_id,
            etag=etag,
            turn_id=turn.turn_id,
            change=turn.state,
            durability=enum(turn_pb2.Durability, durability or 0, "durability"),  # type: ignore[arg-type]
        )

        def done(reply: session_pb2.UpdateSessionResponse) -> session_pb2.Session:
            session = reply.session
            if self.unconfirmed is not None:
                self.unconfirmed.acknowledged(
                    session_id, [(turn, reply.appended)], session.epoch, session.cloud_seq, session.missing
                )
            return session

        return _session_call("UpdateSession", request, done)

    def fork_session(
        self,
        session_id: str,
        new_session_id: str = "",
        *,
        seq: int = 0,
        checkpoint_version: int = 0,
        user_id: str = "",
    ) -> Call[session_pb2.Session]:
        """A new session that begins with the turns of another one up to a turn, or the one that was made so before.

        seq, or checkpoint_version: the turn, or the checkpoint whose turn, is the last one that the two share. Without
        an id it gets a fresh UUID.
        """
        at = {"seq": _unsigned(seq, "seq", 64)}
        if checkpoint_version:
            at = {"checkpoint_version": _unsigned(checkpoint_version, "checkpoint_version", 64)}
        request = session_pb2.ForkSessionRequest(
            session_id=session_id,
            user_id=user_id,
            # Minted here, so that a repeat names the same session.
            new_session_id=new_session_id or str(uuid.uuid4()),
            **at,
        )
        return _session_call("ForkSession", request, lambda reply: reply.session)

    def warm_session(self, session_id: str, *, user_id: str = "") -> Call[bool]:
        """Hint that a session will be resumed soon; whether its owner holds it already. The reply waits for nothing."""
        request = session_pb2.WarmSessionRequest(session_id=session_id, user_id=user_id)
        return _session_call("WarmSession", request, lambda reply: bool(reply.hot))

    # Resume and append -------------------------------------------------------------------------------------------

    def resume(
        self,
        session_id: str,
        budget_tokens: int = 0,
        *,
        reserve_tokens: int = 0,
        strategy: str | int = "",
        last_exchanges: int = 0,
        encoding: str | int = "",
        instructions: str | None = None,
        new_message: str | Mapping[str, Any] | turn_pb2.Message | None = None,
        context_etag: str = "",
        since: SinceLike | None = None,
        highest_acked: PositionLike | AppendResult | Context | None = None,
        known_checkpoint_version: int = 0,
        accept_missing: int | None = None,
        reset_to_session_id: str = "",
        read_only: bool = False,
        user_id: str = "",
    ) -> Call[Context]:
        """The active context within a token budget, and what is missing from it.

        strategy: FULL, LAST_N, SUMMARY, HYBRID or RECALL; unsaid, the policy's, else HYBRID. encoding: o200k_base or
        cl100k_base. instructions, new_message: counted, not stored. highest_acked: the newest turn that the caller
        saw acknowledged; with its chain, as replies give it, proof instead of a comparison. since: the last turn that
        the caller holds (`held.last_position`): only newer ones are repeated, to `merge`. accept_missing: go on without
        the turns of this epoch that may be missing. reset_to_session_id: where the history can't be read for good, make
        a new session with this id and resume that, rung RESET, instead of failing with DATA_LOSS.
        """
        request = session_pb2.ResumeSessionRequest(
            session_id=session_id,
            user_id=user_id,
            context=context_spec(
                budget_tokens,
                reserve_tokens=reserve_tokens,
                strategy=strategy,
                last_exchanges=last_exchanges,
                encoding=encoding,
                instructions=instructions,
                new_message=new_message,
                context_etag=context_etag,
                since=since,
            ),
            highest_acked=_position(highest_acked, "highest_acked"),
            known_checkpoint_version=_unsigned(known_checkpoint_version, "known_checkpoint_version", 64),
            accept_missing=_optional(accept_missing, "accept_missing", 32),
            reset_to_session_id=reset_to_session_id,
            read_only=read_only,
        )
        return _session_call("ResumeSession", request, lambda reply: Context(reply.context, _since(request.context)))

    def append(
        self,
        session_id: str,
        turns: TurnLike | Iterable[TurnLike],
        *,
        expected: PositionLike | AppendResult | Context | None = None,
        durability: str | int = "",
        context: ContextSpecLike | None = None,
        return_tail_on_conflict: bool = False,
        user_id: str = "",
    ) -> Call[AppendResult]:
        """Append turns, all or none; with `context` (a context_spec, or its arguments), also the context that results.

        turns: what the makers of `sessiond.client` return, TurnInputs, or OpenAI chat messages. Each has one turn_id
        for good: to try again after an error, pass the same turns, not new ones. durability: EDGE or CLOUD.
        """
        if context is not None and not isinstance(context, context_pb2.ContextSpec):
            context = context_spec(**context)
        request = session_pb2.AppendTurnRequest(
            session_id=session_id,
            user_id=user_id,
            turns=to_turns(turns),
            expected=_position(expected, "expected"),
            durability=enum(turn_pb2.Durability, durability or 0, "durability"),  # type: ignore[arg-type]
            context=context,
            conflict_mode=session_pb2.CONFLICT_MODE_RETURN_TAIL
            if return_tail_on_conflict
            else session_pb2.CONFLICT_MODE_UNSPECIFIED,
        )

        def done(reply: session_pb2.AppendTurnResponse) -> AppendResult:
            if self.unconfirmed is not None and reply.outcome != session_pb2.APPEND_OUTCOME_CONFLICT:
                pairs = zip(request.turns, reply.turns, strict=True)
                self.unconfirmed.acknowledged(session_id, pairs, reply.head.epoch, reply.cloud_seq, reply.missing)
            return AppendResult(reply, _since(request.context))

        return _session_call("AppendTurn", request, done)

    def resume_many(
        self, /, sessions: Iterable[str | Mapping[str, Any]], budget_tokens: int = 0, **options: Any
    ) -> Many[Context]:
        """The contexts of many sessions, in order: a Context each, or the SessiondError that it was refused with.

        sessions: ids, or the arguments of `resume` by their names, which go before those given here for all.
        """
        options["budget_tokens"] = budget_tokens

        def build(item: str | Mapping[str, Any]) -> Call[Context]:
            return self.resume(**{**options, **({"session_id": item} if isinstance(item, str) else item)})

        return Many("BatchResumeSessions", [_built(build, item) for item in sessions], serial=False)

    def append_many(
        self, /, appends: Iterable[tuple[str, TurnLike | Iterable[TurnLike]] | Mapping[str, Any]], **options: Any
    ) -> Many[AppendResult]:
        """Appends to many sessions: for each, in order, an AppendResult or the SessiondError that it was refused with.

        appends: (session_id, turns) pairs, or the arguments of `append` by their names, which go before those given
        here for all. Those of one session are made in their order, also where one is repeated; a later one is tried
        whatever became of the earlier. What must stand or fall together is one append of several turns.
        """

        def build(item: tuple[str, Any] | Mapping[str, Any]) -> Call[AppendResult]:
            named = item if isinstance(item, Mapping) else {"session_id": item[0], "turns": item[1]}
            return self.append(**{**options, **named})

        return Many("BatchAppendTurns", [_built(build, item) for item in appends], serial=True)

    def list_orphans(self, session_id: str, *, user_id: str = "") -> Listing[turn_pb2.Turn]:
        """Acknowledged turns that are not in the log, oldest first: their node was cut off, and the session went on."""

        def page(token: str) -> Call[session_pb2.ListOrphansResponse]:
            request = session_pb2.ListOrphansRequest(session_id=session_id, user_id=user_id, page_token=token)
            return _session_call("ListOrphans", request, _itself)

        return Listing(page, lambda reply: reply.turns)

    def reappend(
        self, session_id: str, turns: Iterable[turn_pb2.Turn], chosen: bool, durability: str | int, user_id: str
    ) -> Generator[Call[AppendResult], AppendResult, Reappended]:
        """The appends, one after the other; what became of each is sent in, or thrown. chosen: take every kind."""
        outcome = Reappended()
        wanted = {}
        for turn in turns:
            if chosen or turn.HasField("milestone") or (turn.HasField("message") and turn.role in SAID):
                wanted[turn.turn_id] = turn
            else:
                outcome.left.append((turn, None))
        for batch in _batches(turn_makers.again(turn) for turn in wanted.values()):
            try:
                done = yield self.append(session_id, batch, durability=durability, user_id=user_id)
            except (Invalid, Conflict):
                # One of them is refused: each by itself.
                for single in batch:
                    try:
                        done = yield self.append(session_id, single, durability=durability, user_id=user_id)
                    except (Invalid, Conflict) as error:
                        outcome.left.append((wanted[single.turn_id], error))
                    else:
                        outcome.appended += done.turns
            else:
                outcome.appended += done.turns
        return outcome

    def lost(self, session_id: str) -> tuple[list[Call[AppendResult]], turn_pb2.TurnPosition]:
        """(appends of every turn that the cloud tier may lack, the highest_acked to resume with). Needs resend=True."""
        if self.unconfirmed is None:
            raise ValueError("This client keeps no turns to send again: make it with resend=True.")
        turns, acked = self.unconfirmed.kept(session_id)
        return [self.append(session_id, batch) for batch in _batches(turns)], acked

    # Transcript and checkpoints ----------------------------------------------------------------------------------

    def list_turns_page(
        self,
        session_id: str,
        *,
        first_seq: int = 0,
        last_seq: int = 0,
        page_size: int = 0,
        page_token: str = "",
        user_id: str = "",
    ) -> Call[session_pb2.ListTurnsResponse]:
        """One page of the transcript, with a receipt that says what is missing."""
        request = session_pb2.ListTurnsRequest(
            session_id=session_id,
            user_id=user_id,
            page_size=_unsigned(page_size, "page_size"),
            page_token=page_token,
            first_seq=_unsigned(first_seq, "first_seq", 64),
            last_seq=_unsigned(last_seq, "last_seq", 64),
        )
        return _session_call("ListTurns", request, _itself)

    def list_turns(
        self, session_id: str, *, first_seq: int = 0, last_seq: int = 0, page_size: int = 0, user_id: str = ""
    ) -> Listing[turn_pb2.Turn]:
        """The transcript, oldest first, superseded turns included. Its `page.receipt` says what is missing."""

        def page(token: str) -> Call[session_pb2.ListTurnsResponse]:
            return self.list_turns_page(
                session_id,
                first_seq=first_seq,
                last_seq=last_seq,
                page_size=page_size,
                page_token=token,
                user_id=user_id,
            )

        return Listing(page, lambda reply: reply.turns)

    def list_checkpoints(self, session_id: str, *, user_id: str = "") -> Call[Sequence[session_pb2.Checkpoint]]:
        """The newest checkpoints, at most five, newest first."""
        request = session_pb2.ListCheckpointsRequest(session_id=session_id, user_id=user_id)
        return _session_call("ListCheckpoints", request, lambda reply: reply.checkpoints)

    # Watching ----------------------------------------------------------------------------------------------------

    def watch(
        self, session_id: str, *, after: PositionLike | AppendResult | Context | None = None, user_id: str = ""
    ) -> Following:
        """What is told of a session from now on, or after a turn; see `Client.watch`."""
        place = _position(after, "after")
        request = session_pb2.WatchSessionRequest(session_id=session_id, user_id=user_id, after=place)
        return Following(self, _session_call("WatchSession", request, _itself))

    # Blobs -------------------------------------------------------------------------------------------------------

    def get_state(
        self, key: str, *, session_id: str = "", user_id: str = "", known_version: int = 0
    ) -> Call[state_pb2.GetStateResponse]:
        """A blob of a session, or of a user if no session is named: `header`, `content`, and what may be `missing`.

        user_id: with a session, whose it must be. known_version: leave the content out if this is still its version.
        Raises NotFound STATE_NOT_FOUND.
        """
        known = _unsigned(known_version, "known_version", 64)
        request = state_pb2.GetStateRequest(scope=_scope(session_id, user_id), key=key, known_version=known)
        return _state_call("GetState", request, _itself)

    def put_state(
        self,
        key: str,
        content: bytes,
        *,
        session_id: str = "",
        user_id: str = "",
        expected_version: int | None = None,
        media_type: str = "",
        labels: Mapping[str, str] | None = None,
        durability: str | int = "",
        write_id: str = "",
    ) -> Call[state_pb2.StateHeader]:
        """Write a blob of a session, or of a user if no session is named; its header after the write.

        expected_version: write only over this version, 0 if there must be none; else Conflict STATE_VERSION_MISMATCH.
        durability: EDGE or CLOUD. write_id: to try a failed write again later, mint one and give it both times.
        """
        request = state_pb2.PutStateRequest(
            scope=_scope(session_id, user_id),
            key=key,
            content=content,
            expected_version=_optional(expected_version, "expected_version"),
            media_type=media_type,
            labels=labels or {},
            # Minted here, so that a repeat is the same write.
            write_id=write_id or str(uuid.uuid4()),
            durability=enum(turn_pb2.Durability, durability or 0, "durability"),  # type: ignore[arg-type]
        )
        return _state_call("PutState", request, lambda reply: reply.header)

    def delete_state(
        self,
        key: str,
        *,
        session_id: str = "",
        user_id: str = "",
        expected_version: int | None = None,
        durability: str | int = "",
        write_id: str = "",
    ) -> Call[bool]:
        """Delete a blob of a session, or of a user if no session is named; False if there was none."""
        request = state_pb2.DeleteStateRequest(
            scope=_scope(session_id, user_id),
            key=key,
            expected_version=_optional(expected_version, "expected_version"),
            durability=enum(turn_pb2.Durability, durability or 0, "durability"),  # type: ignore[arg-type]
            write_id=write_id or str(uuid.uuid4()),
        )
        return _state_call("DeleteState", request, lambda reply: bool(reply.deleted))

    def list_states_page(
        self,
        *,
        session_id: str = "",
        user_id: str = "",
        key_prefix: str = "",
        page_size: int = 0,
        page_token: str = "",
        accept_missing: int | None = None,
    ) -> Call[state_pb2.ListStatesResponse]:
        """One page of the blobs of a session, or of a user if no session is named, and what may be `missing`.

        accept_missing: go on without the writes of this epoch, and of earlier ones, that may be missing.
        """
        request = state_pb2.ListStatesRequest(
            scope=_scope(session_id, user_id),
            key_prefix=key_prefix,
            page_size=_unsigned(page_size, "page_size"),
            page_token=page_token,
            accept_missing=_optional(accept_missing, "accept_missing", 32),
        )
        return _state_call("ListStates", request, _itself)

    def list_states(
        self, *, session_id: str = "", user_id: str = "", key_prefix: str = "", page_size: int = 0
    ) -> Listing[state_pb2.StateHeader]:
        """The blobs of a session, or of a user if no session is named, by key and without their content."""

        def page(token: str) -> Call[state_pb2.ListStatesResponse]:
            return self.list_states_page(
                session_id=session_id, user_id=user_id, key_prefix=key_prefix, page_size=page_size, page_token=token
            )

        return Listing(page, lambda reply: reply.headers)

    # The node ----------------------------------------------------------------------------------------------------

    def get_status(self) -> Call[admin_pb2.GetStatusResponse]:
        """What the node is doing."""
        return Call("AdminService", "GetStatus", admin_pb2.GetStatusRequest(), "", _itself)

    def flush(self, session_id: str = "") -> Call[admin_pb2.FlushResponse]:
        """Write everything that the cloud tier lacks, of one session or of all, and wait for it."""
        return Call("AdminService", "Flush", admin_pb2.FlushRequest(session_id=session_id), session_id, _itself)

    def release(self, session_ids: Iterable[str]) -> Call[admin_pb2.ReleaseResponse]:
        """Flush and release sessions, so that another node may take them; the reply names those that could not be."""
        return Call("AdminService", "Release", admin_pb2.ReleaseRequest(session_ids=session_ids), "", _itself)


def _batches(turns: Iterable[turn_pb2.TurnInput]) -> list[list[turn_pb2.TurnInput]]:
    """Turns in order, as many to an append as one takes."""
    batches: list[list[turn_pb2.TurnInput]] = []
    size_bytes = 0
    for turn in turns:
        size_bytes += turn.ByteSize()
        if not batches or len(batches[-1]) == RESEND_TURNS_MAX or size_bytes > RESEND_BYTES_MAX:
            batches.append([])
            size_bytes = turn.ByteSize()
        batches[-1].append(turn)
    return batches


def _built(build: Callable[[Any], Call[Reply]], item: Any) -> Call[Reply] | SessiondError:
    try:
        return build(item)
    except SessiondError as error:
        return error


def _session_call(method: str, request: Any, done: Callable[[Any], Reply]) -> Call[Reply]:
    return Call("SessionService", method, request, request.session_id, done)


def _scope(session_id: str, user_id: str) -> state_pb2.StateScope:
    if session_id:
        return state_pb2.StateScope(session_id=session_id, session_user_id=user_id)
    return state_pb2.StateScope(user_id=user_id)


def _state_call(method: str, request: Any, done: Callable[[Any], Reply]) -> Call[Reply]:
    # A user's blobs have one node, as a session has; header values are plain ASCII.
    scope = request.scope
    return Call("StateService", method, request, scope.session_id or f"~user/{quote(scope.user_id)}", done)


def _itself(reply: Any) -> Any:
    return reply


def _position(value: Any, field: str) -> turn_pb2.TurnPosition | None:
    if value is None or isinstance(value, turn_pb2.TurnPosition):
        return value
    if isinstance(value, (AppendResult, Context)):
        return value.head
    if isinstance(value, turn_pb2.Turn):
        return position_of(value)
    epoch, seq = (0, value) if isinstance(value, int) else value
    return turn_pb2.TurnPosition(epoch=_unsigned(epoch, f"{field}.epoch"), seq=_unsigned(seq, f"{field}.seq", 64))


def _since(spec: context_pb2.ContextSpec) -> turn_pb2.TurnPosition | None:
    return spec.since if spec.HasField("since") else None


def _unsigned(value: int, field: str, bits: int = 32) -> int:
    """The number, if a field of so many bits takes it. Raises Invalid INVALID_CONTEXT."""
    if not isinstance(value, int) or not 0 <= value < 1 << bits:
        what = f"{value!r} is no whole number from 0 to {(1 << bits) - 1}"
        raise Invalid("INVALID_CONTEXT", f"{field}: {what}.", fields=[(field, what)])
    return value


def _optional(value: int | None, field: str, bits: int = 64) -> int | None:
    return None if value is None else _unsigned(value, field, bits)


def _short(kind: Any, number: int) -> str:
    return str(kind.Name(number)).rpartition("_")[2] if number in kind.values() else str(number)
