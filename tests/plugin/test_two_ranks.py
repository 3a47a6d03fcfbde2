"""Tensor parallelism: heads, key heads and biases split over two processes, and the tokens are the reference's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import golden_data
import golden_runs
from devices import needs_two_ranks
from module_process import run_module
from redvtp.local import LocalEngine, Request
from redvtp.params import PruningParams

EngineFactory = Callable[..., LocalEngine]

pytestmark = needs_two_ranks
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


DISTURBED = ("tiny-llada-v", "tiny-lavida-dream")

Answers = Callable[[str], dict[str, dict[str, list[int]]]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """answers(checkpoint)[round][run]: tokens from two ranks, in one process for each checkpoint."""

    @cache
    def asked(checkpoint: str) -> dict[str, dict[str, list[int]]]:
        rounds = _rounds(checkpoint)
        return dict(zip(rounds, _ask(checkpoint, list(rounds.values()), tmp_path_factory.mktemp("ranks")), strict=True))

    return asked


def _rounds(checkpoint: str) -> dict[str, dict[str, Any]]:
    rounds = {"undisturbed": _round(), "preempted": _round(preempt=3), "drawn": _round(preempt=3, temperature=0.8)}
    if checkpoint == "tiny-lavida-dream":
        rounds |= {policy["pruning"]: _round(preempt=3, keep_ratio=0.25, **policy) for policy in POLICIES}
    if checkpoint in DISTURBED:
        # The last: it cannot be undone.
        rounds["disturbed"] = _round(disturb=True)
    return rounds


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", RUNS)
def test_two_ranks_give_the_references_tokens(checkpoint: str, answers: Answers) -> None:
    expected = {name: run.output for name, run in _runs(checkpoint).items()}
    assert answers(checkpoint)["undisturbed"] == answers(checkpoint)["preempted"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", RUNS)
def test_what_is_drawn_is_what_one_engine_draws_alone(engine: EngineFactory, checkpoint: str, answers: Answers) -> None:
    """In a batch, over two ranks, preempted on the way."""
    local = engine(checkpoint)
    expected = {}
    for name, run in _runs(checkpoint).items():
        denoising = replace(golden_runs.denoising_of(run), temperature=0.8, seed=11)
        request = Request(run.case.prompt, tuple(run.case.images()), denoising, golden_runs.pruning_of(run))
        expected[name] = local.generate([request])[0].output_ids
    assert expected != {name: run.output for name, run in _runs(checkpoint).items()}
    assert answers(checkpoint)["drawn"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", DISTURBED)
def test_a_rank_that_computes_something_else_still_decides_the_same(checkpoint: str, answers: Answers) -> None:
    """Rounding may differ between ranks by a bit; here the second one's head does, by all of it."""
    assert answers(checkpoint)["disturbed"] == {name: run.output for name, run in _runs(checkpoint).items()}


@pytest.mark.slow
def test_ranks_drop_the_same_tokens(engine: EngineFactory, answers: Answers) -> None:
    """Their key heads are split, so neither rank could choose by itself. There is no reference: the engine's tokens."""
    runs = _runs("tiny-lavida-dream")
    local = engine("tiny-lavida-dream")
    for policy in POLICIES:
        preset, *others = policy
        pruning = PruningParams(preset=policy[preset], keep_ratio=0.25, **{name: policy[name] for name in others})
        expected = {}
        for name, run in runs.items():
            request = Request(run.case.prompt, tuple(run.case.images()), golden_runs.denoising_of(run), pruning)
            expected[name] = local.generate([request])[0].output_ids
        assert expected != {name: run.output for name, run in runs.items()}, policy
        assert answers("tiny-lavida-dream")[policy[preset]] == expected, policy


def _round(preempt: int = 0, disturb: bool = False, temperature: float = 0.0, **knobs: Any) -> dict[str, Any]:
    return {"preempt": preempt, "disturb": disturb, "temperature": temperature, "knobs": knobs}


def _runs(checkpoint: str) -> dict[str, golden_data.Run]:
    found = golden_data.runs(checkpoints=(checkpoint,))
    runs = {str(run): run for run in found if f"{run.case.name}/{run.name}" in RUNS[checkpoint]}
    assert len(runs) >= 2
    return runs


def _ask(checkpoint: str, rounds: list[dict[str, Any]], folder: Path) -> list[dict[str, list[int]]]:
    file = folder / "answers.json"
    run_module("plugin.two_ranks", file, json.dumps(rounds), *_runs(checkpoint))
    found: list[dict[str, list[int]]] = json.loads(file.read_text())
    return found
