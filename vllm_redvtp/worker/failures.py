"""Failures of one request inside a worker: logged, put into a sentence, and separated from those of the device."""

from __future__ import annotations

import torch
from vllm.logger import init_logger

logger = init_logger("vllm.redvtp.failures")

# Message of a request that failed on another tensor-parallel rank, where the error is logged.
OF_ANOTHER_RANK = "failed on another tensor-parallel rank"


def failure_message(request_id: str, error: Exception) -> str:
    """Log the failure of one request. Raises `error` again where it is a failure of the device."""
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        raise error
    logger.error("request %s failed", request_id, exc_info=error)
    return f"{type(error).__name__}: {error}"
