"""What tests run on.

    REDVTP_TEST_DEVICE=cuda pytest tests/engine

DEVICE is where the engine's tests have their models. vLLM's tests run on what vLLM is built for. On a card each of
their engines and servers takes a small part of it: several are up at once, and vLLM's default for each is 92 %.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("REDVTP_TEST_DEVICE", "cpu")
CARDS = torch.cuda.device_count() if torch.cuda.is_available() else 0
# What must be free when one starts (two GiB of a card with 24), and its KV cache. Tiny checkpoints weigh a few MB.
CARD_SHARE = 0.08
CARD_CACHE_BYTES = 64 << 20

# Tensor-parallel ranks share the processor, but not a card.
needs_two_ranks = pytest.mark.skipif(CARDS == 1, reason="two ranks need two cards")
cpu_only = pytest.mark.skipif(CARDS > 0, reason="vLLM's CPU kernel needs vLLM for CPUs")


def vllm_options(cards: int = CARDS) -> dict[str, Any]:
    """Keywords of an LLM of a test, with which several fit a card."""
    if not cards:
        # The plugin chooses a small cache there by itself.
        return {}
    return {"gpu_memory_utilization": CARD_SHARE, "kv_cache_memory_bytes": CARD_CACHE_BYTES}


def vllm_flags(cards: int = CARDS) -> list[str]:
    """The same for `vllm serve`."""
    return [word for name, value in vllm_options(cards).items() for word in (f"--{name.replace('_', '-')}", str(value))]
