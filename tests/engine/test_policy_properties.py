"""What must hold of any batch of requests, however they prune: no memory is lost, shared or taken beyond admission.

The language model of a tiny checkpoint runs on random embeddings, so lengths and images are free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.kv.blocks import BlockPool, blocks_needed, slots_of
from redvtp.kv.pages import PagedKVCache
from redvtp.local import LocalEngine
from redvtp.params import DenoisingParams, PruningParams
from redvtp.pruning.resolve import policy_for
from redvtp.reports import StepReport

EngineFactory = Callable[..., LocalEngine]
LAYERS = 4
ROWS = ("masked", "response", "prompt", "prompt_response", "committed")


@dataclass
class _Request:
    denoising: DenoisingParams
    pruning: PruningParams
    spans: tuple[tuple[int, int], ...]
    prompt: int

    @property
    def images(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in self.spans)


@st.composite
def _requests(draw: st.DrawFn) -> _Request:
    spans = []
    prompt = draw(st.integers(1, 6))
    for _ in range(draw(st.integers(0, 3))):
        visual = draw(st.integers(1, 24))
        spans.append((prompt, prompt + visual))
        prompt += visual + draw(st.integers(0, 4))
    gen = draw(st.integers(2, 14))
    block = draw(st.integers(1, gen))
    steps = draw(st.integers(-(-gen // block), gen))
    cache = draw(st.sampled_from(["none", "prefix", "dual", "prefix_lm"]))
    denoising = DenoisingParams(
        gen_length=gen,
        block_length=block,
        steps=steps,
        cache=cache,
        refresh_interval=draw(st.none() | st.integers(1, 4)),
        seed=draw(st.integers(0, 9)),
        temperature=draw(st.sampled_from([0.0, 1.0])),
        ignore_eos=True,
    )
    preset = draw(
        st.sampled_from(
            [
                "redvtp",
                "late",
                "progressive",
                "zipvl",
                "random",
                "uniform",
                "attention-free",
                "external",
                "none",
                "llada-fastv",
                "fastv",
                "layer-skip",
            ]
        )
    )
    knobs: dict[str, Any] = {
        "keep_ratio": draw(st.floats(0.01, 1.0)),
        "positions": draw(st.sampled_from(["compact", "original"])),
        "prune_scope": draw(st.sampled_from(["all", "image"])),
    }
    if preset in ("redvtp", "late", "progressive", "zipvl"):
        knobs["score_rows"] = draw(
            st.sampled_from(ROWS if cache != "prefix_lm" else ("masked", "response", "committed"))
        )
        knobs["score_layers"] = draw(st.sampled_from([None, "0", "1:3", "3"]))
        if draw(st.booleans()):
            knobs["attention_mass"] = draw(st.floats(0.01, 1.0))
            knobs["min_keep_ratio"] = draw(st.floats(0.01, 0.4))
            knobs["max_keep_ratio"] = draw(st.floats(0.4, 1.0))
    if preset in ("redvtp", "progressive", "llada-fastv", "fastv", "layer-skip") and draw(st.booleans()):
        knobs["prune_layer"] = draw(st.integers(0, LAYERS - 1))
        knobs |= {"score_rows": draw(st.sampled_from([None, "masked", "response"]))} if preset != "layer-skip" else {}
        knobs.pop("score_layers", None)
    if preset not in ("attention-free", "external", "none", "layer-skip"):
        last = max(0, steps - 2)
        first = draw(st.none() | st.integers(0, last))
        knobs["prune_step"] = first
        knobs["prune_steps"] = None if first is None else draw(st.none() | st.integers(1, last + 1 - first))
    if preset == "external":
        total = sum(end - start for start, end in spans)
        number = st.floats(-10, 10, width=32)
        knobs["importance"] = tuple(draw(st.lists(number, min_size=total, max_size=total)))
    return _Request(denoising, PruningParams(preset=preset, **knobs), tuple(spans), prompt)


def _admit(runner: DenoisingRunner, request: _Request, pool: BlockPool, number: int) -> tuple[Sequence, int]:
    """A sequence with blocks for what its policy says, and how many these are."""
    policy = policy_for(request.pruning, request.denoising, LAYERS, request.prompt, request.images)
    first = request.prompt + request.denoising.gen_length
    if policy is not None:
        first += policy.visual_at_first(request.images) - sum(request.images)
    blocks = pool.allocate(blocks_needed(first, runner.context.pages.block_size))
    assert blocks is not None
    generator = torch.Generator().manual_seed(number)
    embeds = torch.randn(request.prompt, runner.context.model.config.hidden_size, generator=generator)
    sequence = Sequence(
        str(number), embeds, request.spans, request.denoising, policy, runner.context.special, block_table=list(blocks)
    )
    runner.prune_before(sequence)
    assert sequence.total_length == first
    return sequence, len(blocks)


def _check_step(request: _Request, sequence: Sequence, report: StepReport, visual: int, admitted: int) -> int:
    """One step of one sequence; returns the visual tokens that are left."""
    pruning = report.pruning
    if pruning is not None:
        assert pruning.visual_before == visual == len(pruning.importance)
        assert all(math.isfinite(score) for score in pruning.importance)
        assert pruning.kept == sorted(set(pruning.kept))
        assert all(0 <= index < visual for index in pruning.kept)
        assert 1 <= len(pruning.kept) == pruning.visual_after
        visual = pruning.visual_after
    assert sequence.prompt.num_visual == visual
    assert sequence.prompt.group_of.numel() == visual
    assert report.kv_tokens == sequence.total_length
    assert report.kv_blocks == len(sequence.block_table) <= admitted
    if sequence.prompt.visual_rows.numel():
        assert bool((sequence.prompt.visual_rows.diff() > 0).all())
        # What is left of each image still lies together, in the images' order.
        assert bool((sequence.prompt.group_of.diff() >= 0).all())
        if request.pruning.prune_scope == "image":
            assert set(sequence.prompt.group_of.tolist()) == set(range(len(request.spans)))
    return visual


def _free_of_each_other(batch: list[Sequence], block_size: int) -> None:
    slots = [
        slot
        for sequence in batch
        for slot in slots_of(torch.tensor(sequence.block_table), 0, sequence.total_length, block_size).tolist()
    ]
    assert len(set(slots)) == len(slots)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(batch=st.lists(_requests(), min_size=1, max_size=4), block_size=st.sampled_from([1, 3, 8, 32]))
def test_memory_and_scores_whatever_the_policies(engine: EngineFactory, batch: list[_Request], block_size: int) -> None:
    local = engine("tiny-llada-v")
    config = local.config
    needed = sum(blocks_needed(each.prompt + each.denoising.gen_length, block_size) for each in batch)
    cache = PagedKVCache(LAYERS, needed, block_size, config.num_key_value_heads, config.head_dim, torch.float32)
    # Who reads a page that nobody wrote gets no finite score.
    for pages in (*cache.keys, *cache.values):
        pages.fill_(float("nan"))
    pool = BlockPool(needed)
    runner = DenoisingRunner(local.model, cache, local.special)
    sequences, admitted = zip(*(_admit(runner, each, pool, i) for i, each in enumerate(batch)), strict=True)
    held = {sequence.request_id: list(sequence.block_table) for sequence in sequences}
    visual = {sequence.request_id: sum(each.images) for each, sequence in zip(batch, sequences, strict=True)}
    while running := [index for index, sequence in enumerate(sequences) if not sequence.finished]:
        _free_of_each_other([sequences[index] for index in running], block_size)
        reports = runner.step([sequences[index] for index in running])
        for index, report in zip(running, reports, strict=True):
            name = report.request_id
            visual[name] = _check_step(batch[index], sequences[index], report, visual[name], admitted[index])
            tail = held[name][report.kv_blocks :]
            assert held[name][: report.kv_blocks] == sequences[index].block_table
            assert report.blocks_freed == len(tail)
            pool.free(tail)
            held[name] = held[name][: report.kv_blocks]
    for blocks in held.values():
        pool.free(blocks)
    assert pool.num_free == needed
    assert len(set(pool.allocate(needed) or ())) == needed


@given(request=_requests())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_no_policy_looks_at_its_neighbours(engine: EngineFactory, request: _Request) -> None:
    local = engine("tiny-llada-v")
    other = _Request(DenoisingParams(gen_length=9, ignore_eos=True), PruningParams(keep_ratio=0.3), ((2, 20),), 22)

    def canvases(requests: list[_Request]) -> list[list[int]]:
        cache = PagedKVCache(LAYERS, 64, 8, local.config.num_key_value_heads, local.config.head_dim, torch.float32)
        runner, pool = DenoisingRunner(local.model, cache, local.special), BlockPool(64)
        sequences = [_admit(runner, each, pool, number)[0] for number, each in enumerate(requests)]
        found = []
        while not sequences[0].finished:
            found.append(runner.step([each for each in sequences if not each.finished])[0].canvas)
        return found

    assert canvases([request]) == canvases([request, other])
