"""One request inside the engine: prompt embeddings, canvas, block table, and what pruning left of the visual tokens.

A sequence is host bookkeeping plus one tensor of prompt embeddings; `DenoisingRunner` does the computing. The caller
gives it cache blocks for `total_length` tokens and takes back those beyond the end of `block_table` after a step that
pruned. `suspend` and `resume` take all blocks away and give others: the sequence goes on as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from redvtp.canvas.acceptance import acceptance_of
from redvtp.canvas.canvas import Canvas
from redvtp.canvas.schedule import schedule_of
from redvtp.denoising.page_history import CanvasOrigin, OriginCut, PageOrigin
from redvtp.params import BLOCK_CACHES, DenoisingParams
from redvtp.prompt import SpecialTokens
from redvtp.pruning.policy import PROMPT_ROWS, Policy
from redvtp.reports import PruningReport

# The step of a pruning that comes before the first forward.
BEFORE_ALL_STEPS = -1


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The next step of a sequence: `full` computes every kept token, `response` the canvas or a part of it.

    first, end: the rows that are computed, of prompt, canvas and suffix; the others are read from pages.
    start: canvas rows from here on may be decided.
    tokens_computed: rows that enter it, and those of another forward before it: of a prompt that is encoded alone, or
    of pages that are written again. Some may leave half way.
    """

    kind: str
    first: int
    end: int
    start: int
    tokens_computed: int


