"""The curves of a training, from its log."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_ACCURACIES = {"all": "visual token read", "accuracy": "masked answer token", "hint_rank": "rank hint"}


def plot_log(log: Path, target: Path) -> None:
    """Loss above, accuracies below, over updates; phase changes are dotted."""
    if not log.is_file():
        return
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "total" in line]
    if not steps:
        return
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 7), sharex=True)
    top.plot([line["updates"] for line in steps], [line.get("loss", line["total"]) for line in steps], lw=1)
    top.set_yscale("log")
    top.set_ylabel("loss")
    for key, label in _ACCURACIES.items():
        points = [(line["updates"], line[key]) for line in steps if key in line]
        if points:
            bottom.plot(*zip(*points, strict=True), lw=1, label=label)
    for group in sorted({group for line in lines for group in line.get("groups", {})}):
        points = [(line["updates"], line["groups"][group]) for line in lines if group in line.get("groups", {})]
        bottom.plot(*zip(*points, strict=True), "o-", ms=3, lw=0.7, label=f"{group}, held out")
    for before, after in pairwise(steps):
        if before["phase"] != after["phase"]:
            for axis in (top, bottom):
                axis.axvline(after["updates"], color="0.6", ls=":", lw=1)
    bottom.set_ylim(0, 1.01)
    bottom.set_ylabel("accuracy, held-out exact match")
    bottom.set_xlabel("updates")
    bottom.legend(fontsize=6, ncol=3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
