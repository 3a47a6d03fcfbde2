"""A request that loses all its blocks, by `/reset_prefix_cache` or `/pause`, ends as if it had kept them.

After each preemption the pages of the whole cache are filled with rubbish.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import pytest
from vllm import LLM, SamplingParams

from golden_data import Case
from plugin.requests import engine_core_of, free_blocks, prompt_of, runner_of, scheduler_of, usable_blocks

CASE = Case("tiny-llada-v", "wide")
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "prefix_lm": {"cache": "prefix_lm"},
}


def _sampling(**knobs: Any) -> SamplingParams:
    knobs = {"block_length": 8, "steps": 16, "report": "full", **knobs}
    temperature = knobs.pop("temperature", 0.0)
    return SamplingParams(
        max_tokens=24,
        temperature=temperature,
        seed=11,
        ignore_eos=True,
        extra_args={f"redvtp_{name}": value for name, value in knobs.items()},
    )


def _preempt_all(llm: LLM) -> None:
    assert llm.reset_prefix_cache(reset_running_requests=True)
    assert free_blocks(llm) == usable_blocks(llm)
    cache = runner_of(llm)._engine.context.pages
    for pages in (*cache.keys, *cache.values):
        pages.fill_(float("nan"))


def _run(llm: LLM, requests: list[SamplingParams], preempted_before: Set[int]) -> list[Any]:
    """Answer them together; all that run are preempted before the given engine steps."""
    for number, sampling in enumerate(requests):
        llm.llm_engine.add_request(str(number), prompt_of(CASE), sampling)
    finished: dict[str, Any] = {}
    step = 0
    while llm.llm_engine.has_unfinished_requests():
        if step in preempted_before:
            _preempt_all(llm)
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        step += 1
    return [finished[str(number)] for number in range(len(requests))]


def _tokens(outputs: list[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize("keep_ratio", [None, 0.3], ids=["dense", "pruned"])
@pytest.mark.parametrize("mode", MODES)
def test_preemption_at_any_step_changes_no_token(llm: LLM, mode: str, keep_ratio: float | None) -> None:
    pruning = {"pruning": "none"} if keep_ratio is None else {"keep_ratio": keep_ratio}
    sampling = _sampling(**MODES[mode], **pruning)
    (expected,) = _run(llm, [sampling], set())
    story = expected.kv_transfer_params["redvtp"]
    for step in range(1, 16):
        (output,) = _run(llm, [sampling], {step})
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids, step
        told = output.kv_transfer_params["redvtp"]
        assert [s["canvas"] for s in told["trace"]] == [s["canvas"] for s in story["trace"]], step
        for name in ("steps", "visual_tokens_kept", "kv_blocks_admitted", "blocks_freed"):
            assert told[name] == story[name], step


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_preemption_at_every_step_of_a_sampled_batch_changes_no_token(llm: LLM, mode: str) -> None:
    requests = [
        _sampling(**MODES[mode], temperature=0.8, keep_ratio=0.3),
        _sampling(**MODES[mode], remasking="random", positions="original"),
        _sampling(**MODES[mode], temperature=1.2, pruning="random", steps=24),
    ]
    assert _tokens(_run(llm, requests, set(range(1, 24)))) == _tokens(_run(llm, requests, set()))


def test_resumed_request_takes_only_the_blocks_it_needs(llm: LLM) -> None:
    """Of a pruned request the dropped tokens are computed again, but get no blocks."""
    llm.llm_engine.add_request("pruned", prompt_of(CASE), _sampling(cache="prefix", keep_ratio=0.3))
    for _ in range(2):
        llm.llm_engine.step()
    held = usable_blocks(llm) - free_blocks(llm)
    _preempt_all(llm)
    llm.llm_engine.step()
    assert usable_blocks(llm) - free_blocks(llm) == held
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_request_waits_for_blocks_that_others_took_while_it_was_out(llm_factory: Callable[..., LLM]) -> None:
    """One request fits at a time; both are preempted together and go on in their order."""
    tokens = CASE.meta["prompt_len"] + 24
    llm = llm_factory("tiny-llada-v", num_gpu_blocks_override=-(-tokens // 32) + 1, max_model_len=tokens)
    sampling = [_sampling(cache="prefix", keep_ratio=0.9), _sampling(cache="prefix_lm", keep_ratio=0.2)]
    expected = [_tokens(_run(llm, [one], set()))[0] for one in sampling]
    assert _tokens(_run(llm, sampling, set(range(1, 40, 2)))) == expected
    assert free_blocks(llm) == usable_blocks(llm)


@pytest.mark.parametrize("clear_cache", [True, False])
def test_pause_and_resume_change_no_token(llm: LLM, clear_cache: bool) -> None:
    engine_core = engine_core_of(llm)
    sampling = _sampling(cache="prefix", keep_ratio=0.3)
    expected = _tokens(_run(llm, [sampling], set()))
    llm.llm_engine.add_request("paused", prompt_of(CASE), sampling)
    for _ in range(5):
        llm.llm_engine.step()
    engine_core.pause_scheduler(mode="keep", clear_cache=clear_cache)
    if clear_cache:
        assert free_blocks(llm) == usable_blocks(llm)
    assert not llm.llm_engine.step()
    engine_core.resume_scheduler()
    outputs: list[Any] = []
    while llm.llm_engine.has_unfinished_requests():
        outputs = llm.llm_engine.step() or outputs
    assert _tokens(outputs) == expected


def test_request_aborted_while_it_is_preempted_leaves_nothing(llm: LLM) -> None:
    llm.llm_engine.add_request("aborted", prompt_of(CASE), _sampling(cache="prefix"))
    llm.llm_engine.step()
    (request_id,) = scheduler_of(llm).requests
    assert request_id in runner_of(llm).sequences
    _preempt_all(llm)
    llm.llm_engine.abort_request([request_id], internal=True)
    llm.llm_engine.step()
    assert not runner_of(llm).sequences
    assert not scheduler_of(llm)._states
    assert not scheduler_of(llm).requests
    assert free_blocks(llm) == usable_blocks(llm)
