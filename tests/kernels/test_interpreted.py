"""Kernels for graphics cards, proven on a CPU: Triton's interpreter runs them, in processes of their own.

The interpreter must be chosen before triton is imported, and turns every kernel of a process into Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CHECKS = sorted((TESTS / "kernels/interpreted").glob("check_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_kernels_in_the_interpreter(checks: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS)}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
