"""What a request will need, worked out once and the same in the front-end, the scheduler and the workers.

`RequestPlanner.plan` turns a request's sampling parameters and prompt length into engine parameters and a number of
KV tokens. The front-end plans to refuse early (HTTP 400), the scheduler to take blocks, the workers to build the
sequence: all agree without talking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.sampling_params import SamplingParams

from redvtp.canvas.draft import draft_tokens
from redvtp.params import DenoisingParams
from redvtp.pruning.policy import Policy
from redvtp.pruning.resolve import policy_for, policy_of
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.knobs import (
    PREFIX,
    RequestParams,
    build_params,
    canvas_length,
    default_gen_length,
    knob_values,
    server_defaults,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.config import VllmConfig


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """params with the canvas resolved; stop strings, suffix and draft as token ids.

    prompt_tokens: visual tokens included. images: visual tokens of each image. policy: of the pruning, None without.
    """

    params: RequestParams
    policy: Policy | None
    stop_ids: tuple[tuple[int, ...], ...]
    suffix_ids: tuple[int, ...]
    prompt_tokens: int
    images: tuple[int, ...]
    draft_ids: tuple[int, ...] = ()

    @property
    def denoising(self) -> DenoisingParams:
        return self.params.denoising

    @property
    def canvas_tokens(self) -> int:
        """Canvas and suffix."""
        return self.denoising.gen_length + len(self.suffix_ids)

    @property
    def kv_tokens(self) -> int:
        """Blocks for so many tokens are taken at admission: not for those that are dropped before the first forward."""
        dropped = 0 if self.policy is None else sum(self.images) - self.policy.visual_at_first(self.images)
        return self.prompt_tokens - dropped + self.canvas_tokens


class RequestPlanner:
    """Plans requests for one server configuration."""

    def __init__(self, vllm_config: VllmConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        config = engine_config(vllm_config.model_config)
        self.special = config.special_tokens(tokenizer)
        self._num_layers = config.num_hidden_layers
        self._tokenizer = tokenizer
        self._defaults = server_defaults(vllm_config)
        self._max_model_len: int = vllm_config.model_config.max_model_len
        # A default that fits no request is found here, when the server starts.
        usual = build_params(SamplingParams(temperature=0.0), default_gen_length(self._defaults), self._defaults)
        policy_of(usual.pruning, self._num_layers, usual.denoising)

    def plan(
        self,
        sampling: SamplingParams,
        prompt_tokens: int,
        images: tuple[int, ...],
        request_id: str = "",
        asked: int | None = None,
    ) -> RequestPlan:
        """Raises ValueError, fit for the client, for parameters this request may not have.

        images: visual tokens of each image. asked: the client's max_tokens where that is known. Elsewhere it is read
        from `sampling`, where an unset one has become exactly what is left of the context.
        """
        room = self._max_model_len - prompt_tokens
        if asked is None and sampling.max_tokens != room:
            asked = sampling.max_tokens
        gen_length = canvas_length(asked, sampling, self._defaults, room)
        draft_ids = self._draft(sampling, None if asked is None else gen_length)
        params = build_params(sampling, len(draft_ids) or gen_length, self._defaults, request_id)
        return RequestPlan(
            params,
            policy_for(params.pruning, params.denoising, self._num_layers, prompt_tokens, images),
            stop_ids=tuple(self._encode(stop) for stop in params.denoising.stop),
            suffix_ids=self._encode(params.denoising.suffix),
            prompt_tokens=prompt_tokens,
            images=images,
            draft_ids=draft_ids,
        )

    def _draft(self, sampling: SamplingParams, limit: int | None) -> tuple[int, ...]:
        """The canvas of a request with a draft is the draft, of any length where the client named no limit."""
        draft = knob_values(sampling.extra_args).get("draft", self._defaults.get("draft", ""))
        # Judged before it is tokenised.
        draft = DenoisingParams(draft=draft).draft
        return draft_tokens(self._tokenizer, draft, self.special.mask_id, limit) if draft else ()

    def check_fits(self, plan: RequestPlan) -> None:
        """Raises ValueError for a request longer than the model allows, whatever of it is pruned.

        The KV cache holds a request of max_model_len at least: vLLM does not start with less.
        """
        prompt = f"prompt ({plan.prompt_tokens:,} tokens, {sum(plan.images):,} of them visual)"
        parts = f"{prompt} plus gen_length {plan.denoising.gen_length}"
        if plan.suffix_ids:
            parts += f" plus a suffix of {len(plan.suffix_ids)} tokens"
        if plan.prompt_tokens + plan.canvas_tokens > self._max_model_len:
            raise ValueError(
                f"{parts} exceeds max_model_len {self._max_model_len}; "
                "shorten gen_length (max_tokens) or use a smaller image"
            )

    @staticmethod
    def settle(sampling: SamplingParams, gen_length: int) -> None:
        """Write a canvas length into a request's own copy of its parameters, so that nobody resolves it differently."""
        sampling.max_tokens = gen_length
        sampling.extra_args = {**(sampling.extra_args or {}), f"{PREFIX}gen_length": gen_length}

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()
