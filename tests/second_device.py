"""A second device, for tests of where tensors are: it computes on the CPU and refuses what a graphics card refuses.

    prepare()                # first of all, in a process of its own
    with SecondDevice():
        torch.zeros(3, device=DEVICE) + torch.zeros(3)    # RuntimeError

Tensors on DEVICE are ordinary CPU tensors in a wrapper. An operation on tensors of both devices is an error, with
CUDA's exceptions: copies, numbers without dimensions, and indices from the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# The kind of device that torch keeps for such things.
DEVICE = torch.device("privateuseone", 0)
_HOST = torch.device("cpu")
_make_tensor = torch.tensor
# These take tensors of both devices.
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
# These take indices from the host.
_INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")


def prepare() -> None:
    """Make torch ready for DEVICE, for good. Before the engine is imported."""
    _setup_privateuseone_for_python_backend()
    # Wrappers cannot be inference tensors.
    torch.inference_mode = torch.no_grad  # type: ignore[misc, assignment]
    # torch fills memory of the device directly, without a word to Python.
    torch.tensor = _tensor_by_copy  # type: ignore[assignment]


def _tensor_by_copy(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    made = _make_tensor(data, dtype=dtype)
    return made if device is None else made.to(device)


class OnDevice(Tensor):
    """A tensor on DEVICE. numbers: the same on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, numbers.stride(), numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )
        made.numbers = numbers
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    # As `_tensor_by_copy`.
    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_with_tensors(index), value)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(function, args, dict(kwargs or {}))


def _with_tensors(index: Any) -> Any:
    """An index whose lists are tensors on DEVICE, where torch would put them."""
    if isinstance(index, tuple):
        return tuple(map(_with_tensors, index))
    return OnDevice(torch.tensor(index)) if isinstance(index, list) else index


class SecondDevice(TorchDispatchMode):
    """Within it, tensors can also be made on DEVICE."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(function, args, dict(kwargs or {}))


def _computed(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
    _check_devices(function.name().partition(".")[0], tensors)
    device = kwargs.get("device")
    if device is None:
        ours = any(isinstance(each, OnDevice) for each in tensors)
    else:
        ours = torch.device(device).type == DEVICE.type
    if ours and device is not None:
        kwargs["device"] = _HOST
    wrappers = {id(each.numbers): each for each in tensors if isinstance(each, OnDevice)}

    def unwrapped(value: Any) -> Any:
        return value.numbers if isinstance(value, OnDevice) else value

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Operations in place give back what they were given.
        known = wrappers.get(id(value))
        return known if known is not None else OnDevice(value) if ours else value

    found = function(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    return tree_map(wrapped, found)


def _check_devices(name: str, tensors: list[Tensor]) -> None:
    if name in _COPIES:
        return
    held = tensors[:1] if name in _INDEXING else [each for each in tensors if each.dim() > 0]
    found = {each.device for each in held if each.device.type != "meta"}
    if len(found) > 1:
        raise RuntimeError(f"{name} got tensors on {' and '.join(sorted(map(str, found)))}")
