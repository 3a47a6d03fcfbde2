"""One denoising step for a batch of sequences: pack, forward, propose, commit, prune.

Sequences may be at different steps, full and response steps mixed; they share one packed forward without padding. The
driver (`LocalEngine`, or vLLM's worker through vllm_redvtp) owns admission and block allocation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, count

import torch
from torch import Tensor

from redvtp.attention.batch import Segment
from redvtp.attention.torch_paged import TorchPagedAttention
from redvtp.clock import Clock
from redvtp.denoising.remasking import Choice, keep_best, propose, select, suppress
from redvtp.kv.blocks import blocks_needed, slots_of_all
from redvtp.kv.cache import PagedKVCache
from redvtp.kv.compaction import CompactionPlan, compact, joined, plan_compaction
from redvtp.kv.rewriting import RewritingAttention
from redvtp.models.dvlm import Dvlm
from redvtp.prompt import SpecialTokens
from redvtp.pruning.budget import survivors
from redvtp.pruning.features import feature_importance
from redvtp.pruning.scores import AttentionScores, masked_row_importance
from redvtp.sequence import BEFORE_ALL_STEPS, PruningReport, Sequence, StepPlan, StepReport


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
    def prune_before(self, sequence: Sequence) -> None:
        """Drop what the policy keeps from even the first forward. To be called once, before the sequence's first step;
        from then on it needs blocks for the survivors only."""
        policy = sequence.policy
        if policy is None or policy.before is None or sequence.num_visual == 0:
            return
        if policy.source == "features":
            with self.clock.measure("score"):
                visual = sequence.prompt_embeds.index_select(0, sequence.visual_rows.to(self.model.device))
                importance = self._agree(feature_importance(visual).to(self.model.device)).cpu()
        else:
            importance = torch.tensor(policy.importance)
        before = sequence.num_visual
        kept = survivors(policy, policy.before, importance, sequence.image_of, sequence.images)
        if kept.numel() < before:
            with self.clock.measure("compaction"):
                sequence.drop_visual(kept)
        sequence.unreported = _report(BEFORE_ALL_STEPS, importance, kept)

    @torch.inference_mode()
    def step(self, batch: list[Sequence]) -> list[StepReport]:
        """One denoising step of every sequence. Returns a report for each, in order."""
        plans = [sequence.next_step() for sequence in batch]
        positions = [(sequence.canvas.block, sequence.steps_done) for sequence in batch]
        held = [blocks_needed(sequence.total_length, self.cache.block_size) for sequence in batch]
        self.rewrite_pages(batch)
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
                    resume_tokens=0 if sequence.finished else sequence.resume_tokens(),
                    pruning=prunings.get(id(sequence), sequence.unreported),
                )
            )
            sequence.unreported = None
        return reports

    @torch.inference_mode()
    def rewrite_pages(self, batch: list[Sequence]) -> None:
        """Write again what the next step of suspended sequences reads from pages, as it was."""
        lost = [(sequence, origin) for sequence in batch if (origin := sequence.rewrites) is not None]
        if lost:
            origins = [origin for _, origin in lost]
            ids = torch.cat([origin.canvas_ids for origin in origins]).to(self.model.device)
            responses = self.model.embed(ids).split([origin.canvas_ids.numel() for origin in origins])
            rows = [part for origin, response in zip(origins, responses, strict=True)
                    for part in (origin.prompt_embeds, response)]  # fmt: skip
            ends = list(accumulate(origin.tokens for origin in origins))
            segments = [Segment(start, end, write_slots=None) for start, end in zip([0, *ends], ends, strict=False)]
            attention = RewritingAttention(
                self._attention(segments),
                segments,
                origins,
                self._slots([sequence for sequence, _ in lost], [sequence.next_step().first for sequence, _ in lost]),
                self.cache,
                self.model.language_model.rotary,
            )
            positions = torch.cat([origin.positions for origin in origins])
            self.model.language_model(torch.cat(rows), positions, attention)
        for sequence in batch:
            sequence.pages_lost = False

    @torch.inference_mode()
    def encode_prompts(self, batch: list[Sequence]) -> None:
        """Write the K/V of prompts that never see their canvas (`prefix_lm`, reference: LaViDa).

        With shifted logits the prompt's last token also says what the first canvas token is; it is decided here.
        """
        if not batch:
            return
        lengths = [sequence.prompt_length for sequence in batch]
        ends = list(accumulate(lengths))
        segments = [Segment(*part) for part in zip([0, *ends], ends, self._slots(batch, lengths), strict=False)]
        for sequence in batch:
            sequence.note_origin()
        rows = torch.cat([sequence.prompt_embeds for sequence in batch])
        positions = torch.cat([sequence.prompt_positions for sequence in batch])
        hidden = self.model.language_model(rows, positions, self._attention(segments))
        if self.model.config.family.shifted_logits:
            last = self._logits(hidden[torch.tensor(ends, device=hidden.device) - 1])
            first = self._agree(last[:, : self.special.vocab].argmax(-1))
            for sequence, token in zip(batch, first.tolist(), strict=True):
                sequence.canvas.decide(0, token)

    def _denoise(self, batch: list[Sequence]) -> dict[int, PruningReport]:
        """Forward, commit and prune; the prunings by the `id` of their sequence."""
        if not batch:
            return {}
        packed = self.forward(batch)
        for sequence, plan in zip(batch, packed.plans, strict=True):
            if sequence.denoising.cache == "prefix" and plan.kind == "full":
                sequence.note_origin()
        undecided = [sequence.canvas.masked() for sequence in batch]
        steps = [sequence.steps_done for sequence in batch]
        shares = [sequence.share_next() for sequence in batch]
        still_masked: list[Tensor] = []
        counting: list[Tensor] = []
        for sequence, before, committed in zip(batch, undecided, self._commit(batch, packed), strict=True):
            if self.model.config.family.scores_proposed_masks:
                after = sequence.canvas.masked()
            else:
                # A committed row is decided even if the model proposed the mask id for it.
                after = before.index_fill(0, committed, False)
            still_masked.append(after)
            just_committed = torch.zeros_like(before).index_fill(0, committed, True)
            counting.append(just_committed if sequence.score_rows == "committed" else after)
        # With nothing left to decide there is nothing to prune for.
        going_on = [bool(masked.any()) for masked in still_masked]
        importances = self._importances(packed, batch, counting, going_on)
        prunings: dict[int, PruningReport] = {}
        moves: list[CompactionPlan] = []
        for index, sequence in enumerate(batch):
            importance, share = importances.get(index), shares[index]
            if importance is not None and self.observe is not None:
                self.observe(sequence, steps[index], importance)
            blind = sequence.policy is not None and sequence.policy.source != "attention"
            if share is not None and going_on[index] and (blind or importance is not None):
                prunings[id(sequence)] = self._prune(sequence, share, importance, steps[index], moves)
        if moves:
            with self.clock.measure("compaction"):
                compact(self.cache, joined(moves), self.model.language_model.rotary)
        for sequence in batch:
            # Not a moment longer: it may hold the embeddings of the tokens that were dropped.
            if sequence.finished or sequence.next_step().first == 0:
                sequence.origin = None
        return prunings

    @torch.inference_mode()
    def forward(self, batch: list[Sequence]) -> PackedStep:
        """The model over every sequence's next step. Writes K/V pages; changes no sequence."""
        plans = [sequence.next_step() for sequence in batch]
        canvas_starts = [max(0, plan.first - seq.prompt_length) for plan, seq in zip(plans, batch, strict=True)]
        ids = [ids for seq, start in zip(batch, canvas_starts, strict=True)
               for ids in (seq.canvas.tokens[start:], seq.suffix_ids)]  # fmt: skip
        counts = [first.numel() + second.numel() for first, second in zip(ids[::2], ids[1::2], strict=True)]
        embedded = self.model.embed(torch.cat(ids).to(self.model.device)).split(counts)
        slots = self._slots(batch, [sequence.total_length for sequence in batch])
        ends = [seq.canvas_position + seq.gen_length + seq.suffix_ids.numel() for seq in batch]
        counting = torch.arange(max(ends), device=self.model.device)
        rows: list[Tensor] = []
        positions: list[Tensor] = []
        segments: list[Segment] = []
        row = 0
        parts = zip(batch, plans, canvas_starts, embedded, slots, ends, strict=True)
        for sequence, plan, start, response, own, end in parts:
            rows += [sequence.prompt_embeds[plan.first :], response]
            positions += [sequence.prompt_positions[plan.first :], counting[sequence.canvas_position + start : end]]
            segments.append(self._segment(sequence, plan, row, own))
            row = segments[-1].end
        hidden = self.model.language_model(torch.cat(rows), torch.cat(positions), self._attention(segments))
        return PackedStep(hidden, segments, plans)

    def _attention(self, segments: list[Segment]) -> TorchPagedAttention:
        return TorchPagedAttention(self.cache, segments, scale=self.model.config.head_dim**-0.5)

    def _slots(self, batch: list[Sequence], lengths: list[int]) -> list[Tensor]:
        """For each sequence [length] int64, the cache slots of its first tokens."""
        tables = [sequence.block_table for sequence in batch]
        return slots_of_all(tables, lengths, self.cache.block_size, self.model.device)

    def _segment(self, sequence: Sequence, plan: StepPlan, first_row: int, slots: Tensor) -> Segment:
        device, config = self.model.device, self.model.config
        scores = None
        observed = self.observe is not None and plan.kind == "full" and sequence.num_visual > 0
        if observed or sequence.scores_next():
            policy = sequence.policy
            scores = AttentionScores(
                (sequence.scored_rows(plan.start) - plan.first).to(device),
                sequence.visual_rows.to(device),
                config.num_attention_heads,
                range(*policy.layers) if policy is not None else range(config.num_hidden_layers),
                self.clock,
                averaged=sequence.score_rows not in ("masked", "committed"),
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
        rows = torch.cat([packed.logit_rows(*part) for part in zip(count(), batch, candidates, strict=False)])
        logits = self._logits(packed.hidden.index_select(0, rows.to(packed.hidden.device)))
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

    def _importances(
        self, packed: PackedStep, batch: list[Sequence], counting: list[Tensor], going_on: list[bool]
    ) -> dict[int, Tensor]:
        """[visual] float32 on the CPU, for each sequence that was scored, goes on and has a row that counts.

        counting: for each sequence [gen_length] bool, the canvas rows whose attention counts.
        """
        found = {
            index: segment.scores
            for index, (segment, plan) in enumerate(zip(packed.segments, packed.plans, strict=True))
            if segment.scores is not None
            and going_on[index]
            and (segment.scores.averaged or bool(counting[index][plan.start :].any()))
        }
        if not found:
            return {}
        with self.clock.measure("score"):
            scored = self._summed_over_ranks({index: scores.by_row() for index, scores in found.items()})
            means = []
            for index, rows in scored.items():
                if found[index].averaged:
                    means.append(rows[0])
                    continue
                canvas_rows = found[index].rows + (packed.plans[index].first - batch[index].prompt_length)
                means.append(masked_row_importance(rows, counting[index].to(rows.device)[canvas_rows]))
            agreed = self._agree(torch.cat(means)).cpu()
            return dict(zip(scored, agreed.split([part.numel() for part in means]), strict=True))

    def _summed_over_ranks(self, scored: dict[int, Tensor]) -> dict[int, Tensor]:
        if self._reduce_scores is None:
            return scored
        # Once for all of them.
        summed = self._reduce_scores(torch.cat([rows.flatten() for rows in scored.values()]))
        parts = summed.split([rows.numel() for rows in scored.values()])
        return {i: part.view_as(rows) for (i, rows), part in zip(scored.items(), parts, strict=True)}

    def _prune(
        self, sequence: Sequence, share: float, importance: Tensor | None, step: int, moves: list[CompactionPlan]
    ) -> PruningReport:
        """Drop the least important visual tokens, or those a control picks. `moves` gets what the pages need."""
        policy, before = sequence.policy, sequence.num_visual
        assert policy is not None
        if policy.source == "random":
            importance = torch.rand(before, generator=sequence.generator)
        elif policy.source == "uniform":
            importance = torch.ones(before)
        assert importance is not None
        kept = survivors(policy, share, importance, sequence.image_of, sequence.images)
        if kept.numel() < before:
            with self.clock.measure("compaction"):
                self._drop(sequence, kept, moves)
        return _report(step, importance, kept)

    def _drop(self, sequence: Sequence, kept: Tensor, moves: list[CompactionPlan]) -> None:
        table = torch.tensor(sequence.block_table, device=self.model.device)
        rows, old_positions, new_positions = sequence.drop_visual(kept)
        # What the next step computes again is about to be overwritten.
        kept_rows = 0 if sequence.finished else sequence.next_step().first
        if kept_rows:
            rows, old_positions, new_positions = (part[:kept_rows] for part in (rows, old_positions, new_positions))
            moves.append(plan_compaction(table, rows, old_positions, new_positions, self.cache.block_size))
            assert sequence.origin is not None, "pages that are kept came from somewhere"
            sequence.origin.moves.append((rows, new_positions - old_positions))
        del sequence.block_table[blocks_needed(sequence.total_length, self.cache.block_size) :]


def _report(step: int, importance: Tensor, kept: Tensor) -> PruningReport:
    return PruningReport(step, None, importance.numel(), kept.numel(), importance.tolist(), kept.tolist())
