"""`redvtp eval`: every question in every cell, through the embedded engine or a server, with accuracy beside speed.

    redvtp eval CHECKPOINT tasks.jsonl --policies none,redvtp --keep 0.5,0.25 --output results

Cells take turns, a round of questions at a time: a machine that slows down, or a cache that warms up, then touches all
of them alike, and an interrupted run has answered about the same questions in each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from redvtp.cli.evaluation_flags import listed, ratios
from redvtp.cli.flags import BadInput, denoising_of, positive
from redvtp.evaluation.backends import Answer, Backend, EmbeddedBackend, Stopwatch
from redvtp.evaluation.grid import Cell, Question, Settings, cells, questions
from redvtp.evaluation.results import Results
from redvtp.evaluation.tasks import TaskFile, read_tasks
from redvtp.params import PruningParams

# Questions of one cell in a row, for each that is under way at a time: enough that the batch is mostly full.
ROUND = 8
EXTRA = "pip install 'vllm-redvtp[eval]'"
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is asked. rounds: questions of one cell each, in the order in which they are asked."""

    file: TaskFile
    settings: Settings
    cells: list[Cell]
    rounds: list[list[Question]]

    @property
    def num_questions(self) -> int:
        return sum(map(len, self.rounds))


def evaluate(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 when questions could not be asked, 130 when interrupted."""
    _check_libraries()
    plan = plan_of(options)
    start, configuration = _backend_of(options)
    with Results(options.output, configuration | _configuration(plan, options)) as results:
        try:
            _ask(plan, results, start)
        except KeyboardInterrupt:
            done = plan.num_questions - len(_open(plan, results))
            print(
                f"redvtp eval: interrupted; {done} of {plan.num_questions} answers are in {options.output}, the same "
                f"command goes on from there",
                file=sys.stderr,
            )
            return INTERRUPTED
        return _report(plan, results, options)


def plan_of(options: argparse.Namespace) -> Plan:
    """Everything that can be refused before a model is loaded. Raises BadInput."""
    from redvtp.cli.main import refusing

    if options.suffix:
        raise BadInput("--suffix would be a part of every answer, and none would match; leave it out")
    limit = positive("limit", options.limit)
    in_a_round = ROUND * (positive("concurrency", options.concurrency) or 1)
    with refusing():
        settings = settings_of(options)
        PruningParams(positions=options.positions)
        compared = cells(listed("policies", options.policies), ratios(options.keep), listed("cache", options.cache))
        file = read_tasks(options.tasks)
        tasks = file.tasks[:limit]
        asked = {cell: questions(tasks, cell, settings) for cell in compared}
    rounds = []
    for number, first in enumerate(range(0, len(tasks), in_a_round)):
        turn = number % len(compared)
        rounds += [asked[cell][first : first + in_a_round] for cell in compared[turn:] + compared[:turn]]
    return Plan(file, settings, compared, rounds)


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises ValueError or BadInput for a flag with a value that is not allowed."""
    # Lengths that not every task has are checked with the tasks; --cache is a list and has its own check.
    alone = {"gen_length": options.gen_length or 64, "block_length": None, "steps": None, "cache": "none"}
    denoising = denoising_of(options, **alone)
    for name in ("gen_length", "block_length", "steps"):
        positive(name.replace("_", "-"), getattr(options, name))
    return Settings(
        replace(denoising, seed=None),
        options.gen_length,
        options.block_length,
        options.steps,
        getattr(options, "positions", "compact"),
        options.seed or 0,
    )


def start_engine(options: argparse.Namespace, **more: Any) -> Any:
    """The embedded engine, with room for `--concurrency` questions. more: for `LocalEngine`. Raises BadInput for a
    checkpoint it cannot load."""
    from redvtp.cli.main import refusing
    from redvtp.local import LocalEngine

    with refusing():
        return LocalEngine(
            options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=options.concurrency,
            block_size=options.block_size or 32,
            **more,
        )


def check_checkpoint(options: argparse.Namespace) -> None:
    """Raises BadInput for what is no checkpoint folder, or cannot be one's option."""
    positive("max-model-len", options.max_model_len)
    positive("block-size", options.block_size)
    if not (Path(options.model) / "config.json").is_file():
        raise BadInput(f"{options.model} is not a checkpoint folder: it has no config.json")


def _backend_of(options: argparse.Namespace) -> tuple[Callable[[], Backend], dict[str, Any]]:
    """How to start what answers, and the part of the configuration that it decides."""
    is_url = options.model.startswith(("http://", "https://"))
    if options.server or is_url:
        if options.server and is_url:
            raise BadInput("two servers were given; with --server, MODEL_OR_URL is the name of the model it serves")
        if (options.dtype, options.max_model_len, options.block_size) != ("auto", None, None):
            raise BadInput(
                "--dtype, --max-model-len and --block-size are the server's own; set them where it is started"
            )
        from redvtp.evaluation.server import ServerBackend

        server = ServerBackend(options.server or options.model, None if is_url else options.model, options.concurrency)
        return lambda: server, {"backend": "server", "server": server.url, "served_model": server.model}
    check_checkpoint(options)
    from redvtp.evaluation.checkpoint import checkpoint_digest

    return lambda: EmbeddedBackend(start_engine(options)), {
        "backend": "embedded",
        "model": options.model,
        "checkpoint": checkpoint_digest(options.model),
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "block_size": options.block_size or 32,
    }


def _configuration(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """What must not change between two sessions in one folder. Cells and --limit may: they only add questions."""
    return {
        "tasks": str(plan.file.path),
        "tasks_digest": plan.file.digest,
        "concurrency": options.concurrency,
        "gen_length": plan.settings.gen_length,
        "block_length": plan.settings.block_length,
        "steps": plan.settings.steps,
        "temperature": plan.settings.denoising.temperature,
        "seed": plan.settings.seed,
        "remasking": plan.settings.denoising.remasking,
        "threshold": plan.settings.denoising.threshold,
        "min_confidence": plan.settings.denoising.min_confidence,
        "schedule": plan.settings.denoising.schedule,
        "schedule_shift": plan.settings.denoising.schedule_shift,
        "stop": list(plan.settings.denoising.stop),
        "ignore_eos": plan.settings.denoising.ignore_eos,
        "refresh_interval": plan.settings.denoising.refresh_interval,
        "positions": plan.settings.positions,
    }


def _open(plan: Plan, results: Results) -> list[Question]:
    return [question for round_ in plan.rounds for question in round_ if question.key not in results.rows]


def _ask(plan: Plan, results: Results, start: Callable[[], Backend]) -> None:
    """Asks what is not answered yet."""
    waiting = _open(plan, results)
    if not waiting:
        return
    backend = start()
    with tqdm(
        total=plan.num_questions,
        initial=plan.num_questions - len(waiting),
        unit="answer",
        disable=not sys.stderr.isatty(),
    ) as bar:
        # Untimed: what a process does only once must not count for the cell that comes first.
        backend.answer(waiting[:1], lambda question, answer: None)
        for span, round_ in enumerate(_unanswered(plan, results), results.next_span):
            cell = round_[0].cell
            bar.set_description(str(cell))
            watch = Stopwatch()

            def take(question: Question, answer: Answer, span: int = span, watch: Stopwatch = watch) -> None:
                results.add(question, answer, span=span, clock_s=watch.seconds)
                bar.update()

            backend.answer(round_, take)


def _unanswered(plan: Plan, results: Results) -> Iterator[list[Question]]:
    for round_ in plan.rounds:
        left = [question for question in round_ if question.key not in results.rows]
        if left:
            yield left


def _report(plan: Plan, results: Results, options: argparse.Namespace) -> int:
    from redvtp.evaluation.summary import summarize
    from redvtp.evaluation.table import report

    # The folder may hold more: other cells, or a larger --limit, of an earlier session.
    rows = [results.rows[question.key] for round_ in plan.rounds for question in round_]
    summary = summarize(rows, plan.cells)
    configuration = json.loads((options.output / "run.json").read_text(encoding="utf-8"))
    whole = {"configuration": configuration, "questions": len(rows) // len(plan.cells), "cells": summary}
    text = report(f"Evaluation of {plan.file.path.name}", _facts(configuration, options), summary)
    results.write("summary.json", json.dumps(whole, indent=2) + "\n")
    results.write("report.md", text)
    _draw(options.output, summary)
    say(json.dumps(whole) if options.json else text)
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        reasons = list(dict.fromkeys(f"{row['id']}: {row['error']}" for row in failed))
        shown = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        print(f"redvtp eval: {len(failed)} questions could not be asked and count as wrong: {shown}", file=sys.stderr)
    return 1 if failed else 0


def say(text: str) -> None:
    """Prints to stdout. A reader that went away (`| head`) is none of our troubles; the files are written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts(configuration: dict[str, Any], options: argparse.Namespace) -> Sequence[str]:
    asked = configuration.get("served_model") or configuration.get("model")
    how = "a server" if configuration["backend"] == "server" else f"the embedded engine, {configuration['dtype']}"
    return [f"{asked}, through {how}, {options.concurrency} questions at a time"]


def _draw(folder: Path, summary: list[dict[str, Any]]) -> None:
    try:
        from redvtp.evaluation.plots import draw
    except ModuleNotFoundError as error:
        print(f"redvtp eval: no plots were drawn, {error.name} is not installed; {EXTRA}", file=sys.stderr)
        return
    draw(folder, summary)


def _check_libraries() -> None:
    """matplotlib may be missing, the plots then are; the rest is needed."""
    try:
        import openai  # noqa: F401
        import scipy  # noqa: F401
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is not installed; {EXTRA}") from error


def _consistency(options: argparse.Namespace) -> int:
    _check_libraries()
    from redvtp.cli.consistency import measure

    return measure(options)


def _compare(options: argparse.Namespace) -> int:
    from redvtp.cli.compare import compare

    return compare(options)


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "eval": evaluate,
    "consistency": _consistency,
    "compare": _compare,
}
