"""What must hold of whole generations on real checkpoints, whatever the reference says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import golden_data
from devices import DEVICE
from redvtp.kv.blocks import blocks_needed
from redvtp.local import Generation, LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

EngineFactory = Callable[..., LocalEngine]
CHECKPOINT = "tiny-llada-v"


def _request(
    engine: LocalEngine, case: str, denoising: DenoisingParams, pruning: PruningParams, question: str = "What is this?"
) -> Request:
    images = tuple(golden_data.Case(CHECKPOINT, case).images())
    return Request(chat_prompt(engine.tokenizer, question, len(images)), images, denoising, pruning)


MIXED = [
    ("wide", DenoisingParams(gen_length=32, steps=16, ignore_eos=True), PruningParams(keep_ratio=0.25)),
    ("tall", DenoisingParams(gen_length=24, block_length=16, steps=12, cache="prefix"), PruningParams(keep_ratio=0.5)),
    ("square", DenoisingParams(gen_length=16, steps=4), PruningParams(preset="none")),
    ("text_only", DenoisingParams(gen_length=20, block_length=8, steps=10, cache="prefix"), PruningParams()),
    ("two_pad_tensor", DenoisingParams(gen_length=40, block_length=16, steps=20), PruningParams(keep_ratio=0.3)),
    ("wide", DenoisingParams(gen_length=8, steps=8, temperature=0.8, seed=5), PruningParams(positions="original")),
    ("tall", DenoisingParams(gen_length=30, steps=10, remasking="random", seed=9), PruningParams(keep_ratio=0.1)),
    (
        "square",
        DenoisingParams(gen_length=33, steps=33, suffix=" yes", cache="prefix", refresh_interval=3),
        PruningParams(),
    ),
]


def _mixed(engine: LocalEngine) -> list[Request]:
    return [
        _request(engine, case, denoising, pruning, f"Question {i}?")
        for i, (case, denoising, pruning) in enumerate(MIXED)
    ]


def test_a_mixed_batch_gives_each_request_the_tokens_it_gets_alone(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    together = local.generate(_mixed(local))
    alone = [local.generate([request])[0] for request in _mixed(local)]
    assert [g.output_ids for g in together] == [g.output_ids for g in alone]
    assert local.blocks.num_free == local.blocks.num_blocks


def test_requests_wait_for_blocks_and_all_are_served(engine: EngineFactory) -> None:
    roomy = engine(CHECKPOINT)
    expected = [g.output_ids for g in roomy.generate(_mixed(roomy))]
    tight = LocalEngine(
        golden_data.checkpoint_dir(CHECKPOINT), dtype="float32", device=DEVICE, block_size=16, num_blocks=40
    )
    assert [g.output_ids for g in tight.generate(_mixed(tight))] == expected
    assert tight.blocks.num_free == 40


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("keep_ratio", [0.25, 0.6])
def test_refreshing_every_step_equals_no_cache(engine: EngineFactory, positions: str, keep_ratio: float) -> None:
    local = engine(CHECKPOINT)
    plain = DenoisingParams(gen_length=32, block_length=16, steps=16, ignore_eos=True)
    pruning = PruningParams(keep_ratio=keep_ratio, positions=positions)
    for case in ("wide", "tall", "two_pad_tensor"):
        cached = replace(plain, cache="prefix", refresh_interval=1)
        a, b = local.generate([_request(local, case, denoising, pruning) for denoising in (plain, cached)])
        assert [s.canvas for s in a.steps] == [s.canvas for s in b.steps]


def test_pages_after_a_pruning_are_what_a_fresh_cache_would_hold(engine: EngineFactory) -> None:
    """Layer 0 keys depend on nothing but embedding and position, so they can be computed afresh and compared."""
    local = engine(CHECKPOINT)
    request = _request(
        local, "wide", DenoisingParams(gen_length=16, cache="prefix", ignore_eos=True), PruningParams(keep_ratio=0.3)
    )
    blocks = local.blocks.allocate(32)
    assert blocks is not None
    sequence = local.sequence(request, local.tokenize(request), list(blocks))
    local.runner.step([sequence])
    model = local.model.language_model
    layer = model.layers[0]
    with torch.inference_mode():
        normed = layer.get_submodule("input_layernorm")(sequence.prompt.embeds)
        keys = layer.get_submodule("self_attn.k_proj")(normed).view(normed.shape[0], -1, local.config.head_dim)
        expected = model.rotary.rotate(keys, torch.arange(sequence.prompt.length))
    table = torch.tensor(sequence.block_table)
    rows = torch.arange(sequence.prompt.length)
    size = local.cache.block_size
    stored, _ = local.cache.read(0, table[rows // size] * size + rows % size)
    torch.testing.assert_close(stored, expected, atol=2e-5, rtol=1e-5)
    local.blocks.free(blocks)


@pytest.mark.parametrize("cache", ["none", "prefix"])
def test_freed_blocks_are_the_difference_of_the_formula(engine: EngineFactory, cache: str) -> None:
    local = LocalEngine(golden_data.checkpoint_dir(CHECKPOINT), dtype="float32", device=DEVICE, block_size=16)
    request = _request(
        local, "large", DenoisingParams(gen_length=16, ignore_eos=True, cache=cache), PruningParams(keep_ratio=0.25)
    )
    (generation,) = local.generate([request])
    first, pruning = generation.steps[0], generation.steps[0].pruning
    assert pruning is not None
    before = generation.prompt_tokens + 16
    after = before - pruning.visual_before + pruning.visual_after
    assert first.kv_tokens == after
    assert first.blocks_freed == blocks_needed(before, 16) - blocks_needed(after, 16) > 0
    assert all(step.blocks_freed == 0 for step in generation.steps[1:])


def test_pruning_with_a_cache_computes_only_the_canvas(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    denoising = DenoisingParams(
        gen_length=32, block_length=16, steps=16, ignore_eos=True, cache="prefix", refresh_interval=16
    )
    (generation,) = local.generate([_request(local, "wide", denoising, PruningParams(keep_ratio=0.25))])
    kinds = [(step.kind, step.tokens_computed) for step in generation.steps]
    kept = generation.steps[0].prompt_length
    assert kinds[0] == ("full", generation.prompt_tokens + 32)
    assert kinds[1:8] == [("response", 32)] * 7
    assert kinds[8] == ("full", kept + 32)
    assert kinds[9:] == [("response", 16)] * 7


def test_every_image_is_pruned_where_it_stands(engine: EngineFactory) -> None:
    """The reference ranks only the first image's slots (it assumes one image); here all are ranked."""
    local = engine(CHECKPOINT)
    request = _request(
        local, "two_pad_tensor", DenoisingParams(gen_length=16, ignore_eos=True), PruningParams(keep_ratio=0.5)
    )
    (generation,) = local.generate([request])
    pruning = generation.steps[0].pruning
    assert pruning is not None
    assert pruning.visual_before == generation.visual_tokens == 32
    importance = torch.tensor(pruning.importance)
    assert pruning.kept == importance.topk(16).indices.sort().values.tolist()
    assert any(index >= 16 for index in pruning.kept)
    assert any(index < 16 for index in pruning.kept)


