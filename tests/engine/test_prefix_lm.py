"""`cache=prefix_lm`: the prompt is computed once, alone, and lives in pages, where RedVTP moves its survivors together.

Expected values come from a slow forward written out here: plain attention with an explicit mask, keys rotated afresh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import golden_data
from devices import DEVICE
from one_step import encode_prompt, response_hidden
from redvtp.canvas.canvas import Canvas
from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import blocks_needed, slots_of
from redvtp.kv.rotary import apply_rotary
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

EngineFactory = Callable[..., LocalEngine]
CHECKPOINTS = ("tiny-lavida", "tiny-lavida-dream")
PREFIX_LM = DenoisingParams(gen_length=16, steps=8, ignore_eos=True, cache="prefix_lm")


def _request(engine: LocalEngine, checkpoint: str, denoising: DenoisingParams, pruning: PruningParams) -> Request:
    images = tuple(golden_data.Case(checkpoint, "wide").images())
    template = engine.config.family.template
    prompt = chat_prompt(engine.tokenizer, "What is shown?", len(images), template=template)
    return Request(prompt, images, denoising, pruning)


@contextmanager
def _sequence(local: LocalEngine, request: Request) -> Iterator[Sequence]:
    blocks = local.blocks.allocate(32)
    assert blocks is not None
    try:
        yield local.sequence(request, local.tokenize(request), list(blocks))
    finally:
        local.blocks.free(blocks)


class _PromptKeys:
    """Records what every layer computes for the prompt when it is encoded: keys before rotation, and values."""

    def __init__(self, local: LocalEngine) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._head_dim = local.config.head_dim
        self._hooks = [
            hook
            for layer in local.model.language_model.layers
            for hook in (
                layer.get_submodule("self_attn.k_proj").register_forward_hook(
                    lambda _, __, out: self.keys.append(self._heads(out))
                ),
                layer.get_submodule("self_attn.v_proj").register_forward_hook(
                    lambda _, __, out: self.values.append(self._heads(out))
                ),
            )
        ]

    def _heads(self, out: Tensor) -> Tensor:
        return out.clone().view(out.shape[0], -1, self._head_dim)

    def __enter__(self) -> _PromptKeys:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


class _SlowAttention:
    """Canvas queries to given prompt keys and their own; remembers the weights [layers, heads, rows, keys]."""

    def __init__(self, keys: list[Tensor], values: list[Tensor]) -> None:
        self.keys, self.values = keys, values
        self.weights: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        keys = torch.cat((self.keys[layer], key)).repeat_interleave(group, dim=1)
        values = torch.cat((self.values[layer], value)).repeat_interleave(group, dim=1)
        weights = (torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5).softmax(-1)
        self.weights.append(weights)
        return torch.einsum("hqk,khd->qhd", weights, values)


def _rotated(local: LocalEngine, keys: list[Tensor], positions: Tensor) -> list[Tensor]:
    cos, sin = local.model.language_model.rotary.angles(positions)
    return [apply_rotary(part, cos, sin) for part in keys]


def _canvas_logits(local: LocalEngine, sequence: Sequence, attention: _SlowAttention, first_position: int) -> Tensor:
    """Logits about the canvas, computed from the canvas alone and the prompt keys in `attention`."""
    tokens = sequence.canvas.tokens
    hidden = local.model.language_model(
        local.model.embed(tokens), first_position + torch.arange(tokens.numel()), attention
    )
    if sequence.shifted_logits:
        hidden = torch.cat((hidden[:1], hidden[:-1]))
    return local.model.language_model.logits(hidden, local.special.vocab)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("positions", ["compact", "original"])
@torch.inference_mode()
def test_scores_survivors_pages_and_next_logits_are_those_of_the_slow_way(
    engine: EngineFactory, checkpoint: str, positions: str
) -> None:
    local = engine(checkpoint)
    pruning = PruningParams(keep_ratio=0.3, positions=positions)
    with _sequence(local, _request(local, checkpoint, PREFIX_LM, pruning)) as sequence:
        prompt, visual = sequence.prompt.length, sequence.prompt.visual_rows.clone()
        layers = local.config.num_hidden_layers
        with _PromptKeys(local) as seen:
            (report,) = local.runner.step([sequence])
        # The prompt came first, by itself; what the hooks saw after that is the canvas.
        keys, values = seen.keys[:layers], seen.values[:layers]
        assert [part.shape[0] for part in keys] == [prompt] * layers
        assert [part.shape[0] for part in seen.keys[layers:]] == [16] * layers

        slow = _SlowAttention(_rotated(local, keys, torch.arange(prompt)), values)
        before = Canvas(16, 16, 8, local.special.mask_id)
        if sequence.shifted_logits:
            before.decide(0, int(sequence.canvas.tokens[0]))
        after, sequence.canvas = sequence.canvas, before
        _canvas_logits(local, sequence, slow, prompt)
        sequence.canvas = after
        undecided = after.masked().nonzero()[:, 0]
        importance = torch.stack(slow.weights).mean((0, 1))[undecided][:, visual].mean(0)
        assert report.pruning is not None
        torch.testing.assert_close(torch.tensor(report.pruning.importance), importance, atol=1e-6, rtol=0)
        assert report.pruning.kept == importance.topk(int(0.3 * visual.numel())).indices.sort().values.tolist()

        dropped = set(visual.tolist()) - set(visual[report.pruning.kept].tolist())
        rows = torch.tensor([row for row in range(prompt) if row not in dropped])
        places = torch.arange(rows.numel()) if positions == "compact" else rows
        expected_keys = _rotated(local, [part[rows] for part in keys], places)
        expected_values = [part[rows] for part in values]
        slots = slots_of(torch.tensor(sequence.block_table), 0, rows.numel(), local.cache.block_size)
        for layer in range(layers):
            stored_keys, stored_values = local.cache.read(layer, slots)
            torch.testing.assert_close(stored_keys, expected_keys[layer], atol=2e-5, rtol=1e-5)
            assert torch.equal(stored_values, expected_values[layer])

        hidden = response_hidden(local, sequence, torch.arange(16))
        ours = local.model.language_model.logits(hidden, local.special.vocab)
        first_position = rows.numel() if positions == "compact" else prompt
        pruned = _SlowAttention(expected_keys, expected_values)
        torch.testing.assert_close(ours, _canvas_logits(local, sequence, pruned, first_position), atol=3e-4, rtol=0)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_prompt_is_computed_once_and_its_blocks_come_back_early(checkpoint: str) -> None:
    local = LocalEngine(golden_data.checkpoint_dir(checkpoint), dtype="float32", device=DEVICE, block_size=8)
    computed: list[int] = []
    local.model.language_model.register_forward_pre_hook(lambda _, args: computed.append(args[0].shape[0]))
    request = _request(local, checkpoint, PREFIX_LM, PruningParams(keep_ratio=0.25))
    (generation,) = local.generate([request])
    prompt, steps = generation.prompt_tokens, generation.steps
    assert computed == [prompt, *[16] * len(steps)]
    assert [(step.kind, step.tokens_computed) for step in steps] == [
        ("full", prompt + 16), *[("response", 16)] * (len(steps) - 1)
    ]  # fmt: skip
    pruning = steps[0].pruning
    assert pruning is not None
    kept = prompt - pruning.visual_before + pruning.visual_after
    assert [step.prompt_length for step in steps] == [kept] * len(steps)
    assert steps[0].blocks_freed == blocks_needed(prompt + 16, 8) - blocks_needed(kept + 16, 8) > 0
    assert all(step.blocks_freed == 0 for step in steps[1:])
    assert local.blocks.num_free == local.blocks.num_blocks


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_keeping_everything_or_deciding_all_at_once_changes_nothing(engine: EngineFactory, checkpoint: str) -> None:
    local = engine(checkpoint)
    kept, plain, at_once = local.generate(
        [
            _request(local, checkpoint, PREFIX_LM, PruningParams(keep_ratio=1.0)),
            _request(local, checkpoint, PREFIX_LM, PruningParams(preset="none")),
            _request(
                local,
                checkpoint,
                DenoisingParams(gen_length=8, steps=1, cache="prefix_lm", ignore_eos=True),
                PruningParams(keep_ratio=0.25),
            ),
        ]
    )
    assert [step.canvas for step in kept.steps] == [step.canvas for step in plain.steps]
    # No row is left undecided: there is nothing to prune for, and nothing is pruned.
    assert [step.pruning for step in at_once.steps] == [None]
    assert at_once.steps[0].blocks_freed == 0


def test_an_end_right_behind_the_prompt_ends_the_answer(engine: EngineFactory) -> None:
    """Dream's first token comes from the prompt; when it is a stop there is no canvas to denoise."""
    local = engine("tiny-lavida-dream")
    free = local.blocks.num_free
    with _sequence(local, _request(local, "tiny-lavida-dream", PREFIX_LM, PruningParams())) as sequence:
        encode_prompt(local, sequence)
        first = int(sequence.canvas.tokens[0])
    assert first != local.special.mask_id
    with _sequence(local, _request(local, "tiny-lavida-dream", PREFIX_LM, PruningParams())) as sequence:
        sequence.canvas = Canvas(16, 16, 8, local.special.mask_id, ((first,),))
        (report,) = local.runner.step([sequence])
        assert report.finished
        assert report.finish_reason == "stop"
        assert report.new_tokens == [first]
        assert report.pruning is None
        assert sequence.output_ids == []
    assert local.blocks.num_free == free
