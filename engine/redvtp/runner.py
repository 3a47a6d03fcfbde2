"""One denoising step for a batch of sequences: pack, forward, propose, commit, prune.

Sequences may be at different steps, full and response steps mixed; they share one packed forward without padding. The
driver (`LocalEngine`, or vLLM's worker through vllm_redvtp) owns admission and block allocation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from redvtp.attention.batch import Segment
from redvtp.attention.torch_paged import TorchPagedAttention
from redvtp.denoising.remasking import propose, random_confidence, select, suppress
from redvtp.kv.blocks import blocks_needed, slots_of
from redvtp.kv.cache import PagedKVCache
from redvtp.kv.compaction import compact, plan_compaction
from redvtp.models.dvlm import Dvlm
from redvtp.prompt import SpecialTokens
from redvtp.pruning.budget import evenly_spaced, most_important, tokens_to_keep
from redvtp.pruning.scores import AttentionScores, masked_row_importance
from redvtp.sequence import PruningReport, Sequence, StepPlan, StepReport


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The forward of one step.

    hidden: [tokens, hidden] of all sequences, before the final norm. segments: whose rows are whose. plans: what was
    computed.
    """

    hidden: Tensor
    segments: list[Segment]
    plans: list[StepPlan]

    def canvas_start(self, index: int, sequence: Sequence) -> int:
        """Packed row of canvas position 0 (virtual where a response step starts in a later block)."""
        return self.segments[index].end - sequence.suffix_ids.numel() - sequence.gen_length


