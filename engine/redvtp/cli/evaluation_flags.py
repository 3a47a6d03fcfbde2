"""The flags of `redvtp eval`, `redvtp consistency` and `redvtp compare`, and the lists in them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from redvtp.cli.flags import BadInput, Parser, denoising_flags, engine_flags, integer
from redvtp.params import POSITIONS, PRESETS

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]

POLICIES = "none,redvtp,random,uniform"
KEEP_RATIOS = "1.0,0.75,0.5,0.25,0.1"
# All that need nothing but the request; `external` prunes by scores that come with it.
COMPARED = [preset for preset in PRESETS if preset not in ("none", "external")]


def add_commands(commands: Commands) -> None:
    """All of them, beside `generate`."""
    evaluation = commands.add_parser(
        "eval",
        help="accuracy, speed and memory over a file of questions",
        description="Asks every question of a file with every pruning policy, keep ratio and cache mode, through the "
        "embedded engine or a running server, and reports accuracy, speed and memory of that one run. Interrupted, it "
        "goes on where it stopped when it is started again.",
    )
    evaluation.add_argument(
        "model", metavar="MODEL_OR_URL", help="checkpoint folder, or http://... of a running server"
    )
    _task_flags(evaluation)
    _comparison_flags(evaluation, POLICIES, KEEP_RATIOS)
    denoising_flags(evaluation, for_many=True)
    server = evaluation.add_argument_group("server").add_argument
    server("--server", metavar="URL", help="ask this server; MODEL_OR_URL is then the name of the model it serves")
    engine_flags(evaluation, choice=False)
    add = evaluation.add_argument_group("output").add_argument
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the results; the same one goes on with them",
    )
    add("--json", action="store_true", help="print the summary as JSON instead of the tables")

    consistency = commands.add_parser(
        "consistency",
        help="how steady the importance of visual tokens is over the denoising steps",
        description="Scores the visual tokens at every denoising step, without pruning, and compares each step with "
        "the first one, which is the one that RedVTP prunes by.",
    )
    consistency.add_argument("model", metavar="MODEL", help="checkpoint folder")
    _task_flags(consistency)
    denoising_flags(consistency, for_many=True)
    engine_flags(consistency, choice=False)
    add = consistency.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for consistency.json and the plot")
    add("--json", action="store_true", help="print the summary as JSON instead of the table")

    compare = commands.add_parser(
        "compare",
        help="one question under several policies, in a table and a picture",
        description="Asks one question about images with every policy, keep ratio and cache mode, by turns in one "
        "process, and prints what each kept, took and answered beside the dense answer.",
    )
    compare.add_argument("model", metavar="MODEL", help="checkpoint folder")
    add = compare.add_argument_group("request").add_argument
    add("--image", nargs="+", action="extend", default=[], type=Path, metavar="FILE", help="image files")
    add("--prompt", metavar="TEXT", help="the question; the images go in front of it")
    _comparison_flags(compare, ",".join(COMPARED), "0.75,0.5,0.25")
    denoising_flags(compare, many_caches=True)
    # One question at a time: latencies are those of a request alone.
    compare.set_defaults(concurrency=1)
    engine_flags(compare, choice=False)
    add = compare.add_argument_group("measuring and output").add_argument
    add("--repeats", type=integer, default=3, metavar="N", help="times each is asked (default %(default)s)")
    add("--output", type=Path, metavar="FILE.png", help="picture of all heat maps side by side")
    add("--json", type=Path, metavar="FILE.json", help="write the results there, with every pruning")


def _comparison_flags(parser: Parser, policies: str, keep_ratios: str) -> None:
    add = parser.add_argument_group("what is compared").add_argument
    names = f"with commas, of {', '.join(PRESETS)} (default %(default)s); none, keeping everything, is always run"
    add("--policies", default=policies, metavar="LIST", help=names)
    ratios = "keep ratios, with commas (default %(default)s); zipvl and layer-skip have their own budget and run once"
    add("--keep", default=keep_ratios, metavar="LIST", help=ratios)
    positions = f"{' or '.join(POSITIONS)}: renumber what survives, or not (default %(default)s)"
    add("--positions", default="compact", metavar="NAME", help=positions)


def listed(flag: str, text: str) -> list[str]:
    """The values of a flag with commas in it. Raises BadInput where there is none."""
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise BadInput(f"--{flag} must name at least one, got {text!r}")
    return values


def ratios(text: str) -> list[float]:
    """Raises BadInput for what is no number."""
    values = []
    for value in listed("keep", text):
        try:
            values.append(float(value))
        except ValueError:
            raise BadInput(f"--keep must be numbers in (0, 1] with commas, got {value!r}") from None
    return values


def _task_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("tasks", metavar="TASKS.jsonl", type=Path, help="questions and answers, see docs/evaluation.md")
    add = parser.add_argument_group("questions").add_argument
    add("--limit", type=integer, metavar="N", help="only the first N questions")
    add("--concurrency", type=integer, default=8, metavar="N", help="questions at a time (default %(default)s)")
