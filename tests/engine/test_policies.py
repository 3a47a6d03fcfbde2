"""Every policy against a slow loop written out here: whole attention maps, everything computed afresh at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import golden_data
from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import blocks_needed, slots_of
from redvtp.kv.rotary import apply_rotary
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.presets import PROGRESSIVE_STEPS
from redvtp.prompt import chat_prompt
from redvtp.pruning.importance import DIRECTIONS, feature_importance
from redvtp.reports import PruningReport

EngineFactory = Callable[..., LocalEngine]
CHECKPOINT = "tiny-llada-v"
GEN, BLOCK, STEPS = 16, 8, 8
DENOISING = DenoisingParams(gen_length=GEN, block_length=BLOCK, steps=STEPS, ignore_eos=True)
BETWEEN_STEPS = ("redvtp", "late", "progressive", "zipvl", "random", "uniform")
BEFORE = ("attention-free", "external")
PRESETS = (*BETWEEN_STEPS, *BEFORE)
VISUAL = {"square": 88, "two_pad_tensor": 32}


def _pruning(preset: str, case: str = "square", **knobs: Any) -> PruningParams:
    given = tuple(((7 * index) % 61) / 61 for index in range(VISUAL[case])) if preset == "external" else ()
    return PruningParams(preset=preset, importance=given, **{"keep_ratio": 0.3, **knobs})


def _request(local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams, case: str = "square") -> Request:
    images = tuple(golden_data.Case(CHECKPOINT, case).images())
    return Request(chat_prompt(local.tokenizer, "What is this?", len(images)), images, denoising, pruning)


def _sequence(local: LocalEngine, request: Request) -> Sequence:
    sequence = local.sequence(request, local.tokenize(request), [])
    sequence.resume(list(range(blocks_needed(sequence.total_length, local.cache.block_size))))
    return sequence


class _WholeMaps:
    """Attention without pages. weights: for each layer [heads, tokens, tokens]."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        keys, values = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        weights = (torch.einsum("qhd,khd->hqk", query, keys) / query.shape[-1] ** 0.5).softmax(-1)
        self.weights.append(weights)
        return torch.einsum("hqk,khd->qhd", weights, values)


