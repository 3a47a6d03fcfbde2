"""Attention on xformers' paged split-K kernel: on CUDA, for an engine without vLLM.

Written for xformers 0.0.35, the last release that brings this kernel itself; later ones point to another package.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

import torch
from packaging.version import Version
from torch import Tensor

from redvtp.attention.paged_batch import PagedBatch

# The kernel reads tiles of so many keys, each from one page.
BLOCK_MULTIPLE = 64
_FIRST_WITHOUT_BLOCK_POINTERS = Version("3.9")
_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_SIZES = (16, 32, 64, 128, 256, 512)


class XformersKernel:
    """`redvtp.attention.paged.PagedKernel`."""

    # One split for every sequence (FwOp_S1): how far the keys of others reach cannot change where its own are cut.
    batch_invariant = True
    reads_unused = True

    def __init__(self, scale: float) -> None:
        from xformers.ops.fmha import triton_splitk

        self._scale = scale
        self._operator = triton_splitk.FwOp_S1

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
        from xformers.ops.fmha import Inputs
        from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask

        mask = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            batch.query_counts, batch.kv_counts, batch.block_table, batch.block_size, device=query.device
        )
        rows, heads, head_dim = query.shape
        kv_heads = keys.shape[2]
        group = heads // kv_heads
        grouped = [pages.flatten(0, 1)[None, :, :, None].expand(-1, -1, -1, group, -1) for pages in (keys, values)]
        inputs = Inputs(query.view(1, rows, kv_heads, group, head_dim), *grouped, attn_bias=mask, scale=self._scale)
        # "needs_gradient" is how xformers asks for the log-sum-exp.
        output, context = self._operator.apply(inputs, needs_gradient=True)
        return output.reshape(rows, heads, head_dim), context.lse.reshape(heads, rows).float()


def triton_serves() -> bool:
    """Whether the Triton that is installed compiles the kernel."""
    try:
        return Version(version("triton")) < _FIRST_WITHOUT_BLOCK_POINTERS
    except PackageNotFoundError:
        return False


def obstacle(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the kernel cannot serve; None where it can."""
    if device.type != "cuda":
        return f"xformers' kernel runs on CUDA, not on {device.type}"
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed; pip install 'vllm-redvtp[xformers]'"
    if not triton_serves():
        return "xformers' kernel uses block pointers, which Triton 3.9 took out; it needs Triton 3.8 or older"
    if dtype not in _DTYPES:
        return f"xformers' kernel knows no {dtype}, only float16 and bfloat16"
    if head_dim not in _HEAD_SIZES:
        return f"xformers' kernel knows no head_dim {head_dim}, only powers of two from 16 to 512"
    if block_size % BLOCK_MULTIPLE:
        return f"xformers' kernel needs a block size that {BLOCK_MULTIPLE} divides, not {block_size}"
    return None
