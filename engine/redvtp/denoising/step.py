"""One denoising step for a batch of sequences: pack, forward, propose, commit, prune.

Sequences may be at different steps, full and response steps mixed; they share one packed forward without padding. The
driver (`LocalEngine`, or vLLM's worker through vllm_redvtp) owns admission and block allocation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count

import torch
from torch import Tensor

from redvtp.attention.interface import Attention, MakeAttention, Segment
from redvtp.attention.scores import AttentionScores
from redvtp.attention.torch_paged import TorchPagedAttention
from redvtp.canvas.proposals import Choice, keep_best, propose, suppress
from redvtp.clock import Clock
from redvtp.denoising.forward import Passed, Rest, Shorten, run_in_stages
from redvtp.denoising.layer_exit import StepCuts, rest_of_origin, rest_of_withdrawal
from redvtp.denoising.page_history import OriginCut, RewritingAttention
from redvtp.denoising.pruner import Moves, Pruner
from redvtp.denoising.ranks import ALONE, Ranks
from redvtp.denoising.sequence import Sequence, StepPlan
from redvtp.kv.blocks import blocks_needed, slots_of_all
from redvtp.kv.compaction import compact_each
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.prompt import SpecialTokens
from redvtp.reports import PruningReport, StepReport


@dataclass(frozen=True, slots=True)
class PackedStep:
    """The forward of one step.

    hidden: [tokens, hidden] of all sequences, before the final norm. segments: whose rows are whose. plans: what was
    computed. cuts: what left half way.
    """

    hidden: Tensor
    segments: list[Segment]
    plans: list[StepPlan]
    cuts: StepCuts

    def logit_rows(self, index: int, sequence: Sequence, canvas_rows: Tensor) -> Tensor:
        """Packed rows whose logits are about canvas_rows [rows] of sequence `index`; they lie at or after its plan's
        `start`."""
        segment = self.segments[index]
        # Counted from the end: rows of the prompt may have left on the way.
        rows = segment.end - (self.plans[index].end - sequence.prompt_length) + canvas_rows
        # The very first row of a canvas that is computed without the prompt has nobody before it but itself.
        return (rows - int(sequence.shifted_logits)).clamp(min=segment.start)


class DenoisingRunner:
    """Steps batches of sequences over one model and one paged cache.

    ranks: the collectives of tensor-parallel ranks; nothing to do on one.
    attention: the backend over `cache`; torch's when None.
    observe: if set, every full step is scored, whether or not it prunes, and told: the sequence, the number of the step
    and the importance of its visual tokens, [visual] float32. A step that leaves nothing undecided has none.
    """

    def __init__(
        self,
        model: Dvlm,
        cache: KVPages,
        special: SpecialTokens,
        ranks: Ranks = ALONE,
        attention: MakeAttention | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.special = special
        self._broadcast_from_rank0 = ranks.broadcast_from_rank0
        self._make_attention = attention or partial(TorchPagedAttention, cache)
        self.clock = Clock(model.device)
        self._pruner = Pruner(cache, model.device, self.clock, ranks)
        self.observe: Callable[[Sequence, int, Tensor], None] | None = None
        # By the `id` of a sequence, its rows in this step summed over the layers they went through.
        self._row_layers: Counter[int] = Counter()

    @torch.inference_mode()
    def prune_before(self, sequence: Sequence) -> None:
        """Drop what the policy keeps from even the first forward. To be called once, before the sequence's first step;
        from then on it needs blocks for the survivors only."""
        self._pruner.prune_before(sequence)

    @torch.inference_mode()
    def step(self, batch: list[Sequence]) -> list[StepReport]:
        """One denoising step of every sequence. Returns a report for each, in order."""
        plans = [sequence.next_step() for sequence in batch]
        positions = [(seq.canvas.block, seq.steps_done, seq.canvas_rows(plan))
                     for seq, plan in zip(batch, plans, strict=True)]  # fmt: skip
        held = [blocks_needed(sequence.total_length, self.cache.block_size) for sequence in batch]
        self._row_layers.clear()
        self.rewrite_pages(batch)
        self.encode_prompts([sequence for sequence in batch if sequence.encodes_prompt_next()])
        # An end token right behind the prompt leaves nothing to denoise.
        prunings = self._denoise([sequence for sequence in batch if not sequence.finished])
        self.clock.settle()
        reports = []
        for sequence, plan, (block, step, canvas_rows), before in zip(batch, plans, positions, held, strict=True):
            blocks = blocks_needed(sequence.total_length, self.cache.block_size)
            reports.append(
                StepReport(
                    request_id=sequence.request_id,
                    step=step,
                    canvas_block=block,
                    kind=plan.kind,
                    tokens_computed=-(-self._row_layers[id(sequence)] // self.model.config.num_hidden_layers),
                    canvas_computed=canvas_rows,
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
            sequences = [sequence for sequence, _ in lost]
            slots = self._slots(sequences, [sequence.pages_of_origin() for sequence in sequences])

            def attention(stage: list[Segment]) -> Attention:
                rotary = self.model.language_model.rotary
                return RewritingAttention(self._attention(stage), stage, origins, slots, self.cache, rotary)

            self._run(
                sequences,
                torch.cat(rows),
                torch.cat([origin.positions for origin in origins]),
                segments,
                attention,
                {index: origin.cut.layer for index, origin in enumerate(origins) if origin.cut is not None},
                lambda indices, _: [rest_of_origin(origins[index]) for index in indices],
            )
            self._rewrite_canvases([sequence for sequence in sequences if sequence.canvas_origin is not None])
        for sequence in batch:
            sequence.pages_lost = False

    def _rewrite_canvases(self, batch: list[Sequence]) -> None:
        """Take the response steps again that wrote the canvas since; the prompts' pages are there."""
        origins = [sequence.canvas_origin for sequence in batch if sequence.canvas_origin is not None]
        if not origins:
            return
        ids = torch.cat([origin.canvas_ids for origin in origins]).to(self.model.device)
        responses = self.model.embed(ids).split([origin.canvas_ids.numel() for origin in origins])
        rows = [part for origin, response in zip(origins, responses, strict=True)
                for part in (origin.prompt_embeds, response)]  # fmt: skip
        ends = list(accumulate(origin.tokens for origin in origins))
        slots = self._slots(batch, [sequence.total_length for sequence in batch])
        segments = [
            Segment(start, end, write_slots=own[origin.first :], read_slots=own)
            for start, end, own, origin in zip([0, *ends], ends, slots, origins, strict=False)
        ]
        positions = torch.cat([origin.positions for origin in origins])
        # Whoever drops or withdraws visual tokens half way has no canvas of another step's.
        self._run(batch, torch.cat(rows), positions, segments, self._attention, {}, lambda *_: [])

    @torch.inference_mode()
    def encode_prompts(self, batch: list[Sequence]) -> None:
        """Write the K/V of prompts that never see their canvas (`prefix_lm`, reference: LaViDa).

        With shifted logits the prompt's last token also says what the first canvas token is; it is decided here.
        """
        if not batch:
            return
        lengths = [sequence.prompt_length for sequence in batch]
        ends = list(accumulate(lengths))
        slots = self._slots(batch, lengths)
        segments = [Segment(*part) for part in zip([0, *ends], ends, slots, strict=False)]
        cuts: dict[int, int] = {}
        rests: dict[int, Rest] = {}
        for index, sequence in enumerate(batch):
            if (layer := sequence.withdraws_behind) is None:
                sequence.note_origin()
            else:
                cuts[index], rests[index] = layer, rest_of_withdrawal(sequence, 0, slots[index].numel(), slots[index])
                sequence.note_origin(OriginCut(layer, rests[index].rows, rests[index].positions, in_place=True))
        rows = torch.cat([sequence.prompt_embeds for sequence in batch])
        positions = torch.cat([sequence.prompt_positions for sequence in batch])
        passed = self._run(
            batch, rows, positions, segments, self._attention, cuts, lambda indices, _: [rests[i] for i in indices]
        )
        if self.model.config.family.shifted_logits:
            ends = [segment.end for segment in passed.segments]
            last = self._logits(passed.hidden[torch.tensor(ends, device=self.model.device) - 1])
            first = self._broadcast_from_rank0(last[:, : self.special.vocab].argmax(-1))
            for sequence, token in zip(batch, first.tolist(), strict=True):
                sequence.canvas.decide(0, token)

    def _denoise(self, batch: list[Sequence]) -> dict[int, PruningReport]:
        """Forward, commit and prune; the prunings by the `id` of their sequence."""
        if not batch:
            return {}
        packed = self.forward(batch)
        for index, (sequence, plan) in enumerate(zip(batch, packed.plans, strict=True)):
            sequence.note_pages(plan, packed.cuts.of_origin(index))
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
        moves: Moves = []
        for index, sequence in enumerate(batch):
            inside = packed.cuts.dropped.get(index)
            importance, share = importances.get(index) if inside is None else inside.importance, shares[index]
            if importance is not None and self.observe is not None:
                self.observe(sequence, steps[index], importance)
            blind = sequence.policy is not None and sequence.policy.source != "attention"
            if inside is not None:
                layer, first = packed.cuts.layers[index], packed.plans[index].first
                prunings[id(sequence)] = self._pruner.settle(
                    sequence, layer, first, inside.importance, inside.kept, steps[index], moves
                )
            elif share is not None and going_on[index] and (blind or importance is not None):
                prunings[id(sequence)] = self._pruner.prune(sequence, share, importance, steps[index], moves)
        if moves:
            with self.clock.measure("compaction"):
                compact_each(self.cache, moves, self.model.language_model.rotary)
        for sequence in batch:
            sequence.note_decided()
            sequence.forget_origins()
        return prunings

    @torch.inference_mode()
    def forward(self, batch: list[Sequence]) -> PackedStep:
        """The model over every sequence's next step. Writes and moves K/V pages; changes no sequence."""
        plans = [sequence.next_step() for sequence in batch]
        bounds = [(max(0, plan.first - seq.prompt_length), plan.end - seq.prompt_length)
                  for plan, seq in zip(plans, batch, strict=True)]  # fmt: skip
        ids = [torch.cat((seq.canvas.tokens, seq.suffix_ids))[start:end]
               for seq, (start, end) in zip(batch, bounds, strict=True)]  # fmt: skip
        embedded = self.model.embed(torch.cat(ids).to(self.model.device)).split([part.numel() for part in ids])
        slots = self._slots(batch, [sequence.total_length for sequence in batch])
        last = max(seq.canvas_position + end for seq, (_, end) in zip(batch, bounds, strict=True))
        counting = torch.arange(last, device=self.model.device)
        rows: list[Tensor] = []
        positions: list[Tensor] = []
        segments: list[Segment] = []
        row = 0
        for sequence, plan, (start, end), response, own in zip(batch, plans, bounds, embedded, slots, strict=True):
            rows += [sequence.prompt_embeds[plan.first :], response]
            positions.append(sequence.prompt_positions[plan.first :])
            positions.append(counting[sequence.canvas_position + start : sequence.canvas_position + end])
            segments.append(self._segment(sequence, plan, row, own))
            row = segments[-1].end
        rotary = self.model.language_model.rotary
        cuts = StepCuts(batch, plans, slots, self.cache, rotary, self.clock, self._pruner)
        passed = self._run(
            batch, torch.cat(rows), torch.cat(positions), segments, self._attention, cuts.layers, cuts.shorten
        )
        return PackedStep(passed.hidden, passed.segments, plans, cuts)

    def _run(
        self,
        batch: list[Sequence],
        rows: Tensor,
        positions: Tensor,
        segments: list[Segment],
        attention: Callable[[list[Segment]], Attention],
        cuts: Mapping[int, int],
        shorten: Shorten,
    ) -> Passed:
        """See `run_in_stages`; counts what it takes."""
        passed = run_in_stages(self.model.language_model, rows, positions, segments, attention, cuts, shorten)
        for sequence, row_layers in zip(batch, passed.row_layers, strict=True):
            self._row_layers[id(sequence)] += row_layers
        return passed

    def _attention(self, segments: list[Segment]) -> Attention:
        return self._make_attention(segments, self.model.config.head_dim**-0.5)

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
            layers = range(config.num_hidden_layers) if policy is None else range(*policy.layers)
            if sequence.withdraws_behind is not None:
                # Further down nobody looks at them.
                layers = layers[: sequence.withdraws_behind + 1]
            scores = AttentionScores(
                (sequence.scored_rows(plan.start) - plan.first).to(device),
                sequence.visual_rows.to(device),
                config.num_attention_heads,
                layers,
                self.clock,
                averaged=sequence.score_rows not in ("masked", "committed"),
            )
        return Segment(
            start=first_row,
            end=first_row + plan.end - plan.first,
            write_slots=slots[plan.first : plan.end],
            read_slots=None if (plan.first, plan.end) == (0, slots.numel()) else slots,
            scores=scores,
        )

    def _logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden rows [rows, hidden], ids that have no chance at -inf."""
        config = self.model.config
        vocab = config.vocab_size if config.family.counts_surplus_rows else self.special.vocab
        logits = suppress(self.model.language_model.logits(hidden, vocab), self.special.suppressed)
        return keep_best(logits, config.family.top_k)

    def _commit(self, batch: list[Sequence], packed: PackedStep) -> list[Tensor]:
        """Propose for every candidate of the batch at once, commit what each sequence chooses; the committed canvas
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
        decided = [self._broadcast_from_rank0(part).split(counts) for part in (proposals.tokens, proposals.confidence)]
        of_each = zip(batch, packed.plans, candidates, *decided, strict=True)
        for sequence, plan, masked, tokens, confidence in of_each:
            chosen = sequence.canvas.choose(tokens, confidence, plan.start)
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
            and index not in packed.cuts.dropped
            and (segment.scores.averaged or bool(counting[index][plan.start :].any()))
        }
        rows = {}
        for index, scores in found.items():
            if not scores.averaged:
                canvas_rows = scores.rows.cpu() + (packed.plans[index].first - batch[index].prompt_length)
                rows[index] = counting[index][canvas_rows]
        return self._pruner.importances(found, rows)
