"""The ragged batches of `redvtp.gpucheck`, in float32 and float16, and when two results are the same."""

from __future__ import annotations

import torch

from redvtp.gpucheck.ragged import LAYERS as LAYERS
from redvtp.gpucheck.ragged import PARTS as PARTS
from redvtp.gpucheck.ragged import Part as Part
from redvtp.gpucheck.ragged import Ragged as Ragged
from redvtp.gpucheck.ragged import Result
from redvtp.gpucheck.ragged import Shape as Shape

# Largest difference to torch, of outputs around 1 and of scores.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}

# Grouped heads and not, every size of page, heads that are no power of two.
SHAPES = (
    Shape(4, 2, 32, 16),
    Shape(2, 2, 16, 32),
    Shape(6, 2, 24, 64),
    Shape(2, 1, 64, 128),
    Shape(4, 2, 32, 16, torch.float16),
)


def same(found: Result, expected: Result, ragged: Ragged, *, clears: bool) -> None:
    """Outputs and scores within the tolerance of the type; pages bit for bit, but for what may be cleared."""
    tolerance = TOLERANCE[ragged.shape.dtype]
    torch.testing.assert_close(found.output, expected.output, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(found.pages, expected.pages, strict=True):
        left, right = ours.flatten(0, 1).clone(), theirs.flatten(0, 1).clone()
        if clears:
            behind = ragged.behind_the_last_keys()
            assert left[behind].count_nonzero() == 0
            left[behind] = right[behind]
        assert torch.equal(left.view(torch.uint8), right.view(torch.uint8))
