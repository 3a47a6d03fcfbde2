"""What must hold of whole generations in every family, whatever the reference says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import golden_data
from one_step import forward
from redvtp.denoising.commit import logit_rows
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

EngineFactory = Callable[..., LocalEngine]
CHECKPOINTS = ("tiny-llada-v", "tiny-lavida", "tiny-lavida-dream")


def _request(
    engine: LocalEngine, checkpoint: str, case: str, denoising: DenoisingParams, pruning: PruningParams, number: int = 0
) -> Request:
    images = tuple(golden_data.Case(checkpoint, case).images())
    template = engine.config.family.template
    prompt = chat_prompt(engine.tokenizer, f"Question {number}?", len(images), template=template)
    return Request(prompt, images, denoising, pruning)


def _mixed(local: LocalEngine, checkpoint: str) -> list[Request]:
    """Every cache, with and without pruning, other schedules and confidences, stops and a suffix."""
    settings = [
        (DenoisingParams(gen_length=32, steps=16, ignore_eos=True), PruningParams(keep_ratio=0.25)),
        (DenoisingParams(gen_length=24, block_length=8, steps=12, cache="prefix", schedule="cosine"), PruningParams()),
        (DenoisingParams(gen_length=20, steps=10, cache="prefix_lm", remasking="entropy"), PruningParams()),
        (DenoisingParams(gen_length=16, steps=4, schedule="shift", cache="prefix_lm"), PruningParams(preset="none")),
        (DenoisingParams(gen_length=12, block_length=5, steps=9, remasking="margin"), PruningParams(keep_ratio=0.1)),
        (
            DenoisingParams(gen_length=9, temperature=0.7, seed=3, cache="prefix_lm", suffix=" yes"),
            PruningParams(positions="original"),
        ),
    ]
    return [
        _request(local, checkpoint, case, denoising, pruning, number)
        for number, (denoising, pruning) in enumerate(settings)
        for case in ("wide", "square")
    ]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_mixed_batch_gives_each_request_the_tokens_it_gets_alone(engine: EngineFactory, checkpoint: str) -> None:
    local = engine(checkpoint)
    together = local.generate(_mixed(local, checkpoint))
    alone = [local.generate([request])[0] for request in _mixed(local, checkpoint)]
    assert [g.output_ids for g in together] == [g.output_ids for g in alone]
    assert [[s.canvas for s in g.steps] for g in together] == [[s.canvas for s in g.steps] for g in alone]
    assert local.blocks.num_free == local.blocks.num_blocks


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("keep_ratio", [0.25, 1.0])
def test_refreshing_every_step_equals_no_cache(engine: EngineFactory, checkpoint: str, keep_ratio: float) -> None:
    local = engine(checkpoint)
    plain = DenoisingParams(gen_length=32, block_length=16, steps=16, ignore_eos=True)
    cached = replace(plain, cache="prefix", refresh_interval=1)
    pruning = PruningParams(keep_ratio=keep_ratio)
    for case in ("wide", "square"):
        a, b = local.generate([_request(local, checkpoint, case, denoising, pruning) for denoising in (plain, cached)])
        assert [s.canvas for s in a.steps] == [s.canvas for s in b.steps]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("block", [0, 1])
@torch.inference_mode()
def test_a_response_step_on_an_unchanged_canvas_sees_what_the_full_step_saw(
    engine: EngineFactory, checkpoint: str, block: int
) -> None:
    """Stale keys are the only difference between the two; with nothing decided in between none are stale."""
    local = engine(checkpoint)
    denoising = DenoisingParams(gen_length=16, block_length=8, steps=16, ignore_eos=True, cache="prefix")
    request = _request(local, checkpoint, "wide", denoising, PruningParams(preset="none"))
    blocks = local.blocks.allocate(16)
    assert blocks is not None
    sequence = local.sequence(request, local.tokenize(request), list(blocks))
    if block:
        sequence.canvas.commit(torch.arange(8), torch.arange(8))
    rows = 8 * block + torch.arange(8)
    logits = []
    for kind in ("full", "response"):
        step, output = forward(local, sequence)
        assert step.plan.kind == kind
        hidden = output.hidden[logit_rows(step, output.spans[0], rows)]
        logits.append(local.model.language_model.logits(hidden, local.special.vocab))
        sequence.canvas.commit(torch.tensor([], dtype=torch.int64), torch.tensor([], dtype=torch.int64))
    torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=0)
    local.blocks.free(blocks)


@pytest.mark.parametrize("checkpoint", ["tiny-lavida", "tiny-lavida-dream"])
def test_end_tokens_end_an_answer_though_the_reference_goes_on(engine: EngineFactory, checkpoint: str) -> None:
    local = engine(checkpoint)
    requests = [
        _request(
            local,
            checkpoint,
            case,
            DenoisingParams(gen_length=32, steps=16, ignore_eos=ignore, cache="prefix_lm"),
            PruningParams(preset="none"),
        )
        for case in ("wide", "square")
        for ignore in (True, False)
    ]
    answers = local.generate(requests)
    ended = 0
    for free, stopped in zip(answers[::2], answers[1::2], strict=True):
        ends = [index for index, token in enumerate(free.output_ids) if token in local.special.end_ids]
        assert free.finish_reason == "length"
        if ends:
            ended += 1
            assert stopped.finish_reason == "stop"
            assert not set(stopped.output_ids) & set(local.special.end_ids)
    assert ended


@pytest.mark.parametrize("checkpoint", ["tiny-lavida", "tiny-lavida-dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "prefix_lm"])
def test_bfloat16_answers_and_prunes(engine: EngineFactory, checkpoint: str, cache: str) -> None:
    local = engine(checkpoint, dtype="bfloat16")
    denoising = DenoisingParams(gen_length=16, ignore_eos=True, cache=cache)
    (generation,) = local.generate([_request(local, checkpoint, "wide", denoising, PruningParams(keep_ratio=0.25))])
    assert local.model.dtype == torch.bfloat16
    assert len(generation.output_ids) == 16
    pruning = generation.steps[0].pruning
    assert pruning is not None
    assert len(pruning.kept) == int(0.25 * generation.visual_tokens)
