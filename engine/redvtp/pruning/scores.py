"""How much the undecided response looks at each visual token, summed up while the layers run.

Only the rows of undecided canvas positions are scored, layer by layer, in float32, a few heads at a time: the largest
temporary is [heads at once, rows, tokens], never tokens x tokens. The rows to average are known only after the step's
commit, so the sum is kept for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.clock import Clock

# Bytes that one chunk of attention scores may take; a scoring step must not need more memory than a plain full step.
CHUNK_BYTES = 8 << 20


class AttentionScores:
    """Attention of canvas rows to visual tokens, mean over layers and heads (RedVTP, arXiv 2511.12428, eq. for
    importance).

    rows: [rows] int64, the scored query rows, as offsets into the sequence's own tokens.
    visual: [visual] int64, the visual tokens, as offsets into the sequence's own tokens.
    heads: attention heads over all tensor-parallel ranks. layers: those whose attention counts, accumulated by the
    backend. clock: counts the time this takes.
    """

    def __init__(self, rows: Tensor, visual: Tensor, heads: int, layers: range, clock: Clock | None = None) -> None:
        self.rows = rows
        self.visual = visual
        self.layers = layers
        self._weight = 1.0 / (heads * len(layers))
        self._clock = clock or Clock(rows.device)
        self._sum = torch.zeros(rows.numel(), visual.numel(), dtype=torch.float32, device=rows.device)

    def accumulate(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Add one layer.

        query: [tokens, heads, head_dim]; key: [tokens, kv_heads, head_dim], both of this rank, positions applied.
        """
        with self._clock.measure("score"):
            self._accumulate(query, key, scale)

    def _accumulate(self, query: Tensor, key: Tensor, scale: float) -> None:
        queries = query.index_select(0, self.rows).float().transpose(0, 1)  # [heads, rows, head_dim]
        heads, rows, _ = queries.shape
        tokens, kv_heads, _ = key.shape
        group = heads // kv_heads
        heads_at_once = max(1, CHUNK_BYTES // (4 * rows * tokens))
        for start in range(0, heads, heads_at_once):
            chunk = queries[start : start + heads_at_once]
            serving = torch.arange(start, start + chunk.shape[0], device=key.device) // group
            keys = key.index_select(1, serving).permute(1, 2, 0).float()  # [heads at once, head_dim, tokens]
            weights = torch.baddbmm(chunk.new_empty(()), chunk, keys, beta=0, alpha=scale).softmax(-1)
            self._sum.add_(weights.index_select(-1, self.visual).sum(0), alpha=self._weight)

    def by_row(self) -> Tensor:
        """[rows, visual] float32: this rank's share; sum it over tensor-parallel ranks before use."""
        return self._sum


def masked_row_importance(attention: Tensor, still_masked: Tensor) -> Tensor:
    """Importance of each visual token to the response that is still undecided (RedVTP, section 3).

    attention: [rows, visual] float32, mean over layers and heads. still_masked: [rows] bool, masked after this step's
    commit.
    Returns [visual] float32. Raises ValueError when no row is masked: nothing is left to decide, so do not prune.
    """
    if not bool(still_masked.any()):
        raise ValueError("no response row is masked; there is nothing left to prune for")
    return attention[still_masked].mean(0)
