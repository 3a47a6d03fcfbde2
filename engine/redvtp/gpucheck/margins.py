"""How close a choice was where a run leaves the reference: a near tie is decided by rounding and is no failure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below these two float32 implementations may choose differently (tests/golden/README.md): logits absolute, confidences
# and importances relative.
TOKEN, CONFIDENCE, IMPORTANCE = 5e-3, 3e-4, 5e-4


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a run left the reference, and by how much. margin: None where it is not known."""

    place: str
    margin: float | None
    allowed: float

    @property
    def near_tie(self) -> bool:
        return self.margin is not None and self.margin <= self.allowed

    def __str__(self) -> str:
        known = "of unknown size" if self.margin is None else f"{self.margin:.1e}"
        return f"{self.place}, margin {known} (a near tie up to {self.allowed:.0e})"


@dataclass(frozen=True, slots=True)
class StepEvidence:
    """What a step decided from.

    rows: [rows] int64, canvas positions it could decide.
    logits: [rows, vocab] float32, of those.
    confidence: [rows] float64, of its proposals.
    """

    rows: Tensor
    logits: Tensor
    confidence: Tensor


def of_canvas(step: int, ours: list[int], reference: list[int], mask: int, evidence: StepEvidence) -> Divergence | None:
    """The first difference of two canvases after a step that both began with the same one; None where they agree."""
    different = [place for place, (own, other) in enumerate(zip(ours, reference, strict=True)) if own != other]
    if not different:
        return None
    row_of = {place: row for row, place in enumerate(evidence.rows.tolist())}
    known = all(place in row_of for place in different)
    swapped = [place for place in different if mask not in (ours[place], reference[place])]
    if swapped:
        place = swapped[0]
        where = f"step {step}, position {place}: token {ours[place]} instead of {reference[place]}"
        margin = None
        if known:
            logits = evidence.logits[row_of[place]]
            margin = float((logits[ours[place]] - logits[reference[place]]).abs())
        return Divergence(where, margin, TOKEN)
    only_ours = [place for place in different if ours[place] != mask]
    only_theirs = [place for place in different if reference[place] != mask]
    where = f"step {step}: committed positions {only_ours} instead of {only_theirs}"
    margin = None
    if known and only_ours and only_theirs:
        sure = [[float(evidence.confidence[row_of[place]]) for place in places] for places in (only_ours, only_theirs)]
        margin = _relative(sure[0] + sure[1])
    return Divergence(where, margin, CONFIDENCE)


def of_kept(step: int, ours: list[int], reference: list[int], importance: list[float]) -> Divergence | None:
    """The same for the visual tokens that stay. importance: of all visual tokens before, ours."""
    swapped = sorted(set(ours) ^ set(reference))
    if not swapped:
        return None
    where = f"step {step}: {len(swapped)} visual tokens kept or dropped otherwise"
    margin = _relative([importance[index] for index in swapped]) if len(ours) == len(reference) else None
    return Divergence(where, margin, IMPORTANCE)


def _relative(numbers: list[float]) -> float:
    spread = torch.tensor(numbers, dtype=torch.float64)
    return float((spread.max() - spread.min()) / spread.abs().max().clamp(min=1e-30))
