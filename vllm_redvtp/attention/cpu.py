"""The attention backend of a server on a CPU: vLLM's paged kernel for response steps, torch for the rest.

A response step has a few queries and many keys, and the kernel reads those where they are; torch has to gather them
first. A full step brings all its keys along, and there torch is the faster of the two (docs/results.md has both).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from redvtp.attention.interface import Segment, written_slots
from redvtp.attention.torch_paged import TorchPagedAttention
from vllm_redvtp.attention.packed_pages import PackedKVCache

_NO_WINDOW = -1
_NO_SOFTCAP = 0.0


@dataclass(frozen=True, slots=True)
class _InPlace:
    """A segment that the kernel takes.

    block_table: [1, blocks] int32. query_start: [2] int32. length: [1] int32, its keys. schedule: the kernel's own
    division of the work, the same for all layers.
    """

    segment: Segment
    block_table: Tensor
    query_start: Tensor
    length: Tensor
    schedule: Tensor


class CpuPagedAttention:
    """`redvtp.attention.interface.Attention` over pages in the kernel's layout. heads: query heads of this rank.

    The kernel takes segments whose keys are the first ones of their pages, without gaps, and each by a call of its own:
    it divides a call's work among the threads by the size of the whole of it, and where the cuts fall shows in the last
    bits, so that together a request's tokens would depend on its neighbours. Segments that bring all their keys, read
    some of the slots only, or are scored (their keys are gathered for that anyway), are torch's.
    """

    def __init__(self, cache: PackedKVCache, heads: int, segments: list[Segment], scale: float) -> None:
        self._cache = cache
        self._scale = scale
        self._write_slots = written_slots(segments)
        tables = [_block_table(segment, cache.block_size) for segment in segments]
        parts = list(zip(segments, tables, strict=True))
        self._in_place = [self._prepare(segment, table, heads) for segment, table in parts if table is not None]
        self._rest = [replace(segment, write_slots=None) for segment, table in parts if table is None]
        self._torch = TorchPagedAttention(cache, self._rest, scale)
        # The kernel multiplies what lies behind a sequence's last token by zero, and what a former owner of the block
        # left there may be infinite.
        unused = [_unused_slots(taken.segment, cache.block_size) for taken in self._in_place]
        self._unused = torch.cat([torch.arange(0), *unused])
        _, kv_heads, _, head_dim = cache.keys[0].shape
        self._zeros = cache.keys[0].new_zeros(self._unused.numel(), kv_heads, head_dim)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._write_slots is not None:
            self._cache.write(layer, self._write_slots, key, value)
        if not self._in_place:
            return self._torch(layer, query, key, value)
        self._cache.write(layer, self._unused, self._zeros, self._zeros)
        output = torch.empty_like(query)
        for taken in self._in_place:
            rows = slice(taken.segment.start, taken.segment.end)
            self._attend(layer, taken, query[rows], output[rows])
        if self._rest:
            others = self._torch(layer, query, key, value)
            for segment, part in zip(
                self._rest, others.split([segment.end - segment.start for segment in self._rest]), strict=True
            ):
                output[segment.start : segment.end] = part
        return output

    def _prepare(self, segment: Segment, table: Tensor, heads: int) -> _InPlace:
        assert segment.read_slots is not None
        pages = self._cache.keys[0]
        query_start = torch.tensor([0, segment.end - segment.start], dtype=torch.int32)
        length = torch.tensor([segment.read_slots.numel()], dtype=torch.int32)
        schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=heads,
            num_kv_heads=pages.shape[1],
            head_dim=pages.shape[3],
            seq_lens=length,
            dtype=pages.dtype,
            query_start_loc=query_start,
            causal=False,
            sliding_window_size=_NO_WINDOW,
            isa=self._cache.layout.isa,
            enable_kv_split=False,
        )
        return _InPlace(segment, table.to(torch.int32)[None], query_start, length, schedule)

    def _attend(self, layer: int, taken: _InPlace, query: Tensor, output: Tensor) -> None:
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=self._cache.keys[layer],
            value_cache=self._cache.values[layer],
            output=output,
            query_start_loc=taken.query_start,
            seq_lens=taken.length,
            scale=self._scale,
            causal=False,
            alibi_slopes=None,
            sliding_window=_NO_WINDOW,
            block_table=taken.block_table,
            softcap=_NO_SOFTCAP,
            scheduler_metadata=taken.schedule,
            s_aux=None,
        )


def _block_table(segment: Segment, block_size: int) -> Tensor | None:
    """[blocks] int64, the pages that the kernel shall read; None where it cannot, or need not, read this segment."""
    slots = segment.read_slots
    if slots is None or segment.scores is not None or not slots.numel():
        return None
    written = segment.write_slots
    if written is not None and not bool(torch.isin(written, slots).all()):
        # Something of its own may lie behind what it reads, where `_unused_slots` clears.
        return None
    blocks = slots[::block_size] // block_size
    whole = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
    return blocks if torch.equal(whole[: slots.numel()], slots) else None


def _unused_slots(segment: Segment, block_size: int) -> Tensor:
    """The slots of the last block behind the last token."""
    assert segment.read_slots is not None
    last = int(segment.read_slots[-1])
    return torch.arange(last + 1, (last // block_size + 1) * block_size)
