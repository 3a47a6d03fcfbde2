"""Modules of the tests that need a process of their own: `python -m NAME`, and the lines `RESULT <json>` it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
# On a busy machine an engine over two ranks takes minutes to start.
SECONDS = 1200


def run_module(name: str, *arguments: str | Path) -> str:
    """All that it prints. Raises AssertionError with the end of that for another exit status than 0."""
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def results(said: str) -> list[dict[str, Any]]:
    """What follows each `RESULT ` in the output of a module; vLLM may have written in front of it."""
    return [json.loads(line.partition("RESULT ")[2]) for line in said.splitlines() if "RESULT " in line]
