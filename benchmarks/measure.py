"""Latency, memory and step times of one request on a `LocalEngine`: what `decode.py` measures its settings with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from meters import PeakMemory, Stopwatch

import redvtp.denoising.commit
from redvtp.attention.scores import AttentionScores
from redvtp.attention.torch_paged import TorchPrepared
from redvtp.denoising.pruner import Pruner
from redvtp.denoising.sequence import Sequence
from redvtp.kv.blocks import blocks_needed
from redvtp.local import Generation, LocalEngine, Request

WATCHED_STEPS = 5
# Processor time is that of all threads: with one thread, what the work takes on a machine that does nothing else.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes above weights and cache pages: while the image is encoded, in the first step, in the two after it."""

    encode: int
    first_step: int
    later_steps: int


@contextmanager
def stepping(engine: LocalEngine, request: Request) -> Iterator[Callable[[], Sequence]]:
    """The request with its cache blocks; calling what this yields encodes the image and returns the sequence."""
    prompt = engine.tokenize(request)
    tokens = len(prompt.ids) + request.denoising.gen_length
    blocks = engine.blocks.allocate(blocks_needed(tokens, engine.cache.block_size))
    if blocks is None:
        raise RuntimeError("other requests hold the cache")
    try:
        yield lambda: engine.sequence(request, prompt, list(blocks))
    finally:
        engine.blocks.free(blocks)


def timed_run(
    engine: LocalEngine,
    request: Request,
    progress: bool = False,
    all_steps: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, Generation]:
    """Seconds from images and text to the answer.

    progress: show a bar of its steps.
    all_steps: raise RuntimeError if fewer steps ran than the request asks for.
    """
    synchronize(engine.device)
    started = clock()
    (generation,) = engine.generate([request], progress=progress)
    synchronize(engine.device)
    elapsed = clock() - started
    if all_steps and len(generation.steps) != request.denoising.resolved_steps:
        raise RuntimeError(f"{len(generation.steps)} steps ran instead of {request.denoising.resolved_steps}")
    return elapsed, generation


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def touch_cache(engine: LocalEngine) -> None:
    """Make every page of the cache resident, so that no request's memory includes pages it is the first to use."""
    for pages in (*engine.cache.keys, *engine.cache.values):
        pages.fill_(0)


def measure_memory(engine: LocalEngine, request: Request) -> Memory:
    """Of the first three steps of a request."""
    with stepping(engine, request) as start:
        meter = PeakMemory(engine.device)
        batch: list[Sequence] = []
        encode = meter.measure(lambda: batch.append(start()))
        first = meter.measure(lambda: engine.runner.step(batch))
        later = [0]
        while not batch[0].finished and len(later) < 3:
            later.append(meter.measure(lambda: engine.runner.step(batch)))
        return Memory(encode, first, max(later))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds.

    encode: of tower, projector and merge.
    first, later: by part, of the first step and of a later one (mean).
    """

    encode: float
    first: dict[str, float]
    later: dict[str, float]


def step_times(engine: LocalEngine, request: Request) -> StepTimes:
    """The first steps of a request, timed by part. Timing takes time too: read the shares, not the sum."""
    parts: list[dict[str, float]] = []
    with stepping(engine, request) as start:
        began = time.perf_counter()
        sequence = start()
        synchronize(engine.device)
        encode = time.perf_counter() - began
        watched = _watched(engine)
        while not sequence.finished and len(parts) < WATCHED_STEPS:
            watch = Stopwatch(engine.device)
            with watch.watching(*watched), watch.timed("everything else"):
                engine.runner.step([sequence])
            parts.append(dict(watch.seconds))
    later = parts[1:] or parts
    return StepTimes(
        encode, parts[0], {label: statistics.fmean(part.get(label, 0.0) for part in later) for label in parts[0]}
    )


def _watched(engine: LocalEngine) -> list[tuple[Any, str, str]]:
    """(owner, function, label) in the order the table shows them."""
    language_model = engine.model.language_model
    linears = [module for module in language_model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return [
        *((linear, "forward", "linears") for linear in linears),
        (TorchPrepared, "write", "attention and page writes"),
        (TorchPrepared, "attend", "attention and page writes"),
        (AttentionScores, "accumulate", "scoring of visual tokens"),
        (language_model, "forward", "norms, rotary, activations, residuals"),
        (language_model, "logits", "logits"),
        (redvtp.denoising.commit, "propose_in_parts", "choice of tokens"),
        (Pruner, "prune", "choice of visual tokens, compaction"),
    ]
