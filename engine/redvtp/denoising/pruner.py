"""What the runner does about visual tokens: importance from what was scored, the choice, and the moves of the pages.

A policy says when and how many (`redvtp.pruning.policy`), `redvtp.pruning.budget` which; here a sequence is shortened.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from redvtp.attention.scores import AttentionScores, masked_row_importance
from redvtp.clock import Clock
from redvtp.denoising.page_history import Move
from redvtp.denoising.ranks import ALONE, Ranks
from redvtp.denoising.sequence import BEFORE_ALL_STEPS, Sequence
from redvtp.kv.blocks import blocks_needed
from redvtp.kv.compaction import CompactionPlan, plan_compaction
from redvtp.kv.pages import KVPages
from redvtp.pruning.budget import survivors
from redvtp.pruning.importance import feature_importance
from redvtp.reports import PruningReport

# Plans for pages that are to move, each with the layers it concerns.
Moves = list[tuple[range, CompactionPlan]]


class Pruner:
    """See `DenoisingRunner` for ranks."""

    def __init__(
        self,
        cache: KVPages,
        device: torch.device,
        clock: Clock,
        ranks: Ranks,
    ) -> None:
        self._cache = cache
        self._device = device
        self._clock = clock
        self._ranks = ranks

    def prune_before(self, sequence: Sequence) -> None:
        """See `DenoisingRunner.prune_before`."""
        policy = sequence.policy
        if policy is None or policy.before is None or sequence.num_visual == 0:
            return
        if policy.source == "features":
            with self._clock.measure("score"):
                visual = sequence.prompt_embeds.index_select(0, sequence.visual_rows.to(self._device))
                importance = self._ranks.broadcast_from_rank0(feature_importance(visual).to(self._device)).cpu()
        else:
            importance = torch.tensor(policy.importance)
        kept = self.choose(sequence, policy.before, importance)
        sequence.unreported = _report(BEFORE_ALL_STEPS, None, importance, kept)
        if kept.numel() < sequence.num_visual:
            with self._clock.measure("compaction"):
                sequence.drop_visual(kept)

    def importances(self, found: Mapping[int, AttentionScores], counting: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """[visual] float32 on the CPU for each of these scores, the same on all ranks.

        counting: for scores by row [rows] bool, which of the rows count; all of them where there is no entry.
        """
        if not found:
            return {}
        with self._clock.measure("score"):
            scored = self._summed_over_ranks({index: scores.by_row() for index, scores in found.items()})
            means = []
            for index, rows in scored.items():
                if found[index].averaged:
                    means.append(rows[0])
                elif index in counting:
                    means.append(masked_row_importance(rows, counting[index].to(rows.device)))
                else:
                    means.append(rows.mean(0))
            agreed = self._ranks.broadcast_from_rank0(torch.cat(means)).cpu()
            return dict(zip(scored, agreed.split([part.numel() for part in means]), strict=True))

    def _summed_over_ranks(self, scored: dict[int, Tensor]) -> dict[int, Tensor]:
        if self._ranks is ALONE:
            return scored
        # Once for all of them.
        summed = self._ranks.sum_scores(torch.cat([rows.flatten() for rows in scored.values()]))
        parts = summed.split([rows.numel() for rows in scored.values()])
        return {i: part.view_as(rows) for (i, rows), part in zip(scored.items(), parts, strict=True)}

    @staticmethod
    def choose(sequence: Sequence, share: float, importance: Tensor) -> Tensor:
        """The visual tokens that stay, [kept] int64, ascending. share: see `survivors`; importance: [visual]."""
        assert sequence.policy is not None, "only a policy drops tokens"
        return survivors(sequence.policy, share, importance, sequence.image_of, sequence.images)

    def prune(
        self, sequence: Sequence, share: float, importance: Tensor | None, step: int, moves: Moves
    ) -> PruningReport:
        """Drop the least important visual tokens after a step, or those a control picks. `moves` gets what the pages
        need."""
        assert sequence.policy is not None, "only a policy drops tokens"
        before = sequence.num_visual
        if sequence.policy.source == "random":
            importance = torch.rand(before, generator=sequence.generator)
        elif sequence.policy.source == "uniform":
            importance = torch.ones(before)
        assert importance is not None
        kept = self.choose(sequence, share, importance)
        if kept.numel() < before:
            every = range(self._cache.num_layers)
            self._shorten(sequence, kept, moves, every, every)
        return _report(step, None, importance, kept)

    def settle(
        self, sequence: Sequence, layer: int, first: int, importance: Tensor, kept: Tensor, step: int, moves: Moves
    ) -> PruningReport:
        """Shorten a sequence as its step has behind `layer`, where it went on with the visual tokens `kept` alone.

        first: the row the step began with. Behind the layer the pages are in place. `moves` gets what the others need.
        """
        if kept.numel() < sequence.num_visual:
            in_front = range(layer + 1)
            # A step that read pages has moved those behind the layer; one that read none wrote the survivors only.
            self._shorten(sequence, kept, moves, in_front, range(self._cache.num_layers) if first else in_front)
        return _report(step, layer, importance, kept)

    def _shorten(self, sequence: Sequence, kept: Tensor, moves: Moves, to_move: range, moved: range) -> None:
        """Keep only the visual tokens `kept`. to_move: layers whose pages still have to move; moved: those whose pages
        moved in the end."""
        with self._clock.measure("compaction"):
            table = torch.tensor(sequence.block_table, device=self._device)
            rows, old_positions, new_positions = sequence.drop_visual(kept)
            # What the next step computes again is about to be overwritten.
            left = 0 if sequence.finished else sequence.next_step().first
            if left:
                rows, old_positions, new_positions = (part[:left] for part in (rows, old_positions, new_positions))
                plan = plan_compaction(table, rows, old_positions, new_positions, self._cache.block_size)
                moves.append((to_move, plan))
                assert sequence.origin is not None, "pages that are kept came from somewhere"
                sequence.origin.moves.append(Move(rows, new_positions - old_positions, moved))
            del sequence.block_table[blocks_needed(sequence.total_length, self._cache.block_size) :]


def _report(step: int, layer: int | None, importance: Tensor, kept: Tensor) -> PruningReport:
    return PruningReport(step, layer, importance.numel(), kept.numel(), importance.tolist(), kept.tolist())
