"""What visual-token pruning and the prefix cache gain on one request, against what arithmetic alone would allow.

    python benchmarks/decode.py [--family lavida] [--repeats 3] [--json results.json]

Makes a random checkpoint (kept in --workdir) and asks it about one picture, of about 2,000 visual tokens for LLaDA-V
and 600 for LaViDa: dense, and with RedVTP at several keep ratios, without a cache and with the family's own (the prefix
cache of LLaDA-V, LaViDa's prefix-LM). One process, interleaved runs; the fastest of each setting counts, since whatever
else a machine does can only slow a run down.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flops import request_flops
from measure import Memory, StepTimes, measure_memory, step_times, stepping, timed_run, touch_cache
from PIL import Image
from random_checkpoint import Shape, make_checkpoint, make_image
from tqdm import tqdm

from redvtp.local import DTYPES, Generation, LocalEngine, Request
from redvtp.params import CACHES, DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.vision.tiling import image_mode, tile_image

QUESTION = "What is shown in the picture?"
OWN_CACHES = {"llada-v": ["prefix"], "lavida": ["prefix_lm"]}
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. keep: percent of the visual tokens; 100 is dense, without scoring."""

    cache: str
    keep: int

    def __str__(self) -> str:
        return "dense" if self.keep == 100 else f"keep {self.keep}%"

    def request(self, prompt: str, image: Image.Image, denoising: DenoisingParams) -> Request:
        pruning = PruningParams(preset="none") if self.keep == 100 else PruningParams(keep_ratio=self.keep / 100)
        return Request(prompt, (image,), replace(denoising, cache=self.cache), pruning)


