"""What a session's log means, by plain lists and tiktoken: the third opinion beside the two twins of the core.

It imports nothing of sessiond but the generated messages, and never aims at speed: every answer is worked out from the
whole log, by the words of the contract.

A turn is a dict:

    seq, kind               "message", "summary", "state", "milestone" or "rewind"
    chain                   bytes; only needed where a summary names the turn
    role, name, parts       of a message; roles as "user", "assistant", "tool", "system", "developer"
    supplied                {encoding: tokens} that stand in place of the turn's count; optional everywhere
    text, first, last, covered_chain                                         of a summary
    flags, mode, metadata, metadata_removed, pins {key: value}, pins_removed of a state change; mode None leaves it
    label                                                                    of a milestone
    to_seq                                                                   of a rewind

A part is a dict of kind and fields: text or refusal (text), tool_call (call_id, name, arguments), tool_result (call_id,
parts), attachment (tokens, alt_text), opaque (data, tokens).
"""

from __future__ import annotations

import base64
import copy
import functools
import itertools
import zlib
from pathlib import Path
from typing import Any

import tiktoken
import tiktoken_ext.openai_public as published

from sessiond.v1 import turn_pb2

REPOSITORY = Path(__file__).resolve().parents[1]
RAW_VOCABULARIES = REPOSITORY.parent / "shared" / "data" / "vocab"
PACKED_VOCABULARIES = REPOSITORY / "src" / "sessiond" / "tokens" / "vocab"
ENCODINGS = {1: "o200k_base", 2: "cl100k_base"}
SIZES = {"o200k_base": 199_998, "cl100k_base": 100_256}

Turn = dict[str, Any]


# --- counting


def _ranks(name: str) -> dict[bytes, int]:
    raw = RAW_VOCABULARIES / f"{name}.tiktoken"
    if raw.exists():
        lines = [line.split() for line in raw.read_bytes().splitlines()]
        return {base64.b64decode(token): int(rank) for token, rank in lines}
    content = zlib.decompress((PACKED_VOCABULARIES / f"{name}.vocab").read_bytes())
    ranks: dict[bytes, int] = {}
    at = SIZES[name]
    for rank in range(SIZES[name]):
        ranks[content[at : at + content[rank]]] = rank
        at += content[rank]
    return ranks


@functools.cache
def _encoding(number: int) -> tiktoken.Encoding:
    name = ENCODINGS[number]
    download = published.load_tiktoken_bpe
    published.load_tiktoken_bpe = lambda *_, **__: _ranks(name)
    try:
        constructor = published.ENCODING_CONSTRUCTORS[name]()
    finally:
        published.load_tiktoken_bpe = download
    return tiktoken.Encoding(**constructor)


@functools.lru_cache(maxsize=100_000)
def text_tokens(text: str, encoding: int = 1) -> int:
    """T(text)."""
    return len(_encoding(encoding).encode_ordinary(text))


def part_tokens(part: dict[str, Any], encoding: int = 1) -> int:
    """The row of the counting rule that is the part's."""
    kind = part["kind"]
    if kind in ("text", "refusal"):
        return text_tokens(part["text"], encoding)
    if kind == "tool_call":
        return 3 + text_tokens(part["name"], encoding) + text_tokens(part["arguments"], encoding)
    if kind == "tool_result":
        return sum(part_tokens(inner, encoding) for inner in part["parts"])
    if kind == "attachment":
        return int(part["tokens"]) + text_tokens(part["alt_text"], encoding)
    if kind != "opaque":
        raise ValueError(f"no such part: {kind}")
    if part["tokens"] > 0:
        return int(part["tokens"])
    try:
        return text_tokens(part["data"].decode("utf-8"), encoding)
    except UnicodeDecodeError:
        return (len(part["data"]) + 2) // 3


def message_tokens(message: dict[str, Any], encoding: int = 1) -> int:
    """The tokens of {"name", "parts"}; both may be left out."""
    tokens = 4
    if message.get("name"):
        tokens += 1 + text_tokens(message["name"], encoding)
    return tokens + sum(part_tokens(part, encoding) for part in message.get("parts", []))


