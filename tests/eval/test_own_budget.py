"""Policies that no keep ratio moves (`zipvl`, `layer-skip`): asked once in a cache mode, and shown as what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from eval.task_files import CHECKPOINT, FLAGS, MODEL, answer, in_process, key, rows, tasks, write
from redvtp.evaluation import plots
from redvtp.evaluation.grid import Cell, cells, has_own_budget
from redvtp.local import LocalEngine
from redvtp.params import PRESETS, DenoisingParams, PruningParams
from redvtp.pruning.resolve import policy_of

pytestmark = pytest.mark.slow

EngineFactory = Callable[..., LocalEngine]
GRID = ("--policies", "zipvl,redvtp,layer-skip", "--keep", "0.5,0.25", "--cache", "none,prefix")


@pytest.fixture(scope="module")
def asked(engine: EngineFactory) -> list[dict[str, Any]]:
    return tasks(engine(CHECKPOINT), lengths=(8, 16))


@pytest.fixture(scope="module")
def folder(asked: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whole evaluation, with its task file beside the results."""
    from redvtp.cli.main import main

    made = tmp_path_factory.mktemp("own-budget")
    file = write(made / "questions.jsonl", asked)
    assert main(["eval", str(MODEL), str(file), *GRID, *FLAGS, "--output", str(made / "out")]) == 0
    return made


def _summary(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "out" / "summary.json").read_text())["cells"]
    return found


def test_they_are_the_presets_that_a_ratio_says_nothing_to() -> None:
    silent = {
        preset for preset in PRESETS if preset != "none" and _without_ratio(preset, 0.5) == _without_ratio(preset, 0.25)
    }
    assert silent == {preset for preset in PRESETS if has_own_budget(preset)}


def _without_ratio(preset: str, keep_ratio: float) -> object:
    policy = policy_of(PruningParams(preset, keep_ratio), num_layers=8, denoising=DenoisingParams())
    assert policy is not None
    # Where a mass decides, the shares are not looked at.
    return policy.layer, policy.before, policy.mass, policy.shares if policy.mass is None else set(policy.shares)


def test_there_is_one_cell_for_them_in_each_cache_mode() -> None:
    expected = [
        cell
        for cache in ("none", "prefix")
        for cell in (
            Cell("none", 1.0, cache),
            Cell("zipvl", None, cache),
            Cell("redvtp", 0.5, cache),
            Cell("redvtp", 0.25, cache),
        )
    ]
    assert cells(["zipvl", "redvtp"], [1.0, 0.5, 0.25], ["none", "prefix"]) == expected
    # Even where nothing else than dense would be asked.
    assert cells(["zipvl", "redvtp"], [1.0], ["none"]) == [Cell("none", 1.0, "none"), Cell("zipvl", None, "none")]


def test_each_question_is_asked_once_and_answered_as_by_the_engine_alone(
    folder: Path, asked: list[dict[str, Any]], engine: EngineFactory
) -> None:
    texts = {key(row): row["text"] for row in rows(folder / "out")}
    assert len(texts) == len(rows(folder / "out")) == len(asked) * 2 * 5
    for policy in ("zipvl", "layer-skip"):
        for task in asked:
            alone = answer(engine(CHECKPOINT), task, PruningParams(policy), cache="prefix")
            assert texts[task["id"], policy, None, "prefix"] == alone


def test_json_has_null_and_the_table_says_own(folder: Path) -> None:
    ratios = [(cell["policy"], cell["keep_ratio"]) for cell in _summary(folder) if cell["cache"] == "none"]
    assert ratios == [("none", 1.0), ("zipvl", None), ("redvtp", 0.5), ("redvtp", 0.25), ("layer-skip", None)]
    table = (folder / "out" / "report.md").read_text().split("## ")[0]
    shown = [[entry.strip() for entry in line.split("|")[1:4]] for line in table.splitlines() if line.startswith("|")]
    assert shown[2:7] == [
        ["dense", "100%", "none"],
        ["zipvl", "own", "none"],
        ["redvtp", "50%", "none"],
        ["redvtp", "25%", "none"],
        ["layer-skip", "own", "none"],
    ]


def test_they_are_points_at_what_they_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, list[float]] = {}
    errorbar = Axes.errorbar

    def seen(axis: Axes, x: list[float], *arguments: Any, **options: Any) -> ErrorbarContainer:
        drawn.setdefault(options["label"], x)
        return errorbar(axis, x, *arguments, **options)

    monkeypatch.setattr(Axes, "errorbar", seen)
    here = [cell for cell in _summary(folder) if cell["cache"] == "none"]
    plots.draw(tmp_path, here)
    kept = {row["policy"]: row["all"]["visual_tokens_kept"] / row["all"]["visual_tokens"] for row in here}
    assert kept["layer-skip"] == 1
    # Beside each other: the curves are half a point apart.
    assert drawn["zipvl"] == [pytest.approx(kept["zipvl"] * 100, abs=2)]
    assert drawn["layer-skip"] == [pytest.approx(100, abs=2)]
    assert drawn["redvtp"] == pytest.approx([25, 50, 100], abs=2)


def test_a_folder_with_answers_at_ratios_goes_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it was written when they were asked at each ratio: nothing is asked again."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_bytes((folder / "out" / "run.json").read_bytes())
    before = [
        row | {"keep_ratio": ratio}
        for row in rows(folder / "out")
        for ratio in ((0.5, 0.25) if row["keep_ratio"] is None else (row["keep_ratio"],))
    ]
    write(out / "results.jsonl", before)
    lines = (out / "results.jsonl").read_bytes()
    status, _, err = in_process(capsys, "eval", MODEL, folder / "questions.jsonl", *GRID, *FLAGS, "--output", out)
    assert status == 0, err
    assert (out / "results.jsonl").read_bytes() == lines
    assert json.loads((out / "summary.json").read_text())["cells"] == _summary(folder)
