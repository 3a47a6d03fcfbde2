"""`redvtp compare`: one question about one picture, under every policy, keep ratio and cache, side by side.

    redvtp compare CHECKPOINT --image photo.jpg --prompt "What is shown?" --policies redvtp,random --output kept.png

All of them are asked in one process, by turns, and every number is held against the dense answer of that run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from redvtp.cli.evaluate import INTERRUPTED, check_checkpoint, say, start_engine
from redvtp.cli.evaluation_flags import listed, ratios
from redvtp.cli.flags import BadInput, check_file, check_picture, denoising_of, positive
from redvtp.cli.main import refusing
from redvtp.evaluation.grid import Cell, cells
from redvtp.evaluation.sheet import Panel, sheet
from redvtp.evaluation.table import aligned, shown_ratio
from redvtp.heatmap import draw_saved, side_by_side
from redvtp.local import Generation, LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from redvtp.vision.images import open_image

# Longer answers are cut in the table; --json has all of them.
SHOWN_ANSWER = 60


@dataclass(frozen=True, slots=True)
class Result:
    """One cell, asked `len(latencies_s)` times. keep_ratio: None where the policy has a budget of its own.

    latency_s: median. ratio: the first cell's latency over this one's. agreement: share of the answer's tokens that are
    those of the first cell's answer, place by place, of the longer of both. kv_blocks: held at first, and at the end.
    prunings: as in a trace.
    """

    policy: str
    keep_ratio: float | None
    cache: str
    visual_tokens: int
    visual_tokens_kept: int
    steps: int
    latency_s: float
    latencies_s: list[float]
    ratio: float
    agreement: float
    kv_blocks: tuple[int, int]
    text: str
    output_ids: list[int]
    prunings: list[dict[str, Any]]

    @property
    def dense(self) -> bool:
        return self.policy == "none"

    @property
    def keep(self) -> str:
        return shown_ratio(self.keep_ratio)


def compare(options: argparse.Namespace) -> int:
    """Returns the exit status: 130 when interrupted."""
    compared, denoising, images = _checked(options)
    repeats = positive("repeats", options.repeats) or 1
    # Every answer is to look at its picture, as a server's first answer does.
    engine = start_engine(options, vision_cache_bytes=0)
    prompt = chat_prompt(engine.tokenizer, options.prompt, len(images), template=engine.config.family.template)
    requests = {
        cell: Request(
            prompt,
            images,
            replace(denoising, cache=cell.cache),
            cell.pruning(options.positions),
        )
        for cell in compared
    }
    with refusing():
        for request in requests.values():
            engine.tokenize(request)
    try:
        generations = _ask(engine, requests, repeats)
    except KeyboardInterrupt:
        print("redvtp compare: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    _report(options, engine, images, results(generations))
    return 0


def _checked(options: argparse.Namespace) -> tuple[list[Cell], DenoisingParams, tuple[Image, ...]]:
    """Everything that can be refused before a model is loaded. Raises BadInput."""
    if not options.image:
        raise BadInput("there is nothing to prune in a request without an image; pass --image FILE")
    if options.prompt is None:
        raise BadInput("no question was given; pass --prompt TEXT")
    policies = listed("policies", options.policies)
    if "external" in policies:
        raise BadInput("policy external needs scores that come with a request, and there are none here; leave it out")
    with refusing():
        compared = cells(policies, ratios(options.keep), listed("cache", options.cache))
        PruningParams(positions=options.positions)
        # `random` is to drop the same places in every repeat, and Gumbel noise to fall alike in every cell.
        denoising = replace(denoising_of(options, cache="none"), seed=options.seed or 0)
        check_checkpoint(options)
        if options.output:
            check_picture("output", options.output)
        if options.json:
            check_file("json", options.json)
        return compared, denoising, tuple(open_image(path) for path in options.image)


def _ask(engine: LocalEngine, requests: dict[Cell, Request], repeats: int) -> dict[Cell, list[Generation]]:
    order = list(requests)
    generations: dict[Cell, list[Generation]] = {cell: [] for cell in order}
    with tqdm(total=1 + repeats * len(order), unit="answer", disable=not sys.stderr.isatty()) as bar:
        # Untimed: what a process does only once must not count for the cell that comes first.
        engine.generate([requests[order[0]]])
        bar.update()
        for repeat in range(repeats):
            # Whatever drifts on the machine meets every cell, and each in another place of the round.
            shift = repeat % len(order)
            for cell in order[shift:] + order[:shift]:
                bar.set_description(str(cell))
                generations[cell] += engine.generate([requests[cell]])
                bar.update()
    return generations


def results(generations: dict[Cell, list[Generation]]) -> list[Result]:
    """One for each cell, in order; the first is what all are compared with."""
    found: list[Result] = []
    for cell, repeats in generations.items():
        generation = repeats[-1]
        prunings = [asdict(step.pruning) for step in generation.steps if step.pruning is not None]
        first, last = generation.steps[0], generation.steps[-1]
        latency = statistics.median(repeat.seconds for repeat in repeats)
        found.append(
            Result(
                policy=cell.policy,
                keep_ratio=cell.keep_ratio,
                cache=cell.cache,
                visual_tokens=generation.visual_tokens,
                visual_tokens_kept=len(prunings[-1]["kept"]) if prunings else generation.visual_tokens,
                steps=len(generation.steps),
                latency_s=latency,
                latencies_s=[repeat.seconds for repeat in repeats],
                ratio=(found[0].latency_s if found else latency) / latency,
                agreement=agreement(generation.output_ids, found[0].output_ids if found else generation.output_ids),
                kv_blocks=(first.kv_blocks + first.blocks_freed, last.kv_blocks),
                text=generation.text,
                output_ids=generation.output_ids,
                prunings=prunings,
            )
        )
    return found


def agreement(answer: Sequence[int], expected: Sequence[int]) -> float:
    """Share of equal tokens, place by place, of the longer of the two."""
    longest = max(len(answer), len(expected))
    return sum(a == b for a, b in zip(answer, expected, strict=False)) / longest if longest else 1.0


def _report(options: argparse.Namespace, engine: LocalEngine, images: tuple[Image, ...], found: list[Result]) -> None:
    if options.output:
        picture(engine, images, found).save(options.output)
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
        path: Path = options.json
        path.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    say(table(found))


def table(found: Sequence[Result]) -> str:
    """As Markdown that also lines up in a terminal."""
    head = ("policy", "keep", "cache", "tokens kept", "steps", "latency s", "ratio", "agreement", "KV blocks", "answer")
    rows = [
        (
            "dense" if result.dense else result.policy,
            result.keep,
            result.cache,
            f"{result.visual_tokens_kept:,} of {result.visual_tokens:,}",
            str(result.steps),
            f"{result.latency_s:.3f}",
            f"{result.ratio:.2f}",
            f"{result.agreement:.0%}",
            f"{result.kv_blocks[0]} -> {result.kv_blocks[1]}",
            _shown(result.text),
        )
        for result in found
    ]
    repeats = len(found[0].latencies_s)
    note = (
        f"Latency: {'median of ' if repeats > 1 else ''}{repeats} by turns in one process, from the picture to the "
        "whole answer. Ratio (of latencies) and agreement (of tokens, place by place): against the first row."
    )
    return "\n".join([*aligned(head, rows, left={"policy", "cache", "answer"}), "", note])


def _shown(text: str) -> str:
    text = " ".join(text.split()).replace("|", r"\|")
    return text if len(text) <= SHOWN_ANSWER else f"{text[:SHOWN_ANSWER]}..."


def picture(engine: LocalEngine, images: tuple[Image, ...], found: Sequence[Result]) -> Image:
    """All heat maps, a row for each policy and cache; the dense one, untouched, leads the rows of its cache."""
    rows: dict[tuple[str, str], list[Panel | None]] = {}
    dense: list[Panel | None] = []
    for result in found:
        panel = _panel(engine, images, result)
        if result.dense:
            dense = [panel]
            rows[result.cache, "none"] = []
            continue
        # The place below the dense picture stays free.
        rows.setdefault((result.cache, result.policy), dense or [None]).append(panel)
        dense = []
    if dense:
        rows[found[-1].cache, "none"] = dense
    return sheet([row for row in rows.values() if row])


def _panel(engine: LocalEngine, images: tuple[Image, ...], result: Result) -> Panel:
    name = "dense" if result.dense else f"{result.policy} {'' if result.keep_ratio is None else result.keep}".strip()
    name += "" if result.cache == "none" else f", cache {result.cache}"
    kept = f"{result.visual_tokens_kept:,} of {result.visual_tokens:,} tokens"
    if result.prunings:
        return Panel(draw_saved(images, engine.config, {"prunings": result.prunings}), (name, kept))
    return Panel(side_by_side(images), (name, kept))
