"""vLLM's attention kernels, offered to an engine without a server."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from redvtp.attention import offered
from redvtp.attention.offered import KERNELS, OfferedKernel, offered_kernels
from redvtp.attention.paged import PagedAttention
from redvtp.kv.pages import PagedKVCache
from vllm_redvtp.attention.offered import triton

ROOT = Path(__file__).resolve().parents[2]


def _declared() -> list[EntryPoint]:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    return [EntryPoint(name, value, KERNELS) for name, value in groups[KERNELS].items()]


def test_the_declared_names_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered, "entry_points", lambda group: [one for one in _declared() if one.group == group])
    found = offered_kernels()
    assert list(found) == ["flash", "triton"]
    assert all(isinstance(kernel, OfferedKernel) for kernel in found.values())


@pytest.mark.parametrize("name", ["flash", "triton"])
def test_on_a_cpu_they_say_why_not(name: str) -> None:
    (entry,) = [one for one in _declared() if one.name == name]
    kernel: OfferedKernel = entry.load()
    for device in ("cpu", "cuda"):
        reason = kernel.obstacle(torch.device(device), torch.bfloat16, 128, 64)
        # vLLM's CPU build is asked about a card, too, and knows that there is none.
        assert reason is not None
        assert "cards" in reason


def test_triton_is_made_over_row_major_pages() -> None:
    pages = PagedKVCache(1, 2, 16, 1, 32, torch.float32)
    assert isinstance(triton.make(pages, 1, 1.0), PagedAttention)
