"""Each place where we work around vLLM 0.32, with a test that fails once vLLM makes the workaround unnecessary.

A failure here after an update is good news: take the shim out, or look what has changed below it. The option
`--plugin` has its test in test_other_models.py, where vLLM runs without us.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import requests
from image_bytes import claimed_png
from PIL.Image import DecompressionBombError
from vllm.config import ModelConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorLogging
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.utils.api_utils import get_max_tokens
from vllm.exceptions import VLLMError
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.image import ImageMediaIO
from vllm.platforms import current_platform
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.serial_utils import MsgpackEncoder
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2


def _calls(function: Callable[..., Any] | type) -> list[ast.Call]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _names(call: ast.Call) -> set[str]:
    """Plain names among a call's arguments."""
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    return {value.id for value in values if isinstance(value, ast.Name)}


def test_prompt_and_parameters_still_meet_in_the_platform_only() -> None:
    """patches.install_request_check: no other hook before the engine sees both."""
    prompts = {"prompt", "engine_input", "encoder_input", "decoder_input"}
    meetings = [
        ast.unparse(call.func)
        for call in _calls(InputProcessor.process_inputs)
        if "params" in _names(call) and _names(call) & prompts
    ]
    assert meetings == ["current_platform.validate_request"]


@pytest.mark.parametrize("interface", [LogitsProcessor, LogitsProcessorV2])
def test_logits_processors_still_do_not_see_the_prompt(interface: type[Any]) -> None:
    """patches.install_request_check: otherwise RequestKnobs could do all the checking."""
    assert list(inspect.signature(interface.validate_params).parameters) == ["sampling_params"]


def test_whether_end_tokens_count_is_still_settled_before_the_scheduler() -> None:
    """scheduler._plan takes them back for a draft: setting ignore_eos there would come too late."""
    assert "ignore_eos" not in inspect.getsource(check_stop)
    assert "eos_token_id" in inspect.getsource(check_stop)


def test_max_tokens_is_still_cut_in_silence() -> None:
    """renderer.DiffusionRenderer asks what the client sent, since vLLM passes on what fits."""
    cut = get_max_tokens(max_model_len=100, max_tokens=90, input_length=50, default_sampling_params={})
    assert cut == 50


def test_decompression_bomb_is_still_no_bad_request() -> None:
    """patches.media_errors_as_refusals: vLLM answers a ValueError with HTTP 400, most other errors with 500."""
    with pytest.raises(DecompressionBombError):
        ImageMediaIO().load_bytes(claimed_png(30_000, 30_000))
    assert not issubclass(DecompressionBombError, ValueError)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("file:///etc/hostname", RuntimeError),
        ("data:image/png,abc", NotImplementedError),
        ("http://127.0.0.1:1/a.png", requests.ConnectionError),
    ],
)
def test_urls_that_cannot_be_loaded_are_still_no_bad_requests(url: str, error: type[Exception]) -> None:
    """patches.media_errors_as_refusals: vLLM answers these with HTTP 500 and 501."""
    with pytest.raises(error):
        MediaConnector().load_from_url(url, ImageMediaIO())
    assert not issubclass(error, ValueError | VLLMError)


def test_half_a_surrogate_pair_still_does_not_reach_the_engine() -> None:
    """refusals.refuse_broken_text: the request cannot be encoded, and AsyncLLM makes an HTTP 500 of any such error."""
    with pytest.raises(UnicodeEncodeError):
        MsgpackEncoder().encode({"redvtp_suffix": "\ud800"})
    assert "raise EngineGenerateError() from" in inspect.getsource(AsyncLLM.generate)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the worker of the CPU platform")
def test_cpu_worker_still_names_its_model_runner() -> None:
    """worker.CpuWorker.init_device: vLLM's worker for CUDA has `_make_model_runner` for this.

    The other names are what ours does too, or needs not do; one more means that our copy has to be looked at.
    """
    from vllm.v1.worker.cpu_worker import CPUWorker

    called = {ast.unparse(call.func) for call in _calls(CPUWorker.init_device)}
    logging = {name for name in called if name.startswith("logger.")}
    assert called - logging == {
        "torch.device",
        # Advice to preload libraries.
        "check_preloaded_libs",
        "os.environ.get",
        "sys.platform.startswith",
        "current_platform.get_cpu_architecture",
        # The name of the process group.
        "init_method.startswith",
        "os.path.basename",
        "init_method.removeprefix",
        "init_method.split",
        "init_worker_distributed_environment",
        "set_random_seed",
        "CPUModelRunner",
        "CPUModelRunnerV2",
    }


def test_cuda_worker_still_has_its_own_extension_point() -> None:
    """worker.GpuWorker overrides it; a renamed one would leave vLLM's runner in place without a word."""
    from vllm.v1.worker.gpu_worker import Worker

    assert "self._make_model_runner" in {ast.unparse(call.func) for call in _calls(Worker)}


def test_flags_still_lose_that_they_were_set() -> None:
    """patches.install_check_of_flags: unset flags are None until this method, and a model's hook runs after it."""
    unset = {field.name for field in fields(EngineArgs) if field.default is None}
    assert {"enable_prefix_caching", "enable_chunked_prefill", "async_scheduling"} <= unset
    source = inspect.getsource(EngineArgs.create_engine_config)
    defaults = source.index("self._set_default_chunked_prefill_and_prefix_caching_args")
    assert source.index("self.create_model_config") < defaults < source.rindex("VllmConfig(")


def test_log_still_fails_on_statistics_without_a_connector() -> None:
    """patches.install_metrics gives it a class to ask, since ours come without a connector."""
    assert "connector_cls" not in inspect.getsource(KVConnectorLogging).split("def ")[0]
    assert "self.connector_cls is not None" in inspect.getsource(KVConnectorLogging.observe)


def test_only_connectors_still_carry_a_dictionary_of_statistics() -> None:
    """metrics: a field for statistics of plugins would be the place for ours."""
    dictionaries = {field.name for field in fields(SchedulerStats) if "Any" in str(field.type)}
    assert dictionaries == {"kv_connector_stats", "ec_connector_stats"}


def test_diffusion_counters_are_still_for_vllms_own_path_only() -> None:
    """metrics.DenoisingProm makes them itself; made twice they would clash."""
    assert "canvas_length" in inspect.getsource(inspect.getattr_static(ModelConfig, "is_diffusion").func)
