"""Which visual tokens leave a step half way: dropped for good, or withdrawn from the deeper layers only.

LLaDA-FastV and FastV score at a layer of one step and drop behind it, so that the rest of that step is as short as
those that follow. Layer skipping withdraws all visual tokens behind a layer of every step; nobody sees them there, and
the layers in front of it go on with all of them. `redvtp.denoising.forward` runs the layers; here is what goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.attention.interface import Segment
from redvtp.clock import Clock
from redvtp.denoising.forward import Rest
from redvtp.denoising.page_history import OriginCut, PageOrigin
from redvtp.denoising.pruner import Moves, Pruner
from redvtp.denoising.sequence import Sequence, StepPlan
from redvtp.kv.compaction import CompactionPlan, compact_each, plan_compaction
from redvtp.kv.pages import KVPages
from redvtp.kv.rotary import Rotary


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a step dropped half way. importance: [visual] float32 of the tokens before. kept: [kept] int64, ascending,
    into those."""

    importance: Tensor
    kept: Tensor


class StepCuts:
    """The cuts of one step of a batch.

    plans, slots: for each sequence its step, and [total_length] int64 where its rows are.

    layers: {index in the batch: the layer behind which it is cut}. dropped: filled while the layers run. Sequences are
    not touched, pages are.
    """

    def __init__(
        self,
        batch: list[Sequence],
        plans: list[StepPlan],
        slots: list[Tensor],
        cache: KVPages,
        rotary: Rotary,
        clock: Clock,
        pruner: Pruner,
    ) -> None:
        self.layers = {index: layer for index, seq in enumerate(batch) if (layer := seq.cut_next()) is not None}
        self.dropped: dict[int, Dropped] = {}
        self._batch, self._plans, self._slots = batch, plans, slots
        self._cache, self._rotary, self._clock = cache, rotary, clock
        self._pruner = pruner
        self._rests: dict[int, Rest] = {}

    def shorten(self, indices: list[int], segments: list[Segment]) -> list[Rest]:
        """See `redvtp.denoising.forward.Shorten`."""
        dropping = [index for index in indices if self._batch[index].drops_inside_next()]
        found = {index: scores for index in dropping if (scores := segments[index].scores) is not None}
        importances = self._pruner.importances(found, {})
        moves: Moves = []
        for index in indices:
            sequence, slots = self._batch[index], self._slots[index]
            first, end = self._plans[index].first, self._plans[index].end
            if index in importances:
                share = sequence.share_next()
                assert share is not None
                kept = self._pruner.choose(sequence, share, importances[index])
                self.dropped[index] = Dropped(importances[index], kept)
                self._rests[index] = rest_of_drop(sequence, kept, first, slots)
                if first and kept.numel() < sequence.num_visual:
                    behind = range(self.layers[index] + 1, self._cache.num_layers)
                    moves.append((behind, self._move_up(sequence, kept, first)))
            else:
                self._rests[index] = rest_of_withdrawal(sequence, first, end, slots)
        if moves:
            # The layers to come read what is in front of their rows from pages, of the survivors only.
            with self._clock.measure("compaction"):
                compact_each(self._cache, moves, self._rotary)
        return [self._rests[index] for index in indices]

    def of_origin(self, index: int) -> OriginCut | None:
        """How a full step of sequence `index` was cut, for those who run it again."""
        if index not in self._rests:
            return None
        rest = self._rests[index]
        return OriginCut(self.layers[index], rest.rows, rest.positions, in_place=index not in self.dropped)

    def _move_up(self, sequence: Sequence, kept: Tensor, first: int) -> CompactionPlan:
        table = torch.tensor(sequence.block_table, device=sequence.prompt_embeds.device)
        rows = sequence.survivors(kept)[:first].nonzero()[:, 0].to(table.device)
        before = sequence.positions()[rows]
        after = torch.arange(rows.numel(), device=table.device) if _moves_up(sequence) else before
        return plan_compaction(table, rows, before, after, self._cache.block_size)


def rest_of_drop(sequence: Sequence, kept: Tensor, first: int, slots: Tensor) -> Rest:
    """A sequence behind the layer where it drops all visual tokens but `kept` ([kept] int64, ascending).

    first: the row its forward begins with. slots: [total_length] int64, where all its rows are in front of the layer;
    the survivors are at the first of them behind it.
    """
    survives = sequence.survivors(kept).to(slots.device)
    total, before = int(survives.sum()), int(survives[:first].sum())
    own = survives[first:].nonzero()[:, 0]
    if _moves_up(sequence):
        positions = torch.arange(before, total, device=slots.device)
    else:
        positions = sequence.positions()[first:][own]
    return Rest(own, positions, slots[before:total], slots[:total] if first else None)


def rest_of_withdrawal(sequence: Sequence, first: int, end: int, slots: Tensor) -> Rest:
    """A sequence behind the layer where its visual tokens leave, its rows where they were.

    first, end: the rows its forward computes. slots: [rows] int64 of its first rows, those of the prompt or all.
    """
    stays = sequence.without_visual()[: slots.numel()].to(slots.device)
    own = stays[first:end].nonzero()[:, 0]
    positions = sequence.positions()[first:end][own]
    return Rest(own, positions, slots[first:end][own], slots[stays] if first else None)


def _moves_up(sequence: Sequence) -> bool:
    return sequence.policy is not None and sequence.policy.positions == "compact"


def rest_of_origin(origin: PageOrigin) -> Rest:
    """A forward that is run again writes its pages by itself and reads none."""
    assert origin.cut is not None
    return Rest(origin.cut.rows, origin.cut.positions, None, None)
