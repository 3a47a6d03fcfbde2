"""The flags of the `redvtp` command, from the command line to checked parameters; those of `generate` in full.

Flags are named like the fields of `DenoisingParams` and `PruningParams`, and those classes refuse wrong values in
their own words, so a mistake reads the same here as from the server.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from redvtp.errors import BadInput as BadInput
from redvtp.params import (
    CACHES,
    POSITIONS,
    PRESETS,
    REMASKINGS,
    SCHEDULES,
    SCOPES,
    SCORE_ROWS,
    DenoisingParams,
    PruningParams,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed flags; leaves the process with status 2 where argparse cannot make sense of them."""
    parser = Parser(prog="redvtp", description="Diffusion vision-language models with visual-token pruning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", parser_class=Parser)
    generate = commands.add_parser(
        "generate",
        help="answer a question about images, or one without",
        description="Answers a question about images (or about none) with a diffusion vision-language model.",
    )
    generate.add_argument("model", metavar="MODEL", help="checkpoint folder, in the layout it was published in")
    for add_flags in (_request_flags, denoising_flags, _pruning_flags, engine_flags, _output_flags):
        add_flags(generate)
    heatmap = commands.add_parser(
        "heatmap",
        help="draw the pruning in a saved API response",
        description="Draws what a request kept of its images, from a saved API response asked for with "
        '"redvtp_report": "full" (or from a trace of redvtp generate).',
    )
    heatmap.add_argument("response", metavar="RESPONSE.json", type=Path, help="the response's JSON, not streamed")
    images = "the images of the request, in their order"
    heatmap.add_argument("--image", nargs="+", action="extend", required=True, type=Path, metavar="FILE", help=images)
    heatmap.add_argument("--output", required=True, type=Path, metavar="FILE.png", help="the picture to write")
    model = "checkpoint folder; only its config.json is read (default: the response's model, if that is a folder)"
    heatmap.add_argument("--model", metavar="MODEL", help=model)
    # It is built from the flags of this module.
    from redvtp.cli.evaluation_flags import add_commands

    add_commands(commands)
    options = parser.parse_args(arguments)
    # `--raw-prompt TEXT` and `--prompt TEXT --raw-prompt` say the same.
    if options.command == "generate" and isinstance(options.raw_prompt, str):
        if options.prompt is not None:
            parser.error("--prompt TEXT and --raw-prompt TEXT exclude each other")
        options.prompt, options.raw_prompt = options.raw_prompt, True
    return options


def params_of(options: argparse.Namespace) -> tuple[DenoisingParams, PruningParams]:
    """Raises ValueError or BadInput naming the first flag with a value that is not allowed."""
    given = vars(options) | {"preset": options.pruning, "importance": importance_of(options.importance)}
    return denoising_of(options), PruningParams(**{field.name: given[field.name] for field in fields(PruningParams)})


def importance_of(file: Path | None) -> tuple[float, ...]:
    """The list of numbers in a JSON file. Raises BadInput where there is none."""
    if file is None:
        return ()
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--importance {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--importance {file} is not JSON: {error}") from error
    if not isinstance(numbers, list):
        raise BadInput(f"--importance {file} must hold a list, one number for each visual token of the request")
    return tuple(numbers)


def denoising_of(options: argparse.Namespace, **instead: object) -> DenoisingParams:
    """The denoising flags alone; `instead` overrides some of them. Raises as `params_of` does."""
    given = vars(options) | {"stop": tuple(options.stop)} | instead
    return DenoisingParams(**{field.name: given[field.name] for field in fields(DenoisingParams)})


def check_outputs(options: argparse.Namespace) -> None:
    """An answer that takes minutes must not be lost to a folder that is not there."""
    for name in ("trace", "heatmap"):
        path: Path | None = getattr(options, name)
        if path is None:
            continue
        check_file(name, path)
    if options.heatmap:
        check_picture("heatmap", options.heatmap)
        if not options.image:
            raise BadInput("--heatmap needs an --image to draw on")
        if options.pruning == "none":
            raise BadInput("--heatmap needs scores, which --pruning none does not compute; leave one of them out")


def check_picture(flag: str, path: Path) -> None:
    """Raises BadInput for a file that no image could be written to."""
    check_file(flag, path)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise BadInput(f"--{flag} {path} does not end like an image file; use .png")


def check_file(flag: str, path: Path) -> None:
    """Raises BadInput for a file that could not be written."""
    folder = path.absolute().parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f"--{flag} {path} cannot be written; name a file in a folder that exists")