@dataclass(slots=True)
class Measured:
    """What was seen of one setting."""

    request: Request
    latencies: list[float]
    generation: Generation | None = None
    memory: Memory | None = None
    times: StepTimes | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One setting's results. ceiling: FLOPs of dense without cache over FLOPs of this. Bytes are above the weights."""

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
    kv_blocks_admitted: int
    kv_blocks_after_step_0: int
    agreement: float


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    results = run(options)
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says, as data for --json."""
    shape = Shape(
        options.family, options.hidden, options.intermediate, options.layers, options.heads,
        options.tower_hidden, options.tower_layers, options.tile,
    )  # fmt: skip
    engine = LocalEngine(
        make_checkpoint(options.workdir, shape),
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
        "first_step_bytes": {_label(s): seen.memory.first_step for s, seen in measured.items() if seen.memory},
        "step_seconds": {_label(s): asdict(seen.times) for s, seen in measured.items() if seen.times},
    }


def _label(setting: Setting) -> str:
    return f"{setting}, cache {setting.cache}"


def _requests(engine: LocalEngine, options: argparse.Namespace) -> dict[Setting, Request]:
    """One request for each setting, dense without cache first: the others are compared with it."""
    image = make_image(*options.image)
    prompt = chat_prompt(engine.tokenizer, QUESTION, num_images=1, template=engine.config.family.template)
    denoising = DenoisingParams(
        gen_length=options.gen_length, block_length=options.block_length, steps=options.steps, ignore_eos=True
    )
    keeps = [100, *sorted(set(options.keep) - {100}, reverse=True)]
    caches = ["none", *(cache for cache in options.cache or OWN_CACHES[options.family] if cache != "none")]
    settings = [Setting(cache, keep) for cache in caches for keep in keeps]
    return {setting: setting.request(prompt, image, denoising) for setting in settings}


def _measure(
    engine: LocalEngine, requests: dict[Setting, Request], options: argparse.Namespace
) -> dict[Setting, Measured]:
    measured = {setting: Measured(request, []) for setting, request in requests.items()}
    order = list(requests)
    # A run takes up to a minute; below the bar of runs, one of steps shows that it moves.
    steps_bar = not options.quiet and sys.stderr.isatty()
    with tqdm(total=(options.repeats + 2) * len(order) + 1, desc="runs", unit="run", disable=options.quiet) as bar:
        # The first touch of weights, threads and allocator is nobody's latency.
        with stepping(engine, requests[order[0]]) as start:
            engine.runner.step([start()])
        bar.update()
        for repeat in range(options.repeats):
            # Whatever drifts on the machine meets every setting, and each in another place of the round.
            shift = repeat % len(order)
            for setting in order[shift:] + order[:shift]:
                seconds, measured[setting].generation = timed_run(engine, requests[setting], steps_bar)
                measured[setting].latencies.append(seconds)
                bar.update()
        for setting in order:
            measured[setting].memory = measure_memory(engine, requests[setting])
            bar.update()
        for setting in order:
            measured[setting].times = step_times(engine, requests[setting])
            bar.update()
    return measured


def _row(engine: LocalEngine, setting: Setting, seen: Measured, dense: Measured) -> Row:
    generation, memory = seen.generation, seen.memory
    assert generation is not None
    assert dense.generation is not None
    assert memory is not None
    latency, first = min(seen.latencies), generation.steps[0]
    ratio = min(dense.latencies) / latency
    flops = _flops(engine, seen)
    ceiling = _flops(engine, dense) / flops
    block_bytes = sum(pages[0].nbytes for pages in (*engine.cache.keys, *engine.cache.values))
    admitted = first.kv_blocks + first.blocks_freed
    answer, expected = generation.steps[-1].canvas, dense.generation.steps[-1].canvas
    return Row(
        cache=setting.cache,
        setting=str(setting),
        latency_s=latency,
        latencies_s=seen.latencies,
        tokens_per_s=len(answer) / latency,
        ratio=ratio,
        flops=flops,
        ceiling=ceiling,
        reached=ratio / ceiling,
        # Until the pruning a request holds the blocks it was admitted with.
        peak_bytes=max(memory.encode, memory.first_step) + admitted * block_bytes,
        later_peak_bytes=memory.later_steps + first.kv_blocks * block_bytes,
        kv_blocks_admitted=admitted,
        kv_blocks_after_step_0=first.kv_blocks,
        agreement=sum(a == b for a, b in zip(answer, expected, strict=True)) / len(answer),
    )


def _flops(engine: LocalEngine, seen: Measured) -> int:
    assert seen.generation is not None
    request = seen.request
    mode = image_mode(engine.config, len(request.images))
    tiles = sum(tile_image(image, engine.config, mode.mode).shape[0] for image in request.images)
    return request_flops(
        engine.config,
        request.denoising,
        request.pruning,
        seen.generation.prompt_tokens,
        seen.generation.visual_tokens,
        tiles,
    )


def report(results: dict[str, Any]) -> str:
    """The tables, as text."""
    machine, model, request = results["machine"], results["model"], results["request"]
    lengths = "/".join(str(request[name]) for name in ("gen_length", "block_length", "steps"))
    head = (
        f"{model['family']}, {model['layers']} layers, hidden {model['hidden']}, {model['dtype']}, "
        f"{machine['device']} with {machine['threads']} threads; prompt of {request['prompt_tokens']:,} tokens, "
        f"{request['visual_tokens']:,} of them visual; gen/block/steps {lengths}; "
        f"fastest of {results['repeats']} interleaved runs"
    )
    columns = (
        "cache", "setting", "latency s", "median s", "tokens/s", "ratio", "FLOP ceiling", "of ceiling", "peak MiB",
        "later MiB", "KV blocks", "agreement",
    )  # fmt: skip
    lines = [
        (
            row["cache"], row["setting"], f"{row['latency_s']:.3f}",
            f"{statistics.median(row['latencies_s']):.3f}", f"{row['tokens_per_s']:.2f}",
            f"{row['ratio']:.2f}", f"{row['ceiling']:.2f}", f"{row['reached']:.0%}", f"{row['peak_bytes'] / MIB:.0f}",
            f"{row['later_peak_bytes'] / MIB:.0f}", f"{row['kv_blocks_admitted']} -> {row['kv_blocks_after_step_0']}",
            f"{row['agreement']:.0%}",
        )
        for row in results["rows"]
    ]  # fmt: skip
    notes = (
        "ratio: dense latency without cache over this latency. FLOP ceiling: the same ratio if only matrix products\n"
        "took time. peak MiB: highest memory above the weights, KV blocks held included; later MiB: after the first\n"
        f"step. KV blocks: of {results['block_size']} tokens, at admission -> after step 0. agreement: canvas tokens\n"
        "equal to dense's; the weights are random, so it says nothing about accuracy."
    )
    return "\n\n".join((head, _table(columns, lines), notes, _scoring_memory(results), _step_table(results)))


def _scoring_memory(results: dict[str, Any]) -> str:
    """A step that scores against one of the same length that does not."""
    by_setting = results["first_step_bytes"]
    plain = by_setting["dense, cache none"]
    lines = [
        (label, f"{peak / MIB:.1f}", f"{peak / plain:.3f}")
        for label, peak in by_setting.items()
        if label.endswith("cache none")
    ]
    return "Peak memory of the first step (activations only; all but dense score visual tokens in it)\n" + _table(
        ("setting", "MiB", "of dense"), lines
    )


def _step_table(results: dict[str, Any]) -> str:
    """Where a step's time goes, dense and with the strongest pruning: steps as columns, parts as rows."""
    seconds = results["step_seconds"]
    most_pruned, own = results["rows"][-1]["setting"], results["rows"][-1]["cache"]
    columns: dict[str, dict[str, float]] = {}
    for setting in dict.fromkeys(("dense", most_pruned)):
        for cache, kind in (("none", "full"), *(((own, "response"),) if own != "none" else ())):
            times = seconds.get(f"{setting}, cache {cache}")
            if times is None:
                continue
            # Where the prompt stays in its pages, the first step moves the survivors: the fullest of first steps.
            if setting != "dense" and cache == own:
                columns[f"{setting}, first"] = times["first"]
            columns[f"{setting}, {kind}"] = times["later"]
    parts = list(dict.fromkeys(part for column in columns.values() for part in column))
    totals = {name: sum(column.values()) for name, column in columns.items()}
    lines = [
        (
            part,
            *(f"{column.get(part, 0) * 1e3:.1f} ({column.get(part, 0) / totals[name]:.0%})"
              for name, column in columns.items()),
        )
        for part in parts
    ]  # fmt: skip
    lines.append(("whole step", *(f"{total * 1e3:.1f}" for total in totals.values())))
    encode = statistics.median(times["encode"] for times in results["step_seconds"].values())
    return (
        "Where a step's time goes, ms (first: full, scores and prunes; full, response: mean of the later steps)\n"
        + _table(("part", *columns), lines)
        + f"\n\nEncoding the image (tower, projector, merge), once a request: {encode * 1e3:.0f} ms"
    )


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[index]) for line in (columns, *lines)) for index in range(len(columns))]

    def text(line: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join((text(columns), rule, *(text(line) for line in lines)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model = parser.add_argument_group("random model")
    model.add_argument("--family", choices=sorted(OWN_CACHES), default="llada-v", help="whose layout and vision path")
    model.add_argument("--hidden", type=int, default=1024, help="width of the language model")
    model.add_argument("--intermediate", type=int, default=3072, help="width of its MLP")
    model.add_argument("--layers", type=int, default=4, help="its layers")
    model.add_argument("--heads", type=int, default=16, help="its attention heads")
    model.add_argument("--tower-hidden", type=int, default=256, help="width of the vision tower")
    model.add_argument("--tower-layers", type=int, default=3, help="layers of the tower that are run")
    model.add_argument("--tile", type=int, default=384, help="side of the tower's input in pixels")
    model.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of weights and arithmetic")
    work = parser.add_argument_group("request")
    work.add_argument("--image", type=_size, default="768x330", metavar="WxH", help="size of the picture in pixels")
    work.add_argument("--gen-length", type=int, default=32, help="canvas length in tokens")
    work.add_argument("--block-length", type=int, default=32, help="canvas positions decoded together")
    work.add_argument("--steps", type=int, default=16, help="denoising steps")
    work.add_argument("--keep", type=_percent, nargs="+", default=[75, 50, 25], help="percent of visual tokens kept")
    work.add_argument("--cache", choices=CACHES, nargs="+", help="none is always run; default: the family's own too")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--repeats", type=int, default=3, help="runs of each setting; the fastest counts")
    machine.add_argument("--device", help="cpu or cuda; without it, cuda where there is one")
    machine.add_argument("--threads", type=int, help="torch's threads; without it, torch's choice")
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
    return options


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in pixels, got {text!r}")
    return int(width), int(height)


def _percent(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be whole percent in [1, 100], got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