@pytest.mark.parametrize("preset", ["redvtp", "random", "uniform"])
def test_keeping_everything_changes_nothing(engine: EngineFactory, preset: str) -> None:
    local = engine(CHECKPOINT)
    denoising = DenoisingParams(gen_length=16, ignore_eos=True)
    presets = (PruningParams(preset=preset, keep_ratio=1.0), PruningParams(preset="none"))
    kept, plain = local.generate([_request(local, "wide", denoising, p) for p in presets])
    assert [s.canvas for s in kept.steps] == [s.canvas for s in plain.steps]
    assert kept.steps[0].blocks_freed == 0


def test_controls_keep_as_many_tokens_without_looking(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)

    def kept(preset: str, seed: int) -> list[int]:
        denoising = DenoisingParams(gen_length=16, steps=2, seed=seed)
        request = _request(local, "square", denoising, PruningParams(preset=preset, keep_ratio=0.25))
        (pruning,) = (step.pruning for step in local.generate([request])[0].steps if step.pruning is not None)
        return pruning.kept

    by_chance = kept("random", 1)
    assert len(by_chance) == len(kept("redvtp", 1)) == 22
    assert by_chance == kept("random", 1) != kept("random", 2)
    # 22 of 88: the third of every four.
    assert kept("uniform", 1) == list(range(2, 88, 4))


def test_end_tokens_stop_unless_ignored(engine: EngineFactory) -> None:
    """tiny-llada-v is known to decide <|eot_id|> within this canvas."""
    local = engine(CHECKPOINT)
    eot = local.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    free, stopped = local.generate(
        [
            _request(
                local, "wide", DenoisingParams(gen_length=32, steps=16, ignore_eos=ignore), PruningParams(preset="none")
            )
            for ignore in (True, False)
        ]
    )
    assert eot in free.output_ids
    assert free.finish_reason == "length"
    assert stopped.finish_reason == "stop"
    assert eot not in stopped.output_ids
    streamed = [token for step in stopped.steps for token in step.new_tokens]
    assert streamed == [*stopped.output_ids, eot]


def _text(generations: list[Generation]) -> list[list[int]]:
    return [generation.output_ids for generation in generations]


def test_a_seed_repeats_an_answer_and_another_changes_it(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    make = [DenoisingParams(gen_length=24, temperature=1.0, seed=seed, ignore_eos=True) for seed in (1, 1, 2)]
    first, again, other = _text(local.generate([_request(local, "wide", params, PruningParams()) for params in make]))
    assert first == again != other


def test_bfloat16_answers_and_prunes(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT, dtype="bfloat16")
    denoising = DenoisingParams(gen_length=16, ignore_eos=True, cache="prefix")
    (generation,) = local.generate([_request(local, "wide", denoising, PruningParams(keep_ratio=0.25))])
    full = engine(CHECKPOINT)
    (expected,) = full.generate([_request(full, "wide", denoising, PruningParams(keep_ratio=0.25))])
    assert local.model.dtype == torch.bfloat16
    assert len(generation.output_ids) == 16
    ours, theirs = generation.steps[0].pruning, expected.steps[0].pruning
    assert ours is not None
    assert theirs is not None
    # bfloat16 has 8 bits: the ranking agrees in the large, not in every place.
    assert len(set(ours.kept) & set(theirs.kept)) >= 0.7 * len(theirs.kept)


def test_what_can_never_fit_is_refused_and_costs_nothing(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    huge = _request(local, "large", DenoisingParams(gen_length=5000), PruningParams())
    with pytest.raises(ValueError, match=r"prompt \(.* visual\) plus gen_length 5000 exceeds max_model_len 4096"):
        local.generate([_request(local, "wide", DenoisingParams(gen_length=4), PruningParams()), huge])
    small = LocalEngine(golden_data.checkpoint_dir(CHECKPOINT), dtype="float32", device=DEVICE, num_blocks=2)
    with pytest.raises(ValueError, match="give the engine more blocks"):
        small.generate([_request(small, "wide", DenoisingParams(gen_length=4), PruningParams())])
    assert local.blocks.num_free == local.blocks.num_blocks
