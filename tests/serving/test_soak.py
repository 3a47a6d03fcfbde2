"""benchmarks/soak.py, for half a minute: good, hostile and abandoned requests at once change nothing for the server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from golden_data import checkpoint_dir
from serving.chat import CHECKPOINT
from serving.server import HOST, Server

pytestmark = [pytest.mark.serving, pytest.mark.slow]
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


def _soak(*arguments: object) -> tuple[int, str]:
    # Starting a server takes half a minute, on a busy machine many.
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=1800, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_half_a_minute_of_everything_leaves_the_server_as_it_was(tmp_path: Path) -> None:
    """Tokens, refusals, blocks, memory and log are judged by the soak itself; resets that preempt are not in it."""
    log = tmp_path / "server.log"
    # For a time, not for a number of requests: the operator and the look at the memory come by the clock.
    status, said = _soak(
        "--model", checkpoint_dir(CHECKPOINT), "--requests", 10**6, "--seconds", 30, "--preempt", "--log", log
    )
    assert status == 0, said
    assert "all well" in said
    assert "tracebacks in the log: 0" in said
    assert "KV blocks in use: 0.00%" in said
    assert "MiB after warm-up" in said
    for operation in ("/pause", "/reset_prefix_cache"):
        assert operation in said
    # It has sent the things it is about.
    for kind in ("left early", "keep a quarter", "truncated PNG"):
        assert kind in said


def test_findings_are_counted_and_end_with_status_1(server: Server) -> None:
    """A server that is not in vLLM's dev mode has nothing to pause or to reset: the operator's calls fail."""
    status, said = _soak("--base-url", f"http://{HOST}:{server.port}", "--requests", 12)
    assert status == 1
    assert "FAILED /" in said
    assert "HTTP 404" in said
    # Otherwise it is well.
    assert "FAILED left early" not in said
    assert "KV blocks in use: 0.00%" in said


def test_no_server_ends_with_status_2() -> None:
    status, said = _soak("--base-url", f"http://{HOST}:1", "--requests", 1)
    assert status == 2
    assert "soak: ConnectError" in said
