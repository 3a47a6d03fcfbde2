"""`redvtp consistency`: overlaps and correlations from scores that are those of the engine's own prunings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.task_files import CHECKPOINT, FLAGS, MODEL, in_process, tasks, write
from golden_data import Case, Run, runs
from redvtp.denoising.sequence import Sequence
from redvtp.evaluation.backends import request_of
from redvtp.evaluation.consistency import compare, top_overlap
from redvtp.evaluation.grid import Cell, Question, Settings, questions
from redvtp.evaluation.tasks import read_tasks
from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams

EngineFactory = Callable[..., LocalEngine]
SCORED = [
    run
    for run in runs("redvtp")
    if run.case.checkpoint == CHECKPOINT and run.has("importance") and run.robust and not run.case.config_overrides
]


def _observed(engine: LocalEngine, request: Request) -> dict[int, torch.Tensor]:
    seen: dict[int, torch.Tensor] = {}

    def observe(_: Sequence, step: int, importance: torch.Tensor) -> None:
        assert step not in seen
        seen[step] = importance

    engine.runner.observe = observe
    try:
        engine.generate([request])
    finally:
        engine.runner.observe = None
    return seen


def _request(engine: LocalEngine, run: Run, pruning: PruningParams) -> Request:
    params = DenoisingParams(
        gen_length=run.params["gen_length"],
        block_length=run.params["block_length"],
        steps=run.params["steps"],
        ignore_eos=True,
    )
    return Request(run.case.prompt, tuple(run.case.images()), params, pruning)


@pytest.mark.parametrize("run", SCORED[:4], ids=str)
def test_the_first_step_is_scored_as_the_reference_scores_it(engine: EngineFactory, run: Run) -> None:
    local = engine(CHECKPOINT)
    seen = _observed(local, _request(local, run, PruningParams(preset="none")))
    torch.testing.assert_close(seen[0], run.tensor("importance").float().flatten(), rtol=1e-4, atol=1e-7)
    # Every step but the last, which leaves nothing undecided.
    assert sorted(seen) == list(range(run.params["steps"] - 1))


def test_watching_changes_no_answer(engine: EngineFactory) -> None:
    local = engine(CHECKPOINT)
    request = _request(local, SCORED[0], PruningParams(preset="none"))
    plain = local.generate([request])[0]
    local.runner.observe = lambda *_: None
    try:
        watched = local.generate([request])[0]
    finally:
        local.runner.observe = None
    assert watched.output_ids == plain.output_ids


def test_a_later_step_is_scored_like_a_first_step_that_begins_there(engine: EngineFactory) -> None:
    """The canvas of step 3, given to a new request as already decided, must score the same."""
    local = engine(CHECKPOINT)
    request = _request(local, SCORED[0], PruningParams(preset="none"))
    seen = _observed(local, request)
    (generation,) = local.generate([request])
    (again,) = _first_scores(local, request, generation.steps[2].canvas)
    torch.testing.assert_close(again, seen[3], rtol=1e-4, atol=1e-7)


@torch.inference_mode()
def _first_scores(engine: LocalEngine, request: Request, canvas: list[int]) -> list[torch.Tensor]:
    blocks = engine.blocks.allocate(engine.blocks.num_free)
    assert blocks is not None
    try:
        sequence = engine.sequence(request, engine.tokenize(request), list(blocks))
        sequence.canvas.tokens[:] = torch.tensor(canvas)
        found: list[torch.Tensor] = []
        engine.runner.observe = lambda _, step, importance: found.append(importance)
        # The commit of step 3 decides as many tokens as that of step 0: the schedule is even.
        engine.runner.step([sequence])
    finally:
        engine.runner.observe = None
        engine.blocks.free(blocks)
    return found


def test_overlap_is_the_share_of_kept_tokens_that_are_kept_again() -> None:
    first = torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2])
    other = torch.tensor([9.0, 1, 7, 1, 8, 1, 6, 1])
    assert top_overlap(first, first, 0.5) == 1
    assert top_overlap(first, other, 0.5) == 0.5
    assert top_overlap(first, other, 0.25) == 0.5
    assert top_overlap(first, -first, 0.5) == 0
    assert top_overlap(first, other, 0.01) == 1


def test_a_batch_is_compared_as_each_request_alone(engine: EngineFactory, tmp_path: Path) -> None:
    local = engine(CHECKPOINT)
    file = read_tasks(write(tmp_path / "questions.jsonl", tasks(local, lengths=(8, 16))))
    asked = questions(file.tasks, Cell("none", 1.0, "none"), Settings(DenoisingParams(ignore_eos=True)))

    def told(questions: list[Question]) -> dict[str, list[tuple[int, tuple[float, ...]]]]:
        parts = {}
        for task, found in compare(local, questions):
            assert not isinstance(found, str), found
            parts[task.id] = [(part.step, part.overlap) for part in found]
        return parts

    together = told(asked)
    alone: dict[str, Any] = {}
    for question in asked:
        alone |= told([question])
    assert together == alone
    assert local.runner.observe is None


def test_progress_by_confidence_is_of_the_steps_that_were_taken(engine: EngineFactory, tmp_path: Path) -> None:
    local = engine(CHECKPOINT)
    file = read_tasks(write(tmp_path / "questions.jsonl", tasks(local, lengths=(16,))))
    rough = DenoisingParams(ignore_eos=True, threshold=2.5)
    for question in questions(file.tasks, Cell("none", 1.0, "none"), Settings(rough)):
        ((_, found),) = compare(local, [question])
        (generation,) = local.generate([request_of(question, local)])
        taken = len(generation.steps)
        assert taken < 16
        assert not isinstance(found, str)
        assert [part.progress for part in found] == [step / taken for step in range(1, taken - 1)]


@pytest.mark.slow
def test_the_command_writes_table_json_and_plot(
    engine: EngineFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", tasks(engine(CHECKPOINT), lengths=(2, 16)))
    out = tmp_path / "out"
    status, text, err = in_process(capsys, "consistency", MODEL, file, *FLAGS, "--output", out)
    assert status == 0, err
    assert "| by chance" in text
    assert text.rstrip("\n") == (out / "consistency.md").read_text().rstrip("\n")
    assert (out / "consistency.png").read_bytes().startswith(b"\x89PNG")
    whole = json.loads((out / "consistency.json").read_text())
    assert {len(request["steps"]) for request in whole["requests"] if request["group"] == "long"} == {6}
    # Two steps: the second one leaves nothing undecided, so there is nothing to compare.
    assert {len(request["steps"]) for request in whole["requests"] if request["group"] == "short"} == {0}
    for entry in whole["groups"]["all"]:
        for ratio in ("0.5", "0.25", "0.1"):
            overlap = entry["overlap"][ratio]
            assert 0 <= overlap["low"] <= overlap["mean"] <= overlap["high"] <= 1
    values = [value for request in whole["requests"] for value in request["overlap"]["0.5"]]
    assert 0.5 < sum(values) / len(values) < 1


def test_what_has_no_second_step_is_refused(
    engine: EngineFactory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", tasks(engine(CHECKPOINT), lengths=(1,)))
    status, _, err = in_process(capsys, "consistency", MODEL, file, *FLAGS, "--output", tmp_path / "out")
    assert status == 2
    assert "no request was scored at two steps" in err
    status, _, err = in_process(
        capsys, "consistency", MODEL, file, *FLAGS, "--cache", "prefix", "--output", tmp_path / "out"
    )
    assert status == 2
    assert "--cache must be none here" in err


def test_pictures_of_golden_cases_are_there() -> None:
    """Otherwise the parametrised test above would be empty."""
    assert len(SCORED) >= 4
    assert all(Case(CHECKPOINT, run.case.name).image_files for run in SCORED)
