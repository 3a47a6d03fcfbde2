"""`redvtp consistency`: how steady the importance of visual tokens is from one denoising step to the next.

    redvtp consistency CHECKPOINT tasks.jsonl --output results

RedVTP prunes once, by the scores of the first step. That is sound as far as later steps look at the same tokens, and
this measures it: every step of an unpruned request is scored as RedVTP scores the first one, and compared with it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from redvtp.cli.evaluate import EXTRA, INTERRUPTED, check_checkpoint, say, settings_of, start_engine
from redvtp.cli.flags import BadInput, check_folder, positive
from redvtp.cli.main import refusing
from redvtp.denoising.sequence import Sequence as Running
from redvtp.evaluation.backends import request_of
from redvtp.evaluation.grid import Cell, Question, questions
from redvtp.evaluation.table import aligned
from redvtp.evaluation.tasks import Task, read_tasks
from redvtp.local import LocalEngine, Request
from redvtp.pruning.budget import most_important, tokens_to_keep

KEEP_RATIOS = (0.5, 0.25, 0.1)
# Requests have few steps or many; they are averaged over tenths of their way.
TENTHS = 10
DENSE = Cell("none", 1.0, "none")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One step of one request against its first step.

    progress: share of the request's steps that were done before this one. overlap: for each of KEEP_RATIOS, the share
    of the first step's best tokens that are among this step's best. spearman: rank correlation of all tokens.
    """

    step: int
    progress: float
    overlap: tuple[float, ...]
    spearman: float


