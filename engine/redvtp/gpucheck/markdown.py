"""The report as a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from redvtp.gpucheck.rates import COPY, MATRIX
from redvtp.gpucheck.report import FAILED, PASSED, SKIPPED, Report

_VERSIONS = ("torch", "triton", "transformers", "vllm", "xformers")
_STEPS = (
    "step", "batch", "keep", "cache", "attention", "T", "rows", "ms", "GFLOP", "MB", "of products", "of copying", "GiB",
)  # fmt: skip
_KERNELS = ("setting", "step", "kernel", "ms", "calls")


def as_markdown(report: Report) -> str:
    machine = report.machine
    versions = ", ".join(f"{name} {machine[name]}" for name in _VERSIONS if machine.get(name))
    lines = [f"# {machine['name']}", "", f"{versions}; {report.seconds:.0f} s in all."]
    if report.rates:
        copy, matrix = report.rates[COPY] / 1e9, report.rates[MATRIX] / 1e12
        lines += ["", f"It copies {copy:,.3g} GB/s and multiplies {matrix:,.3g} TFLOP/s."]
    counts = report.counts()
    rows = ([part, *(count[status] for status in (PASSED, FAILED, SKIPPED))] for part, count in counts.items())
    lines += ["", *_table(("checks", PASSED, FAILED, SKIPPED), rows, 1)]
    if report.failed:
        lines += ["", "## Failed", *(f"* {check.part}: {check.name}: {check.detail}" for check in report.failed)]
    skipped = Counter(f"{check.part}: {check.detail}" for check in report.checks if check.status == SKIPPED)
    if skipped:
        lines += ["", "## Skipped", *(f"* {reason} ({count})" for reason, count in skipped.items())]
    if report.cells:
        lines += ["", "## Steps", "Rows, GFLOP and MB are those of the batch; T is the temperature.", ""]
        lines += _table(_STEPS, map(_step, report.cells), 1)
    if report.kernels:
        lines += ["", "## Where a step's time goes", "", *_table(_KERNELS, map(_kernel, report.kernels), 3)]
    if report.left_out:
        lines += ["", "## Left out", *(f"* {entry}" for entry in report.left_out)]
    return "\n".join(lines) + "\n"


def _step(cell: Mapping[str, Any]) -> list[object]:
    return [
        cell["what"], cell["batch"], f"{cell['keep']:.0%}", cell["cache"], cell["attention"],
        f"{cell['temperature']:g}", cell["rows"], f"{cell['ms']:.3f}", f"{cell['tflop'] * 1e3:,.4g}",
        f"{cell['gigabytes'] * 1e3:,.4g}", f"{cell['of_matrix']:.1%}", f"{cell['of_copy']:.1%}",
        f"{cell['peak_gib']:.1f}",
    ]  # fmt: skip


def _kernel(entry: Mapping[str, Any]) -> list[object]:
    return [entry["setting"], entry["step"], entry["kernel"], f"{entry['ms']:.3f}", entry["calls"]]


def _table(head: Iterable[str], rows: Iterable[Iterable[object]], words: int) -> list[str]:
    """words: columns to the left that hold no numbers. Not tabulate: a bare machine has none."""
    names = list(head)
    rule = "|".join("---" if place < words else "---:" for place in range(len(names)))
    return [_row(names), f"|{rule}|", *map(_row, rows)]


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
