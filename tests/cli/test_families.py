"""`redvtp generate` on LaViDa: its knobs as flags, its chat formats, and a draft to fill in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import golden_data
from golden_data import Run
from golden_runs import knobs
from redvtp.canvas.draft import draft_tokens
from redvtp.cli.main import main
from redvtp.prompt import load_tokenizer

NAMES = {
    "tiny-lavida/square/prefix_shift033_r50_lowconf_g64b64",
    "tiny-lavida/wide/full_None_r50_entrophy_g32b32",
    "tiny-lavida/wide/redvtp_k25_g32_s16",
    "tiny-lavida-dream/square/prefix_margin_s16",
}
RUNS = [run for run in golden_data.runs() if run.robust and str(run) in NAMES]


def _generate(capsys: pytest.CaptureFixture[str], model: Path, *arguments: object) -> dict[str, Any]:
    status = main(["generate", str(model), "--dtype", "float32", "--json", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert status == 0, err
    answer: dict[str, Any] = json.loads(out)
    return answer


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_flags_and_a_question_give_the_references_tokens(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [part for name, value in knobs(run).items() for part in (f"--{name.replace('_', '-')}", value)]
    images = ["--image", *run.case.image_files]
    answer = _generate(capsys, run.case.model_dir, *images, "--prompt", run.case.question, "--ignore-eos", *flags)
    assert answer["output_ids"] == run.output


def test_every_named_run_was_there() -> None:
    assert {str(run) for run in RUNS} == NAMES


def test_a_draft_is_filled_in_and_otherwise_printed_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    case = golden_data.Case("tiny-lavida", "wide")
    draft = "There are <mask><mask> on the left."
    answer = _generate(
        capsys, case.model_dir, "--image", *case.image_files, "--prompt", case.question, "--draft", draft
    )
    laid_out = draft_tokens(load_tokenizer(case.model_dir), draft, 584)
    assert len(answer["output_ids"]) == len(laid_out)
    assert all(ours == fixed for ours, fixed in zip(answer["output_ids"], laid_out, strict=True) if fixed != 584)
    assert answer["text"].startswith("There are ")
    assert answer["text"].endswith(" on the left.")
