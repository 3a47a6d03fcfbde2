"""A failure of the device is no request's: it is told from others by its message, and it ends the engine."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams

from plugin.requests import runner_of
from redvtp.denoising.step import DenoisingRunner
from vllm_redvtp.worker.failures import failure_message, is_of_device
from vllm_redvtp.worker.runner import DiffusionModelRunner

OF_THE_DEVICE = [
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(handle, ...)`"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA driver error: device-side assert triggered"),
    RuntimeError("cuBLAS error: CUBLAS_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"),
    RuntimeError("NCCL communicator was aborted on rank 1."),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("HIP error: the operation cannot be performed in the present state"),
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"),
    torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited"),
]
OF_A_REQUEST = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
    RuntimeError("planted"),
    ValueError("CUDA error"),
    IndexError("index 4 is out of bounds for dimension 0 with size 3"),
]


def _named(errors: list[Any]) -> list[Any]:
    return [pytest.param(error, id=f"{type(error).__name__}: {str(error)[:40]}") for error in errors]


@pytest.fixture
def spare(llm_factory: Callable[..., LLM]) -> LLM:
    """An engine of its own: what is planted here leaves it in the middle of a step."""
    return llm_factory("tiny-llada-v", max_num_seqs=2)


@pytest.mark.parametrize("error", _named(OF_THE_DEVICE))
def test_a_failure_of_the_device_is_raised_again_and_blames_no_request(spare: LLM, error: Exception) -> None:
    # With the engine of one rank: others end themselves, see one_rank_fails.py.
    assert is_of_device(error)
    with pytest.raises(type(error)):
        failure_message("request-1", error)


@pytest.mark.parametrize("error", _named(OF_A_REQUEST))
def test_another_failure_is_its_requests_message(error: Exception) -> None:
    assert not is_of_device(error)
    assert failure_message("request-1", error) == f"{type(error).__name__}: {error}"


def _add(llm: LLM, *names: str) -> None:
    for name in names:
        sampling = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        llm.llm_engine.add_request(name, {"prompt": "hello"}, sampling)


def _finish(llm: LLM) -> dict[str, Any]:
    finished: dict[str, Any] = {}
    while llm.llm_engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
    return finished


@pytest.mark.parametrize("batch", [("alone",), ("one", "other")], ids=len)
def test_a_step_whose_device_failed_is_not_tried_again(
    spare: LLM, batch: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def fail(self: DenoisingRunner, sequences: list[Any]) -> Any:
        steps.append(len(sequences))
        raise RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`")

    monkeypatch.setattr(DenoisingRunner, "step", fail)
    _add(spare, *batch)
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_EXECUTION_FAILED"):
        spare.llm_engine.step()
    assert steps == [len(batch)]
    # The engine is used again by the next test; vLLM would end here.
    monkeypatch.undo()
    for name in list(runner_of(spare).sequences):
        spare.llm_engine.abort_request([name.split("-")[0]])
    _finish(spare)
    spare.llm_engine.step()


def test_a_retry_has_the_memory_of_the_failed_step(spare: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's traceback kept every tensor of the step alive while the requests were stepped one by one."""
    step = DenoisingRunner.step
    alive: list[bool] = []
    activations: list[weakref.ref[torch.Tensor]] = []

    def fail_once(self: DenoisingRunner, sequences: list[Any]) -> Any:
        if not activations:
            activation = torch.zeros(1 << 20)
            activations.append(weakref.ref(activation))
            raise torch.OutOfMemoryError("planted")
        alive.append(activations[0]() is not None)
        return step(self, sequences)

    monkeypatch.setattr(DenoisingRunner, "step", fail_once)
    _add(spare, "one", "other")
    finished = _finish(spare)
    assert [finished[name].outputs[0].finish_reason for name in ("one", "other")] == ["length"] * 2
    assert alive[0] is False


def test_a_worker_sets_exact_float32_and_leaves_products_to_vllm(
    llm_factory: Callable[..., LLM],
) -> None:
    runner = runner_of(llm_factory("tiny-llada-v"))
    before = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("medium")
        DiffusionModelRunner(runner.vllm_config, runner.device)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
