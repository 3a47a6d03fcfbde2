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


@pytest.mark.slow
@pytest.mark.parametrize("preempt", [0, 3], ids=["undisturbed", "preempted"])
@pytest.mark.parametrize("checkpoint", RUNS)
def test_two_ranks_give_the_references_tokens(checkpoint: str, preempt: int, tmp_path: Path) -> None:
    _expect_the_references_tokens(checkpoint, tmp_path, str(preempt))


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida-dream"])
def test_a_rank_that_computes_something_else_still_decides_the_same(checkpoint: str, tmp_path: Path) -> None:
    """Rounding may differ between ranks by a bit; here the second one's head does, by all of it."""
    _expect_the_references_tokens(checkpoint, tmp_path, "0", "--disturb")


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    [
        {"pruning": "llada-fastv", "prune_layer": 1},
        {"pruning": "layer-skip", "prune_layer": 1},
        {"pruning": "zipvl", "attention_mass": 0.6, "prune_steps": 3, "score_rows": "response"},
        {"pruning": "attention-free", "prune_scope": "image"},
    ],
    ids=lambda policy: policy["pruning"],
)
def test_ranks_drop_the_same_tokens(engine: EngineFactory, policy: dict[str, Any], tmp_path: Path) -> None:
    """Their key heads are split, so neither rank could choose by itself. There is no reference: the engine's tokens."""
    preset, *others = policy
    pruning = PruningParams(preset=policy[preset], keep_ratio=0.25, **{name: policy[name] for name in others})
    runs = _runs("tiny-lavida-dream")
    local = engine("tiny-lavida-dream")
    expected = {}
    for name, run in runs.items():
        request = Request(run.case.prompt, tuple(run.case.images()), golden_runs.denoising_of(run), pruning)
        expected[name] = local.generate([request])[0].output_ids
    assert expected != {name: run.output for name, run in runs.items()}
    knobs = json.dumps({"keep_ratio": 0.25, **policy})
    assert _answers(runs, tmp_path, "3", f"--knobs={knobs}") == expected


def _expect_the_references_tokens(checkpoint: str, folder: Path, *flags: str) -> None:
    runs = _runs(checkpoint)
    assert _answers(runs, folder, *flags) == {name: run.output for name, run in runs.items()}


def _runs(checkpoint: str) -> dict[str, golden_data.Run]:
    found = golden_data.runs(checkpoints=(checkpoint,))
    runs = {str(run): run for run in found if f"{run.case.name}/{run.name}" in RUNS[checkpoint]}
    assert len(runs) >= 2
    return runs


def _answers(runs: dict[str, golden_data.Run], folder: Path, *flags: str) -> Any:
    answers = folder / "answers.json"
    done = subprocess.run(
        [sys.executable, "-m", "plugin.two_ranks", answers, *flags, *runs],
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
