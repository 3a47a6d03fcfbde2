"""What pruning, caches and parallel decoding gain on one request, against what arithmetic alone would allow.

    python benchmarks/decode.py [--family lavida] [--policies redvtp late] [--repeats 3] [--json results.json]

Makes a random checkpoint (kept in --workdir) and asks it about one picture, of about 2,000 visual tokens for LLaDA-V
and 600 for LaViDa: dense, and with every policy at several keep ratios, without a cache and with the family's (the
prefix cache of LLaDA-V, LaViDa's prefix-LM). One process, interleaved runs. The fastest run of each setting counts:
other work on the machine only slows a run down.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decode_report import report
from flops import request_flops
from measure import CLOCKS, Memory, StepTimes, measure_memory, step_times, stepping, timed_run, touch_cache
from options import model_flags, percent, shape_of, size
from PIL import Image
from random_checkpoint import Shape, make_checkpoint, make_image
from tqdm import tqdm

from redvtp.evaluation.grid import has_own_budget
from redvtp.local import DTYPES, Generation, LocalEngine, Request
from redvtp.params import CACHES, PRESETS, DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

QUESTION = "What is shown in the picture?"
OWN_CACHES = {"llada-v": ["prefix"], "lavida": ["prefix_lm"]}
# `external` prunes by scores that come with a request.
POLICIES = [preset for preset in PRESETS if preset != "external"]
USUAL = Shape("llada-v", 1024, 3072, 4, 16, 256, 3, 384)


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table.

    policy: `none` is dense, without scoring.
    keep: percent of the visual tokens; None for dense, and for a policy that sets its budget by itself.
    threshold: of parallel decoding; None is a fixed number of steps.
    """

    cache: str
    policy: str
    keep: int | None
    threshold: float | None

    def __str__(self) -> str:
        if self.policy == "none":
            return "dense"
        return self.policy if self.keep is None else f"{self.policy} {self.keep}%"

    @property
    def label(self) -> str:
        decoding = "" if self.threshold is None else f", threshold {self.threshold:g}"
        return f"{self}, cache {self.cache}{decoding}"

    def request(self, prompt: str, image: Image.Image, denoising: DenoisingParams) -> Request:
        rule: dict[str, Any] = {} if self.threshold is None else {"threshold": self.threshold}
        pruning = PruningParams(self.policy) if self.keep is None else PruningParams(self.policy, self.keep / 100)
        return Request(prompt, (image,), replace(denoising, cache=self.cache, **rule), pruning)


