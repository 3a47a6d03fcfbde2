"""Visual tokens that leave a step half way: `llada-fastv` and `fastv` for good, `layer-skip` for the deeper layers.

Expected values come from a slow loop of its own (layer_reference.py), or from an invariant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import golden_data
from engine.layer_reference import SlowDecoder
from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import blocks_needed
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.pruning.budget import tokens_to_keep
from redvtp.reports import StepReport

EngineFactory = Callable[..., LocalEngine]
LAYERS = 4
CACHES = {
    "none": DenoisingParams(gen_length=16, block_length=8, steps=8, ignore_eos=True),
    "prefix": DenoisingParams(gen_length=16, block_length=8, steps=8, ignore_eos=True, cache="prefix"),
    "dual": DenoisingParams(gen_length=16, block_length=8, steps=8, ignore_eos=True, cache="dual"),
    "prefix_lm": DenoisingParams(gen_length=16, steps=8, ignore_eos=True, cache="prefix_lm"),
}


def _request(local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams, case: str = "wide") -> Request:
    images = tuple(golden_data.Case("tiny-llada-v", case).images())
    prompt = chat_prompt(local.tokenizer, "What is shown?", len(images), template=local.config.family.template)
    return Request(prompt, images, denoising, pruning)


@contextmanager
def _sequence(local: LocalEngine, request: Request) -> Iterator[Sequence]:
    blocks = local.blocks.allocate(24)
    assert blocks is not None
    try:
        yield local.sequence(request, local.tokenize(request), list(blocks))
    finally:
        local.blocks.free(blocks)


def _run(local: LocalEngine, sequence: Sequence) -> list[StepReport]:
    reports = []
    while not sequence.finished:
        reports += local.runner.step([sequence])
    return reports


def _expect_the_slow_way(local: LocalEngine, slow: SlowDecoder, reports: list[StepReport]) -> None:
    assert [report.canvas for report in reports] == slow.canvases
    prunings = [report.pruning for report in reports if report.pruning is not None]
    assert [pruning.kept for pruning in prunings] == slow.kept
    assert [pruning.layer for pruning in prunings] == [slow.layer] * len(slow.kept)
    for pruning, importance in zip(prunings, slow.importances, strict=True):
        torch.testing.assert_close(torch.tensor(pruning.importance), importance, atol=1e-6, rtol=1e-4)
    # A row counts for the layers it went through.
    rows = [-(-sum(layers) // len(layers)) for layers in slow.rows_run]
    assert [report.tokens_computed for report in reports] == rows


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layer", range(LAYERS))
def test_dropping_behind_a_layer_is_the_slow_way(engine: EngineFactory, layer: int, cache: str, positions: str) -> None:
    local = engine("tiny-llada-v")
    pruning = PruningParams(preset="llada-fastv", keep_ratio=0.3, prune_layer=layer, positions=positions)
    with _sequence(local, _request(local, CACHES[cache], pruning)) as sequence:
        drops = {0: tokens_to_keep(sequence.prompt.num_visual, 0.3)}
        slow = SlowDecoder(local, sequence, layer, drops, positions=positions).run()
        _expect_the_slow_way(local, slow, _run(local, sequence))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("step", [1, 5])
def test_a_later_step_can_drop_behind_a_layer(engine: EngineFactory, step: int, cache: str) -> None:
    """Where it is a response step, the deeper layers read the survivors from pages."""
    local = engine("tiny-lavida-dream")
    pruning = PruningParams(preset="llada-fastv", keep_ratio=0.4, prune_layer=1, prune_step=step)
    with _sequence(local, _request(local, CACHES[cache], pruning)) as sequence:
        drops = {step: tokens_to_keep(sequence.prompt.num_visual, 0.4)}
        slow = SlowDecoder(local, sequence, 1, drops).run()
        _expect_the_slow_way(local, slow, _run(local, sequence))


def test_several_drops_behind_a_layer(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v")
    pruning = PruningParams(preset="llada-fastv", keep_ratio=0.25, prune_layer=2, prune_steps=2)
    with _sequence(local, _request(local, CACHES["prefix"], pruning)) as sequence:
        drops = {step: tokens_to_keep(sequence.prompt.num_visual, share) for step, share in enumerate((0.5, 0.25))}
        slow = SlowDecoder(local, sequence, 2, drops).run()
        assert len(slow.kept) == 2
        _expect_the_slow_way(local, slow, _run(local, sequence))


@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida-dream"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layer", [0, 2])
def test_withdrawing_behind_a_layer_is_the_slow_way(
    engine: EngineFactory, layer: int, cache: str, checkpoint: str
) -> None:
    local = engine(checkpoint)
    pruning = PruningParams(preset="layer-skip", prune_layer=layer)
    with _sequence(local, _request(local, CACHES[cache], pruning)) as sequence:
        slow = SlowDecoder(local, sequence, layer, withdraw=True, positions="original").run()
        reports = _run(local, sequence)
        _expect_the_slow_way(local, slow, reports)
        assert {report.blocks_freed for report in reports} == {0}


@pytest.mark.parametrize("interval", [None, 2])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida-dream"])
def test_block_caches_are_the_slow_way(
    engine: EngineFactory, checkpoint: str, cache: str, interval: int | None
) -> None:
    local = engine(checkpoint)
    denoising = DenoisingParams(
        gen_length=20, block_length=8, steps=12, ignore_eos=True, cache=cache, refresh_interval=interval
    )
    with _sequence(local, _request(local, denoising, PruningParams(preset="none"))) as sequence:
        slow = SlowDecoder(local, sequence, 0).run()
        _expect_the_slow_way(local, slow, _run(local, sequence))


@pytest.mark.parametrize("rows", ["masked", "response"])
def test_the_rows_that_look_are_those_asked_for(engine: EngineFactory, rows: str) -> None:
    """In a later step, where some of the response is decided, the two differ."""
    local = engine("tiny-llada-v")
    pruning = PruningParams(preset="fastv", keep_ratio=0.3, prune_step=3, score_rows=rows)
    with _sequence(local, _request(local, CACHES["none"], pruning)) as sequence:
        slow = SlowDecoder(local, sequence, 1, {3: tokens_to_keep(sequence.prompt.num_visual, 0.3)}, rows=rows).run()
        _expect_the_slow_way(local, slow, _run(local, sequence))


@pytest.mark.parametrize("preset", ["llada-fastv", "layer-skip"])
def test_deeper_layers_run_on_fewer_rows(engine: EngineFactory, preset: str) -> None:
    local = engine("tiny-llada-v")
    rows: list[list[int]] = [[] for _ in range(LAYERS)]
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, index=index: rows[index].append(args[0].shape[0]))
        for index, layer in enumerate(local.model.language_model.layers)
    ]
    pruning = PruningParams(preset=preset, keep_ratio=0.25, prune_layer=1)
    try:
        with _sequence(local, _request(local, CACHES["none"], pruning)) as sequence:
            dense, visual = sequence.total_length, sequence.prompt.num_visual
            first, second = local.runner.step([sequence]) + local.runner.step([sequence])
    finally:
        for hook in hooks:
            hook.remove()
    left = dense - visual + (int(0.25 * visual) if preset == "llada-fastv" else 0)
    later = left if preset == "llada-fastv" else dense
    assert rows == [[dense, later], [dense, later], [dense - (dense - left), left], [left, left]]
    assert first.tokens_computed == (dense + left + 1) // 2
    assert first.kv_tokens == later
    assert first.kv_blocks == blocks_needed(later, local.cache.block_size)
    assert second.tokens_computed == (later + left + 1) // 2


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("preset", ["llada-fastv", "fastv", "layer-skip"])
def test_keeping_everything_changes_nothing(engine: EngineFactory, preset: str, cache: str) -> None:
    local = engine("tiny-llada-v")
    presets = (PruningParams(preset=preset, keep_ratio=1.0), PruningParams(preset="none"))
    kept, plain = local.generate([_request(local, CACHES[cache], pruning) for pruning in presets])
    assert [step.canvas for step in kept.steps] == [step.canvas for step in plain.steps]
    assert {step.blocks_freed for step in kept.steps} == {0}


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("preset", ["llada-fastv", "fastv", "layer-skip"])
def test_refreshing_every_step_equals_no_cache(engine: EngineFactory, preset: str, positions: str) -> None:
    local = engine("tiny-llada-v")
    cached = replace(CACHES["dual"], refresh_interval=1)
    pruning = PruningParams(preset=preset, keep_ratio=0.3, positions=positions)
    a, b = local.generate([_request(local, denoising, pruning) for denoising in (CACHES["none"], cached)])
    assert [step.canvas for step in a.steps] == [step.canvas for step in b.steps]


@pytest.mark.parametrize("cache", CACHES)
def test_a_step_that_leaves_nothing_to_decide_has_dropped_all_the_same(engine: EngineFactory, cache: str) -> None:
    local = engine("tiny-llada-v")
    denoising = DenoisingParams(gen_length=8, steps=1, ignore_eos=True, cache=cache)
    pruning = PruningParams(preset="llada-fastv", keep_ratio=0.25)
    with _sequence(local, _request(local, denoising, pruning)) as sequence:
        visual = sequence.prompt.num_visual
        slow = SlowDecoder(local, sequence, 1, {0: int(0.25 * visual)}).run()
        (report,) = _run(local, sequence)
        _expect_the_slow_way(local, slow, [report])
        assert report.finished
        assert report.blocks_freed == blocks_needed(report.kv_tokens + visual - visual // 4, 32) - report.kv_blocks


MIXED = [
    ("wide", CACHES["none"], PruningParams(preset="llada-fastv", keep_ratio=0.3)),
    ("tall", CACHES["prefix"], PruningParams(preset="fastv", keep_ratio=0.2, prune_layer=0)),
    ("square", CACHES["prefix_lm"], PruningParams(preset="llada-fastv", keep_ratio=0.5, prune_layer=2)),
    ("wide", CACHES["prefix"], PruningParams(preset="layer-skip", prune_layer=1)),
    ("text_only", CACHES["none"], PruningParams(preset="llada-fastv")),
    ("square", CACHES["prefix_lm"], PruningParams(preset="layer-skip")),
    ("tall", CACHES["none"], PruningParams(keep_ratio=0.25)),
    ("two_pad_tensor", CACHES["prefix"], PruningParams(preset="none")),
    ("wide", CACHES["prefix"], PruningParams(preset="llada-fastv", keep_ratio=0.3, prune_step=2)),
    ("tall", CACHES["dual"], PruningParams(preset="llada-fastv", keep_ratio=0.3)),
    ("wide", CACHES["dual"], PruningParams(preset="progressive", keep_ratio=0.3, prune_step=1, prune_steps=5)),
    ("square", CACHES["prefix_lm"], PruningParams(preset="llada-fastv", prune_step=3, positions="original")),
]


def _mixed(local: LocalEngine) -> list[Request]:
    return [_request(local, denoising, pruning, case) for case, denoising, pruning in MIXED]


def test_neighbours_that_are_cut_elsewhere_change_nothing(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v", max_num_seqs=len(MIXED))
    together = local.generate(_mixed(local))
    alone = [local.generate([request])[0] for request in _mixed(local)]
    assert [[step.canvas for step in g.steps] for g in together] == [[step.canvas for step in g.steps] for g in alone]
    assert [[step.tokens_computed for step in g.steps] for g in together] == [
        [step.tokens_computed for step in g.steps] for g in alone
    ]
    assert local.blocks.num_free == local.blocks.num_blocks


def test_a_failed_step_is_taken_back(engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that fails behind the layer where tokens were dropped, with pages of the deeper layers moved."""
    local = engine("tiny-llada-v")
    for case, denoising, pruning in MIXED:
        request = _request(local, denoising, pruning, case)
        with _sequence(local, request) as sequence:
            expected = [report.canvas for report in _run(local, sequence)]
        with _sequence(local, request) as sequence:
            canvases = []
            while not sequence.finished:
                restore = sequence.snapshot()
                with monkeypatch.context() as patch:
                    patch.setattr(local.model.language_model, "logits", _fail)
                    with pytest.raises(ZeroDivisionError):
                        local.runner.step([sequence])
                restore()
                (report,) = local.runner.step([sequence])
                canvases.append(report.canvas)
        assert canvases == expected


def _fail(*_: object) -> torch.Tensor:
    raise ZeroDivisionError


def test_an_observer_hears_of_steps_that_are_cut(engine: EngineFactory) -> None:
    local = engine("tiny-llada-v")
    heard: list[tuple[str, int, int]] = []
    local.runner.observe = lambda sequence, step, importance: heard.append(
        (sequence.request_id, step, importance.numel())
    )
    try:
        pruned, skipping = local.generate(
            [
                _request(local, CACHES["none"], PruningParams(preset=preset, keep_ratio=0.25, prune_layer=1))
                for preset in ("llada-fastv", "layer-skip")
            ]
        )
    finally:
        local.runner.observe = None
    visual, steps = pruned.visual_tokens, len(skipping.steps)
    assert [entry for entry in heard if entry[0] == "1"] == [("1", step, visual) for step in range(steps - 1)]
    kept = int(0.25 * visual)
    assert [entry for entry in heard if entry[0] == "0"] == [
        ("0", step, kept if step else visual) for step in range(len(pruned.steps) - 1)
    ]
