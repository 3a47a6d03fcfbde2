"""The device that an engine computes on: its choice, what is set in torch for it, and small tensors on their way to it.

A plain copy to CUDA waits until the device has done all it was given; one from pinned memory does not. What a step
sends goes through `to_device`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from redvtp.values import refused


def named_device(name: str | None) -> torch.device:
    """The device of that name: cpu, cuda or cuda:N; for None a GPU if torch finds one, else the CPU.

    Raises InvalidRequest naming those that are there.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{index}" for index in range(cards))]
    if cards and name in (None, "cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    if name is None or name in there:
        return torch.device(name or "cpu")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    why = "" if cards else f"; torch {torch.__version__}, built for {build}, finds no GPU here"
    raise refused("device", f"one of {', '.join(there)}", name, why)


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, kernels are launched on this device. torch goes by its tensors, Triton by the current device alone."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def configure_torch(exact_products: bool) -> None:
    """What is set for the whole process wherever an engine or a worker starts. It changes nothing on a CPU.

    exact_products: also of float32 matrix products. vLLM sets their precision itself, as its user says.
    """
    # cuDNN's attention keeps a plan for every shape it has met and forgets none. Lengths here differ at every step, so
    # its memory would grow without end. torch has other kernels.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # By default torch computes float32 convolutions with 10 bits (TF32): the patch embedding of the vision tower.
    torch.backends.cudnn.allow_tf32 = False
    if exact_products:
        # The default, unless the environment says otherwise (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
        torch.set_float32_matmul_precision("highest")


def on_device(numbers: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `numbers` (nested lists) on the device."""
    return to_device(torch.tensor(numbers, dtype=dtype), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device; the same tensor where that is the host."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
