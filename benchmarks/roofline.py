"""Predicts step times and requests per second from FLOP, bytes and launches: what to expect of a GPU.

    python benchmarks/roofline.py [--cards H100 L40S] [--keep 50 25] [--batch 1 4 16]
    python benchmarks/roofline.py --check [flags of decode.py]

Without --check: tables for LLaDA-V 8B on cards, from the rates that their makers publish. They are predictions; no card
was measured. With --check the same model meets this machine: it measures the rates of products, attention and
elementwise work here, predicts the rows of `decode.py` from them (random checkpoint, caches none, prefix and dual),
lets `decode.py` measure these rows, and exits with status 1 if a prediction is more than 25 % off. On a machine that
has other work, `--check --clock processor --threads 1` counts processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import decode
from machines import CARDS
from options import percent, size
from predict import tokens_and_tiles, weight_bytes
from predicted_tables import Question, tables
from random_checkpoint import PUBLISHED, config_of
from request_steps import Asked
from roofline_check import check, check_report, status
from work import Code

from redvtp.families.config import read_config
from redvtp.params import DenoisingParams

# Of chat template and question, beside the picture.
TEXT_TOKENS = 62


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if options.check is None:
        print(tables(_question(options), [card for card in CARDS if card.name in options.cards]))
        return 0
    decoding = decode.parse_options(options.check)
    results = check(decoding)
    print(check_report(results))
    if decoding.json:
        decoding.json.write_text(json.dumps(results, indent=1) + "\n")
    return status(results)


def _question(options: argparse.Namespace) -> Question:
    config = read_config(config_of(PUBLISHED), Path())
    visual, tiles = tokens_and_tiles(config, options.image)
    code = Code(2, in_place=True, fused=options.fused)
    denoising = DenoisingParams(options.gen_length, options.block_length, options.steps)
    return Question(
        config,
        Asked(visual + TEXT_TOKENS, visual, denoising),
        tiles,
        weight_bytes(config, code.itemsize),
        sorted({100, *options.keep}, reverse=True),
        options.batch,
        code,
        options.gap_us * 1e-6,
        options.host_us * 1e-6,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--check",
        nargs=argparse.REMAINDER,
        metavar="FLAG",
        help="predict and measure the rows of decode.py on this machine; the rest are flags of decode.py",
    )
    names = [card.name for card in CARDS]
    table = parser.add_argument_group("predicted tables")
    table.add_argument("--cards", choices=names, nargs="+", default=names, help="which ones")
    table.add_argument("--image", type=size, default="768x768", metavar="WxH", help="size of the picture in pixels")
    table.add_argument("--keep", type=percent, nargs="+", default=[50, 25], help="percent of visual tokens kept")
    table.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16], help="requests that step together")
    table.add_argument("--gen-length", type=int, default=64, help="canvas length in tokens")
    table.add_argument("--block-length", type=int, default=32, help="canvas positions decoded together")
    table.add_argument("--steps", type=int, default=32, help="denoising steps")
    table.add_argument("--gap-us", type=float, default=2.0, help="microseconds between two kernels (assumed)")
    table.add_argument("--host-us", type=float, default=8.0, help="microseconds of the host for a launch (assumed)")
    table.add_argument("--fused", action="store_true", help="norms, rotary and activations as one launch each")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
