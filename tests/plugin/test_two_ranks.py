"""Tensor parallelism: heads, key heads and biases split over two processes, and the tokens are the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import golden_data

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


def _expect_the_references_tokens(checkpoint: str, folder: Path, *flags: str) -> None:
    found = golden_data.runs(checkpoints=(checkpoint,))
    runs = {str(run): run for run in found if f"{run.case.name}/{run.name}" in RUNS[checkpoint]}
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
    assert len(runs) >= 2
    assert json.loads(answers.read_text()) == {name: run.output for name, run in runs.items()}