def turn_tokens(turn: Turn, encoding: int = 1) -> int:
    """The tokens of a message or a summary; 0 for any other turn."""
    if encoding in turn.get("supplied", {}):
        return int(turn["supplied"][encoding])
    if turn["kind"] == "message":
        return message_tokens(turn, encoding)
    if turn["kind"] == "summary":
        return 4 + text_tokens(turn["text"], encoding)
    return 0


# --- what kind of turn it is


def is_conversation(turn: Turn) -> bool:
    """Whether the turn is a user, assistant or tool message."""
    return turn["kind"] == "message" and turn["role"] in ("user", "assistant", "tool")


def has_results(turn: Turn) -> bool:
    """Whether a message answers a tool call."""
    return any(part["kind"] == "tool_result" for part in turn["parts"])


def starts_exchange(turn: Turn) -> bool:
    """Whether the turn is a user message that answers no tool call."""
    return is_conversation(turn) and turn["role"] == "user" and not has_results(turn)


def walk_calls(live: list[Turn]) -> tuple[list[list[str]], list[tuple[int, int]], list[int], list[str]]:
    """Follow the calls through live messages.

    Returns the ids that are open before each message, (call's seq, result's seq) of each pair, the seqs of messages
    with a result that answers nothing, and the ids that are open at the end.
    """
    open_calls: list[tuple[str, int]] = []
    before: list[list[str]] = []
    pairs: list[tuple[int, int]] = []
    orphans: list[int] = []
    for turn in live:
        before.append([call_id for call_id, _ in open_calls])
        if starts_exchange(turn):
            open_calls = []
        for part in turn["parts"]:
            if part["kind"] == "tool_call":
                open_calls.append((part["call_id"], turn["seq"]))
            elif part["kind"] == "tool_result":
                same_id = [at for at, (call_id, _) in enumerate(open_calls) if call_id == part["call_id"]]
                if same_id:
                    pairs.append((open_calls.pop(same_id[-1])[1], turn["seq"]))
                else:
                    orphans.append(turn["seq"])
    return before, pairs, orphans, [call_id for call_id, _ in open_calls]


# --- the log


