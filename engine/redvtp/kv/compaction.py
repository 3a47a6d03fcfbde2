"""Which rows of a paged KV cache survive a pruning, and where they go.

A plan is pure data (source slots, destination slots, how far each key's position moves), made once for each pruning on
the host, sent once, and applied to every layer by `compact`. Sources and destinations overlap: torch reads all of a
layer's sources before it writes, the kernel goes forward through each sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from redvtp.device import on_device, to_device
from redvtp.kernels.choice import runs_kernels
from redvtp.kv.blocks import slots_of
from redvtp.kv.pages import KVPages
from redvtp.kv.rotary import Rotary


@dataclass(frozen=True, slots=True)
class CompactionPlan:
    """sources, destinations: [rows] int64 slots on the CPU, of one sequence after another. No row of a sequence goes
    back, and those behind it come from further behind.
    shift: [rows] int64, new position minus old position of each row.
    lengths: rows of each sequence."""

    sources: Tensor
    destinations: Tensor
    shift: Tensor
    lengths: tuple[int, ...]


def plan_compaction(
    block_table: Tensor, kept: Tensor, old_positions: Tensor, new_positions: Tensor, block_size: int
) -> CompactionPlan:
    """Move the rows `kept` of one sequence to the front of its block table.

    block_table: [blocks] int64. kept: [kept] int64, ascending logical rows. old_positions, new_positions: [kept] int64.
    All on the CPU.
    """
    destinations = slots_of(block_table, 0, kept.numel(), block_size)
    sources = block_table[kept // block_size] * block_size + kept % block_size
    return CompactionPlan(sources, destinations, new_positions - old_positions, (kept.numel(),))


def joined(plans: list[CompactionPlan]) -> CompactionPlan:
    """One plan for sequences that shrink in the same step; their slots have nothing in common."""
    return CompactionPlan(
        torch.cat([plan.sources for plan in plans]),
        torch.cat([plan.destinations for plan in plans]),
        torch.cat([plan.shift for plan in plans]),
        tuple(length for plan in plans for length in plan.lengths),
    )


def compact_each(cache: KVPages, plans: list[tuple[range, CompactionPlan]], rotary: Rotary) -> None:
    """Apply plans of different sequences, each to its layers; those with the same layers together."""
    for layers in dict.fromkeys(layers for layers, _ in plans):
        compact(cache, joined([plan for own, plan in plans if own == layers]), rotary, layers)


def compact(cache: KVPages, plan: CompactionPlan, rotary: Rotary, layers: range | None = None) -> None:
    """Apply a plan to `layers`, or to every layer; keys are turned from their old position to the new one."""
    chosen = range(cache.num_layers) if layers is None else layers
    if plan.sources.numel() == 0 or not chosen:
        return
    if cache.row_major and runs_kernels(cache.keys[0]):
        from redvtp.kernels.triton_moves import move_rows

        device = cache.keys[0].device
        move_rows(
            [cache.keys[layer] for layer in chosen],
            [cache.values[layer] for layer in chosen],
            *_sent(plan.sources, plan.destinations, plan.shift, device),
            on_device([0, *accumulate(plan.lengths)], torch.int32, device),
            rotary.inverse_frequencies(device),
        )
    else:
        compact_in_torch(cache, plan, rotary, chosen)


def compact_in_torch(cache: KVPages, plan: CompactionPlan, rotary: Rotary, layers: range) -> None:
    """The kernel's twin, over pages of any layout."""
    moved = (plan.sources != plan.destinations) | (plan.shift != 0)
    sources, destinations, shift = plan.sources[moved], plan.destinations[moved], plan.shift[moved]
    if sources.numel() == 0:
        return
    turn = bool((shift != 0).any())
    sources, destinations, shift = _sent(sources, destinations, shift, cache.keys[0].device)
    for layer in layers:
        key, value = cache.read(layer, sources)
        if turn:
            key = rotary.rotate(key, shift)
        cache.write(layer, destinations, key, value)


def _sent(sources: Tensor, destinations: Tensor, shift: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of a plan on the device, in one copy."""
    sources, destinations, shift = to_device(torch.stack((sources, destinations, shift)), device)
    return sources, destinations, shift
