"""The front-end's last look at a request: the chat template, and everything that must be a 400 before the engine.

vLLM clamps max_tokens to what is left of the context; for a canvas that would silently change the answer. The
renderer knows what the client asked for and how long the prompt became, so it attaches a check to the rendered
prompt, and vLLM's request validation runs it together with the sampling parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from traceback import walk_tb
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import requests
from PIL.Image import DecompressionBombError
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams

from redvtp.prompt import split_prompt
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.frontend.processing import decode_prompt
from vllm_redvtp.knobs import PREFIX
from vllm_redvtp.planning import RequestPlanner

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers.params import ChatParams, TokenizeParams

CHECK = "redvtp_check"
_MARK = "_redvtp_request_check"
# vLLM's package that fetches and reads images.
_MEDIA = "vllm.multimodal.media"
_ANSWERED_BY_VLLM = (VLLMError, ValueError, TypeError, OverflowError)
_FETCHING = (aiohttp.ClientError, requests.RequestException, ConnectionError, TimeoutError)


class DiffusionRenderer(HfRenderer):
    """vLLM's Hugging Face renderer, with our template and our checks."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._planner = RequestPlanner(config, self.get_tokenizer())
        self._template = engine_config(config.model_config).family.template.text
        install_request_check()

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        with _media_errors():
            return super().render_messages(messages, self._with_template(params))

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        with _media_errors():
            return await super().render_messages_async(messages, self._with_template(params))

    def _with_template(self, params: ChatParams) -> ChatParams:
        """Ours, unless the operator (--chat-template) or the client chose one.

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
        asked = tok_params.max_output_tokens if tok_params is not None else 0
        return self._with_check(cast(dict[str, Any], rendered), partial(self._check, asked=asked or None))

    def _with_check(self, rendered: dict[str, Any], check: Callable[..., None]) -> dict[str, Any]:
        ids: list[int] = rendered["prompt_token_ids"]
        if rendered["type"] == "token":
            # With images the processor has done this; without, a mark would reach the model as text.
            split_prompt(self.get_tokenizer(), decode_prompt(self.get_tokenizer(), ids), num_images=0)
        spans = [span for ranges in rendered.get("mm_placeholders", {}).values() for span in ranges]
        rendered[CHECK] = partial(check, len(ids), tuple(span.length for span in spans))
        return rendered

    def _check(
        self, prompt_tokens: int, images: tuple[int, ...], sampling: SamplingParams, *, asked: int | None = None
    ) -> None:
        """images: visual tokens of each. asked: max_tokens as the client sent it; None where it sent none."""
        try:
            plan = self._planner.plan(sampling, prompt_tokens, images, asked=asked)
            self._planner.check_fits(plan)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="vllm_xargs") from error
        if asked is not None and asked == sampling.max_tokens == self.model_config.max_model_len - prompt_tokens:
            # Further on, a max_tokens that fills the context would read as "unset".
            RequestPlanner.settle(sampling, asked)

    def _check_offline(self, prompt_tokens: int, images: tuple[int, ...], sampling: SamplingParams) -> None:
        """`LLM` shows the caller's own parameters, which may serve other prompts too and must not be written to."""
        asked = sampling.max_tokens
        self._check(prompt_tokens, images, sampling)
        plan = self._planner.plan(sampling, prompt_tokens, images)
        if asked is not None and asked > plan.denoising.gen_length and not plan.draft_ids:
            raise VLLMValidationError(
                f"max_tokens {asked} is all that is left of the context, which vLLM cannot tell from leaving it out; "
                f"pass extra_args {{'{PREFIX}gen_length': {asked}}} instead",
                parameter="max_tokens",
            )


def install_request_check() -> None:
    """Wrap the platform's `validate_request` so that it runs the check a rendered prompt of ours carries.

    It is the only place before the engine where vLLM 0.32 shows a prompt and its sampling parameters together.
    Prompts of other models carry no check. Goes when a renderer or processor may validate the two together.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original: Callable[..., None] = platform.validate_request
    if getattr(original, _MARK, False):
        return

    def validate_request(cls: type, processed_inputs: Any, params: Any) -> None:
        original(processed_inputs, params)
        check = processed_inputs.get(CHECK)
        if check is not None and isinstance(params, SamplingParams):
            check(params)

    setattr(validate_request, _MARK, True)
    platform.validate_request = classmethod(validate_request)  # type: ignore[method-assign, assignment]


class _media_errors:
    """What goes wrong while an image is fetched or read is the request's fault, whatever Python calls it.

    vLLM 0.32 answers with 4xx what is a ValueError, and with 500 or 501 a `file://` URL (RuntimeError), a data URL
    without base64 (NotImplementedError), a host that cannot be reached, a decompression bomb and what else PIL raises
    on broken files; a 500 also closes the connection that other requests of the client use. Whether an error came from
    reading media is seen in its traceback, so that a bug elsewhere stays a 500. Goes when vLLM wraps these itself.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or isinstance(error, (*_ANSWERED_BY_VLLM, MemoryError)):
            return
        if isinstance(error, DecompressionBombError):
            raise VLLMValidationError(f"image refused: {error}") from error
        if any(frame.f_globals.get("__name__", "").startswith(_MEDIA) for frame, _ in walk_tb(traceback)):
            reason = str(error) or type(error).__name__
            if isinstance(error, _FETCHING):
                raise VLLMUnprocessableEntityError(f"image could not be fetched: {reason}") from error
            raise VLLMValidationError(f"image refused: {reason}") from error