class DenoisingRunner:
    """Steps batches of sequences over one model and one paged cache.

    reduce_scores: sums attention scores over tensor-parallel ranks, so that every rank makes the same choice.
    """

    def __init__(
        self,
        model: Dvlm,
        cache: PagedKVCache,
        special: SpecialTokens,
        reduce_scores: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.special = special
        self._reduce_scores = reduce_scores

    @torch.inference_mode()
    def step(self, batch: list[Sequence]) -> list[StepReport]:
        """One denoising step of every sequence. Returns a report for each, in order."""
        packed = self.forward(batch)
        masked_before = [sequence.canvas.masked() for sequence in batch]
        positions = [(sequence.canvas.block, sequence.steps_done) for sequence in batch]
        pruning_due = [sequence.prunes_next() for sequence in batch]
        committed = self._commit(batch, packed)
        reports = []
        for index, sequence in enumerate(batch):
            undecided = masked_before[index]
            # A committed row is decided even if the model proposed the mask id for it (as in the reference).
            still_masked = undecided.index_fill(0, committed[index], False)[undecided]
            held = blocks_needed(sequence.total_length, self.cache.block_size)
            pruning = None
            # With nothing left to decide there is nothing to prune for.
            if pruning_due[index] and bool(still_masked.any()):
                pruning = self._prune(sequence, packed.segments[index].scores, still_masked, positions[index][1])
            blocks = blocks_needed(sequence.total_length, self.cache.block_size)
            plan = packed.plans[index]
            reports.append(
                StepReport(
                    request_id=sequence.request_id,
                    step=positions[index][1],
                    canvas_block=positions[index][0],
                    kind=plan.kind,
                    tokens_computed=plan.tokens_computed,
                    kv_tokens=sequence.total_length,
                    kv_blocks=blocks,
                    blocks_freed=held - blocks,
                    new_tokens=sequence.canvas.resolved_growth(),
                    canvas=sequence.canvas.tokens.tolist(),
                    answer_length=sequence.canvas.answer_length,
                    prompt_length=sequence.prompt_length,
                    finished=sequence.finished,
                    finish_reason=sequence.finish_reason,
                    next_tokens=0 if sequence.finished else sequence.next_step().tokens_computed,
                    pruning=pruning,
                )
            )
        return reports

    @torch.inference_mode()
    def forward(self, batch: list[Sequence]) -> PackedStep:
        """The model over every sequence's next step. Writes K/V pages; changes no sequence."""
        device = self.model.device
        plans = [sequence.next_step() for sequence in batch]
        starts = [0 if plan.kind == "full" else seq.canvas.block_start for plan, seq in zip(plans, batch, strict=True)]
        responses = [
            torch.cat((seq.canvas.tokens[start:], seq.suffix_ids)) for seq, start in zip(batch, starts, strict=True)
        ]
        embedded = self.model.embed(torch.cat(responses).to(device)).split([ids.numel() for ids in responses])
        rows: list[Tensor] = []
        positions: list[Tensor] = []
        segments: list[Segment] = []
        end = 0
        for sequence, plan, start, response in zip(batch, plans, starts, embedded, strict=True):
            if plan.kind == "full":
                rows += [sequence.prompt_embeds, response]
                positions += [sequence.prompt_positions, sequence.response_positions()]
            else:
                rows.append(response)
                positions.append(sequence.response_positions(start))
            segments.append(self._segment(sequence, plan, end))
            end = segments[-1].end
        attention = TorchPagedAttention(self.cache, segments, scale=self.model.config.head_dim**-0.5)
        hidden = self.model.language_model(torch.cat(rows), torch.cat(positions), attention)
        return PackedStep(hidden, segments, plans)

    def _segment(self, sequence: Sequence, plan: StepPlan, first_row: int) -> Segment:
        device = self.model.device
        total, size = sequence.total_length, self.cache.block_size
        slots = slots_of(torch.tensor(sequence.block_table, device=device), 0, total, size)
        scores = None
        if sequence.scores_next():
            canvas_rows = sequence.prompt_length + sequence.canvas.masked().nonzero()[:, 0]
            config = self.model.config
            scores = AttentionScores(
                canvas_rows.to(device),
                sequence.visual_rows.to(device),
                config.num_attention_heads,
                config.num_hidden_layers,
            )
        return Segment(
            start=first_row,
            end=first_row + plan.tokens_computed,
            write_slots=slots[total - plan.tokens_computed :],
            read_slots=None if plan.kind == "full" else slots,
            scores=scores,
        )

    def _commit(self, batch: list[Sequence], packed: PackedStep) -> list[Tensor]:
        """Propose for every candidate of the batch at once, commit the best of each sequence; the committed canvas
        rows."""
        # A response step computes nothing before the active block, so it has no proposals there.
        candidates = [
            sequence.canvas.masked_rows(0 if plan.kind == "full" else sequence.canvas.block_start)
            for sequence, plan in zip(batch, packed.plans, strict=True)
        ]
        rows = [
            packed.canvas_start(index, sequence) + masked
            for index, (sequence, masked) in enumerate(zip(batch, candidates, strict=True))
        ]
        hidden = packed.hidden.index_select(0, torch.cat(rows).to(packed.hidden.device))
        logits = suppress(self.model.language_model.logits(hidden, self.special.vocab), self.special.suppressed)
        counts = [masked.numel() for masked in candidates]
        proposals = propose(
            logits, [sequence.denoising.temperature for sequence in batch], [seq.generator for seq in batch], counts
        )
        committed: list[Tensor] = []
        parts = zip(batch, candidates, proposals.tokens.split(counts), proposals.confidence.split(counts), strict=True)
        for sequence, masked, tokens, confidence in parts:
            if sequence.denoising.remasking == "random":
                confidence = random_confidence(confidence.numel(), sequence.generator)
            chosen = select(confidence, sequence.canvas.tokens_to_commit())
            sequence.canvas.commit(masked[chosen], tokens[chosen])
            committed.append(masked[chosen])
        return committed

    def _prune(
        self, sequence: Sequence, scores: AttentionScores | None, still_masked: Tensor, step: int
    ) -> PruningReport:
        """Drop the least looked-at visual tokens, or those a control picks (scores: None)."""
        before = sequence.num_visual
        count = tokens_to_keep(before, sequence.pruning.keep_ratio)
        if scores is not None:
            by_row = scores.by_row() if self._reduce_scores is None else self._reduce_scores(scores.by_row())
            importance = masked_row_importance(by_row, still_masked.to(by_row.device)).cpu()
            kept = most_important(importance, count)
        elif sequence.pruning.preset == "random":
            importance = torch.rand(before, generator=sequence.generator)
            kept = most_important(importance, count)
        else:
            importance = torch.ones(before)
            kept = evenly_spaced(before, count)
        if kept.numel() < before:
            self._drop(sequence, kept)
        return PruningReport(step, None, before, kept.numel(), importance.tolist(), kept.tolist())

    def _drop(self, sequence: Sequence, kept: Tensor) -> None:
        table = torch.tensor(sequence.block_table, device=self.model.device)
        rows, old_positions, new_positions = sequence.drop_visual(kept)
        # Where the next step recomputes everything, the pages are about to be overwritten.
        if not sequence.finished and sequence.next_step().kind == "response":
            plan = plan_compaction(table, rows, old_positions, new_positions, self.cache.block_size)
            compact(self.cache, plan, self.model.language_model.rotary)
        del sequence.block_table[blocks_needed(sequence.total_length, self.cache.block_size) :]
