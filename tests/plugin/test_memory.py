"""Memory that a server holds beside its steps is allocated while vLLM measures the largest step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM

from plugin.requests import runner_of
from redvtp.canvas import proposals
from redvtp.denoising import commit
from redvtp.denoising.step import DenoisingRunner
from vllm_redvtp.server_options import vision_cache_bytes
from vllm_redvtp.worker import profiling
from vllm_redvtp.worker.profiling import held_embedding_bytes, profiled_canvas

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


@pytest.mark.parametrize(
    ("length", "sequences", "logit_rows", "canvas"),
    [
        # 126,464 ids: 265 rows of logits; 32,000 ids: 1,048 of them.
        (4096, 1, 265, 512),
        (4096, 1, 1048, 1048),
        (4096, 2, 1048, 524),
        (4096, 1, 100_000, 2048),
        (300, 4, 265, 299),
    ],
)
def test_profiled_canvas_fills_the_logits(length: int, sequences: int, logit_rows: int, canvas: int) -> None:
    assert profiled_canvas(length, sequences, logit_rows) == canvas


def test_profile_run_has_the_largest_logits_and_noise(
    llm_factory: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step holds more of either, however long its canvas is."""
    runner = runner_of(llm_factory("tiny-llada-v"))
    width = runner.planner.special.vocab
    monkeypatch.setattr(proposals, "LOGIT_BYTES", 60 * 4 * width)
    monkeypatch.setattr(proposals, "FLOAT64_BYTES", 40 * 8 * width)
    monkeypatch.setattr(proposals, "NOISE_BYTES", 30 * 8 * width)
    seen: dict[str, int] = {}

    def noting(module: Any, name: str) -> None:
        function = getattr(module, name)

        def noted(*args: Any) -> Any:
            result = function(*args)
            rows = next(arg for arg in args if isinstance(arg, torch.Tensor)).shape[0]
            seen[name] = max(seen.get(name, 0), rows)
            return result

        monkeypatch.setattr(module, name, noted)

    noting(commit, "candidate_logits")
    noting(proposals, "gumbel_perturbed")
    noting(proposals, "_confidence")
    runner.profile_run()
    assert seen == {"candidate_logits": 60, "gumbel_perturbed": 30, "_confidence": 40}


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