def measure(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 when questions could not be asked, 130 when interrupted."""
    asked = _questions(options)
    check_checkpoint(options)
    check_folder("output", options.output)
    engine = start_engine(options)
    told: list[tuple[Task, list[Comparison]]] = []
    failed: list[str] = []
    try:
        with tqdm(total=len(asked), unit="question", disable=not sys.stderr.isatty()) as bar:
            for task, result in compare(engine, asked):
                bar.update()
                if isinstance(result, str):
                    failed.append(f"{task.id}: {result}")
                else:
                    told.append((task, result))
    except KeyboardInterrupt:
        print("redvtp consistency: interrupted, nothing was written", file=sys.stderr)
        return INTERRUPTED
    if not any(result for _, result in told):
        raise BadInput("no request was scored at two steps; take questions about images, and more --steps")
    _report(options, told)
    if failed:
        print(
            f"redvtp consistency: {len(failed)} questions could not be asked: {'; '.join(failed[:3])}", file=sys.stderr
        )
    return 1 if failed else 0


def compare(engine: LocalEngine, asked: Sequence[Question]) -> Iterator[tuple[Task, list[Comparison] | str]]:
    """Each task with its comparisons, in the order in which they end, or with the reason why it cannot be asked."""
    scored: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    refused: list[tuple[Task, str]] = []
    taken: list[Question] = []

    def observe(sequence: Running, step: int, importance: Tensor) -> None:
        scored[sequence.request_id].append((step, importance))

    def requests() -> Iterator[Request]:
        for question in asked:
            try:
                request = request_of(question, engine)
            except ValueError as error:
                refused.append((question.task, str(error)))
                continue
            taken.append(question)
            yield request

    engine.runner.observe = observe
    try:
        for number, generation in engine.stream(requests()):
            denoising = taken[number].denoising
            # Where confidence decides, how many steps there are is known at the end.
            steps = len(generation.steps) if denoising.by_confidence else denoising.resolved_steps
            yield taken[number].task, _comparisons(scored.pop(str(number), []), steps)
    finally:
        engine.runner.observe = None
    yield from refused


def top_overlap(first: Tensor, other: Tensor, keep_ratio: float) -> float:
    """Share of the tokens that pruning at `keep_ratio` by `first` [visual] keeps, and by `other` [visual] keeps too."""
    count = tokens_to_keep(first.numel(), keep_ratio)
    best = set(most_important(first, count).tolist())
    return len(best & set(most_important(other, count).tolist())) / count


def _comparisons(scored: Sequence[tuple[int, Tensor]], steps: int) -> list[Comparison]:
    if not scored:
        return []
    (_, first), *later = scored
    return [
        Comparison(
            step,
            step / steps,
            tuple(top_overlap(first, importance, ratio) for ratio in KEEP_RATIOS),
            float(spearmanr(first.numpy(), importance.numpy()).statistic) if first.numel() > 1 else 1.0,
        )
        for step, importance in later
    ]


def _questions(options: argparse.Namespace) -> list[Question]:
    limit = positive("limit", options.limit)
    positive("concurrency", options.concurrency)
    if options.suffix:
        raise BadInput("--suffix is not supported here; leave it out")
    if options.cache != "none":
        raise BadInput("--cache must be none here: a step that reads the cache does not look at the image anew")
    with refusing():
        return questions(read_tasks(options.tasks).tasks[:limit], DENSE, settings_of(options))


def summarize(told: Sequence[tuple[Task, Sequence[Comparison]]]) -> list[dict[str, Any]]:
    """One entry for each tenth of the way that has comparisons: means over requests of their means within it.

    low and high of an overlap: the 10th and 90th percentile of the requests.
    """
    entries = []
    for tenth in range(TENTHS):
        of_requests = [
            ([part.overlap for part in parts], [part.spearman for part in parts])
            for _, comparisons in told
            if (parts := [part for part in comparisons if min(int(part.progress * TENTHS), TENTHS - 1) == tenth])
        ]
        if not of_requests:
            continue
        overlaps = np.array([np.mean(overlap, axis=0) for overlap, _ in of_requests])
        entries.append(
            {
                "from": tenth / TENTHS,
                "to": (tenth + 1) / TENTHS,
                "requests": len(of_requests),
                "overlap": {
                    str(ratio): {
                        "mean": float(overlaps[:, column].mean()),
                        "low": float(np.percentile(overlaps[:, column], 10)),
                        "high": float(np.percentile(overlaps[:, column], 90)),
                    }
                    for column, ratio in enumerate(KEEP_RATIOS)
                },
                "spearman": float(np.mean([np.mean(values) for _, values in of_requests])),
            }
        )
    return entries


def _report(options: argparse.Namespace, told: Sequence[tuple[Task, Sequence[Comparison]]]) -> None:
    groups = list(dict.fromkeys(task.group for task, _ in told if task.group is not None))
    summary = {"all": summarize(told)}
    summary |= {name: summarize([entry for entry in told if entry[0].group == name]) for name in groups}
    whole = {
        "model": options.model,
        "tasks": str(options.tasks),
        "questions": len(told),
        "compared": sum(bool(comparisons) for _, comparisons in told),
        "groups": summary,
        "requests": [
            {
                "id": task.id,
                "task": task.name,
                "group": task.group,
                "steps": [part.step for part in comparisons],
                "overlap": {str(r): [part.overlap[i] for part in comparisons] for i, r in enumerate(KEEP_RATIOS)},
                "spearman": [part.spearman for part in comparisons],
            }
            for task, comparisons in told
        ],
    }
    folder: Path = options.output
    (folder / "consistency.json").write_text(json.dumps(whole) + "\n", encoding="utf-8")
    text = _text(whole)
    (folder / "consistency.md").write_text(text, encoding="utf-8")
    try:
        from redvtp.evaluation.plots import draw_consistency
    except ModuleNotFoundError as error:
        print(f"redvtp consistency: no plot was drawn, {error.name} is not installed; {EXTRA}", file=sys.stderr)
    else:
        draw_consistency(folder, summary, KEEP_RATIOS)
    say(json.dumps(whole) if options.json else text)


def _text(whole: dict[str, Any]) -> str:
    head = ("steps done", "requests", *(f"top {ratio:.0%} shared" for ratio in KEEP_RATIOS), "Spearman")
    chance = ("by chance", "", *(f"{ratio:.0%}" for ratio in KEEP_RATIOS), "0")
    lines = [
        f"# Importance of visual tokens, later steps against the first: {whole['tasks']}",
        "",
        f"* {whole['model']}, {whole['compared']} of {whole['questions']} requests were scored at more than one step",
        "",
    ]
    for name, entries in whole["groups"].items():
        if not entries:
            continue
        rows = [
            (
                f"{entry['from']:.0%} to {entry['to']:.0%}",
                str(entry["requests"]),
                *(f"{entry['overlap'][str(ratio)]['mean']:.1%}" for ratio in KEEP_RATIOS),
                f"{entry['spearman']:.3f}",
            )
            for entry in entries
        ]
        lines += [] if name == "all" else [f"## Group {name}", ""]
        lines += [*aligned(head, [*rows, chance], left={"steps done"}), ""]
    return "\n".join(lines)
