"""Memory that a server holds beside its steps is allocated while vLLM measures the largest step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM

from plugin.requests import runner_of
from redvtp.denoising.step import DenoisingRunner
from vllm_redvtp.server_options import vision_cache_bytes
from vllm_redvtp.worker import profiling
from vllm_redvtp.worker.profiling import held_embedding_bytes

# LLaDA-V 8B: 4,096 numbers of 2 bytes; 32 layers of 32 key heads of 128 numbers.
LLADA = {"row_bytes": 8192, "kv_token_bytes": 2 * 32 * 32 * 128 * 2}


def test_few_requests_hold_two_embeddings_of_each_prompt_token() -> None:
    held = held_embedding_bytes(4, 3700, **LLADA, keep_ratio=0.25, memory=1e15)
    assert held == 2 * 4 * 3700 * 8192


def test_many_requests_hold_no_more_than_memory_admits() -> None:
    """Filled with sequences that were pruned to a quarter: KV cache and embeddings together are the memory."""
    memory = 40 << 30
    held = held_embedding_bytes(1024, 3700, **LLADA, keep_ratio=0.25, memory=memory)
    kept_tokens = (memory - held) / LLADA["kv_token_bytes"]
    assert held == pytest.approx((kept_tokens + kept_tokens / 0.25) * 8192)


def test_fewer_kept_tokens_and_smaller_pages_hold_more() -> None:
    def held(kv_token_bytes: int, keep_ratio: float) -> int:
        return held_embedding_bytes(1024, 3700, 7168, kv_token_bytes, keep_ratio, 40 << 30)

    assert held(57_344, 0.25) > held(57_344, 0.5) > held(57_344, 1.0)
    # Tensor-parallel ranks split the pages and not the embeddings.
    assert held(57_344 // 4, 0.5) > held(57_344, 0.5)


def test_no_memory_holds_nothing() -> None:
    assert held_embedding_bytes(8, 100, 10, 10, 0.5, 0) == 0


def test_profile_run_holds_prompt_embeddings_and_vision_cache(
    llm_factory: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither was measured, so a server ran out of memory under load instead of at start."""
    runner = runner_of(llm_factory("tiny-llada-v"))
    config, scheduler = runner.vllm_config, runner.vllm_config.scheduler_config
    monkeypatch.setattr(config.scheduler_config, "max_num_seqs", 5)
    monkeypatch.setattr(profiling, "_memory_for_sequences", lambda *_: 1e12)
    prompt = config.model_config.max_model_len - 1
    expected = 2 * scheduler.max_num_seqs * prompt * runner.config.hidden_size * 4
    held: list[int] = []
    step = DenoisingRunner.step

    def noting(self: DenoisingRunner, batch: Any) -> Any:
        tensors = (found for found in gc.get_objects() if isinstance(found, torch.Tensor))
        held.extend(tensor.nbytes for tensor in tensors if tensor.dtype == torch.uint8)
        return step(self, batch)

    monkeypatch.setattr(DenoisingRunner, "step", noting)
    runner.profile_run()
    assert expected in held
    assert vision_cache_bytes(config) in held
