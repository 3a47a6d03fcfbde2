"""What a step does about visual tokens: importance from what was scored, the choice, and the moves of the pages.

A policy says when and how many (`redvtp.pruning.policy`), its scorer which (`redvtp.pruning.scorers`); here a sequence
is shortened.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from redvtp.attention.scores import AttentionScores
from redvtp.clock import Clock
from redvtp.denoising.page_history import Move
from redvtp.denoising.planner import plan_step
from redvtp.denoising.ranks import ALONE, Ranks
from redvtp.denoising.sequence import Sequence
from redvtp.device import to_device
from redvtp.kv.blocks import blocks_needed
from redvtp.kv.compaction import CompactionPlan, plan_compaction
from redvtp.kv.pages import KVPages
from redvtp.pruning.importance import masked_row_importance
from redvtp.pruning.policy import survivors
from redvtp.pruning.scorers import Evidence
from redvtp.reports import PruningReport

# Plans for pages that are to move, each with the layers it concerns.
Moves = list[tuple[range, CompactionPlan]]
# The step of a pruning that comes before the first forward.
BEFORE_ALL_STEPS = -1


class Pruner:
    """Shortens sequences over one paged cache."""

    def __init__(self, pages: KVPages, device: torch.device, clock: Clock, ranks: Ranks) -> None:
        self._pages = pages
        self._device = device
        self._clock = clock
        self._ranks = ranks

    def prune_before(self, sequence: Sequence) -> None:
        """Drop the visual tokens that the policy removes before the first forward."""
        policy, prompt = sequence.policy, sequence.prompt
        if policy is None or policy.before is None or prompt.num_visual == 0:
            return
        importance = self._importance(sequence, None, BEFORE_ALL_STEPS)
        kept = self.choose(sequence, policy.before, importance)
        sequence.unreported = _report(BEFORE_ALL_STEPS, None, importance, kept)
        if kept.numel() < prompt.num_visual:
            with self._clock.measure("compaction"):
                sequence.drop_visual(kept)

    def importances(self, found: Mapping[int, AttentionScores], counting: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """[visual] float32 on the CPU for each of these scores, the same on all ranks.

        counting: for scores by row [rows] bool on the CPU, which of the rows count; all where there is no entry.
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
                    means.append(masked_row_importance(rows, counting[index]))
                else:
                    means.append(rows.mean(0))
            # The host chooses by these numbers and waits for them here.
            decided = self._ranks.broadcast_from_rank0(torch.cat(means)).cpu()
            return dict(zip(scored, decided.split([part.numel() for part in means]), strict=True))

    def _importance(self, sequence: Sequence, attention: Tensor | None, step: int) -> Tensor:
        """[visual] float32 on the CPU, from the policy's scorer. attention: what was measured, see `Evidence`."""
        policy, prompt = sequence.policy, sequence.prompt
        assert policy is not None
        features = None
        if policy.scorer.looks_at_features:
            features = prompt.embeds.index_select(0, to_device(prompt.visual_rows, self._device))
        evidence = Evidence(prompt.num_visual, features, attention, policy.request_scores, sequence.draws(step))
        if features is None:
            return policy.scorer.score(evidence)
        with self._clock.measure("score"):
            importance = to_device(policy.scorer.score(evidence), self._device)
            return self._ranks.broadcast_from_rank0(importance).cpu()

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
        return survivors(sequence.policy, share, importance, sequence.prompt.group_of, sequence.prompt.groups)

    def prune(
        self, sequence: Sequence, share: float, attention: Tensor | None, step: int, moves: Moves
    ) -> PruningReport:
        """Drop the least important visual tokens after a step. `moves` gets what the pages need.

        attention: [visual] float32, what was measured in the step.
        """
        assert sequence.policy is not None, "only a policy drops tokens"
        before = sequence.prompt.num_visual
        importance = self._importance(sequence, attention, step)
        kept = self.choose(sequence, share, importance)
        if kept.numel() < before:
            every = range(self._pages.num_layers)
            self._shorten(sequence, kept, moves, every, every)
        return _report(step, None, importance, kept)

    def prune_like_exit(
        self, sequence: Sequence, layer: int, first: int, importance: Tensor, kept: Tensor, step: int, moves: Moves
    ) -> PruningReport:
        """Shorten a sequence as its step has behind `layer`, where it went on with the visual tokens `kept` alone.

        first: the row the step began with. Behind the layer the pages are in place; `moves` gets what others need.
        """
        if kept.numel() < sequence.prompt.num_visual:
            in_front = range(layer + 1)
            # A step that read pages has moved those behind the layer; one that read none wrote the survivors only.
            self._shorten(sequence, kept, moves, in_front, range(self._pages.num_layers) if first else in_front)
        return _report(step, layer, importance, kept)

    def _shorten(self, sequence: Sequence, kept: Tensor, moves: Moves, to_move: range, moved: range) -> None:
        """Keep only the visual tokens `kept`.

        to_move: layers whose pages still have to move.
        moved: those whose pages moved in the end.
        """
        with self._clock.measure("compaction"):
            table = torch.tensor(sequence.block_table)
            shortened = sequence.drop_visual(kept)
            # What the next step computes again is about to be overwritten.
            left = 0 if sequence.finished else plan_step(sequence).first_row
            if left:
                rows, before, after = shortened.rows[:left], shortened.before[:left], shortened.after[:left]
                moves.append((to_move, plan_compaction(table, rows, before, after, self._pages.block_size)))
                sequence.pages = sequence.pages.after_move(Move(rows, after - before, moved))
            held = blocks_needed(sequence.total_length, self._pages.block_size)
            sequence.block_table = sequence.block_table[:held]


def _report(step: int, layer: int | None, importance: Tensor, kept: Tensor) -> PruningReport:
    return PruningReport(step, layer, importance.numel(), kept.numel(), importance.tolist(), kept.tolist())
