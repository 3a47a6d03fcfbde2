"""`redvtp consistency`: how steady the importance of visual tokens is from one denoising step to the next.

redvtp consistency CHECKPOINT tasks.jsonl --output results
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from redvtp.cli.checks import (
    EXTRA,
    INTERRUPTED,
    Mistakes,
    check_checkpoint,
    check_libraries,
    positive,
    say,
    start_engine,
    warn,
)
from redvtp.cli.evaluate import settings_of
from redvtp.cli.knob_flags import flag_of
from redvtp.errors import BadInput
from redvtp.evaluation.grid import DENSE, Question, questions
from redvtp.evaluation.results import make_folder
from redvtp.evaluation.tasks import Task, read_tasks

if TYPE_CHECKING:
    from redvtp.evaluation.consistency import Compared, Comparison


def consistency(options: argparse.Namespace) -> int:
    """Returns the exit status: 1 when questions could not be asked, 130 when interrupted."""
    mistakes = Mistakes()
    with mistakes:
        check_libraries()
    with mistakes:
        check_checkpoint(options)
    with mistakes:
        chosen = _questions(options)
    mistakes.refuse()
    make_folder("output", options.output)
    from redvtp.evaluation.consistency import compare

    engine = start_engine(options, options.concurrency)
    compared: list[tuple[Task, list[Comparison]]] = []
    failed: list[str] = []
    try:
        with tqdm(total=len(chosen), unit="question", disable=not sys.stderr.isatty()) as bar:
            for task, result in compare(engine, chosen, flag_of):
                bar.update()
                if isinstance(result, str):
                    failed.append(f"{task.id}: {result}")
                else:
                    compared.append((task, result))
    except KeyboardInterrupt:
        warn("consistency", "interrupted, nothing was written")
        return INTERRUPTED
    if not any(result for _, result in compared):
        raise BadInput("no request was scored at two steps; take questions about images, and more --steps")
    _report(options, compared)
    if failed:
        warn("consistency", f"{len(failed)} questions could not be asked: {'; '.join(failed[:3])}")
    return 1 if failed else 0


def _questions(options: argparse.Namespace) -> list[Question]:
    """Raises ValueError or BadInput for what cannot be asked."""
    limit = positive("limit", options.limit)
    positive("concurrency", options.concurrency)
    if options.suffix:
        raise BadInput("--suffix is not supported here; leave it out")
    if options.cache != "none":
        raise BadInput("--cache must be none here: a step that reads the cache does not look at the image anew")
    return questions(read_tasks(options.tasks).tasks[:limit], DENSE, settings_of(options))


def _report(options: argparse.Namespace, compared: Compared) -> None:
    from redvtp.evaluation.consistency import KEEP_RATIOS, report, whole_of

    whole = whole_of(options.model, str(options.tasks), compared)
    text = report(whole)
    folder: Path = options.output
    (folder / "consistency.json").write_text(json.dumps(whole) + "\n", encoding="utf-8")
    (folder / "consistency.md").write_text(text, encoding="utf-8")
    try:
        from redvtp.evaluation.plots import draw_consistency
    except ModuleNotFoundError as error:
        warn("consistency", f"no plot was drawn, {error.name} is not installed; {EXTRA}")
    else:
        draw_consistency(folder, whole["groups"], KEEP_RATIOS)
    say(json.dumps(whole) if options.json else text)
