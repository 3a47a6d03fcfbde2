"""The model of `roofline.py` against this machine: rates are measured, `decode.py`'s rows predicted and measured."""

from __future__ import annotations

import argparse
from typing import Any

import decode
import torch
from machines import Machine
from measure import CLOCKS
from options import shape_of
from predict import Predictor, tokens_and_tiles
from random_checkpoint import make_checkpoint
from rates import MEASUREMENTS, Bench, described, mean, measure_rates
from request_steps import CACHES, Asked
from tqdm import tqdm

from redvtp.evaluation.table import aligned
from redvtp.families.config import load_config
from redvtp.local import DTYPES
from redvtp.params import DenoisingParams

# Share of the measured latency that a prediction may be off.
TOLERANCE = 0.25


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Rates, and rows with predicted and measured latency. options: of decode.py; without --cache all of CACHES.

    Raises SystemExit for rows that are not predicted.
    """
    _refuse(options)
    options.cache = options.cache or list(CACHES)
    options.device = "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    config = load_config(make_checkpoint(options.workdir, shape_of(options, options.family)))
    bench = Bench(config, DTYPES[options.dtype], CLOCKS[options.clock])
    machines = [_measured(bench, "rates, before", options.quiet)]
    measured = decode.run(options)
    machines.append(_measured(bench, "rates, after", options.quiet))
    _, tiles = tokens_and_tiles(config, options.image)
    predictor = Predictor(config, mean(machines), bench.code, tiles)
    return {
        "machine": {**measured["machine"], "clock": options.clock},
        "rates": [described(machine) for machine in machines],
        "request": measured["request"],
        "rows": [_compared(predictor, measured["request"], row) for row in measured["rows"]],
    }


def _refuse(options: argparse.Namespace) -> None:
    if options.family != "llada-v" or options.thresholds or set(options.policies) - {"none", "redvtp"}:
        raise SystemExit("only LLaDA-V, dense or with redvtp, in a fixed number of steps, is predicted")
    if not set(options.cache or ()) <= set(CACHES):
        raise SystemExit(f"only these caches are predicted: {', '.join(CACHES)}")
    if options.device not in (None, "cpu"):
        raise SystemExit("rates are measured on a CPU only: leave out --device")


def within_tolerance(row: dict[str, Any]) -> bool:
    return abs(float(row["ratio"]) - 1) <= TOLERANCE


def status(results: dict[str, Any]) -> int:
    """Of the process: 0 if every row is within TOLERANCE."""
    return 0 if all(map(within_tolerance, results["rows"])) else 1


def _measured(bench: Bench, name: str, quiet: bool) -> Machine:
    with tqdm(total=MEASUREMENTS, desc=name, disable=quiet) as bar:
        return measure_rates(bench, bar.update)


def _compared(predictor: Predictor, request: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """A row of decode.py beside its prediction."""
    lengths = DenoisingParams(request["gen_length"], request["block_length"], request["steps"], cache=row["cache"])
    asked = Asked(request["prompt_tokens"], request["visual_tokens"], lengths, row["keep_ratio"])
    predicted = predictor.request(asked)
    return {
        "cache": row["cache"],
        "setting": row["setting"],
        "measured_s": row["latency_s"],
        "predicted_s": predicted,
        "ratio": predicted / row["latency_s"],
        "flops_ratio": predictor.flops(asked) / row["flops"],
        "by_kind_s": predictor.by_kind(asked),
    }


def check_report(results: dict[str, Any]) -> str:
    """The comparison, as text."""
    machine, rows = results["machine"], results["rows"]
    kinds = list(rows[0]["by_kind_s"])
    columns = ("cache", "setting", "measured s", "predicted s", "predicted / measured", "FLOP / counted", *kinds)
    lines = [
        (
            row["cache"], row["setting"], f"{row['measured_s']:.3f}", f"{row['predicted_s']:.3f}",
            f"{row['ratio']:.2f}", f"{row['flops_ratio']:.3f}", *(f"{row['by_kind_s'][kind]:.3f}" for kind in kinds),
        )
        for row in rows
    ]  # fmt: skip
    worst = max(rows, key=lambda row: abs(row["ratio"] - 1))
    good = sum(map(within_tolerance, rows))
    return "\n\n".join(
        (
            f"{machine['device']}, {machine['threads']} threads, {machine['clock']} clock; measured rates",
            "\n".join(f"{when}: {rates}" for when, rates in zip(("before", "after"), results["rates"], strict=True)),
            aligned(columns, lines, {"cache", "setting"}),
            f"{good} of {len(rows)} rows within {TOLERANCE:.0%}; the farthest is {worst['setting']}, cache "
            f"{worst['cache']}, at {worst['ratio']:.2f}. FLOP / counted: the formula's over those that torch counted. "
            "The last columns are the predicted seconds by kind of work.",
        )
    )
