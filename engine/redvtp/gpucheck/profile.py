"""Where a step's time goes: what the device was busy with, by kernel."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.gpucheck.machine import Machine

_MOST = 8


def busiest_kernels(
    machine: Machine, runner: DenoisingRunner, sequences: list[Sequence], setting: str
) -> list[dict[str, Any]]:
    """The kernels with the most time in the next step; on a CPU the operations. A last entry sums up all of them."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if machine.is_cuda else [])]
    with profile(activities=activities) as found:
        (report, *_) = runner.step(sequences)
        machine.wait()
    kind = "CUDA" if machine.is_cuda else "CPU"
    events = [event for event in found.key_averages() if event.device_type.name == kind]
    # Times are microseconds.
    taken = {
        event.key: (event.self_device_time_total if machine.is_cuda else event.self_cpu_time_total, event.count)
        for event in events
    }
    busiest = sorted(taken.items(), key=lambda entry: -entry[1][0])[:_MOST]
    named = [(name[:120], *numbers) for name, numbers in busiest]
    total = ("all of them", sum(time for time, _ in taken.values()), sum(count for _, count in taken.values()))
    return [
        {"setting": setting, "step": report.kind, "kernel": name, "ms": round(time / 1e3, 4), "calls": count}
        for name, time, count in [*named, total]
    ]
