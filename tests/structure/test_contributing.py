"""The changes that CONTRIBUTING.md walks through still fit the code they are shown for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DIFFS = re.findall(r"^```diff\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S | re.M)


def test_there_is_a_walk_through_for_each_kind_of_change() -> None:
    assert len(DIFFS) >= 5


@pytest.mark.parametrize("number", range(len(DIFFS)))
def test_the_shown_change_applies(number: int) -> None:
    done = subprocess.run(
        ["git", "apply", "--check", "-"], cwd=ROOT, input=DIFFS[number], text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
