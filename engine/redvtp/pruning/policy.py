"""What a preset stands for: a pruning policy is a scorer, a budget, a moment, positions and a scope.

`policy_of` fills a preset's choices in where the request left them open, for the model and the canvas it will meet.
Presets are rows of `_PRESETS`, not classes; every knob of a row can be set by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from redvtp.params import DenoisingParams, PruningParams
from redvtp.pruning.budget import total_to_keep

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
    decided: where nobody knows how many steps there will be, these are counted from the first one that begins with this
    share of the canvas decided; None counts them from the first of all.
    layer: tokens are dropped inside those steps, behind this layer; None is after them.
    withdraw: behind `layer` visual tokens take no part in any step; their pages stay, for the layers in front of it.
    mass: instead of the shares, the smallest set that holds so much of the importance, within min_share and max_share.
    importance: one number for each visual token of the request where the source is `given`.
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
    importance: tuple[float, ...] = ()
    decided: float | None = None

    def visual_at_first(self, images: Sequence[int]) -> int:
        """Visual tokens that the first forward runs on. images: those of each image of the request."""
        return sum(images) if self.before is None else total_to_keep(images, self.before, self.scope)


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


# Knobs that say how attention is scored and when tokens go: of no use where a preset decides neither by attention.
_OF_ATTENTION = ("score_rows", "score_layers", "attention_mass")
_OF_THE_MOMENT = ("prune_step", "prune_steps")
# Rows that a response step reads from pages instead of computing them.
PROMPT_ROWS = ("prompt", "prompt_response")


def policy_for(
    params: PruningParams, denoising: DenoisingParams, num_layers: int, prompt_tokens: int, images: Sequence[int]
) -> Policy | None:
    """The policy of one request, judged as a whole before anything of it is computed.

    prompt_tokens: all of the prompt's, visual ones included. images: visual tokens of each image.
    Raises ValueError as `policy_of`, and where the policy does not go with this prompt or this cache mode.
    """
    policy = policy_of(params, num_layers, denoising)
    visual = sum(images)
    if params.importance and params.preset != "external":
        raise ValueError(f"importance has no meaning with pruning {params.preset}; leave it out or take external")
    if policy is None:
        return None
    if policy.source == "given" and len(policy.importance) != visual:
        raise ValueError(
            f"importance must have one number for each of the {visual:,} visual tokens of the request, "
            f"got {len(policy.importance):,}"
        )
    if policy.rows in PROMPT_ROWS and denoising.cache == "prefix_lm":
        raise ValueError(
            f"score_rows {policy.rows} needs steps that compute the prompt, and with cache prefix_lm none does; "
            "take masked, response or committed"
        )
    if policy.rows == "prompt" and visual and prompt_tokens == visual:
        raise ValueError("score_rows prompt needs text in the prompt, which has none; take masked or response")
    return policy


def policy_of(params: PruningParams, num_layers: int, denoising: DenoisingParams) -> Policy | None:
    """The policy of a request on a model of num_layers layers, decided like this; None for `none`.

    Raises ValueError, naming knob and value, where the request asks for layers or steps that there are not, or for
    what its preset cannot do.
    """
    if params.preset == "none":
        return None
    preset = _PRESETS[params.preset]
    _refuse_idle(params, preset)
    if params.keep_ratio == 1 and preset.withdraw:
        return None
    layer = _layer(params, preset, num_layers)
    mass = params.attention_mass if params.attention_mass is not None else preset.mass
    rows = params.score_rows if params.score_rows is not None else preset.rows
    if layer is not None and rows == "committed":
        raise ValueError("score_rows committed is known only after a step; leave prune_layer out or take other rows")
    withheld = preset.before or preset.withdraw
    decided = None
    if denoising.by_confidence and isinstance(preset.step, float) and params.prune_step is None:
        preset, decided = replace(preset, step=0), preset.step
    return Policy(
        source=preset.source,
        rows=rows,
        layers=_layers(params, layer, preset.withdraw, num_layers),
        before=params.keep_ratio if preset.before else None,
        shares={} if withheld else _shares(params, preset, denoising.resolved_steps),
        layer=layer,
        withdraw=preset.withdraw,
        # A ratio of 1 keeps everything, whatever else is asked.
        mass=None if params.keep_ratio == 1 else mass,
        min_share=params.min_keep_ratio,
        max_share=params.max_keep_ratio,
        scope=params.prune_scope,
        # A withdrawn token is still there in front of the layer: nobody moves up.
        positions="original" if preset.withdraw else params.positions,
        importance=params.importance,
        decided=decided,
    )


def _refuse_idle(params: PruningParams, preset: _Preset) -> None:
    """Raises ValueError for a knob that would be without effect: its user believes in one."""
    idle: tuple[str, ...] = ()
    if preset.source != "attention":
        idle += _OF_ATTENTION
    if preset.before:
        idle += _OF_THE_MOMENT
    if preset.withdraw:
        idle += _OF_ATTENTION + _OF_THE_MOMENT
    for name in idle:
        if getattr(params, name) is not None:
            why = "which prunes before the first step" if preset.before else "which looks at no attention"
            raise ValueError(f"{name} has no meaning with pruning {params.preset}, {why}; leave it out")


def _shares(params: PruningParams, preset: _Preset, steps: int) -> dict[int, float]:
    """{step: share that stays after it}. A preset's own moment bends to the steps there are, a request's does not."""
    # After the last step nothing is left to prune for.
    last = max(0, steps - 2)
    first = params.prune_step
    if first is None:
        # Half of the steps have been taken after the step that is numbered one less.
        first = min(last, preset.step if isinstance(preset.step, int) else max(0, int(steps * preset.step) - 1))
    elif first > last:
        raise ValueError(f"prune_step must be an integer in [0, {last}] with {steps} denoising steps, got {first}")
    count = params.prune_steps
    if count is None:
        count = min(preset.steps, last + 1 - first)
    elif first + count - 1 > last:
        raise ValueError(
            f"prune_steps must be an integer in [1, {last + 1 - first}] from step {first} on with {steps} denoising "
            f"steps, got {count}"
        )
    # By the same factor each time.
    return {first + index: params.keep_ratio ** ((index + 1) / count) for index in range(count)}


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
