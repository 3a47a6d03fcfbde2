"""Kernels for graphics cards, proven on a CPU: Triton's interpreter runs them, in processes of their own.

The interpreter must be chosen before triton is imported, and turns every kernel of a process into Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from redvtp.attention.xformers_paged import triton_serves

TESTS = Path(__file__).parents[1]
# A folder with a Triton that still has block pointers, for xformers' kernel:
# pip install --no-deps --target FOLDER triton==3.8.0
OLDER_TRITON = os.environ.get("REDVTP_OLDER_TRITON", "")
CHECKS = sorted((TESTS / "kernels/interpreted").glob("check_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem.removeprefix("check_"))
def test_kernels_in_the_interpreter(checks: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)]
    older = []
    if checks.stem == "check_xformers":
        pytest.importorskip("xformers", reason="needs xformers 0.0.35: pip install -e '.[xformers]'")
        if not triton_serves():
            if not OLDER_TRITON:
                pytest.skip("Triton 3.9 cannot run xformers' kernel; REDVTP_OLDER_TRITON names a folder with 3.8")
            older = [OLDER_TRITON]
    search = os.pathsep.join([*older, str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": search}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
