"""Attention of the backend `cpu`: vLLM's paged kernel for response steps, torch for the rest.

A response step has a few queries and many keys, and the kernel reads those where they are; torch has to gather them
first. A full step brings all its keys along, and there torch is the faster of the two (docs/results.md has both).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from redvtp.attention.layout import Layout
from redvtp.attention.paged_batch import in_place, unused_slots
from redvtp.attention.torch_paged import TorchPrepared
from vllm_redvtp.attention.packed_pages import PackedKVCache

_NO_WINDOW = -1
_NO_SOFTCAP = 0.0


class CpuAttention:
    """`redvtp.attention.interface.AttentionBackend` over pages in the kernel's layout.

    heads: query heads of this rank.
    """

    # Each sequence is a call of its own, see CpuPrepared.
    batch_invariant = True

    def __init__(self, pages: PackedKVCache, heads: int, scale: float) -> None:
        self.pages = pages
        self.heads = heads
        self.scale = scale

    def prepare(self, layout: Layout) -> CpuPrepared:
        return CpuPrepared(self, layout)

    def call(self, layer: int, work: KernelCall, query: Tensor, output: Tensor) -> None:
        """The kernel over one sequence. query: [rows, heads, head_dim]; output: the same shape, written."""
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self.pages.keys[layer],
            value_cache=self.pages.values[layer],
            output=output,
            query_start_loc=work.query_start,
            seq_lens=work.length,
            scale=self.scale,
            causal=False,
            alibi_slopes=None,
            sliding_window=_NO_WINDOW,
            block_table=work.block_table,
            softcap=_NO_SOFTCAP,
            scheduler_metadata=work.schedule,
            s_aux=None,
        )


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One sequence as the kernel takes it.

    index: its place in the layout.
    block_table: [1, blocks] int32.
    query_start: [2] int32.
    length: [1] int32, its keys.
    schedule: the kernel's division of the work, the same for all layers.
    """

    index: int
    block_table: Tensor
    query_start: Tensor
    length: Tensor
    schedule: Tensor


class CpuPrepared:
    """`PreparedAttention` of one forward.

    The kernel takes sequences whose keys are the first ones of their pages, without gaps, and each by a call of its
    own. It divides a call's work among threads by the size of the whole call, and where the cuts fall shows in the last
    bits: in a call for the batch, a request's tokens would depend on its neighbours. Full steps, sequences that read
    only some of their slots and scored ones (their keys are gathered for that anyway) run on torch.
    """

    def __init__(self, backend: CpuAttention, layout: Layout) -> None:
        self._backend = backend
        self._layout = layout
        pages = backend.pages
        scored = {index for index, _ in layout.scores}
        taken = [index for index in in_place(layout) if index not in scored and layout.spans[index].reads_pages]
        self.calls = [self._call(index) for index in taken]
        self._rest = [index for index in range(len(layout.spans)) if index not in taken]
        self._torch = TorchPrepared(pages, layout, backend.scale, self._rest)
        # The kernel multiplies what lies behind a sequence's last token by zero. A former owner of the block may have
        # left infinity there, and zero times infinity is not zero.
        self._unused = unused_slots(layout, taken)
        _, kv_heads, _, head_dim = pages.keys[0].shape
        self._zeros = pages.keys[0].new_zeros(self._unused.numel(), kv_heads, head_dim)

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        self._torch.write(layer, key, value)
        if self.calls:
            self._backend.pages.write(layer, self._unused, self._zeros, self._zeros)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.calls:
            return self._torch.attend(layer, query, key, value)
        output = torch.empty_like(query)
        for work in self.calls:
            span = self._layout.spans[work.index]
            self._backend.call(layer, work, query[span.start : span.end], output[span.start : span.end])
        if self._rest:
            others = self._torch.attend(layer, query, key, value)
            row = 0
            for span in (self._layout.spans[index] for index in self._rest):
                output[span.start : span.end] = others[row : row + span.rows]
                row += span.rows
        return output

    def score(self, layer: int, query: Tensor, key: Tensor) -> None:
        self._torch.score(layer, query, key)

    def _call(self, index: int) -> KernelCall:
        span, pages = self._layout.spans[index], self._backend.pages
        kept = pages.keys[0]
        query_start = torch.tensor([0, span.rows], dtype=torch.int32)
        length = torch.tensor([span.kv_length], dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=self._backend.heads,
            num_kv_heads=kept.shape[1],
            head_dim=kept.shape[3],
            seq_lens=length,
            dtype=kept.dtype,
            query_start_loc=query_start,
            causal=False,
            sliding_window_size=_NO_WINDOW,
            isa=pages.layout.isa,
            enable_kv_split=False,
        )
        blocks = -(-span.kv_length // self._layout.block_size)
        table = self._layout.block_tables[index : index + 1, :blocks].to(torch.int32)
        return KernelCall(index, table, query_start, length, schedule)
