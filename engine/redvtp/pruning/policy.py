"""What a preset stands for: a pruning policy is a scorer, a budget, a moment, positions and a scope.

`policy_of` fills a preset's choices in where the request left them open, for the model and the canvas it will meet.
Presets are rows of `_PRESETS`, not classes; every knob of a row can be set by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from redvtp.params import PruningParams

# Layers that FastV runs on all tokens (its K, arXiv 2403.06764), and prunings of `progressive`.
FASTV_LAYER = 2
PROGRESSIVE_STEPS = 4
# ZipVL's share of attention that the kept tokens must hold (arXiv 2410.08584).
ZIPVL_MASS = 0.975


@dataclass(frozen=True, slots=True)
class Policy:
    """One request's pruning, nothing left open.

    source: where importance comes from: `attention`, `features` (of the visual tokens themselves), `given` (with the
    request), or the controls `random` and `uniform`.
    rows: whose attention counts, see PruningParams.score_rows.
    layers: half-open range of the layers whose attention counts.
    before: share of the visual tokens that the first forward already runs on; None where all are in it.
    shares: {denoising step: share of the request's visual tokens that stays after it}, ascending steps; empty where
    nothing is dropped after or inside a step.
    layer: tokens are dropped inside those steps, behind this layer; None is after them.
    withdraw: behind `layer` visual tokens take no part in any step; their pages stay, for the layers in front of it.
    mass: instead of the shares, the smallest set that holds so much of the importance, within min_share and max_share.
    """

    source: str
    rows: str
    layers: tuple[int, int]
    before: float | None
    shares: dict[int, float]
    layer: int | None
    withdraw: bool
    mass: float | None
    min_share: float
    max_share: float
    scope: str
    positions: str

    @property
    def prunes(self) -> bool:
        return self.before is not None or bool(self.shares)


@dataclass(frozen=True, slots=True)
class _Preset:
    """Choices of a preset. layer: how many layers run on all tokens, or their share of the depth as a float. step: the
    one after which it prunes first, or a share of the steps."""

    source: str = "attention"
    rows: str = "masked"
    before: bool = False
    step: int | float = 0
    steps: int = 1
    layer: int | float | None = None
    withdraw: bool = False
    mass: float | None = None


_PRESETS: dict[str, _Preset] = {
    "redvtp": _Preset(),
    "llada-fastv": _Preset(layer=0.5),
    "fastv": _Preset(layer=FASTV_LAYER),
    "late": _Preset(step=0.5),
    "progressive": _Preset(steps=PROGRESSIVE_STEPS),
    "zipvl": _Preset(mass=ZIPVL_MASS),
    "layer-skip": _Preset(layer=0.75, withdraw=True),
    "attention-free": _Preset(source="features", before=True),
    "external": _Preset(source="given", before=True),
    "random": _Preset(source="random"),
    "uniform": _Preset(source="uniform"),
}


def policy_of(params: PruningParams, num_layers: int, steps: int) -> Policy | None:
    """The policy of a request on a model of num_layers layers with so many denoising steps; None for `none`.

    Raises ValueError, naming knob and value, where the request asks for layers that the model does not have, or for
    what its preset cannot do.
    """
    if params.preset == "none":
        return None
    preset = _PRESETS[params.preset]
    layer = _layer(params, preset, num_layers)
    first_step = params.prune_step if params.prune_step is not None else _part(preset.step, steps)
    count = params.prune_steps if params.prune_steps is not None else preset.steps
    mass = params.attention_mass if params.attention_mass is not None else preset.mass
    rows = params.score_rows if params.score_rows is not None else preset.rows
    if layer is not None and rows == "committed":
        raise ValueError("score_rows committed is known only after a step; leave prune_layer out or take other rows")
    if mass is not None and preset.source in ("random", "uniform"):
        raise ValueError(f"attention_mass needs importance, which pruning {params.preset} has none of")
    withheld = preset.before or preset.withdraw
    return Policy(
        source=preset.source,
        rows=rows,
        layers=_layers(params, layer, preset.withdraw, num_layers),
        before=params.keep_ratio if preset.before else None,
        # The shares fall by the same factor each time.
        shares={} if withheld else {
            first_step + index: params.keep_ratio ** ((index + 1) / count) for index in range(count)
        },
        layer=layer,
        withdraw=preset.withdraw,
        mass=mass,
        min_share=params.min_keep_ratio,
        max_share=params.max_keep_ratio,
        scope=params.prune_scope,
        # A withdrawn token is still there in front of the layer: nobody moves up.
        positions="original" if preset.withdraw else params.positions,
    )  # fmt: skip


def _part(of: int | float, whole: int) -> int:
    return of if isinstance(of, int) else int(whole * of)


def _layer(params: PruningParams, preset: _Preset, num_layers: int) -> int | None:
    """The layer behind which tokens go."""
    if params.prune_layer is None:
        # A preset counts the layers that run on all tokens; its own number may be more than a small model has.
        return None if preset.layer is None else min(max(1, _part(preset.layer, num_layers)), num_layers) - 1
    if preset.source != "attention":
        raise ValueError(f"prune_layer has no meaning with pruning {params.preset}; leave it out")
    if params.prune_layer >= num_layers:
        raise ValueError(
            f"prune_layer must be an integer in [0, {num_layers - 1}] for a model of {num_layers} layers, "
            f"got {params.prune_layer}"
        )
    return params.prune_layer


def _layers(params: PruningParams, layer: int | None, withdraw: bool, num_layers: int) -> tuple[int, int]:
    """Whose attention counts: all layers, or inside a step the one behind which tokens go."""
    if params.score_layers is None:
        return (0, num_layers) if layer is None or withdraw else (layer, layer + 1)
    first, _, last = params.score_layers.partition(":")
    end = num_layers if layer is None or withdraw else layer + 1
    bounds = (int(first), int(last or int(first) + 1))
    if not bounds[0] < bounds[1] <= end:
        raise ValueError(f"score_layers must be layers N or a range A:B within 0:{end}, got {params.score_layers!r}")
    return bounds
