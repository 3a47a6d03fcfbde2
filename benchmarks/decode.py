"""What visual-token pruning and the prefix cache gain on one request, against what arithmetic alone would allow.

    python benchmarks/decode.py [--repeats 3] [--json results.json]

Makes a random LLaDA-V checkpoint (kept in --workdir), asks it about one picture of about 2,000 visual tokens, dense and with
RedVTP at several keep ratios, with and without the prefix cache, all in one process, runs interleaved, medians reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from flops import request_flops
from meters import PeakMemory, Stopwatch
from random_checkpoint import Shape, make_checkpoint, make_image
from tqdm import tqdm

import redvtp.runner
from redvtp import sequence as engine_sequence
from redvtp.attention.torch_paged import TorchPagedAttention
from redvtp.kv.blocks import blocks_needed
from redvtp.local import DTYPES, Generation, LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.pruning.scores import AttentionScores
from redvtp.vision.tiling import image_mode, tile_image

QUESTION = "What is shown in the picture?"
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. keep: percent of the visual tokens; 100 is dense, without scoring."""

    cache: str
    keep: int

    @property
    def name(self) -> str:
        return "dense" if self.keep == 100 else f"keep {self.keep} %"

    def request(self, prompt: str, image: Any, options: argparse.Namespace) -> Request:
        denoising = DenoisingParams(
            gen_length=options.gen_length,
            block_length=options.block_length,
            steps=options.steps,
            ignore_eos=True,
            cache=self.cache,
        )
        dense = PruningParams(preset="none")
        return Request(
            prompt, (image,), denoising, dense if self.keep == 100 else PruningParams(keep_ratio=self.keep / 100)
        )


