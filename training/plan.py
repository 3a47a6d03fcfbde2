"""The curriculum: what is trained, on what, for how long. `training.train` walks through PLAN in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of the training with fixed data and a fixed learning rate (with warm-up and decay at its ends).

    part: "tower" teaches the vision tower and the projector what each visual token shows; "language" teaches the
    language model with both frozen.
    batch: pictures a batch; a step takes two batches. tokens: longest sequence. partial: other numbers of pictures and
    tokens for every second batch, which then shows no picture whole. whole: share of pictures shown whole; of the
    others only a share within `background` of the empty visual tokens is shown. system: share of prompts with the
    default system turn.
    items, lines, mixed, kinds: see `SceneMaker`. long, count: how often such questions are put first. other_canvas:
    share of questions with a longer canvas than needed. auxiliary: weight of the hints' losses.
    frugality: weight of the attention spent on empty visual tokens, see `objective.language_loss`.
    matrix_lr, other_lr: learning rates of Muon and AdamW. warmup, decay: steps at the phase's start and end.
    """

    name: str
    part: Literal["tower", "language"]
    steps: int
    batch: int
    tokens: int = 0
    partial: tuple[int, int] | None = None
    whole: float = 0.0
    background: tuple[float, float] = (0.0, 0.0)
    system: float = 0.0
    items: tuple[int, int] = (3, 12)
    lines: tuple[int, int] = (2, 7)
    mixed: float = 0.3
    kinds: tuple[float, float, float, float] = (0.3, 0.2, 0.2, 0.3)
    long: float = 0.5
    count: float = 0.3
    other_canvas: float = 0.0
    auxiliary: float = 0.3
    frugality: float = 0.03
    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    warmup: int = 50
    decay: int = 0


PLAN: tuple[Phase, ...] = (
    Phase("tower", "tower", steps=1550, batch=4, decay=450),
    Phase(
        "few",
        "language",
        steps=650,
        batch=16,
        tokens=136,
        background=(0.0, 0.3),
        items=(2, 6),
        lines=(2, 4),
        mixed=0.2,
        long=0.3,
        count=0.2,
    ),
    Phase(
        "more",
        "language",
        steps=300,
        batch=12,
        tokens=240,
        background=(0.0, 0.6),
        system=0.1,
        items=(3, 12),
        lines=(2, 7),
        other_canvas=0.05,
        warmup=0,
    ),
    Phase(
        "whole",
        "language",
        steps=5600,
        batch=4,
        tokens=512,
        partial=(10, 256),
        whole=1.0,
        background=(0.0, 1.0),
        system=0.6,
        items=(2, 6),
        lines=(2, 6),
        long=0.8,
        count=0.6,
        other_canvas=0.1,
        matrix_lr=0.008,
        other_lr=8e-4,
        warmup=0,
        decay=1400,
    ),
    Phase(
        "polish",
        "language",
        steps=960,
        batch=4,
        tokens=512,
        whole=1.0,
        system=0.9,
        items=(2, 6),
        lines=(2, 6),
        long=1.0,
        mixed=0.2,
        count=0.6,
        other_canvas=0.05,
        matrix_lr=0.005,
        other_lr=5e-4,
        warmup=20,
        decay=800,
    ),
)