class Sequence:
    """State of one request.

    prompt_embeds: [prompt, hidden], visual tokens in place. visual_spans: half-open ranges of the visual tokens in it,
    one for each image. policy: None keeps all of them. shifted_logits: see `Family`. stop_ids: the stop strings as
    token sequences. suffix_ids: tokens after the canvas. block_table: cache blocks for `total_length` tokens.
    draft_ids: see `Canvas`.
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
    ) -> None:
        self.request_id = request_id
        self.denoising = denoising
        self.policy = policy
        self.shifted_logits = shifted_logits
        self.prompt_embeds = prompt_embeds
        self.prompt_positions = torch.arange(prompt_embeds.shape[0], device=prompt_embeds.device)
        # Rows of the prompt that are visual tokens, ascending.
        self.visual_rows = torch.tensor(
            [row for start, end in visual_spans for row in range(start, end)], dtype=torch.int64
        )
        # Visual tokens of each image at first, and for each that is left the image it is of.
        self.images = tuple(end - start for start, end in visual_spans)
        self.image_of = torch.arange(len(self.images)).repeat_interleave(torch.tensor(self.images, dtype=torch.int64))
        # A pruning before the first step, until that step reports it.
        self.unreported: PruningReport | None = None
        self.suffix_ids = torch.tensor(suffix_ids, dtype=torch.int64)
        self.canvas_position = prompt_embeds.shape[0]
        self.block_table = block_table if block_table is not None else []
        # Where the pages that the next steps read come from; None while they read none. The second one is that of the
        # canvas, if a response step has computed it since.
        self.origin: PageOrigin | None = None
        self.canvas_origin: CanvasOrigin | None = None
        self.pages_lost = False
        # Whether the pages of the canvas are not to be read, because visual tokens went since they were written.
        self._canvas_stale = False
        # The step from which those of the policy's shares are counted; None as long as it is not known.
        self._shares_from = 0 if policy is None or policy.decided is None else None
        # Whether visual tokens went after a forward had seen them.
        self._dropped = False
        self._end_tokens = () if denoising.ignore_eos else special.end_ids
        self.canvas = Canvas(
            denoising.gen_length,
            denoising.resolved_block_length,
            denoising.resolved_steps,
            special.mask_id,
            stop_ids + tuple((token,) for token in self._end_tokens),
            schedule_of(denoising.schedule, denoising.schedule_shift),
            draft_ids,
            acceptance_of(denoising),
        )
        self.generator = torch.Generator()
        if denoising.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(denoising.seed)

    @property
    def prompt_length(self) -> int:
        """Prompt tokens that are still there."""
        return self.prompt_embeds.shape[0]

    @property
    def num_visual(self) -> int:
        return self.visual_rows.numel()

    @property
    def gen_length(self) -> int:
        return self.canvas.gen_length

    @property
    def total_length(self) -> int:
        """Tokens whose keys and values the cache holds."""
        return self.prompt_length + self.gen_length + self.suffix_ids.numel()

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

    def suspend(self) -> None:
        """Give up all pages (the caller frees the blocks). Everything else stays."""
        self.block_table = []
        self.pages_lost = True

    def resume(self, block_table: list[int]) -> None:
        """Go on with other blocks, enough for `total_length` tokens."""
        self.block_table = block_table

    def snapshot(self) -> Callable[[], None]:
        """What takes back all that happens from here on: to be called after a step that failed half way, before the
        caller has freed blocks. Pages count as lost, for who knows what was written."""
        # Tensors of a sequence are replaced and never written to, but for those of its canvas.
        state, canvas, table, drawn = dict(vars(self)), self.canvas.copy(), list(self.block_table), self.generator
        random = drawn.get_state()
        origin = self.origin and replace(self.origin, moves=list(self.origin.moves))

        def restore() -> None:
            vars(self).update(state)
            self.canvas, self.block_table, self.origin, self.pages_lost = canvas, table, origin, True
            drawn.set_state(random)

        return restore

    @property
    def rewrites(self) -> PageOrigin | None:
        """What must be computed again before the next step, because it reads pages that were lost."""
        return self.origin if self.pages_lost else None

    @property
    def _origin_tokens(self) -> int:
        return sum(origin.tokens for origin in (self.origin, self.canvas_origin) if origin is not None)

    def next_step(self) -> StepPlan:
        """Whether the next step is full or a response step (docs/architecture.md: decoding modes), and what it
        computes."""
        plan = self._next_step()
        again = self._origin_tokens if self.pages_lost else 0
        return replace(plan, tokens_computed=plan.tokens_computed + again) if again else plan

    def resume_tokens(self) -> int:
        """What the next step computes if the pages are lost before it."""
        return self._next_step().tokens_computed + self._origin_tokens

    def _next_step(self) -> StepPlan:
        total, prompt = self.total_length, self.prompt_length
        if self.denoising.cache == "prefix_lm":
            computed = total if self.encodes_prompt_next() else total - prompt
            return StepPlan("full" if computed == total else "response", prompt, total, 0, computed)
        rows = self._canvas_rows_next()
        if rows is None or self._scores_before(rows[0]):
            return StepPlan("full", 0, total, 0, total)
        # The token before the first one says what that is: with shifted logits it is computed again.
        first, end = prompt + rows[0] - int(self.shifted_logits), total if rows[1] is None else prompt + rows[1]
        return StepPlan("response", first, end, self.canvas.block_start, end - first)

    def _canvas_rows_next(self) -> tuple[int, int | None] | None:
        """Canvas rows that a step computes which reads the others, and the prompt, from pages: the first, and where
        they end (None is behind the suffix). None for a full step."""
        if self.denoising.cache not in BLOCK_CACHES:
            return None
        interval, step = self.denoising.refresh_interval, self.canvas.step_in_block
        refreshes = (step % interval if interval else step) == 0
        if refreshes and (interval is not None or not self._dropped):
            return None
        if refreshes or self._canvas_stale:
            return 0, None
        # Undecided rows of later blocks may be asked where they look.
        later = self.denoising.cache == "prefix" or self.scores_next()
        return self.canvas.block_start, None if later else self.canvas.block_end

    def canvas_rows(self, plan: StepPlan) -> int:
        """Canvas positions that the next step computes."""
        return min(plan.end, self.prompt_length + self.gen_length) - max(plan.first, self.prompt_length)

    def _is_whole_response(self, plan: StepPlan) -> bool:
        return plan.kind == "response" and plan.first <= self.prompt_length and plan.end == self.total_length

    def encodes_prompt_next(self) -> bool:
        """Whether the next step first computes the prompt, alone and for good."""
        return self.denoising.cache == "prefix_lm" and self.steps_done == 0

    def share_next(self) -> float | None:
        """The share of the visual tokens that is left after the next step; None where none are dropped then."""
        if self.policy is None or self.num_visual == 0 or self._shares_from is None:
            return None
        return self.policy.shares.get(self.steps_done - self._shares_from)

    def note_decided(self) -> None:
        """To be called after each commit, for policies that wait until enough is decided."""
        if self._shares_from is None and self.policy is not None and self.policy.decided is not None:
            decided = self.gen_length - int(self.canvas.masked().sum())
            if decided >= self.policy.decided * self.gen_length:
                self._shares_from = self.steps_done

    def scores_next(self) -> bool:
        """Whether the next step measures attention to the visual tokens; the controls prune without looking."""
        return self.policy is not None and self.policy.source == "attention" and self.share_next() is not None

    @property
    def score_rows(self) -> str:
        """Whose attention counts where it is measured, see PruningParams."""
        return self.policy.rows if self.policy is not None else "masked"

    def _scores_before(self, row: int) -> bool:
        """Whether the next step scores rows that it would not compute if it began with this canvas row."""
        rows = self.score_rows
        return self.scores_next() and (rows in PROMPT_ROWS or (rows == "response" and row > 0))

    def scored_rows(self, start: int) -> Tensor:
        """Rows of prompt and canvas, [rows] int64, whose attention may count in the next step. start: StepPlan.start.

        Of `masked` and `committed` it is known only after the step which of these do.
        """
        rows = self.score_rows
        if rows == "masked":
            # In a response step not those of finished blocks, where the model may have proposed the mask id.
            canvas = start + self.canvas.masked()[start:].nonzero()[:, 0]
        elif rows == "committed":
            canvas = self.canvas.masked_rows(start)
        else:
            canvas = torch.arange(0 if rows == "prompt" else self.gen_length)
        if rows not in PROMPT_ROWS:
            return self.prompt_length + canvas
        text = torch.ones(self.prompt_length, dtype=torch.bool)
        text[self.visual_rows] = False
        return torch.cat((text.nonzero()[:, 0], self.prompt_length + canvas))

    def drops_inside_next(self) -> bool:
        """Whether the next step drops visual tokens behind a layer, while it runs."""
        return self.policy is not None and self.policy.layer is not None and self.share_next() is not None

    @property
    def withdraws_behind(self) -> int | None:
        """The layer behind which no step sees visual tokens; None if all layers do."""
        return self.policy.layer if self.policy is not None and self.policy.withdraw and self.num_visual else None

    def cut_next(self) -> int | None:
        """The layer behind which the next step goes on with fewer rows; None if all rows go through all layers."""
        if self.drops_inside_next():
            assert self.policy is not None
            return self.policy.layer
        return self.withdraws_behind

    def pages_of_origin(self) -> int:
        """How many of the first rows the next step has, or would have, from the pages that `origin` tells of."""
        if self.canvas_origin is not None:
            return self.canvas_origin.first
        plan = self._next_step()
        return plan.first if plan.end == self.total_length else self.total_length

    def without_visual(self) -> Tensor:
        """[total_length] bool, the rows of prompt, canvas and suffix that are no visual tokens.

        The last of the prompt is there in any case: with shifted logits it speaks about the canvas, and no prompt is
        empty without it.
        """
        stays = self.survivors(self.visual_rows[:0])
        stays[self.prompt_length - 1] = True
        return stays

    def positions(self) -> Tensor:
        """[total_length] int64, of prompt, canvas and suffix."""
        return torch.cat((self.prompt_positions, self.response_positions()))

    def response_positions(self, start: int = 0) -> Tensor:
        """Positions of the canvas from row `start` on, and of the suffix behind it."""
        first, end = self.canvas_position + start, self.canvas_position + self.gen_length + self.suffix_ids.numel()
        return torch.arange(first, end, device=self.prompt_positions.device)

    def note_pages(self, plan: StepPlan, cut: OriginCut | None) -> None:
        """Remember what the forward of a step has written, if later ones read it. cut: see `PageOrigin`."""
        if self.denoising.cache not in BLOCK_CACHES:
            return
        if plan.kind == "full":
            self.note_origin(cut)
            self.canvas_origin, self._canvas_stale = None, False
            return
        if self._is_whole_response(plan):
            self.canvas_origin = CanvasOrigin(
                plan.first,
                self.prompt_embeds[plan.first :],
                torch.cat((self.canvas.tokens, self.suffix_ids)),
                self.positions()[plan.first :],
            )
            self._canvas_stale = False
        # Attention that is scored goes another way, on which the last bits may differ from those of a step taken again.
        self._canvas_stale |= self.scores_next()

    def forget_origins(self) -> None:
        """Let go of what no step will need: it may hold the embeddings of tokens that were dropped."""
        plan = None if self.finished else self._next_step()
        if plan is None or plan.first == 0:
            self.origin = None
        if plan is None or plan.kind == "full" or self._is_whole_response(plan):
            self.canvas_origin = None

    def note_origin(self, cut: OriginCut | None = None) -> None:
        """Remember what a forward over all rows, or over the prompt alone, computes pages from."""
        alone = self.denoising.cache == "prefix_lm"
        canvas_ids = torch.cat((self.canvas.tokens, self.suffix_ids))
        self.origin = PageOrigin(
            self.prompt_embeds,
            canvas_ids[:0] if alone else canvas_ids,
            self.prompt_positions if alone else self.positions(),
            cut,
        )

    def survivors(self, kept: Tensor) -> Tensor:
        """[total_length] bool, what remains of prompt, canvas and suffix with only the visual tokens `kept`."""
        survives = torch.ones(self.total_length, dtype=torch.bool)
        survives[self.visual_rows] = False
        survives[self.visual_rows[kept]] = True
        return survives

    def drop_visual(self, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keep only the visual tokens `kept` ([kept] int64, ascending, into the present ones).

        Returns what compaction needs, over prompt, canvas and suffix: surviving rows, their positions before, and
        after.
        """
        assert self.policy is not None, "only a policy drops tokens"
        before = self.positions()
        survives = self.survivors(kept)
        rows = survives.nonzero()[:, 0]
        prompt_survives = survives[: self.prompt_length]
        is_visual = torch.zeros_like(prompt_survives)
        is_visual[self.visual_rows] = True
        self._dropped = self._canvas_stale = self.steps_done > 0

        self.visual_rows = is_visual[prompt_survives].nonzero()[:, 0]
        self.image_of = self.image_of[kept]
        prompt_rows = prompt_survives.nonzero()[:, 0].to(self.prompt_embeds.device)
        self.prompt_embeds = self.prompt_embeds.index_select(0, prompt_rows)
        if self.policy.positions == "compact":
            self.prompt_positions = torch.arange(self.prompt_length, device=self.prompt_embeds.device)
            self.canvas_position = self.prompt_length
        else:
            self.prompt_positions = self.prompt_positions.index_select(0, prompt_rows)
        after = self.positions()
        rows = rows.to(before.device)
        return rows, before[rows], after
