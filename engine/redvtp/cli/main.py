"""The `redvtp` command: parses the command line and starts the command it names.

    redvtp generate CHECKPOINT --image photo.jpg --prompt "What is shown?" --keep-ratio 0.25 --heatmap kept.png
    redvtp heatmap response.json --image photo.jpg --output kept.png

Each command is a file of this folder. Bad input ends with status 2 and one line on stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from redvtp.cli import flags, knob_flags
from redvtp.cli.checks import INTERRUPTED, warn
from redvtp.errors import BadInput


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    options = parse(arguments)
    try:
        return command(options.command)(options)
    except BadInput as error:
        said = error.spelled(lambda name: knob_flags.flag_of(name, options.command))
        warn(options.command, f"error: {said}")
        return 2
    except KeyboardInterrupt:
        warn(options.command, "interrupted")
        return INTERRUPTED


def command(name: str) -> Callable[[argparse.Namespace], int]:
    """The function of a command. Its imports wait until here, so that `--help` is quick."""
    match name:
        case "generate":
            from redvtp.cli.generate import generate

            return generate
        case "heatmap":
            from redvtp.cli.heatmap import heatmap

            return heatmap
        case "eval":
            from redvtp.cli.evaluate import evaluate

            return evaluate
        case "consistency":
            from redvtp.cli.consistency import consistency

            return consistency
        case "compare":
            from redvtp.cli.compare import compare

            return compare
        case "doctor":
            from redvtp.cli.doctor import doctor

            return doctor
        case _:
            raise ValueError(f"no command {name!r}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parsed flags. Ends the process with status 2 if argparse refuses them."""
    parser = flags.Parser(prog="redvtp", description="Diffusion vision-language models with visual-token pruning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", parser_class=flags.Parser)
    for add in (_generate, _heatmap, _evaluate, _consistency, _compare, _doctor):
        add(commands)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        commands.choices[options.command].refuse(unknown)
    # `--raw-prompt TEXT` and `--prompt TEXT --raw-prompt` say the same.
    if options.command == "generate" and isinstance(options.raw_prompt, str):
        if options.prompt is not None:
            parser.error("--prompt TEXT and --raw-prompt TEXT exclude each other")
        options.prompt, options.raw_prompt = options.raw_prompt, True
    return options


def _generate(commands: flags.Commands) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a question about images, or one without",
        description="Answers a question about images (or about none) with a diffusion vision-language model.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, in the layout it was published in")
    flags.request_flags(parser)
    knob_flags.denoising_flags(parser)
    knob_flags.pruning_flags(parser)
    flags.engine_flags(parser, choice=True)
    add = parser.add_argument_group("output").add_argument
    add("--trace", type=Path, metavar="FILE.json", help="write what each step did")
    heatmap = "write the images with pruned patches greyed out and the scores laid over them"
    add("--heatmap", type=Path, metavar="FILE.png", help=heatmap)
    add("--json", action="store_true", help="print a JSON object with counts beside the answer")


def _heatmap(commands: flags.Commands) -> None:
    parser = commands.add_parser(
        "heatmap",
        help="draw the pruning in a saved API response",
        description="Draws what a request kept of its images, from an API response to a request with "
        '"redvtp_report": "full" (or from a trace of redvtp generate).',
    )
    add = parser.add_argument
    add("response", metavar="RESPONSE.json", type=Path, help="the response's JSON, not streamed")
    images = "the images of the request, in their order"
    add("--image", nargs="+", action="extend", required=True, type=Path, metavar="FILE", help=images)
    add("--output", required=True, type=Path, metavar="FILE.png", help="the picture to write")
    model = "checkpoint folder; only its config.json is read (default: the response's model, if that is a folder)"
    add("--model", metavar="MODEL", help=model)


def _evaluate(commands: flags.Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy, speed and memory over a file of questions",
        description="Asks every question of a file with every pruning policy, keep ratio and cache mode, through the "
        "embedded engine or a running server. Reports accuracy, speed and memory of that one run. An interrupted run "
        "goes on where it stopped when it is started again.",
    )
    model = "checkpoint folder, or http://... of a running server"
    parser.add_argument("model", metavar="MODEL_OR_URL", help=model)
    flags.task_flags(parser)
    flags.comparison_flags(parser, "none,redvtp,random,uniform", "1.0,0.75,0.5,0.25,0.1")
    knob_flags.denoising_flags(parser, many_requests=True, many_caches=True)
    server = "ask this server; MODEL_OR_URL is then the name of the model it serves"
    parser.add_argument_group("server").add_argument("--server", metavar="URL", help=server)
    flags.engine_flags(parser)
    add = parser.add_argument_group("output").add_argument
    output = "folder of the results; the same one goes on with them"
    add("--output", type=Path, required=True, metavar="DIR", help=output)
    add("--json", action="store_true", help="print the summary as JSON instead of the tables")


def _consistency(commands: flags.Commands) -> None:
    parser = commands.add_parser(
        "consistency",
        help="how steady the importance of visual tokens is over the denoising steps",
        description="Scores the visual tokens at every denoising step, without pruning, and compares each step with "
        "the first one, which is the one that RedVTP prunes by.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    flags.task_flags(parser)
    knob_flags.denoising_flags(parser, many_requests=True)
    flags.engine_flags(parser)
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for consistency.json and the plot")
    add("--json", action="store_true", help="print the summary as JSON instead of the table")


def _compare(commands: flags.Commands) -> None:
    parser = commands.add_parser(
        "compare",
        help="one question under several policies, in a table and a picture",
        description="Asks one question about images with every policy, keep ratio and cache mode, by turns in one "
        "process. Prints what each kept, took and answered beside the dense answer.",
    )
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    add = parser.add_argument_group("request").add_argument
    add("--image", nargs="+", action="extend", default=[], type=Path, metavar="FILE", help="image files")
    add("--prompt", metavar="TEXT", help="the question; the images go in front of it")
    flags.comparison_flags(parser, ",".join(flags.COMPARED), "0.75,0.5,0.25")
    knob_flags.denoising_flags(parser, many_caches=True)
    flags.engine_flags(parser)
    add = parser.add_argument_group("measuring and output").add_argument
    add("--repeats", type=knob_flags.integer, default=3, metavar="N", help="times each is asked (default %(default)s)")
    add("--output", type=Path, metavar="FILE.png", help="picture of all heat maps side by side")
    add("--json", type=Path, metavar="FILE.json", help="write the results there, with every pruning")


def _doctor(commands: flags.Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is missing to serve a model, and the command that serves it",
        description="Looks at what is installed, at the machine and at a checkpoint. Says what is missing and how to "
        "mend it, how much memory serving takes, and the `vllm serve` line to use. Loads no weights. Status 0 when "
        "nothing is missing, 1 otherwise.",
    )
    model = "checkpoint folder; without it only the installation and the machine are looked at"
    parser.add_argument("model", metavar="MODEL", nargs="?", help=model)
    add = parser.add_argument_group("what is to be served").add_argument
    add("--dtype", choices=flags.DTYPES, default="auto", help="default: the checkpoint's")
    length = "longest prompt and canvas together (default: what the checkpoint allows, or what fits)"
    add("--max-model-len", type=knob_flags.integer, metavar="N", help=length)
    add("--max-num-seqs", type=knob_flags.integer, metavar="N", help="requests at a time (default: 8, or what fits)")
    image = "images to count the visual tokens of"
    add("--image", nargs="+", action="extend", default=[], type=Path, metavar="FILE", help=image)
    add("--json", action="store_true", help="print everything as JSON")


if __name__ == "__main__":
    sys.exit(main())
