"""Peak memory of a piece of work, and where its time goes.

`PeakMemory` asks the operating system (CPU) or torch's allocator (CUDA) for the high-water mark; `Stopwatch` times
functions by their name. It counts each moment once, for the innermost function.
"""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes above the level at construction. On the CPU that is resident memory, on CUDA what torch has allocated.

    Raises OSError if Linux does not let the process reset its high-water mark.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._base = self._present()

    def measure(self, work: Callable[[], Any]) -> int:
        """Highest level while `work` runs."""
        self._reset()
        work()
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return peak - self._base

    def _present(self) -> int:
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        _give_back_freed_pages()
        return _status("VmRSS")

    def _reset(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        _give_back_freed_pages()
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _give_back_freed_pages() -> None:
    """Memory that the C library keeps after a free would hide what the next work allocates."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Stopwatch:
    """Seconds by label. Functions are timed inside `watching`, without the time of other labels inside them."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._cuda = device.type == "cuda"
        self._inner: list[float] = []

    @contextmanager
    def timed(self, label: str) -> Iterator[None]:
        started = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - started
            self.seconds[label] += elapsed - self._inner.pop()
            if self._inner:
                self._inner[-1] += elapsed

    @contextmanager
    def watching(self, *functions: tuple[Any, str, str]) -> Iterator[None]:
        """functions: (owner, attribute, label); the owner is a class, a module or an object."""
        with ExitStack() as undo:
            for owner, attribute, label in functions:
                before = vars(owner).get(attribute)
                setattr(owner, attribute, self._watched(getattr(owner, attribute), label))
                if before is None:
                    undo.callback(delattr, owner, attribute)
                else:
                    undo.callback(setattr, owner, attribute, before)
            yield

    def _watched(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.timed(label):
                return function(*args, **kwargs)

        return watched

    def _now(self) -> float:
        # Kernels run asynchronously; a label must not get the time of the one before.
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
