"""How steady the importance of visual tokens is from one denoising step to the next.

RedVTP prunes once, by the scores of the first step, so later steps should look at the same tokens. Every step of an
unpruned request is scored as RedVTP scores the first one, and compared with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from redvtp.denoising.sequence import Sequence as Running
from redvtp.errors import spelled
from redvtp.evaluation.backends import request_of
from redvtp.evaluation.grid import Question
from redvtp.evaluation.table import aligned
from redvtp.evaluation.tasks import Task
from redvtp.local import LocalEngine, Request
from redvtp.pruning.budget import most_important, tokens_to_keep

KEEP_RATIOS = (0.5, 0.25, 0.1)
# Requests have few steps or many; they are averaged over tenths of their steps.
TENTHS = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """One step of one request against its first step.

    progress: share of the request's steps that were done before this one.
    overlap: for each of KEEP_RATIOS, the share of the first step's best tokens that are among this step's best.
    spearman: rank correlation of all tokens.
    """

    step: int
    progress: float
    overlap: tuple[float, ...]
    spearman: float


Compared = Sequence[tuple[Task, Sequence[Comparison]]]


def compare(
    engine: LocalEngine, chosen: Sequence[Question], spell: Callable[[str], str] = str
) -> Iterator[tuple[Task, list[Comparison] | str]]:
    """Each task with its comparisons, in the order in which they end. A text is the reason why it cannot be asked.

    spell: writes knobs in reasons, see `redvtp.errors`.
    """
    scored: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    refused: list[tuple[Task, str]] = []
    taken: list[Question] = []

    def observe(sequence: Running, step: int, importance: Tensor) -> None:
        scored[sequence.request_id].append((step, importance))

    def requests() -> Iterator[Request]:
        for question in chosen:
            try:
                request = request_of(question, engine)
            except ValueError as error:
                refused.append((question.task, spelled(error, spell)))
                continue
            taken.append(question)
            yield request

    engine.runner.observe = observe
    try:
        for number, generation in engine.stream(requests()):
            denoising = taken[number].denoising
            # Where confidence decides, the number of steps is known only at the end.
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


def summarize(compared: Compared) -> list[dict[str, Any]]:
    """One entry for each tenth of the steps that has comparisons: means over requests of their means within it.

    low and high of an overlap: the 10th and 90th percentile of the requests.
    """
    entries = []
    for tenth in range(TENTHS):
        of_requests = [
            ([part.overlap for part in parts], [part.spearman for part in parts])
            for _, comparisons in compared
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


def whole_of(model: str, tasks: str, compared: Compared) -> dict[str, Any]:
    """Everything that was found, as data for consistency.json."""
    groups = list(dict.fromkeys(task.group for task, _ in compared if task.group is not None))
    summary = {"all": summarize(compared)}
    summary |= {name: summarize([entry for entry in compared if entry[0].group == name]) for name in groups}
    return {
        "model": model,
        "tasks": tasks,
        "questions": len(compared),
        "compared": sum(bool(comparisons) for _, comparisons in compared),
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
            for task, comparisons in compared
        ],
    }


def report(whole: dict[str, Any]) -> str:
    """The tables, as Markdown. whole: from `whole_of`."""
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
        lines += [aligned(head, [*rows, chance], left={"steps done"}), ""]
    return "\n".join(lines)
