"""Whether a kernel of our own runs on a tensor's device."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

from torch import Tensor


def runs_kernels(tensor: Tensor) -> bool:
    """True on CUDA (and ROCm, which torch calls cuda), and in Triton's interpreter, which takes tensors of the CPU."""
    return _has_triton() and (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
