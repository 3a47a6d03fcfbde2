"""A client's knobs over the server's defaults, as engine parameters.

`knob_names` says which knobs a request may have. `--additional-config '{"redvtp": {...}}'` sets defaults under the same
names without the prefix. The engine's dataclasses check the values, so the command, the server and the offline API
refuse with the same sentence.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.sampling_params import SamplingParams

from redvtp.errors import InvalidRequest
from redvtp.params import BOUNDED_REMASKINGS, PRESET_KNOBS, DenoisingParams, PruningParams
from redvtp.values import check_integer, check_one_of, shown
from vllm_redvtp.knob_names import (
    DENOISING,
    FROM_SAMPLING,
    KNOBS,
    PREFIX,
    PRUNING,
    REPORT,
    check_default_names,
    knob_values,
)
from vllm_redvtp.server_options import OPTIONS, additional_values, option_refusals

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REPORTS = ("none", "summary", "full")
DEFAULT_REPORT = "summary"

_CONFIDENCE_RULES = {"threshold", "min_confidence"}
# A request with one of these chooses how many tokens a step decides.
_DECIDING = _CONFIDENCE_RULES | {"steps", "schedule"}
_OF_ONE_PRESET = {name for name, field in PRUNING.items() if field in PRESET_KNOBS}


@dataclass(frozen=True, slots=True)
class RequestParams:
    """One request in the engine's terms. report: what travels back with the answer, one of REPORTS."""

    denoising: DenoisingParams
    pruning: PruningParams
    report: str


@option_refusals()
def server_defaults(vllm_config: VllmConfig) -> dict[str, Any]:
    """`--additional-config '{"redvtp": {...}}'`. Raises ValueError for an unknown name or value."""
    defaults = {name: value for name, value in additional_values(vllm_config).items() if name not in OPTIONS}
    check_default_names(defaults, OPTIONS)
    build_params(SamplingParams(temperature=0.0), default_gen_length(defaults), defaults)
    return defaults


def misplaced_defaults(vllm_config: VllmConfig) -> list[str]:
    """Keys of `--additional-config` that are most probably our knobs, outside of our part. One word may be anyone's."""
    config = vllm_config.additional_config
    return [name for name in config if name in KNOBS and "_" in name] if isinstance(config, dict) else []


def default_gen_length(defaults: Mapping[str, Any]) -> int:
    """The canvas of a request that names no length."""
    length: int = defaults.get("gen_length", DenoisingParams().gen_length)
    return length


def canvas_length(max_tokens: int | None, sampling: SamplingParams, defaults: Mapping[str, Any], room: int) -> int:
    """The canvas of a request. max_tokens: the client's, None for none. room: tokens left in the context."""
    knob = knob_values(sampling.extra_args).get("gen_length")
    if knob is None:
        # No client chose the default length: near the end of the context it shrinks to the tokens that are left.
        return max(1, min(default_gen_length(defaults), room)) if max_tokens is None else max_tokens
    if max_tokens not in (None, knob):
        raise InvalidRequest(
            f"{PREFIX}gen_length {shown(knob)} differs from max_tokens {max_tokens}; send one of the two"
        )
    return int(DenoisingParams(gen_length=knob).gen_length)


def write_gen_length(sampling: SamplingParams, gen_length: int) -> None:
    """Write the canvas length into a request's parameters, so every process uses the same length.

    From then on max_tokens is not read again: vLLM fills an unset one in, and cuts one that is too long.
    """
    sampling.max_tokens = gen_length
    sampling.extra_args = {**(sampling.extra_args or {}), f"{PREFIX}gen_length": gen_length}


