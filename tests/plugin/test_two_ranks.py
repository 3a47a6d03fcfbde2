"""Tensor parallelism: heads, key heads and biases split over two processes, and the tokens are the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import golden_data
import golden_runs
from redvtp.local import LocalEngine, Request
from redvtp.params import PruningParams

EngineFactory = Callable[..., LocalEngine]

TESTS = Path(__file__).resolve().parents[1]
# Of each family: without and with pruning, in every cache mode it is used with.
RUNS = {
    "tiny-llada-v": {"square/redvtp_k50_g32_b32_s16", "wide/redvtp_k25_g32_b32_s16", "square/plain_g32_b32_s16"},
    "tiny-lavida": {
        "square/prefix_shift_r100_lowconf_g32b32",
        "wide/full_None_r50_margin_g32b32",
        "wide/redvtp_k25_g32_s16",
    },
    "tiny-lavida-dream": {"square/prefix_margin_s16", "wide/full_maskgit_s16"},
}


POLICIES: list[dict[str, Any]] = [
    {"pruning": "llada-fastv", "prune_layer": 1},
    {"pruning": "layer-skip", "prune_layer": 1},
    {"pruning": "zipvl", "attention_mass": 0.6, "prune_steps": 3, "score_rows": "response"},
    {"pruning": "attention-free", "prune_scope": "image"},
]


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", RUNS)
def test_two_ranks_give_the_references_tokens(checkpoint: str, tmp_path: Path) -> None:
    runs = _runs(checkpoint)
    undisturbed, preempted = _answers(runs, tmp_path, [_round(), _round(preempt=3)])
    assert undisturbed == preempted == {name: run.output for name, run in runs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida-dream"])
def test_a_rank_that_computes_something_else_still_decides_the_same(checkpoint: str, tmp_path: Path) -> None:
    """Rounding may differ between ranks by a bit; here the second one's head does, by all of it."""
    runs = _runs(checkpoint)
    (answers,) = _answers(runs, tmp_path, [_round()], "--disturb")
    assert answers == {name: run.output for name, run in runs.items()}


@pytest.mark.slow
def test_ranks_drop_the_same_tokens(engine: EngineFactory, tmp_path: Path) -> None:
    """Their key heads are split, so neither rank could choose by itself. There is no reference: the engine's tokens."""
    runs = _runs("tiny-lavida-dream")
    found = _answers(runs, tmp_path, [_round(preempt=3, keep_ratio=0.25, **policy) for policy in POLICIES])
    local = engine("tiny-lavida-dream")
    for (preset, *others), policy, answers in zip(POLICIES, POLICIES, found, strict=True):
        pruning = PruningParams(preset=policy[preset], keep_ratio=0.25, **{name: policy[name] for name in others})
        expected = {}
        for name, run in runs.items():
            request = Request(run.case.prompt, tuple(run.case.images()), golden_runs.denoising_of(run), pruning)
            expected[name] = local.generate([request])[0].output_ids
        assert expected != {name: run.output for name, run in runs.items()}, policy
        assert answers == expected, policy


def _round(preempt: int = 0, **knobs: Any) -> dict[str, Any]:
    return {"preempt": preempt, "knobs": knobs}


def _runs(checkpoint: str) -> dict[str, golden_data.Run]:
    found = golden_data.runs(checkpoints=(checkpoint,))
    runs = {str(run): run for run in found if f"{run.case.name}/{run.name}" in RUNS[checkpoint]}
    assert len(runs) >= 2
    return runs


def _answers(runs: dict[str, golden_data.Run], folder: Path, rounds: list[dict[str, Any]], *flags: str) -> Any:
    answers = folder / "answers.json"
    done = subprocess.run(
        [sys.executable, "-m", "plugin.two_ranks", answers, json.dumps(rounds), *flags, *runs],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return json.loads(answers.read_text())