def check_folder(flag: str, path: Path) -> None:
    """Makes the folder. Raises BadInput where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--{flag} {path} cannot be written: {error.strerror}") from error


def positive(flag: str, value: object) -> int | None:
    """`value` if it was not given or is a positive integer; BadInput otherwise."""
    if value is None or (isinstance(value, int) and value > 0):
        return value
    raise BadInput(f"--{flag} must be an integer >= 1, got {value!r}")


def integer(text: str) -> int | str:
    """A number where the text is one; anything else goes on as it is, for the knob itself to refuse."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _request_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("request").add_argument
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="FILE",
        help="image files; leave it out for a text-only request",
    )
    add("--prompt", metavar="TEXT", help="the question; the images go in front of it")
    add(
        "--raw-prompt",
        nargs="?",
        const=True,
        default=False,
        metavar="TEXT",
        help="take TEXT as the full templated prompt, with <image> where the images go",
    )


def denoising_flags(parser: argparse.ArgumentParser, for_many: bool = False, many_caches: bool = False) -> None:
    """for_many: many requests share the flags, each has lengths of its own, and --cache may be a list. many_caches:
    the latter alone."""
    add = parser.add_argument_group("denoising").add_argument
    usual: dict[str, Any] = {field.name: field.default for field in fields(DenoisingParams)}

    def knob(flag: str, metavar: str, text: str) -> None:
        name = flag.replace("-", "_")
        kind = number if isinstance(usual[name], float) else integer
        shown = "" if usual[name] is None else " (default %(default)s)"
        add(f"--{flag}", type=kind, default=usual[name], metavar=metavar, help=text + shown)

    def length(flag: str, text: str, otherwise: str) -> None:
        otherwise = f"the task's own, else {otherwise}" if for_many else otherwise
        default = None if for_many else usual[flag.replace("-", "_")]
        add(f"--{flag}", type=integer, default=default, metavar="N", help=f"{text} (default {otherwise})")

    length("gen-length", "length of the answer's canvas in tokens", str(usual["gen_length"]))
    length("block-length", "canvas positions decoded together", "32, or the canvas if that is shorter")
    length("steps", "denoising steps in all", "half the canvas length")
    knob("temperature", "T", "noise on the choice of tokens; 0 is greedy")
    knob("seed", "S", "makes temperature and random remasking repeatable")
    remasking = f"which tokens a step decides: {', '.join(REMASKINGS)} (default %(default)s)"
    add("--remasking", default=usual["remasking"], metavar="NAME", help=remasking)
    sure = "a step decides all it is sure enough of, in place of --steps and --schedule: "
    factor = f"{sure}Fast-dLLM's rule with factor F, usually 1 or a little less; larger is faster and rougher"
    add("--threshold", type=number, metavar="F", help=factor)
    add("--min-confidence", type=number, metavar="P", help=f"{sure}all proposals of at least this confidence")
    stop = "strings that end the answer; they are not part of it"
    add("--stop", nargs="+", action="extend", default=[], metavar="STR", help=stop)
    add("--ignore-eos", action="store_true", help="go on after the model's end tokens")
    add("--suffix", default=usual["suffix"], metavar="TEXT", help="text behind the canvas, seen at every step")
    if for_many:
        parser.set_defaults(draft=usual["draft"])
    else:
        draft = "the answer with a <mask> for each token to fill in"
        add("--draft", default=usual["draft"], metavar="TEXT", help=draft)
    spread = f"how a block's tokens spread over its steps: {', '.join(SCHEDULES)} (default %(default)s)"
    add("--schedule", default=usual["schedule"], metavar="NAME", help=spread)
    knob("schedule-shift", "F", "of --schedule shift: above 1 most tokens are decided late, below 1 early")
    cache = f"{', '.join(CACHES)}: what happens to the keys and values of the prompt"
    several = for_many or many_caches
    cache += "; several with commas" if several else ""
    add("--cache", default=usual["cache"], metavar="LIST" if several else "NAME", help=f"{cache} (default %(default)s)")
    refresh = (
        "with --cache prefix, recompute everything every N steps (default: at the start of each block, until pruned)"
    )
    knob("refresh-interval", "N", refresh)


