"""LLaDA-V behind an OpenAI API, as a model of lmms-eval.

lmms-eval's own `openai` model sends the questions too, but not the canvas length, steps, block length and stop strings
that the published scores were measured with, and it scores a failed request as if its error message were the answer.
"""

from __future__ import annotations

import base64
import io
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

# Names of LLaDA-V's own evaluation scripts, as knobs of the server.
_KNOBS = {"block_length": "block_length", "gen_steps": "steps", "remasking": "remasking"}
# What task files of lmms-eval set for other models, and LLaDA-V's evaluation passes over, too.
_WITHOUT_EFFECT = {"max_new_tokens", "until", "do_sample", "num_beams", "top_p", "image_sizes"}
_THINKING = {"think": " /think", "no_think": " /no_think"}


class ServedLladaV(lmms):  # type: ignore[misc]  # lmms-eval has no types
    """base_url: of the server, up to /v1. num_concurrent: requests at a time.

    model: the served name, by default the first one. pruning, keep_ratio, cache, refresh_interval: knobs of
    vllm-redvtp, see docs/knobs.md; those that are not given are the server's defaults.
    """

    is_simple = True

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000/v1",
        model: str | None = None,
        num_concurrent: int = 8,
        timeout: float = 1800,
        batch_size: int | str = 1,
        device: str | None = None,
        **knobs: Any,
    ) -> None:
        super().__init__()
        unknown = set(knobs) - {"pruning", "keep_ratio", "cache", "refresh_interval", "positions"}
        if unknown:
            raise ValueError(f"unknown model_args: {', '.join(sorted(unknown))}")
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=base_url, api_key=key, timeout=float(timeout))
        self._model = model or next(iter(self._client.models.list())).id
        self._clients = int(num_concurrent)
        self._knobs = {f"redvtp_{name}": value for name, value in knobs.items()}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, in order. A request that the server refuses ends the evaluation: it has no score."""
        with ThreadPoolExecutor(self._clients) as threads, tqdm(total=len(requests), desc="Model Responding") as bar:

            def answer(request: Instance) -> str:
                text = self._answer(request)
                bar.update()
                return text

            futures = [threads.submit(answer, request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("a diffusion model has no likelihood token by token; take tasks that generate")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("tasks of several rounds are not supported")

    def _answer(self, request: Instance) -> str:
        context, kwargs, doc_to_visual, doc_id, task, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        content = [{"type": "image_url", "image_url": {"url": _data_url(visual)}} for visual in visuals]
        options, suffix = protocol(kwargs)
        content.append({"type": "text", "text": context.replace("<image>", "").strip() + suffix})
        options["extra_body"]["vllm_xargs"] |= self._knobs
        messages: Any = [{"role": "user", "content": content}]
        response = self._client.chat.completions.create(model=self._model, messages=messages, **options)
        # The published evaluation takes one final full stop off, too.
        return (response.choices[0].message.content or "").strip().removesuffix(".")


def protocol(kwargs: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """`--gen_kwargs` as LLaDA-V's scripts write them: (keywords of the API, text after the question).

    Raises ValueError for what has no counterpart, so that no score is measured with something else than it says.
    """
    given = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    if "gen_length" not in given:
        raise ValueError('--gen_kwargs must have a "gen_length", the length of the canvas; see the README beside this')
    thinking = given.pop("think_mode", None)
    if thinking not in (None, *_THINKING):
        raise ValueError(f"think_mode must be one of {', '.join(_THINKING)}, got {thinking!r}")
    if given.pop("cfg", 0):
        raise ValueError("cfg (classifier-free guidance) is not supported; the published evaluations have it at 0")
    stop = given.pop("stopping_criteria", [])
    options = {
        "max_tokens": given.pop("gen_length"),
        "temperature": given.pop("temperature", 0),
        # On lmms-eval's command line there are no lists, and a line break is hard to write.
        "stop": [stop.replace("\\n", "\n")] if isinstance(stop, str) else stop,
    }
    knobs = {f"redvtp_{knob}": given.pop(name) for name, knob in _KNOBS.items() if name in given}
    if given:
        raise ValueError(f"unknown gen_kwargs: {', '.join(sorted(given))}")
    return {**options, "extra_body": {"vllm_xargs": knobs}}, _THINKING.get(thinking or "", "")


def _data_url(visual: Any) -> str:
    if not isinstance(visual, Image.Image):
        raise ValueError(f"only images are supported, got {type(visual).__name__}")
    file = io.BytesIO()
    visual.convert("RGB").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