@dataclass
class _SlowLoop:
    """cache=none, greedy, `even` steps. moments: {step: tokens that stay after it of `total`}."""

    local: LocalEngine
    request: Request
    rows: str = "masked"
    layers: slice = field(default_factory=lambda: slice(None))
    compact: bool = True
    canvases: list[list[int]] = field(default_factory=list)
    importances: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, list[int]] = field(default_factory=dict)

    @torch.inference_mode()
    def run(self, choose: Callable[[int, Tensor], Tensor | None]) -> None:
        """choose(step, importance of the tokens that are left): ascending indices of those that stay, or None."""
        local = self.local
        whole = replace(self.request, pruning=PruningParams(preset="none"))
        sequence = local.sequence(whole, local.tokenize(whole), [])
        embeds, visual = sequence.prompt.embeds, set(sequence.prompt.visual_rows.tolist())
        left = list(range(embeds.shape[0]))
        canvas = torch.full((GEN,), local.special.mask_id)
        model = local.model.language_model
        for step in range(-1, STEPS):
            at = torch.tensor([place for place, row in enumerate(left) if row in visual])
            if step < 0:
                stays = choose(step, torch.empty(0))
            else:
                prompt = len(left)
                first = prompt if self.compact else embeds.shape[0]
                places = torch.arange(prompt) if self.compact else torch.tensor(left)
                maps = _WholeMaps()
                hidden = torch.cat((embeds[left], local.model.embed(canvas)))
                hidden = model(hidden, torch.cat((places, first + torch.arange(GEN))), maps)
                logits = model.logits(hidden[prompt:], local.special.vocab).double()
                logits[:, list(local.special.suppressed)] = float("-inf")
                confidence, tokens = logits.softmax(-1).max(-1)
                block = step // (STEPS // (GEN // BLOCK))
                candidates = [
                    row for row in range(block * BLOCK, (block + 1) * BLOCK) if canvas[row] == local.special.mask_id
                ]
                committed = sorted(candidates, key=lambda row: -float(confidence[row]))[: GEN // STEPS]
                canvas[committed] = tokens[committed]
                self.canvases.append(canvas.tolist())
                text = [place for place in range(prompt) if place not in set(at.tolist())]
                scored = {
                    "masked": [prompt + row for row in range(GEN) if canvas[row] == local.special.mask_id],
                    "committed": [prompt + row for row in committed],
                    "response": list(range(prompt, prompt + GEN)),
                    "prompt": text,
                    "prompt_response": [*text, *range(prompt, prompt + GEN)],
                }[self.rows]
                if step == STEPS - 1:
                    break
                self.importances[step] = torch.stack(maps.weights[self.layers]).mean((0, 1))[scored][:, at].mean(0)
                stays = choose(step, self.importances[step])
            if stays is not None:
                self.kept[step] = stays.tolist()
                gone = set(at.tolist()) - set(at[stays].tolist())
                left = [row for place, row in enumerate(left) if place not in gone]


def _prunings(local: LocalEngine, request: Request) -> tuple[list[list[int]], dict[int, PruningReport]]:
    (generation,) = local.generate([request])
    assert local.blocks.num_free == local.blocks.num_blocks
    found = [report.pruning for report in generation.steps if report.pruning is not None]
    return [report.canvas for report in generation.steps], {pruning.step: pruning for pruning in found}


def _best(importance: Tensor, count: int) -> Tensor:
    return torch.tensor(sorted(importance.argsort(descending=True)[:count].tolist()))


def _compare(local: LocalEngine, request: Request, slow: _SlowLoop) -> None:
    canvases, prunings = _prunings(local, request)
    assert canvases == slow.canvases
    assert {step: pruning.kept for step, pruning in prunings.items()} == slow.kept
    for step, pruning in prunings.items():
        if step in slow.importances:
            torch.testing.assert_close(torch.tensor(pruning.importance), slow.importances[step], atol=1e-6, rtol=1e-4)


ATTENTION: dict[str, tuple[dict[str, Any], dict[int, int], slice]] = {
    # knobs, {step: tokens kept of 88}, layers
    "redvtp": ({}, {0: 26}, slice(None)),
    "original": ({"positions": "original"}, {0: 26}, slice(None)),
    "response": ({"score_rows": "response"}, {0: 26}, slice(None)),
    "prompt": ({"score_rows": "prompt"}, {0: 26}, slice(None)),
    "prompt_response": ({"score_rows": "prompt_response"}, {0: 26}, slice(None)),
    "committed": ({"score_rows": "committed"}, {0: 26}, slice(None)),
    "layers": ({"score_layers": "1:3"}, {0: 26}, slice(1, 3)),
    "one layer": ({"score_layers": "3"}, {0: 26}, slice(3, 4)),
    "late": ({"preset": "late"}, {3: 26}, slice(None)),
    "late, committed": ({"preset": "late", "score_rows": "committed", "prune_step": 5}, {5: 26}, slice(None)),
    # 0.3 ** (1/4), its square, its cube and 0.3 of 88.
    "progressive": ({"preset": "progressive"}, {0: 65, 1: 48, 2: 35, 3: 26}, slice(None)),
    "twice, late": (
        {"prune_step": 2, "prune_steps": 2, "positions": "original", "score_rows": "response"},
        {2: 48, 3: 26},
        slice(None),
    ),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_pruning_by_attention_is_that_of_the_slow_loop(engine: EngineFactory, name: str) -> None:
    local = engine(CHECKPOINT)
    knobs, counts, layers = ATTENTION[name]
    pruning = PruningParams(**{"keep_ratio": 0.3, **knobs})
    request = _request(local, DENOISING, pruning)
    slow = _SlowLoop(local, request, pruning.score_rows or "masked", layers, pruning.positions == "compact")
    slow.run(lambda step, importance: _best(importance, counts[step]) if step in counts else None)
    _compare(local, request, slow)


@pytest.mark.parametrize(("mass", "least", "most"), [(0.6, 0.05, 1.0), (0.9, 0.05, 0.2), (0.01, 0.5, 1.0)])
def test_attention_mass_keeps_the_smallest_set_within_its_limits(
    engine: EngineFactory, mass: float, least: float, most: float
) -> None:
    local = engine(CHECKPOINT)
    request = _request(
        local,
        DENOISING,
        PruningParams(preset="zipvl", attention_mass=mass, min_keep_ratio=least, max_keep_ratio=most),
    )

    def smallest(step: int, importance: Tensor) -> Tensor | None:
        if step != 0:
            return None
        count = 1
        while _best(importance, count).numel() < 88 and importance[_best(importance, count)].sum() < (
            mass * importance.sum()
        ):
            count += 1
        return _best(importance, min(max(count, max(1, int(88 * least))), int(88 * most)))

    slow = _SlowLoop(local, request)
    slow.run(smallest)
    assert 1 < len(slow.kept[0]) < 88
    _compare(local, request, slow)


def test_each_image_has_a_budget_of_its_own(engine: EngineFactory) -> None:
    """Two images of 16 tokens each."""
    local = engine(CHECKPOINT)
    request = _request(local, DENOISING, PruningParams(keep_ratio=0.25, prune_scope="image"), "two_pad_tensor")

    def of_each(step: int, importance: Tensor) -> Tensor | None:
        return torch.cat((_best(importance[:16], 4), 16 + _best(importance[16:], 4))) if step == 0 else None

    slow = _SlowLoop(local, request)
    slow.run(of_each)
    _compare(local, request, slow)


def test_given_importance_decides_before_the_first_forward(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    pruning = _pruning("external")
    request = _request(local, DENOISING, pruning)
    canvases, prunings = _prunings(local, request)
    (early,) = prunings.values()
    assert early.step == -1
    assert early.importance == pytest.approx(pruning.importance)
    # Some numbers come twice; which of the equals stay is open.
    kept = sorted((pruning.importance[index] for index in early.kept), reverse=True)
    assert kept == sorted(pruning.importance, reverse=True)[:26]
    slow = _SlowLoop(local, request)
    slow.run(lambda step, _: torch.tensor(early.kept) if step < 0 else None)
    assert canvases == slow.canvases


def test_features_decide_before_the_first_forward(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    request = _request(local, DENOISING, _pruning("attention-free"))
    whole = replace(request, pruning=PruningParams(preset="none"))
    sequence = local.sequence(whole, local.tokenize(whole), [])
    features = sequence.prompt.embeds[sequence.prompt.visual_rows].double()
    left, sizes, _ = torch.linalg.svd(features, full_matrices=False)
    expected = (left[:, :DIRECTIONS] * sizes[:DIRECTIONS]).norm(dim=1)
    canvases, prunings = _prunings(local, request)
    (early,) = prunings.values()
    assert early.step == -1
    torch.testing.assert_close(torch.tensor(early.importance), expected.float(), atol=0, rtol=1e-2)
    slow = _SlowLoop(local, request)
    slow.run(lambda step, _: torch.tensor(early.kept) if step < 0 else None)
    assert early.kept == _best(torch.tensor(early.importance), 26).tolist()
    assert canvases == slow.canvases


def test_importance_of_features_finds_the_leading_directions() -> None:
    """A steep spectrum, as image features have one, known exactly."""
    generator = torch.Generator().manual_seed(1)
    left, _ = torch.linalg.qr(torch.randn(300, 120, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(160, 120, generator=generator, dtype=torch.float64))
    sizes = 100 * 0.9 ** torch.arange(120, dtype=torch.float64)
    found = feature_importance(((left * sizes) @ right.T).float())
    expected = (left * sizes)[:, :DIRECTIONS].norm(dim=1)
    torch.testing.assert_close(found.double(), expected, atol=0, rtol=2e-3)
    assert torch.equal(found, feature_importance(((left * sizes) @ right.T).float()))
    assert feature_importance(torch.randn(1, 64)).shape == (1,)


@pytest.mark.parametrize("preset", PRESETS)
def test_keeping_everything_changes_nothing(engine: EngineFactory, preset: str) -> None:
    local = engine(CHECKPOINT)
    for cache in ("none", "prefix", "dual", "prefix_lm"):
        denoising = replace(DENOISING, cache=cache)
        presets = (_pruning(preset, keep_ratio=1.0), PruningParams(preset="none"))
        kept, plain = local.generate([_request(local, denoising, pruning) for pruning in presets])
        assert [step.canvas for step in kept.steps] == [step.canvas for step in plain.steps]
        assert sum(step.blocks_freed for step in kept.steps) == 0


@pytest.mark.parametrize("rows", ["masked", "response", "prompt", "prompt_response", "committed"])
@pytest.mark.parametrize("preset", PRESETS)
def test_refreshing_every_step_equals_no_cache(engine: EngineFactory, preset: str, rows: str) -> None:
    looks = preset in ("redvtp", "late", "progressive", "zipvl")
    if not looks and rows != "masked":
        return
    local = engine(CHECKPOINT)
    pruning = _pruning(preset, score_rows=rows if looks else None)
    plain = replace(DENOISING, seed=3)
    prefix = replace(plain, cache="prefix", refresh_interval=1)
    modes = (plain, prefix, replace(prefix, cache="dual"))
    a, *cached = local.generate([_request(local, denoising, pruning) for denoising in modes])
    for b in cached:
        assert [step.canvas for step in a.steps] == [step.canvas for step in b.steps]
        # On some processors a row's place in the batch decides the last bit of its products.
        prunings = [
            step.pruning
            and replace(step.pruning, importance=cast(Any, pytest.approx(step.pruning.importance, rel=1e-4, abs=1e-6)))
            for step in b.steps
        ]
        assert [step.pruning for step in a.steps] == prunings


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "prefix_lm"])
def test_progressive_ends_where_a_single_pruning_does(engine: EngineFactory, cache: str) -> None:
    local = engine(CHECKPOINT, block_size=4, max_model_len=512)
    denoising = replace(DENOISING, cache=cache)
    for scope in ("all", "image"):
        for case in VISUAL:
            several, once = local.generate(
                [
                    _request(local, denoising, _pruning(preset, prune_scope=scope, keep_ratio=0.2), case)
                    for preset in ("progressive", "redvtp")
                ]
            )
            assert several.steps[-1].kv_blocks == once.steps[-1].kv_blocks
            assert several.steps[-1].kv_tokens == once.steps[-1].kv_tokens
            freed = [step.blocks_freed for step in several.steps]
            assert sum(freed) == sum(step.blocks_freed for step in once.steps) > 0
            assert sum(count > 0 for count in freed) > 1
            assert [s.step for s in several.steps if s.pruning is not None] == list(range(PROGRESSIVE_STEPS))


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("cache", ["prefix", "dual", "prefix_lm"])
@torch.inference_mode()
def test_pages_after_several_prunings_are_those_of_a_fresh_cache(
    engine: EngineFactory, cache: str, positions: str
) -> None:
    """And what response steps score are the canvas rows' attention to those pages."""
    local = engine(CHECKPOINT)
    denoising = DenoisingParams(gen_length=GEN, steps=STEPS, ignore_eos=True, cache=cache)
    request = _request(local, denoising, _pruning("progressive", positions=positions))
    sequence = _sequence(local, request)
    prompt, visual = sequence.prompt.length, sequence.prompt.visual_rows.tolist()
    keys: list[Tensor] = []
    values: list[Tensor] = []
    dim = local.config.head_dim

    def remember(into: list[Tensor], linear: torch.nn.Module) -> Any:
        return linear.register_forward_hook(lambda _, __, out: into.append(out.clone().unflatten(1, (-1, dim))))

    hooks = [
        remember(into, layer.get_submodule(name))
        for layer in local.model.language_model.layers
        for into, name in ((keys, "self_attn.k_proj"), (values, "self_attn.v_proj"))
    ]
    (report,) = local.runner.step([sequence])
    for hook in hooks:
        hook.remove()
    layers = local.config.num_hidden_layers

    def fresh(layer: int) -> tuple[Tensor, Tensor]:
        places = torch.arange(len(left)) if positions == "compact" else torch.tensor(left)
        cos, sin = local.model.language_model.rotary.angles(places)
        return apply_rotary(keys[layer][left], cos, sin), values[layer][left]

    left = list(range(prompt))
    kept_visual = visual
    for step in range(4):
        if step:
            # Before the step is taken: its scores are of the canvas as it stands.
            canvas = sequence.canvas.tokens.clone()
            first = len(left) if positions == "compact" else prompt
            seen: list[Tensor] = []

            def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, seen: list[Tensor] = seen) -> Tensor:
                before, before_values = fresh(layer)
                group = query.shape[1] // key.shape[1]
                all_keys = torch.cat((before, key)).repeat_interleave(group, dim=1)
                all_values = torch.cat((before_values, value)).repeat_interleave(group, dim=1)
                weights = (torch.einsum("qhd,khd->hqk", query, all_keys) / dim**0.5).softmax(-1)
                seen.append(weights)
                return torch.einsum("hqk,khd->qhd", weights, all_values)

            local.model.language_model(local.model.embed(canvas), first + torch.arange(GEN), attend)
            (report,) = local.runner.step([sequence])
            assert report.kind == "response"
            undecided = sequence.canvas.masked().nonzero()[:, 0]
            at = [left.index(row) for row in kept_visual]
            importance = torch.stack(seen).mean((0, 1))[undecided][:, at].mean(0)
            assert report.pruning is not None
            torch.testing.assert_close(torch.tensor(report.pruning.importance), importance, atol=1e-5, rtol=1e-3)
        assert report.pruning is not None
        kept_visual = [kept_visual[index] for index in report.pruning.kept]
        left = [row for row in range(prompt) if row not in set(visual) - set(kept_visual)]
        assert sequence.prompt.length == len(left)
        slots = slots_of(torch.tensor(sequence.block_table), 0, len(left), local.cache.block_size)
        for layer in range(layers):
            stored_keys, stored_values = local.cache.read(layer, slots)
            expected_keys, expected_values = fresh(layer)
            torch.testing.assert_close(stored_keys, expected_keys, atol=3e-5, rtol=1e-5)
            assert torch.equal(stored_values, expected_values)


def test_a_step_that_scores_rows_it_would_read_is_a_full_one(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    cached = replace(DENOISING, cache="prefix", refresh_interval=DENOISING.gen_length)

    def kinds(**knobs: Any) -> list[str]:
        (generation,) = local.generate([_request(local, cached, PruningParams(keep_ratio=0.3, **knobs))])
        return [step.kind for step in generation.steps]

    usual = ["full", *["response"] * 3, "full", *["response"] * 3]
    assert kinds() == usual
    assert kinds(score_rows="masked", prune_step=2, prune_steps=4) == usual
    assert kinds(score_rows="committed", prune_step=5) == usual
    # Its rows are computed in the first canvas block, and no longer in the second.
    assert kinds(score_rows="response", prune_step=2) == usual
    assert kinds(score_rows="response", prune_step=5) == [*usual[:5], "full", *usual[6:]]
    assert kinds(score_rows="prompt", prune_step=2) == [*usual[:2], "full", *usual[3:]]


@torch.inference_mode()
def test_undecided_positions_of_finished_blocks_are_not_scored_in_response_steps(engine: EngineFactory) -> None:
    """A model may propose the mask id; a response step does not compute such a position of an earlier block."""
    local = engine(CHECKPOINT)
    request = _request(local, replace(DENOISING, cache="prefix"), PruningParams(keep_ratio=0.3, prune_step=5))

    def pruning(undecided_again: bool) -> PruningReport:
        sequence = _sequence(local, request)
        for _ in range(5):
            local.runner.step([sequence])
        if undecided_again:
            sequence.canvas.tokens[2] = local.special.mask_id
        (report,) = local.runner.step([sequence])
        assert report.kind == "response"
        assert report.pruning is not None
        return report.pruning

    assert pruning(undecided_again=True) == pruning(undecided_again=False)
