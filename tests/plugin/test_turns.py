"""Who steps in an engine step, as a rule over costs alone: no engine and no vLLM."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from vllm_redvtp.scheduling.turns import continuing, fits, head_goes_first

BUDGET = 100


@dataclass
class Cost:
    next_tokens: int
    later_tokens: int = 0
    last_step: int = 0


def test_a_step_larger_than_the_budget_runs_alone() -> None:
    assert fits(Cost(BUDGET + 1), 0, BUDGET)
    assert not fits(Cost(BUDGET + 1), 1, BUDGET)
    assert continuing({"a": Cost(BUDGET + 1), "b": Cost(1)}, {}, BUDGET) == {"a": BUDGET + 1}


def test_who_stepped_longest_ago_comes_first_and_small_steps_fill_up() -> None:
    running = {"new": Cost(50, last_step=3), "old": Cost(60, last_step=1), "small": Cost(40, last_step=2)}
    assert list(continuing(running, {}, BUDGET).items()) == [("old", 60), ("small", 40)]


def test_requests_of_the_same_age_keep_their_order() -> None:
    running = {name: Cost(60) for name in "abc"}
    assert continuing(running, {}, BUDGET) == {"a": 60}


def test_what_is_scheduled_counts_and_is_not_scheduled_again() -> None:
    running = {"a": Cost(60), "b": Cost(30), "c": Cost(20)}
    assert continuing(running, {"a": 60}, BUDGET) == {"b": 30}


def test_a_long_first_step_goes_first_where_its_later_steps_have_room() -> None:
    running = [Cost(20), Cost(20)]
    assert head_goes_first(Cost(80, later_tokens=30), running, BUDGET)
    assert not head_goes_first(Cost(60, later_tokens=30), running, BUDGET), "it fits beside them"
    assert not head_goes_first(Cost(80, later_tokens=61), running, BUDGET), "it would never fit beside them"


@given(st.lists(st.integers(1, 2 * BUDGET), min_size=1, max_size=8), st.integers(0, 40))
def test_no_request_waits_longer_than_there_are_running_requests(rows: list[int], steps: int) -> None:
    running = {str(number): Cost(tokens) for number, tokens in enumerate(rows)}
    for step in range(1, steps + 1):
        turns = continuing(running, {}, BUDGET)
        assert turns
        assert len(turns) == 1 or sum(turns.values()) <= BUDGET
        for name in turns:
            running[name].last_step = step
        assert all(step - cost.last_step <= len(running) for cost in running.values())
