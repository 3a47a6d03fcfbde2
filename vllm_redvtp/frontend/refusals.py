"""What a request may not say: sampling options without a meaning here, broken text, knobs with values out of range.

vLLM's front-end calls `RequestKnobs` for every request before it is queued, so each refusal is an HTTP 400.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from redvtp.errors import InvalidRequest
from redvtp.values import shown
from vllm_redvtp.knob_names import in_request, knob_values
from vllm_redvtp.knobs import pruning_params

# Sampling options that a canvas has no meaning for (docs/knobs.md says why): name, and whether a request uses it.
# top_p, top_k and min_p change nothing at temperature 0, and many clients always send them.
_UNSUPPORTED: dict[str, Callable[[SamplingParams], bool]] = {
    "logprobs (and beam search, which needs them)": lambda sampling: (
        sampling.logprobs is not None or sampling.logprob_token_ids is not None
    ),
    "prompt_logprobs (and echo in a chat, which asks for them)": lambda sampling: (
        sampling.prompt_logprobs is not None or sampling.prompt_logprob_token_ids is not None
    ),
    "response_format (and any other structured output, forced tool calls among them)": lambda sampling: (
        sampling.structured_outputs is not None
    ),
    "logit_bias": lambda sampling: bool(sampling.logit_bias),
    "min_tokens": lambda sampling: bool(sampling.min_tokens),
    "allowed_token_ids": lambda sampling: sampling.allowed_token_ids is not None,
    "bad_words": lambda sampling: bool(sampling.bad_words),
    "presence_penalty": lambda sampling: bool(sampling.presence_penalty),
    "frequency_penalty": lambda sampling: bool(sampling.frequency_penalty),
    "repetition_penalty": lambda sampling: sampling.repetition_penalty != 1.0,
    "top_p below 1 with a temperature": lambda sampling: sampling.temperature > 0 and sampling.top_p < 1.0,
    "top_k with a temperature": lambda sampling: sampling.temperature > 0 and sampling.top_k > 0,
    "min_p with a temperature": lambda sampling: sampling.temperature > 0 and sampling.min_p > 0.0,
}


def refuse_unsupported(sampling: SamplingParams) -> None:
    """Raises VLLMValidationError for a sampling option that diffusion decoding does not support."""
    for option, uses in _UNSUPPORTED.items():
        if uses(sampling):
            raise VLLMValidationError(
                f"{option} is not supported by diffusion decoding; leave it out", parameter=option.partition(" ")[0]
            )


def refuse_broken_text(value: Any, name: str = "vllm_xargs") -> None:
    """Raises InvalidRequest for half a surrogate pair anywhere in a request's extra arguments.

    JSON can spell one, but vLLM's message to the engine cannot carry it, and would end as HTTP 500.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{name} must be valid Unicode, got {shown(value)}") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            refuse_broken_text(key, name)
            refuse_broken_text(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            refuse_broken_text(item, name)


class RequestKnobs(LogitsProcessor, LogitsProcessorV2):
    """vLLM calls `validate_params` of its logits processor classes for each request; an error there is an HTTP 400.

    It is never instantiated: our runner samples without vLLM's logits processors. vLLM's two model runners each demand
    a base class. Only what needs neither prompt nor server defaults is checked here; `frontend.renderer` does the rest.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        refuse_unsupported(sampling_params)
        try:
            knobs = knob_values(sampling_params.extra_args)
            refuse_broken_text(sampling_params.extra_args or {})
            pruning_params(knobs)
        except ValueError as error:
            # The value is in the message and not in `value=`: a NaN there cannot be written as JSON.
            raise VLLMValidationError(in_request(error, sampling_params), parameter="vllm_xargs") from error

    def __init__(self, *args: Any) -> None:
        raise NotImplementedError("RequestKnobs only validates; vllm-redvtp samples in its model runner")

    def apply(self, *args: Any) -> Any:
        raise NotImplementedError

    def is_argmax_invariant(self) -> bool:
        raise NotImplementedError

    def update_state(self, batch_update: Any) -> None:
        raise NotImplementedError
