"""The backend `flash` through a slow reader of the very arguments that its kernel would get, against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.ragged import PARTS, SHAPES, Part, Ragged, Shape, same
from redvtp.attention.paged import PagedAttention
from redvtp.kv.pages import PagedKVCache
from vllm_redvtp.attention.flash import FlashKernel, unsupported


def read_slowly(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    num_splits: int,
    return_softmax_lse: bool,
    fa_version: int,
) -> tuple[Tensor, Tensor]:
    """What flash_attn_varlen_func returns, row by row: output [rows, heads, head_dim], lse [heads, rows] float32.

    Like the kernel it multiplies the whole of a last page, by zero behind the last key.
    """
    assert (causal, num_splits, return_softmax_lse, fa_version) == (False, 1, True, 3)
    for numbers in (cu_seqlens_q, seqused_k, block_table):
        assert numbers.dtype == torch.int32
        assert numbers.is_contiguous()
    counts = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max(counts)
    assert max_seqlen_k == int(seqused_k.max())
    assert len(counts) == seqused_k.numel() == block_table.shape[0]
    output, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    group, block_size = q.shape[1] // k.shape[2], k.shape[1]
    for sequence, count in enumerate(counts):
        length, first = int(seqused_k[sequence]), int(cu_seqlens_q[sequence])
        blocks = block_table[sequence, : -(-length // block_size)].tolist()
        for row in range(first, first + count):
            for head in range(q.shape[1]):
                keys = torch.cat([k[block, :, head // group] for block in blocks]).float()
                values = torch.cat([v[block, :, head // group] for block in blocks]).float()
                logits = keys @ q[row, head].float() * softmax_scale
                logits[length:] = float("-inf")
                lse[head, row] = logits.logsumexp(0)
                output[row, head] = ((logits - lse[head, row]).exp() @ values).to(q.dtype)
    return output, lse


def _attention(ragged: Ragged, pages: PagedKVCache, attend: Any = read_slowly) -> PagedAttention:
    return PagedAttention(pages, ragged.shape.scale, FlashKernel(ragged.shape.scale, attend, 3))


@pytest.mark.parametrize("scored", [False, True], ids=["plain", "scored"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_ragged_batch(shape: Shape, scored: bool) -> None:
    ragged = Ragged(shape)
    pages = ragged.pages()
    found = ragged.run(_attention(ragged, pages), pages, scored=scored)
    same(found, ragged.expected(scored=scored), ragged, clears=True)


def test_one_call_a_layer_for_the_batch() -> None:
    calls = []

    def counting(**arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments["q"].shape[0])
        return read_slowly(**arguments)

    ragged = Ragged(SHAPES[0])
    pages = ragged.pages()
    ragged.run(_attention(ragged, pages, counting), pages, scored=True)
    rows = sum(part.length - part.first for part in PARTS)
    assert calls == [rows, rows]


def test_what_the_kernel_cannot_read_in_place_goes_to_torch() -> None:
    ragged = Ragged(SHAPES[0], (Part(70, 61, gap=3), *PARTS[:2]))
    pages = ragged.pages()
    found = ragged.run(_attention(ragged, pages), pages, scored=False)
    expected = ragged.expected()
    torch.testing.assert_close(found.output, expected.output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size", "reason"),
    [
        (torch.bfloat16, 128, 32, None),
        (torch.float16, 72, 16, None),
        (torch.float32, 128, 32, "knows no torch.float32"),
        (torch.float16, 320, 32, "knows no head_dim 320"),
        (torch.float16, 100, 32, "knows no head_dim 100"),
        (torch.float16, 128, 24, "a --block-size that 16 divides, not 24"),
    ],
)
def test_what_it_refuses(dtype: torch.dtype, head_dim: int, block_size: int, reason: str | None) -> None:
    found = unsupported(dtype, head_dim, block_size)
    assert found == reason or (reason is not None and found is not None and reason in found)
