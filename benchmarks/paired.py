"""Is one checkout slower than another? Both answer the same requests by turns, in a process each.

    git worktree add ../before COMMIT
    python benchmarks/paired.py ../before [--rounds 5] [--layers 4] [--image 768x330]

Each round asks every row of both checkouts, in alternating order, so that whatever else the machine does meets both
alike. What counts is the median of the ratios of pairs: above 1 this checkout is slower. The answers must be the same
tokens. Weights are random, so there is no accuracy beside the times; `redvtp eval` has that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from options import model_flags, shape_of, size
from random_checkpoint import Shape, make_checkpoint
from tqdm import tqdm

HERE = Path(__file__).resolve().parents[1]
USUAL = Shape("llada-v", 1024, 3072, 4, 16, 256, 3, 384)
# Runs in either checkout: only names that both have.
WORKER = """
import json, sys, time
import redvtp
from random_checkpoint import make_image
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt

assert redvtp.__file__.startswith(sys.argv[1]), redvtp.__file__
engine = LocalEngine(sys.argv[2], dtype="float32", device="cpu", vision_cache_bytes=0, max_num_seqs=8)
prompt = chat_prompt(engine.tokenizer, "What is shown in the picture?", 1)
print("ready", flush=True)
for line in sys.stdin:
    row = json.loads(line)
    width, height = row["image"]
    images = [make_image(width - 8 * number, height) for number in range(row["requests"])]
    denoising = DenoisingParams(cache=row["cache"], ignore_eos=True, **row["lengths"])
    pruning = PruningParams(preset="none") if row["keep"] is None else PruningParams(keep_ratio=row["keep"] / 100)
    started = time.perf_counter()
    answers = engine.generate([Request(prompt, (image,), denoising, pruning) for image in images])
    print(json.dumps([time.perf_counter() - started, [answer.output_ids for answer in answers]]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of request. keep: percent of the visual tokens; None for dense."""

    requests: int
    cache: str
    keep: int | None

    def __str__(self) -> str:
        return f"{self.requests} x {self.cache} {'dense' if self.keep is None else f'{self.keep}%'}"


ROWS = [
    *(Row(1, cache, keep) for cache in ("none", "prefix") for keep in (None, 75, 50, 25)),
    *(Row(1, "dual", keep) for keep in (None, 25)),
    *(Row(4, cache, 25) for cache in ("none", "prefix")),
]


class Checkout:
    """One checkout's engine, in a process of its own."""

    def __init__(self, tree: Path, checkpoint: Path) -> None:
        path = os.pathsep.join(map(str, (tree / "engine", tree, tree / "benchmarks")))
        command = [sys.executable, "-c", WORKER, str(tree), str(checkpoint)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )
        if self._pipe(self._process.stdout).readline().strip() != "ready":
            raise SystemExit(f"the engine of {tree} did not start; its message is above")

    def ask(self, row: Row, request: dict[str, Any]) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of each answer."""
        stdin = self._pipe(self._process.stdin)
        stdin.write(json.dumps(asdict(row) | request) + "\n")
        stdin.flush()
        seconds, tokens = json.loads(self._pipe(self._process.stdout).readline())
        return seconds, tokens

    def close(self) -> None:
        self._pipe(self._process.stdin).close()
        self._process.wait()

    @staticmethod
    def _pipe(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    lengths = {"gen_length": options.gen_length, "block_length": options.gen_length, "steps": options.steps}
    request = {"image": options.image, "lengths": lengths}
    workdir: Path = options.workdir or Path(tempfile.gettempdir()) / "vllm-redvtp-benchmarks"
    checkpoint = make_checkpoint(workdir, shape_of(options, "llada-v"))
    both = [Checkout(tree.resolve(), checkpoint) for tree in (options.before, HERE)]
    times: dict[Row, list[tuple[float, float]]] = {row: [] for row in ROWS}
    different: set[Row] = set()
    # Untimed: what a process does only once must not count for the row that comes first.
    for checkout in both:
        checkout.ask(ROWS[-1], request)
    with tqdm(total=options.rounds * len(ROWS), unit="pair", disable=not sys.stderr.isatty()) as bar:
        for turn in range(options.rounds):
            for place, row in enumerate(ROWS):
                order = (0, 1) if (turn + place) % 2 == 0 else (1, 0)
                found = {index: both[index].ask(row, request) for index in order}
                times[row].append((found[0][0], found[1][0]))
                if found[0][1] != found[1][1]:
                    different.add(row)
                bar.update()
    for checkout in both:
        checkout.close()
    print(_table(times, different))


def _table(times: dict[Row, list[tuple[float, float]]], different: set[Row]) -> str:
    lines = ["| requests, cache, kept | before s | this s | this / before, median of pairs | tokens |",
             "|---|---:|---:|---:|---|"]  # fmt: skip
    for row, pairs in times.items():
        before, this = (min(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(after / earlier for earlier, after in pairs)
        lines.append(
            f"| {row} | {before:.3f} | {this:.3f} | {ratio:.3f} | {'DIFFER' if row in different else 'same'} |"
        )
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("before", type=Path, help="the other checkout's folder")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of each row")
    model_flags(parser, USUAL)
    parser.add_argument("--image", type=size, default="768x330", metavar="WxH", help="size of the picture in pixels")
    parser.add_argument("--gen-length", type=int, default=32, help="canvas length in tokens, one canvas block")
    parser.add_argument("--steps", type=int, default=16, help="denoising steps")
    parser.add_argument("--workdir", type=Path, help="folder that keeps the checkpoint; a temporary one without it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
