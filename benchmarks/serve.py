"""What pruning does to a loaded server: dense against keep ratios on the same small KV pool.

    python benchmarks/serve.py [MODEL] [--pictures FOLDER | --tasks FILE] [--json results.json] [--plot load.png]

Starts one `vllm serve` whose pool holds --hold dense requests. --clients clients ask it at once, each with one request
at a time: first dense, then at each keep ratio. Reports requests in flight, latencies and answers per second, and
whether each answer has the tokens that the same question gets alone. MODEL is any checkpoint folder; without it a
random one is made.

`vllm bench serve` measures the same latencies, but compares no tokens and reads no memory, so it is not used.
"""

from __future__ import annotations

import argparse
import base64
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from image_bytes import png
from load import Load, Question, alone, under_load
from options import model_flags, percent, shape_of, size
from PIL import Image
from random_checkpoint import Shape, make_checkpoint, make_image
from server import started_server
from tqdm import tqdm

from redvtp.evaluation.table import aligned
from redvtp.evaluation.tasks import read_tasks
from redvtp.families.config import load_config
from redvtp.kv.blocks import blocks_needed
from redvtp.params import CACHES
from redvtp.prompt import chat_prompt, split_prompt
from redvtp.vision.images import open_image

QUESTION = "What is shown in the picture?"
PERCENTILES = (50, 90, 99)
USUAL = Shape("llada-v", 256, 768, 3, 4, 64, 2, 384)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    results = run(options)
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says, as data for --json."""
    model = options.model or make_checkpoint(options.workdir, shape_of(options, "llada-v"))
    pictures = list(_pictures(options))
    longest = max(_prompt_tokens(model, question, images) for question, images in pictures) + options.gen_length
    pool = options.hold * blocks_needed(longest, options.block_size)
    questions = [_question(str(index), *pair) for index, pair in enumerate(pictures)]
    flags = [
        *("--dtype", options.dtype, "--block-size", str(options.block_size), "--max-model-len", str(longest)),
        # One block more: vLLM keeps block 0 to itself.
        *("--num-gpu-blocks-override", str(pool + 1)),
        # All requests in the pool may step at once, so that memory is the limit.
        *("--max-num-batched-tokens", str(pool * options.block_size), "--max-num-seqs", str(options.clients)),
        *options.server_flags,
    ]
    settings = [100, *sorted(set(options.keep) - {100}, reverse=True)]
    with tempfile.TemporaryDirectory() as folder, started_server(model, Path(folder) / "server.log", flags) as server:
        rows = [_measure(server.url, questions, keep, options) for keep in settings]
    for row in rows:
        row["goodput_ratio"] = row["goodput"] / rows[0]["goodput"] if rows[0]["goodput"] else None
        row["in_flight_ratio"] = row["in_flight_peak"] / rows[0]["in_flight_peak"]
        admitted, kept = row["kv_blocks_admitted"], row["kv_blocks_kept"]
        # All others have pruned when the newest is admitted.
        row["in_flight_bound"] = min(options.clients, 1 + (pool - admitted) // kept)
    return {
        "model": str(model.name),
        "pool_blocks": pool,
        "longest_request": longest,
        **{name: getattr(options, name) for name in (
            "hold", "clients", "requests", "gen_length", "block_length", "steps", "cache", "block_size", "dtype",
            "deadline",
        )},
        "questions": len(questions),
        "rows": rows,
    }  # fmt: skip


def _pictures(options: argparse.Namespace) -> Sequence[tuple[str, tuple[Image.Image, ...]]]:
    """Questions with their images: of the task file, of the folder, or four pictures that differ in every patch."""
    if options.tasks:
        tasks = read_tasks(options.tasks).tasks[: options.questions]
        return [(task.question, tuple(open_image(path) for path in task.images)) for task in tasks]
    if options.pictures:
        files = sorted(path for path in options.pictures.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not files:
            raise SystemExit(f"no .png or .jpg in {options.pictures}")
        return [(options.question, (open_image(path),)) for path in files[: options.questions]]
    image = make_image(*options.image)
    flips = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_180)
    turned = [image, *(image.transpose(flip) for flip in flips)]
    return [(options.question, (picture,)) for picture in turned[: options.questions]]


def _prompt_tokens(model: Path, question: str, images: Sequence[Image.Image]) -> int:
    config = load_config(model)
    tokenizer, template = config.family.load_tokenizer(model), config.family.template
    text = chat_prompt(tokenizer, question, len(images), template=template)
    pieces = split_prompt(tokenizer, text, len(images), template)
    return sum(map(len, pieces)) + sum(config.vision.counts([image.size for image in images]))


def _question(key: str, text: str, images: Sequence[Image.Image]) -> Question:
    content: list[dict[str, Any]] = []
    for image in images:
        url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    return Question(key, [{"role": "user", "content": [*content, {"type": "text", "text": text}]}])


def _measure(url: str, questions: Sequence[Question], keep: int, options: argparse.Namespace) -> dict[str, Any]:
    """One setting: alone first, then under load. keep: percent; 100 is dense, without scoring."""
    name = "dense" if keep == 100 else f"keep {keep}%"
    knobs: dict[str, Any] = {"redvtp_cache": options.cache, "redvtp_steps": options.steps}
    knobs |= {"redvtp_block_length": options.block_length}
    knobs |= {"redvtp_pruning": "none"} if keep == 100 else {"redvtp_keep_ratio": keep / 100}
    request = {"max_tokens": options.gen_length, "extra_body": {"ignore_eos": True, "vllm_xargs": knobs}}
    expected, reports = alone(url, questions, request)
    repeated = [questions[index % len(questions)] for index in range(options.requests)]
    with tqdm(total=len(repeated), desc=name, unit="request", disable=options.quiet) as bar:
        load = under_load(url, repeated, request, options.clients, bar.update)
    return {"setting": name, **_summary(load, expected, options.deadline), **_blocks(reports)}


def _summary(load: Load, expected: dict[str, list[int]], deadline: float | None) -> dict[str, Any]:
    good = [answer for answer in load.answers if answer.tokens == expected[answer.key]]
    in_time = [answer for answer in good if deadline is None or answer.latency <= deadline]
    # Under full load only: at first nothing runs yet, and at the end clients have nothing left to ask.
    last_sent = max(answer.sent for answer in load.answers)
    running = [(at, gauges) for at, gauges in load.samples if gauges["running"]] or load.samples
    busy = [gauges for at, gauges in running if at <= last_sent] or [gauges for _, gauges in running]
    return {
        "seconds": load.seconds,
        "goodput": len(in_time) / load.seconds,
        "tokens_per_s": sum(len(answer.tokens) for answer in load.answers) / load.seconds,
        "same_tokens": len(good),
        "answers": len(load.answers),
        "in_flight_peak": max(gauges["running"] for gauges in busy),
        "in_flight_mean": float(np.mean([gauges["running"] for gauges in busy])),
        "kv_usage_mean": float(np.mean([gauges["kv_usage"] for gauges in busy])),
        "ttft_s": _percentiles([answer.first_token for answer in load.answers]),
        "latency_s": _percentiles([answer.latency for answer in load.answers]),
        "rows_per_request": load.counters["vllm:redvtp_tokens_computed_total"] / len(load.answers),
        "worker_s": {
            part: load.counters[f"vllm:redvtp_{part}_seconds_total"] for part in ("step", "score", "compaction")
        },
        "samples": [[round(at, 2), *gauges.values()] for at, gauges in load.samples],
    }


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{rank}": float(np.percentile(values, rank)) for rank in PERCENTILES}


def _blocks(reports: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Of the question that needs most, at admission and after its pruning."""
    return {
        "kv_blocks_admitted": max(report["kv_blocks_admitted"] for report in reports.values()),
        "kv_blocks_kept": max(report["kv_blocks_admitted"] - report["blocks_freed"] for report in reports.values()),
    }


