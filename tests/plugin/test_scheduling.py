"""Which requests step in an engine step: the budget, nobody forgotten, long prompts among short steps, priority."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

from golden_data import Case
from plugin.requests import free_blocks, prompt_of, scheduler_of, step_of, usable_blocks

SQUARE = Case("tiny-llada-v", "square")
TEXT = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
# The smallest there is: the longest request must fit.
BUDGET = 320


@dataclass
class Seen:
    """scheduled: for each engine step, tokens by the name of the request. running: who ran then."""

    scheduled: list[dict[str, int]] = field(default_factory=list)
    running: list[set[str]] = field(default_factory=list)

    def longest_wait(self) -> int:
        """Most engine steps that a running request went without a step."""
        longest, waited = 0, dict.fromkeys(set().union(*self.running), 0)
        for stepped, running in zip(self.scheduled, self.running, strict=True):
            for name in running:
                waited[name] = 0 if name in stepped else waited[name] + 1
                longest = max(longest, waited[name])
        return longest

    def first_step(self, name: str) -> int:
        return next(step for step, stepped in enumerate(self.scheduled) if name in stepped)


@contextmanager
def _watched(llm: LLM) -> Iterator[Seen]:
    """What the scheduler decides, as it decides it."""
    seen = Seen()
    scheduler = scheduler_of(llm)
    schedule = scheduler.schedule

    def name(request_id: str) -> str:
        # vLLM appends a random part.
        return request_id.rsplit("-", 1)[0]

    def watching(*args: Any) -> SchedulerOutput:
        output: SchedulerOutput = schedule(*args)
        if output.num_scheduled_tokens:
            seen.scheduled.append({name(rid): tokens for rid, tokens in output.num_scheduled_tokens.items()})
            seen.running.append({name(request.request_id) for request in scheduler.running})
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", watching)
        yield seen


def _sampling(max_tokens: int = 32, **knobs: Any) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        ignore_eos=True,
        extra_args={f"redvtp_{name}": value for name, value in knobs.items()},
    )


def _answer_all(llm: LLM, requests: dict[str, tuple[Any, SamplingParams]], **options: Any) -> dict[str, list[int]]:
    for name, (prompt, sampling) in requests.items():
        priority = options.get("priorities", {}).get(name, 0)
        llm.llm_engine.add_request(name, prompt, sampling, priority=priority)
    return _finish(llm)


def _finish(llm: LLM) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while llm.llm_engine.has_unfinished_requests():
        tokens |= {done.request_id: list(done.outputs[0].token_ids) for done in step_of(llm) if done.finished}
    return tokens


@pytest.fixture
def tight(llm_factory: Callable[..., LLM]) -> Iterator[LLM]:
    """An engine whose steps hold two or three full steps."""
    llm = llm_factory("tiny-llada-v", max_model_len=BUDGET, max_num_batched_tokens=BUDGET, max_num_seqs=8)
    assert scheduler_of(llm).max_num_scheduled_tokens == BUDGET
    yield llm
    assert free_blocks(llm) == usable_blocks(llm)


def test_steps_stay_within_the_budget_and_tokens_are_those_of_a_request_alone(tight: LLM) -> None:
    modes: list[dict[str, Any]] = [
        {"cache": "none"},
        {"cache": "prefix", "block_length": 8},
        {"cache": "dual", "block_length": 8},
        {"cache": "prefix_lm"},
    ]
    requests = {f"r{n}": (prompt_of(SQUARE), _sampling(**modes[n % 3], steps=16 + n)) for n in range(9)}
    alone: dict[str, list[int]] = {}
    for name, request in requests.items():
        alone |= _answer_all(tight, {name: request})
    with _watched(tight) as seen:
        assert _answer_all(tight, requests) == alone
    assert max(sum(step.values()) for step in seen.scheduled) <= BUDGET
    assert max(len(step) for step in seen.scheduled) > 2


def test_no_running_request_waits_longer_than_there_are_running_requests(tight: LLM) -> None:
    """Response steps are cheap, so all are admitted; the full steps at block boundaries then exceed the budget."""
    requests = {
        f"r{n}": (prompt_of(SQUARE), _sampling(cache="prefix", block_length=4, steps=16, keep_ratio=0.9))
        for n in range(8)
    }
    with _watched(tight) as seen:
        answers = _answer_all(tight, requests)
    assert len(set(map(tuple, answers.values()))) == 1
    most = max(len(running) for running in seen.running)
    assert most > BUDGET // SQUARE.meta["prompt_len"], "more run than could all take a full step"
    # They did compete, and nobody lost for long.
    assert 1 <= seen.longest_wait() <= most


def test_full_steps_do_not_wait_for_response_steps_to_end(tight: LLM) -> None:
    """Six that answer from pages leave no room for a whole prompt in a step, but for the steps that follow it."""
    small = {f"small{n}": (TEXT, _sampling(cache="prefix_lm", steps=32)) for n in range(6)}
    for name, (prompt, sampling) in small.items():
        tight.llm_engine.add_request(name, prompt, sampling)
    with _watched(tight) as seen:
        for _ in range(3):
            tight.llm_engine.step()
        tight.llm_engine.add_request("large", prompt_of(SQUARE), _sampling(cache="prefix_lm", steps=32))
        _finish(tight)
    before = seen.first_step("large")
    assert sum(seen.scheduled[before - 1].values()) + SQUARE.meta["prompt_len"] + 32 > BUDGET
    assert before <= 4, "it took its step as soon as it was there"
    assert seen.longest_wait() <= 1, "and cost the others one engine step"


def test_priority_decides_who_is_admitted(llm_factory: Callable[..., LLM]) -> None:
    tokens = SQUARE.meta["prompt_len"] + 32
    blocks = -(-tokens // 32) + 1
    llm = llm_factory(
        "tiny-llada-v", max_model_len=tokens, num_gpu_blocks_override=blocks, scheduling_policy="priority"
    )
    requests = {name: (prompt_of(SQUARE), _sampling(steps=4, pruning="none")) for name in ("late", "soon", "first")}
    with _watched(llm) as seen:
        _answer_all(llm, requests, priorities={"late": 2, "soon": 1, "first": 0})
    order = list(dict.fromkeys(name for step in seen.scheduled for name in step))
    assert order == ["first", "soon", "late"]


def test_preempted_request_of_low_priority_lets_others_go_first(llm_factory: Callable[..., LLM]) -> None:
    tokens = SQUARE.meta["prompt_len"] + 32
    blocks = -(-tokens // 32) + 1
    llm = llm_factory(
        "tiny-llada-v", max_model_len=tokens, num_gpu_blocks_override=blocks, scheduling_policy="priority"
    )
    sampling = _sampling(steps=8, cache="prefix", pruning="none")
    (alone,) = _answer_all(llm, {"alone": (prompt_of(SQUARE), sampling)}).values()
    with _watched(llm) as seen:
        llm.llm_engine.add_request("low", prompt_of(SQUARE), sampling, priority=5)
        llm.llm_engine.step()
        llm.llm_engine.add_request("high", prompt_of(SQUARE), sampling, priority=1)
        assert llm.reset_prefix_cache(reset_running_requests=True)
        answers = _finish(llm)
    assert list(answers) == ["high", "low"]
    assert answers == {"high": alone, "low": alone}
    assert [next(iter(step)) for step in seen.scheduled] == ["low"] + ["high"] * 8 + ["low"] * 7
