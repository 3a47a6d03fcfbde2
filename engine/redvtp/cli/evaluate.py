"""`redvtp eval`: every question in every cell, through the embedded engine or a server, with accuracy beside speed.

redvtp eval CHECKPOINT tasks.jsonl --policies none,redvtp --keep 0.5,0.25 --output results
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from redvtp.cli.checks import (
    ENGINE_FLAGS,
    EXTRA,
    INTERRUPTED,
    Mistakes,
    check_checkpoint,
    check_libraries,
    denoising_of,
    positive,
    say,
    start_engine,
    warn,
)
from redvtp.cli.flags import listed, ratios
from redvtp.cli.knob_flags import flag_of
from redvtp.errors import BadInput, refusing
from redvtp.evaluation.backends import Backend, EmbeddedBackend
from redvtp.evaluation.grid import Settings, cells
from redvtp.evaluation.results import Results, checkpoint_digest
from redvtp.evaluation.run import Plan, ask, plan_of, unanswered
from redvtp.evaluation.tasks import LENGTHS, read_tasks
from redvtp.params import DenoisingParams, PruningParams


def evaluate(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 when questions could not be asked, 130 when interrupted."""
    mistakes = Mistakes()
    with mistakes:
        check_libraries()
    with mistakes:
        plan = _plan(options)
    with mistakes:
        start, configuration = _backend(options)
    mistakes.refuse()
    configuration |= {"tasks": str(plan.file.path), "tasks_digest": plan.file.digest}
    configuration |= {"concurrency": options.concurrency} | plan.settings.configuration()
    with Results(options.output, configuration) as results:
        try:
            ask(plan, results, start, progress=sys.stderr.isatty())
        except KeyboardInterrupt:
            total = len(plan.questions)
            done = f"{total - len(unanswered(plan, results))} of {total} answers are in {options.output}"
            warn("eval", f"interrupted; {done}, the same command goes on from there")
            return INTERRUPTED
        return _report(plan, results, options)


def settings_of(options: argparse.Namespace) -> Settings:
    """Raises ValueError or BadInput for a flag with a value that is not allowed."""
    # Lengths that not every task has are checked with the tasks; --cache is a list, which `cells` checks.
    alone = {"gen_length": options.gen_length or DenoisingParams().gen_length, "block_length": None, "steps": None}
    denoising = denoising_of(options, **alone, cache="none")
    lengths = {name: positive(name.replace("_", "-"), getattr(options, name)) for name in LENGTHS}
    pruning = PruningParams(positions=getattr(options, "positions", PruningParams().positions))
    return Settings(replace(denoising, seed=None), pruning, **lengths, seed=options.seed or 0)


def _plan(options: argparse.Namespace) -> Plan:
    """Everything that is refused before a model is loaded. Raises BadInput."""
    if options.suffix:
        raise BadInput("--suffix would be a part of every answer, and none would match; leave it out")
    limit, concurrency = positive("limit", options.limit), positive("concurrency", options.concurrency)
    with refusing():
        settings = settings_of(options)
        grid = listed("policies", options.policies), ratios(options.keep), listed("cache", options.cache)
        return plan_of(read_tasks(options.tasks), settings, cells(*grid), limit, concurrency or 1)


def _backend(options: argparse.Namespace) -> tuple[Callable[[], Backend], dict[str, Any]]:
    """How to start what answers, and its part of the configuration."""
    is_url = options.model.startswith(("http://", "https://"))
    if options.server or is_url:
        if options.server and is_url:
            raise BadInput("two servers were given; with --server, MODEL_OR_URL is the name of the model it serves")
        if any(getattr(options, name) not in (None, "auto") for name in ENGINE_FLAGS):
            *most, last = map(flag_of, ENGINE_FLAGS)
            raise BadInput(f"{', '.join(most)} and {last} are the server's own; set them where it is started")
        from redvtp.evaluation.server import ServerBackend

        server = ServerBackend(options.server or options.model, None if is_url else options.model, options.concurrency)
        return lambda: server, {"backend": "server", "server": server.url, "served_model": server.model}
    check_checkpoint(options)
    spell = partial(flag_of, command=options.command)
    return lambda: EmbeddedBackend(start_engine(options, options.concurrency), spell), {
        "backend": "embedded",
        "model": options.model,
        "checkpoint": checkpoint_digest(options.model),
        "dtype": options.dtype,
        "device": options.device,
        "max_model_len": options.max_model_len,
        "block_size": options.block_size,
        "attention": options.attention,
    }


def _report(plan: Plan, results: Results, options: argparse.Namespace) -> int:
    from redvtp.evaluation.summary import summarize
    from redvtp.evaluation.table import report

    # The folder may hold more, of an earlier session: other cells, or a larger --limit.
    rows = [results.rows[question.key] for question in plan.questions]
    summary = summarize(rows, plan.cells)
    configuration = json.loads((options.output / "run.json").read_text(encoding="utf-8"))
    whole = {"configuration": configuration, "questions": len(rows) // len(plan.cells), "cells": summary}
    text = report(f"Evaluation of {plan.file.path.name}", [_fact(configuration)], summary)
    results.write("summary.json", json.dumps(whole, indent=2) + "\n")
    results.write("report.md", text)
    _draw(options.output, summary)
    say(json.dumps(whole) if options.json else text)
    failed = [row for row in rows if row["error"] is not None]
    if failed:
        reasons = list(dict.fromkeys(f"{row['id']}: {row['error']}" for row in failed))
        shown = "; ".join(reasons[:3]) + ("; ..." if len(reasons) > 3 else "")
        warn("eval", f"{len(failed)} questions could not be asked and count as wrong: {shown}")
    return 1 if failed else 0


def _fact(configuration: dict[str, Any]) -> str:
    model = configuration.get("served_model") or configuration.get("model")
    how = "a server" if configuration["backend"] == "server" else f"the embedded engine, {configuration['dtype']}"
    return f"{model}, through {how}, {configuration['concurrency']} questions at a time"


def _draw(folder: Path, summary: list[dict[str, Any]]) -> None:
    try:
        from redvtp.evaluation.plots import draw
    except ModuleNotFoundError as error:
        warn("eval", f"no plots were drawn, {error.name} is not installed; {EXTRA}")
        return
    draw(folder, summary)