def report(results: dict[str, Any]) -> str:
    """The table, as text."""
    lengths = "/".join(str(results[name]) for name in ("gen_length", "block_length", "steps"))
    head = (
        f"{results['model']}, {results['dtype']}; pool of {results['pool_blocks']} blocks of {results['block_size']} "
        f"tokens, for {results['hold']} dense requests of up to {results['longest_request']:,} tokens; "
        f"{results['clients']} clients, {results['requests']} requests over {results['questions']} questions; "
        f"gen/block/steps {lengths}, cache {results['cache']}"
    )
    columns = (
        "setting", "in flight, peak", "of dense", "bound", "mean", "goodput /s", "of dense", "tokens/s",
        "TTFT s p50/90/99", "latency s p50/90/99", "KV use", "KV blocks", "rows/request", "step s", "score s",
        "compaction s", "same tokens",
    )  # fmt: skip
    lines = [
        (
            row["setting"], f"{row['in_flight_peak']:.0f}", f"{row['in_flight_ratio']:.2f}",
            str(row["in_flight_bound"]), f"{row['in_flight_mean']:.1f}", f"{row['goodput']:.3f}",
            "-" if row["goodput_ratio"] is None else f"{row['goodput_ratio']:.2f}", f"{row['tokens_per_s']:.1f}",
            _ranks(row["ttft_s"]), _ranks(row["latency_s"]), f"{row['kv_usage_mean']:.0%}",
            f"{row['kv_blocks_admitted']} -> {row['kv_blocks_kept']}", f"{row['rows_per_request']:,.0f}",
            f"{row['worker_s']['step']:.1f}", f"{row['worker_s']['score']:.2f}",
            f"{row['worker_s']['compaction']:.2f}", f"{row['same_tokens']}/{row['answers']}",
        )
        for row in results["rows"]
    ]  # fmt: skip
    deadline = "" if results["deadline"] is None else f" within {results['deadline']:g} s"
    notes = (
        f"goodput: answers per second{deadline} that are token for token what the question gets alone. in flight,\n"
        "mean and KV use: while clients still had requests to send. bound: 1 + (pool - blocks at admission) // blocks\n"
        "kept, the most that fits while the newest request has not pruned yet. rows/request: rows through the\n"
        "language model. step, score, compaction s: the worker's time in steps, and in these parts of them."
    )
    return "\n\n".join((head, aligned(columns, lines, {"setting"}), notes))


