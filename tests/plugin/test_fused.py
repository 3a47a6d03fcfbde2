"""vLLM's fused operations compute what the engine's do. Its CPU build has operations of the same names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm import LLM
from vllm.platforms import current_platform

from golden_data import checkpoint_dir
from plugin.requests import runner_of
from redvtp.families.config import load_config
from redvtp.kv.rotary import Rotary
from redvtp.models.dvlm import Dvlm
from redvtp.models.operations import TORCH, Operations
from vllm_redvtp.fused import FUSED, chosen_operations


def _close(found: Tensor, expected: Tensor) -> None:
    """In float32, whatever the order of additions."""
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("hidden", [48, 64, 4096])
@torch.inference_mode()
def test_rms_norm(rows: int, hidden: int) -> None:
    numbers, weight = _random(rows, hidden) * 3, _random(hidden)
    expected = TORCH.rms_norm(numbers, weight, 1e-6)
    _close(FUSED.rms_norm(numbers, weight, 1e-6), expected)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 32), (6, 1, 128)])
@torch.inference_mode()
def test_rotary_embedding(heads: int, kv_heads: int, head_dim: int) -> None:
    """Positions far apart and out of order, as those of a packed batch are."""
    positions = torch.tensor([7, 0, 4095, 12, 12, 90_000])
    cos, sin = Rotary(head_dim, 1e4).angles(positions)
    query, key = _random(6, heads, head_dim), _random(6, kv_heads, head_dim)
    expected = TORCH.rotation(cos, sin)(query, key)
    found = FUSED.rotation(cos, sin)(query.clone(), key.clone())
    for own, other in zip(found, expected, strict=True):
        _close(own, other)


def _logits(checkpoint: str, operations: Operations) -> Tensor:
    """Of a whole model with random weights, its attention written out."""
    config = load_config(checkpoint_dir(checkpoint))
    torch.manual_seed(0)
    model = Dvlm(config, operations).language_model
    shared = config.num_attention_heads // config.num_key_value_heads

    def attention(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(shared, 1)).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(shared, 1))

    with torch.inference_mode():
        return model.logits(model(_random(19, config.hidden_size), torch.arange(19), attention), config.vocab_size)


@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida-dream"])
def test_whole_language_model(checkpoint: str) -> None:
    _close(_logits(checkpoint, FUSED), _logits(checkpoint, TORCH))


def test_the_model_that_a_cpu_serves_has_the_operations_of_the_reference(llm_factory: Callable[..., LLM]) -> None:
    assert runner_of(llm_factory("tiny-llada-v")).model.language_model.operations is TORCH


def test_a_gpu_has_the_fused_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    assert chosen_operations() is FUSED
