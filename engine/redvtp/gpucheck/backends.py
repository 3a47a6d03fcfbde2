"""The attention backends that the command tries, the fastest first, and why one of them cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from redvtp.attention import xformers_paged
from redvtp.attention.interface import AttentionBackend
from redvtp.attention.offered import OfferedKernel, offered_kernels
from redvtp.attention.paged import PagedAttention
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.pages import KVPages

Make = Callable[[KVPages, int, float], AttentionBackend]


@dataclass(frozen=True, slots=True)
class Backend:
    """make: (pages, query heads, scale) -> the backend. obstacle: see `OfferedKernel`."""

    name: str
    obstacle: Callable[[torch.device, torch.dtype, int, int], str | None]
    make: Make


def backends() -> list[Backend]:
    """Those of installed packages, then the engine's; torch, which takes everything, is the last."""
    others = [_of_package(name, kernel) for name, kernel in offered_kernels().items()]
    return [*others, Backend("xformers", xformers_paged.obstacle, _xformers), Backend("torch", _nothing, _torch)]


def first_that_serves(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> Backend:
    return next(each for each in backends() if each.obstacle(device, dtype, head_dim, block_size) is None)


def _of_package(name: str, kernel: OfferedKernel) -> Backend:
    return Backend(name, kernel.obstacle, kernel.make)


def _nothing(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    return None


def _xformers(pages: KVPages, heads: int, scale: float) -> AttentionBackend:
    return PagedAttention(pages, scale, xformers_paged.XformersKernel(scale))


def _torch(pages: KVPages, heads: int, scale: float) -> AttentionBackend:
    return TorchAttention(pages, scale)