@dataclass(frozen=True, slots=True)
class Row:
    """Result of one setting. ceiling: the ratio of FLOPs, dense without cache to this. Memory in bytes."""

    cache: str
    setting: str
    latency_s: float
    latencies_s: list[float]
    tokens_per_s: float
    ratio: float
    flops: int
    ceiling: float
    reached: float
    peak_bytes: int
    later_peak_bytes: int
    kv_blocks_first: int
    kv_blocks_after: int
    agreement: float


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes above weights and cache: while images are encoded, in the first step, in the two after it."""

    encode: int
    first_step: int
    later_steps: int


@contextmanager
def stepping(engine: LocalEngine, request: Request) -> Iterator[Callable[[], engine_sequence.Sequence]]:
    """The request with its blocks; calling what this yields encodes the image and gives the sequence to step."""
    prompt = engine.tokenize(request)
    blocks = engine.blocks.allocate(blocks_needed(len(prompt.ids) + request.denoising.gen_length, _block_size(engine)))
    if blocks is None:
        raise RuntimeError("the cache was made too small for one request")
    try:
        yield lambda: engine.sequence(request, prompt, list(blocks))
    finally:
        engine.blocks.free(blocks)


def _block_size(engine: LocalEngine) -> int:
    return engine.cache.block_size


def timed_run(engine: LocalEngine, request: Request) -> tuple[float, Generation]:
    _synchronize(engine.device)
    started = time.perf_counter()
    (generation,) = engine.generate([request])
    _synchronize(engine.device)
    elapsed = time.perf_counter() - started
    if len(generation.steps) != request.denoising.resolved_steps:
        raise RuntimeError(f"{len(generation.steps)} steps ran instead of {request.denoising.resolved_steps}")
    return elapsed, generation


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_memory(engine: LocalEngine, request: Request, repeats: int) -> Memory:
    """Medians over `repeats` requests of which only the first three steps are run."""
    encode, first, later = [], [], []
    for _ in range(repeats):
        with stepping(engine, request) as start:
            meter = PeakMemory(engine.device)
            made: list[engine_sequence.Sequence] = []
            encode.append(meter.measure(lambda made=made, start=start: made.append(start())))
            first.append(meter.measure(lambda made=made: engine.runner.step(made)))
            more = min(2, request.denoising.resolved_steps - 1)
            later.append(max([meter.measure(lambda made=made: engine.runner.step(made)) for _ in range(more)] or [0]))
            del made
    return Memory(*(int(statistics.median(values)) for values in (encode, first, later)))


def step_times(engine: LocalEngine, request: Request) -> tuple[dict[str, float], dict[str, float], float]:
    """Seconds by part: of the first step, of a later step (mean); and of encoding the image."""
    parts: list[dict[str, float]] = []
    with stepping(engine, request) as start:
        began = time.perf_counter()
        sequence = start()
        _synchronize(engine.device)
        encoding = time.perf_counter() - began
        while not sequence.finished:
            watch = Stopwatch(engine.device)
            with watch.watching(*_watched(engine)), watch.timed("everything else"):
                engine.runner.step([sequence])
            parts.append(dict(watch.seconds))
    labels = sorted({label for part in parts for label in part})
    later = {label: statistics.fmean(part.get(label, 0.0) for part in parts[1:] or parts) for label in labels}
    return parts[0], later, encoding


def _watched(engine: LocalEngine) -> list[tuple[Any, str, str]]:
    language_model = engine.model.language_model
    linears = [module for module in language_model.layers.modules() if isinstance(module, torch.nn.Linear)]
    return [
        *((linear, "forward", "linears of the layers") for linear in linears),
        (TorchPagedAttention, "__call__", "attention, with pages written and read"),
        (AttentionScores, "accumulate", "scoring of visual tokens"),
        (language_model, "forward", "norms, rotary, residuals, activation"),
        (language_model, "logits", "logits"),
        (redvtp.runner, "propose", "choice of tokens"),
        (redvtp.runner.DenoisingRunner, "_prune", "choice of visual tokens, compaction"),
    ]


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as data for --json."""
    engine, request_of, settings = _prepare(options)
    dense = settings[0]
    generations: dict[Setting, Generation] = {}
    latencies: dict[Setting, list[float]] = {setting: [] for setting in settings}
    memory: dict[Setting, Memory] = {}
    times: dict[str, dict[str, float]] = {}
    total = options.repeats * len(settings) + 2 * len(settings) + 1
    with tqdm(total=total, desc="runs", unit="run", disable=options.quiet) as bar:
        # First touches of weights, threads and allocator are nobody's latency.
        with stepping(engine, request_of[dense]) as start:
            engine.runner.step([start()])
        bar.update()
        for repeat in range(options.repeats):
            # Whatever drifts on the machine meets every setting, and not always in the same place.
            for setting in settings[repeat % len(settings) :] + settings[: repeat % len(settings)]:
                seconds, generations[setting] = timed_run(engine, request_of[setting])
                latencies[setting].append(seconds)
                bar.update()
        for setting in settings:
            memory[setting] = measure_memory(engine, request_of[setting], repeats=3)
            bar.update()
        for setting in settings:
            first, later, encoding = step_times(engine, request_of[setting])
            times[f"{setting.name}, {setting.cache}: first step"] = first
            times[f"{setting.name}, {setting.cache}: later steps"] = later
            times.setdefault("encoding the image, once", {"tower, projector, merge": encoding})
            bar.update()
    flops = {setting: _flops(engine, request_of[setting]) for setting in settings}
    baseline = statistics.median(latencies[dense])
    rows = []
    for setting in settings:
        generation, seconds = generations[setting], statistics.median(latencies[setting])
        ceiling = flops[dense] / flops[setting]
        block_bytes = _block_bytes(engine)
        admitted = generation.steps[0].kv_blocks + generation.steps[0].blocks_freed
        used = memory[setting]
        rows.append(
            Row(
                cache=setting.cache,
                setting=setting.name,
                latency_s=seconds,
                latencies_s=latencies[setting],
                tokens_per_s=options.gen_length / seconds,
                ratio=baseline / seconds,
                flops=flops[setting],
                ceiling=ceiling,
                reached=baseline / seconds / ceiling,
                peak_bytes=max(used.encode, used.first_step) + admitted * block_bytes,
                later_peak_bytes=used.later_steps + generation.steps[0].kv_blocks * block_bytes,
                kv_blocks_first=admitted,
                kv_blocks_after=generation.steps[0].kv_blocks,
                agreement=_agreement(generation, generations[dense]),
            )
        )
    generation = generations[dense]
    return {
        "machine": {"device": str(engine.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "model": {name: getattr(options, name) for name in ("hidden", "intermediate", "layers", "heads", "dtype")},
        "request": {
            "prompt_tokens": generation.prompt_tokens,
            "visual_tokens": generation.visual_tokens,
            **{name: getattr(options, name) for name in ("gen_length", "block_length", "steps", "repeats")},
        },
        "block_size": _block_size(engine),
        "rows": [asdict(row) for row in rows],
        "scoring_memory": _scoring_memory(memory),
        "step_seconds": times,
    }


def _prepare(options: argparse.Namespace) -> tuple[LocalEngine, dict[Setting, Request], list[Setting]]:
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape(
        options.hidden, options.intermediate, options.layers, options.heads,
        options.tower_hidden, options.tower_layers, options.tile,
    )  # fmt: skip
    checkpoint = make_checkpoint(options.workdir, shape)
    image = make_image(*options.image)
    # One request's worth of cache, touched once, so that memory is measured above it.
    probe = LocalEngine(checkpoint, dtype=options.dtype, device=options.device, num_blocks=1)
    prompt = chat_prompt(probe.tokenizer, QUESTION, num_images=1)
    keeps = [100, *sorted(set(options.keep) - {100}, reverse=True)]
    settings = [Setting(cache, keep) for cache in options.cache for keep in keeps]
    return probe, {setting: setting.request(prompt, image, options) for setting in settings}, settings
