"""benchmarks/paired.py: a checkout against itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "4", "--tower-hidden", "64"),
    *("--tower-layers", "2", "--tile", "56", "--image", "90x60", "--gen-length", "8", "--steps", "4", "--rounds", "1"),
]


def test_both_checkouts_answer_every_row_with_the_same_tokens(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "paired.py"), str(ROOT), *TINY, "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^\| (\d x .*?) \|.*\| (\d+\.\d+) \| (same|DIFFER) \|$", done.stdout, re.M)
    assert len(rows) == 12
    for name, ratio, tokens in rows:
        assert float(ratio) > 0
        assert tokens == "same", name


def test_a_folder_that_is_no_checkout_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "paired.py"), str(tmp_path), *TINY, "--workdir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode != 0
    assert "did not start" in done.stderr
