"""Small tensors on their way to the device.

A plain copy to CUDA waits until the device has done all it was given; one from pinned memory does not. What a step
sends goes through here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `numbers` (nested lists) on the device."""
    return to_device(torch.tensor(numbers, dtype=dtype), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the same tensor where that is the host."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
