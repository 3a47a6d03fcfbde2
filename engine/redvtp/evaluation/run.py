"""Asks every question in every cell, and goes on after an interruption.

    plan = plan_of(read_tasks("tasks.jsonl"), settings, cells, limit=None, concurrency=8)
    with Results(folder, configuration) as results:
        ask(plan, results, lambda: EmbeddedBackend(engine), progress=True)

Cells take turns, a round of questions at a time: a machine that slows down, or a cache that warms up, then affects all
of them alike, and an interrupted run has answered about the same questions in each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from redvtp.evaluation.backends import Answer, Backend
from redvtp.evaluation.grid import Cell, Question, Settings, questions
from redvtp.evaluation.results import Results
from redvtp.evaluation.tasks import TaskFile

# Questions of one cell in a row, for each that is under way at a time: enough that the batch is mostly full.
ROUND = 8


@dataclass(frozen=True, slots=True)
class Plan:
    """All questions.

    file: where the tasks come from.
    settings: what all questions share.
    cells: dense first in each cache mode.
    rounds: questions of one cell each, in the order in which they are asked.
    """

    file: TaskFile
    settings: Settings
    cells: list[Cell]
    rounds: list[list[Question]]

    @property
    def questions(self) -> list[Question]:
        return [question for round_ in self.rounds for question in round_]


def plan_of(file: TaskFile, settings: Settings, cells: Sequence[Cell], limit: int | None, concurrency: int) -> Plan:
    """limit: only the first tasks. concurrency: questions at a time. Raises ValueError as `questions` does."""
    tasks, in_a_round = file.tasks[:limit], ROUND * concurrency
    of_cell = {cell: questions(tasks, cell, settings) for cell in cells}
    rounds = []
    for number, first in enumerate(range(0, len(tasks), in_a_round)):
        turn = number % len(cells)
        rounds += [of_cell[cell][first : first + in_a_round] for cell in (*cells[turn:], *cells[:turn])]
    return Plan(file, settings, list(cells), rounds)


def unanswered(plan: Plan, results: Results) -> list[Question]:
    return [question for question in plan.questions if question.key not in results.rows]


def ask(plan: Plan, results: Results, start: Callable[[], Backend], progress: bool) -> None:
    """Asks what is not answered yet. start: called only if there is something to ask. progress: show a bar."""
    waiting = unanswered(plan, results)
    if not waiting:
        return
    backend = start()
    total = len(plan.questions)
    with tqdm(total=total, initial=total - len(waiting), unit="answer", disable=not progress) as bar:
        # Untimed: what a process does only once must not count for the cell that comes first.
        backend.answer(waiting[:1], lambda question, answer: None)
        for span, round_ in enumerate(_rounds(plan, results), results.next_span):
            bar.set_description(str(round_[0].cell))
            began = time.perf_counter()

            def take(question: Question, answer: Answer, span: int = span, began: float = began) -> None:
                results.add(question, answer, span=span, clock_s=time.perf_counter() - began)
                bar.update()

            backend.answer(round_, take)


def _rounds(plan: Plan, results: Results) -> Iterator[list[Question]]:
    for round_ in plan.rounds:
        left = [question for question in round_ if question.key not in results.rows]
        if left:
            yield left
