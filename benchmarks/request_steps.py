"""What each step of a request computes, worked out from the request alone.

`steps_of` says it for LLaDA-V's decoding modes without running anything; docs/denoising.md says which steps are full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from redvtp.canvas.schedule import block_counts, canvas_blocks, even_counts
from redvtp.params import DenoisingParams

CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request with one picture.

    prompt: its tokens before any pruning.
    visual: those of them that are visual.
    denoising: canvas, steps and cache, one of CACHES.
    keep: share of the visual tokens that stay after the first step (preset `redvtp`); None is dense, without scoring.
    """

    prompt: int
    visual: int
    denoising: DenoisingParams
    keep: float | None = None

    @property
    def held(self) -> int:
        """Tokens that hold KV cache before any pruning."""
        return self.prompt + self.denoising.gen_length

    @property
    def held_after(self) -> int:
        """The same after the first step."""
        return self.held - (0 if self.keep is None else self.visual - max(1, int(self.visual * self.keep)))


@dataclass(frozen=True, slots=True)
class Step:
    """One denoising step of one request.

    rows: tokens it computes.
    keys: tokens that each of them attends to; the rows themselves, or those and others that are read from pages.
    candidates: rows that get logits.
    scored: rows whose attention to visual tokens is summed up.
    visual: visual tokens among the keys.
    moved: tokens whose keys and values move to other pages after it.
    """

    rows: int
    keys: int
    candidates: int
    scored: int = 0
    visual: int = 0
    moved: int = 0

    @property
    def full(self) -> bool:
        return self.rows == self.keys


def steps_of(asked: Asked) -> Iterator[Step]:
    """The steps of a request, in order. Raises ValueError for a cache that is none of CACHES."""
    denoising = asked.denoising
    if denoising.cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {denoising.cache!r}")
    canvas, visual = denoising.gen_length, asked.visual
    bounds = canvas_blocks(canvas, denoising.resolved_block_length)
    number = 0
    for (start, end), count in zip(bounds, even_counts(denoising.resolved_steps, len(bounds)), strict=True):
        undecided = end - start
        for in_block, committed in enumerate(block_counts(undecided, count, even_counts)):
            scores = number == 0 and asked.keep is not None
            drops = scores and canvas > committed
            held = asked.held if number == 0 else asked.held_after
            yield Step(
                rows=_rows(asked, number, in_block, start, end),
                keys=held,
                candidates=undecided,
                scored=canvas if scores else 0,
                visual=visual,
                moved=asked.held_after - canvas if drops and denoising.cache != "none" else 0,
            )
            undecided -= committed
            number += 1
            visual -= asked.held - asked.held_after if drops else 0


def _rows(asked: Asked, number: int, in_block: int, start: int, end: int) -> int:
    """Tokens that a step computes. number: of the step. in_block: the same, counted from its canvas block's first."""
    canvas, cache = asked.denoising.gen_length, asked.denoising.cache
    if number == 0:
        return asked.held
    if cache == "none":
        return asked.held_after
    pruned = asked.keep is not None
    if in_block == 0:
        # Once pruned the prompt's pages are never computed again.
        return canvas if pruned else asked.held
    if pruned and number == 1:
        # The canvas rows in the pages still know of the dropped tokens.
        return canvas
    return canvas - start if cache == "prefix" else end - start
