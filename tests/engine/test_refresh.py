"""When a prefix cache recomputes everything: `refresh_interval`, and what happens without one."""

from __future__ import annotations

from typing import Any

import pytest

import golden_data
from conftest import EngineFactory
from redvtp.local import Generation, LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams

LENGTHS: dict[str, Any] = {"gen_length": 24, "block_length": 8, "steps": 12, "ignore_eos": True, "cache": "prefix"}
UNPRUNED = PruningParams(preset="none")


def _generate(
    local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams, checkpoint: str = "tiny-llada-v"
) -> Generation:
    case = golden_data.Case(checkpoint, "wide")
    (generation,) = local.generate([Request(case.prompt, tuple(case.images()), denoising, pruning)])
    return generation


def _full_steps(generation: Generation) -> list[int]:
    return [step.step for step in generation.steps if step.kind == "full"]


def _computed(generation: Generation) -> list[int]:
    return [step.tokens_computed for step in generation.steps]


def test_without_pruning_it_refreshes_at_the_start_of_each_block_only(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v")
    assert _full_steps(_generate(local, DenoisingParams(**LENGTHS), UNPRUNED)) == [0, 4, 8]
    # However long the block is.
    long = DenoisingParams(gen_length=48, block_length=48, steps=48, ignore_eos=True, cache="prefix")
    assert _full_steps(_generate(local, long, UNPRUNED)) == [0]


@pytest.mark.parametrize("preset", ["redvtp", "llada-fastv", "random"])
def test_once_pruned_it_computes_the_canvas_only(engine: EngineFactory, preset: str) -> None:
    """All of it after the pruning and at the start of a block, else what is not finished."""
    local = engine("tiny-llada-v")
    generation = _generate(local, DenoisingParams(**LENGTHS), PruningParams(preset, keep_ratio=0.25))
    assert _full_steps(generation) == [0]
    assert _computed(generation)[1:] == [24, 24, 24, 24, 16, 16, 16, 24, 8, 8, 8]


def test_a_dual_cache_computes_its_own_block_only(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v")
    dual = DenoisingParams(**LENGTHS | {"cache": "dual"})
    pruned = _generate(local, dual, PruningParams(keep_ratio=0.25))
    assert _full_steps(pruned) == [0]
    assert _computed(pruned)[1:] == [24, 8, 8, 24, 8, 8, 8, 24, 8, 8, 8]
    whole = _generate(local, dual, UNPRUNED)
    total = whole.steps[0].kv_tokens
    assert _computed(whole) == [total, 8, 8, 8] * 3
    late = _generate(local, dual, PruningParams("late", keep_ratio=0.25, prune_step=5))
    # A step that scores asks the undecided rows of all blocks.
    assert _computed(late) == [total, 8, 8, 8, total, 16, 24, 8, 24, 8, 8, 8]
    refreshed = _generate(local, DenoisingParams(**LENGTHS | {"cache": "dual", "refresh_interval": 3}), UNPRUNED)
    assert _computed(refreshed) == [total, 8, 8, total] * 3


def test_a_late_pruning_ends_the_refreshing(engine: EngineFactory) -> None:
    pruning = PruningParams("late", keep_ratio=0.25, prune_step=5)
    assert _full_steps(_generate(engine("tiny-llada-v"), DenoisingParams(**LENGTHS), pruning)) == [0, 4]


def test_what_never_was_computed_leaves_nothing_to_keep(engine: EngineFactory) -> None:
    pruning = PruningParams("attention-free", keep_ratio=0.25)
    assert _full_steps(_generate(engine("tiny-llada-v"), DenoisingParams(**LENGTHS), pruning)) == [0, 4, 8]


def test_an_interval_of_the_clients_own_is_kept(engine: EngineFactory) -> None:
    denoising = DenoisingParams(**LENGTHS, refresh_interval=3)
    generation = _generate(engine("tiny-llada-v"), denoising, PruningParams(keep_ratio=0.25))
    assert _full_steps(generation) == [0, 3, 4, 7, 8, 11]
    # After the pruning the canvas once more.
    assert [_computed(generation)[step] for step in (1, 2, 5, 6, 9, 10)] == [24, 24, 16, 16, 8, 8]


def test_with_shifted_logits_the_token_before_the_canvas_is_computed_too(engine: EngineFactory) -> None:
    local = engine("tiny-lavida-dream")
    generation = _generate(local, DenoisingParams(**LENGTHS), PruningParams(keep_ratio=0.25), "tiny-lavida-dream")
    assert _computed(generation)[1:] == [25, 25, 25, 25, 17, 17, 17, 25, 9, 9, 9]
    dual = DenoisingParams(**LENGTHS | {"cache": "dual"})
    generation = _generate(local, dual, PruningParams(keep_ratio=0.25), "tiny-lavida-dream")
    assert _computed(generation)[1:] == [25, 9, 9, 25, 9, 9, 9, 25, 9, 9, 9]