def _ranks(percentiles: dict[str, float]) -> str:
    return " / ".join(f"{value:.1f}" for value in percentiles.values())


def plot(results: dict[str, Any], file: Path) -> None:
    """KV use and requests in flight over time, one line for each setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    usage, running = figure.subplots(2, 1, sharex=True)
    for row in results["rows"]:
        times, in_flight, _, used = zip(*row["samples"], strict=True)
        usage.plot(times, [100 * share for share in used], label=row["setting"])
        running.step(times, in_flight, where="post", label=row["setting"])
    usage.set(ylabel="KV cache in use, %", ylim=(0, 105))
    running.set(ylabel="requests in flight", xlabel="seconds since the load began", ylim=(0, None))
    usage.legend()
    figure.savefig(file, dpi=150)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="checkpoint folder; default: a random one")
    model_flags(parser, USUAL)
    work = parser.add_argument_group("requests")
    work.add_argument("--tasks", type=Path, metavar="FILE", help="questions with images, in the format of redvtp eval")
    work.add_argument("--pictures", type=Path, metavar="FOLDER", help="pictures to ask --question about")
    work.add_argument("--questions", type=int, default=8, help="use at most so many of them")
    work.add_argument("--question", default=QUESTION, help="asked about a picture that comes without one")
    work.add_argument("--image", type=size, default="768x768", metavar="WxH", help="size of the random pictures")
    work.add_argument("--gen-length", type=int, default=32, help="canvas length in tokens")
    work.add_argument("--block-length", type=int, default=32, help="canvas positions decoded together")
    work.add_argument("--steps", type=int, default=16, help="denoising steps")
    work.add_argument("--keep", type=percent, nargs="+", default=[50, 25], help="percent of visual tokens kept")
    work.add_argument("--cache", choices=CACHES, default="none", help="decoding mode")
    load = parser.add_argument_group("load")
    load.add_argument("--hold", type=int, default=4, help="dense requests that the KV pool holds")
    load.add_argument("--clients", type=int, default=16, help="requests that are asked for at once")
    load.add_argument("--requests", type=int, default=32, help="in all, at each setting")
    load.add_argument("--deadline", type=float, metavar="SECONDS", help="count answers as good within this time only")
    load.add_argument("--dtype", default="float32", help="of the server; in float32 tokens must not depend on the load")
    load.add_argument("--block-size", type=int, default=32, help="tokens in a KV cache block")
    load.add_argument("--server-flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to vllm serve")
    output = parser.add_argument_group("files and output")
    workdir = Path(tempfile.gettempdir()) / "vllm-redvtp-benchmarks"
    output.add_argument("--workdir", type=Path, default=workdir, help="where the random checkpoint is kept")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw KV use and requests in flight over time")
    output.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    if options.requests < 1 or options.clients < 1 or options.hold < 1:
        parser.error("--requests, --clients and --hold must be at least 1")
    return options


if __name__ == "__main__":
    main()
