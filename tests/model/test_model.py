"""The ownership protocol keeps its invariants in every state that it can reach, and each of its rules is needed."""

import pytest

from tests.model.__main__ import told
from tests.model.explorer import Broken, StatesExhausted, Step, explore
from tests.model.protocol import SWITCHES, Bounds, Rules, Sessions

REACHABLE = "I15"

# What happens in one exploration, and how many states that is. A change of the model that makes it smaller shows here.
IN_CI = [
    (Bounds("EC", lapses=1, timeouts=1), 30_387),
    (Bounds("EC", lapses=2), 155_885),
    (Bounds("EC", lapses=1, crashes=1), 174_338),
    (Bounds("EC", lapses=1, disks=1), 114_418),
    (Bounds("CC", lapses=1, disks=1), 13_846),
    (Bounds("EC", crashes=1, disks=1), 41_462),
    (Bounds("EC", timeouts=1, releases=2), 7_365),
]
IN_TORTURE = [
    (Bounds("EC", lapses=1, timeouts=1, releases=1), 438_328),
    (Bounds("EC", lapses=1, disks=1, timeouts=1), 391_552),
    (Bounds("EC", lapses=1, crashes=1, timeouts=1), 556_627),
]
STATES_MAX = 20_000_000

# The rule that is broken, how little has to happen for it to show, and the invariant that names it.
ZOMBIE = Bounds("EC", lapses=1)
MUTANTS = {
    "reply_ignores_restart_of_lease": (ZOMBIE, "I8"),
    "touch_is_a_read": (ZOMBIE, "I5"),
    "touch_counts_across_a_fence": (Bounds("E", lapses=2, timeouts=1), "I5"),
    "fence_skipped": (ZOMBIE, "I5"),
    "fence_unconditional": (ZOMBIE, "I5"),
    "lease_read_before_manifest": (ZOMBIE, "I5"),
    "epoch_not_raised": (ZOMBIE, "I5"),
    "loss_row_forgotten": (ZOMBIE, "I9"),
    "claim_settles_owned_across_a_fence": (ZOMBIE, "I5"),
    "claim_begins_before_the_lease_is_back": (ZOMBIE, "I5"),
    "claim_goes_on_from_what_it_read_before_a_fence": (Bounds("E", lapses=1, timeouts=1), "I5"),
    "lease_taken_before_doubt": (ZOMBIE, "I5"),
    "restart_believes_rows": (Bounds("E", crashes=1), "I5"),
    "ack_before_commit": (ZOMBIE, "I1"),
    "dedupe_outside_transaction": (ZOMBIE, "I3"),
    "release_lets_appends_in": (Bounds("EE", timeouts=1, releases=1), "I9"),
    "release_taken_back_when_unknown": (Bounds("EE", timeouts=1, releases=1), "I9"),
    "rows_dropped_after_unknown_release": (Bounds("EE", timeouts=1, releases=1), "I1"),
    "cloud_ack_on_ambiguous": (Bounds("CE", lapses=1, timeouts=1), "I2"),
    "flush_unconditional": (ZOMBIE, "I6"),
    "rescue_after_an_append": (ZOMBIE, "I8"),
    "rescue_clears_loss_when_listed": (ZOMBIE, "I9"),
    "rescue_drops_rows_on_answer": (ZOMBIE, "I10"),
}


def check_whole(bounds, states):
    outcome = explore(Sessions(bounds), STATES_MAX, recovery=REACHABLE)
    assert outcome.broken is None, told(outcome)
    assert outcome.is_whole
    assert outcome.states == states


@pytest.mark.parametrize(("bounds", "states"), IN_CI, ids=[str(bounds) for bounds, _ in IN_CI])
def test_every_reachable_state_keeps_the_invariants(bounds, states):
    check_whole(bounds, states)


@pytest.mark.torture
@pytest.mark.parametrize(("bounds", "states"), IN_TORTURE, ids=[str(bounds) for bounds, _ in IN_TORTURE])
def test_every_reachable_state_of_the_larger_models_keeps_the_invariants(bounds, states):
    check_whole(bounds, states)


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_rule_is_needed(switch):
    bounds, invariant = MUTANTS[switch]
    outcome = explore(Sessions(bounds, Rules(**{switch: True})), STATES_MAX, recovery=REACHABLE)
    assert outcome.broken is not None, f"nothing shows that {switch} is wrong"
    print(told(outcome))
    assert outcome.broken.invariant == invariant, told(outcome)


class Counter:
    """A model of one number that rises and can get stuck, to see the explorer itself at work."""

    def __init__(self, bad=None, trap=None):
        self.bad, self.trap = bad, trap

    def initial(self):
        return (0,)

    def mirror(self, state):
        return None

    def steps(self, state):
        (n,) = state
        if n < 9 and n != self.trap:
            yield Step(("one more", 0), True, (n + 1,))
            yield Step(("two more", 0), False, (n + 2,))

    def check(self, state):
        return Broken("low", f"{state[0]}") if state[0] == self.bad else None

    def is_good(self, state):
        return state[0] >= 9


def test_the_explorer_sees_all_and_finds_the_shortest_way():
    assert explore(Counter(), 100, recovery="ends").states == 11
    outcome = explore(Counter(bad=7), 100)
    assert outcome.broken == Broken("low", "7")
    assert len(outcome.trace) - 1 == 4


def test_the_explorer_finds_the_first_state_without_a_way_out():
    outcome = explore(Counter(trap=5), 100, recovery="ends")
    assert outcome.broken is not None
    assert outcome.broken.invariant == "ends"
    # From 4 only the step that is a fault leads past 5.
    assert outcome.trace[-1][1] == (0,)


def test_the_explorer_never_calls_a_part_the_whole():
    with pytest.raises(StatesExhausted):
        explore(Counter(), 5)
