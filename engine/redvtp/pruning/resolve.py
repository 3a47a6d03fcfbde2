"""From a request's knobs to its pruning policy, for the model and the canvas it will meet.

`policy_of` fills in what preset and knobs leave open; `policy_for` also checks it against one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from redvtp.errors import InvalidRequest, Knob
from redvtp.params import DenoisingParams, PruningParams
from redvtp.presets import PRESET_TABLE, Preset
from redvtp.pruning.policy import PROMPT_ROWS, Policy
from redvtp.pruning.scorers import SCORERS
from redvtp.values import refused

# Knobs of how attention is scored, and of the moment: refused where a preset measures none or prunes before all steps.
_OF_ATTENTION = ("score_rows", "score_layers", "attention_mass")
_OF_THE_MOMENT = ("prune_step", "prune_steps")


def policy_for(
    params: PruningParams, denoising: DenoisingParams, num_layers: int, prompt_tokens: int, images: Sequence[int]
) -> Policy | None:
    """The policy of one request, judged as a whole before anything of it is computed.

    prompt_tokens: all of the prompt's, visual ones included. images: visual tokens of each image.
    Raises InvalidRequest as `policy_of`, and where the policy does not go with this prompt or this cache mode.
    """
    policy = policy_of(params, num_layers, denoising)
    visual = sum(images)
    if params.importance and not _takes_request_scores(params.preset):
        raise _idle("importance", params.preset, "; leave it out or take external")
    if policy is None:
        return None
    if policy.scorer.needs_request_scores and len(policy.request_scores) != visual:
        raise InvalidRequest(
            Knob("importance"),
            f" must have one number for each of the {visual:,} visual tokens of the request, "
            f"got {len(policy.request_scores):,}",
        )
    if policy.rows in PROMPT_ROWS and denoising.cache == "prefix_lm":
        raise InvalidRequest(
            Knob("score_rows"),
            f" {policy.rows} needs steps that compute the prompt, and with ",
            Knob("cache"),
            " prefix_lm none does; take masked, response or committed",
        )
    if policy.rows == "prompt" and visual and prompt_tokens == visual:
        reason = " prompt needs text in the prompt, which has none; take masked or response"
        raise InvalidRequest(Knob("score_rows"), reason)
    return policy


def policy_of(params: PruningParams, num_layers: int, denoising: DenoisingParams) -> Policy | None:
    """The policy of a request with these parameters on a model of num_layers layers; None for `none`.

    Raises InvalidRequest, naming knob and value, where the request asks for layers or steps that there are not, or for
    what its preset cannot do.
    """
    if params.preset == "none":
        return None
    preset = PRESET_TABLE[params.preset]
    _refuse_idle(params, preset)
    if params.keep_ratio == 1 and preset.withdraw:
        return None
    layer = _layer(params, preset, num_layers)
    mass = params.attention_mass if params.attention_mass is not None else preset.mass
    rows = params.score_rows if params.score_rows is not None else preset.rows
    if layer is not None and rows == "committed":
        reason = " committed is known only after a step; leave "
        raise InvalidRequest(Knob("score_rows"), reason, Knob("prune_layer"), " out or take other rows")
    withheld = preset.before or preset.withdraw
    decided = None
    if denoising.by_confidence and isinstance(preset.step, float) and params.prune_step is None:
        preset, decided = replace(preset, step=0), preset.step
    return Policy(
        scorer=SCORERS[preset.scorer],
        rows=rows,
        layers=_layers(params, layer, preset.withdraw, num_layers),
        before=params.keep_ratio if preset.before else None,
        moments=() if withheld else _moments(params, preset, denoising.resolved_steps),
        layer=layer,
        withdraw=preset.withdraw,
        # A ratio of 1 keeps everything, whatever the other knobs say.
        mass=None if params.keep_ratio == 1 else mass,
        min_share=params.min_keep_ratio,
        max_share=params.max_keep_ratio,
        scope=params.prune_scope,
        # A withdrawn token is still there in front of the layer: positions stay unchanged.
        positions="original" if preset.withdraw else params.positions,
        request_scores=params.importance,
        decided=decided,
    )


def _takes_request_scores(preset: str) -> bool:
    return preset in PRESET_TABLE and SCORERS[PRESET_TABLE[preset].scorer].needs_request_scores


def _refuse_idle(params: PruningParams, preset: Preset) -> None:
    """Raises InvalidRequest for a knob that would have no effect."""
    reasons: dict[str, str] = {}
    if preset.before:
        reasons |= dict.fromkeys(_OF_THE_MOMENT, "which prunes before the first step")
    if not SCORERS[preset.scorer].measures_attention:
        reasons |= dict.fromkeys(_OF_ATTENTION, "which looks at no attention")
    if preset.withdraw:
        reasons |= dict.fromkeys(_OF_ATTENTION + _OF_THE_MOMENT, "which drops nothing")
    for name, reason in reasons.items():
        if getattr(params, name) is not None:
            raise _idle(name, params.preset, f", {reason}; leave it out")


def _idle(name: str, preset: str, rest: str) -> InvalidRequest:
    return InvalidRequest(Knob(name), " has no meaning with ", Knob("preset"), f" {preset}{rest}")


def _moments(params: PruningParams, preset: Preset, steps: int) -> tuple[tuple[int, float], ...]:
    """(step, share that stays after it). A preset's moment bends to the steps there are, a request's does not."""
    # After the last step nothing is left to prune for.
    last = max(0, steps - 2)
    first = params.prune_step
    if first is None:
        # Half of the steps have been taken after the step that is numbered one less.
        first = min(last, preset.step if isinstance(preset.step, int) else max(0, int(steps * preset.step) - 1))
    elif first > last:
        raise refused("prune_step", f"an integer in [0, {last}] with {steps} denoising steps", first)
    count = params.prune_steps
    if count is None:
        count = min(preset.steps, last + 1 - first)
    elif first + count - 1 > last:
        rule = f"an integer in [1, {last + 1 - first}] from step {first} on with {steps} denoising steps"
        raise refused("prune_steps", rule, count)
    # By the same factor each time.
    return tuple((first + index, params.keep_ratio ** ((index + 1) / count)) for index in range(count))


def _part(of: int | float, whole: int) -> int:
    return of if isinstance(of, int) else int(whole * of)


def _layer(params: PruningParams, preset: Preset, num_layers: int) -> int | None:
    """The layer behind which tokens go."""
    if params.prune_layer is None:
        # A preset counts the layers that run on all tokens; that number may be more than a small model has.
        return None if preset.layer is None else min(max(1, _part(preset.layer, num_layers)), num_layers) - 1
    if not SCORERS[preset.scorer].measures_attention:
        raise _idle("prune_layer", params.preset, "; leave it out")
    if params.prune_layer >= num_layers:
        rule = f"an integer in [0, {num_layers - 1}] for a model of {num_layers} layers"
        raise refused("prune_layer", rule, params.prune_layer)
    return params.prune_layer


def _layers(params: PruningParams, layer: int | None, withdraw: bool, num_layers: int) -> tuple[int, int]:
    """Whose attention counts: all layers, or inside a step the one behind which tokens go."""
    if params.score_layers is None:
        return (0, num_layers) if layer is None or withdraw else (layer, layer + 1)
    first, _, last = params.score_layers.partition(":")
    end = num_layers if layer is None or withdraw else layer + 1
    bounds = (int(first), int(last or int(first) + 1))
    if not bounds[0] < bounds[1] <= end:
        raise refused("score_layers", f"layers N or a range A:B within 0:{end}", params.score_layers)
    return bounds
