"""A step makes the host wait for the device once: where it reads what was committed. Where it prunes, once more.

On a GPU torch itself says what waits; on a CPU `device_watch` finds it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_data
import redvtp
from engine.device_watch import DEVICE, DeviceWatch
from redvtp.attention.paged import PagedAttention
from redvtp.attention.paged_batch import PagedBatch
from redvtp.attention.torch_paged import TorchAttention
from redvtp.canvas.proposals import keep_best
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.device import on_device, to_device
from redvtp.kv.blocks import blocks_needed
from redvtp.kv.pages import PagedKVCache
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.reports import StepReport

EngineFactory = Callable[..., LocalEngine]
Asked = tuple[DenoisingParams, PruningParams]
# What the host waited in, step by step, and what the steps did.
Watched = list[tuple[list[str], list[StepReport]]]

NONE = DenoisingParams(gen_length=16, block_length=8, steps=8, ignore_eos=True)
PREFIX, DUAL = replace(NONE, cache="prefix"), replace(NONE, cache="dual")
PREFIX_LM = replace(NONE, cache="prefix_lm")
REFRESHED = replace(PREFIX, refresh_interval=2, suffix=" yes")
WARM = replace(PREFIX, temperature=0.8, seed=1)
RANDOM = replace(WARM, remasking="random")
DENSE, PRUNED = PruningParams(preset="none"), PruningParams(keep_ratio=0.3)
LATER = PruningParams(keep_ratio=0.3, prune_step=2, score_rows="prompt_response", positions="original")
INSIDE = PruningParams(preset="llada-fastv", keep_ratio=0.3)
INSIDE_LATER = PruningParams(preset="llada-fastv", keep_ratio=0.3, prune_step=1, prune_layer=0)
WITHDRAWN = PruningParams(preset="layer-skip", prune_layer=1)
BLOCK_SIZE = 16

BATCHES: dict[str, list[Asked]] = {
    "none": [(NONE, DENSE)],
    "none-pruned": [(NONE, PRUNED)],
    "prefix-pruned": [(PREFIX, PRUNED)],
    "dual": [(DUAL, DENSE)],
    "dual-pruned": [(DUAL, LATER)],
    "prefix-lm": [(PREFIX_LM, PRUNED)],
    "exit": [(NONE, INSIDE)],
    "exit-in-response-step": [(PREFIX, INSIDE_LATER)],
    "withdrawn": [(PREFIX, WITHDRAWN), (PREFIX_LM, WITHDRAWN)],
    "temperature": [(WARM, PRUNED)],
    "three": [(WARM, PRUNED), (REFRESHED, DENSE), (DUAL, LATER)],
    "three-others": [(RANDOM, INSIDE), (NONE, PRUNED), (replace(PREFIX, remasking="entropy"), WITHDRAWN)],
}


@torch.inference_mode()
def _sequences(local: LocalEngine, batch: list[Asked]) -> list[Sequence]:
    images = tuple(golden_data.Case("tiny-llada-v", "wide").images())
    prompt = chat_prompt(local.tokenizer, "What is shown?", len(images), template=local.config.family.template)
    sequences, first = [], 0
    for denoising, pruning in batch:
        request = Request(prompt, images, denoising, pruning)
        sequence = local.sequence(request, local.tokenize(request), [])
        end = first + blocks_needed(sequence.total_length, BLOCK_SIZE)
        sequence.resume(list(range(first, end)))
        sequences.append(sequence)
        first = end
    return sequences


class _KernelInTorch:
    """A `PagedKernel` that goes by what the host knows of a batch, as those of GPUs do."""

    batch_invariant = True
    reads_unused = True

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
        outputs, normalisers = [], []
        shared = query.shape[1] // keys.shape[2]
        for index, own in enumerate(query.split(batch.query_counts)):
            tables, length = batch.block_table[index].long(), batch.kv_counts[index]
            key, value = (
                pages.index_select(0, tables).flatten(0, 1)[:length].repeat_interleave(shared, 1)
                for pages in (keys, values)
            )
            logits = torch.einsum("qhd,khd->hqk", own, key) * self._scale
            outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value))
            normalisers.append(logits.logsumexp(-1))
        return torch.cat(outputs), torch.cat(normalisers, dim=1)


def _runner(local: LocalEngine, sequences: list[Sequence], paged: bool = False) -> DenoisingRunner:
    config, blocks = local.config, sum(len(sequence.block_table) for sequence in sequences)
    pages = PagedKVCache(
        config.num_hidden_layers,
        blocks,
        BLOCK_SIZE,
        config.num_key_value_heads,
        config.head_dim,
        local.model.dtype,
        sequences[0].prompt.embeds.device,
    )
    scale = config.head_dim**-0.5
    attention = PagedAttention(pages, scale, _KernelInTorch(scale)) if paged else TorchAttention(pages, scale)
    return DenoisingRunner(local.model, pages, local.special, attention=attention)


def _watched_steps(
    local: LocalEngine, batch: list[Asked], suspended_before: int | None = None, paged: bool = False
) -> Watched:
    """All steps of a batch on a CPU that is watched."""
    watch = DeviceWatch()
    found: Watched = []
    sequences = _sequences(local, batch)
    watch.put(*local.model.parameters(), *local.model.buffers(), *(each.prompt.embeds for each in sequences))
    with watch:
        runner = _runner(local, sequences, paged)
        watch.put(*runner.context.pages.keys, *runner.context.pages.values)
        assert runner.context.device == DEVICE
        while running := [sequence for sequence in sequences if not sequence.finished]:
            if len(found) == suspended_before:
                for sequence in running:
                    table = sequence.block_table
                    sequence.suspend()
                    sequence.resume(table)
            watch.clear()
            reports = runner.step(running)
            found.append((list(watch.waits), reports))
    return found


def _prunings(reports: list[StepReport]) -> list[tuple[str, int | None]]:
    """In a step: the waits that its prunings take, each for all that happens there at once."""
    layers = {report.pruning.layer for report in reports if report.pruning is not None}
    return [("importances", layer) for layer in layers]


@pytest.fixture(params=["tiny-llada-v", "tiny-lavida-dream"])
def checkpoint(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def local(engine: EngineFactory, checkpoint: str) -> LocalEngine:
    return engine(checkpoint, max_model_len=512)


@pytest.mark.parametrize("paged", [False, True], ids=["torch", "paged"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_step_waits_where_it_reads_and_nowhere_else(local: LocalEngine, name: str, paged: bool) -> None:
    batch = BATCHES[name]
    steps = _watched_steps(local, batch, paged=paged)
    shifted = local.config.family.sampler.shifted_logits
    for number, (waits, reports) in enumerate(steps):
        encodes = shifted and number == 0 and any(denoising.cache == "prefix_lm" for denoising, _ in batch)
        expected = ["commit", *["_decide_first"] * encodes, *(name for name, _ in _prunings(reports))]
        assert sorted(waits) == sorted(expected), number
    reported = [report for _, reports in steps for report in reports]
    cached = any(denoising.cache != "none" for denoising, _ in batch)
    assert {report.kind for report in reported} == ({"full", "response"} if cached else {"full"})
    dropping = sum(pruning.preset != "none" and pruning.preset != "layer-skip" for _, pruning in batch)
    assert sum(report.pruning is not None for report in reported) == dropping


def test_writing_lost_pages_again_waits_for_nothing(local: LocalEngine) -> None:
    steps = _watched_steps(local, [(PREFIX, PRUNED), (DUAL, WITHDRAWN), (PREFIX, INSIDE)], suspended_before=3)
    waits, _ = steps[3]
    assert waits == ["commit"]


def test_watching_changes_no_token(local: LocalEngine) -> None:
    """Operations run as they do without: it is the step itself that is watched."""
    batch = BATCHES["three"]
    sequences = _sequences(local, batch)
    runner = _runner(local, sequences)
    plain: list[list[StepReport]] = []
    while running := [sequence for sequence in sequences if not sequence.finished]:
        plain.append(runner.step(running))
    watched = [reports for _, reports in _watched_steps(local, batch)]
    assert [[report.canvas for report in step] for step in watched] == [[r.canvas for r in step] for step in plain]


def test_one_more_read_is_found(local: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(logits: Tensor, count: int | None) -> Tensor:
        assert logits.max().item() < 1e9
        return keep_best(logits, count)

    monkeypatch.setattr("redvtp.denoising.commit.keep_best", reading)
    waits, _ = _watched_steps(local, BATCHES["none"])[0]
    assert sorted(waits) == ["candidate_logits", "commit"]


def _write(tensor: Tensor, index: Any, value: Tensor | float) -> None:
    tensor[index] = value


MASK = torch.tensor([True, False, True])
WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda on: on[0].item(),
    "tolist": lambda on: on.tolist(),
    "cpu": lambda on: on.cpu(),
    "to the host": lambda on: on.to("cpu"),
    "bool": lambda on: bool((on > 1).any()),
    "int": lambda on: int(on.sum()),
    "float": lambda on: float(on.sum()),
    "in": lambda on: 2.0 in on,
    "nonzero": lambda on: on.nonzero(),
    "where": lambda on: torch.where(on > 1),
    "mask of the device": lambda on: on[on > 1],
    "mask of the host": lambda on: on[MASK],
    "index of the host": lambda on: on[torch.tensor([0, 2])],
    "list": lambda on: on[[0, 2]],
    "list in a tuple": lambda on: on[None][:, [0, 2]],
    "written under a mask": lambda on: _write(on, on > 1, 0.0),
    "written at a list": lambda on: _write(on, [0, 2], 0.0),
    "written from the host": lambda on: _write(on, slice(0, 2), torch.zeros(2)),
    "copied to the device": lambda on: torch.zeros(3).to(on.device),
    "copied into it": lambda on: on.copy_(torch.zeros(3)),
    "made there from numbers": lambda on: torch.tensor([1.0, 2.0], device=on.device),
}
GOING_ON: dict[str, Callable[[Tensor], object]] = {
    "slice": lambda on: on[1:],
    "number": lambda on: on[1],
    "index of the device": lambda on: on[torch.arange(2, device=on.device)],
    "sent": lambda on: to_device(torch.zeros(3), on.device) + on,
    "sent numbers": lambda on: on_device([0.0] * 3, torch.float32, on.device) + on,
    "type": lambda on: on.to(torch.float64),
    "number written": lambda on: _write(on, slice(0, 2), 0.0),
    "work on the host": lambda on: MASK.nonzero().tolist(),
}


@pytest.mark.parametrize("name", [*WAITING, *GOING_ON])
def test_the_watch_knows_what_waits(name: str) -> None:
    watch, on = DeviceWatch(), torch.tensor([1.0, 2.0, 3.0])
    watch.put(on)
    with watch:
        (WAITING | GOING_ON)[name](on)
    assert len(watch.waits) == (name in WAITING)


def test_the_watch_refuses_what_a_gpu_would() -> None:
    on = torch.ones(3)
    DeviceWatch.put(on)
    with DeviceWatch(), pytest.raises(AssertionError, match="tensors on the host and on the device"):
        on + torch.ones(3)


def test_copies_that_do_not_wait_are_made_in_one_place() -> None:
    """From memory that is not pinned a copy waits, whatever it is asked."""
    folder = Path(redvtp.__file__).parent
    found = [path.relative_to(folder) for path in folder.rglob("*.py") if "non_blocking" in path.read_text()]
    assert found == [Path("device.py")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", BATCHES)
def test_a_gpu_waits_as_often(engine: EngineFactory, checkpoint: str, name: str) -> None:
    """torch warns of every operation that waits. Twice: what is made once at the start does not count."""
    on_gpu = engine(checkpoint, max_model_len=512, device="cuda")
    for attempt in range(2):
        sequences = _sequences(on_gpu, BATCHES[name])
        runner = _runner(on_gpu, sequences)
        while running := [sequence for sequence in sequences if not sequence.finished]:
            first = running[0].steps_done == 0
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    reports = runner.step(running)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            encodes = first and any(denoising.cache == "prefix_lm" for denoising, _ in BATCHES[name])
            encodes = encodes and on_gpu.config.family.sampler.shifted_logits
            waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
            if attempt:
                assert len(waits) == 1 + encodes + len(_prunings(reports)), waits
