"""From answers to numbers: accuracy, speed and memory of each cell, over all questions, by group and by task.

The result is plain data for summary.json; `table.py` and `plots.py` show it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from redvtp.evaluation.grid import Cell
from redvtp.evaluation.results import cell_of
from redvtp.evaluation.statistics import paired_difference, share

Row = dict[str, Any]


def summarize(rows: Iterable[Row], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """One entry for each cell that has rows, in the order of `cells`; rows of other cells are left out.

    Each has the fields of Cell, and:
    tokens_per_second, answers_per_second: None if nothing was timed.
    all, groups, tasks: the numbers of `_part` for these questions.
    """
    by_cell: dict[Cell, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_cell[cell_of(row)][str(row["id"])] = row
    return [_cell(cell, by_cell) for cell in cells if by_cell[cell]]


def _cell(cell: Cell, by_cell: dict[Cell, dict[str, Row]]) -> dict[str, Any]:
    rows = by_cell[cell]
    baseline = by_cell[cell.baseline] if cell.baseline is not None else {}
    answered = [row for row in rows.values() if row["error"] is None]
    seconds = _busy_seconds(rows.values())
    return {
        **asdict(cell),
        "seconds": seconds,
        "tokens_per_second": sum(row["tokens"] for row in answered) / seconds if seconds else None,
        "answers_per_second": len(answered) / seconds if seconds else None,
        "baseline": asdict(cell.baseline) if cell.baseline is not None else None,
        "all": _part(rows, baseline),
        "groups": {name: _part(part, baseline) for name, part in _parts(rows, "group").items()},
        "tasks": {name: _part(part, baseline) for name, part in _parts(rows, "task").items()},
    }


def _parts(rows: dict[str, Row], field: str) -> dict[str, dict[str, Row]]:
    parts: dict[str, dict[str, Row]] = defaultdict(dict)
    for key, row in rows.items():
        if row[field] is not None:
            parts[row[field]][key] = row
    return dict(parts)


def _busy_seconds(rows: Iterable[Row]) -> float:
    """Time spent on a cell: for each uninterrupted stretch, until its last answer."""
    ends: dict[int, float] = defaultdict(float)
    for row in rows:
        ends[row["span"]] = max(ends[row["span"]], row["clock_s"])
    return sum(ends.values())


def _part(rows: dict[str, Row], baseline: dict[str, Row]) -> dict[str, Any]:
    """exact_match, its difference to the baseline over the questions that both answered, and means per question.

    A question that could not be asked counts as wrong, and in `errors`; other numbers leave it out.
    """
    shared = [key for key in rows if key in baseline]
    versus = None
    if shared:
        now, before = ([bool(side[key]["correct"]) for key in shared] for side in (rows, baseline))
        versus = asdict(paired_difference(now, before))
    answered = [row for row in rows.values() if row["error"] is None]
    latencies = [row["latency_s"] for row in answered]
    return {
        "questions": len(rows),
        "errors": len(rows) - len(answered),
        "exact_match": asdict(share(sum(row["correct"] for row in rows.values()), len(rows))),
        "versus_baseline": versus,
        "latency_s": {
            "median": float(np.percentile(latencies, 50)) if latencies else None,
            "p95": float(np.percentile(latencies, 95)) if latencies else None,
        },
        **{
            name: float(np.mean([row[name] for row in answered])) if answered else None
            for name in ("tokens", "steps", "visual_tokens", "visual_tokens_kept", "kv_blocks", "kv_blocks_freed")
        },
    }
