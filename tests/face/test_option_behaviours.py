"""Every option of a consumer has a test that shows what it does, through the public entry points."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sluiceway.options import OPTIONS

TESTS = Path(__file__).resolve().parents[1]
ACCEPTANCE = TESTS.parent / "src" / "sluiceway" / "testing"
SHOWN_BY = {
    "name": "face/test_consumer.py::test_an_option_error_names_the_consumer_by_its_function_or_by_its_given_name",
    "group": "acceptance/groups.py::test_each_group_gets_every_message_once",
    "concurrency": "runtime/test_demand.py::test_concurrency_is_reached_and_never_exceeded",
    "executor": "processes/test_handlers.py::test_they_run_in_as_many_other_processes_as_concurrency_says",
    "batch_size": "runtime/test_batches.py::test_a_batch_goes_by_size_then_by_time",
    "batch_timeout": "runtime/test_batches.py::test_a_batch_goes_by_size_then_by_time",
    "batchers": "face/test_consumer.py::test_batchers_of_a_function_are_declared_with_their_handlers",
    "retry": "runtime/test_failures.py::test_what_raises_is_retried_with_growing_delays_then_dead_lettered",
    "dead_letter_topic": "decisions/test_policy.py::test_a_dead_letter_topic_of_its_own_is_where_they_go",
    "exhausted": "runtime/test_failures.py::test_exhausted_drop_ends_without_a_dead_letter",
    "timeout": "runtime/test_timeouts.py::test_a_handler_over_the_timeout_is_cancelled_and_fails",
    "middleware": "runtime/test_middleware.py::test_what_a_middleware_raises_fails_its_message_alone",
    "batch_middleware": "runtime/test_batch_middleware.py::test_it_is_made_for_each_batcher_and_told_of_it",
    "acknowledgers": "runtime/test_acknowledgers.py::test_one_that_raises_is_logged_and_changes_nothing",
    "gates": "runtime/test_demand.py::test_a_gate_that_says_how_many_is_obeyed",
    "order_by": "runtime/test_order.py::test_one_key_is_handled_one_at_a_time_in_arrival_order_and_keys_side_by_side",
    "start": "acceptance/groups.py::test_a_new_group_from_the_latest_gets_only_what_comes",
    "sources": "runtime/test_sources_merged.py::test_a_consumer_of_an_app_may_have_several_sources_too",
    "max_demand": "runtime/test_demand.py::test_demand_never_exceeds_a_pinned_window",
    "max_buffer_bytes": "runtime/test_demand.py::test_large_bodies_shrink_the_window_to_the_byte_limit",
    "max_payload": "runtime/test_failures.py::test_what_is_over_max_payload_is_dead_lettered_undecoded",
    "buffer_time": "runtime/test_demand.py::test_the_window_holds_what_the_processors_finish_in_buffer_time",
    "payload": "face/test_consumer.py::test_whatever_can_be_called_can_be_a_consumer",
}


def test_every_option_is_listed_here() -> None:
    assert list(SHOWN_BY) == list(OPTIONS)


@pytest.mark.parametrize("option", SHOWN_BY)
def test_its_test_is_there_and_uses_it(option: str) -> None:
    file, _, name = SHOWN_BY[option].partition("::")
    text = ((ACCEPTANCE if file.startswith("acceptance/") else TESTS) / file).read_text(encoding="utf-8")
    assert re.search(rf"^(?:async )?def {name}\(", text, re.MULTILINE)
    assert re.search(rf"\b{option}\b", text)
