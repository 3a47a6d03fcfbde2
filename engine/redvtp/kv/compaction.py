"""Which rows of a paged KV cache survive a pruning, and where they go.

A plan is pure data (source slots, destination slots, how far each key's position moves), made once for each pruning on
the host and applied to every layer by `compact`. All sources are read before any destination is written, because the
two overlap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.kv.blocks import slots_of
from redvtp.kv.pages import KVPages
from redvtp.kv.rotary import Rotary


@dataclass(frozen=True, slots=True)
class CompactionPlan:
    """sources, destinations: [moved] int64 slots.
    shift: [moved] int64, new position minus old position of each row."""

    sources: Tensor
    destinations: Tensor
    shift: Tensor


def plan_compaction(
    block_table: Tensor, kept: Tensor, old_positions: Tensor, new_positions: Tensor, block_size: int
) -> CompactionPlan:
    """Move the rows `kept` of one sequence to the front of its block table.

    block_table: [blocks] int64. kept: [kept] int64, ascending logical rows. old_positions, new_positions: [kept] int64.
    Rows that neither move nor turn are left out of the plan.
    """
    destinations = slots_of(block_table, 0, kept.numel(), block_size)
    sources = block_table[kept // block_size] * block_size + kept % block_size
    shift = new_positions - old_positions
    moved = (sources != destinations) | (shift != 0)
    return CompactionPlan(sources[moved], destinations[moved], shift[moved])


def joined(plans: list[CompactionPlan]) -> CompactionPlan:
    """One plan for sequences that shrink in the same step; their slots have nothing in common."""
    return CompactionPlan(
        torch.cat([plan.sources for plan in plans]),
        torch.cat([plan.destinations for plan in plans]),
        torch.cat([plan.shift for plan in plans]),
    )


def compact_each(cache: KVPages, plans: list[tuple[range, CompactionPlan]], rotary: Rotary) -> None:
    """Apply plans of different sequences, each to its layers; those with the same layers together."""
    for layers in dict.fromkeys(layers for layers, _ in plans):
        compact(cache, joined([plan for own, plan in plans if own == layers]), rotary, layers)


def compact(cache: KVPages, plan: CompactionPlan, rotary: Rotary, layers: range | None = None) -> None:
    """Apply a plan to `layers`, or to every layer; keys are turned from their old position to the new one."""
    if plan.sources.numel() == 0:
        return
    turn = bool((plan.shift != 0).any())
    for layer in layers if layers is not None else range(cache.num_layers):
        key, value = cache.read(layer, plan.sources)
        if turn:
            key = rotary.rotate(key, plan.shift)
        cache.write(layer, plan.destinations, key, value)
