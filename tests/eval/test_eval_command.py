"""`redvtp eval` through the embedded engine: what it answers, counts and reports, and what it refuses."""

from __future__ import annotations

import json
import statistics
import sys
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from eval.task_files import CHECKPOINT, FLAGS, MODEL, answer, in_process, key, rows, run, tasks, write
from golden_data import Case
from redvtp.evaluation.backends import request_of
from redvtp.evaluation.grid import Cell, Settings, questions
from redvtp.evaluation.tasks import read_tasks
from redvtp.local import LocalEngine
from redvtp.params import DenoisingParams, PruningParams

pytestmark = pytest.mark.slow

EngineFactory = Callable[..., LocalEngine]
GRID = ("--policies", "redvtp,random,uniform", "--keep", "1.0,0.5,0.25", "--cache", "none,prefix")
CELLS = [("none", 1.0)] + [(policy, ratio) for policy in ("redvtp", "random", "uniform") for ratio in (0.5, 0.25)]


@pytest.fixture(scope="module")
def asked(engine: EngineFactory) -> list[dict[str, Any]]:
    return tasks(engine(CHECKPOINT), rounds=2)


@pytest.fixture(scope="module")
def evaluated(asked: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One whole evaluation, as a user runs it."""
    folder = tmp_path_factory.mktemp("evaluation")
    file = write(folder / "questions.jsonl", asked)
    done = run("eval", MODEL, file, *GRID, *FLAGS, "--concurrency", 4, "--output", folder / "out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return {"out": folder / "out", "file": file, "summary": summary, "stdout": done.stdout, "stderr": done.stderr}


def _cell(evaluated: dict[str, Any], *cell: Any) -> dict[str, Any]:
    (found,) = (
        entry
        for entry in evaluated["summary"]["cells"]
        if (entry["policy"], entry["keep_ratio"], entry["cache"]) == cell
    )
    return dict(found)


def test_every_question_is_answered_once_in_every_cell(evaluated: dict[str, Any], asked: list[dict[str, Any]]) -> None:
    expected = {(task["id"], *cell, cache) for task in asked for cell in CELLS for cache in ("none", "prefix")}
    found = [key(row) for row in rows(evaluated["out"])]
    assert len(found) == len(expected)
    assert set(found) == expected


def test_dense_is_right_and_pruning_costs_some(evaluated: dict[str, Any]) -> None:
    assert _cell(evaluated, "none", 1.0, "none")["all"]["exact_match"]["share"] == 1
    for policy in ("redvtp", "random", "uniform"):
        pruned = _cell(evaluated, policy, 0.25, "none")
        assert 0 < pruned["all"]["exact_match"]["share"] < 1
        # One token is decided in one step: nothing is pruned for it.
        assert pruned["groups"]["short"]["exact_match"]["share"] > pruned["groups"]["long"]["exact_match"]["share"]


@pytest.mark.parametrize("policy", ["redvtp", "random", "uniform"])
def test_answers_are_those_of_the_engine_alone(
    evaluated: dict[str, Any], asked: list[dict[str, Any]], engine: EngineFactory, policy: str
) -> None:
    """In batches of four, and cells in turns, as if each had been the only question."""
    texts = {key(row): row["text"] for row in rows(evaluated["out"])}
    for task in asked[:8]:
        seed = zlib.crc32(f"0:{task['id']}".encode())
        alone = answer(engine(CHECKPOINT), task, PruningParams(policy, 0.25), seed=seed, cache="prefix")
        assert texts[task["id"], policy, 0.25, "prefix"] == alone


def test_the_summary_counts_the_rows(evaluated: dict[str, Any], asked: list[dict[str, Any]]) -> None:
    by_id = {task["id"]: task for task in asked}
    for cell in evaluated["summary"]["cells"]:
        name = (cell["policy"], cell["keep_ratio"], cell["cache"])
        mine = [row for row in rows(evaluated["out"]) if key(row)[1:] == name]
        right = [" ".join(row["text"].casefold().split()).rstrip(".,;:!? ") for row in mine]
        wanted = [" ".join(by_id[row["id"]]["answer"].casefold().split()).rstrip(".,;:!? ") for row in mine]
        assert cell["all"]["exact_match"]["correct"] == sum(map(str.__eq__, right, wanted))
        assert cell["all"]["questions"] == len(asked)
        assert cell["all"]["errors"] == 0
        assert cell["all"]["latency_s"]["median"] == pytest.approx(statistics.median(row["latency_s"] for row in mine))
        assert 0 < cell["all"]["latency_s"]["median"] <= cell["all"]["latency_s"]["p95"]
        for field in ("visual_tokens_kept", "kv_blocks", "kv_blocks_freed", "tokens", "steps"):
            assert cell["all"][field] == pytest.approx(statistics.mean(row[field] for row in mine))
        seconds = sum(max(r["clock_s"] for r in mine if r["span"] == span) for span in {row["span"] for row in mine})
        assert cell["tokens_per_second"] == pytest.approx(sum(row["tokens"] for row in mine) / seconds)
        assert sum(task["exact_match"]["correct"] for task in cell["tasks"].values()) == sum(r["correct"] for r in mine)


def test_pruned_cells_keep_their_share_and_free_blocks(evaluated: dict[str, Any]) -> None:
    for row in rows(evaluated["out"]):
        pruned = row["policy"] != "none" and row["id"].split("-")[1] != "1"
        share = row["keep_ratio"] if pruned else 1
        assert row["visual_tokens_kept"] == int(row["visual_tokens"] * share)
    freed = {cell["policy"]: cell["all"]["kv_blocks_freed"] for cell in evaluated["summary"]["cells"]}
    assert freed["none"] == 0
    assert all(freed[policy] > 0 for policy in ("redvtp", "random", "uniform"))


def test_cells_are_compared_with_dense_of_their_cache_over_the_same_questions(evaluated: dict[str, Any]) -> None:
    right = {key(row): row["correct"] for row in rows(evaluated["out"])}
    for cell in evaluated["summary"]["cells"]:
        name = (cell["policy"], cell["keep_ratio"], cell["cache"])
        if name == ("none", 1.0, "none"):
            assert cell["all"]["versus_baseline"] is None
            continue
        cache = "none" if cell["policy"] == "none" else cell["cache"]
        assert cell["baseline"] == {"policy": "none", "keep_ratio": 1.0, "cache": cache}
        ids = {row["id"] for row in rows(evaluated["out"])}
        lost = sum(right[i, "none", 1.0, cache] and not right[i, *name] for i in ids)
        gained = sum(right[i, *name] and not right[i, "none", 1.0, cache] for i in ids)
        versus = cell["all"]["versus_baseline"]
        assert (versus["pairs"], versus["lost"], versus["gained"]) == (len(ids), lost, gained)


def test_the_table_has_accuracy_beside_speed_for_every_cell(evaluated: dict[str, Any]) -> None:
    text = evaluated["stdout"]
    assert text.rstrip("\n") == (evaluated["out"] / "report.md").read_text().rstrip("\n")
    table = [line for line in text.split("## ")[0].splitlines() if line.startswith("|")]
    head = [name.strip() for name in table[0].strip("|").split("|")]
    assert {"exact match %", "vs dense", "tokens/s", "visual tokens kept", "KV blocks freed"} <= set(head)
    assert len(table) == 2 + 2 * len(CELLS)
    assert len({len(line) for line in table}) == 1
    for name in ("Group short", "Group long", "Task square", "Task wide", "Task tall"):
        assert f"## {name}" in text
    assert "%|" not in evaluated["stderr"]


def test_plots_are_drawn(evaluated: dict[str, Any]) -> None:
    for name in ("accuracy_vs_keep_ratio.png", "accuracy_vs_latency.png"):
        assert (evaluated["out"] / name).read_bytes().startswith(b"\x89PNG")


def test_a_finished_evaluation_is_reported_again_and_nothing_is_asked(
    evaluated: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (evaluated["out"] / "results.jsonl").read_bytes()
    arguments = [MODEL, evaluated["file"], *GRID, *FLAGS, "--concurrency", 4, "--output", evaluated["out"], "--json"]
    status, out, err = in_process(capsys, "eval", *arguments)
    assert status == 0, err
    assert json.loads(out) == evaluated["summary"]
    assert (evaluated["out"] / "results.jsonl").read_bytes() == before


def test_without_matplotlib_only_the_plots_are_missing(
    evaluated: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("redvtp.evaluation.plots")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    arguments = [MODEL, evaluated["file"], *GRID, *FLAGS, "--concurrency", 4, "--output", evaluated["out"], "--json"]
    status, out, err = in_process(capsys, "eval", *arguments)
    assert status == 0
    assert "matplotlib is not installed" in err
    assert json.loads(out) == evaluated["summary"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--steps", "1", "--block-length", "1"], "steps was null, is 1"),
        (["--concurrency", "5"], "concurrency was 4, is 5"),
        (["--seed", "3"], "seed was 0, is 3"),
        (["--threshold", "0.9"], "threshold was null, is 0.9"),
        (["--min-confidence", "1"], "min_confidence was null, is 1.0"),
        (["--positions", "original"], 'positions was "compact", is "original"'),
        (["--dtype", "bfloat16"], 'dtype was "float32", is "bfloat16"'),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(
    evaluated: dict[str, Any], capsys: pytest.CaptureFixture[str], changed: list[str], said: str
) -> None:
    before = (evaluated["out"] / "results.jsonl").read_bytes()
    arguments = [
        MODEL,
        evaluated["file"],
        *GRID,
        *FLAGS,
        "--concurrency",
        4,
        "--limit",
        1,
        "--output",
        evaluated["out"],
    ]
    status, out, err = in_process(capsys, "eval", *arguments, *changed)
    assert (status, out) == (2, "")
    assert "holds answers of another configuration" in err
    assert said in err
    assert (evaluated["out"] / "results.jsonl").read_bytes() == before


def test_every_parameter_is_in_the_configuration_unless_a_cell_sets_it(evaluated: dict[str, Any]) -> None:
    """A parameter that is missing there would let two different runs share a folder."""
    configuration = json.loads((evaluated["out"] / "run.json").read_text())
    names = {field.name for params in (DenoisingParams, PruningParams) for field in fields(params)}
    assert names - set(configuration) == {"cache", "preset", "keep_ratio"}


def test_a_folder_older_than_a_parameter_was_answered_with_its_default(
    evaluated: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configuration = json.loads((evaluated["out"] / "run.json").read_text())
    del configuration["prune_scope"], configuration["schedule"]
    (tmp_path / "run.json").write_text(json.dumps(configuration))
    (tmp_path / "results.jsonl").write_bytes((evaluated["out"] / "results.jsonl").read_bytes())
    arguments = [MODEL, evaluated["file"], *GRID, *FLAGS, "--concurrency", 4, "--output", tmp_path]
    status, out, err = in_process(capsys, "eval", *arguments, "--schedule", "linear")
    assert (status, out) == (2, "")
    assert 'schedule was "even", is "linear"' in err
    assert in_process(capsys, "eval", *arguments)[0] == 0
    assert (tmp_path / "results.jsonl").read_bytes() == (evaluated["out"] / "results.jsonl").read_bytes()


def test_a_changed_task_file_in_the_same_folder_is_refused(
    evaluated: dict[str, Any], asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "questions.jsonl", [asked[0] | {"answer": "8"}, *asked[1:]])
    status, _, err = in_process(
        capsys, "eval", MODEL, file, *GRID, *FLAGS, "--concurrency", 4, "--output", evaluated["out"]
    )
    assert status == 2
    assert "tasks_digest was" in err


def test_another_checkpoint_in_the_same_folder_is_refused(
    evaluated: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    other = MODEL.parent / "tiny-llada-v-b"
    status, _, err = in_process(
        capsys, "eval", other, evaluated["file"], *GRID, *FLAGS, "--concurrency", 4, "--output", evaluated["out"]
    )
    assert status == 2
    assert "checkpoint was" in err


def test_a_question_the_model_cannot_be_asked_counts_as_wrong_and_is_said(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = next(task for task in asked if task["gen_length"] == 8) | {"id": "long", "gen_length": 400, "steps": 400}
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(asked[0]["image"]).read_bytes()[:200])
    file = write(tmp_path / "questions.jsonl", [asked[0], long, asked[1] | {"id": "cut", "image": str(cut)}])
    flags = ("--policies", "none", *FLAGS, "--max-model-len", 300, "--output", tmp_path / "out", "--json")
    status, out, err = in_process(capsys, "eval", MODEL, file, *flags)
    assert status == 1
    (cell,) = json.loads(out)["cells"]
    assert (cell["all"]["questions"], cell["all"]["errors"], cell["all"]["exact_match"]["correct"]) == (3, 2, 1)
    assert "2 questions could not be asked and count as wrong" in err
    assert " exceeds --max-model-len 300; shorten --gen-length or" in err
    assert "damaged or cut short" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--policies", "redvpt"], "--policies must be one of redvtp, llada-fastv, fastv, late, progressive"),
        (["--policies", "external"], "--policies external needs an importance for each question"),
        (["--policies", ","], "--policies must name at least one"),
        (["--keep", "0.5,1.5"], "--keep must be a number in (0, 1], got 1.5"),
        (["--keep", "half"], "--keep must be numbers in (0, 1] with commas, got 'half'"),
        (["--cache", "none,some"], "--cache must be one of none, prefix, dual, prefix_lm, got 'some'"),
        (["--limit", "0"], "--limit must be an integer >= 1, got 0"),
        (["--concurrency", "x"], "--concurrency must be an integer >= 1, got 'x'"),
        (["--suffix", " end"], "--suffix would be a part of every answer"),
        (
            ["--steps", "9"],
            "line 1 of the task file cannot be asked with these flags: --steps must be an integer in [1, 1]",
        ),
        (["--gen-length", "-1"], "--gen-length must be an integer in [1, 65536], got -1"),
        (["--temperature", "-1"], "--temperature must be a number >= 0, got -1"),
        (["--remasking", "best"], "--remasking must be one of"),
        (["--server", "http://127.0.0.1:9"], "--kv-cache-memory-bytes and --attention are the server's own"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_no_folder(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    file = write(tmp_path / "questions.jsonl", asked[:1])
    status, out, err = in_process(capsys, "eval", MODEL, file, *FLAGS, "--output", tmp_path / "out", *flags)
    assert (status, out) == (2, "")
    assert said in err
    assert err.startswith("redvtp eval: error: ")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_lines_and_missing_images_are_refused_before_a_model_is_loaded(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", [asked[0], asked[1] | {"image": "no.png"}, asked[2] | {"answer": ""}])
    status, _, err = in_process(capsys, "eval", tmp_path / "no model", file, "--output", tmp_path / "out")
    assert status == 2
    assert "line 2: image no.png does not exist; line 3: needs an answer" in err
    status, _, err = in_process(capsys, "eval", MODEL, tmp_path / "no.jsonl", "--output", tmp_path / "out")
    assert status == 2
    assert "no.jsonl cannot be read: No such file" in err
    file = write(file, asked[:1])
    status, _, err = in_process(capsys, "eval", tmp_path, file, "--output", tmp_path / "out")
    assert status == 2
    assert "is not a checkpoint folder" in err


def test_a_server_that_is_not_there_is_one_line(
    asked: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "questions.jsonl", asked[:1])
    status, _, err = in_process(capsys, "eval", "http://127.0.0.1:9", file, "--output", tmp_path / "out")
    assert status == 2
    assert "the server at http://127.0.0.1:9/v1 cannot be asked" in err


def test_questions_are_written_down_as_the_family_does(engine: EngineFactory, tmp_path: Path) -> None:
    """A server does so by its chat template; answers of both could not be compared otherwise."""
    image = Case("tiny-lavida-dream", "square").image_files[0]
    file = write(tmp_path / "questions.jsonl", [{"image": str(image), "question": "Which?", "answer": "7"}])
    (question,) = questions(
        read_tasks(file).tasks, Cell("none", 1.0, "none"), Settings(DenoisingParams(gen_length=8), gen_length=8)
    )
    dream = request_of(question, engine("tiny-lavida-dream"))
    assert dream.prompt.endswith("<|im_start|>user\n<image>\nWhich?<|im_end|>\n<|im_start|>assistant\n")
    assert "<|im_start|>" not in request_of(question, engine(CHECKPOINT)).prompt
