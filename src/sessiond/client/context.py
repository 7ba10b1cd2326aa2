"""An active context as a gateway uses it: what to send to the model, and what is missing from it.

It never hides what the receipt says, and never shows an incomplete window: a reply that repeats only what is new must
be merged with the context that it builds on before it is rendered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sessiond.client.formats import anthropic, openai
from sessiond.errors import Invalid
from sessiond.v1 import context_pb2, turn_pb2

# What a receipt says of a window; a reply that nothing changed leaves these out.
_OF_THE_WINDOW: Final = ("verbatim", "summarised", "recalled", "omitted", "breakpoints")


class Context:
    """One ActiveContext. `proto` is all of it; `since` is what it was asked with."""

    __slots__ = ("proto", "since")

    def __init__(self, proto: context_pb2.ActiveContext, since: turn_pb2.TurnPosition | None = None) -> None:
        self.proto = proto
        self.since = since

    def __repr__(self) -> str:
        what = "not modified" if self.not_modified else f"{len(self.turns)} turns, {self.tokens.total} tokens"
        return f"<Context {self.rung}: {what}>"

    @property
    def turns(self) -> Sequence[turn_pb2.Turn]:
        """The tail, oldest first."""
        return self.proto.turns

    @property
    def tokens(self) -> context_pb2.ContextTokens:
        """Tokens part by part; `.tokens.total` is their sum, `.tokens.transcript` the whole conversation's."""
        return self.proto.tokens

    @property
    def rung(self) -> str:
        """HOT, CLOUD, PARTIAL or RESET: the step of the degradation ladder that it was served from."""
        return _name(context_pb2.Rung, self.proto.receipt.rung, "RUNG_")

    @property
    def ownership(self) -> str:
        """CONFIRMED or UNCONFIRMED."""
        return _name(context_pb2.Ownership, self.proto.receipt.ownership, "OWNERSHIP_")

    @property
    def missing(self) -> Sequence[context_pb2.MissingRange]:
        """Turns that are, or may be, missing; empty if the conversation is whole."""
        return self.proto.receipt.missing

    @property
    def notice(self) -> str:
        """A sentence fit for the user where something is missing; else empty."""
        return self.proto.receipt.notice

    @property
    def etag(self) -> str:
        """Send it as context_etag to learn cheaply that nothing changed."""
        return self.proto.context_etag

    @property
    def head(self) -> turn_pb2.TurnPosition:
        """The log's newest turn."""
        return self.proto.receipt.head

    @property
    def last_position(self) -> turn_pb2.TurnPosition | None:
        """The last of `turns`, with its chain; give it as `since` of the next resume. None without turns."""
        return position_of(self.turns[-1]) if self.turns else None

    @property
    def cloud_seq(self) -> int:
        """The highest seq that the cloud tier has committed."""
        return self.proto.receipt.cloud_seq

    @property
    def not_modified(self) -> bool:
        """The context that context_etag named is still right, and none of it is repeated; see `merge`."""
        return self.proto.not_modified

    @property
    def delta(self) -> bool:
        """Only turns after `since` are repeated; see `merge`."""
        return self.proto.delta

    def merge(self, previous: Context) -> Context:
        """The whole context, from this reply and the context that it builds on; a whole reply comes back as it is.

        A reply to `since` is whole where the log has another turn there by now. Raises Invalid INVALID_CONTEXT where
        `previous` is not the context that this one builds on: resume again without context_etag and since.
        """
        if not self.not_modified and not self.delta:
            return self
        if previous.not_modified or previous.delta:
            raise _unmergeable("the previous context is itself only part of one; merge it first")
        return self._unchanged(previous) if self.not_modified else self._extended(previous)

    def to_openai(self, *, close_unanswered: str | None = None) -> list[dict[str, Any]]:
        """The messages of an OpenAI chat completion, most stable first.

        close_unanswered: text of a result for each call that was never answered, which OpenAI would refuse.
        """
        self._check_whole()
        return openai.context_to_messages(self.proto, close_unanswered=close_unanswered)

    def to_anthropic(self, *, close_unanswered: str | None = None) -> dict[str, Any]:
        """The `system` and `messages` of a request to Anthropic, as {"system": ..., "messages": ...}.

        close_unanswered: text of a result for each call that was never answered, which Anthropic would refuse.
        """
        self._check_whole()
        return anthropic.context_to_anthropic(self.proto, close_unanswered=close_unanswered)

    def _check_whole(self) -> None:
        if self.not_modified or self.delta:
            raise _unmergeable("it holds only what is new; call merge(previous) first")

    def _unchanged(self, previous: Context) -> Context:
        if self.etag != previous.etag:
            raise _unmergeable("the previous context is not the one that context_etag named")
        whole = context_pb2.ActiveContext()
        whole.CopyFrom(previous.proto)
        whole.receipt.CopyFrom(self.proto.receipt)
        for name in _OF_THE_WINDOW:
            field = getattr(whole.receipt, name)
            if not field:
                field.extend(getattr(previous.proto.receipt, name))
        if previous.proto.receipt.HasField("stable_prefix"):
            whole.receipt.stable_prefix.CopyFrom(previous.proto.receipt.stable_prefix)
        if previous.proto.receipt.HasField("summary_due"):
            whole.receipt.summary_due.CopyFrom(previous.proto.receipt.summary_due)
        return Context(whole)

    def _extended(self, previous: Context) -> Context:
        window = self.proto.window
        repeated = {turn.seq: turn for turn in self.turns}
        held = {turn.seq: turn for turn in previous.turns if turn.seq not in repeated}
        proven_seq = self._proven_seq(previous)
        # Each message names the live one before it, so that what a rewind superseded falls out.
        turns: list[turn_pb2.Turn] = []
        seq = window.last_seq
        while seq and seq >= window.first_seq:
            turn = repeated.get(seq) or held.get(seq)
            if turn is None:
                raise _unmergeable(f"turn {seq} of the window is in neither context")
            if seq in held and seq > max(previous.cloud_seq, proven_seq) and previous.head.epoch != self.head.epoch:
                # It was provisional, and its place may be another turn's by now.
                raise _unmergeable(f"the session changed hands, and turn {seq} may be another one now")
            turns.append(turn)
            seq = turn.prev_live_seq
        whole = context_pb2.ActiveContext()
        whole.CopyFrom(self.proto)
        del whole.turns[:]
        whole.turns.extend(reversed(turns))
        whole.delta = False
        return Context(whole)

    def _proven_seq(self, previous: Context) -> int:
        """Up to where the log holds the turns of `previous`: it had the chain that `since` named, and so has that."""
        since = self.since
        if since is None or not since.chain:
            return 0
        return since.seq if any((turn.seq, turn.chain) == (since.seq, since.chain) for turn in previous.turns) else 0


def position_of(turn: turn_pb2.Turn) -> turn_pb2.TurnPosition:
    """Where a turn stands, with the chain that proves it."""
    return turn_pb2.TurnPosition(epoch=turn.epoch, seq=turn.seq, chain=turn.chain)


def _name(kind: Any, number: int, prefix: str) -> str:
    """An enum value's name without its prefix; the number where a newer daemon sent one that has no name here."""
    return str(kind.Name(number)).removeprefix(prefix) if number in kind.values() else str(number)


def _unmergeable(what: str) -> Invalid:
    return Invalid("INVALID_CONTEXT", f"The context can't be used: {what}.", remedy="Resume again for the whole of it.")
