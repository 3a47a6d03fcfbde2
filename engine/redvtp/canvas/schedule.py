"""How many canvas tokens each denoising step commits.

A request's steps are spread over its canvas blocks, the remainder over the first of them, so a canvas that is no
multiple of the block length needs no special case. Within a block a schedule spreads its undecided tokens over its
steps: evenly as LLaDA does, along one of LaViDa's curves, or by Dream's time steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

# (undecided tokens of a block, its steps) -> tokens committed by each step; it may need fewer steps.
Schedule = Callable[[int, int], tuple[int, ...]]

CURVES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "linear": lambda time, shift: time,
    "shift": lambda time, shift: shift * time / (1 + (shift - 1) * time),
    "cosine": lambda time, shift: (1 - torch.cos(math.pi * time)) / 2,
    "logit_normal": lambda time, shift: torch.special.ndtr(torch.logit(time)),
}
# Where Dream's noise level ends, so that its last step has a ratio to compute.
_LAST_TIME = 1e-3


def even_counts(tokens: int, steps: int) -> tuple[int, ...]:
    """Tokens committed by each of `steps` steps (reference: LLaDA's get_num_transfer_tokens).

    Raises ValueError when there is no step, or tokens are negative.
    """
    if steps < 1 or tokens < 0:
        raise ValueError(f"cannot spread {tokens} tokens over {steps} steps")
    base, extra = divmod(tokens, steps)
    return tuple(base + (step < extra) for step in range(steps))


def curve_counts(tokens: int, steps: int, curve: str, shift: float) -> tuple[int, ...]:
    """Tokens committed by each step along one of `CURVES` (reference: LaViDa's get_num_transfer_tokens_sch).

    The curve says how much is still masked, seen from the end: `shift` above 1 commits little at first and most at the
    end, below 1 the other way round. At least one token a step, so there are never more steps than tokens.
    """
    steps = min(steps, tokens)
    # float32 and its rounding decide where the truncation below falls: the reference's tables depend on it.
    time = torch.linspace(0, 1, steps + 1)
    reached = (CURVES[curve](time, shift) * tokens).long()
    # Every curve ends at 1; in float32 some end a hair below it (shift 0.1), which would leave a token undecided.
    reached[-1] = tokens
    counts = reached.diff().clamp(min=1).tolist()
    surplus = sum(counts) - tokens
    while surplus > 0:
        for step in range(steps):
            if surplus and counts[step] > 1:
                counts[step] -= 1
                surplus -= 1
    return tuple(reversed(counts))


def dream_counts(tokens: int, steps: int, time_steps: int | None = None) -> tuple[int, ...]:
    """Tokens committed by each step as the noise level falls from 1 to nearly 0 (reference: Dream's generate).

    time_steps: into how many the fall is cut, of which `steps` are taken; the last one commits all that is left.
    Early steps of long schedules commit nothing.
    """
    time = torch.linspace(1, _LAST_TIME, (time_steps or steps) + 1)
    counts: list[int] = []
    for step in range(steps - 1):
        counts.append(int((tokens - sum(counts)) * (1 - time[step + 1] / time[step])))
    return (*counts, tokens - sum(counts))


def schedule_of(name: str, shift: float) -> Schedule:
    """The schedule of that name, see DenoisingParams; `shift` is used by `shift` only."""
    if name in CURVES:
        return partial(curve_counts, curve=name, shift=shift)
    return dream_counts if name == "dream" else even_counts


def canvas_blocks(gen_length: int, block_length: int) -> tuple[tuple[int, int], ...]:
    """Half-open bounds of the canvas blocks; the last one may be shorter."""
    return tuple((start, min(start + block_length, gen_length)) for start in range(0, gen_length, block_length))


def block_counts(masked: int, steps: int, schedule: Schedule = even_counts) -> tuple[int, ...]:
    """Tokens that each step of a canvas block with `masked` undecided ones commits.

    A step that would commit nothing is left out: the next one would see exactly the same canvas.
    """
    return tuple(count for count in schedule(masked, min(steps, masked)) if count) if masked else ()


def transfer_table(
    gen_length: int, block_length: int, steps: int, schedule: Schedule = even_counts
) -> tuple[tuple[int, ...], ...]:
    """For each canvas block of an empty canvas, the tokens each of its steps commits."""
    blocks = canvas_blocks(gen_length, block_length)
    shares = even_counts(steps, len(blocks))
    return tuple(block_counts(end - start, share, schedule) for (start, end), share in zip(blocks, shares, strict=True))
