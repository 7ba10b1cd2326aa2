"""What is said in the sessions that the cases use: turns of 800 bytes, the same on every run.

It never counts tokens where the case is not about counting: such turns come with their counts.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bench.wire import TIMEOUT_S, Client
from sessiond.v1 import session_pb2, turn_pb2

TURN_BYTES = 800
# About what 800 bytes of English take. A divisor of the stride at a budget of 4,000 (1,000 tokens), so that the windows
# of a session of 100 turns and of one of 10,000 start at the same place of a stride and hold equally many turns.
TURN_TOKENS = 200
TURNS_PER_CALL = 200
ENCODINGS = (turn_pb2.ENCODING_O200K_BASE, turn_pb2.ENCODING_CL100K_BASE)

_TALK = (
    "the reservation of my flight to was and I would like you change it because there is no seat left on that day can "
    "please confirm whether a refund applies baggage allowance two checked bags passenger certificate economy upgrade "
    "business cabin connecting airport departure arrival insurance payment card ending in membership gold silver user "
    "policy does not allow this unless within twenty-four hours after booking certainly I have updated your itinerary "
    "total cost difference will be charged anything else today thank you very much have safe trip"
)
_WORDS = _TALK.split()


def text(number: int, size_bytes: int = TURN_BYTES) -> str:
    """English of exactly so many bytes; the same number gives the same text."""
    rng = random.Random(number)
    words: list[str] = []
    length = 0
    while length <= size_bytes:
        word = rng.choice(_WORDS) if rng.random() > 0.04 else f"{rng.randrange(100, 99999)}."
        words.append(word)
        length += len(word) + 1
    return " ".join(words)[:size_bytes]


def turn(number: int, supplied: bool = True, turn_bytes: int = TURN_BYTES) -> turn_pb2.TurnInput:
    """Turn `number` of a session, from 1: odd ones the user's, even ones the assistant's. supplied: with its counts."""
    made = turn_pb2.TurnInput(
        turn_id=f"turn-{number:012d}", role=turn_pb2.ROLE_USER if number % 2 else turn_pb2.ROLE_ASSISTANT
    )
    made.message.parts.add(text=text(number % 97, turn_bytes))
    for encoding in ENCODINGS if supplied else ():
        made.supplied_tokens.add(encoding=encoding, tokens=TURN_TOKENS)
    return made


def calls(session_id: str, turns: int) -> Iterator[session_pb2.AppendTurnRequest]:
    """The appends that make a session of so many turns."""
    for first in range(1, turns + 1, TURNS_PER_CALL):
        numbers = range(first, min(first + TURNS_PER_CALL, turns + 1))
        yield session_pb2.AppendTurnRequest(session_id=session_id, turns=[turn(number) for number in numbers])


def make_session(client: Client, session_id: str, turns: int) -> None:
    """Create a session of so many turns."""
    client.sessions.CreateSession(session_pb2.CreateSessionRequest(session_id=session_id), timeout=TIMEOUT_S)
    for request in calls(session_id, turns):
        client.sessions.AppendTurn(request, timeout=TIMEOUT_S)


def make_sessions(client: Client, names: list[str], turns: int, callers: int = 32) -> None:
    """Create many sessions of so many turns each, by several callers at once."""
    with ThreadPoolExecutor(callers) as pool:
        for done in pool.map(lambda name: make_session(client, name, turns), names):
            assert done is None
