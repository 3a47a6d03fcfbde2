"""The reference backend: pages are gathered for torch's scaled dot product attention. Any device, any dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from redvtp.attention.interface import Segment, written_slots
from redvtp.kv.pages import KVPages


class TorchPagedAttention:
    """`Attention` of one step over `segments` (see batch.py), with pages in `cache`."""

    def __init__(self, cache: KVPages, segments: list[Segment], scale: float) -> None:
        self._cache = cache
        self._segments = segments
        self._scale = scale
        self._write_slots = written_slots(segments)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self._write_slots is not None:
            self._cache.write(layer, self._write_slots, key, value)
        outputs: list[Tensor] = []
        for segment in self._segments:
            rows = slice(segment.start, segment.end)
            if segment.read_slots is None:
                keys, values = key[rows], value[rows]
            else:
                keys, values = self._cache.read(layer, segment.read_slots)
            if segment.scores is not None:
                segment.scores.accumulate(layer, query[rows], keys, self._scale)
            outputs.append(self._attend(query[rows], keys, values))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            scale=self._scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output[0].transpose(0, 1)
