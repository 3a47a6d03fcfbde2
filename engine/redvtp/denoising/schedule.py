"""How many canvas tokens each denoising step commits.

The even table of LLaDA: a block's tokens are spread over its steps, the remainder goes to the first steps. A request's
steps are spread over its canvas blocks the same way, so a canvas that is no multiple of the block length needs no
special case.
"""

from __future__ import annotations


def even_counts(tokens: int, steps: int) -> tuple[int, ...]:
    """Tokens committed by each of `steps` steps (reference: LLaDA's get_num_transfer_tokens).

    Raises ValueError when there is no step, or tokens are negative.
    """
    if steps < 1 or tokens < 0:
        raise ValueError(f"cannot spread {tokens} tokens over {steps} steps")
    base, extra = divmod(tokens, steps)
    return tuple(base + (step < extra) for step in range(steps))


def canvas_blocks(gen_length: int, block_length: int) -> tuple[tuple[int, int], ...]:
    """Half-open bounds of the canvas blocks; the last one may be shorter."""
    return tuple((start, min(start + block_length, gen_length)) for start in range(0, gen_length, block_length))


def transfer_table(gen_length: int, block_length: int, steps: int) -> tuple[tuple[int, ...], ...]:
    """For each canvas block, the tokens each of its steps commits. A step that would commit nothing is left out."""
    blocks = canvas_blocks(gen_length, block_length)
    shares = even_counts(steps, len(blocks))
    return tuple(
        even_counts(end - start, min(share, end - start)) for (start, end), share in zip(blocks, shares, strict=True)
    )
