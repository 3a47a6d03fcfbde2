"""A LLaDA-V of the true 8B sizes on this machine: loads, answers one question about one picture, gives blocks back.

    python benchmarks/real_size.py [--workdir FOLDER] [--json results.json]

Writes a checkpoint with random weights (17 GB in bfloat16, kept in --workdir), serves it with `vllm serve` on the CPU
and asks with the openai client. Reports how long it took to load, each denoising step, the KV blocks that the pruning
freed, and memory at its peak. It takes minutes, 22 GB of memory and a machine with nothing else to do. Random weights:
the answer means nothing.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from image_bytes import png
from load import Question, alone
from options import model_flags, percent, shape_of, size
from predict import weight_bytes
from random_checkpoint import PUBLISHED, Shape, checkpoint_folder, config_of, make_checkpoint, make_image
from server import started_server

from redvtp.doctor.findings import readable
from redvtp.evaluation.table import aligned
from redvtp.families.config import DvlmConfig, read_config
from redvtp.kv.blocks import blocks_needed, kv_token_bytes
from redvtp.params import CACHES

QUESTION = "What is shown in the picture?"
BLOCK_SIZE = 32
MIB = 1 << 20
# What server and activations took beside weights and KV cache, measured at 8B.
BESIDE = 2_800_000_000
# Beside the checkpoint's own size: logs, and the file system's bookkeeping.
SPARE_DISK = 1 << 30
SAMPLE_SECONDS, SAY_SECONDS = 0.5, 20


class MemoryWatch:
    """The least memory that was free between `start` and `stop`, and a line on stderr now and then.

    What is read from files counts as free: the system takes it back when it is needed.
    """

    def __init__(self, say_seconds: float = SAY_SECONDS) -> None:
        self.before = self.least = psutil.virtual_memory().available
        self.doing = ""
        self._say_seconds = say_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def taken(self) -> int:
        """Bytes at the peak, above the level at the beginning."""
        return self.before - self.least

    def _watch(self) -> None:
        started = said = time.monotonic()
        while not self._ended.wait(SAMPLE_SECONDS):
            free = psutil.virtual_memory().available
            self.least = min(self.least, free)
            if time.monotonic() - said >= self._say_seconds:
                said = time.monotonic()
                say(f"{said - started:.0f} s: {self.doing}, {readable(max(0, self.before - free))} taken")


def say(line: str) -> None:
    """On stderr: a line of progress."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    results = run(options)
    print(report(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything the report says. Raises SystemExit, before anything is written, if memory or disk is too small."""
    shape = _shape(options)
    config = read_config(config_of(shape), options.workdir)
    weights, cache = weight_bytes(config, 2), kv_bytes(config, options.max_model_len)
    options.workdir.mkdir(parents=True, exist_ok=True)
    folder, complete = checkpoint_folder(options.workdir, shape)
    found = shortage(
        psutil.virtual_memory().available,
        shutil.disk_usage(options.workdir).free,
        weights + cache + BESIDE,
        0 if complete else weights + SPARE_DISK,
    )
    if found:
        raise SystemExit(found)
    say(f"checkpoint {folder}, {readable(weights)} of weights: " + ("is there" if complete else "being written"))
    make_checkpoint(options.workdir, shape, lambda file: say(f"wrote {file.name}"))
    flags = [
        *("--dtype", "bfloat16", "--max-model-len", str(options.max_model_len), "--block-size", str(BLOCK_SIZE)),
        *("--max-num-seqs", "1", "--kv-cache-memory-bytes", f"{-(-cache // MIB)}M"),
    ]
    with MemoryWatch() as watch:
        watch.doing = "the server loads"
        started = time.monotonic()
        with started_server(folder, options.workdir / "real-size-server.log", flags) as server:
            loaded = time.monotonic() - started
            say(f"ready after {loaded:.0f} s; asking")
            watch.doing = "the answer is on its way"
            found_report = _ask(server.url, options)
    return {
        "model": {"parameters_bytes": weights, "kv_cache_bytes": cache},
        "load_s": loaded,
        "memory_bytes": watch.taken,
        "report": found_report,
    }


def kv_bytes(config: DvlmConfig, tokens: int) -> int:
    """A KV cache for one request of so many tokens. One block more: vLLM keeps block 0 for itself."""
    token = kv_token_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, 2)
    return (blocks_needed(tokens, BLOCK_SIZE) + 1) * BLOCK_SIZE * token


def shortage(free_memory: int, free_disk: int, memory: int, disk: int) -> str | None:
    """What is missing, in a sentence for each; None if both are there. All in bytes."""
    found = []
    if free_memory < memory:
        found.append(
            f"needs {readable(memory)} of memory and {readable(free_memory)} are free: "
            "end other programs, or use a machine with more"
        )
    if free_disk < disk:
        found.append(
            f"needs {readable(disk)} of disk for the checkpoint and {readable(free_disk)} are free: "
            "choose another folder with --workdir"
        )
    return "\n".join(found) or None


def _ask(url: str, options: argparse.Namespace) -> dict[str, Any]:
    """The report of the answer, with every step."""
    picture = f"data:image/png;base64,{base64.b64encode(png(make_image(*options.image))).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": QUESTION}]
    knobs = {"redvtp_steps": options.steps, "redvtp_keep_ratio": options.keep / 100, "redvtp_cache": options.cache}
    request = {
        "max_tokens": options.gen_length,
        "extra_body": {"ignore_eos": True, "vllm_xargs": {**knobs, "redvtp_report": "full"}},
    }
    _, reports = alone(url, [Question("picture", [{"role": "user", "content": content}])], request)
    return reports["picture"]


def report(results: dict[str, Any]) -> str:
    """The results, as text."""
    found = results["report"]
    lines = [
        (
            str(step["step"]), step["kind"], f"{step['tokens_computed']:,}", str(step["blocks_freed"]),
            f"{step['ms'] / 1e3:.1f}",
        )
        for step in found["trace"]
    ]  # fmt: skip
    return "\n\n".join(
        (
            f"{readable(results['model']['parameters_bytes'])} of weights, a KV cache of "
            f"{readable(results['model']['kv_cache_bytes'])}: ready after {results['load_s']:.0f} s; "
            f"{readable(results['memory_bytes'])} of memory taken at the peak",
            f"prompt of {found['prompt_tokens']:,} tokens; {found['visual_tokens']:,} visual tokens, "
            f"{found['visual_tokens_kept']:,} kept; {found['blocks_freed']} of {found['kv_blocks_admitted']} KV blocks "
            "freed",
            aligned(("step", "kind", "tokens computed", "KV blocks freed", "seconds"), lines, {"kind"}),
        )
    )


def _shape(options: argparse.Namespace) -> Shape:
    sizes = ("vocab", "tower_inner", "tower_heads", "dtype", "shard_bytes")
    return replace(shape_of(options, PUBLISHED.family), **{name: getattr(PUBLISHED, name) for name in sizes})


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    model_flags(parser, PUBLISHED)
    work = parser.add_argument_group("request")
    work.add_argument("--image", type=size, default="384x384", metavar="WxH", help="size of the picture in pixels")
    work.add_argument("--gen-length", type=int, default=4, help="canvas length in tokens")
    work.add_argument("--steps", type=int, default=3, help="denoising steps")
    work.add_argument("--keep", type=percent, default=25, help="percent of visual tokens kept")
    work.add_argument("--cache", choices=CACHES, default="none", help="decoding mode")
    work.add_argument("--max-model-len", type=int, default=4096, help="longest request that the server admits")
    output = parser.add_argument_group("files and output")
    workdir = Path(tempfile.gettempdir()) / "vllm-redvtp-benchmarks"
    output.add_argument("--workdir", type=Path, default=workdir, help="where the checkpoint is kept")
    output.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
