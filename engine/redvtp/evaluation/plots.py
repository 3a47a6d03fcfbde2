"""Pictures of an evaluation: accuracy against keep ratio and against latency; how steady importance is over steps.

They need matplotlib (`pip install 'vllm-redvtp[eval]'`). The numbers are those of summary.json and consistency.json.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Works without a display.
matplotlib.use("Agg")

_COLORS = {"none": "black", "redvtp": "tab:red", "random": "tab:gray", "uniform": "tab:blue"}
_LINES = {"none": "-", "prefix": "--", "dual": ":"}
_MARKS = {"none": "o", "prefix": "s", "dual": "^"}


def draw(folder: Path, cells: Sequence[dict[str, Any]]) -> list[Path]:
    """cells: from `summarize`. Writes both pictures, one panel for all questions and one for each group."""
    names = ["all", *dict.fromkeys(name for cell in cells for name in cell["groups"])]
    written = []
    for stem, panel in (("accuracy_vs_keep_ratio", _keep_ratio_panel), ("accuracy_vs_latency", _latency_panel)):
        figure = Figure(figsize=(6 * len(names), 4.5), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            shown = [(cell, _part(cell, name)) for cell in cells]
            present = [(cell, part) for cell, part in shown if part is not None]
            panel(axis, present)
            axis.set_title(f"{name} (n = {present[0][1]['questions']:,})")
            axis.set_ylabel("exact match, % (95 % intervals)")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize="small", loc="lower right" if stem == "accuracy_vs_keep_ratio" else "upper left")
        written.append(folder / f"{stem}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def draw_consistency(folder: Path, groups: Mapping[str, Sequence[dict[str, Any]]], ratios: Sequence[float]) -> Path:
    """groups: tenths of the way, from `consistency.summarize`. One panel for each that has any."""
    shown = {name: entries for name, entries in groups.items() if entries}
    figure = Figure(figsize=(6 * len(shown), 4.5), layout="constrained")
    for axis, (name, entries) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        middles = [(entry["from"] + entry["to"]) * 50 for entry in entries]
        for ratio, color in zip(ratios, ("tab:green", "tab:orange", "tab:red"), strict=True):
            means, lows, highs = (
                [entry["overlap"][str(ratio)][which] * 100 for entry in entries] for which in ("mean", "low", "high")
            )
            axis.plot(middles, means, color=color, marker="o", label=f"top {ratio * 100:g} %")
            axis.fill_between(middles, lows, highs, color=color, alpha=0.15, linewidth=0)
            axis.axhline(ratio * 100, color=color, linestyle=":", linewidth=1)
        axis.set(xlabel="steps done, %", ylabel="shared with the first step, %", xlim=(0, 100), ylim=(0, 102))
        axis.set_title(f"{name} (dotted: by chance; shaded: 80 % of requests)", fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    path = folder / "consistency.png"
    figure.savefig(path, dpi=120)
    return path


Panel = Sequence[tuple[dict[str, Any], dict[str, Any]]]


def _keep_ratio_panel(axis: Axes, cells: Panel) -> None:
    for number, (policy, cache, points) in enumerate(_curves(cells)):
        # Shifted, or the intervals of policies that score alike hide each other.
        axis.errorbar(
            [_kept(cell, part) * 100 + 0.5 * number * (policy != "none") for cell, part in points],
            *_accuracies([part for _, part in points]),
            **_style(policy, cache),
            label=_label(policy, cache, cells),
        )
    axis.set(xlabel="visual tokens kept, %", ylim=(-3, 103))


def _latency_panel(axis: Axes, cells: Panel) -> None:
    for policy, cache, points in _curves(cells):
        timed = [(cell, part) for cell, part in points if part["latency_s"]["median"] is not None]
        medians = [part["latency_s"]["median"] for _, part in timed]
        shares, spread = _accuracies([part for _, part in timed])
        axis.errorbar(medians, shares, spread, **_style(policy, cache), label=_label(policy, cache, cells))
        for (cell, _), median, share in zip(timed, medians, shares, strict=True):
            kept = cell["keep_ratio"]
            text = "own" if kept is None else f"{kept * 100:g} %"
            axis.annotate(text, (median, share), textcoords="offset points", xytext=(5, 4), fontsize="x-small")
    axis.set(xlabel="latency of an answer, median s", ylim=(-3, 103))
    axis.set_xlim(left=0)


def _curves(cells: Panel) -> Iterator[tuple[str, str, Panel]]:
    """(policy, cache, points by keep ratio). A policy's curve ends in dense; one that sets its budget by itself is a
    single point. Dense comes last, on top."""
    for cache in dict.fromkeys(cell["cache"] for cell, _ in cells):
        here = [(cell, part) for cell, part in cells if cell["cache"] == cache]
        dense = [(cell, part) for cell, part in here if cell["policy"] == "none"]
        policies = dict.fromkeys(cell["policy"] for cell, _ in here if cell["policy"] != "none")
        for policy in reversed(policies):
            points = [(cell, part) for cell, part in here if cell["policy"] == policy]
            one_point = any(cell["keep_ratio"] is None for cell, _ in points)
            yield policy, cache, points if one_point else sorted([*points, *dense], key=lambda point: _kept(*point))
        yield "none", cache, dense


def _kept(cell: dict[str, Any], part: dict[str, Any]) -> float:
    """Share of the visual tokens: the keep ratio, or what a policy without one kept."""
    ratio = cell["keep_ratio"]
    if ratio is None:
        return float(part["visual_tokens_kept"] / part["visual_tokens"]) if part["visual_tokens"] else 1.0
    return float(ratio)


def _style(policy: str, cache: str) -> dict[str, Any]:
    return {
        "color": _COLORS.get(policy),
        "linestyle": _LINES.get(cache, "-."),
        "linewidth": 1.2,
        "marker": _MARKS.get(cache, "v"),
        "capsize": 3,
    }


def _accuracies(parts: Sequence[dict[str, Any]]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Percent, and how far the intervals reach below and above."""
    matches = [part["exact_match"] for part in parts]
    shares = [match["share"] * 100 for match in matches]
    below = [max(0.0, (match["share"] - match["low"]) * 100) for match in matches]
    above = [max(0.0, (match["high"] - match["share"]) * 100) for match in matches]
    return shares, (below, above)


def _label(policy: str, cache: str, cells: Panel) -> str:
    name = "dense" if policy == "none" else policy
    return name if len({cell["cache"] for cell, _ in cells}) == 1 else f"{name}, cache {cache}"


def _part(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    part: dict[str, Any] | None = cell["all"] if name == "all" else cell["groups"].get(name)
    return part
