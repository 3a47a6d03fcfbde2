"""What a step says of itself is what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from redvtp.clock import Clock
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.presets import PRESET_TABLE
from redvtp.prompt import chat_prompt
from redvtp.pruning.resolve import policy_of
from redvtp.pruning.scorers import SCORERS

EngineFactory = Callable[..., LocalEngine]
BLOCKWISE = DenoisingParams(gen_length=4, block_length=1, steps=4, cache="prefix_lm", ignore_eos=True)


def _request(local: LocalEngine, denoising: DenoisingParams) -> Request:
    prompt = chat_prompt(local.tokenizer, "What?", 0, template=local.config.family.template)
    return Request(prompt, (), denoising)


def test_a_step_names_the_canvas_block_that_it_worked_on(engine: EngineFactory) -> None:
    """Dream's prompt decides the first canvas token, so the first step works on the second block."""
    local = engine("tiny-lavida-dream")
    (answer,) = local.generate([_request(local, BLOCKWISE)])
    assert [step.canvas_block for step in answer.steps] == [1, 2, 3]


def test_the_canvas_is_reported_only_where_it_is_read(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v")
    request = _request(local, replace(BLOCKWISE, cache="none"))
    sequence = local.sequence(request, local.tokenize(request), [0, 1, 2, 3])
    sequence.report_canvas = False
    (report,) = local.runner.step([sequence])
    assert report.canvas == []


def test_a_step_that_fails_is_timed_all_the_same() -> None:
    clock = Clock(torch.device("cpu"))
    with pytest.raises(RuntimeError), clock.measure("score"):
        raise RuntimeError("planted")
    assert clock.seconds["score"] > 0


@pytest.mark.parametrize("preset", [name for name in PRESET_TABLE if name != "external"])
def test_policies_are_values(preset: str) -> None:
    """Frozen all through: equal ones have equal hashes, and nothing in them can be changed."""
    one, other = (policy_of(PruningParams(preset=preset), 8, DenoisingParams()) for _ in range(2))
    assert one is not None
    assert one == other
    assert hash(one) == hash(other)


def test_every_preset_has_a_scorer() -> None:
    assert {preset.scorer for preset in PRESET_TABLE.values()} == set(SCORERS)
