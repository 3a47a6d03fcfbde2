"""Tensor-parallel ranks of which one fails alone go on together or end with a sentence; they never hang."""

from __future__ import annotations

from typing import Any

import pytest

from devices import needs_two_ranks
from module_process import results, run_module

pytestmark = needs_two_ranks


def _run(*where: str) -> tuple[list[dict[str, Any]], str]:
    """What plugin.one_rank_fails prints of each failure, and its whole log."""
    said = run_module("plugin.one_rank_fails", *where)
    found = results(said)
    assert len(found) == len(where), said[-6000:]
    return found, said


@pytest.fixture(scope="module")
def failures() -> tuple[list[dict[str, Any]], str]:
    """One that ranks survive and then one that they do not, in one process."""
    return _run("after", "inside")


@pytest.mark.slow
def test_ranks_take_a_step_back_together_when_one_fails_behind_the_last_collective(
    failures: tuple[list[dict[str, Any]], str],
) -> None:
    """The rank that failed retried alone, and its sums met those of another step."""
    (found, _), log = failures
    reasons = [answer[0] for answer in found["answers"]]
    tokens = [answer[2] for answer in found["answers"]]
    assert reasons == ["length", "length"], log[-6000:]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 16
    assert "stepping them one by one" in log


@pytest.mark.slow
def test_a_rank_that_leaves_the_others_in_a_collective_ends_the_engine_with_a_sentence(
    failures: tuple[list[dict[str, Any]], str],
) -> None:
    (_, found), log = failures
    assert found["ended"], log[-6000:]
    assert found["seconds"] < 120
    assert "rank 1 failed alone; the other ranks wait for it in the middle of a step" in log


@pytest.mark.slow
def test_a_failed_device_of_another_rank_ends_the_engine() -> None:
    """VLLM only logs what ranks behind the first raise: every later request would have failed, and none ended it."""
    (found,), log = _run("device")
    assert found["ended"], log[-6000:]
    assert found["seconds"] < 120
    assert "the device of tensor-parallel rank 1 failed" in log
    assert "stepping them one by one" not in log
