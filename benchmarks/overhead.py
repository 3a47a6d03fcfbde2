"""What vLLM's scheduling and the plugin add to the engine's step.

    python benchmarks/overhead.py [--requests 8] [--cache prefix] [--json results.json]

Serves requests about random pictures with a random checkpoint through `vllm.LLM` in one process, and takes the time of
every engine step of vLLM and of the denoising step inside it. It counts processor time of the
thread, which other work on the machine does not change. So torch runs with one thread, and only a CPU can be measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from random_checkpoint import Shape, make_checkpoint, make_image
from vllm import LLM, SamplingParams


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=8, help="requests that run together")
    parser.add_argument("--cache", default="prefix", help="decoding mode")
    parser.add_argument("--hidden", type=int, default=512, help="width of the language model")
    parser.add_argument("--layers", type=int, default=2, help="its layers")
    parser.add_argument("--gen-length", type=int, default=32, help="canvas length in tokens")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    options = parser.parse_args(arguments)
    results = run(options)
    print(
        f"{options.requests} requests, cache {options.cache}: {results['steps']} steps after the first, "
        f"median {results['step_ms']:.1f} ms each, {results['engine_ms']:.1f} ms of them in the engine: "
        f"overhead {results['overhead']:.1%}"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the steps that follow the first one, in which images are encoded."""
    workdir = Path(tempfile.gettempdir()) / "vllm-redvtp-benchmarks"
    shape = Shape("llada-v", options.hidden, 2 * options.hidden, options.layers, options.hidden // 64, 64, 2, 384)
    llm = LLM(
        str(make_checkpoint(workdir, shape)),
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=options.requests,
        max_num_batched_tokens=4096 * options.requests,
        disable_log_stats=True,
    )
    torch.set_num_threads(1)
    runner = llm.llm_engine.model_executor.driver_worker.model_runner
    inside = _timed(runner._engine)
    sampling = SamplingParams(
        max_tokens=options.gen_length,
        temperature=0.0,
        ignore_eos=True,
        extra_args={"redvtp_cache": options.cache, "redvtp_keep_ratio": 0.25, "redvtp_steps": options.gen_length},
    )
    for number in range(options.requests):
        prompt: Any = {"prompt": "<image>\nWhat is shown?", "multi_modal_data": {"image": [make_image(384, 384)]}}
        llm.llm_engine.add_request(str(number), prompt, sampling)
    whole: list[float] = []
    while llm.llm_engine.has_unfinished_requests():
        started = time.thread_time()
        llm.llm_engine.step()
        whole.append(time.thread_time() - started)
    steps, engine = whole[1 : len(inside)], inside[1:]
    shares = [(all_ - inner) / inner for all_, inner in zip(steps, engine, strict=True)]
    return {
        "requests": options.requests,
        "cache": options.cache,
        "steps": len(steps),
        "step_ms": statistics.median(steps) * 1e3,
        "engine_ms": statistics.median(engine) * 1e3,
        "overhead": statistics.median(shares),
    }


def _timed(engine: Any) -> list[float]:
    """Seconds of every step the engine takes from now on."""
    seconds: list[float] = []
    step = engine.step

    def timed(batch: Any) -> Any:
        started = time.thread_time()
        reports = step(batch)
        seconds.append(time.thread_time() - started)
        return reports

    engine.step = timed
    return seconds


if __name__ == "__main__":
    main()
