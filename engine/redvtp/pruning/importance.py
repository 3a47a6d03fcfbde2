"""Importance of visual tokens: from the attention of canvas rows, or from their features alone.

`feature_importance` says how much each token adds to what all of them say.

After FlashVLA (arXiv 2505.21200, information contribution): write the features of all visual tokens as F = U S W' and
ask how much of each token lies along the leading directions W. The paper sums |u s| over them, on a layer's attention
output; here it is the projector's output, so that not even one layer runs, and the length of the projection,
sqrt(sum (u s)^2). The length depends on the space the leading directions span and not on the directions themselves,
which for singular values close to each other are a matter of rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redvtp.device import to_device

# Leading directions. The spectra of image features fall steeply; more directions bring the score closer to the plain
# length of a feature, which a few outlier channels rule.
DIRECTIONS = 32
# Rounds of subspace iteration; each multiplies the gap in the spectrum by its square.
_ROUNDS = 4
# Directions carried along beside those wanted, so that the last wanted ones converge too.
_SPARE = 8


def feature_importance(features: Tensor) -> Tensor:
    """features: [visual, hidden], the visual tokens as the language model would get them. Returns [visual] float32 on
    the CPU.

    By subspace iteration from a fixed start: the same numbers every time on one machine, in 2 * visual * hidden * 40
    multiplications a round instead of a whole decomposition.
    """
    visual, hidden = features.shape
    wide = features.float()
    directions = min(DIRECTIONS, visual, hidden)
    width = min(directions + _SPARE, visual, hidden)
    start = torch.randn(hidden, width, generator=torch.Generator().manual_seed(0))
    basis = to_device(start, wide.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(wide.T @ torch.linalg.qr(wide @ basis).Q).Q
    projected = wide @ basis
    # Within the small space the leading directions are exact.
    _, _, turned = torch.linalg.svd(torch.linalg.qr(projected).R)
    lengths: Tensor = (projected @ turned[:directions].T).norm(dim=-1)
    return lengths.cpu()


def masked_row_importance(attention: Tensor, still_masked: Tensor) -> Tensor:
    """Importance of each visual token to some canvas rows, as a rule those that are undecided (RedVTP, section 3).

    attention: [rows, visual] float32, mean over layers and heads.
    still_masked: [rows] bool on the CPU, the rows that count: masked after this step's commit, or just committed.
    Returns [visual] float32. Raises ValueError when no row counts: nothing is left to decide, so do not prune.
    """
    counting = still_masked.nonzero()[:, 0]
    if not counting.numel():
        raise ValueError("no response row is masked; there is nothing left to prune for")
    return attention.index_select(0, to_device(counting, attention.device)).mean(0)
