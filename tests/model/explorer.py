"""Explores every reachable state of a model, breadth first, and finds the shortest way to a broken promise.

It promises that an exploration that ends without a violation has seen every state that the model can reach. It knows
nothing of sessions: a model is an object with the five methods of `Model`.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

# A state's parts are numbered as they are met and packed into one integer, so that a state costs some bytes.
PART_BITS = 24


class Broken(NamedTuple):
    """A promise that a step broke: it stands where the step's next state would."""

    invariant: str
    what: str


class Step(NamedTuple):
    """One step: what happens, whether recovery may rely on it, and what follows."""

    action: tuple[Any, ...]
    recovers: bool
    after: Any


class Model(Protocol):
    """What the explorer asks of a model. A state is a tuple of hashable parts, always as many."""

    def initial(self) -> tuple[Hashable, ...]: ...

    def steps(self, state: Any) -> Iterator[Step]: ...

    def check(self, state: Any) -> Broken | None: ...

    def is_good(self, state: Any) -> bool: ...

    def mirror(self, state: Any) -> tuple[Hashable, ...] | None: ...


@dataclass
class Outcome:
    """What an exploration found. trace: the actions from the initial state to the violation, each with its state."""

    states: int
    steps: int
    depth: int
    is_whole: bool
    broken: Broken | None
    trace: list[tuple[tuple[Any, ...], Any]]


class StatesExhausted(Exception):
    """The model has more states than the limit allows: nothing is proven."""


class _Numbers:
    """Parts of states as small integers, and back."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._parts: list[Hashable] = []

    def pack(self, state: tuple[Hashable, ...]) -> int:
        packed = 0
        for part in state:
            number = self._numbers.get(part)
            if number is None:
                number = len(self._parts)
                if number >> PART_BITS:
                    raise StatesExhausted(f"more than {number} different parts of states")
                self._numbers[part] = number
                self._parts.append(part)
            packed = packed << PART_BITS | number
        return packed

    def unpack(self, packed: int, length: int) -> tuple[Hashable, ...]:
        mask = (1 << PART_BITS) - 1
        return tuple(self._parts[packed >> PART_BITS * at & mask] for at in reversed(range(length)))


def explore(
    model: Model,
    states_max: int,
    recovery: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Visit every state that `model` reaches and check each.

    recovery: the name of the invariant "a good state stays within reach of every state, by steps that recover alone";
    None: not checked. Raises StatesExhausted if there are more than states_max states.
    """
    numbers = _Numbers()
    initial = model.initial()
    length = len(initial)

    def canonical(state: tuple[Hashable, ...]) -> int:
        packed = numbers.pack(state)
        other = model.mirror(state)
        return packed if other is None else min(packed, numbers.pack(other))

    found: dict[int, int] = {canonical(initial): 0}
    queue: list[int] = list(found)
    parents = array("q", [-1])
    sources, targets = array("q"), array("q")
    good = bytearray([model.is_good(initial)])
    steps = depth = 0
    level_ends = 1
    at = 0

    def way_to(index: int) -> list[int]:
        way = []
        while index >= 0:
            way.append(queue[index])
            index = parents[index]
        return way[::-1]

    def outcome(broken: Broken | None, way: list[int], is_whole: bool) -> Outcome:
        trace = _replay(model, initial, way, canonical, broken) if broken is not None else []
        return Outcome(len(queue), steps, depth, is_whole, broken, trace)

    broken = model.check(initial)
    if broken is not None:
        return outcome(broken, way_to(0), False)
    while at < len(queue):
        if at == level_ends:
            depth += 1
            level_ends = len(queue)
            if progress is not None:
                progress(depth, len(queue))
        state = numbers.unpack(queue[at], length)
        for step in model.steps(state):
            steps += 1
            if isinstance(step.after, Broken):
                return outcome(step.after, way_to(at), False)
            packed = canonical(step.after)
            index = found.get(packed)
            if index is None:
                index = len(queue)
                if index >= states_max:
                    raise StatesExhausted(f"more than {states_max} states")
                found[packed] = index
                queue.append(packed)
                parents.append(at)
                broken = model.check(step.after)
                if broken is not None:
                    return outcome(broken, way_to(index), False)
                good.append(model.is_good(step.after))
            if recovery is not None and step.recovers and index != at:
                sources.append(at)
                targets.append(index)
        at += 1
    if recovery is not None:
        stuck = _first_stuck(good, sources, targets)
        if stuck is not None:
            what = "no sequence of steps without a further fault leads to a state in which the session is writable"
            return outcome(Broken(recovery, what), way_to(stuck), True)
    return outcome(None, [], True)


def _first_stuck(good: bytearray, sources: array[int], targets: array[int]) -> int | None:
    """The earliest state from which no good one can be reached, walking the edges backwards from the good ones."""
    count = len(good)
    starts = array("q", bytes(8 * (count + 1)))
    for target in targets:
        starts[target + 1] += 1
    for index in range(count):
        starts[index + 1] += starts[index]
    filled = array("q", starts)
    before = array("q", bytes(8 * len(targets)))
    for source, target in zip(sources, targets, strict=True):
        before[filled[target]] = source
        filled[target] += 1
    reached = bytearray(good)
    pending = [index for index in range(count) if good[index]]
    while pending:
        index = pending.pop()
        for edge in range(starts[index], starts[index + 1]):
            source = before[edge]
            if not reached[source]:
                reached[source] = 1
                pending.append(source)
    stuck = reached.find(0)
    return None if stuck < 0 else stuck


def _replay(
    model: Model,
    initial: tuple[Hashable, ...],
    way: list[int],
    canonical: Callable[[tuple[Hashable, ...]], int],
    broken: Broken | None,
) -> list[tuple[tuple[Any, ...], Any]]:
    """The actions along a way of canonical states, with every node under its own name from end to end."""
    state: Any = initial
    trace: list[tuple[tuple[Any, ...], Any]] = [(("start",), initial)]
    for packed in way[1:]:
        for step in model.steps(state):
            if not isinstance(step.after, Broken) and canonical(step.after) == packed:
                state = step.after
                trace.append((step.action, state))
                break
        else:
            raise AssertionError("the model is not deterministic: a step that was found is not found again")
    # If it was a step that broke the promise, it is the last line.
    if model.check(state) is None:
        for step in model.steps(state):
            if isinstance(step.after, Broken) and broken is not None and step.after.invariant == broken.invariant:
                trace.append((step.action, step.after))
                break
    return trace
