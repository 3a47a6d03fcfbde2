"""What is measured, the most important first, and whether it fits the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from redvtp.families.language import LanguageConfig
from redvtp.gpucheck.backends import Backend, backends
from redvtp.gpucheck.model import Sizes
from redvtp.kv.blocks import kv_token_bytes
from redvtp.params import DenoisingParams, PruningParams

BATCHES = (1, 16, 4)
_KEEPS = (1.0, 0.25, 0.5)
_CACHES = ("none", "dual", "prefix")
# Steps of a dense request, and of one that prunes and keeps its pages: what the backends are compared on.
_COMPARED = ((1.0, "none"), (0.25, "dual"))


@dataclass(frozen=True, slots=True)
class Setting:
    """One batch of equal requests. attention: the backend's name."""

    batch: int
    keep: float
    cache: str
    attention: str
    temperature: float = 0.0

    def __str__(self) -> str:
        warm = f", temperature {self.temperature:g}" if self.temperature else ""
        return f"batch {self.batch}, keep {self.keep:.0%}, cache {self.cache}, {self.attention}{warm}"

    @property
    def profiled(self) -> bool:
        return self.batch == 1 and not self.temperature and (self.keep, self.cache) in _COMPARED

    def denoising(self, sizes: Sizes) -> DenoisingParams:
        """A step for each token."""
        return DenoisingParams(
            sizes.gen_length, sizes.block_length, sizes.gen_length, self.temperature, seed=0, cache=self.cache
        )

    def pruning(self) -> PruningParams:
        return PruningParams(keep_ratio=self.keep) if self.keep < 1 else PruningParams(preset="none")


def serving_backends(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> dict[str, Backend]:
    """Those that can run, the one that is measured throughout first."""
    found = [each for each in backends() if each.obstacle(device, dtype, head_dim, block_size) is None]
    return {backend.name: backend for backend in found}


def settings(names: list[str]) -> Iterator[Setting]:
    """names: of `serving_backends`."""
    for batch in BATCHES:
        for keep in _KEEPS:
            for cache in _CACHES:
                yield Setting(batch, keep, cache, names[0])
        if batch == BATCHES[0]:
            yield Setting(batch, 0.25, "dual", names[0], temperature=1.0)
            for name in names[1:]:
                yield from (Setting(batch, keep, cache, name) for keep, cache in _COMPARED)
    yield Setting(16, 0.25, "dual", names[0], temperature=1.0)
    for name in names[1:]:
        yield from (Setting(16, keep, cache, name) for keep, cache in _COMPARED)


def needed_bytes(config: LanguageConfig, sizes: Sizes, itemsize: int, batch: int) -> int:
    """Pages and activations of a first step, beside the weights. The activations are an estimate."""
    rows = batch * sizes.tokens
    pages = rows * kv_token_bytes(config.num_hidden_layers, config.num_key_value_heads, config.head_dim, itemsize)
    # The residual, its norm in float32 and queries, keys, values beside their rotated copies; or the MLP's two factors.
    layer = max(12 * config.hidden_size, 4 * config.hidden_size + 3 * config.intermediate_size) * itemsize
    return pages + rows * (layer + config.hidden_size * itemsize) + (256 << 20)
