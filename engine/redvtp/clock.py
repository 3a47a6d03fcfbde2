"""How long the parts of a step took that pruning adds to it: `score` and `compaction`.

    with clock.measure("score"):
        ...

On CUDA the time is the device's own, between two events on its stream. The runner collects after each step what the
device has done by then, without waiting: what a step ends with may be counted with the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

LABELS = ("score", "compaction")


class Clock:
    """seconds: by label, since the start."""

    def __init__(self, device: torch.device) -> None:
        self.seconds = dict.fromkeys(LABELS, 0.0)
        self._device = device
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, label: str) -> Iterator[None]:
        """Count the block under `label`, also when it raises. Blocks do not nest."""
        if self._device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream = torch.cuda.current_stream(self._device)
            begin.record(stream)
            try:
                yield
            finally:
                end.record(stream)
                self._pending.append((label, begin, end))
        else:
            started = time.perf_counter()
            try:
                yield
            finally:
                self.seconds[label] += time.perf_counter() - started

    def collect(self, wait: bool = True) -> None:
        """Bring `seconds` up to date. wait: for what the device has not done yet; otherwise it is left for later."""
        while self._pending:
            label, begin, end = self._pending[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self.seconds[label] += begin.elapsed_time(end) / 1e3
            del self._pending[0]
