"""A device that is not there: what would make the host wait for a GPU, found on a CPU.

    watch = DeviceWatch()
    watch.put(*model.parameters())
    with watch:
        ...                       # to build what asks for the model's device, and to run
    watch.waits                   # ["commit", ...], the functions of the engine that would have waited

Tensors that stand for those of the device are marked; so is whatever torch computes from them, and whatever is made
with their `device`, which reads as DEVICE. Reading a marked tensor, an operation whose output's size depends on its
values and a plain copy to the device are noted. An operation on tensors of both sides fails, as it would on a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Another than torch.device("cpu"), as which tensors of the host read.
DEVICE = torch.device("cpu", 0)
_READS_DEVICE = torch.Tensor.device.__get__

# Of a marked tensor. Some copy it to the host, the others have to know its values to go on.
_WAITING = {
    *("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__"),
    *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "is_nonzero", "equal", "allclose"),
    *("bincount", "qr", "svd", "linalg_qr", "linalg_svd"),
}
# Where the size of the result is in a tensor, or is not given.
_WAITING_SOMETIMES: dict[str, Callable[[Any], bool]] = {
    "where": lambda args: len(args) == 1,
    "repeat_interleave": lambda args: isinstance(args[-1], Tensor),
}
_TO_HOST = {"cpu", "numpy"}
# They take an index from either side; one of the host is copied.
_INDEXING = {"__getitem__", "__setitem__"}
_COPIES = {"to", "copy_"}
# Made of numbers of the host: the result is copied.
_FROM_NUMBERS = {"tensor", "as_tensor"}


class DeviceWatch(TorchFunctionMode):
    """waits: what would have waited since the last `clear`, each by the engine's function that it happened in."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    @staticmethod
    def put(*tensors: Tensor) -> None:
        """Mark these as the device's."""
        for tensor in tensors:
            tensor.on_watched_device = True  # type: ignore[attr-defined]

    def clear(self) -> None:
        self.waits.clear()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == _READS_DEVICE:
            return DEVICE if _marked(args[0]) else function(*args)
        name = getattr(function, "__name__", str(function))
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        target = _device_asked(name, args, kwargs)
        marked = any(map(_marked, tensors))
        if name in _COPIES:
            return self._copied(name, function, args, kwargs, target)
        if name in _INDEXING and marked:
            self._check_index(args[1:])
        elif marked and any(not _marked(tensor) and tensor.ndim for tensor in tensors):
            raise AssertionError(f"{name} of tensors on the host and on the device, in {_place()}")
        waits = name in _WAITING or (name in _WAITING_SOMETIMES and _WAITING_SOMETIMES[name](args))
        if (marked and waits) or (target == DEVICE and name in _FROM_NUMBERS):
            self.waits.append(_place())
        result = function(*args, **kwargs)
        if name in _TO_HOST and marked:
            return result.clone()
        if marked or target == DEVICE:
            self.put(*_tensors(result))
        return result

    def _copied(self, name: str, function: Any, args: Any, kwargs: Any, target: torch.device | None) -> Any:
        """`to` and `copy_`: within a side they are operations like others, from one to the other they are copies."""
        source, here = (args[1], _marked(args[0])) if name == "copy_" else (args[0], target == DEVICE)
        if name == "to" and target is None:
            here = _marked(source)
        if _marked(source) != here and source.numel() and not kwargs.get("non_blocking", False):
            self.waits.append(_place())
        result = function(*args, **kwargs)
        if name == "to":
            # Where nothing changes torch returns the tensor itself, which must not change sides.
            result = result.clone() if _marked(source) != here else result
        if here:
            self.put(result)
        return result

    def _check_index(self, parts: Any) -> None:
        """The index of a marked tensor, and what is written there."""
        for part in _flat(parts):
            if isinstance(part, slice):
                if any(_marked(bound) for bound in (part.start, part.stop, part.step) if isinstance(bound, Tensor)):
                    self.waits.append(_place())
            elif isinstance(part, Tensor) and ((part.ndim and not _marked(part)) or part.dtype == torch.bool):
                self.waits.append(_place())
        if any(isinstance(part, list) for part in (parts[0] if isinstance(parts[0], tuple) else parts[:1])):
            self.waits.append(_place())


def _device_asked(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """Where the result is to be; None where that is not said."""
    asked = kwargs.get("device")
    if asked is None and name == "to":
        asked = next((part for part in args[1:] if isinstance(part, torch.device | str)), None)
    return None if asked is None else torch.device(asked)


def _marked(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and getattr(tensor, "on_watched_device", False)


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list | tuple):
        for value in values:
            yield from _flat(value)
    else:
        yield values


def _tensors(values: Any) -> Iterable[Tensor]:
    return (value for value in _flat(values) if isinstance(value, Tensor))


def _place() -> str:
    """The innermost function of the engine that is running."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("redvtp."):
        frame = frame.f_back  # type: ignore[assignment]
    return "a test" if frame is None else frame.f_code.co_name
