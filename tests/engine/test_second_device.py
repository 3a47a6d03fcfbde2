"""Where tensors are, by the rules of a graphics card: the engine on a device that refuses tensors of the host."""

from __future__ import annotations

from typing import Any

import pytest

from module_process import results, run_module
from redvtp.presets import PRESET_TABLE

DEVICE = "privateuseone:0"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What engine.on_second_device prints."""
    (answer,) = results(run_module("engine.on_second_device"))
    assert answer["mixed"] == f"aten::add got tensors on cpu and {DEVICE}"
    return answer


@pytest.mark.slow
def test_no_operation_mixes_host_and_device_and_the_tokens_are_the_references(found: dict[str, Any]) -> None:
    golden = found["golden"]
    assert len(golden) >= 10
    assert {name: got for name, (got, _) in golden.items()} == {name: wanted for name, (_, wanted) in golden.items()}
    assert found["others"] >= len(PRESET_TABLE)


@pytest.mark.slow
def test_ranks_exchange_tensors_of_the_device_only(found: dict[str, Any]) -> None:
    """NCCL takes no others: "No backend type associated with device type cpu"."""
    assert found["collectives"] == {"sum_scores": [DEVICE], "broadcast_from_rank0": [DEVICE]}
