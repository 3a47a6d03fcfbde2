"""Scoring: equal to attention written out in full, and never a tokens x tokens map."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redvtp.attention import scores as scores_module
from redvtp.attention.scores import AttentionScores
from redvtp.pruning.budget import most_important, tokens_to_keep
from redvtp.pruning.importance import masked_row_importance


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 99), st.booleans(), st.booleans())
def test_scores_equal_the_whole_attention_map(
    tokens: int, heads: tuple[int, int], seed: int, small: bool, averaged: bool
) -> None:
    query_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(seed)
    layers, head_dim = 4, 8
    counting = range(seed % 3, 3 + seed % 2)
    rows = torch.randperm(tokens, generator=generator)[: max(1, tokens // 3)].sort().values
    visual = torch.randperm(tokens, generator=generator)[: max(1, tokens // 2)].sort().values
    scores = AttentionScores(rows, visual, query_heads, counting, averaged=averaged)
    expected = torch.zeros(rows.numel(), visual.numel())
    chunk_bytes = scores_module.CHUNK_BYTES
    scores_module.CHUNK_BYTES = 1 if small else chunk_bytes
    try:
        for layer in range(layers):
            query = torch.randn(tokens, query_heads, head_dim, generator=generator)
            key = torch.randn(tokens, kv_heads, head_dim, generator=generator)
            scores.accumulate(layer, query, key, head_dim**-0.5)
            keys = key.repeat_interleave(query_heads // kv_heads, dim=1)
            attention = (torch.einsum("qhd,khd->hqk", query, keys) * head_dim**-0.5).softmax(-1)
            if layer in counting:
                expected += attention.mean(0)[rows][:, visual] / len(counting)
    finally:
        scores_module.CHUNK_BYTES = chunk_bytes
    expected = expected.mean(0, keepdim=True) if averaged else expected
    torch.testing.assert_close(scores.by_row(), expected, atol=1e-6, rtol=1e-5)


def test_only_still_masked_rows_count() -> None:
    attention = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert masked_row_importance(attention, torch.tensor([False, True, True])).tolist() == [0.0, 2.0]


def test_no_masked_row_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing left"):
        masked_row_importance(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))


@given(st.integers(1, 4000), st.floats(0.001, 1.0))
def test_the_budget_is_the_references_rounding(visual: int, ratio: float) -> None:
    keep = tokens_to_keep(visual, ratio)
    assert keep == max(1, int(visual * ratio))
    kept = most_important(torch.rand(visual), keep)
    assert kept.numel() == keep
    assert bool((kept.diff() > 0).all())
