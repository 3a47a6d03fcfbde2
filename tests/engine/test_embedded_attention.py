"""Which attention the embedded engine takes, and what it says where it cannot take what was named."""

from __future__ import annotations

import pytest
import torch

from golden_data import checkpoint_dir
from redvtp.attention.embedded import embedded_attention, preferred_block_size
from redvtp.attention.torch_paged import TorchAttention
from redvtp.attention.xformers_paged import obstacle
from redvtp.kv.pages import PagedKVCache
from redvtp.local import LocalEngine

CUDA, HALF = torch.device("cuda"), torch.float16


@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_cpu_has_torch(name: str) -> None:
    pages = PagedKVCache(1, 2, 64, 2, 32, HALF)
    assert isinstance(embedded_attention(name, pages, 1.0), TorchAttention)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xformes", "attention must be one of auto, torch, xformers, got 'xformes'; did you mean 'xformers'"),
        ("xformers", "attention 'xformers' cannot be used: xformers' kernel runs on CUDA, not on cpu; use 'auto' or"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_reason(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalEngine(checkpoint_dir("tiny-llada-v"), dtype="float32", device="cpu", num_blocks=4, attention=name)


def test_what_xformers_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as somebody would mend them."""
    installed: dict[str, str] = {}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: installed.get(name))
    monkeypatch.setattr("redvtp.attention.xformers_paged.version", lambda name: installed[name])
    assert "is not installed" in str(obstacle(CUDA, torch.float32, 24, 32))
    installed |= {"xformers": "0.0.35", "triton": "3.9.0"}
    assert "needs Triton 3.8 or older" in str(obstacle(CUDA, torch.float32, 24, 32))
    installed["triton"] = "3.8.0"
    assert "knows no torch.float32" in str(obstacle(CUDA, torch.float32, 24, 32))
    assert "knows no head_dim 24" in str(obstacle(CUDA, HALF, 24, 32))
    assert "a block size that 64 divides, not 32" in str(obstacle(CUDA, HALF, 32, 32))
    assert obstacle(CUDA, HALF, 32, 64) is None
    assert preferred_block_size(CUDA) == 64, "the block size that nobody names must not be an obstacle"
