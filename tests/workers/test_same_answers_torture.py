"""More of what is promised for one process, against daemons with two workers each: what takes long."""

from __future__ import annotations

import pytest

# ruff: noqa: F401  # pytest collects what is imported
from tests.cluster.test_affinity import clients, test_a_session_follows_the_node_that_it_is_always_asked_for_through
from tests.cluster.test_lost_node import test_a_session_nobody_asks_for_is_taken_by_the_first_read_after_the_loss
from tests.cluster.test_nodes import test_three_nodes_share_a_bucket_and_leave_it_sound
from tests.cluster.test_rolling import test_a_rolling_restart_under_load_is_heard_by_nobody
from tests.cluster.test_spray import test_calls_sprayed_over_all_nodes_move_no_session_and_get_the_owners_answers
from tests.cluster.test_zombie import (
    test_a_killed_node_that_starts_late_on_its_disk_gives_its_turns_back,
    test_a_node_that_is_cut_off_serves_unconfirmed_and_its_turns_are_kept,
)
from tests.e2e.test_ladder import (
    test_all_conversations_survive_a_drain_and_the_loss_of_the_hot_tier_with_the_same_contexts,
)

pytestmark = pytest.mark.torture
