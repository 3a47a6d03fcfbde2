"""The engine `vllm` of the `redvtp` command: one request through vLLM, in this process.

    redvtp generate CHECKPOINT --image photo.jpg --prompt "What is shown?" --engine vllm

Found under the entry point group `redvtp.engines`. Its trace is the same as the embedded engine's. It is read from the
full report that the scheduler sends with an answer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from tqdm import tqdm

from redvtp.engines import EngineOptions
from redvtp.errors import BadInput, InvalidRequest, Knob, refusing
from redvtp.families.config import DvlmConfig, load_config
from redvtp.models.loading import check_weight_files
from redvtp.request import Request
from redvtp.trace import Trace, trace_of_report
from vllm_redvtp.quiet import environment, logs_on_stderr, start_up_noise

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

# Saves the seconds that a second process for vLLM's engine would take to start.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def vllm_engine(options: EngineOptions, request: Request) -> Trace:
    """`vllm.LLM` for one request. Raises BadInput for a request or a checkpoint that it cannot serve."""
    with refusing():
        # vLLM refuses these too, but seconds later and with other messages.
        config = load_config(options.model)
        config.special_tokens(config.family.load_tokenizer(options.model))
        check_weight_files(options.model)
    if options.progress:
        print("starting vLLM ...", file=sys.stderr, flush=True)
    with logs_on_stderr(), environment(_IN_PROCESS):
        with start_up_noise(BadInput), vllm_refusing():
            llm = _start(options, config)
        try:
            with vllm_refusing():
                _enqueue(llm, request)
            output = _run(llm, request.denoising.resolved_steps, options.progress)
        finally:
            llm.llm_engine.engine_core.shutdown()
    return _trace(options.model, request, output)


def _start(options: EngineOptions, config: DvlmConfig) -> LLM:
    from vllm import LLM
    from vllm.platforms import current_platform

    from vllm_redvtp import register

    refuse_device(options.device, current_platform.device_type)
    # If VLLM_PLUGINS names other plugins, vLLM does not load this one.
    register()
    # "auto" is the checkpoint's type for `redvtp`; vLLM takes bfloat16 instead of float32.
    dtype: Any = config.torch_dtype if options.dtype == "auto" else options.dtype
    return LLM(
        options.model,
        dtype=dtype,
        max_model_len=options.max_model_len or config.max_length,
        block_size=options.block_size,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        additional_config={"redvtp": {"attention": options.attention}},
        max_num_seqs=1,
        disable_log_stats=True,
        use_tqdm_on_load=False,
    )


def refuse_device(name: str | None, here: str) -> None:
    """Raises BadInput for a device that vLLM would not take. here: the kind it is built for, "cpu" or "cuda"."""
    if name in (None, here, f"{here}:0"):
        return
    if name.startswith(f"{here}:"):
        index = name.partition(":")[2]
        end = f"takes the first GPU that it sees; set CUDA_VISIBLE_DEVICES={index} instead"
    else:
        end = f"is built for {here} here; leave it out, or use --engine local"
    raise BadInput(Knob("device"), f" {name} cannot be used: vLLM {end}")


def _enqueue(llm: LLM, request: Request) -> None:
    from vllm_redvtp.knobs import RequestParams, sampling_params

    prompt: Any = {"prompt": request.prompt}
    if request.images:
        prompt["multi_modal_data"] = {"image": list(request.images)}
    sampling = sampling_params(RequestParams(request.denoising, request.pruning, report="full"))
    llm.enqueue([prompt], sampling, use_tqdm=False)


def _run(llm: LLM, steps: int, progress: bool) -> RequestOutput:
    """Runs the request to its end. Each engine step is a denoising step; a stop string takes one more."""
    from vllm import RequestOutput

    with tqdm(total=steps, desc="denoising", unit="step", disable=not progress) as bar:
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            bar.update(min(1, steps - bar.n))
            for output in outputs:
                if output.finished:
                    assert isinstance(output, RequestOutput)
                    bar.update(steps - bar.n)
                    return output
    raise RuntimeError("vLLM ended without an answer")


def _trace(model: str, request: Request, output: RequestOutput) -> Trace:
    completion = output.outputs[0]
    if completion.finish_reason == "error" or output.kv_transfer_params is None:
        raise RuntimeError(f"vLLM could not answer: {completion.stop_reason or 'no reason given'}")
    report: Mapping[str, Any] = output.kv_transfer_params["redvtp"]
    last = report["trace"][-1]
    tokenizer = load_config(model).family.load_tokenizer(model)
    suffix: list[int] = tokenizer.encode(request.denoising.suffix, add_special_tokens=False)
    output_ids = [*last["canvas"][: last["answer_length"]], *suffix]
    return trace_of_report(
        model,
        report["trace"],
        prompt_tokens=report["prompt_tokens"],
        visual_spans=report["visual_spans"],
        output_ids=output_ids,
        text=str(tokenizer.decode(output_ids, skip_special_tokens=True)),
        finish_reason=last["finish_reason"],
    )


@contextmanager
def vllm_refusing() -> Iterator[None]:
    """`refusing`, for vLLM's kinds of errors as well."""
    from vllm.exceptions import VLLMClientError

    try:
        with refusing():
            yield
    except VLLMClientError as error:
        cause = error.__cause__
        # Its str() adds the names of vLLM's parameters; the command has its own names for knobs.
        parts = cause.parts if isinstance(cause, InvalidRequest) else (str(error.args[0]),)
        raise BadInput(*parts) from error
    except BadInput as error:
        if isinstance(error.__cause__, ValidationError):
            reasons = [str(part["msg"]).removeprefix("Value error, ") for part in error.__cause__.errors()]
            raise BadInput("; ".join(reasons)) from error
        raise
