"""A client's knobs, over the server's defaults, as engine parameters.

A knob comes in `vllm_xargs` (HTTP) or `SamplingParams.extra_args` (offline). It is a field of the engine's
DenoisingParams or PruningParams with the prefix `redvtp_`; a new field is a new knob. `--additional-config
'{"redvtp": {...}}'` sets defaults under the same names without the prefix. Values are judged by the engine's
dataclasses, so every way in refuses with the same sentence; `RequestKnobs` makes vLLM's front-end ask before a
request is queued.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from redvtp.models.visual_cache import DEFAULT_CACHE_BYTES
from redvtp.params import BOUNDED_REMASKINGS, PRESET_KNOBS, DenoisingParams, PruningParams, shown

if TYPE_CHECKING:
    from vllm.config import VllmConfig

PREFIX = "redvtp_"
REPORTS = ("none", "summary", "full")
DEFAULT_REPORT = "summary"

# vLLM has its own names for these. gen_length is both: max_tokens, and a knob for who wants to be exact.
_FROM_SAMPLING = {"temperature", "seed", "stop", "ignore_eos"}
_DENOISING = {field.name for field in fields(DenoisingParams)} - _FROM_SAMPLING
_CONFIDENCE_RULES = {"threshold", "min_confidence"}
# A request with one of these says itself how many tokens a step decides.
_DECIDING = _CONFIDENCE_RULES | {"steps", "schedule"}
# `preset` alone would not say of what.
_PRUNING = {"pruning" if field.name == "preset" else field.name: field.name for field in fields(PruningParams)}
_OF_ONE_PRESET = {name for name, field in _PRUNING.items() if field in PRESET_KNOBS}
KNOBS = tuple(sorted(_DENOISING | set(_PRUNING) | {"report"}))
# Of the server only, no request can ask for another.
VISION_CACHE_GB = "vision_cache_gb"
ATTENTION = "attention"
ATTENTIONS = ("auto", "torch", "cpu")


@dataclass(frozen=True, slots=True)
class RequestParams:
    """One request in the engine's terms. report: how much of its story travels back with the answer."""

    denoising: DenoisingParams
    pruning: PruningParams
    report: str


