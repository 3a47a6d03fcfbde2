"""benchmarks/serve.py: a run at a tiny size, with a server of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = [
    *("--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "2"),
    *("--tower-hidden", "64", "--tower-layers", "2", "--tile", "112", "--image", "336x224"),
    # Long enough to be looked at many times on a machine that is several times as fast.
    *("--gen-length", "32", "--block-length", "32", "--steps", "32", "--keep", "25"),
    *("--hold", "2", "--clients", "6", "--requests", "72", "--quiet"),
]


@pytest.mark.serving
def test_more_requests_share_the_pool_and_none_changes_its_tokens(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = ("--workdir", tmp_path, "--json", tmp_path / "results.json", "--plot", tmp_path / "load.png")
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "serve.py", *TINY, *files],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "goodput" in done.stdout

    results = json.loads((tmp_path / "results.json").read_text())
    dense, pruned = results["rows"]
    assert (dense["setting"], pruned["setting"]) == ("dense", "keep 25%")
    for row in (dense, pruned):
        assert row["same_tokens"] == row["answers"] == 72
        assert 0 < row["ttft_s"]["p50"] <= row["latency_s"]["p50"] <= row["latency_s"]["p99"]
        assert 0 < row["kv_usage_mean"] <= 1
        assert row["in_flight_peak"] <= row["in_flight_bound"]
    # The pool is made for two of the longest.
    assert dense["kv_blocks_admitted"] == dense["kv_blocks_kept"] == results["pool_blocks"] // 2
    assert dense["in_flight_bound"] == 2
    visual = pruned["rows_per_request"] - dense["rows_per_request"]
    assert visual < 0, "pruned requests compute less"
    assert pruned["in_flight_bound"] > 2
    assert (tmp_path / "load.png").stat().st_size > 0
