"""One denoising step for a batch of sequences: begin, restore, encode, forward, note, commit, prune, finish, report.

Sequences may be at different steps, full and response steps mixed; they share one packed forward without padding. The
driver (`LocalEngine`, or vLLM's worker through vllm_redvtp) decides which sequences step and which blocks they have.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from redvtp.attention.interface import AttentionBackend
from redvtp.attention.scores import AttentionScores
from redvtp.attention.torch_paged import TorchAttention
from redvtp.clock import Clock
from redvtp.denoising.commit import commit
from redvtp.denoising.context import Context, SequenceStep
from redvtp.denoising.forward import ForwardOutput, run_forward
from redvtp.denoising.layer_exit import LayerExits
from redvtp.denoising.packing import Part, pack
from redvtp.denoising.planner import (
    advanced_progress,
    canvas_positions,
    is_whole_response,
    plan_step,
    score_rows,
    scored_rows,
    withdraw_layer,
)
from redvtp.denoising.prompts import encode_prompts
from redvtp.denoising.pruner import Moves, Pruner
from redvtp.denoising.ranks import ALONE, Ranks
from redvtp.denoising.restore import note_pages, restore_pages
from redvtp.denoising.sequence import Sequence
from redvtp.device import current, to_device
from redvtp.kv.blocks import blocks_needed
from redvtp.kv.compaction import compact_each
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.prompt import SpecialTokens
from redvtp.reports import StepReport

# The sequence, the number of the step, and [visual] float32, the importance of its visual tokens.
Observer = Callable[[Sequence, int, Tensor], None]


class DenoisingRunner:
    """Steps batches of sequences over one model and one paged cache.

    ranks: the collectives of tensor-parallel ranks; ALONE on one.
    attention: the backend over `pages`; torch's when None.

    `observe`, an attribute: if set, every full step is scored, whether or not it prunes, and the observer gets the
    importance. It is not called for a step that leaves nothing undecided.
    """

    def __init__(
        self,
        model: Dvlm,
        pages: KVPages,
        special: SpecialTokens,
        ranks: Ranks = ALONE,
        attention: AttentionBackend | None = None,
    ) -> None:
        backend = attention or TorchAttention(pages, model.config.head_dim**-0.5)
        self.context = Context(model, pages, special, backend, ranks, Clock(model.device))
        self.observe: Observer | None = None
        self._pruner = Pruner(pages, model.device, self.context.clock, ranks)

    @property
    def clock(self) -> Clock:
        return self.context.clock

    @torch.inference_mode()
    def prune_before(self, sequence: Sequence) -> None:
        """Drop the visual tokens that the policy removes before the first forward.

        To be called once, before the sequence's first step; from then on it needs blocks for the survivors only.
        """
        self._pruner.prune_before(sequence)

    @torch.inference_mode()
    def step(self, batch: list[Sequence]) -> list[StepReport]:
        """One denoising step of every sequence. Returns a report for each, in order."""
        with current(self.context.device):
            return self._step(batch)

    def _step(self, batch: list[Sequence]) -> list[StepReport]:
        steps = self.begin(batch)
        restore_pages(self.context, steps)
        encode_prompts(self.context, steps)
        # An end token right behind the prompt leaves nothing to denoise.
        unfinished = [step for step in steps if not step.sequence.finished]
        if unfinished:
            output = self.forward(unfinished)
            for step in unfinished:
                note_pages(step)
            commit(self.context, unfinished, output)
            self._prune(unfinished)
        for step in steps:
            _finish(step)
        self.clock.collect(wait=False)
        return [self._report(step) for step in steps]

    def begin(self, batch: list[Sequence]) -> list[SequenceStep]:
        """The record of each sequence's next step, planned."""
        steps = []
        for sequence in batch:
            plan = sequence.next_plan or plan_step(sequence)
            blocks = blocks_needed(sequence.total_length, self.context.pages.block_size)
            positions, block = canvas_positions(sequence, plan), sequence.canvas.block
            steps.append(SequenceStep(sequence, plan, sequence.steps_done, block, positions, blocks))
        return steps

    @torch.inference_mode()
    def forward(self, steps: list[SequenceStep]) -> ForwardOutput:
        """The model over every sequence's next step. Writes and moves K/V pages; changes no sequence."""
        for step in steps:
            self._score(step)
        packed = pack([_part(step) for step in steps], self.context.model, self.context.pages.block_size)
        exits = LayerExits(self.context, self._pruner, steps, packed.slots)
        language_model = self.context.model.language_model
        output = run_forward(language_model, packed, self.context.attend, exits.layers, exits.leave)
        for step, row_layers in zip(steps, output.row_layers, strict=True):
            step.row_layers += row_layers
        return output

    def _score(self, step: SequenceStep) -> None:
        """Prepare the sums of the attention of a step's rows, where it is measured."""
        sequence, plan = step.sequence, step.plan
        observed = self.observe is not None and plan.kind == "full" and sequence.prompt.num_visual > 0
        if not (observed or plan.measures_attention):
            return
        device, config, policy = self.context.device, self.context.model.config, sequence.policy
        layers = range(config.num_hidden_layers) if policy is None else range(*policy.layers)
        hidden_behind = withdraw_layer(sequence)
        if hidden_behind is not None:
            # Deeper layers have no visual rows to score.
            layers = layers[: hidden_behind + 1]
        step.scored_rows = scored_rows(sequence, plan.first_candidate)
        step.scores = AttentionScores(
            to_device(step.scored_rows - plan.first_row, device),
            to_device(sequence.prompt.visual_rows, device),
            config.num_attention_heads,
            layers,
            self.clock,
            averaged=score_rows(sequence) not in ("masked", "committed"),
        )

    def _prune(self, steps: list[SequenceStep]) -> None:
        """Drop what each sequence's policy says, and move the pages of those that need them."""
        importances = self._importances(steps)
        moves: Moves = []
        for index, step in enumerate(steps):
            sequence, plan = step.sequence, step.plan
            sequence.pruning = advanced_progress(sequence)
            dropped = step.dropped_inside
            importance = importances.get(index) if dropped is None else dropped.importance
            if importance is not None and self.observe is not None:
                self.observe(sequence, step.number, importance)
            if dropped is not None and plan.exit_layer is not None:
                step.pruning = self._pruner.prune_like_exit(
                    sequence, plan.exit_layer, plan.first_row, dropped.importance, dropped.kept, step.number, moves
                )
            elif plan.share is not None and step.undecided and (not plan.measures_attention or importance is not None):
                # Not where nothing is undecided any more, nor where no measured attention counts.
                step.pruning = self._pruner.prune(sequence, plan.share, importance, step.number, moves)
        if moves:
            with self.clock.measure("compaction"):
                compact_each(self.context.pages, moves, self.context.model.language_model.rotary)

    def _importances(self, steps: list[SequenceStep]) -> dict[int, Tensor]:
        """[visual] float32 on the CPU, for each sequence that was scored, goes on and has a row that counts."""
        found: dict[int, AttentionScores] = {}
        counting: dict[int, Tensor] = {}
        for index, step in enumerate(steps):
            scores, plan = step.scores, step.plan
            if scores is None or not step.undecided or step.dropped_inside is not None:
                continue
            if not scores.averaged:
                assert step.counting is not None
                assert step.scored_rows is not None
                if not bool(step.counting[plan.first_candidate :].any()):
                    continue
                counting[index] = step.counting[step.scored_rows - step.sequence.prompt.length]
            found[index] = scores
        return self._pruner.importances(found, counting)

    def _report(self, step: SequenceStep) -> StepReport:
        sequence, canvas, following = step.sequence, step.sequence.canvas, step.sequence.next_plan
        blocks = blocks_needed(sequence.total_length, self.context.pages.block_size)
        report = StepReport(
            request_id=sequence.request_id,
            step=step.number,
            canvas_block=step.canvas_block,
            kind=step.plan.kind,
            tokens_computed=-(-step.row_layers // self.context.model.config.num_hidden_layers),
            canvas_computed=step.canvas_positions,
            kv_tokens=sequence.total_length,
            kv_blocks=blocks,
            blocks_freed=step.blocks_before - blocks,
            new_tokens=canvas.resolved_growth(),
            canvas=canvas.tokens.tolist() if sequence.report_canvas else [],
            answer_length=canvas.answer_length,
            prompt_length=sequence.prompt.length,
            finished=sequence.finished,
            finish_reason=sequence.finish_reason,
            next_tokens=0 if following is None else following.tokens_computed,
            resume_tokens=0 if following is None else following.tokens_computed + sequence.pages.tokens,
            pruning=step.pruning or sequence.unreported,
        )
        sequence.unreported = None
        return report


def _part(step: SequenceStep) -> Part:
    """What a step computes, as packing takes it."""
    sequence, plan, prompt = step.sequence, step.plan, step.sequence.prompt
    first, end = max(0, plan.first_row - prompt.length), plan.end_row - prompt.length
    computes_prompt = plan.first_row < prompt.length
    return Part(
        prompt.embeds[plan.first_row :] if computes_prompt else None,
        prompt.positions[plan.first_row :] if computes_prompt else None,
        sequence.response_ids()[first:end],
        prompt.canvas_position + first,
        sequence.block_table,
        first_row=plan.first_row,
        kv_length=sequence.total_length,
        reads_pages=(plan.first_row, plan.end_row) != (0, sequence.total_length),
        scores=step.scores,
    )


def _finish(step: SequenceStep) -> None:
    """Plan the next step, and let go of what it will not need to restore pages."""
    sequence = step.sequence
    plan = sequence.next_plan = None if sequence.finished else plan_step(sequence)
    reads = plan is not None and plan.first_row > 0
    reads_canvas = plan is not None and plan.kind != "full" and not is_whole_response(sequence, plan)
    sequence.pages = sequence.pages.kept(reads, reads_canvas)
