"""What sampling adds to the proposals of a step: time at temperature 1 beside temperature 0, one thread of a CPU.

    python benchmarks/proposals.py [--rows 32] [--vocab 126464] [--rounds 9] [--json results.json]

The third row draws the same amount of noise from a generator, as `torch.rand` in float64: what numbers by place
(`redvtp.noise`) cost instead. It counts processor time of the thread, which other work on the machine does not change.
The three take turns; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from redvtp.canvas.proposals import CONFIDENCE_DTYPE, Choice, propose
from redvtp.noise import Draws


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32, help="undecided rows")
    parser.add_argument("--vocab", type=int, default=126_464, help="ids")
    parser.add_argument("--rounds", type=int, default=9, help="times that each is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = run(options.rows, options.vocab, options.rounds)
    base = results["temperature 0"]
    for name, milliseconds in results.items():
        print(f"{name:32} {milliseconds:8.1f} ms  {milliseconds / base:5.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


@torch.inference_mode()
def run(rows: int, vocab: int, rounds: int) -> dict[str, float]:
    """Milliseconds by name."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 4
    generator = torch.Generator().manual_seed(1)

    def proposing(temperature: float) -> None:
        propose(logits, vocab, [Choice(temperature, "low_confidence", Draws(0, 0))], [torch.arange(rows)])

    def from_a_generator() -> None:
        proposing(0.0)
        noise = torch.rand(logits.shape, generator=generator, dtype=CONFIDENCE_DTYPE).clamp_min_(1e-300)
        noise.log_().neg_().log_()
        logits.to(CONFIDENCE_DTYPE, copy=True).sub_(noise).argmax(-1)

    works: dict[str, Callable[[], None]] = {
        "temperature 0": lambda: proposing(0.0),
        "temperature 1": lambda: proposing(1.0),
        "temperature 1, from a generator": from_a_generator,
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            started = time.thread_time()
            work()
            taken[name].append((time.thread_time() - started) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


if __name__ == "__main__":
    main()
