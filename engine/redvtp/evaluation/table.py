"""The report of an evaluation as Markdown tables that also line up in a terminal.

Accuracy and speed in a row come from the same run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import tabulate

# Heads get no extra room: the tables are wide.
tabulate.MIN_PADDING = 0

_NOTE = (
    "Exact match after normalisation, with Wilson's 95 % interval; against dense with the same cache (dense with a "
    "cache: against dense without), over the same questions, in points with Newcombe's 95 % interval and McNemar's "
    "exact p. Tokens, answers and seconds are of this run."
)


def report(title: str, facts: Iterable[str], cells: Sequence[dict[str, Any]]) -> str:
    """cells: from `summarize`. The table over all questions, then one of accuracies for each group and each task."""
    lines = [
        f"# {title}",
        "",
        *(f"* {fact}" for fact in facts),
        "",
        aligned(_HEAD, map(_row, cells), _NAMES),
        "",
        _NOTE,
        "",
    ]
    for kind in ("groups", "tasks"):
        names = list(dict.fromkeys(name for cell in cells for name in cell[kind]))
        # With one task, its table is the one above.
        if kind == "tasks" and len(names) < 2:
            continue
        for name in names:
            lines += [f"## {kind.removesuffix('s').capitalize()} {name}", ""]
            rows = (_part_row(cell, cell[kind][name]) for cell in cells if name in cell[kind])
            lines += [aligned(_PART_HEAD, rows, _NAMES), ""]
    return "\n".join(lines)


_CELL_HEAD = ("policy", "keep", "cache", "n", "exact match %", "vs dense", "p")
_HEAD = (
    *_CELL_HEAD,
    "tokens/s",
    "answers/s",
    "latency s (median, p95)",
    "visual tokens kept",
    "KV blocks freed",
    "errors",
)
_NAMES = frozenset({"policy", "cache"})
_PART_HEAD = (*_CELL_HEAD, "latency s (median, p95)")


def _row(cell: dict[str, Any]) -> list[str]:
    part = cell["all"]
    return [
        *_accuracy(cell, part),
        _number(cell["tokens_per_second"], 1),
        _number(cell["answers_per_second"], 2),
        _latency(part),
        f"{_number(part['visual_tokens_kept'], 0)} of {_number(part['visual_tokens'], 0)}",
        f"{_number(part['kv_blocks_freed'], 1)} of {_number(part['kv_blocks'], 1)}",
        str(part["errors"]),
    ]


def _part_row(cell: dict[str, Any], part: dict[str, Any]) -> list[str]:
    return [*_accuracy(cell, part), _latency(part)]


def _accuracy(cell: dict[str, Any], part: dict[str, Any]) -> list[str]:
    match, versus = part["exact_match"], part["versus_baseline"]
    name = "dense" if cell["policy"] == "none" else cell["policy"]
    return [
        name,
        shown_ratio(cell["keep_ratio"]),
        cell["cache"],
        str(match["total"]),
        f"{match['share'] * 100:.1f} [{match['low'] * 100:.1f}, {match['high'] * 100:.1f}]",
        "" if versus is None else _points(versus),
        "" if versus is None else _p_value(versus["p_value"]),
    ]


def shown_ratio(keep_ratio: float | None) -> str:
    """In percent; `own` stands for a policy that sets its budget by itself."""
    if keep_ratio is None:
        return "own"
    return f"{keep_ratio:.0%}" if round(keep_ratio * 100, 6) % 1 == 0 else f"{keep_ratio:.1%}"


def _points(versus: dict[str, Any]) -> str:
    return f"{versus['difference'] * 100:+.1f} [{versus['low'] * 100:+.1f}, {versus['high'] * 100:+.1f}]"


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _latency(part: dict[str, Any]) -> str:
    return f"{_number(part['latency_s']['median'], 3)}, {_number(part['latency_s']['p95'], 3)}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str]) -> str:
    """A Markdown table that also lines up in a terminal. left: the heads of the columns that are not numbers."""
    alignment = ["left" if name in left else "right" for name in head]
    return tabulate.tabulate(rows, head, "pipe", colalign=alignment, disable_numparse=True)
