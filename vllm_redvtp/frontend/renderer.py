"""The front-end's renderer: the chat template, and the check that turns a request that cannot be served into a 400.

vLLM cuts max_tokens to the space left in the context; for a canvas that would silently change the answer. The renderer
knows the client's max_tokens and the length of the prompt, so it attaches a check to the rendered prompt. vLLM's
request validation runs it with the sampling parameters (`patches.install_request_check`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from vllm.exceptions import VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams

from redvtp.prompt import split_prompt
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.frontend.processing import decode_prompt
from vllm_redvtp.knob_names import PREFIX, in_request
from vllm_redvtp.knobs import write_gen_length
from vllm_redvtp.patches import CHECK, install_request_check, media_errors_as_refusals
from vllm_redvtp.planning import RequestPlanner, ServedRequest

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers.params import ChatParams, TokenizeParams


class DiffusionRenderer(HfRenderer):
    """vLLM's Hugging Face renderer, with our template and our checks."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._planner = RequestPlanner(config, self.get_tokenizer())
        self._template = engine_config(config.model_config).family.template.text
        install_request_check()

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        with media_errors_as_refusals():
            return super().render_messages(messages, self._with_template(params))

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        with media_errors_as_refusals():
            return await super().render_messages_async(messages, self._with_template(params))

    def _with_template(self, params: ChatParams) -> ChatParams:
        """The family's template, unless the operator (--chat-template) or the client chose one.

        The template in LLaDA's tokenizers is not used: it lacks the system message the models were trained with.
        """
        return params if params.chat_template is not None else replace(params, chat_template=self._template)

    def _process_singleton(
        self, prompt: Any, *, skip_mm_cache: bool = False, tok_params: TokenizeParams | None = None
    ) -> Any:
        rendered = super()._process_singleton(prompt, skip_mm_cache=skip_mm_cache, tok_params=tok_params)
        return self._with_check(cast(dict[str, Any], rendered), self._check_offline)

    async def _process_singleton_async(
        self, prompt: Any, *, skip_mm_cache: bool = False, tok_params: TokenizeParams | None = None
    ) -> Any:
        rendered = await super()._process_singleton_async(prompt, skip_mm_cache=skip_mm_cache, tok_params=tok_params)
        max_tokens = tok_params.max_output_tokens if tok_params is not None else 0
        return self._with_check(cast(dict[str, Any], rendered), partial(self._check, max_tokens=max_tokens or None))

    def _with_check(self, rendered: dict[str, Any], check: Callable[..., None]) -> dict[str, Any]:
        ids: list[int] = rendered["prompt_token_ids"]
        if rendered["type"] == "token":
            # With images the processor has checked the marks; without, a mark would reach the model as text.
            split_prompt(self.get_tokenizer(), decode_prompt(self.get_tokenizer(), ids), num_images=0)
        spans = [span for ranges in rendered.get("mm_placeholders", {}).values() for span in ranges]
        rendered[CHECK] = partial(check, len(ids), tuple(span.length for span in spans))
        return rendered

    def _check(
        self,
        prompt_tokens: int,
        group_lengths: tuple[int, ...],
        sampling: SamplingParams,
        *,
        max_tokens: int | None = None,
    ) -> None:
        """group_lengths: visual tokens of each image. max_tokens: as the client sent it; None where it sent none."""
        request = self._plan(sampling, prompt_tokens, group_lengths, max_tokens)
        # vLLM has filled max_tokens in by now, in parameters that belong to this request. None comes from a caller of
        # AsyncLLM, whose parameters may serve other prompts too.
        if sampling.max_tokens is not None:
            write_gen_length(sampling, request.plan.denoising.gen_length)

    def _check_offline(self, prompt_tokens: int, group_lengths: tuple[int, ...], sampling: SamplingParams) -> None:
        """`LLM` passes the caller's parameters, which may serve other prompts too and must not be written to."""
        plan = self._plan(sampling, prompt_tokens, group_lengths).plan
        max_tokens = sampling.max_tokens
        if max_tokens is not None and max_tokens > plan.denoising.gen_length and not plan.draft_ids:
            raise VLLMValidationError(
                f"max_tokens {max_tokens} is all that is left of the context, which vLLM cannot tell from leaving it "
                f"out; pass extra_args {{'{PREFIX}gen_length': {max_tokens}}} instead",
                parameter="max_tokens",
            )

    def _plan(
        self,
        sampling: SamplingParams,
        prompt_tokens: int,
        group_lengths: tuple[int, ...],
        max_tokens: int | None = None,
    ) -> ServedRequest:
        try:
            return self._planner.plan(sampling, prompt_tokens, group_lengths, max_tokens=max_tokens)
        except ValueError as error:
            raise VLLMValidationError(in_request(error, sampling), parameter="vllm_xargs") from error
