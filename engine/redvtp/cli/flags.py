"""The parser, groups of flags that commands share, and flags that hold a list.

`knob_flags` has the flags of a request's parameters.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from redvtp.cli.knob_flags import byte_count, integer
from redvtp.errors import BadInput
from redvtp.params import POSITIONS, PRESETS, PruningParams
from redvtp.values import did_you_mean, nearest

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Policies that need nothing but the request; `external` prunes by scores that come with it.
COMPARED = [preset for preset in PRESETS if preset not in ("none", "external")]


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line instead of the whole usage, and with the name that was meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """unknown: what is left of the command line after all flags that this parser knows."""
        # A value in between belongs to an unknown flag. `--flag=value` is one word.
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        meant = [flag for each in flags if (flag := nearest(each, self._option_string_actions)) is not None]
        hint = f"; did you mean {' '.join(meant)}?" if meant else ""
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, [str(choice) for choice in action.choices or ()])
            raise


if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[Parser]


def listed(flag: str, text: str) -> list[str]:
    """The values of a flag with commas in it. Raises BadInput if there is none."""
    values = [value.strip() for value in text.split(",") if value.strip()]
    if not values:
        raise BadInput(f"--{flag} must name at least one, got {text!r}")
    return values


def ratios(text: str) -> list[float]:
    """The keep ratios in a text with commas. Raises BadInput for what is no number."""
    values = []
    for value in listed("keep", text):
        try:
            values.append(float(value))
        except ValueError:
            raise BadInput(f"--keep must be numbers in (0, 1] with commas, got {value!r}") from None
    return values


def request_flags(parser: argparse.ArgumentParser) -> None:
    """Images and the question."""
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


def engine_flags(parser: argparse.ArgumentParser, choice: bool = False) -> None:
    """How an embedded engine is started. choice: offer `--engine`."""
    add = parser.add_argument_group("engine").add_argument
    if choice:
        engines = "local, which needs no vLLM, or vllm, in this process (default %(default)s)"
        add("--engine", default="local", metavar="NAME", help=engines)
    add("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's")
    device = "cpu, cuda or cuda:N (default: a GPU if torch finds one)"
    add("--device", metavar="NAME", help=device)
    length = "longest prompt and canvas together (default: what the checkpoint allows)"
    add("--max-model-len", type=integer, metavar="N", help=length)
    add("--block-size", type=integer, metavar="N", help="tokens in a block of the KV cache")
    cache = "memory for the KV cache, in bytes or as in 800M and 4G (default: for the longest requests, within 4G)"
    add("--kv-cache-memory-bytes", type=byte_count, metavar="SIZE", help=cache)
    kernels = "backend of the attention: auto, torch, xformers on CUDA; what a server offers with --engine vllm"
    add("--attention", default="auto", metavar="NAME", help=kernels)


def task_flags(parser: argparse.ArgumentParser) -> None:
    """The questions of an evaluation."""
    parser.add_argument("tasks", metavar="TASKS.jsonl", type=Path, help="questions and answers, see docs/evaluation.md")
    add = parser.add_argument_group("questions").add_argument
    add("--limit", type=integer, metavar="N", help="only the first N questions")
    add("--concurrency", type=integer, default=8, metavar="N", help="questions at a time (default %(default)s)")


def comparison_flags(parser: argparse.ArgumentParser, policies: str, keep_ratios: str) -> None:
    """The cells of a comparison. policies, keep_ratios: defaults, with commas."""
    add = parser.add_argument_group("what is compared").add_argument
    names = f"with commas, of {', '.join(PRESETS)} (default %(default)s); none, keeping everything, is always run"
    add("--policies", default=policies, metavar="LIST", help=names)
    ratios = "keep ratios, with commas (default %(default)s); a policy that sets its budget by itself runs once"
    add("--keep", default=keep_ratios, metavar="LIST", help=ratios)
    positions = f"{' or '.join(POSITIONS)}: renumber what survives, or not (default %(default)s)"
    add("--positions", default=PruningParams().positions, metavar="NAME", help=positions)
