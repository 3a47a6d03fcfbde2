"""The demo against a server that dies: the cause is shown, not only what followed from it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from serving.server import START_SECONDS

pytestmark = pytest.mark.serving
ROOT = Path(__file__).resolve().parents[2]


def demo(model: Path, output: Path) -> str:
    """What the demo says when it fails."""
    command = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--model", str(model), "--output", str(output)]
    done = subprocess.run(
        [*command, "--timeout", str(START_SECONDS)],
        capture_output=True,
        text=True,
        timeout=2 * START_SECONDS,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(ROOT / "examples" / "tiny_dvlm", tmp_path / "model"))


def test_the_cause_in_a_worker_is_shown(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1_000_000])
    said = demo(model, tmp_path / "output")
    assert re.match(r"demo: the server stopped after \d+ s \(exit status 1\)\n  what went wrong first:\n", said)
    # Three processes have a traceback; only the first one says it.
    assert re.search(r"^    Worker: \S*SafetensorError: .*\bincomplete metadata\b", said, re.MULTILINE)
    assert said.endswith(f"the whole log: {tmp_path / 'output' / 'server.log'}\n")
    assert len(said.splitlines()) == 6


def test_the_cause_before_any_worker_is_shown(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("{")
    first, last = demo(model, tmp_path / "output").split("the last line of its log:")
    # The second of two chained tracebacks names the file.
    assert "JSONDecodeError: " in first
    assert "config.json' is not a valid JSON file" in last
