"""Visual tokens that leave a step behind a layer: dropped for good, or hidden from the deeper layers only.

LLaDA-FastV and FastV score at a layer of one step and drop behind it, so that the rest of that step is as short as
those that follow. Layer skipping hides all visual tokens behind a layer of every step; the layers in front of it go on
with all of them. `redvtp.denoising.forward` runs the layers; here is what goes on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.denoising.context import Context, Dropped, LayerExit, SequenceStep
from redvtp.denoising.forward import Continuation
from redvtp.denoising.page_history import OriginExit
from redvtp.denoising.planner import rows_without_visual
from redvtp.denoising.pruner import Moves, Pruner
from redvtp.denoising.sequence import Sequence
from redvtp.device import to_device
from redvtp.kv.compaction import CompactionPlan, compact_each, plan_compaction


class LayerExits:
    """The exits of one step of a batch.

    slots: for each sequence, where its tokens are in the pages.
    layers: {index in the batch: its exit layer}.

    Sequences are not touched, pages are; `SequenceStep.exit` is filled in while the layers run.
    """

    def __init__(self, context: Context, pruner: Pruner, steps: list[SequenceStep], slots: tuple[Tensor, ...]) -> None:
        self.layers = {index: layer for index, step in enumerate(steps) if (layer := step.plan.exit_layer) is not None}
        self._context = context
        self._pruner = pruner
        self._steps = steps
        self._slots = slots

    def leave(self, indices: list[int]) -> list[Continuation]:
        """See `redvtp.denoising.forward.Leave`."""
        dropping = [index for index in indices if self._steps[index].plan.drops_inside]
        found = {index: scores for index in dropping if (scores := self._steps[index].scores) is not None}
        importances = self._pruner.importances(found, {})
        moves: Moves = []
        for index in indices:
            step, layer = self._steps[index], self.layers[index]
            if index in importances:
                step.exit = self._drop(step, layer, importances[index], self._slots[index], moves)
            else:
                plan, sequence = step.plan, step.sequence
                slots = self._slots[index][: sequence.total_length]
                step.exit = LayerExit(layer, hidden_visual(sequence, plan.first_row, plan.end_row, slots))
        if moves:
            # The layers to come read what is in front of their rows from pages, of the survivors only.
            with self._context.clock.measure("compaction"):
                compact_each(self._context.pages, moves, self._context.model.language_model.rotary)
        return [exit_.continuation for index in indices if (exit_ := self._steps[index].exit) is not None]

    def _drop(self, step: SequenceStep, layer: int, importance: Tensor, slots: Tensor, moves: Moves) -> LayerExit:
        sequence, first = step.sequence, step.plan.first_row
        assert step.plan.share is not None
        kept = self._pruner.choose(sequence, step.plan.share, importance)
        if first and kept.numel() < sequence.prompt.num_visual:
            moves.append((range(layer + 1, self._context.pages.num_layers), self._compaction(sequence, kept, first)))
        return LayerExit(layer, _dropped_visual(sequence, kept, first, slots), Dropped(importance, kept))

    def _compaction(self, sequence: Sequence, kept: Tensor, first: int) -> CompactionPlan:
        """Of the pages in front of the step's rows."""
        table = torch.tensor(sequence.block_table)
        rows = sequence.keep_mask(kept)[:first].nonzero()[:, 0]
        before = sequence.positions()[rows]
        after = torch.arange(rows.numel()) if _renumbers(sequence) else before
        return plan_compaction(table, rows, before, after, self._context.pages.block_size)


def hidden_visual(sequence: Sequence, first: int, end: int, slots: Tensor) -> Continuation:
    """A sequence behind the layer where its visual tokens are hidden; its other rows stay where they are.

    first, end: the rows its forward computes.
    slots: [rows] int64 of its first rows, those of the prompt or all.
    """
    device = slots.device
    stays = rows_without_visual(sequence)[: slots.numel()]
    own = stays[first:end].nonzero()[:, 0]
    positions = sequence.positions()[first:end][own]
    seen = stays.nonzero()[:, 0]
    write_slots = slots[first:end][to_device(own, device)]
    return Continuation(own, positions, write_slots, seen.numel(), bool(first), to_device(seen, device))


def origin_exit(exit_: LayerExit | None) -> OriginExit | None:
    """What must be known of an exit to run the forward again."""
    if exit_ is None:
        return None
    rows, positions = exit_.continuation.rows, exit_.continuation.positions
    return OriginExit(exit_.layer, rows, positions, in_place=exit_.dropped is None)


def again(exit_: OriginExit) -> Continuation:
    """The exit of a forward that is run again; it writes its pages by itself and reads none."""
    return Continuation(exit_.rows, exit_.positions, None, exit_.rows.numel(), False)


def _dropped_visual(sequence: Sequence, kept: Tensor, first: int, slots: Tensor) -> Continuation:
    """A sequence behind the layer where it drops all visual tokens but `kept` ([kept] int64, ascending).

    first: the row its forward begins with.
    slots: where its rows are in front of the layer; behind it the survivors have the first of them.
    """
    survives = sequence.keep_mask(kept)
    total, before = int(survives.sum()), int(survives[:first].sum())
    own = survives[first:].nonzero()[:, 0]
    positions = torch.arange(before, total) if _renumbers(sequence) else sequence.positions()[first:][own]
    return Continuation(own, positions, slots[before:total], total if first else own.numel(), bool(first))


def _renumbers(sequence: Sequence) -> bool:
    return sequence.policy is not None and sequence.policy.positions == "compact"
