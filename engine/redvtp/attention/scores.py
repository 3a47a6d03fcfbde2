"""How much some rows of a sequence look at each visual token, summed up while the layers run.

Only the rows that may count are scored, layer by layer, in float32, a few heads and rows at a time: the largest
temporary is [heads at once, rows at once, tokens], never tokens x tokens. Of canvas rows it may be known only after the
step's commit which of them count, so the sum is kept for each row; where all of them count (a prompt's thousands, say)
it is one sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.clock import Clock

# Bytes that one chunk of attention scores may take; a scoring step must not need more memory than a plain full step.
CHUNK_BYTES = 8 << 20


class AttentionScores:
    """Attention of some rows to visual tokens, mean over layers and heads (RedVTP, arXiv 2511.12428, eq. for
    importance).

    rows: [rows] int64, the scored query rows, as offsets into the rows that are computed.
    visual: [visual] int64, the visual tokens, as offsets into the sequence's tokens.
    heads: attention heads over all tensor-parallel ranks. layers: those that count. clock: counts the time this takes.
    averaged: all rows count, their mean is all that is kept.
    """

    def __init__(
        self,
        rows: Tensor,
        visual: Tensor,
        heads: int,
        layers: range,
        clock: Clock | None = None,
        averaged: bool = False,
    ) -> None:
        self.rows = rows
        self.visual = visual
        self.averaged = averaged
        # Of a row's attention in one head of one layer.
        self.weight = 1.0 / (heads * len(layers) * (rows.numel() if averaged else 1))
        self.clock = clock or Clock(rows.device)
        self._layers = layers
        kept_rows = 1 if averaged else rows.numel()
        self._sum = torch.zeros(kept_rows, visual.numel(), dtype=torch.float32, device=rows.device)

    def accumulate(self, layer: int, query: Tensor, key: Tensor, scale: float) -> None:
        """Add one layer.

        query: [tokens, heads, head_dim]; key: [tokens, kv_heads, head_dim], both of this rank, positions applied.
        """
        if self.counts(layer):
            with self.clock.measure("score"):
                self._accumulate(query, key, scale)

    def counts(self, layer: int) -> bool:
        return layer in self._layers

    def keep_in(self, storage: Tensor) -> None:
        """Go on summing in `storage`, a view of a buffer that a kernel adds to: zeros [rows, visual].

        Where rows are averaged, it may have any number of rows; their sum counts.
        """
        summed = self.by_row()
        storage[: summed.shape[0]] = summed
        self._sum = storage

    def _accumulate(self, query: Tensor, key: Tensor, scale: float) -> None:
        queries = query.index_select(0, self.rows).float().transpose(0, 1)  # [heads, rows, head_dim]
        heads, rows, _ = queries.shape
        tokens, kv_heads, _ = key.shape
        group = heads // kv_heads
        heads_at_once = max(1, CHUNK_BYTES // (4 * rows * tokens))
        rows_at_once = rows if heads_at_once > 1 else max(1, CHUNK_BYTES // (4 * tokens))
        for start in range(0, heads, heads_at_once):
            serving = torch.arange(start, min(heads, start + heads_at_once), device=key.device) // group
            keys = key.index_select(1, serving).permute(1, 2, 0).float()  # [heads at once, head_dim, tokens]
            for first in range(0, rows, rows_at_once):
                chunk = queries[start : start + heads_at_once, first : first + rows_at_once]
                weights = torch.baddbmm(chunk.new_empty(()), chunk, keys, beta=0, alpha=scale).softmax(-1)
                seen = weights.index_select(-1, self.visual).sum(0)
                if self.averaged:
                    self._sum[:1].add_(seen.sum(0), alpha=self.weight)
                else:
                    self._sum[first : first + rows_at_once].add_(seen, alpha=self.weight)

    def by_row(self) -> Tensor:
        """[rows, visual] float32, [1, visual] where they are averaged: this rank's share; sum it over tensor-parallel
        ranks before use."""
        return self._sum.sum(0, keepdim=True) if self.averaged and self._sum.shape[0] > 1 else self._sum
