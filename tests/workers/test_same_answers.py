"""What is promised for one process holds for several: cases of other suites, against daemons with two workers each."""

from __future__ import annotations

# ruff: noqa: F401  # pytest collects what is imported
from tests.cluster.test_spray import (
    test_a_sprayed_retry_is_a_duplicate_wherever_it_arrives,
)
from tests.cluster.test_watch import (
    nodes,
    test_a_watch_outlives_the_drain_of_the_owner,
    test_a_watch_outlives_the_owner_and_says_what_may_be_missing,
    test_calls_to_a_node_that_drains_reach_whoever_took_the_session,
    wires,
)
from tests.cluster.test_zombie import (
    test_a_frozen_node_that_thaws_changes_nothing_and_its_turns_are_kept,
)
from tests.e2e.test_ladder import (
    test_a_drained_node_keeps_reading_and_takes_nothing,
    test_a_kill_with_the_loss_of_the_disk_is_partial_until_accepted,
    test_re_appended_turns_make_a_lost_session_whole_again_and_are_applied_once,
    test_too_many_calls_at_once_are_refused_with_details_and_a_retry,
)
from tests.e2e.test_watch import (
    daemon,
    test_a_backlog_of_ten_thousand_turns_comes_whole_in_bounded_events,
    test_a_deletion_is_told_and_ends_the_stream,
    test_a_drain_ends_streams_with_a_retry,
    test_a_watch_survives_the_release_of_its_session,
    test_a_watched_session_is_in_use_and_is_not_released_as_idle,
    test_each_turn_is_on_its_way_when_its_append_is_acknowledged,
    test_streams_above_the_limit_are_refused_with_details,
    test_thousands_that_come_at_once_are_all_answered,
    test_two_devices_hear_of_every_turn_in_order_as_it_is_stored,
    wire,
)
