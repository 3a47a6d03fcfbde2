"""Small tensors that the host makes for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `numbers` (nested lists) on the device, without waiting for what the device is doing.

    A plain copy to CUDA waits for the stream; one from pinned memory does not.
    """
    made = torch.tensor(numbers, dtype=dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)