def knob_values(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The redvtp knobs among a request's extra arguments, prefix removed. Raises ValueError for an unknown one.

    Other names are other people's, unless they are ours without the prefix or in another spelling: a knob that is
    silently without effect costs its user more than a refusal.
    """
    values = {}
    for name, value in (extra_args or {}).items():
        knob = name.removeprefix(PREFIX)
        if name.startswith(PREFIX) and knob in KNOBS:
            values[knob] = value
            continue
        meant = name.lower().replace("-", "_").removeprefix(PREFIX)
        if meant in KNOBS:
            raise ValueError(f"unknown knob {shown(name)}; did you mean {PREFIX}{meant}?")
        if name.lower().startswith(PREFIX):
            raise ValueError(f"unknown knob {shown(name)}; allowed: {', '.join(PREFIX + each for each in KNOBS)}")
    return values


def server_defaults(vllm_config: VllmConfig) -> dict[str, Any]:
    """`--additional-config '{"redvtp": {...}}'`. Raises ValueError for an unknown name or value."""
    config = vllm_config.additional_config
    defaults = config.get("redvtp", {}) if isinstance(config, dict) else {}
    if not isinstance(defaults, dict):
        raise ValueError(f"additional_config 'redvtp' must be an object of knobs, got {defaults!r}")
    defaults = {name: value for name, value in defaults.items() if name not in (VISION_CACHE_GB, ATTENTION)}
    for name in defaults:
        if name not in KNOBS:
            allowed = ", ".join((*KNOBS, VISION_CACHE_GB, ATTENTION))
            raise ValueError(f"additional_config has an unknown redvtp knob {name!r}; allowed: {allowed}")
    build_params(SamplingParams(temperature=0.0), default_gen_length(defaults), defaults)
    return defaults


def vision_cache_bytes(vllm_config: VllmConfig) -> int:
    """How much of visual tokens a worker remembers: `vision_cache_gb` (GiB) of the server. Raises ValueError for a
    size that is none."""
    size = _server_option(vllm_config, VISION_CACHE_GB, DEFAULT_CACHE_BYTES / (1 << 30))
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 <= size < float("inf"):
        raise ValueError(f"{VISION_CACHE_GB} must be a number of GiB, 0 for no cache, got {size!r}")
    return int(size * (1 << 30))


def attention_asked(vllm_config: VllmConfig) -> str:
    """The server's `attention`, one of ATTENTIONS. Raises ValueError for another."""
    asked: str = _server_option(vllm_config, ATTENTION, "auto")
    if asked not in ATTENTIONS:
        raise ValueError(f"{ATTENTION} must be one of {', '.join(ATTENTIONS)}, got {asked!r}")
    return asked


def _server_option(vllm_config: VllmConfig, name: str, default: Any) -> Any:
    config = vllm_config.additional_config
    told = config.get("redvtp", {}) if isinstance(config, dict) else {}
    return told.get(name, default)


def default_gen_length(defaults: Mapping[str, Any]) -> int:
    """The canvas of a request that names no length."""
    length: int = defaults.get("gen_length", DenoisingParams().gen_length)
    return length


def canvas_length(asked: int | None, sampling: SamplingParams, defaults: Mapping[str, Any], room: int) -> int:
    """The canvas of a request whose client asked for `asked` tokens (None: it did not say) with space for `room`."""
    knob = knob_values(sampling.extra_args).get("gen_length")
    if knob is None:
        # The default is nobody's explicit wish: near the end of the context it takes what is left.
        return max(1, min(default_gen_length(defaults), room)) if asked is None else asked
    if asked not in (None, knob):
        raise ValueError(f"{PREFIX}gen_length {shown(knob)} differs from max_tokens {asked}; send one of the two")
    return int(DenoisingParams(gen_length=knob).gen_length)


def build_params(
    sampling: SamplingParams, gen_length: int, defaults: Mapping[str, Any], request_id: str = ""
) -> RequestParams:
    """Engine parameters of a request with a canvas of `gen_length` tokens. Raises ValueError naming knob and value."""
    knobs = knob_values(sampling.extra_args)
    values = {**defaults, **knobs, "gen_length": gen_length}
    report = values.pop("report", DEFAULT_REPORT)
    if report not in REPORTS:
        raise ValueError(f"report must be one of {', '.join(REPORTS)}, got {shown(report)}")
    if "pruning" in knobs and knobs["pruning"] != defaults.get("pruning", PruningParams().preset):
        # How the server's own preset scores and when it prunes says nothing about another one.
        values = {name: value for name, value in values.items() if name not in _OF_ONE_PRESET or name in knobs}
    pruning = _pruning({name: values.pop(name) for name in _PRUNING if name in values})
    # A server default is a wish for canvases of the usual size; a shorter one takes what fits of it. A client's own
    # value never bends.
    bending = {name: values.pop(name) for name in ("block_length", "steps") if name in defaults and name not in knobs}
    if not _DECIDING.isdisjoint(knobs) or knobs.get("remasking", BOUNDED_REMASKINGS[0]) not in BOUNDED_REMASKINGS:
        # The request has a rule of its own, or none that a confidence could follow.
        values = {name: value for name, value in values.items() if name in knobs or name not in _CONFIDENCE_RULES}
    denoising = DenoisingParams(
        **values,
        temperature=sampling.temperature,
        # Tensor-parallel ranks draw each for themselves, so every request has a seed that they agree on.
        seed=sampling.seed if sampling.seed is not None else zlib.crc32(request_id.encode()),
        stop=tuple(sampling.stop or ()),
        # What stands behind an end token in a draft was asked for.
        ignore_eos=sampling.ignore_eos or bool(values.get("draft")),
    )
    denoising = _bend(denoising, bending)
    return RequestParams(denoising, _bend_moment(pruning, denoising.resolved_steps, knobs), report)


def sampling_params(params: RequestParams) -> SamplingParams:
    """The request that `build_params` reads back as `params`, for engines in this process.

    vLLM's front-end takes no part in how it ends: the text is not detokenised, so stop strings are found on the canvas
    alone, as in the embedded engine.
    """
    knobs: dict[str, Any] = {name: getattr(params.denoising, name) for name in _DENOISING}
    knobs |= {name: getattr(params.pruning, field) for name, field in _PRUNING.items()}
    knobs["report"] = params.report
    sampling = SamplingParams(
        max_tokens=params.denoising.gen_length,
        detokenize=False,
        # A clone would be made by the constructor, see below. The request has these parameters to itself.
        skip_clone=True,
        extra_args={PREFIX + name: value for name, value in knobs.items()},
    )
    # Afterwards: the constructor lifts a temperature to 0.01, forgets a seed of -1, and wants stops detokenised.
    for name in _FROM_SAMPLING:
        setattr(sampling, name, getattr(params.denoising, name))
    sampling.stop = list(params.denoising.stop)
    return sampling


def _bend(denoising: DenoisingParams, wishes: Mapping[str, Any]) -> DenoisingParams:
    """The server's block_length and steps, as far as this canvas allows."""
    length = wishes.get("block_length")
    if length is not None:
        DenoisingParams(gen_length=max(denoising.gen_length, _positive("block_length", length)), block_length=length)
        # Steps of the client's own that need longer blocks are refused by the dataclass, as they should be.
        denoising = replace(denoising, block_length=min(length, denoising.gen_length))
    steps = wishes.get("steps")
    if steps is not None:
        _positive("steps", steps)
        denoising = replace(denoising, steps=min(max(steps, denoising.num_blocks), denoising.gen_length))
    return denoising


def _pruning(knobs: Mapping[str, Any]) -> PruningParams:
    # JSON and vLLM know lists only.
    values: dict[str, Any] = {
        _PRUNING[name]: tuple(value) if isinstance(value, list) else value for name, value in knobs.items()
    }
    return PruningParams(**values)


def _bend_moment(pruning: PruningParams, steps: int, knobs: Mapping[str, Any]) -> PruningParams:
    """The server's prune_step and prune_steps, as far as these steps allow."""
    last = max(0, steps - 2)
    if pruning.prune_step is not None and "prune_step" not in knobs:
        pruning = replace(pruning, prune_step=min(pruning.prune_step, last))
    if pruning.prune_steps is not None and "prune_steps" not in knobs:
        pruning = replace(pruning, prune_steps=max(1, min(pruning.prune_steps, last + 1 - (pruning.prune_step or 0))))
    return pruning


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {shown(value)}")
    return value


# What vLLM can be asked for and a canvas cannot give (docs/knobs.md says why): its name, and whether it was asked for.
# top_p, top_k and min_p change nothing at temperature 0, and many clients always send them.
_UNSUPPORTED: dict[str, Callable[[SamplingParams], bool]] = {
    "logprobs (and beam search, which needs them)": lambda asked: (
        asked.logprobs is not None or asked.logprob_token_ids is not None
    ),
    "prompt_logprobs (and echo in a chat, which asks for them)": lambda asked: (
        asked.prompt_logprobs is not None or asked.prompt_logprob_token_ids is not None
    ),
    "response_format (and any other structured output, forced tool calls among them)": lambda asked: (
        asked.structured_outputs is not None
    ),
    "logit_bias": lambda asked: bool(asked.logit_bias),
    "min_tokens": lambda asked: bool(asked.min_tokens),
    "allowed_token_ids": lambda asked: asked.allowed_token_ids is not None,
    "bad_words": lambda asked: bool(asked.bad_words),
    "presence_penalty": lambda asked: bool(asked.presence_penalty),
    "frequency_penalty": lambda asked: bool(asked.frequency_penalty),
    "repetition_penalty": lambda asked: asked.repetition_penalty != 1.0,
    "top_p below 1 with a temperature": lambda asked: asked.temperature > 0 and asked.top_p < 1.0,
    "top_k with a temperature": lambda asked: asked.temperature > 0 and asked.top_k > 0,
    "min_p with a temperature": lambda asked: asked.temperature > 0 and asked.min_p > 0.0,
}


def refuse_unsupported(sampling: SamplingParams) -> None:
    """Raises VLLMValidationError for a sampling option that has no meaning, or none yet, where a canvas is denoised."""
    for option, asked in _UNSUPPORTED.items():
        if asked(sampling):
            raise VLLMValidationError(
                f"{option} is not supported by diffusion decoding; leave it out", parameter=option.partition(" ")[0]
            )


def refuse_broken_text(value: Any, name: str = "vllm_xargs") -> None:
    """Raises ValueError for half a surrogate pair anywhere in a request's extra arguments.

    JSON can spell one, but vLLM's message to the engine cannot carry it, and would end as HTTP 500.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{name} must be valid Unicode, got {shown(value)}") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_broken_text(key, name)
            refuse_broken_text(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_broken_text(item, name)


class RequestKnobs(LogitsProcessor, LogitsProcessorV2):
    """vLLM calls `validate_params` of its logits processor classes for each request; an error there is an HTTP 400.

    It is never instantiated, our runner samples by itself. vLLM's two model runners each demand their own base class.
    Here only what needs no prompt and no server defaults is judged; `vllm_redvtp.planning` sees the rest.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        refuse_unsupported(sampling_params)
        try:
            knobs = knob_values(sampling_params.extra_args)
            refuse_broken_text(sampling_params.extra_args or {})
            _pruning({name: knobs[name] for name in _PRUNING if name in knobs})
        except ValueError as error:
            # The value is in the message and not in `value=`: a NaN there cannot be written as JSON.
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error

    def __init__(self, *args: Any) -> None:
        raise NotImplementedError("RequestKnobs only validates; the model runner of vllm-redvtp samples by itself")

    def apply(self, *args: Any) -> Any:
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        raise NotImplementedError

    def update_state(self, batch_update: Any) -> None:
        raise NotImplementedError
