"""A sequence whose pages are taken away and given back elsewhere ends with the tokens it would have had.

Between the two every page of the cache is filled with rubbish, as if others had used it.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import replace

import pytest
import torch

import golden_data
from redvtp.denoising.planner import plan_step, rows_without_visual, withdraw_layer
from redvtp.denoising.restore import restore_pages
from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import slots_of
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.reports import StepReport

EngineFactory = Callable[..., LocalEngine]

PRUNED = PruningParams(keep_ratio=0.3)
MODES = {
    "none": DenoisingParams(gen_length=20, steps=10, ignore_eos=True),
    "prefix": DenoisingParams(gen_length=24, block_length=8, steps=16, cache="prefix", ignore_eos=True),
    "prefix-refreshed": DenoisingParams(gen_length=24, steps=12, cache="prefix", refresh_interval=5, ignore_eos=True),
    "dual": DenoisingParams(gen_length=24, block_length=8, steps=16, cache="dual", ignore_eos=True, suffix=" yes"),
    "dual-refreshed": DenoisingParams(
        gen_length=24, block_length=12, steps=16, cache="dual", refresh_interval=3, ignore_eos=True
    ),
    "prefix_lm": DenoisingParams(gen_length=20, steps=10, cache="prefix_lm", ignore_eos=True),
    "prefix-sampled": DenoisingParams(
        gen_length=20, block_length=10, steps=10, cache="prefix", temperature=0.9, seed=3, suffix=" yes"
    ),
    "prefix-threshold": DenoisingParams(
        gen_length=20, block_length=8, cache="prefix", refresh_interval=5, threshold=1.5, ignore_eos=True
    ),
    "dual-threshold": DenoisingParams(gen_length=20, block_length=8, cache="dual", threshold=1.5, ignore_eos=True),
    "prefix_lm-min-confidence": DenoisingParams(
        gen_length=20, block_length=8, cache="prefix_lm", min_confidence=0.5, temperature=0.5, seed=6, ignore_eos=True
    ),
    "prefix_lm-random": DenoisingParams(gen_length=20, steps=10, cache="prefix_lm", remasking="random", seed=4),
}
PRUNINGS = {
    "dense": PruningParams(preset="none"),
    "compact": PRUNED,
    "original": PruningParams(keep_ratio=0.3, positions="original"),
    "inside": PruningParams(preset="llada-fastv", keep_ratio=0.3),
    "inside-later": PruningParams(preset="llada-fastv", keep_ratio=0.3, prune_step=1, prune_layer=0),
    "withdrawn": PruningParams(preset="layer-skip", prune_layer=1),
    "late": PruningParams(preset="late", keep_ratio=0.3),
    "several": PruningParams(preset="progressive", keep_ratio=0.3),
    "several-late": PruningParams(
        keep_ratio=0.3, prune_step=2, prune_steps=3, positions="original", score_rows="response"
    ),
    "chance": PruningParams(preset="random", keep_ratio=0.3, prune_step=1, prune_steps=2),
    "before": PruningParams(preset="attention-free", keep_ratio=0.3),
}


def _sequence(local: LocalEngine, denoising: DenoisingParams, pruning: PruningParams) -> Sequence:
    images = tuple(golden_data.Case("tiny-llada-v", "wide").images())
    prompt = chat_prompt(local.tokenizer, "What is shown?", len(images), template=local.config.family.template)
    # For the pruning by chance, in modes that draw nothing themselves.
    denoising = replace(denoising, seed=denoising.seed or 2)
    request = Request(prompt, images, denoising, pruning)
    sequence = local.sequence(request, local.tokenize(request), [])
    sequence.resume(_blocks(local, sequence, 0))
    return sequence


def _blocks(local: LocalEngine, sequence: Sequence, number: int) -> list[int]:
    """A block table for it; each number gives other blocks."""
    count = -(-sequence.total_length // local.cache.block_size)
    return [(7 * number + 5 * block) % local.cache.num_blocks for block in range(count)]


def _spoil(local: LocalEngine) -> None:
    for pages in (*local.cache.keys, *local.cache.values):
        pages.fill_(float("nan"))


def _run(local: LocalEngine, sequence: Sequence, suspended_before: Set[int]) -> list[StepReport]:
    reports: list[StepReport] = []
    while not sequence.finished:
        if len(reports) in suspended_before:
            sequence.suspend()
            _spoil(local)
            sequence.resume(_blocks(local, sequence, len(reports)))
        reports += local.runner.step([sequence])
    return reports


@pytest.fixture
def local(engine: EngineFactory) -> LocalEngine:
    # A prime number of blocks, so that _blocks never gives one twice.
    return engine("tiny-llada-v", num_blocks=31, max_model_len=512)


@pytest.fixture(params=["tiny-llada-v", "tiny-lavida-dream"])
def any_local(engine: EngineFactory, request: pytest.FixtureRequest) -> LocalEngine:
    return engine(request.param, num_blocks=31, max_model_len=512)


@pytest.mark.parametrize(
    "pruning",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "compact")) for name in PRUNINGS],
)
@pytest.mark.parametrize("mode", MODES)
def test_suspended_before_every_step(any_local: LocalEngine, mode: str, pruning: str) -> None:
    params = MODES[mode], PRUNINGS[pruning]
    expected = [report.canvas for report in _run(any_local, _sequence(any_local, *params), set())]
    reports = _run(any_local, _sequence(any_local, *params), set(range(100)))
    assert [report.canvas for report in reports] == expected


@pytest.mark.parametrize(
    "mode", ["prefix", "prefix-refreshed", "prefix-threshold", "dual", "dual-refreshed", "prefix_lm"]
)
def test_suspended_once_before_any_step(local: LocalEngine, mode: str) -> None:
    whole = _run(local, _sequence(local, MODES[mode], PRUNED), set())
    for step in range(len(whole)):
        again = _run(local, _sequence(local, MODES[mode], PRUNED), {step})
        assert [report.canvas for report in again] == [report.canvas for report in whole], step
        assert [report.new_tokens for report in again] == [report.new_tokens for report in whole], step


@pytest.mark.slow
@pytest.mark.parametrize("pruning", PRUNINGS)
@pytest.mark.parametrize("steps", [4, 9])
@pytest.mark.parametrize("mode", ["prefix", "dual", "prefix_lm"])
@torch.inference_mode()
def test_rewritten_pages_are_the_pages(local: LocalEngine, mode: str, pruning: str, steps: int) -> None:
    """Bit for bit, all layers: also what no token happens to depend on. Four steps are within the first canvas block,
    nine within the second."""
    sequence = _sequence(local, MODES[mode], PRUNINGS[pruning])
    for _ in range(steps):
        local.runner.step([sequence])
    plan, total = plan_step(sequence), sequence.total_length
    assert plan.first_row > 0
    # After a pruning the whole canvas is computed.
    assert plan.end_row == total if mode != "dual" else plan.end_row < total or steps == 4
    read = torch.ones(total, dtype=torch.bool)
    read[plan.first_row : plan.end_row] = False
    slots = slots_of(torch.tensor(sequence.block_table), 0, total, local.cache.block_size)[read]
    before = [local.cache.read(layer, slots) for layer in range(local.cache.num_layers)]
    sequence.suspend()
    _spoil(local)
    sequence.resume(_blocks(local, sequence, 3))
    restore_pages(local.runner.context, local.runner.begin([sequence]))
    slots = slots_of(torch.tensor(sequence.block_table), 0, total, local.cache.block_size)[read]
    seen = rows_without_visual(sequence)[read]
    for layer, (key, value) in enumerate(before):
        keys, values = local.cache.read(layer, slots)
        hidden = withdraw_layer(sequence)
        behind = hidden is not None and layer > hidden
        # Nobody writes there what nobody reads.
        rows = seen if behind else torch.ones_like(seen)
        assert torch.equal(keys[rows], key[rows])
        assert torch.equal(values[rows], value[rows])


def test_rewriting_is_counted_and_announced(local: LocalEngine) -> None:
    sequence = _sequence(local, MODES["prefix"], PRUNED)
    whole = sequence.total_length
    (first,) = local.runner.step([sequence])
    assert first.tokens_computed == whole
    sequence.suspend()
    sequence.resume(_blocks(local, sequence, 2))
    (second,) = local.runner.step([sequence])
    assert second.kind == "response"
    assert second.tokens_computed == first.resume_tokens == first.next_tokens + whole


def test_neighbours_of_a_resumed_sequence_keep_their_tokens(local: LocalEngine) -> None:
    """Two that are resumed in one step, and one that was never suspended."""
    modes = [MODES["dual"], MODES["prefix_lm"], MODES["none"]]
    expected = [_run(local, _sequence(local, mode, PRUNED), set())[-1].canvas for mode in modes]
    batch = [_sequence(local, mode, PRUNED) for mode in modes]
    tables = [list(range(10 * index, 10 * index + 10)) for index in range(3)]
    for sequence, table in zip(batch, tables, strict=True):
        sequence.resume(table[: len(sequence.block_table)])
    for _ in range(3):
        local.runner.step(batch)
    for sequence in batch[:2]:
        sequence.suspend()
    for pages in (*local.cache.keys, *local.cache.values):
        pages[:20] = float("nan")
    for sequence, table in zip(batch[:2], reversed(tables[:2]), strict=True):
        sequence.resume(table)
    while running := [sequence for sequence in batch if not sequence.finished]:
        local.runner.step(running)
    assert [sequence.canvas.tokens.tolist() for sequence in batch] == expected


def test_nothing_is_remembered_that_no_step_reads(local: LocalEngine) -> None:
    """Embeddings of dropped tokens must not outlive the pages they went into."""
    sequence = _sequence(local, MODES["none"], PRUNED)
    local.runner.step([sequence])
    assert sequence.pages.prompt_forward is None
    cached = _sequence(local, replace(MODES["prefix"], refresh_interval=8), PRUNED)
    dense = cached.prompt.length
    while cached.canvas.block == 0:
        local.runner.step([cached])
    local.runner.step([cached])
    assert cached.pages.prompt_forward is not None
    assert cached.pages.prompt_forward.prompt_embeds.shape[0] == cached.prompt.length < dense
