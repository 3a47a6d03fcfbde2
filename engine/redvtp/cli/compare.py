"""`redvtp compare`: one question about one picture, under every policy, keep ratio and cache, side by side.

redvtp compare CHECKPOINT --image photo.jpg --prompt "What is shown?" --policies redvtp,random --output kept.png
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from PIL.Image import Image

from redvtp.cli.checks import (
    INTERRUPTED,
    Mistakes,
    check_checkpoint,
    check_file,
    check_picture,
    denoising_of,
    open_images,
    positive,
    say,
    start_engine,
    warn,
)
from redvtp.cli.flags import listed, ratios
from redvtp.errors import BadInput, refusing
from redvtp.evaluation.grid import Cell, cells
from redvtp.params import DenoisingParams, PruningParams

if TYPE_CHECKING:
    from redvtp.evaluation.comparison import Result
    from redvtp.local import LocalEngine, Request


@dataclass(frozen=True, slots=True)
class _Checked:
    """The checked flags.

    denoising, pruning: what all cells share.
    repeats: answers of each cell.
    """

    cells: list[Cell]
    denoising: DenoisingParams
    pruning: PruningParams
    images: tuple[Image, ...]
    repeats: int


def compare(options: argparse.Namespace) -> int:
    """Returns the exit status: 130 when interrupted."""
    checked = _checked(options)
    from redvtp.evaluation.comparison import ask, results

    # One request at a time: latencies are those of a request alone. No image cache: every answer encodes its image, as
    # a server's first answer does.
    engine = start_engine(options, max_num_seqs=1, vision_cache_bytes=0)
    requests = _requests(engine, options.prompt, checked)
    with refusing():
        for request in requests.values():
            engine.tokenize(request)
    try:
        generations = ask(engine, requests, checked.repeats, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        warn("compare", "interrupted, nothing was written")
        return INTERRUPTED
    _report(options, engine, checked.images, results(generations))
    return 0


def _checked(options: argparse.Namespace) -> _Checked:
    """Everything that is refused before a model is loaded. Raises BadInput."""
    mistakes = Mistakes()
    with mistakes:
        check_checkpoint(options)
    with mistakes:
        if not options.image:
            raise BadInput("there is nothing to prune in a request without an image; pass --image FILE")
        images = open_images(options.image)
    with mistakes:
        if options.prompt is None:
            raise BadInput("no question was given; pass --prompt TEXT")
    with mistakes:
        policies = listed("policies", options.policies)
        if "external" in policies:
            reason = "needs scores that come with a request, and there are none here; leave it out"
            raise BadInput(f"policy external {reason}")
        compared = cells(policies, ratios(options.keep), listed("cache", options.cache))
    with mistakes:
        pruning = PruningParams(positions=options.positions)
        # One seed: `random` drops the same places in every repeat, and all cells get the same Gumbel noise.
        denoising = replace(denoising_of(options, cache="none"), seed=options.seed or 0)
    with mistakes:
        repeats = positive("repeats", options.repeats) or 1
    with mistakes:
        if options.output:
            check_picture("output", options.output)
        if options.json:
            check_file("json", options.json)
    mistakes.refuse()
    return _Checked(compared, denoising, pruning, images, repeats)


def _requests(engine: LocalEngine, question: str, checked: _Checked) -> dict[Cell, Request]:
    from redvtp.local import Request
    from redvtp.prompt import chat_prompt

    prompt = chat_prompt(engine.tokenizer, question, len(checked.images), template=engine.config.family.template)
    return {
        cell: Request(
            prompt, checked.images, replace(checked.denoising, cache=cell.cache), cell.pruning(checked.pruning)
        )
        for cell in checked.cells
    }


def _report(options: argparse.Namespace, engine: LocalEngine, images: tuple[Image, ...], found: list[Result]) -> None:
    from redvtp.evaluation.comparison import picture, table

    if options.output:
        picture(engine.config, images, found).save(options.output)
    if options.json:
        whole = {
            "model": options.model,
            "device": str(engine.device),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "images": [str(path) for path in options.image],
            "prompt": options.prompt,
            "repeats": options.repeats,
            "block_size": engine.cache.block_size,
            "cells": [asdict(result) for result in found],
        }
        options.json.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    say(table(found))
