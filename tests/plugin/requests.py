"""Golden runs as vLLM requests, and a look into the block pool of an in-process engine."""

from __future__ import annotations

from typing import Any, cast

from vllm import LLM, RequestOutput, SamplingParams
from vllm.inputs import TextPrompt
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import InprocClient

import golden_runs
from golden_data import Case, Run


def prompt_of(case: Case) -> TextPrompt:
    """What `LLM.generate` takes: the templated text with its `<image>` marks, and the images."""
    images = case.images()
    prompt: TextPrompt = {"prompt": case.prompt}
    if images:
        prompt["multi_modal_data"] = {"image": images}
    return prompt


def knobs_of(run: Run) -> dict[str, Any]:
    """The run as `extra_args` / `vllm_xargs`; its length is max_tokens."""
    return {f"redvtp_{name}": value for name, value in golden_runs.knobs(run).items() if name != "gen_length"}


def sampling_of(run: Run, temperature: float = 0.0, **knobs: Any) -> SamplingParams:
    """Seed 11, where there is a temperature."""
    # The reference ends at the stop strings it is given and at nothing else.
    return SamplingParams(
        max_tokens=golden_runs.knobs(run)["gen_length"],
        temperature=temperature,
        seed=11 if temperature else None,
        ignore_eos=True,
        stop=run.params.get("stopping_criteria"),
        extra_args={**knobs_of(run), **knobs},
    )


def answer_of(run: Run, token_ids: list[int], tokenizer: Any) -> list[int]:
    """What the reference returns: the tokens a client got, up to the stop string, plus the suffix vLLM cannot carry."""
    answer = list(token_ids)
    for stop in run.params.get("stopping_criteria", ()):
        ids = tokenizer.encode(stop, add_special_tokens=False)
        if answer[-len(ids) :] == ids:
            answer = answer[: -len(ids)]
    suffix: list[int] = tokenizer.encode(run.params.get("generation_suffix", ""), add_special_tokens=False)
    return answer + suffix


def report_of(output: RequestOutput) -> dict[str, Any]:
    """What came back with the answer."""
    assert output.kv_transfer_params is not None
    report: dict[str, Any] = output.kv_transfer_params["redvtp"]
    return report


def step_of(llm: LLM) -> list[RequestOutput]:
    """One engine step of a model that answers; vLLM's type allows for models that pool."""
    return cast(list[RequestOutput], llm.llm_engine.step())


def engine_core_of(llm: LLM) -> EngineCore:
    """The scheduler's side of an in-process engine."""
    client = llm.llm_engine.engine_core
    assert isinstance(client, InprocClient)
    return client.engine_core


def scheduler_of(llm: LLM) -> Any:
    """The DiffusionScheduler of an in-process engine."""
    return engine_core_of(llm).scheduler


def runner_of(llm: LLM) -> Any:
    """The DiffusionModelRunner of an in-process engine."""
    return llm.llm_engine.model_executor.driver_worker.model_runner


def free_blocks(llm: LLM) -> int:
    blocks: int = scheduler_of(llm).kv_cache_manager.block_pool.get_num_free_blocks()
    return blocks


def usable_blocks(llm: LLM) -> int:
    """All blocks but the one vLLM keeps for itself."""
    blocks: int = scheduler_of(llm).kv_cache_manager.block_pool.num_gpu_blocks
    return blocks - 1
