"""One request inside the engine: what is kept of its prompt, its canvas, its pages and how far its pruning is.

A sequence is host bookkeeping plus one tensor of prompt embeddings. Its parts are frozen and replaced, never changed in
place (the canvas aside), so a snapshot is a copy of references. The caller gives it cache blocks for `total_length`
tokens and takes back those beyond the end of `block_table` after a step that pruned.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redvtp.canvas.acceptance import acceptance_of
from redvtp.canvas.canvas import Canvas
from redvtp.canvas.schedule import schedule_of
from redvtp.denoising.kept_prompt import KeptPrompt
from redvtp.denoising.page_history import PageHistory
from redvtp.denoising.step_plan import StepPlan
from redvtp.noise import Draws
from redvtp.params import DenoisingParams
from redvtp.prompt import SpecialTokens
from redvtp.pruning.policy import Policy
from redvtp.reports import PruningReport


@dataclass(frozen=True, slots=True)
class PruningProgress:
    """How far a request's pruning is.

    policy: None keeps all visual tokens.
    counted_from: the step from which the policy's steps are counted. None while it is not known.
    dropped: visual tokens went after a forward had seen them.
    """

    policy: Policy | None
    counted_from: int | None
    dropped: bool = False

    @classmethod
    def start(cls, policy: Policy | None) -> PruningProgress:
        return cls(policy, 0 if policy is None or policy.decided is None else None)


@dataclass(frozen=True, slots=True)
class Shortened:
    """What compaction needs of a pruning, over prompt, canvas and suffix.

    rows: [left] int64 on the CPU, the surviving rows.
    before, after: [left] int64 on the CPU, their positions.
    """

    rows: Tensor
    before: Tensor
    after: Tensor


class Sequence:
    """State of one request.

    prompt_embeds: [prompt, hidden], visual tokens in place.
    visual_spans: half-open ranges of the visual tokens in it, one for each image.
    policy: None keeps all of them.
    shifted_logits: what the model says at a position is about the next one.
    stop_ids: the stop strings as token sequences.
    suffix_ids: tokens after the canvas.
    block_table: cache blocks for `total_length` tokens.
    draft_ids: see `Canvas`.
    report_canvas: each step's report has the canvas in it.
    """

    def __init__(
        self,
        request_id: str,
        prompt_embeds: Tensor,
        visual_spans: tuple[tuple[int, int], ...],
        denoising: DenoisingParams,
        policy: Policy | None,
        special: SpecialTokens,
        shifted_logits: bool = False,
        stop_ids: tuple[tuple[int, ...], ...] = (),
        suffix_ids: tuple[int, ...] = (),
        block_table: list[int] | None = None,
        draft_ids: tuple[int, ...] = (),
        report_canvas: bool = True,
    ) -> None:
        self.request_id = request_id
        self.denoising = denoising
        self.shifted_logits = shifted_logits
        self.report_canvas = report_canvas
        self.prompt = KeptPrompt.whole(prompt_embeds, visual_spans)
        self.pruning = PruningProgress.start(policy)
        self.pages = PageHistory()
        self.suffix_ids = torch.tensor(suffix_ids, dtype=torch.int64)
        self.block_table = block_table if block_table is not None else []
        # A pruning before the first step, until that step reports it.
        self.unreported: PruningReport | None = None
        # The next step, from the end of one to the beginning of the next.
        self.next_plan: StepPlan | None = None
        ends = () if denoising.ignore_eos else special.end_ids
        self.canvas = Canvas(
            denoising.gen_length,
            denoising.resolved_block_length,
            denoising.resolved_steps,
            special.mask_id,
            stop_ids + tuple((token,) for token in ends),
            schedule_of(denoising.schedule, denoising.schedule_shift),
            draft_ids,
            acceptance_of(denoising),
        )
        self._seed = secrets.randbits(64) if denoising.seed is None else denoising.seed

    @property
    def policy(self) -> Policy | None:
        return self.pruning.policy

    @property
    def total_length(self) -> int:
        """Tokens whose keys and values the cache holds: prompt, canvas and suffix."""
        return self.prompt.length + self.canvas.gen_length + self.suffix_ids.numel()

    @property
    def steps_done(self) -> int:
        return self.canvas.steps_done

    @property
    def finished(self) -> bool:
        return self.canvas.finished

    @property
    def finish_reason(self) -> str | None:
        if not self.finished:
            return None
        return "stop" if self.canvas.stopped else "length"

    @property
    def output_ids(self) -> list[int]:
        """The answer: cut before the stop, the suffix appended."""
        suffix: list[int] = self.suffix_ids.tolist()
        return self.canvas.answer() + suffix

    def draws(self, step: int) -> Draws:
        """What is random in a step, -1 for before all steps."""
        return Draws(self._seed, step)

    def response_ids(self) -> Tensor:
        """[canvas + suffix] int64 on the CPU."""
        return torch.cat((self.canvas.tokens, self.suffix_ids)) if self.suffix_ids.numel() else self.canvas.tokens

    def positions(self) -> Tensor:
        """[total_length] int64 on the CPU, of prompt, canvas and suffix."""
        first, count = self.prompt.canvas_position, self.total_length - self.prompt.length
        return torch.cat((self.prompt.positions, torch.arange(first, first + count)))

    def keep_mask(self, kept: Tensor) -> Tensor:
        """[total_length] bool, what remains with only the visual tokens `kept` ([kept] int64, ascending)."""
        response = torch.ones(self.total_length - self.prompt.length, dtype=torch.bool)
        return torch.cat((self.prompt.keep_mask(kept), response))

    def drop_visual(self, kept: Tensor) -> Shortened:
        """Keep only the visual tokens `kept` ([kept] int64, ascending, into the present ones)."""
        assert self.policy is not None, "only a policy drops tokens"
        before = self.positions()
        rows = self.keep_mask(kept).nonzero()[:, 0]
        seen = self.steps_done > 0
        self.prompt = self.prompt.keep(kept, self.policy.positions)
        self.pruning = replace(self.pruning, dropped=seen)
        self.pages = replace(self.pages, canvas_stale=seen)
        return Shortened(rows, before[rows], self.positions())

    def suspend(self) -> None:
        """Give up all pages (the caller frees the blocks). Everything else stays."""
        self.block_table = []
        self.pages = replace(self.pages, lost=True)

    def resume(self, block_table: list[int]) -> None:
        """Go on with other blocks, enough for `total_length` tokens."""
        self.block_table = block_table

    def snapshot(self) -> Callable[[], None]:
        """Returns what undoes everything that happens from here on.

        To be called after a step that failed half way, before the caller has freed blocks. Pages count as lost: a
        failed step may have written some.
        """
        state, canvas, table = dict(vars(self)), self.canvas.copy(), list(self.block_table)
        pages = replace(self.pages, lost=True)

        def restore() -> None:
            vars(self).update(state)
            self.canvas, self.block_table, self.pages = canvas, table, pages

        return restore
