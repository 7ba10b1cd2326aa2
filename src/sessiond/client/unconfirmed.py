"""Turns that the daemon acknowledged and the cloud tier has not: kept, so that they can be sent again after a loss.

It promises to keep all that a session has above cloud_seq or nothing: a gap would put later turns in the wrong place.
Where other clients write the same session, or a limit is reached, it keeps nothing until the cloud tier has caught up.
It sends nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from sessiond.v1 import context_pb2, session_pb2, turn_pb2

# As far back as the daemon recognises a turn_id without `expected`.
TURNS_MAX: Final = 1024
SESSIONS_MAX: Final = 10_000
BYTES_MAX: Final = 64 * 1024**2


@dataclass(slots=True)
class _Turn:
    at: turn_pb2.TurnPosition
    turn: turn_pb2.TurnInput
    size_bytes: int


@dataclass(slots=True)
class _Session:
    """turns: in order of epoch and seq. acked: the newest position that was acknowledged."""

    acked: turn_pb2.TurnPosition = field(default_factory=turn_pb2.TurnPosition)
    turns: list[_Turn] = field(default_factory=list)
    size_bytes: int = 0


class Unconfirmed:
    """What one client keeps, over all its sessions; the sessions used longest ago give way first. Thread-safe."""

    def __init__(
        self, turns_max: int = TURNS_MAX, sessions_max: int = SESSIONS_MAX, bytes_max: int = BYTES_MAX
    ) -> None:
        self._turns_max = turns_max
        self._sessions_max = sessions_max
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()
        self._size_bytes = 0

    def acknowledged(
        self,
        session_id: str,
        turns: Iterable[tuple[turn_pb2.TurnInput, session_pb2.AppendedTurn]],
        epoch: int,
        cloud_seq: int,
        missing: Iterable[context_pb2.MissingRange],
    ) -> None:
        """Turns were acknowledged while the session was at this epoch, with this much in the cloud tier."""
        with self._lock:
            session = self._sessions.setdefault(session_id, _Session())
            self._sessions.move_to_end(session_id)
            kept = {turn.turn.turn_id: turn for turn in session.turns}
            for turn, placed in turns:
                kept[turn.turn_id] = _Turn(placed.position, turn, turn.ByteSize())
                session.acked = max(session.acked, placed.position, key=_order)
            # Of an earlier owner's turns, those that may be missing; the others were flushed when it let go.
            lost = [(gap.epoch, gap.first_seq) for gap in missing]
            earlier = [
                turn
                for turn in kept.values()
                if turn.at.epoch != epoch and any(turn.at.epoch == of and turn.at.seq >= first for of, first in lost)
            ]
            present = [turn for turn in kept.values() if turn.at.epoch == epoch and turn.at.seq > cloud_seq]
            present.sort(key=lambda turn: turn.at.seq)
            if [turn.at.seq for turn in present] != list(range(cloud_seq + 1, cloud_seq + 1 + len(present))):
                present = []
            session.turns = sorted(earlier + present, key=lambda turn: _order(turn.at))
            if len(session.turns) > self._turns_max:
                session.turns = []
            self._size_bytes -= session.size_bytes
            session.size_bytes = sum(turn.size_bytes for turn in session.turns)
            self._size_bytes += session.size_bytes
            while len(self._sessions) > self._sessions_max or self._size_bytes > self._bytes_max:
                _, oldest = self._sessions.popitem(last=False)
                self._size_bytes -= oldest.size_bytes

    def kept(self, session_id: str) -> tuple[list[turn_pb2.TurnInput], turn_pb2.TurnPosition]:
        """(turns to append again, in order; the newest position that the owner who may have lost them acknowledged)."""
        with self._lock:
            session = self._sessions.get(session_id) or _Session()
            owner = [turn.at for turn in session.turns if turn.at.epoch == session.turns[0].at.epoch]
            return [turn.turn for turn in session.turns], owner[-1] if owner else session.acked


def _order(position: turn_pb2.TurnPosition) -> tuple[int, int]:
    return position.epoch, position.seq
