"""The device that would be used, and its memory."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from redvtp.doctor.findings import Finding, readable

TOPIC = "machine"
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """device: "cpu" or "cuda". total, free: bytes of its memory; free is what could be taken now."""

    device: str
    name: str
    total: int
    free: int


def machine() -> Machine:
    """What torch computes on here."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Machine("cuda", torch.cuda.get_device_name(), total, free)
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = _cgroup_bytes("memory.max")
    if limit is not None and limit < total:
        total, free = limit, min(free, limit - (_cgroup_bytes("memory.current") or 0))
    return Machine("cpu", f"{os.cpu_count()} CPU cores", total, free)


def described(found: Machine) -> Iterator[Finding]:
    """The machine in lines, and what keeps a better device from being used."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Finding(TOPIC, f"device {found.device}: {found.name}; torch {torch.__version__} is built for {build}")
    yield Finding(TOPIC, f"memory: {readable(found.free)} of {readable(found.total)} free")
    if found.device == "cuda":
        return
    if _has_gpu():
        if torch.version.cuda:
            text, remedy = "nvidia-smi shows a GPU that torch cannot use", "update the NVIDIA driver"
        else:
            text, remedy = "nvidia-smi shows a GPU, but torch is built for CPUs", "REDVTP_VLLM=cuda ./scripts/setup.sh"
        yield Finding(TOPIC, text, remedy)
    elif not _loads("libnuma.so.1"):
        yield Finding(TOPIC, "vLLM for CPU needs libnuma.so.1, which is not there", "sudo apt-get install libnuma1")


def _has_gpu() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "GPU" in listed


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _cgroup_bytes(name: str) -> int | None:
    """A number of bytes of the container that this process is in; None where there is no limit."""
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):
        return None
