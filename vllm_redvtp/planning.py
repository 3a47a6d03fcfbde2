"""A served request's plan: sampling parameters and server defaults as engine parameters, then `redvtp.planning`.

The front-end plans to refuse early (HTTP 400), the scheduler to take blocks, the workers to build the sequence. All use
the same numbers and get the same plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams

from redvtp.canvas.draft import draft_tokens
from redvtp.params import DenoisingParams
from redvtp.planning import RequestPlan, plan_request
from redvtp.pruning.resolve import policy_of
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.knob_names import knob_values
from vllm_redvtp.knobs import build_params, canvas_length, default_gen_length, server_defaults
from vllm_redvtp.server_options import option_refusals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec


@dataclass(frozen=True, slots=True)
class ServedRequest:
    """A request as the server runs it.

    plan: what the engine will need.
    report: what travels back with the answer, one of `knobs.REPORTS`.
    """

    plan: RequestPlan
    report: str


def visual_spans(features: Sequence[MultiModalFeatureSpec]) -> tuple[tuple[int, int], ...]:
    """Half-open ranges of the prompt's visual tokens, one for each image of a request in vLLM."""
    places = [feature.mm_position for feature in features]
    return tuple((place.offset, place.offset + place.length) for place in places)


class RequestPlanner:
    """Plans requests for one server configuration."""

    def __init__(self, vllm_config: VllmConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        config = engine_config(vllm_config.model_config)
        self.special = config.special_tokens(tokenizer)
        self._vllm_config = vllm_config
        self._num_layers = config.num_hidden_layers
        self._tokenizer = tokenizer
        self._defaults = server_defaults(vllm_config)
        # A default that fits no request is found here, when the server starts.
        with option_refusals():
            usual = build_params(SamplingParams(temperature=0.0), default_gen_length(self._defaults), self._defaults)
            policy_of(usual.pruning, self._num_layers, usual.denoising)

    @property
    def max_model_len(self) -> int:
        """Longest request. With `--max-model-len auto` vLLM lowers it after this object was made, in every process."""
        return self._vllm_config.model_config.max_model_len

    def plan(
        self,
        sampling: SamplingParams,
        prompt_tokens: int,
        group_lengths: tuple[int, ...],
        request_id: str = "",
        max_tokens: int | None = None,
    ) -> ServedRequest:
        """Raises ValueError, fit for the client, for a request that cannot be served.

        group_lengths: visual tokens of each image.
        max_tokens: the client's, where the caller knows it. Otherwise it is read from `sampling`. There vLLM has
            replaced an unset one by the space left in the context, and the front-end has let no other request with
            that number pass unless `write_gen_length` marked it.
        """
        room = self.max_model_len - prompt_tokens
        if max_tokens is None and sampling.max_tokens != room:
            max_tokens = sampling.max_tokens
        gen_length = canvas_length(max_tokens, sampling, self._defaults, room)
        draft_ids = self._draft(sampling, None if max_tokens is None else gen_length)
        params = build_params(sampling, len(draft_ids) or gen_length, self._defaults, request_id)
        plan = plan_request(
            self._tokenizer,
            params.denoising,
            params.pruning,
            mask_id=self.special.mask_id,
            num_layers=self._num_layers,
            prompt_tokens=prompt_tokens,
            group_lengths=group_lengths,
            max_model_len=self.max_model_len,
            draft_ids=draft_ids,
        )
        return ServedRequest(plan, params.report)

    def _draft(self, sampling: SamplingParams, limit: int | None) -> tuple[int, ...]:
        """The canvas of a request with a draft is the draft, of any length where the client named no limit."""
        draft = knob_values(sampling.extra_args).get("draft", self._defaults.get("draft", ""))
        # Checked before it is tokenised.
        draft = DenoisingParams(draft=draft).draft
        return draft_tokens(self._tokenizer, draft, self.special.mask_id, limit) if draft else ()
