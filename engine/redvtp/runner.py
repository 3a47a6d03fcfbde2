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
from redvtp.clock import Clock
from redvtp.denoising.remasking import Choice, keep_best, propose, select, suppress
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

    def logit_rows(self, index: int, sequence: Sequence, canvas_rows: Tensor) -> Tensor:
        """Packed rows whose logits are about canvas_rows [rows] of sequence `index`; they lie at or after its plan's
        `start`."""
        segment = self.segments[index]
        rows = segment.end - sequence.suffix_ids.numel() - sequence.gen_length + canvas_rows
        # The very first row of a canvas that is computed without the prompt has nobody before it but itself.
        return (rows - int(sequence.shifted_logits)).clamp(min=segment.start)


class DenoisingRunner:
    """Steps batches of sequences over one model and one paged cache.

    reduce_scores: sums attention scores over tensor-parallel ranks, each of which has its own heads.
    agree: gives every rank the first one's numbers, of all those that decide something. Ranks compute them alike, but
    not always to the last bit, and caches that are cut differently would never meet again.
    observe: if set, every full step is scored, whether or not it prunes, and told: the sequence, the number of the step
    and the importance of its visual tokens, [visual] float32. A step that leaves nothing undecided has none.
    """

    def __init__(
        self,
        model: Dvlm,
        cache: PagedKVCache,
        special: SpecialTokens,
        reduce_scores: Callable[[Tensor], Tensor] | None = None,
        agree: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.special = special
        self._reduce_scores = reduce_scores
        self._agree = agree or (lambda numbers: numbers)
        self.clock = Clock(model.device)
        self.observe: Callable[[Sequence, int, Tensor], None] | None = None

    @torch.inference_mode()
    def step(self, batch: list[Sequence]) -> list[StepReport]:
        """One denoising step of every sequence. Returns a report for each, in order."""
        plans = [sequence.next_step() for sequence in batch]
        positions = [(sequence.canvas.block, sequence.steps_done) for sequence in batch]
        held = [blocks_needed(sequence.total_length, self.cache.block_size) for sequence in batch]
        self.encode_prompts([sequence for sequence in batch if sequence.encodes_prompt_next()])
        # An end token right behind the prompt leaves nothing to denoise.
        prunings = self._denoise([sequence for sequence in batch if not sequence.finished])
        self.clock.settle()
        reports = []
        for sequence, plan, (block, step), before in zip(batch, plans, positions, held, strict=True):
            blocks = blocks_needed(sequence.total_length, self.cache.block_size)
            reports.append(
                StepReport(
                    request_id=sequence.request_id,
                    step=step,
                    canvas_block=block,
                    kind=plan.kind,
                    tokens_computed=plan.tokens_computed,
                    kv_tokens=sequence.total_length,
                    kv_blocks=blocks,
                    blocks_freed=before - blocks,
                    new_tokens=sequence.canvas.resolved_growth(),
                    canvas=sequence.canvas.tokens.tolist(),
                    answer_length=sequence.canvas.answer_length,
                    prompt_length=sequence.prompt_length,
                    finished=sequence.finished,
                    finish_reason=sequence.finish_reason,
                    next_tokens=0 if sequence.finished else sequence.next_step().tokens_computed,
                    pruning=prunings.get(id(sequence)),
                )
            )
        return reports

    @torch.inference_mode()
    def encode_prompts(self, batch: list[Sequence]) -> None:
        """Write the K/V of prompts that never see their canvas (`prefix_lm`, reference: LaViDa).

        With shifted logits the prompt's last token also says what the first canvas token is; it is decided here.
        """
        if not batch:
            return
        segments: list[Segment] = []
        end = 0
        for sequence in batch:
            start, end = end, end + sequence.prompt_length
            segments.append(Segment(start, end, self._slots(sequence)[: sequence.prompt_length]))
        rows = torch.cat([sequence.prompt_embeds for sequence in batch])
        positions = torch.cat([sequence.prompt_positions for sequence in batch])
        hidden = self.model.language_model(rows, positions, self._attention(segments))
        for sequence, segment in zip(batch, segments, strict=True):
            if sequence.shifted_logits:
                logits = self._logits(hidden[segment.end - 1 : segment.end])
                sequence.canvas.decide(0, int(self._agree(logits[0, : self.special.vocab].argmax())))

    def _denoise(self, batch: list[Sequence]) -> dict[int, PruningReport]:
        """Forward, commit and prune; the prunings by the `id` of their sequence."""
        if not batch:
            return {}
        packed = self.forward(batch)
        undecided = [sequence.canvas.masked() for sequence in batch]
        steps = [sequence.steps_done for sequence in batch]
        pruning_due = [sequence.prunes_next() for sequence in batch]
        prunings: dict[int, PruningReport] = {}
        for index, (sequence, committed) in enumerate(zip(batch, self._commit(batch, packed), strict=True)):
            if self.model.config.family.scores_proposed_masks:
                still_masked = sequence.canvas.masked()
            else:
                # A committed row is decided even if the model proposed the mask id for it.
                still_masked = undecided[index].index_fill(0, committed, False)
            still_masked = still_masked[undecided[index]]
            # With nothing left to decide there is nothing to prune for.
            if bool(still_masked.any()):
                importance = self._importance(packed.segments[index].scores, still_masked)
                if importance is not None and self.observe is not None:
                    self.observe(sequence, steps[index], importance)
                if pruning_due[index]:
                    prunings[id(sequence)] = self._prune(sequence, importance, steps[index])
        return prunings

    @torch.inference_mode()
    def forward(self, batch: list[Sequence]) -> PackedStep:
        """The model over every sequence's next step. Writes K/V pages; changes no sequence."""
        plans = [sequence.next_step() for sequence in batch]
        canvas_starts = [max(0, plan.first - seq.prompt_length) for plan, seq in zip(plans, batch, strict=True)]
        responses = [
            torch.cat((seq.canvas.tokens[start:], seq.suffix_ids))
            for seq, start in zip(batch, canvas_starts, strict=True)
        ]
        embedded = self.model.embed(torch.cat(responses).to(self.model.device)).split([r.numel() for r in responses])
        rows: list[Tensor] = []
        positions: list[Tensor] = []
        segments: list[Segment] = []
        end = 0
        for sequence, plan, start, response in zip(batch, plans, canvas_starts, embedded, strict=True):
            rows += [sequence.prompt_embeds[plan.first :], response]
            positions += [sequence.prompt_positions[plan.first :], sequence.response_positions(start)]
            segments.append(self._segment(sequence, plan, end))
            end = segments[-1].end
        hidden = self.model.language_model(torch.cat(rows), torch.cat(positions), self._attention(segments))
        return PackedStep(hidden, segments, plans)

    def _attention(self, segments: list[Segment]) -> TorchPagedAttention:
        return TorchPagedAttention(self.cache, segments, scale=self.model.config.head_dim**-0.5)

    def _slots(self, sequence: Sequence) -> Tensor:
        """[total_length] int64, the cache slots of all its tokens."""
        table = torch.tensor(sequence.block_table, device=self.model.device)
        return slots_of(table, 0, sequence.total_length, self.cache.block_size)

    def _segment(self, sequence: Sequence, plan: StepPlan, first_row: int) -> Segment:
        device, config = self.model.device, self.model.config
        slots = self._slots(sequence)
        scores = None
        observed = self.observe is not None and plan.kind == "full" and sequence.num_visual > 0
        if observed or sequence.scores_next():
            canvas_rows = sequence.prompt_length + sequence.canvas.masked().nonzero()[:, 0]
            scores = AttentionScores(
                (canvas_rows - plan.first).to(device),
                sequence.visual_rows.to(device),
                config.num_attention_heads,
                config.num_hidden_layers,
                self.clock,
            )
        return Segment(
            start=first_row,
            end=first_row + slots.numel() - plan.first,
            write_slots=slots[plan.first :],
            read_slots=slots if plan.first else None,
            scores=scores,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden rows [rows, hidden], ids that have no chance at -inf."""
        config = self.model.config
        vocab = config.vocab_size if config.family.counts_surplus_rows else self.special.vocab
        logits = suppress(self.model.language_model.logits(hidden, vocab), self.special.suppressed)
        return keep_best(logits, config.family.top_k)

    def _commit(self, batch: list[Sequence], packed: PackedStep) -> list[Tensor]:
        """Propose for every candidate of the batch at once, commit the best of each sequence; the committed canvas
        rows."""
        candidates = [
            sequence.canvas.masked_rows(plan.start) for sequence, plan in zip(batch, packed.plans, strict=True)
        ]
        rows = [
            packed.logit_rows(index, sequence, masked)
            for index, (sequence, masked) in enumerate(zip(batch, candidates, strict=True))
        ]
        logits = self._logits(packed.hidden.index_select(0, torch.cat(rows).to(packed.hidden.device)))
        counts = [masked.numel() for masked in candidates]
        choices = [Choice(seq.denoising.temperature, seq.denoising.remasking, seq.generator) for seq in batch]
        proposals = propose(logits, self.special.vocab, choices, counts)
        committed: list[Tensor] = []
        decided = [self._agree(part).split(counts) for part in (proposals.tokens, proposals.confidence)]
        for sequence, masked, tokens, confidence in zip(batch, candidates, *decided, strict=True):
            chosen = select(confidence, sequence.canvas.tokens_to_commit())
            sequence.canvas.commit(masked[chosen], tokens[chosen])
            committed.append(masked[chosen])
        return committed

    def _importance(self, scores: AttentionScores | None, still_masked: Tensor) -> Tensor | None:
        """[visual] float32, of a step that was scored."""
        if scores is None:
            return None
        with self.clock.measure("score"):
            by_row = scores.by_row() if self._reduce_scores is None else self._reduce_scores(scores.by_row())
            return self._agree(masked_row_importance(by_row, still_masked.to(by_row.device))).cpu()

    def _prune(self, sequence: Sequence, importance: Tensor | None, step: int) -> PruningReport:
        """Drop the least important visual tokens, or those a control picks."""
        before = sequence.num_visual
        count = tokens_to_keep(before, sequence.pruning.keep_ratio)
        if sequence.pruning.preset == "random":
            importance = torch.rand(before, generator=sequence.generator)
            kept = most_important(importance, count)
        elif sequence.pruning.preset == "uniform":
            importance = torch.ones(before)
            kept = evenly_spaced(before, count)
        else:
            assert importance is not None
            kept = most_important(importance, count)
        if kept.numel() < before:
            with self.clock.measure("compaction"):
                self._drop(sequence, kept)
        return PruningReport(step, None, before, kept.numel(), importance.tolist(), kept.tolist())

    def _drop(self, sequence: Sequence, kept: Tensor) -> None:
        table = torch.tensor(sequence.block_table, device=self.model.device)
        rows, old_positions, new_positions = sequence.drop_visual(kept)
        # What the next step computes again is about to be overwritten.
        kept_rows = 0 if sequence.finished else sequence.next_step().first
        if kept_rows:
            rows, old_positions, new_positions = (part[:kept_rows] for part in (rows, old_positions, new_positions))
            plan = plan_compaction(table, rows, old_positions, new_positions, self.cache.block_size)
            compact(self.cache, plan, self.model.language_model.rotary)
        del sequence.block_table[blocks_needed(sequence.total_length, self.cache.block_size) :]
