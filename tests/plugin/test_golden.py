"""Real vLLM, in-process, against the reference: image file and prompt in, tokens out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM, RequestOutput

import golden_data
from golden_data import Run
from golden_runs import one_of_each_mode, selected_runs
from plugin.requests import answer_of, prompt_of, sampling_of

AnswerTo = Callable[[Run], tuple[RequestOutput, list[int]]]

RUNS = [
    run
    for run in golden_data.runs()
    # No knob cuts Dream's time steps short; the engine's own tests do.
    if run.robust and "noschedule" not in run.name
]
CACHED = [run for run in RUNS if run.kind == "fast"]
# Of one engine: starting each takes seconds.
QUICK = one_of_each_mode(run for run in RUNS if run.case.checkpoint == "tiny-llada-v" and not run.case.config_overrides)

_ANSWERS: dict[str, tuple[RequestOutput, list[int]]] = {}


def _params(runs: list[Run]) -> list[Any]:
    return [pytest.param(run, id=str(run), marks=[pytest.mark.slow] * (str(run) not in QUICK)) for run in runs]


@pytest.fixture(scope="module")
def answer_to(llm_factory: Callable[..., LLM], request: pytest.FixtureRequest) -> AnswerTo:
    selected = selected_runs(request.session)
    return lambda run: _answer(run, llm_factory, selected)


def _answer(run: Run, llm_factory: Callable[..., LLM], selected: set[str]) -> tuple[RequestOutput, list[int]]:
    """All selected runs of an engine go as one batch, so this also mixes sizes, steps and kinds of requests."""
    if str(run) not in _ANSWERS:
        overrides = run.case.config_overrides
        llm = llm_factory(run.case.checkpoint, **({"hf_overrides": overrides} if overrides else {}))
        batch = [
            other
            for other in RUNS
            if str(other) in selected
            and other.case.checkpoint == run.case.checkpoint
            and other.case.config_overrides == overrides
        ]
        sampling = [sampling_of(other, redvtp_report="full" if other.kind == "fast" else "summary") for other in batch]
        outputs = llm.generate([prompt_of(other.case) for other in batch], sampling)
        for other, output in zip(batch, outputs, strict=True):
            token_ids = answer_of(other, list(output.outputs[0].token_ids), llm.get_tokenizer())
            _ANSWERS[str(other)] = output, token_ids
    return _ANSWERS[str(run)]


@pytest.mark.parametrize("run", _params(RUNS))
def test_answer_is_the_references(run: Run, answer_to: AnswerTo) -> None:
    assert answer_to(run)[1] == run.output


@pytest.mark.parametrize("run", _params(CACHED))
def test_every_step_is_the_references(run: Run, answer_to: AnswerTo) -> None:
    """With the prefix cache, by schedule and by confidence: which steps are full, and the canvas after each."""
    output, _ = answer_to(run)
    assert output.kv_transfer_params is not None
    report: dict[str, Any] = output.kv_transfer_params["redvtp"]
    assert report["steps"] == len(run.data["steps"])
    steps = [(step["canvas_block"], step["kind"] == "full") for step in report["trace"]]
    assert steps == [(step["block"], step["full"]) for step in run.data["steps"]]
    # Behind a stop the reference's last step chooses arbitrarily (tests/golden/README.md).
    answer = len(run.output) if "stopping_criteria" in run.params else run.params["gen_length"]
    canvases = [step["canvas"][:answer] for step in report["trace"]]
    assert canvases == run.tensor("x")[:, :answer].tolist()


def test_cached_runs_are_of_both_kinds() -> None:
    by_confidence = [run for run in CACHED if run.uses_threshold]
    assert len(by_confidence) >= 20
    assert len(CACHED) - len(by_confidence) >= 20
    # A step for each token is what the schedule would have given them.
    assert all(len(run.data["steps"]) < run.params["gen_length"] for run in by_confidence)