def _pruning_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("visual-token pruning").add_argument
    usual: dict[str, Any] = {field.name: field.default for field in fields(PruningParams)}
    presets = f"{', '.join(PRESETS)} (default %(default)s); docs/pruning.md says which when"
    add("--pruning", default=usual["preset"], metavar="PRESET", help=presets)
    share = "share of the visual tokens kept, in (0, 1] (default %(default)s)"
    add("--keep-ratio", type=number, default=usual["keep_ratio"], metavar="R", help=share)
    positions = f"{' or '.join(POSITIONS)}: renumber what survives, or not (default %(default)s)"
    add("--positions", default=usual["positions"], metavar="NAME", help=positions)
    rows = f"whose attention counts: {', '.join(SCORE_ROWS)} (default: the preset's)"
    add("--score-rows", metavar="NAME", help=rows)
    add("--score-layers", metavar="N or A:B", help="which layers' attention counts (default: the preset's)")
    mass = "keep the smallest set with this share of all importance, instead of --keep-ratio"
    add("--attention-mass", type=number, metavar="M", help=mass)
    for flag, which in (("min-keep-ratio", "least"), ("max-keep-ratio", "most")):
        limit = f"the {which} that --attention-mass may keep (default %(default)s)"
        add(f"--{flag}", type=number, default=usual[flag.replace("-", "_")], metavar="R", help=limit)
    moment = "the denoising step, from 0, after which tokens are dropped first (default: the preset's)"
    add("--prune-step", type=integer, metavar="N", help=moment)
    several = "over how many steps the share falls to --keep-ratio (default: the preset's)"
    add("--prune-steps", type=integer, metavar="N", help=several)
    layer = "drop inside the step, behind this layer, from 0 (default: the preset's)"
    add("--prune-layer", type=integer, metavar="N", help=layer)
    scope = f"{' or '.join(SCOPES)}: the best of all images together, or of each by itself (default %(default)s)"
    add("--prune-scope", default=usual["prune_scope"], metavar="NAME", help=scope)
    importance = "with --pruning external: a JSON list, one number for each visual token of the request"
    add("--importance", type=Path, metavar="FILE.json", help=importance)


def engine_flags(parser: argparse.ArgumentParser, choice: bool = True) -> None:
    """How an embedded engine is started. choice: there is one between engines."""
    add = parser.add_argument_group("engine").add_argument
    if choice:
        engines = "local, which needs no vLLM, or vllm, in this process (default %(default)s)"
        add("--engine", default="local", metavar="NAME", help=engines)
    add("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's own")
    length = "longest prompt and canvas together (default: what the checkpoint allows)"
    add("--max-model-len", type=integer, metavar="N", help=length)
    add("--block-size", type=integer, metavar="N", help="tokens in a block of the KV cache")


def _output_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--trace", type=Path, metavar="FILE.json", help="write what each step did")
    heatmap = "write the images with pruned patches greyed out and the scores laid over them"
    add("--heatmap", type=Path, metavar="FILE.png", help=heatmap)
    add("--json", action="store_true", help="print a JSON object with counts beside the answer")
