"""Real logs for tests: built with `rules` and `replay`, exactly as an appender builds them.

A `Log` takes actions one after the other; an action that does not fit where the log stands (a result without an open
call, a rewind of an empty log) is made to fit. `random_log` gives a plain seeded log, `logs()` a hypothesis strategy.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgpack
from hypothesis import strategies as st

from sessiond import core
from sessiond.core import rules
from sessiond.core import state as states
from sessiond.core.layout import (
    KIND_MESSAGE,
    KIND_MILESTONE,
    KIND_REWIND,
    KIND_STATE,
    KIND_SUMMARY,
    ROLE_ASSISTANT,
    ROLE_DEVELOPER,
    ROLE_SYSTEM,
    ROLE_TOOL,
    ROLE_USER,
    ROW_BYTES_MAX,
    STATUS_CANCELLED,
    STATUS_COMPLETE,
    STATUS_INTERRUPTED,
    Header,
)
from sessiond.v1 import turn_pb2

HASH_KEY = b"a key of 32 bytes for the tests.."[:32]
HASH = rules.session_hash(HASH_KEY, "default", "s-1")
OTHER_HASH = rules.session_hash(HASH_KEY, "default", "s-2")
START_MS = 1_700_000_000_000

# How many examples a property is tried on; a long run of its own sets more.
EXAMPLES = int(os.environ.get("SESSIOND_EXAMPLES", "250"))

Counts = tuple[int, int, int]
DERIVED_TAG = b"\xda\x01"


class Say(NamedTuple):
    """A message. parts: ("text", text), ("call", id) or ("result", which of the open calls)."""

    role: int
    parts: tuple[tuple[str, Any], ...]
    tokens: Counts
    sources: Counts = (1, 1, 0)
    status: int = 0


class Summarise(NamedTuple):
    """A summary. how: 0 extends the coverage, 1 starts over from 1, 2 leaves a gap, 3 claims another chain."""

    how: int
    reach: int
    tokens: Counts


class Change(NamedTuple):
    """A state change."""

    flags: tuple[tuple[str, bool], ...] = ()
    mode: str | None = None
    metadata: tuple[tuple[str, str], ...] = ()
    removed: tuple[str, ...] = ()
    pins: tuple[tuple[str, str, Counts], ...] = ()
    unpinned: tuple[str, ...] = ()


class Mark(NamedTuple):
    """A milestone."""

    label: str


class Rewind(NamedTuple):
    """A rewind to one of the turns in force; `pick` counts back from the newest."""

    pick: int


class Takeover(NamedTuple):
    """No turn: the epoch goes up."""


Action = Say | Summarise | Change | Mark | Rewind | Takeover


class Log:
    """A session's log in memory. states[n] is the state after turn n, states[0] the one before turn 1."""

    def __init__(self, metadata: dict[str, str] | None = None, cumulative: Counts = (0, 0, 0)) -> None:
        places = states.decode_places(states.genesis(HASH, metadata or {}))
        places[4] = list(cumulative)
        self.frames: list[bytes] = []
        self.headers: list[Header] = []
        self.states: list[bytes] = [states.encode_places(places)]
        self.bodies: list[turn_pb2.Turn] = []
        self.superseded: set[int] = set()
        self.epoch = 1

    @classmethod
    def of(cls, actions: Iterable[Action]) -> Log:
        log = cls({"made": "here"})
        for action in actions:
            log.do(action)
        return log

    @property
    def seq(self) -> int:
        return len(self.frames)

    @property
    def places(self) -> list[Any]:
        return states.decode_places(self.states[-1])

    @property
    def stream(self) -> bytes:
        return b"".join(self.frames)

    def live(self) -> list[Header]:
        """The messages in force, oldest first, by following the links."""
        found, seq = [], self.places[5]
        while seq:
            found.append(self.headers[seq - 1])
            seq = found[-1].prev_live_seq
        return found[::-1]

    def rows(self) -> list[bytes]:
        """The frames packed as the hot tier packs them."""
        rows: list[bytes] = []
        for frame in self.frames:
            if rows and len(rows[-1]) + len(frame) <= ROW_BYTES_MAX:
                rows[-1] += frame
            else:
                rows.append(frame)
        return rows

    def do(self, action: Action) -> None:
        if isinstance(action, Say):
            self._say(action)
        elif isinstance(action, Summarise):
            self._summarise(action)
        elif isinstance(action, Change):
            self._change(action)
        elif isinstance(action, Mark):
            body = turn_pb2.Turn(milestone=turn_pb2.Milestone(label=action.label))
            self._append(KIND_MILESTONE, 0, 0, body, (0, 0, 0), (0, 0, 0), rules.other_flags(KIND_MILESTONE, False))
        elif isinstance(action, Rewind):
            self._rewind(action)
        else:
            self.epoch += 1

    def _append(
        self,
        kind: int,
        role: int,
        status: int,
        body: turn_pb2.Turn,
        tokens: Sequence[int],
        sources: Sequence[int],
        flags: int,
        derived: bytes = b"",
    ) -> None:
        places = self.places
        seq = self.seq + 1
        body.turn_id = f"t-{seq}"
        received = body.SerializeToString(deterministic=True)
        digest = rules.body_digest(HASH_KEY, kind, role, status, received)
        adds = rules.is_live(kind, role)
        cumulative = [total + (own if adds else 0) for total, own in zip(places[4], tokens, strict=True)]
        if derived:
            received += DERIVED_TAG + _varint(len(derived)) + derived
        frame = core.seal_frame(
            HASH,
            seq,
            self.epoch,
            START_MS + 1000 * seq,
            kind,
            role,
            status,
            flags,
            places[5],
            cumulative,
            tokens,
            sources,
            digest,
            rules.next_chain(places[3], digest),
            received,
        )
        self.states.append(core.replay(HASH, self.states[-1], frame))
        self.frames.append(frame)
        self.headers.append(core.read_frame(HASH, frame))
        self.bodies.append(turn_pb2.Turn.FromString(received))

    def _say(self, action: Say) -> None:
        role, places = action.role, self.places
        message = turn_pb2.Message()
        system = role in (ROLE_SYSTEM, ROLE_DEVELOPER)
        still_open = [entry[1] for entry in places[16]]
        # As the service has it: only an assistant calls, only a tool or user answers, a tool does nothing else.
        may_answer = role in (ROLE_TOOL, ROLE_USER)
        answers = may_answer and bool(still_open) and any(what == "result" for what, _ in action.parts)
        if role == ROLE_TOOL and not answers:
            role = ROLE_USER
        if role == ROLE_USER and not answers:
            still_open = []
        events: list[tuple[bool, str]] = []
        for what, value in action.parts:
            if what == "text" or system:
                if role != ROLE_TOOL:
                    message.parts.add(text=str(value))
            elif what == "call" and role == ROLE_ASSISTANT:
                message.parts.add(tool_call=turn_pb2.ToolCall(call_id=value, name="look", arguments="{}"))
                still_open.append(value)
                events.append((False, value))
            elif what == "result" and may_answer and still_open:
                call_id = still_open[value % len(still_open)]
                result = turn_pb2.ToolResult(call_id=call_id)
                if value % 3:
                    result.parts.add(text="found")
                message.parts.add(tool_result=result)
                del still_open[len(still_open) - 1 - still_open[::-1].index(call_id)]
                events.append((True, call_id))
        status = action.status if role == ROLE_ASSISTANT else 0
        flags = rules.message_flags(places, role, status, events)
        body = turn_pb2.Turn(message=message)
        self._append(KIND_MESSAGE, role, status, body, action.tokens, action.sources, flags)

    def _summarise(self, action: Summarise) -> None:
        places = self.places
        if not self.seq:
            return
        covered = places[11][-1][2] if places[11] else 0
        first = (covered + 1, 1, covered + 2, covered + 1)[action.how]
        last = min(first + action.reach, self.seq)
        chain = self.headers[last - 1].chain if last >= 1 else bytes(16)
        claimed = bytes(16) if action.how == 3 else chain
        applies = rules.summary_applies(places, first, last, chain, claimed)
        summary = turn_pb2.Summary(
            text="so far", covered=turn_pb2.SeqRange(first_seq=first, last_seq=last), covered_chain=claimed
        )
        flags = rules.other_flags(KIND_SUMMARY, applies)
        self._append(KIND_SUMMARY, 0, 0, turn_pb2.Turn(summary=summary), action.tokens, (1, 1, 0), flags)

    def _change(self, action: Change) -> None:
        change = turn_pb2.StateChange(
            flags=dict(action.flags),
            mode=action.mode,
            metadata=dict(action.metadata),
            metadata_removed=action.removed,
            pins=[turn_pb2.PinnedFact(key=key, value=value) for key, value, _ in action.pins],
            pins_removed=action.unpinned,
        )
        derived = msgpack.packb({key: list(counts) for key, _, counts in action.pins}) if action.pins else b""
        self._append(KIND_STATE, 0, 0, turn_pb2.Turn(state=change), (0, 0, 0), (0, 0, 0), 0, derived)

    def _rewind(self, action: Rewind) -> None:
        in_force = [seq for seq in range(self.seq, -1, -1) if seq not in self.superseded]
        to_seq = in_force[action.pick % len(in_force)]
        derived = states.restored_bytes(states.decode_places(self.states[to_seq]))
        body = turn_pb2.Turn(rewind=turn_pb2.Rewind(to_seq=to_seq))
        flags = rules.other_flags(KIND_REWIND, False)
        self.superseded |= set(range(to_seq + 1, self.seq + 1))
        self._append(KIND_REWIND, 0, 0, body, (0, 0, 0), (0, 0, 0), flags, derived)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# ---------------------------------------------------------------------------------------------------- plain and seeded


