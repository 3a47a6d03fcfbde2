"""Failures of one request inside a worker: logged, put into a sentence, and separated from those of the device."""

from __future__ import annotations

import re

import torch
from vllm.logger import init_logger

from vllm_redvtp.worker.ranks import end_rank

logger = init_logger("vllm.redvtp.failures")

# Message of a request that failed on another tensor-parallel rank, where the error is logged.
OF_ANOTHER_RANK = "failed on another tensor-parallel rank"
# How libraries begin a RuntimeError that says no more than that. Gloo begins with a line of its source.
_OF_THE_DEVICE = re.compile(
    r"(CUDA|HIP|cuda|cu[A-Z]\w+|hip[A-Z]\w+)( driver)? error|Triton Error \[|CU\w+_STATUS_|HIP\w+_STATUS_"
    r"|NCCL|RCCL|\[[^\]]*gloo/"
)
# A larger batch than memory has room for, whichever library says it.
_OUT_OF_MEMORY = re.compile(r"out of memory|_STATUS_ALLOC_FAILED", re.IGNORECASE)


def is_of_device(error: Exception) -> bool:
    """Whether no request can be answered any more: the device, a library on it, or the way to another rank failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError | torch.distributed.DistError):
        return True
    # cuBLAS, NCCL and Triton raise plain RuntimeErrors.
    text = str(error)
    return isinstance(error, RuntimeError) and bool(_OF_THE_DEVICE.match(text)) and not _OUT_OF_MEMORY.search(text)


def raise_if_of_device(error: Exception) -> None:
    """Raises `error` again where the device failed, which ends the engine. Another rank than the first ends itself."""
    if is_of_device(error):
        end_rank(error)
        raise error


def failure_message(request_id: str, error: Exception) -> str:
    """Log the failure of one request. Raises `error` again where it is a failure of the device."""
    raise_if_of_device(error)
    logger.error("request %s failed", request_id, exc_info=error)
    return f"{type(error).__name__}: {error}"
