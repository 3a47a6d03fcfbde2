"""Attention of a whole batch in one call of a paged kernel; what a kernel cannot take goes to torch.

A backend of this kind is a `PagedKernel`. Everything around the call is the same for all of them and stands here: which
sequences are taken, how their rows are put together, what is cleared, and scores, which need of a softmax only the
log-sum-exp of the scored rows (`redvtp.kernels.score`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from redvtp.attention.layout import Layout
from redvtp.attention.paged_batch import PagedBatch, in_place, paged_batch, rows_of, unused_slots
from redvtp.attention.paged_scores import PagedScores
from redvtp.attention.torch_paged import TorchPrepared
from redvtp.kv.pages import KVPages


class PagedKernel(Protocol):
    """Bidirectional attention over row-major pages.

    batch_invariant: see `AttentionBackend`.
    reads_unused: whether it multiplies what lies behind a sequence's last key, by zero. A former owner of the block may
        have left infinity there, and zero times infinity is not zero: those slots are cleared first.
    """

    batch_invariant: bool
    reads_unused: bool

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
        """([rows, heads, head_dim], log-sum-exp [heads, rows] float32, None where the kernel gives none).

        query: [rows, heads, head_dim] of the batch. keys, values: [blocks, block_size, kv_heads, head_dim].
        """


class PagedAttention:
    """`AttentionBackend` on a kernel."""

    def __init__(self, pages: KVPages, scale: float, kernel: PagedKernel) -> None:
        if not pages.row_major:
            raise ValueError("paged kernels read row-major pages only")
        # What is left to torch is computed sequence by sequence.
        self.batch_invariant = kernel.batch_invariant
        self.pages = pages
        self.scale = scale
        self.kernel = kernel

    def prepare(self, layout: Layout) -> PagedPrepared:
        return PagedPrepared(self, layout)


class PagedPrepared:
    """`PreparedAttention` of one forward."""

    def __init__(self, backend: PagedAttention, layout: Layout) -> None:
        self._backend = backend
        taken = in_place(layout)
        rest = [index for index in range(len(layout.spans)) if index not in set(taken)]
        self._torch = TorchPrepared(backend.pages, layout, backend.scale, rest)
        self._batch = paged_batch(layout, taken) if taken else None
        self._rest_rows = rows_of(layout, rest) if taken and rest else None
        self._scores = PagedScores(layout, self._batch, backend.scale)
        self._unused = unused_slots(layout, taken) if taken and backend.kernel.reads_unused else None
        self._zeros = None
        if self._unused is not None:
            pages = backend.pages.keys[0]
            self._zeros = pages.new_zeros(self._unused.numel(), *pages.shape[2:])

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._torch.write(layer, key, value)
        if self._unused is not None and self._zeros is not None:
            self._backend.pages.write(layer, self._unused, self._zeros, self._zeros)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch = self._batch
        if batch is None:
            return self._torch.attend(layer, query, key, value)
        pages = self._backend.pages
        own = query if batch.rows is None else query.index_select(0, batch.rows)
        attended, lse = self._backend.kernel(own, pages.keys[layer], pages.values[layer], batch)
        self._scores.normalised(layer, lse)
        if batch.rows is None or self._rest_rows is None:
            return attended
        output = torch.empty_like(query)
        output.index_copy_(0, batch.rows, attended)
        output.index_copy_(0, self._rest_rows, self._torch.attend(layer, query, key, value))
        return output

    def score(self, layer: int, query: Tensor, key: Tensor) -> None:
        self._scores.add(layer, query, self._backend.pages.keys[layer])
        self._torch.score(layer, query, key)