def random_actions(seed: int, turns: int, text_bytes: int = 400) -> Iterable[Action]:
    """A believable conversation: exchanges with parallel tool calls, and now and then everything else.

    text_bytes: the mean length of a message's text. Yields at least `turns` actions that append a turn, and then some.
    """
    rng = random.Random(seed)
    done = 0

    def text() -> tuple[str, str]:
        return "text", "x" * rng.randint(0, 2 * text_bytes)

    def counts() -> Counts:
        own = rng.randint(4, max(8, text_bytes // 2))
        return own, own + rng.randint(0, 3), 0

    yield Say(ROLE_SYSTEM, (text(),), counts())
    while done < turns:
        done += 2
        yield Say(ROLE_USER, (text(),), counts(), (rng.choice((1, 2)), 1, 0))
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            calls = tuple(("call", rng.choice("abc")) for _ in range(rng.randint(1, 3)))
            yield Say(ROLE_ASSISTANT, (text(), *calls), counts())
            if rng.random() < 0.1:
                break  # never answered
            answering = rng.choice((ROLE_TOOL, ROLE_TOOL, ROLE_USER))
            for _ in calls:
                yield Say(answering, (("result", rng.randrange(9)),), counts())
        status = rng.choice((STATUS_COMPLETE,) * 8 + (0, STATUS_INTERRUPTED, STATUS_CANCELLED))
        yield Say(ROLE_ASSISTANT, (text(),), counts(), status=status)
        dice = rng.random()
        if dice < 0.04:
            yield Rewind(rng.randint(0, 8))
        elif dice < 0.08:
            yield Summarise(rng.randrange(4), rng.randint(0, 20), counts())
        elif dice < 0.12:
            # What these pins count by the counting rule: 2 + T(key) + T(value).
            pins = tuple((rng.choice("pqrs"), "a fact", (5, 5, 0)) for _ in range(rng.randint(0, 2)))
            metadata = ((rng.choice("mn"), str(dice)),)
            yield Change(((rng.choice("fg"), rng.random() < 0.6),), rng.choice((None, "", "deep")), metadata, (), pins)
        elif dice < 0.14:
            yield Change(removed=("m",), unpinned=("p",))
        elif dice < 0.16:
            yield Mark("here")
        elif dice < 0.18:
            yield Say(ROLE_DEVELOPER, (text(),), counts())
        elif dice < 0.20:
            yield Takeover()


def build_log(seed: int, turns: int, text_bytes: int = 400) -> Log:
    """A log of exactly so many turns, the same for the same arguments."""
    log = Log({"made": "here"})
    for action in random_actions(seed, turns, text_bytes):
        if log.seq == turns:
            break
        log.do(action)
    return log


def random_log(seed: int, turns: int, text_bytes: int = 400) -> tuple[list[bytes], list[Header], list[bytes]]:
    """(frames, their headers, states): states[n] is the state after turn n, so there is one more of them."""
    log = build_log(seed, turns, text_bytes)
    return log.frames, log.headers, log.states


# ---------------------------------------------------------------------------------------------------------- hypothesis

_COUNT = st.one_of(st.integers(0, 60), st.integers(0, 2**32 - 1))
_COUNTS = st.tuples(_COUNT, _COUNT, st.integers(0, 3))
_SMALL_COUNTS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.just(0))
_SOURCES = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
_NAME = st.sampled_from(("", "a", "b", "c", "é", "𝄞"))
_TEXT = st.one_of(st.text(max_size=8), st.integers(0, 900).map(lambda size: "x" * size))
_PART = st.one_of(
    st.tuples(st.just("text"), _TEXT),
    st.tuples(st.just("call"), _NAME),
    st.tuples(st.just("result"), st.integers(0, 9)),
)
_PARTS = st.lists(_PART, max_size=5).map(tuple)
_ROLE = st.sampled_from((ROLE_USER, ROLE_ASSISTANT, ROLE_ASSISTANT, ROLE_TOOL, ROLE_SYSTEM, ROLE_DEVELOPER))


def actions(counts: st.SearchStrategy[Counts] = _COUNTS, rewinds: bool = True) -> st.SearchStrategy[Action]:
    """Any action; messages are the most frequent."""
    say = st.builds(Say, _ROLE, _PARTS, counts, _SOURCES, st.integers(0, 3))
    change = st.builds(
        Change,
        st.lists(st.tuples(_NAME, st.booleans()), max_size=3).map(tuple),
        st.one_of(st.none(), _NAME),
        st.lists(st.tuples(_NAME, _TEXT), max_size=2).map(tuple),
        st.lists(_NAME, max_size=2).map(tuple),
        st.lists(st.tuples(_NAME, st.text(max_size=5), counts), max_size=3).map(tuple),
        st.lists(_NAME, max_size=2).map(tuple),
    )
    summarise = st.builds(Summarise, st.integers(0, 3), st.integers(0, 9), counts)
    others = [summarise, change, st.builds(Mark, _TEXT), st.just(Takeover())]
    if rewinds:
        others.append(st.builds(Rewind, st.integers(0, 12)))
    return st.one_of(say, say, say, st.one_of(others))


def _lists(action: st.SearchStrategy[Action], low: int, high: int) -> st.SearchStrategy[list[Action]]:
    # Left alone, hypothesis draws lists of about five.
    return st.one_of(
        st.lists(action, min_size=low, max_size=high),
        st.lists(action, min_size=max(low, high * 2 // 3), max_size=high),
    )


def logs(min_turns: int = 0, max_turns: int = 30) -> st.SearchStrategy[Log]:
    """Logs of every kind of turn, with any token counts."""
    return _lists(actions(), min_turns, max_turns).map(Log.of)


def small_logs(max_turns: int = 30, rewinds: bool = True) -> st.SearchStrategy[Log]:
    """Logs whose counts are small enough for budgets to matter."""
    return _lists(actions(_SMALL_COUNTS, rewinds), 0, max_turns).map(Log.of)


@st.composite
def budgets(draw: st.DrawFn, log: Log, slot: int) -> tuple[int, int]:
    """(tail_tokens, tail_tokens_exact) close to where one message more or less fits, or anywhere."""
    totals, total = [0], 0
    for header in reversed(log.live()):
        total += header.tokens[slot]
        totals.append(total)
    near = st.tuples(st.sampled_from(totals), st.integers(-1, 2)).map(lambda pair: max(0, sum(pair)))
    tail, exact = sorted((draw(near), draw(st.one_of(near, st.integers(0, 300)))))
    return tail, draw(st.sampled_from((exact, exact, tail)))
