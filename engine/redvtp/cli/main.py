"""The `redvtp` command: one request from an image file and a question to an answer, with a trace and a heat map.

    redvtp generate CHECKPOINT --image photo.jpg --prompt "What is shown?" --keep-ratio 0.25 --heatmap kept.png
    redvtp heatmap response.json --image photo.jpg --output kept.png

`redvtp eval`, `redvtp consistency` and `redvtp compare` are in `redvtp.evaluation`. Bad input ends with status 2 and
one line on stderr. An engine is a function that answers one request with a `Trace`: `local` is here, others are
found under the entry point group `redvtp.engines`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from redvtp.cli.flags import check_outputs, check_picture, params_of, parse, positive
from redvtp.errors import BadInput
from redvtp.errors import refusing as refusing

if TYPE_CHECKING:
    from redvtp.local import Request
    from redvtp.trace import Trace

ENGINES = "redvtp.engines"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is started with. None: the engine's own default. progress: show a bar on stderr."""

    model: str
    dtype: str
    max_model_len: int | None
    block_size: int | None
    progress: bool


class Engine(Protocol):
    """Answers one request. Raises BadInput for a request or a checkpoint that it cannot serve."""

    def __call__(self, options: EngineOptions, request: Request) -> Trace: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse(arguments)
    try:
        if options.command == "generate":
            return _generate(options)
        if options.command == "heatmap":
            return _heatmap(options)
        from redvtp.cli.evaluate import COMMANDS

        return COMMANDS[options.command](options)
    except BadInput as error:
        print(f"redvtp {options.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"redvtp {options.command}: interrupted", file=sys.stderr)
        return 130


def _generate(options: argparse.Namespace) -> int:
    request, engine_options = _prepare(options)
    trace = _engine(options.engine)(engine_options, request)
    _write(options, trace, request)
    return 0


def _heatmap(options: argparse.Namespace) -> int:
    """Draws the pruning in a saved API response (or trace) over the images that were sent."""
    from redvtp.families.config import load_config
    from redvtp.heatmap import draw_saved, prunings_of
    from redvtp.vision.images import open_image

    with refusing():
        check_picture("output", options.output)
        saved = _read_json(options.response)
        prunings_of(saved)
        # A server that was started with a folder answers with it as the model's name.
        folder = options.model or saved.get("model")
        if not folder or not (Path(folder) / "config.json").is_file():
            raise BadInput(f"{folder or 'no model'} is not a checkpoint folder on this machine; name it with --model")
        draw_saved([open_image(path) for path in options.image], load_config(folder), saved).save(options.output)
    return 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from error


def local_engine(options: EngineOptions, request: Request) -> Trace:
    """`LocalEngine`, in this process, without vLLM."""
    from redvtp.local import LocalEngine
    from redvtp.trace import trace_of_generation

    with refusing():
        engine = LocalEngine(
            options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=1,
            block_size=options.block_size or 32,
        )
        engine.tokenize(request)
    (generation,) = engine.generate([request], progress=options.progress)
    return trace_of_generation(options.model, generation)


def _engine(name: str) -> Engine:
    if name == "local":
        return local_engine
    found = entry_points(group=ENGINES, name=name)
    if not found:
        names = ", ".join(["local", *sorted(entry_points(group=ENGINES).names)])
        raise BadInput(f"--engine must be one of {names}, got {name!r}")
    engine: Engine = next(iter(found)).load()
    return engine


def _prepare(options: argparse.Namespace) -> tuple[Request, EngineOptions]:
    """Everything that can be refused before a model is loaded, quickest first."""
    with refusing():
        denoising, pruning = params_of(options)
        check_outputs(options)
        if options.prompt is None:
            raise BadInput("no question was given; pass --prompt TEXT")
        if not (Path(options.model) / "config.json").is_file():
            raise BadInput(f"{options.model} is not a checkpoint folder: it has no config.json")
        engine_options = EngineOptions(
            options.model,
            options.dtype,
            positive("max-model-len", options.max_model_len),
            positive("block-size", options.block_size),
            progress=sys.stderr.isatty(),
        )
        # torch and transformers take seconds to import: only once the flags are known to be good.
        from redvtp.families.config import load_config
        from redvtp.local import Request
        from redvtp.prompt import chat_prompt
        from redvtp.vision.images import open_image

        images = tuple(open_image(path) for path in options.image)
        prompt: str = options.prompt
        if not options.raw_prompt:
            family = load_config(options.model).family
            prompt = chat_prompt(family.load_tokenizer(options.model), prompt, len(images), template=family.template)
        return Request(prompt, images, denoising, pruning), engine_options


def _write(options: argparse.Namespace, trace: Trace, request: Request) -> None:
    if options.trace:
        from redvtp.trace import write_trace

        write_trace(options.trace, trace)
    if options.heatmap:
        _draw(options.heatmap, trace, request)
    print(json.dumps(_summary(trace)) if options.json else trace["text"])


def _draw(path: Path, trace: Trace, request: Request) -> None:
    from redvtp.families.config import load_config
    from redvtp.heatmap import draw_saved

    if not trace["prunings"]:
        reason = "the answer was complete before a step after which visual tokens are dropped; take more --steps"
        print(f"redvtp generate: no heat map was written: {reason}", file=sys.stderr)
        return
    draw_saved(request.images, load_config(trace["model"]), trace).save(path)


def _summary(trace: Trace) -> dict[str, Any]:
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


if __name__ == "__main__":
    sys.exit(main())
