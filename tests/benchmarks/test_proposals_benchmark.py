"""benchmarks/proposals.py, as docs/results.md uses it, on few numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_noise_takes_time(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "proposals.py"), "--rows", "4", "--vocab", "20000"]
    report = tmp_path / "results.json"
    subprocess.run([*command, "--rounds", "3", "--json", str(report)], check=True, timeout=300)
    results = json.loads(report.read_text())
    assert list(results) == ["temperature 0", "temperature 1", "temperature 1, from a generator"]
    assert 0 < results["temperature 0"] < results["temperature 1"]