@dataclass(slots=True)
class Measured:
    """The measurements of one setting."""

    request: Request
    latencies: list[float]
    generation: Generation | None = None
    flops: int = 0
    memory: Memory | None = None
    times: StepTimes | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One setting's results.

    keep_ratio: None for dense, and for a policy that sets its budget by itself.
    ratio: latency of dense without cache over this latency.
    ceiling: FLOPs of that dense over these.
    peak_bytes, later_peak_bytes: above the weights.
    agreement: share of canvas tokens that are that dense's.
    tokens_computed: of each step.
    """

    cache: str
    policy: str
    keep_ratio: float | None
    threshold: float | None
    setting: str
    steps: int
    visual_tokens_kept: int
    latency_s: float
    latencies_s: list[float]
    tokens_per_s: float
    ratio: float
    flops: int
    ceiling: float
    reached: float
    peak_bytes: int
    later_peak_bytes: int
    kv_blocks_admitted: int
    kv_blocks_at_end: int
    agreement: float
    tokens_computed: list[int]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    results = run(options)
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says, as data for --json."""
    if options.threads:
        torch.set_num_threads(options.threads)
    engine = LocalEngine(
        make_checkpoint(options.workdir, shape_of(options, options.family)),
        dtype=options.dtype,
        device=options.device,
        num_blocks=-(-options.cache_tokens // options.block_size),
        block_size=options.block_size,
        # Every run is to look at its image.
        vision_cache_bytes=0,
    )
    touch_cache(engine)
    measured = _measure(engine, _requests(engine, options), options)
    dense, *_ = measured.values()
    rows = [_row(engine, setting, seen, dense) for setting, seen in measured.items()]
    assert dense.generation is not None
    return {
        "machine": {"device": str(engine.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "model": {
            name: getattr(options, name) for name in ("family", "hidden", "intermediate", "layers", "heads", "dtype")
        },
        "request": {
            "prompt_tokens": dense.generation.prompt_tokens,
            "visual_tokens": dense.generation.visual_tokens,
            **{name: getattr(options, name) for name in ("gen_length", "block_length", "steps")},
        },
        "repeats": options.repeats,
        "block_size": options.block_size,
        "rows": [asdict(row) for row in rows],
        "first_step_bytes": {s.label: seen.memory.first_step for s, seen in measured.items() if seen.memory},
        "step_seconds": {s.label: asdict(seen.times) for s, seen in measured.items() if seen.times},
    }


def _requests(engine: LocalEngine, options: argparse.Namespace) -> dict[Setting, Request]:
    """One request for each setting, dense without cache first: the others are compared with it."""
    image = make_image(*options.image)
    prompt = chat_prompt(engine.tokenizer, QUESTION, num_images=1, template=engine.config.family.template)
    denoising = DenoisingParams(
        gen_length=options.gen_length, block_length=options.block_length, steps=options.steps, ignore_eos=True
    )
    caches = ["none", *(cache for cache in options.cache or OWN_CACHES[options.family] if cache != "none")]
    settings = [
        Setting(cache, *choice, threshold)
        for cache in caches
        for threshold in (None, *options.thresholds)
        for choice in _choices(options.policies, options.keep)
    ]
    return {setting: setting.request(prompt, image, denoising) for setting in settings}


def _choices(policies: Sequence[str], keep: Sequence[int]) -> list[tuple[str, int | None]]:
    """Policies with their keep percents, dense first and once: a policy that keeps everything is dense."""
    keeps = sorted(set(keep) - {100}, reverse=True)
    choices: dict[tuple[str, int | None], None] = {("none", None): None}
    for policy in policies:
        if policy != "none":
            choices |= dict.fromkeys((policy, keep) for keep in ([None] if has_own_budget(policy) else keeps))
    return list(choices)


def _measure(
    engine: LocalEngine, requests: dict[Setting, Request], options: argparse.Namespace
) -> dict[Setting, Measured]:
    measured = {setting: Measured(request, []) for setting, request in requests.items()}
    order = list(requests)
    # A step's parts are the same whatever says how many steps there are.
    fixed = [setting for setting in order if setting.threshold is None]
    # A run takes up to a minute; a second bar counts its steps.
    steps_bar = not options.quiet and sys.stderr.isatty()
    with tqdm(
        total=(options.repeats + 2) * len(order) + len(fixed) + 1, desc="runs", unit="run", disable=options.quiet
    ) as bar:
        # The first touch of weights, threads and allocator counts for no setting.
        with stepping(engine, requests[order[0]]) as start:
            engine.runner.step([start()])
        bar.update()
        for repeat in range(options.repeats):
            # Each round begins with another setting, so a drift of the machine's speed affects all alike.
            shift = repeat % len(order)
            for setting in order[shift:] + order[:shift]:
                seconds, measured[setting].generation = timed_run(
                    engine, requests[setting], steps_bar, setting.threshold is None, CLOCKS[options.clock]
                )
                measured[setting].latencies.append(seconds)
                bar.update()
        for setting in order:
            measured[setting].memory = measure_memory(engine, requests[setting])
            bar.update()
        # After the memory: torch counts attention that it does not fuse, which needs more.
        for setting in order:
            measured[setting].flops = request_flops(engine, requests[setting])
            bar.update()
        for setting in fixed:
            measured[setting].times = step_times(engine, requests[setting])
            bar.update()
    return measured


def _row(engine: LocalEngine, setting: Setting, seen: Measured, dense: Measured) -> Row:
    generation, memory = seen.generation, seen.memory
    assert generation is not None
    assert dense.generation is not None
    assert memory is not None
    latency, first, last = min(seen.latencies), generation.steps[0], generation.steps[-1]
    ratio = min(dense.latencies) / latency
    ceiling = dense.flops / seen.flops
    block_bytes = sum(pages[0].nbytes for pages in (*engine.cache.keys, *engine.cache.values))
    admitted = first.kv_blocks + first.blocks_freed
    answer, expected = last.canvas, dense.generation.steps[-1].canvas
    return Row(
        cache=setting.cache,
        policy=setting.policy,
        keep_ratio=None if setting.keep is None else setting.keep / 100,
        threshold=setting.threshold,
        setting=str(setting),
        steps=len(generation.steps),
        visual_tokens_kept=min(
            [generation.visual_tokens, *(step.pruning.visual_after for step in generation.steps if step.pruning)]
        ),
        latency_s=latency,
        latencies_s=seen.latencies,
        tokens_per_s=len(answer) / latency,
        ratio=ratio,
        flops=seen.flops,
        ceiling=ceiling,
        reached=ratio / ceiling,
        # Until the pruning a request holds the blocks it was admitted with.
        peak_bytes=max(memory.encode, memory.first_step) + admitted * block_bytes,
        later_peak_bytes=memory.later_steps + first.kv_blocks * block_bytes,
        kv_blocks_admitted=admitted,
        kv_blocks_at_end=last.kv_blocks,
        agreement=sum(a == b for a, b in zip(answer, expected, strict=True)) / len(answer),
        tokens_computed=[step.tokens_computed for step in generation.steps],
    )


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags, for `run`."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = model_flags(parser, USUAL)
    model.add_argument("--family", choices=sorted(OWN_CACHES), default="llada-v", help="whose layout and vision path")
    model.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of weights and arithmetic")
    work = parser.add_argument_group("request")
    work.add_argument("--image", type=size, default="768x330", metavar="WxH", help="size of the picture in pixels")
    work.add_argument("--gen-length", type=int, default=32, help="canvas length in tokens")
    work.add_argument("--block-length", type=int, default=32, help="canvas positions decoded together")
    work.add_argument("--steps", type=int, default=16, help="denoising steps")
    work.add_argument("--keep", type=percent, nargs="+", default=[75, 50, 25], help="percent of visual tokens kept")
    work.add_argument("--policies", choices=POLICIES, nargs="+", default=["redvtp"], help="dense is always run")
    work.add_argument(
        "--thresholds",
        type=float,
        nargs="+",
        default=[],
        metavar="F",
        help="factors of parallel decoding by confidence; fixed steps are always run",
    )
    work.add_argument("--cache", choices=CACHES, nargs="+", help="none is always run; default: the family's too")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--repeats", type=int, default=3, help="runs of each setting; the fastest counts")
    machine.add_argument("--device", help="cpu or cuda; without it, cuda where there is one")
    machine.add_argument("--threads", type=int, help="torch's threads; without it, torch's choice")
    machine.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="processor: where others work too; with --threads 1"
    )
    machine.add_argument("--block-size", type=int, default=32, help="tokens in a KV cache block")
    machine.add_argument("--cache-tokens", type=int, default=4096, help="size of the KV cache")
    output = parser.add_argument_group("files and output")
    workdir = Path(tempfile.gettempdir()) / "vllm-redvtp-benchmarks"
    output.add_argument("--workdir", type=Path, default=workdir, help="where the checkpoint is kept")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if options.clock == "processor" and options.threads != 1:
        parser.error("--clock processor adds up all threads: use it with --threads 1")
    for threshold in options.thresholds:
        rule: dict[str, Any] = {"threshold": threshold}
        try:
            DenoisingParams(**rule)
        except ValueError as error:
            parser.error(str(error))
    return options


if __name__ == "__main__":
    main()