def build_params(
    sampling: SamplingParams, gen_length: int, defaults: Mapping[str, Any], request_id: str = ""
) -> RequestParams:
    """Engine parameters of a request with a canvas of `gen_length` tokens. Raises InvalidRequest naming the knob."""
    knobs = knob_values(sampling.extra_args)
    values = {**defaults, **knobs, "gen_length": gen_length}
    report = values.pop(REPORT, DEFAULT_REPORT)
    check_one_of(REPORT, report, REPORTS)
    if "pruning" in knobs and knobs["pruning"] != defaults.get("pruning", PruningParams().preset):
        # How the server's preset scores and when it prunes does not apply to another preset.
        values = {name: value for name, value in values.items() if name not in _OF_ONE_PRESET or name in knobs}
    pruning = pruning_params({name: values.pop(name) for name in PRUNING if name in values})
    # A server default is meant for canvases of the usual size and shrinks with a shorter one; a client's value does
    # not.
    bending = {name: values.pop(name) for name in ("block_length", "steps") if name in defaults and name not in knobs}
    if not _DECIDING.isdisjoint(knobs) or knobs.get("remasking") not in (None, *BOUNDED_REMASKINGS):
        # The request brings another rule, or a remasking without a confidence in [0, 1].
        values = {name: value for name, value in values.items() if name in knobs or name not in _CONFIDENCE_RULES}
    if not _CONFIDENCE_RULES.isdisjoint(knobs) and "remasking" not in knobs:
        # The server's remasking may have no confidence in [0, 1], which the request's rule needs.
        values = {name: value for name, value in values.items() if name != "remasking" or value in BOUNDED_REMASKINGS}
    denoising = DenoisingParams(
        **values,
        temperature=sampling.temperature,
        # Each tensor-parallel rank draws for itself, so every request needs a seed that is the same on all ranks.
        seed=sampling.seed if sampling.seed is not None else zlib.crc32(request_id.encode()),
        stop=tuple(sampling.stop or ()),
        # An end token in a draft does not end it.
        ignore_eos=sampling.ignore_eos or bool(values.get("draft")),
    )
    denoising = _bend(denoising, bending)
    return RequestParams(denoising, _bend_moment(pruning, denoising.resolved_steps, knobs), report)


def sampling_params(params: RequestParams) -> SamplingParams:
    """The request that `build_params` reads back as `params`, for engines in this process.

    vLLM's front-end takes no part in how it ends: the text is not detokenised, so stop strings are found on the canvas
    alone, as in the embedded engine.
    """
    knobs: dict[str, Any] = {name: getattr(params.denoising, name) for name in DENOISING}
    knobs |= {name: getattr(params.pruning, field) for name, field in PRUNING.items()}
    knobs[REPORT] = params.report
    sampling = SamplingParams(
        max_tokens=params.denoising.gen_length,
        detokenize=False,
        # A clone would run the constructor again, see below. No other request shares these parameters.
        skip_clone=True,
        extra_args={PREFIX + name: value for name, value in knobs.items()},
    )
    # Afterwards: the constructor lifts a temperature to 0.01, forgets a seed of -1, and wants stops detokenised.
    for name in FROM_SAMPLING:
        setattr(sampling, name, getattr(params.denoising, name))
    sampling.stop = list(params.denoising.stop)
    return sampling


def _bend(denoising: DenoisingParams, defaults: Mapping[str, Any]) -> DenoisingParams:
    """`denoising` with the server's block_length and steps, as far as this canvas allows."""
    length = defaults.get("block_length")
    if length is not None:
        check_integer("block_length", length, 1)
        DenoisingParams(gen_length=max(denoising.gen_length, length), block_length=length)
        # The dataclass refuses a client's steps that need longer blocks.
        denoising = replace(denoising, block_length=min(length, denoising.gen_length))
    steps = defaults.get("steps")
    if steps is not None:
        check_integer("steps", steps, 1)
        denoising = replace(denoising, steps=min(max(steps, denoising.num_blocks), denoising.gen_length))
    return denoising


def pruning_params(knobs: Mapping[str, Any]) -> PruningParams:
    """The pruning knobs among these. Raises InvalidRequest for a value that is not allowed."""
    # JSON and vLLM know lists only.
    values: dict[str, Any] = {
        field: tuple(knobs[name]) if isinstance(knobs[name], list) else knobs[name]
        for name, field in PRUNING.items()
        if name in knobs
    }
    return PruningParams(**values)


def _bend_moment(pruning: PruningParams, steps: int, knobs: Mapping[str, Any]) -> PruningParams:
    """`pruning` with the server's prune_step and prune_steps, as far as these steps allow."""
    last = max(0, steps - 2)
    if pruning.prune_step is not None and "prune_step" not in knobs:
        pruning = replace(pruning, prune_step=min(pruning.prune_step, last))
    if pruning.prune_steps is not None and "prune_steps" not in knobs:
        pruning = replace(pruning, prune_steps=max(1, min(pruning.prune_steps, last + 1 - (pruning.prune_step or 0))))
    return pruning
