"""Tensor-parallel ranks of which one fails alone go on together or end with a sentence; they never hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from devices import needs_two_ranks

pytestmark = needs_two_ranks
TESTS = Path(__file__).resolve().parents[1]


def _run(*where: str) -> tuple[list[dict[str, Any]], str]:
    """What plugin.one_rank_fails prints of each failure, and its whole log."""
    done = subprocess.run(
        [sys.executable, "-m", "plugin.one_rank_fails", *where],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "RESULT " in line]
    assert len(lines) == len(where), done.stdout[-6000:]
    return [json.loads(line.partition("RESULT ")[2]) for line in lines], done.stdout


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
