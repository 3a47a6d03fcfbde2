"""One request that fails inside a step ends with an error; its neighbours end with their tokens and all blocks return.

The faults are real exceptions, planted in the state of one request at each of the places a step goes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from golden_data import Case
from plugin.requests import free_blocks, prompt_of, runner_of, scheduler_of, usable_blocks
from redvtp.denoising.sequence import Sequence

CASE = Case("tiny-llada-v", "wide")
# Eight neighbours in all modes, half of them drawing random numbers.
NEIGHBOURS: list[dict[str, Any]] = [
    {"cache": cache, "temperature": temperature, "seed": seed, "keep_ratio": 0.3 + 0.1 * seed}
    for seed, (cache, temperature) in enumerate(
        (cache, temperature) for cache in ("none", "prefix", "prefix_lm", "dual") for temperature in (0.0, 0.9)
    )
]


def _fail(*_: Any) -> Any:
    raise RuntimeError("planted")


def _no_page(sequence: Sequence) -> None:
    sequence.block_table[0] = 10**6


def _at(*path: str) -> Callable[[Sequence], None]:
    def plant(sequence: Sequence) -> None:
        *parents, name = path
        target: Any = sequence
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, _fail)

    return plant


FAULTS: dict[str, Callable[[Sequence], None]] = {
    "before the forward": _at("response_ids"),
    "in attention": _no_page,
    "after proposals were drawn": _at("canvas", "tokens_to_commit"),
    "after others have committed": _at("canvas", "commit"),
    "after all have committed": _at("canvas", "resolved_growth"),
}


def _sampling(temperature: float = 0.0, seed: int = 0, **knobs: Any) -> SamplingParams:
    knobs = {"block_length": 8, "steps": 12, **knobs}
    return SamplingParams(
        max_tokens=24,
        temperature=temperature,
        seed=seed,
        ignore_eos=True,
        extra_args={f"redvtp_{name}": value for name, value in knobs.items()},
    )


@pytest.fixture(scope="module")
def expected(llm_factory: Callable[..., LLM]) -> list[list[int]]:
    llm = llm_factory("tiny-llada-v")
    alone = [llm.generate([prompt_of(CASE)], _sampling(**one), use_tqdm=False)[0] for one in NEIGHBOURS]
    return [list(output.outputs[0].token_ids) for output in alone]


def _finish(llm: LLM) -> dict[str, Any]:
    finished: dict[str, Any] = {}
    while llm.llm_engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    return finished


def _add_all(llm: LLM) -> None:
    for number, one in enumerate(NEIGHBOURS):
        if number == 5:
            # Some before it in the batch, some behind.
            llm.llm_engine.add_request("bad", prompt_of(CASE), _sampling(temperature=0.5))
        llm.llm_engine.add_request(f"good-{number}", prompt_of(CASE), _sampling(**one))


def _check(finished: dict[str, Any], expected: list[list[int]], llm: LLM) -> None:
    assert finished["bad"].outputs[0].finish_reason == "error"
    for number, tokens in enumerate(expected):
        output = finished[f"good-{number}"].outputs[0]
        assert output.finish_reason == "length"
        assert list(output.token_ids) == tokens, number
    # vLLM tells the workers who has ended with the next step.
    llm.llm_engine.step()
    assert not runner_of(llm).sequences
    assert not scheduler_of(llm)._states


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [1, 5])
def test_one_failing_request_costs_only_itself(llm: LLM, expected: list[list[int]], fault: str, step: int) -> None:
    _add_all(llm)
    for _ in range(step):
        llm.llm_engine.step()
    (bad,) = (sequence for name, sequence in runner_of(llm).sequences.items() if name.startswith("bad"))
    assert not bad.finished
    FAULTS[fault](bad)
    _check(_finish(llm), expected, llm)


def test_fault_in_the_first_step_takes_the_pruning_of_the_others_back_too(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Survivors have moved in their pages when the fault comes; the step starts from what was there before it."""
    drop = Sequence.drop_visual

    def drop_or_fail(sequence: Sequence, *args: Any) -> Any:
        return _fail() if sequence.request_id.startswith("bad") else drop(sequence, *args)

    monkeypatch.setattr(Sequence, "drop_visual", drop_or_fail)
    _add_all(llm)
    _check(_finish(llm), expected, llm)


def test_request_whose_image_cannot_be_encoded_fails_alone(
    llm: LLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(llm)
    runner.reset_encoder_cache()
    items = runner.arrivals.items

    def items_or_fail(request: Any) -> Any:
        return _fail() if request.req_id.startswith("bad") else items(request)

    monkeypatch.setattr(runner.arrivals, "items", items_or_fail)
    _add_all(llm)
    _check(_finish(llm), expected, llm)
    assert free_blocks(llm) == usable_blocks(llm)
