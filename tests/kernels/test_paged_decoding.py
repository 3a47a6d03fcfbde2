"""Whole answers through `PagedAttention`, in batches: every policy and cache, against the torch backend.

Its kernel here is the definition, sequence by sequence, from the arguments that `flash` gets. What is tested is what
stands around a kernel: which sequences it is given while rows leave, pages move and prompts are kept, and the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from golden_data import Case
from redvtp.attention.paged import PagedAttention
from redvtp.denoising.step import DenoisingRunner
from redvtp.local import Generation, LocalEngine, Request
from redvtp.params import CACHES, PRESETS, DenoisingParams, PruningParams
from vllm_redvtp.attention.flash import FlashKernel

pytestmark = pytest.mark.slow

EngineFactory = Callable[..., LocalEngine]

CASES = {"tiny-llada-v": ("square", "tall", "wide"), "tiny-lavida": ("square", "wide")}
# What differs from the preset of the name.
POLICIES: dict[str, dict[str, Any]] = {preset: {} for preset in PRESETS if preset != "external"}
POLICIES |= {
    "late drop": {"preset": "redvtp", "prune_steps": 3},
    "original": {"preset": "redvtp", "positions": "original"},
}


class Reader:
    """flash_attn_varlen_func by its definition, one product a sequence. calls: how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, **arguments: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        query, keys, values = arguments["q"], arguments["k"], arguments["v"]
        output, lse = torch.empty_like(query), torch.empty(query.shape[1], query.shape[0])
        starts, lengths, tables = arguments["cu_seqlens_q"], arguments["seqused_k"], arguments["block_table"]
        group = query.shape[1] // keys.shape[2]
        for sequence, length in enumerate(lengths.tolist()):
            rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
            key, value = (
                pages[tables[sequence].long()].flatten(0, 1)[:length].repeat_interleave(group, 1)
                for pages in (keys, values)
            )
            logits = torch.einsum("qhd,khd->hqk", query[rows], key) * arguments["softmax_scale"]
            lse[:, rows] = logits.logsumexp(-1)
            output[rows] = torch.einsum("hqk,khd->qhd", logits.softmax(-1), value)
        return output, lse


def _requests(checkpoint: str, cache: str, policy: dict[str, Any]) -> list[Request]:
    """Some of them pruned, one dense; with more than one canvas block."""
    found = []
    for index, name in enumerate(CASES[checkpoint]):
        case = Case(checkpoint, name)
        denoising = DenoisingParams(
            gen_length=16, block_length=8, steps=8 + 4 * index, ignore_eos=True, cache=cache, seed=7
        )
        pruning = PruningParams("none") if index == 1 else PruningParams(**{"keep_ratio": 0.3, **policy})
        found.append(Request(case.prompt, tuple(case.images()), denoising, pruning))
    return found


def _answers(engine: LocalEngine, requests: list[Request]) -> list[tuple[Any, ...]]:
    def facts(generation: Generation) -> tuple[Any, ...]:
        pruned = [step.pruning.kept if step.pruning else None for step in generation.steps]
        return generation.output_ids, pruned, [step.kv_blocks for step in generation.steps]

    return [facts(generation) for generation in engine.generate(requests)]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("checkpoint", CASES)
def test_answers_are_those_of_torch(engine: EngineFactory, checkpoint: str, policy: str, cache: str) -> None:
    local = engine(checkpoint)
    changed = POLICIES[policy] or {"preset": policy}
    requests = _requests(checkpoint, cache, changed)
    expected = _answers(local, requests)
    scale, usual, reader = local.config.head_dim**-0.5, local.runner, Reader()
    attention = PagedAttention(local.cache, scale, FlashKernel(scale, reader, 3))
    local.runner = DenoisingRunner(local.model, local.cache, local.special, attention=attention)
    try:
        assert _answers(local, requests) == expected
    finally:
        local.runner = usual
    assert reader.calls > 0
