"""The device an engine computes on, what is set for it, and where its time is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import golden_data
from redvtp.clock import Clock
from redvtp.device import configure_torch, current, named_device
from redvtp.local import LocalEngine

MODEL = golden_data.checkpoint_dir("tiny-llada-v")


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_a_name_it_is_a_card_where_there_is_one(two_cards: None) -> None:
    assert named_device(None) == named_device("cuda") == torch.device("cuda", 0)
    assert named_device("cuda:1") == torch.device("cuda", 1)
    assert named_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "cuda:x", "meta", ""])
def test_a_device_that_is_not_there_is_refused_by_those_that_are(name: str, two_cards: None) -> None:
    with pytest.raises(ValueError, match=f"device must be one of cpu, cuda:0, cuda:1, got '{name}'$"):
        named_device(name)


def test_without_a_card_it_is_the_cpu(no_card: None) -> None:
    assert named_device(None) == torch.device("cpu")
    assert isinstance(current(torch.device("cpu")).__enter__(), type(None))


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_missing_card_is_refused_with_what_torch_is_built_for(name: str, no_card: None) -> None:
    with pytest.raises(ValueError, match=rf"must be one of cpu, got '{name}'; torch 2.*, built for .*, finds no GPU"):
        LocalEngine(MODEL, device=name)


@pytest.fixture
def opposite_settings() -> Iterator[None]:
    """Everything as it must not be; afterwards as it was."""
    before = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    products = torch.get_float32_matmul_precision()
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("medium")
    yield
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    torch.set_float32_matmul_precision(products)


def test_an_engine_sets_exact_float32_and_no_cudnn_attention(opposite_settings: None) -> None:
    LocalEngine(MODEL, dtype="float32", num_blocks=1)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_precision_of_products_can_be_left_to_others(opposite_settings: None) -> None:
    configure_torch(exact_products=False)
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "medium"


def test_settings_agree_with_torchs_newer_names(opposite_settings: None) -> None:
    """Set apart from them, torch refuses to read them; vLLM's batch-invariant mode writes the newer ones."""
    configure_torch(exact_products=True)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # type: ignore[attr-defined]
    assert not torch.backends.cudnn.allow_tf32


class _Event:
    """What a `Clock` does with events of CUDA, noted."""

    streams: list[Any] = []  # noqa: RUF012

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self, stream: Any) -> None:
        self.streams.append(stream)
        self._at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: _Event) -> float:
        return (end._at - self._at) * 1e3


def test_the_clock_records_on_the_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of another card say nothing about this one's work."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(_Event, "streams", [])
    clock = Clock(torch.device("cuda", 1))
    with clock.measure("score"):
        time.sleep(0.01)
    assert _Event.streams == ["stream of cuda:1"] * 2
    assert clock.seconds["score"] == 0
    clock.collect()
    assert 0.01 <= clock.seconds["score"] < 1


def test_a_cache_of_so_many_bytes_has_the_blocks_that_fit() -> None:
    token = 2 * 4 * 4 * 16 * 4  # keys and values, layers, key heads, numbers, bytes of each
    local = LocalEngine(MODEL, dtype="float32", block_size=32, kv_cache_memory_bytes=32 * token * 5 + 1)
    assert local.cache.num_blocks == 5
    assert sum(pages.nbytes for pages in (*local.cache.keys, *local.cache.values)) == 32 * token * 5


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes must be at least 65,536, what a block of 32 tokens"),
        ({"kv_cache_memory_bytes": 1 << 20, "num_blocks": 4}, "num_blocks and kv_cache_memory_bytes exclude each"),
    ],
)
def test_a_cache_that_holds_nothing_is_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        LocalEngine(MODEL, dtype="float32", block_size=32, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_environment_chooses_the_device_of_the_engines_tests() -> None:
    """Of a device that no machine has, so that the choice shows anywhere."""
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "engine/test_reports.py", "-k", "canvas_is_reported"],
        cwd=tests,
        env=os.environ | {"REDVTP_TEST_DEVICE": "cuda:99"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "got 'cuda:99'" in done.stdout
