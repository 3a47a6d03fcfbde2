"""The named pruning policies, one row each.

A preset is a choice of scorer, rows, moment and budget. `redvtp.pruning.resolve` fills in what request, model and
canvas decide. A new preset is a new row here; another importance is a new row of `redvtp.pruning.scorers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Layers that FastV runs on all tokens (its K, arXiv 2403.06764), and prunings of `progressive`.
FASTV_LAYER = 2
PROGRESSIVE_STEPS = 4
# ZipVL's share of attention that the kept tokens must hold (arXiv 2410.08584).
ZIPVL_MASS = 0.975


@dataclass(frozen=True, slots=True)
class Preset:
    """Choices of a preset.

    scorer: name of an entry of `redvtp.pruning.scorers.SCORERS`.
    rows: rows whose attention counts, see PruningParams.score_rows.
    before: visual tokens are dropped before the first forward.
    step: the step after which tokens are dropped first, or a share of the steps as a float.
    steps: number of prunings, one a step.
    layer: layers that run on all tokens before some are dropped inside a step, or a share of the depth as a float.
        None drops after the step.
    withdraw: behind `layer` visual tokens take no part in any step; nothing is dropped.
    mass: keep the smallest set with this share of the importance instead of keep_ratio.
    """

    scorer: str = "attention"
    rows: str = "masked"
    before: bool = False
    step: int | float = 0
    steps: int = 1
    layer: int | float | None = None
    withdraw: bool = False
    mass: float | None = None

    @property
    def own_budget(self) -> bool:
        """Whether the preset decides how much is computed, whatever keep_ratio says (unless that is 1)."""
        return self.mass is not None or self.withdraw


PRESET_TABLE: Mapping[str, Preset] = MappingProxyType(
    {
        "redvtp": Preset(),
        "llada-fastv": Preset(layer=0.5),
        "fastv": Preset(layer=FASTV_LAYER),
        "late": Preset(step=0.5),
        "progressive": Preset(steps=PROGRESSIVE_STEPS),
        "zipvl": Preset(mass=ZIPVL_MASS),
        "layer-skip": Preset(layer=0.75, withdraw=True),
        "attention-free": Preset(scorer="features", before=True),
        "external": Preset(scorer="given", before=True),
        "random": Preset(scorer="random"),
        "uniform": Preset(scorer="uniform"),
    }
)
