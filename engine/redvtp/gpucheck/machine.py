"""The device the command runs on: its clock, its memory, and what is written about it."""

from __future__ import annotations

import gc
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

_PACKAGES = ("torch", "triton", "transformers", "vllm", "xformers")


@dataclass(frozen=True, slots=True)
class Machine:
    """One device. small: tiny sizes, as on a CPU."""

    device: torch.device
    small: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def memory(self) -> int:
        """Bytes that can be had now."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            return int(torch.cuda.mem_get_info(self.device)[0])
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def milliseconds(self, work: Callable[[], object]) -> float:
        """What one call takes, between two events on CUDA, the host's time within it included."""
        if not self.is_cuda:
            started = time.perf_counter()
            work()
            return (time.perf_counter() - started) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self.device)
        begin.record(stream)
        work()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end))

    def median(self, work: Callable[[], object], repeats: int) -> float:
        """Milliseconds, after two calls to warm up."""
        for _ in range(2):
            work()
        self.wait()
        return statistics.median(self.milliseconds(work) for _ in range(repeats))

    def forget_peak(self) -> None:
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes: the most since `forget_peak` on CUDA; of the process since its start on a CPU."""
        if self.is_cuda:
            return int(torch.cuda.max_memory_allocated(self.device))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"device": str(self.device), "small": self.small, "python": platform.python_version()}
        if self.is_cuda:
            card = torch.cuda.get_device_properties(self.device)
            found |= {
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "memory_gib": round(card.total_memory / 2**30, 1),
                "multiprocessors": card.multi_processor_count,
                "cuda": torch.version.cuda,
            }
        else:
            found |= {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        return found | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
