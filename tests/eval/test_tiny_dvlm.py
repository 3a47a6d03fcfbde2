"""The shipped model answers its shipped questions and pruning costs little: `redvtp eval` as a user runs it.

Answers are greedy and in float32, so the shares move only when the model, the pictures or the engine do.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.task_files import run

pytestmark = pytest.mark.slow
MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_dvlm"
TASKS = MODEL / "tasks" / "tasks.jsonl"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, float], dict[str, Any]]:
    out = tmp_path_factory.mktemp("tiny-dvlm") / "out"
    found: dict[tuple[str, float], dict[str, Any]] = {}
    # The second evaluation finds the dense answers of the first.
    for policy, keep in (("redvtp", "0.5"), ("random", "0.25")):
        # Answers are the same one by one (test_eval_command.py), but take twice as long.
        grid = ("--policies", policy, "--keep", keep, "--concurrency", "8")
        done = run("eval", MODEL, TASKS, *grid, "--dtype", "float32", "--output", out, timeout=3600)
        assert done.returncode == 0, done.stderr
        summary = json.loads((out / "summary.json").read_text())
        found |= {(cell["policy"], cell["keep_ratio"]): cell for cell in summary["cells"]}
    return found


def _share(cell: dict[str, Any], group: str) -> float:
    return float(cell["groups"][group]["exact_match"]["share"])


def test_dense_reads_the_pictures(cells: dict[tuple[str, float], dict[str, Any]]) -> None:
    dense = cells["none", 1.0]
    assert _share(dense, "short") >= 0.95
    assert _share(dense, "long") >= 0.85


@pytest.mark.parametrize("group", ["short", "long"])
def test_half_of_the_visual_tokens_are_enough(cells: dict[tuple[str, float], dict[str, Any]], group: str) -> None:
    assert _share(cells["redvtp", 0.5], group) >= _share(cells["none", 1.0], group) - 0.02


def test_dropping_visual_tokens_blindly_is_not(cells: dict[tuple[str, float], dict[str, Any]]) -> None:
    """Otherwise the questions would need no pictures, and keeping accuracy would prove nothing."""
    for group in ("short", "long"):
        assert _share(cells["random", 0.25], group) < _share(cells["none", 1.0], group) - 0.15
