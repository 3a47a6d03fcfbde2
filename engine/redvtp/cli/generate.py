"""`redvtp generate`: one request from image files and a question to an answer, with a trace and a heat map."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redvtp.cli.checks import (
    Mistakes,
    check_file,
    check_picture,
    denoising_of,
    engine_options,
    open_images,
    read_json,
    warn,
)
from redvtp.engines import EngineOptions, check_engine, engine_named
from redvtp.errors import BadInput, refusing
from redvtp.params import DenoisingParams, PruningParams

if TYPE_CHECKING:
    from redvtp.local import Request
    from redvtp.trace import Trace


def generate(options: argparse.Namespace) -> int:
    """Returns the exit status. Raises BadInput for what cannot be served."""
    request, started_with = prepare(options)
    trace = engine_named(options.engine)(started_with, request)
    _write(options, trace, request)
    return 0


def prepare(options: argparse.Namespace) -> tuple[Request, EngineOptions]:
    """The request and how to start the engine. Raises BadInput; everything is checked before a model is loaded."""
    mistakes = Mistakes()
    with mistakes:
        started_with = engine_options(options)
    with mistakes:
        images = open_images(options.image)
    with mistakes:
        if options.prompt is None:
            raise BadInput("no question was given; pass --prompt TEXT")
    with mistakes:
        denoising, pruning = params_of(options)
    with mistakes:
        _check_outputs(options)
    with mistakes:
        check_engine(options.engine)
    mistakes.refuse()
    with refusing():
        # torch and transformers take seconds to import: only once flags and files are known to be good.
        from redvtp.families.config import load_config
        from redvtp.local import Request
        from redvtp.prompt import chat_prompt

        prompt: str = options.prompt
        if not options.raw_prompt:
            family = load_config(options.model).family
            prompt = chat_prompt(family.load_tokenizer(options.model), prompt, len(images), template=family.template)
        return Request(prompt, images, denoising, pruning), started_with


def params_of(options: argparse.Namespace) -> tuple[DenoisingParams, PruningParams]:
    """Raises ValueError or BadInput naming the first flag with a value that is not allowed."""
    given = vars(options) | {"preset": options.pruning, "importance": _importance(options.importance)}
    return denoising_of(options), PruningParams(**{field.name: given[field.name] for field in fields(PruningParams)})


def _importance(file: Path | tuple[()]) -> tuple[float, ...]:
    """The list of numbers in a JSON file. Raises BadInput if it holds something else."""
    if not file:
        return ()
    numbers = read_json(f"--importance {file}", file)
    if not isinstance(numbers, list):
        raise BadInput(f"--importance {file} must hold a list, one number for each visual token of the request")
    return tuple(numbers)


def _check_outputs(options: argparse.Namespace) -> None:
    if options.trace:
        check_file("trace", options.trace)
    if options.heatmap:
        check_picture("heatmap", options.heatmap)
        if not options.image:
            raise BadInput("--heatmap needs an --image to draw on")
        if options.pruning == "none":
            raise BadInput("--heatmap needs scores, which --pruning none does not compute; leave one of them out")


def _write(options: argparse.Namespace, trace: Trace, request: Request) -> None:
    from redvtp.trace import write_trace

    if options.trace:
        write_trace(options.trace, trace)
    if options.heatmap:
        _draw(options.heatmap, trace, request)
    print(json.dumps(summary(trace)) if options.json else trace["text"])


def _draw(path: Path, trace: Trace, request: Request) -> None:
    from redvtp.families.config import load_config
    from redvtp.heatmap import draw_saved

    if not trace["prunings"]:
        reason = "the answer was complete before a step after which visual tokens are dropped; take more --steps"
        warn("generate", f"no heat map was written: {reason}")
        return
    draw_saved(request.images, load_config(trace["model"]), trace).save(path)


def summary(trace: Trace) -> dict[str, Any]:
    """What `--json` prints: the trace without its steps, and their sums."""
    kept = [len(pruning["kept"]) for pruning in trace["prunings"]]
    return {
        "model": trace["model"],
        "text": trace["text"],
        "output_ids": trace["output_ids"],
        "finish_reason": trace["finish_reason"],
        "prompt_tokens": trace["prompt_tokens"],
        "visual_tokens": trace["visual_tokens"],
        "visual_tokens_kept": kept[-1] if kept else trace["visual_tokens"],
        "denoising_steps": len(trace["steps"]),
        "blocks_freed": sum(step["blocks_freed"] for step in trace["steps"]),
        "ms": sum(step["ms"] for step in trace["steps"]),
    }
