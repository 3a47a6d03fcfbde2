"""Where tensors are, by the rules of a graphics card: the engine on a device that refuses tensors of the host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from redvtp.presets import PRESET_TABLE

TESTS = Path(__file__).resolve().parents[1]
DEVICE = "privateuseone:0"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What engine.on_second_device prints."""
    done = subprocess.run(
        [sys.executable, "-m", "engine.on_second_device"],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    answer: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
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
