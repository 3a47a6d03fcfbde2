"""Real vLLM, in-process, against the reference: image file and prompt in, tokens out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from vllm import LLM

import golden_data
from golden_data import Run
from plugin.requests import answer_of, prompt_of, sampling_of

RUNS = [
    run
    for run in golden_data.runs()
    # No knob cuts Dream's time steps short; the engine's own tests do.
    if run.robust and "noschedule" not in run.name
]

_ANSWERS: dict[str, list[int]] = {}


def _answer(run: Run, llm_factory: Callable[..., LLM]) -> list[int]:
    """All runs of an engine go as one batch, so this also mixes sizes, steps and kinds of requests."""
    if str(run) not in _ANSWERS:
        overrides = run.case.config_overrides
        llm = llm_factory(run.case.checkpoint, **({"hf_overrides": overrides} if overrides else {}))
        batch = [
            other
            for other in RUNS
            if other.case.checkpoint == run.case.checkpoint and other.case.config_overrides == overrides
        ]
        outputs = llm.generate([prompt_of(other.case) for other in batch], [sampling_of(other) for other in batch])
        for other, output in zip(batch, outputs, strict=True):
            _ANSWERS[str(other)] = answer_of(other, list(output.outputs[0].token_ids), llm.get_tokenizer())
    return _ANSWERS[str(run)]


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_answer_is_the_references(run: Run, llm_factory: Callable[..., LLM]) -> None:
    assert _answer(run, llm_factory) == run.output
