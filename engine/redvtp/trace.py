"""One request step by step, in the format of `redvtp generate --trace`.

The format is a stable interface: fields may be added, none is removed. `trace_of_generation` reads a `Generation` of
the embedded engine, `trace_of_report` the full report that the server sends with an answer. Both give the same plain
dictionary, ready for JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from redvtp.local import Generation


class TraceStep(TypedDict):
    """One denoising step.

    tokens_computed: rows through the language model.
    kv_tokens, kv_blocks: held after it.
    canvas: ids after it, the mask id where nothing is decided.
    """

    step: int
    canvas_block: int
    kind: str
    tokens_computed: int
    kv_tokens: int
    kv_blocks: int
    blocks_freed: int
    canvas: list[int]
    ms: float


class TracePruning(TypedDict):
    """One pruning.

    step: after which, or inside which if there is a layer; -1 is before the first.
    importance: one number for each visual token before it.
    kept: ascending indices into those.
    """

    step: int
    layer: int | None
    visual_before: int
    importance: list[float]
    kept: list[int]


class Trace(TypedDict):
    """The whole file.

    visual_spans: half-open ranges of prompt tokens, one for each image, before any pruning.
    """

    model: str
    prompt_tokens: int
    visual_tokens: int
    visual_spans: list[list[int]]
    steps: list[TraceStep]
    prunings: list[TracePruning]
    output_ids: list[int]
    text: str
    finish_reason: str


def trace_of_generation(model: str, generation: Generation) -> Trace:
    """The trace of a finished request of `LocalEngine`; `model` is the name to write into it."""
    return trace_of_report(
        model,
        [asdict(report) | {"ms": ms} for report, ms in zip(generation.steps, generation.step_ms, strict=True)],
        prompt_tokens=generation.prompt_tokens,
        visual_spans=generation.visual_spans,
        output_ids=generation.output_ids,
        text=generation.text,
        finish_reason=generation.finish_reason,
    )


def trace_of_report(
    model: str,
    steps: Sequence[Mapping[str, Any]],
    *,
    prompt_tokens: int,
    visual_spans: Sequence[tuple[int, int]],
    output_ids: Sequence[int],
    text: str,
    finish_reason: str,
) -> Trace:
    """The trace of a request. steps: dictionaries of the fields of `StepReport`, and `ms`."""
    prunings = [step["pruning"] for step in steps if step["pruning"] is not None]
    return Trace(
        model=model,
        prompt_tokens=prompt_tokens,
        visual_tokens=sum(end - start for start, end in visual_spans),
        visual_spans=[[start, end] for start, end in visual_spans],
        steps=[_only(TraceStep, step) for step in steps],  # type: ignore[misc]
        prunings=[_only(TracePruning, pruning) for pruning in prunings],  # type: ignore[misc]
        output_ids=list(output_ids),
        text=text,
        finish_reason=finish_reason,
    )


def survivors(prunings: Sequence[Mapping[str, Any]]) -> list[int]:
    """Visual tokens left after all prunings, as indices into the visual tokens of the prompt.

    Raises ValueError if there is no pruning: the number of visual tokens is then unknown.
    """
    if not prunings:
        raise ValueError("nothing was pruned")
    left = list(range(prunings[0]["visual_before"]))
    for pruning in prunings:
        left = [left[index] for index in pruning["kept"]]
    return left


def write_trace(path: str | Path, trace: Trace) -> None:
    Path(path).write_text(json.dumps(trace) + "\n", encoding="utf-8")


def _only(shape: type, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields a TypedDict names, in its order."""
    return {name: fields[name] for name in shape.__annotations__}
