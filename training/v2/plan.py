"""The curriculum: what is trained, on what, for how long. `training.v2.train` walks through PLAN in order.

Every picture is always shown whole, and nothing in any phase says which visual tokens matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from training.v2.world import Family

_ALL: dict[Family, float] = {
    "objects": 0.24,
    "form": 0.16,
    "table": 0.14,
    "page": 0.15,
    "signs": 0.09,
    "sparse": 0.06,
    "pair": 0.09,
    "clip": 0.07,
}


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of the training with fixed data and a fixed learning rate (with warm-up and decay at its ends).

    part: "tower" teaches the vision tower and the projector what each visual token shows; "language" teaches the
    language model with both frozen.
    batch: pictures a shard; a step takes two shards. tokens: longest sequence, filled with questions; a picture too
    large for it gets one question. families, levels: shares of each, see `makers.make`. system: share of prompts with
    the default system turn. long, count: how often such questions are put first. other_canvas: share of questions with
    another canvas than the smallest. auxiliary: weight of the hints' losses.
    matrix_lr, other_lr: learning rates of Muon and AdamW. warmup, decay: steps of their rise and fall at the phase's
    start and end; final: the share of them it falls to. exact: float32 whatever the precision of the training.
    """

    name: str
    part: Literal["tower", "language"]
    steps: int
    batch: int
    tokens: int = 0
    families: dict[Family, float] = field(default_factory=lambda: dict(_ALL))
    levels: tuple[float, float, float] = (1.0, 0.0, 0.0)
    system: float = 0.0
    long: float = 0.5
    count: float = 0.3
    other_canvas: float = 0.0
    auxiliary: float = 0.3
    matrix_lr: float = 0.02
    other_lr: float = 2e-3
    warmup: int = 50
    decay: int = 0
    final: float = 0.02
    exact: bool = False


PLAN: tuple[Phase, ...] = (
    Phase("tower", "tower", steps=5000, batch=4, decay=2000),
    Phase("few", "language", steps=1200, batch=10, tokens=224, long=0.3, count=0.3),
    Phase(
        "more",
        "language",
        steps=1500,
        batch=8,
        tokens=320,
        levels=(0.3, 0.7, 0.0),
        system=0.2,
        long=0.5,
        warmup=0,
    ),
    Phase(
        "many",
        "language",
        steps=9000,
        batch=8,
        tokens=448,
        levels=(0.1, 0.25, 0.65),
        system=0.7,
        long=0.7,
        count=0.4,
        other_canvas=0.05,
        matrix_lr=0.012,
        other_lr=1.2e-3,
        warmup=0,
        decay=6500,
        final=0.15,
    ),
    Phase(
        "polish",
        "language",
        steps=1200,
        batch=8,
        tokens=448,
        levels=(0.05, 0.15, 0.8),
        system=0.9,
        long=0.8,
        count=0.4,
        other_canvas=0.05,
        matrix_lr=0.0018,
        other_lr=1.8e-4,
        warmup=0,
        decay=1200,
        exact=True,
    ),
)
