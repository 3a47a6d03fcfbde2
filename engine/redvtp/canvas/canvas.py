"""The response of one request while it is being decided.

A canvas is `gen_length` token ids, the mask id where nothing is decided. It knows which canvas block is active, how
many tokens the next step commits, where a stop sequence cut the answer, and how much of it may be streamed. Pure
bookkeeping on the host; the model never appears here. Each step is `masked_rows()`, a forward over them, `choose(...)`
among its proposals, `commit(...)`.
"""

from __future__ import annotations

from copy import copy

import torch
from torch import Tensor

from redvtp.canvas.acceptance import Acceptance, accepted
from redvtp.canvas.proposals import select
from redvtp.canvas.schedule import Schedule, block_counts, canvas_blocks, even_counts


class Canvas:
    """State of one response (reference: LLaDA-V's generate loop; stop handling as there).

    gen_length, block_length, steps: see DenoisingParams.
    mask_id: id of an undecided position. A step may propose the mask id itself: the position then stays undecided, and
        the budget is spent (as in the reference), so the loop always ends.
    stop_sequences: token sequences; the answer ends before the first position where one of them starts, wherever the
        model decides it first.
    draft: what the canvas begins with, the mask id where it is undecided; the rest of it never changes.
    schedule: spreads the tokens a block still has to decide when it becomes active over its steps.
    acceptance: in place of steps and schedule, each step commits what this accepts. A block takes at most as many steps
        as it had tokens to decide; only proposals of the mask id can make it come to that, and the last step then
        commits all there are.

    Methods: half of them are properties that planner, commit and drivers read; a step calls masked_rows, choose, commit
    and resolved_growth.
    """

    def __init__(
        self,
        gen_length: int,
        block_length: int,
        steps: int,
        mask_id: int,
        stop_sequences: tuple[tuple[int, ...], ...] = (),
        schedule: Schedule = even_counts,
        draft: tuple[int, ...] = (),
        acceptance: Acceptance | None = None,
    ) -> None:
        self.tokens = torch.full((gen_length,), mask_id, dtype=torch.int64)
        self.tokens[: len(draft)] = torch.tensor(draft, dtype=torch.int64)
        self.mask_id = mask_id
        self.steps_done = 0
        self._stops = tuple(stop for stop in stop_sequences if stop)
        self._bounds = canvas_blocks(gen_length, block_length)
        self._steps = even_counts(steps, len(self._bounds))
        self._schedule = schedule
        self._acceptance = acceptance
        self._block = 0
        self._step_in_block = 0
        self._emitted = 0
        # Where the answer ends, and the length of the sequence that ends it there.
        self._stop_at: int | None = None
        self._stop_length = 0
        self._skip_decided_blocks()
        self._counts = self._plan_block()

    def copy(self) -> Canvas:
        """An independent copy."""
        other = copy(self)
        other.tokens = self.tokens.clone()
        return other

    @property
    def gen_length(self) -> int:
        return self.tokens.numel()

    @property
    def block(self) -> int:
        """Index of the active canvas block (of the last one when the canvas is finished)."""
        return min(self._block, len(self._bounds) - 1)

    @property
    def block_start(self) -> int:
        return self._bounds[self.block][0]

    @property
    def block_end(self) -> int:
        return self._bounds[self.block][1]

    @property
    def step_in_block(self) -> int:
        """Steps done within the active canvas block."""
        return self._step_in_block

    @property
    def finished(self) -> bool:
        return self._block >= len(self._bounds)

    @property
    def stopped(self) -> bool:
        """Whether a stop sequence ended the answer."""
        return self._stop_at is not None

    def masked(self) -> Tensor:
        """[gen_length] bool, the undecided positions."""
        return self.tokens == self.mask_id

    def masked_rows(self, start: int = 0) -> Tensor:
        """Candidates of the next step, ascending: undecided positions from `start` to the end of the active block or
        the stop.

        Positions of earlier blocks are among them when the model proposed the mask id there.
        """
        end = self._candidates_end
        rows = (self.tokens[start:end] == self.mask_id).nonzero()[:, 0]
        return rows + start if start else rows

    @property
    def _candidates_end(self) -> int:
        """The end of the active block, or the stop before it."""
        return self.block_end if self._stop_at is None else min(self.block_end, self._stop_at)

    def tokens_to_commit(self) -> int:
        """Size of the next commit, by the schedule of the active block; the least it is with an acceptance rule."""
        return self._counts[self._step_in_block]

    def choose(self, tokens: Tensor, confidence: Tensor, start: int = 0) -> Tensor:
        """What the next step commits of its proposals for `masked_rows(start)`.

        tokens: [rows] int64. confidence: [rows] float64. Returns [selected] int64, indices into both.
        """
        if self._acceptance is None:
            return select(confidence, self.tokens_to_commit())
        if self._step_in_block == len(self._counts) - 1:
            return torch.arange(confidence.numel())
        nothing_else = confidence.numel() == int(self.masked()[start:].sum())
        return accepted(tokens, confidence, nothing_else, self._acceptance, self.mask_id)

    def decide(self, row: int, token: int) -> None:
        """Write a token that no step has to find; what is decided already stays."""
        if self.tokens[row] == self.mask_id:
            self.tokens[row] = token
            self._find_stop()
            self._skip_decided_blocks()
            if self._step_in_block == 0:
                self._counts = self._plan_block()

    def commit(self, rows: Tensor, tokens: Tensor) -> None:
        """Write `tokens` [selected] at canvas positions `rows` [selected] and move on to the next step."""
        self.tokens[rows] = tokens
        self.steps_done += 1
        self._step_in_block += 1
        self._find_stop()
        if self._step_in_block == len(self._counts):
            self._block, self._step_in_block = self._block + 1, 0
        self._skip_decided_blocks()
        if self._step_in_block == 0:
            self._counts = self._plan_block()

    def resolved_growth(self) -> list[int]:
        """Tokens that became final since the last call: the canvas up to its first undecided position.

        A stop sequence is included, nothing after it is. Ids never change once returned.
        """
        end = self.gen_length if self._stop_at is None else self._stop_at + self._stop_length
        growth: list[int] = self.tokens[self._emitted : end].tolist()
        if not self.finished and self.mask_id in growth:
            del growth[growth.index(self.mask_id) :]
        self._emitted += len(growth)
        return growth

    @property
    def answer_length(self) -> int:
        """Canvas tokens before the stop sequence; all of them if there is none."""
        return self.gen_length if self._stop_at is None else self._stop_at

    def answer(self) -> list[int]:
        """The canvas, cut before the stop sequence if there is one."""
        answer: list[int] = self.tokens[: self.answer_length].tolist()
        return answer

    def _plan_block(self) -> tuple[int, ...]:
        """Tokens to commit in each step of the active block, for what it still has to decide."""
        start, end = self._bounds[self.block]
        undecided = int(self.masked()[start:end].sum())
        if self._acceptance is not None:
            return (1,) * undecided
        return block_counts(undecided, self._steps[self.block], self._schedule)

    def _skip_decided_blocks(self) -> None:
        ids: list[int] = self.tokens.tolist()
        if self._stop_at is not None and self.mask_id not in ids[: self._stop_at]:
            self._block = len(self._bounds)
            return
        while not self.finished and self.mask_id not in ids[self.block_start : self._candidates_end]:
            self._block, self._step_in_block = self._block + 1, 0

    def _find_stop(self) -> None:
        if self._stops:
            found = first_stop(self.tokens.tolist(), self._stops, self._stop_at)
            if found is not None:
                self._stop_at, self._stop_length = found


def first_stop(ids: list[int], stops: tuple[tuple[int, ...], ...], before: int | None) -> tuple[int, int] | None:
    """Where the first of the stop sequences starts in ids, and its length; None where none starts.

    before: only one that starts before this place counts, though it may reach past it.
    """
    found = None
    for stop in stops:
        start = _first_match(ids, stop, len(ids) if before is None else before)
        if start is not None:
            found, before = (start, len(stop)), start
    return found


def _first_match(ids: list[int], stop: tuple[int, ...], limit: int) -> int | None:
    """Where `stop` first stands in ids, before `limit`."""
    start = -1
    while True:
        try:
            # list.index looks through thousands of ids in microseconds.
            start = ids.index(stop[0], start + 1, limit)
        except ValueError:
            return None
        if tuple(ids[start : start + len(stop)]) == stop:
            return start
