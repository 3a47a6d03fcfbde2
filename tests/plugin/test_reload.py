"""Weights loaded again while the engine is up, as vLLM's `reload_weights` does."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import LLM, SamplingParams

from golden_data import Case
from plugin.requests import prompt_of, runner_of

SQUARE = Case("tiny-llada-v", "square")


def test_reloaded_weights_give_the_same_tokens(llm_factory: Callable[..., LLM]) -> None:
    """VLLM's worker calls it, and the runner had none."""
    # An engine of its own: its weights are spoiled meanwhile.
    llm = llm_factory("tiny-llada-v", max_num_seqs=3)
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)

    def answer() -> list[int]:
        return list(llm.generate([prompt_of(SQUARE)], sampling, use_tqdm=False)[0].outputs[0].token_ids)

    before = answer()
    with torch.no_grad():
        for weight in runner_of(llm).model.parameters():
            weight.mul_(0.5).add_(0.01)
    runner_of(llm).reset_encoder_cache()
    assert answer() != before
    llm.collective_rpc("reload_weights")
    assert answer() == before