class Oracle:
    """One session's log. turns: dicts in seq order from 1 without a gap. metadata: as the session was created."""

    def __init__(self, turns: list[Turn], metadata: dict[str, str] | None = None) -> None:
        if [turn["seq"] for turn in turns] != list(range(1, len(turns) + 1)):
            raise ValueError("the log has a gap")
        self.turns = turns
        # after[n]: the state after turn n; after[0]: before the first.
        self.after: list[dict[str, Any]] = [
            {
                "instructions_seq": 0,
                # The summaries in effect: their seqs, and the turns 1..last that they cover together.
                "summary_seqs": [],
                "covered_last": 0,
                "pins": {},
                "flags": {},
                "mode": "",
                "metadata": dict(metadata or {}),
                "milestone": "",
                "state_seq": 0,
            }
        ]
        for turn in turns:
            self.after.append(self._next(turn))

    def _next(self, turn: Turn) -> dict[str, Any]:
        state = copy.deepcopy(self.after[-1])
        kind = turn["kind"]
        if kind == "rewind":
            state = copy.deepcopy(self.after[turn["to_seq"]])
            state["state_seq"] = turn["seq"]
        elif kind == "message" and turn["role"] in ("system", "developer"):
            state["instructions_seq"] = turn["seq"]
        elif kind == "summary" and self._applies(turn, state):
            state["summary_seqs"] = [] if turn["first"] == 1 else state["summary_seqs"]
            state["summary_seqs"].append(turn["seq"])
            state["covered_last"] = turn["last"]
        elif kind == "milestone":
            state["milestone"] = turn["label"]
        elif kind == "state":
            for name, value in turn.get("flags", {}).items():
                if value:
                    state["flags"][name] = True
                else:
                    state["flags"].pop(name, None)
            if turn.get("mode") is not None:
                state["mode"] = turn["mode"]
            for of, removed in (("metadata", "metadata_removed"), ("pins", "pins_removed")):
                state[of].update(turn.get(of, {}))
                for name in turn.get(removed, []):
                    state[of].pop(name, None)
            state["state_seq"] = turn["seq"]
        return state

    def _applies(self, summary: Turn, state: dict[str, Any]) -> bool:
        first, last = summary["first"], summary["last"]
        if not 1 <= first <= last < summary["seq"]:
            return False
        extends = first == state["covered_last"] + 1 and (first == 1 or len(state["summary_seqs"]) < 32)
        replaces = first == 1 and last > state["covered_last"]
        return (
            (extends or replaces)
            and last in self.in_force(summary["seq"] - 1)
            and summary["covered_chain"] == self.turns[last - 1]["chain"]
        )

    def in_force(self, at_seq: int) -> list[int]:
        """The seqs of the turns that stand after turn `at_seq`: no rewind up to there superseded them."""
        standing: list[int] = []
        seq = at_seq
        while seq > 0:
            standing.append(seq)
            turn = self.turns[seq - 1]
            seq = turn["to_seq"] if turn["kind"] == "rewind" else seq - 1
        return standing[::-1]

    @functools.cached_property
    def live(self) -> list[Turn]:
        """The messages that a window may hold, oldest first."""
        standing = [self.turns[seq - 1] for seq in self.in_force(len(self.turns))]
        return [turn for turn in standing if is_conversation(turn)]

    def cumulative(self, encoding: int = 1) -> list[int]:
        """At n: the tokens of all user, assistant and tool messages up to turn n, superseded ones included."""
        counts = (turn_tokens(turn, encoding) if is_conversation(turn) else 0 for turn in self.turns)
        return list(itertools.accumulate(counts, initial=0))

    @functools.cached_property
    def cuts(self) -> list[int]:
        """The seqs of the live messages that a window may start with."""
        return [
            turn["seq"]
            for turn, open_before in zip(self.live, walk_calls(self.live)[0], strict=True)
            if starts_exchange(turn) or (turn["role"] == "assistant" and not open_before and not has_results(turn))
        ]

    @functools.cached_property
    def exchange_starts(self) -> list[int]:
        """The seqs of the live user messages that start an exchange."""
        return [turn["seq"] for turn in self.live if starts_exchange(turn)]

    def window(
        self,
        budget: int,
        *,
        reserve: int = 0,
        encoding: int = 1,
        strategy: str = "HYBRID",
        last_exchanges: int = 0,
        instructions: str | None = None,
        new_message: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The window that the contract asks for. strategy: HYBRID, FULL or LAST_N.

        Returns ok True with start_seq (0 where it is empty), seqs, tail_tokens, total_tokens and the other parts'
        tokens, summary_seqs (empty where they are not shown), stride (whether it starts at a stride's cut) and
        transcript_tokens; or ok False with minimum_budget_tokens.
        """
        state = self.after[-1]
        instructions_tokens = 0
        if instructions is not None:
            instructions_tokens = 4 + text_tokens(instructions, encoding)
        elif state["instructions_seq"]:
            instructions_tokens = turn_tokens(self.turns[state["instructions_seq"] - 1], encoding)
        pins_tokens = sum(
            2 + text_tokens(key, encoding) + text_tokens(value, encoding) for key, value in state["pins"].items()
        )
        summary_seqs = state["summary_seqs"] if strategy == "HYBRID" else []
        summary_tokens = sum(turn_tokens(self.turns[seq - 1], encoding) for seq in summary_seqs)
        new_tokens = 0 if new_message is None else message_tokens(new_message, encoding)
        spendable = budget - reserve
        fixed = 3 + instructions_tokens + pins_tokens + summary_tokens
        room = spendable - fixed - new_tokens

        live, cuts = self.live, self.cuts
        tokens = {turn["seq"]: turn_tokens(turn, encoding) for turn in live}
        suffix: dict[int, int] = {}
        tail = 0
        for seq in sorted(tokens, reverse=True):
            tail += tokens[seq]
            suffix[seq] = tail
        start, stride = self._start(
            strategy, spendable, fixed, new_tokens, room, cuts, suffix, last_exchanges, encoding
        )
        if start is None:
            needed = suffix[cuts[-1]] if cuts else 0
            return {"ok": False, "minimum_budget_tokens": reserve + fixed + new_tokens + needed}
        seqs = [turn["seq"] for turn in live if start and turn["seq"] >= start]
        shown = bool(summary_seqs) and bool(live) and start > live[0]["seq"]
        tail = suffix[start] if start else 0
        return {
            "ok": True,
            "start_seq": start,
            "seqs": seqs,
            "stride": stride,
            "instructions_tokens": instructions_tokens,
            "pins_tokens": pins_tokens,
            "summary_tokens": summary_tokens if shown else 0,
            "summary_seqs": summary_seqs if shown else [],
            "new_tokens": new_tokens,
            "tail_tokens": tail,
            "total_tokens": fixed - (0 if shown else summary_tokens) + new_tokens + tail,
            "transcript_tokens": sum(tokens.values()),
        }

    def _start(
        self,
        strategy: str,
        spendable: int,
        fixed: int,
        new_tokens: int,
        room: int,
        cuts: list[int],
        suffix: dict[int, int],
        last_exchanges: int,
        encoding: int,
    ) -> tuple[int | None, bool]:
        """Where the window starts (0: empty, None: nowhere) and whether that is a stride's cut."""
        if not cuts:
            return (0 if room >= 0 else None), False
        exchanges = self.exchange_starts
        if strategy == "HYBRID":
            stride_tokens = max(1, spendable // 4)
            steady_room = spendable - fixed - max(new_tokens, spendable // 16)
            newest = exchanges[-1] if exchanges else cuts[0]
            before = None
            cumulative = self.cumulative(encoding)
            for cut in cuts:
                step = cumulative[cut - 1] // stride_tokens
                if (before is None or step > before) and suffix[cut] <= steady_room:
                    if cut <= newest:
                        return cut, True
                    break
                before = step
            earliest = cuts[0]
        elif strategy == "LAST_N":
            if last_exchanges < 1:
                raise ValueError("LAST_N needs last_exchanges")
            earliest = exchanges[-last_exchanges] if len(exchanges) >= last_exchanges else cuts[0]
        elif strategy == "FULL":
            earliest = cuts[0]
        else:
            raise ValueError(f"no oracle for {strategy}")
        return next((cut for cut in cuts if cut >= earliest and suffix[cut] <= room), None), False

    def checkpoint(self, at_seq: int | None = None) -> dict[str, Any]:
        """What a checkpoint after turn `at_seq` (the newest, if not said) must hold."""
        upto = Oracle(self.turns[:at_seq]) if at_seq is not None else self
        state = self.after[at_seq if at_seq is not None else -1]
        live = upto.live
        return {
            "replay_cursor": len(upto.turns),
            "instructions_seq": state["instructions_seq"],
            "summary_seqs": state["summary_seqs"],
            "summarised": (1, state["covered_last"]) if state["covered_last"] else None,
            "tail_first_seq": state["covered_last"] + 1,
            "pins": dict(sorted(state["pins"].items())),
            "flags": dict(sorted(state["flags"].items())),
            "mode": state["mode"],
            "metadata": dict(sorted(state["metadata"].items())),
            "milestone": state["milestone"],
            "state_seq": state["state_seq"],
            "exchanges": len(upto.exchange_starts),
            "live_messages": len(live),
            "live_tokens": {number: sum(turn_tokens(turn, number) for turn in live) for number in ENCODINGS},
            "last_live_seq": live[-1]["seq"] if live else 0,
            "open_calls": walk_calls(live)[3],
        }

    def torn_exchange(self, seqs: list[int]) -> str | None:
        """What is wrong with a choice of live messages: a call without its result, or a result without its call."""
        live = self.live
        alive = {turn["seq"] for turn in live}
        chosen = set(seqs)
        for seq in sorted(chosen - alive):
            return f"turn {seq} is no live message"
        _, pairs, orphans, _ = walk_calls(live)
        for call_seq, result_seq in pairs:
            if call_seq in chosen and result_seq not in chosen:
                return f"the call in turn {call_seq} is without its result in turn {result_seq}"
            if result_seq in chosen and call_seq not in chosen:
                return f"the result in turn {result_seq} is without its call in turn {call_seq}"
        for seq in orphans:
            if seq in chosen:
                return f"the result in turn {seq} answers nothing"
        return None


# --- from what a reply holds

ROLES = {
    turn_pb2.ROLE_SYSTEM: "system",
    turn_pb2.ROLE_USER: "user",
    turn_pb2.ROLE_ASSISTANT: "assistant",
    turn_pb2.ROLE_TOOL: "tool",
    turn_pb2.ROLE_DEVELOPER: "developer",
}
REDACTED = 32


def part_from_proto(part: turn_pb2.Part) -> dict[str, Any]:
    """A part of a reply as a dict."""
    kind = part.WhichOneof("kind")
    if kind in ("text", "refusal"):
        return {"kind": kind, "text": getattr(part, kind)}
    if kind == "tool_call":
        call = part.tool_call
        return {"kind": kind, "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    if kind == "tool_result":
        parts = [part_from_proto(inner) for inner in part.tool_result.parts]
        return {"kind": kind, "call_id": part.tool_result.call_id, "parts": parts}
    if kind == "attachment":
        return {"kind": kind, "tokens": part.attachment.tokens, "alt_text": part.attachment.alt_text}
    if kind == "opaque":
        return {"kind": kind, "tokens": part.opaque.tokens, "data": part.opaque.data}
    raise ValueError("a part holds nothing")


def message_from_proto(message: turn_pb2.Message) -> dict[str, Any]:
    """A message of a reply or a request as a dict of name and parts."""
    return {"name": message.name, "parts": [part_from_proto(part) for part in message.parts]}


def turn_from_proto(turn: turn_pb2.Turn) -> Turn:
    """A turn of a reply as a dict."""
    counts = {1: turn.o200k, 2: turn.cl100k}
    # What a redacted turn said can't be counted again: its stored counts stand.
    believed = {
        number: count.tokens
        for number, count in counts.items()
        if count.source == turn_pb2.TOKEN_SOURCE_SUPPLIED or turn.flags & REDACTED
    }
    base: Turn = {"seq": turn.seq, "chain": turn.chain, "supplied": believed}
    kind = turn.WhichOneof("body")
    if kind == "message":
        return base | {"kind": kind, "role": ROLES[turn.role]} | message_from_proto(turn.message)
    if kind == "summary":
        summary = turn.summary
        return base | {
            "kind": kind,
            "text": summary.text,
            "first": summary.covered.first_seq,
            "last": summary.covered.last_seq,
            "covered_chain": summary.covered_chain,
        }
    if kind == "state":
        change = turn.state
        return base | {
            "kind": kind,
            "flags": dict(change.flags),
            "mode": change.mode if change.HasField("mode") else None,
            "metadata": dict(change.metadata),
            "metadata_removed": list(change.metadata_removed),
            "pins": {pin.key: pin.value for pin in change.pins},
            "pins_removed": list(change.pins_removed),
        }
    if kind == "milestone":
        return base | {"kind": kind, "label": turn.milestone.label}
    if kind == "rewind":
        return base | {"kind": kind, "to_seq": turn.rewind.to_seq}
    raise ValueError(f"turn {turn.seq} holds nothing")


def from_turn_protos(turns: list[turn_pb2.Turn], metadata: dict[str, str] | None = None) -> Oracle:
    """The oracle of a whole log, as ListTurns gives it."""
    return Oracle([turn_from_proto(turn) for turn in turns], metadata)
