"""Scores of a batch whose attention a paged kernel computes, see `redvtp.kernels.score`."""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.attention.layout import Layout
from redvtp.attention.paged_batch import PagedBatch
from redvtp.kernels.score import log_sum_exp, score_sums
from redvtp.kernels.scoring_work import ScoredPart, scoring_work


class PagedScores:
    """The scores of one forward that concern sequences of a batch; it has none where there are none.

    Sums of all scores lie in one buffer, so that a layer adds to them in one launch.
    """

    def __init__(self, layout: Layout, batch: PagedBatch | None, scale: float) -> None:
        members = () if batch is None else batch.sequences
        self._scores = [(index, sums) for index, sums in layout.scores if index in members and sums.rows.numel()]
        self._scale = scale
        self._lse: Tensor | None = None
        if not self._scores or batch is None:
            return
        self._work = scoring_work(
            [
                ScoredPart(
                    sums.rows + layout.spans[index].start,
                    layout.slots[index][sums.visual],
                    layout.block_tables[index],
                    layout.spans[index].kv_length,
                    sums.averaged,
                    sums.weight,
                )
                for index, sums in self._scores
            ]
        )
        self._batch_rows = torch.cat([sums.rows + _offset(batch, index) for index, sums in self._scores])
        device = self._work.rows.device
        self._sums = torch.zeros(self._work.cells, dtype=torch.float32, device=device)
        stored = self._sums.split([part.cells for part in self._work.parts])
        for (_, sums), part, storage in zip(self._scores, self._work.parts, stored, strict=True):
            sums.keep_in(storage.view(part.sum_rows, -1))

    def normalised(self, layer: int, lse: Tensor | None) -> None:
        """Take the log-sum-exp [heads, rows of the batch] that the attention of a layer gives."""
        self._lse = None
        if lse is not None and self._counted(layer):
            self._lse = lse.index_select(1, self._batch_rows).T.contiguous()

    def add(self, layer: int, query: Tensor, keys: Tensor) -> None:
        """query: [rows, heads, head_dim], packed. keys: [blocks, block_size, kv_heads, head_dim] of the layer."""
        counted = self._counted(layer)
        if not counted:
            return
        with self._scores[0][1].clock.measure("score"):
            lse = log_sum_exp(self._work, query, keys, self._scale) if self._lse is None else self._lse
            score_sums(self._work, counted, query, keys, lse, self._sums, self._scale)
            self._lse = None

    def _counted(self, layer: int) -> list[int]:
        return [number for number, (_, sums) in enumerate(self._scores) if sums.counts(layer)]


def _offset(batch: PagedBatch, index: int) -> int:
    """Where a sequence's rows begin among those of the batch."""
    place = batch.sequences.index(index)
    return sum(batch.query_counts[:place])
