"""One question about one picture in every cell: by turns in one process, each compared with the first cell's answer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from PIL.Image import Image
from tqdm import tqdm

from redvtp.evaluation.grid import Cell
from redvtp.evaluation.sheet import Panel, sheet
from redvtp.evaluation.table import aligned, shown_ratio
from redvtp.families.config import DvlmConfig
from redvtp.heatmap import draw_saved, side_by_side
from redvtp.local import Generation, LocalEngine, Request

# Longer answers are cut in the table; `results` has all of them.
SHOWN_ANSWER = 60


@dataclass(frozen=True, slots=True)
class Result:
    """One cell.

    keep_ratio: None for a policy that sets its budget by itself.
    latency_s: median of `latencies_s`, one for each repeat.
    ratio: the first cell's latency over this one's.
    agreement: with the first cell's answer, see `agreement`.
    kv_blocks: held at first, and at the end.
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


def ask(
    engine: LocalEngine, requests: dict[Cell, Request], repeats: int, progress: bool
) -> dict[Cell, list[Generation]]:
    """`repeats` answers of each cell. progress: show a bar."""
    order = list(requests)
    generations: dict[Cell, list[Generation]] = {cell: [] for cell in order}
    with tqdm(total=1 + repeats * len(order), unit="answer", disable=not progress) as bar:
        # Untimed: what a process does only once must not count for the cell that comes first.
        engine.generate([requests[order[0]]])
        bar.update()
        for repeat in range(repeats):
            # Each round begins with another cell, so a drift of the machine's speed affects all cells alike.
            shift = repeat % len(order)
            for cell in order[shift:] + order[:shift]:
                bar.set_description(str(cell))
                generations[cell] += engine.generate([requests[cell]])
                bar.update()
    return generations


def results(generations: dict[Cell, list[Generation]]) -> list[Result]:
    """One for each cell, in order; all are compared with the first."""
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
    """Share of the positions of the longer answer that hold the same token in both."""
    longest = max(len(answer), len(expected))
    return sum(a == b for a, b in zip(answer, expected, strict=False)) / longest if longest else 1.0


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
    return "\n".join([aligned(head, rows, left={"policy", "cache", "answer"}), "", note])


def _shown(text: str) -> str:
    text = " ".join(text.split()).replace("|", r"\|")
    return text if len(text) <= SHOWN_ANSWER else f"{text[:SHOWN_ANSWER]}..."


def picture(config: DvlmConfig, images: tuple[Image, ...], found: Sequence[Result]) -> Image:
    """All heat maps, a row for each policy and cache. The unpruned image comes first in the first row of its cache."""
    rows: dict[tuple[str, str], list[Panel | None]] = {}
    dense: list[Panel | None] = []
    for result in found:
        panel = _panel(config, images, result)
        if result.dense:
            dense = [panel]
            rows[result.cache, "none"] = []
            continue
        # In the other rows of the cache, the place of the dense picture stays free.
        rows.setdefault((result.cache, result.policy), dense or [None]).append(panel)
        dense = []
    if dense:
        rows[found[-1].cache, "none"] = dense
    return sheet([row for row in rows.values() if row])


def _panel(config: DvlmConfig, images: tuple[Image, ...], result: Result) -> Panel:
    name = "dense" if result.dense else f"{result.policy} {'' if result.keep_ratio is None else result.keep}".strip()
    name += "" if result.cache == "none" else f", cache {result.cache}"
    kept = f"{result.visual_tokens_kept:,} of {result.visual_tokens:,} tokens"
    if result.prunings:
        return Panel(draw_saved(images, config, {"prunings": result.prunings}), (name, kept))
    return Panel(side_by_side(images), (name, kept))
