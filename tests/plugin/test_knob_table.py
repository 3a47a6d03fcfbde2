"""docs/knobs.md has a table of all knobs that scripts/knob_table.py writes from the dataclasses; choosing-knobs.md has
a short one, written by hand."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from redvtp.params import PRESETS, SCHEDULES, PruningParams
from vllm_redvtp.knob_names import KNOBS, PREFIX

ROOT = Path(__file__).resolve().parents[2]
SHORT = ROOT / "docs" / "choosing-knobs.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("knob_table", ROOT / "scripts" / "knob_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_document_has_the_table_of_today(script: ModuleType) -> None:
    document = (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")
    assert document == script.rewritten(document), "run python scripts/knob_table.py"


def test_a_stale_table_is_noticed(script: ModuleType) -> None:
    document = (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")
    row = f"`redvtp_keep_ratio` | {PruningParams().keep_ratio} |"
    stale = document.replace(row, "`redvtp_keep_ratio` | 0.99 |")
    assert stale != document, f"docs/knobs.md has no row {row!r}"
    assert script.rewritten(stale) == document


def test_every_knob_has_a_row_with_what_it_allows(script: ModuleType) -> None:
    rows = {name: (default, allowed, meaning) for name, default, allowed, meaning in script.rows()}
    named = {knob for knob in KNOBS if any(f"`{PREFIX}{knob}`" in name for name in rows)}
    assert named == set(KNOBS)
    assert rows[f"`{PREFIX}schedule`"][1] == ", ".join(SCHEDULES)
    assert rows[f"`{PREFIX}pruning`"][1] == ", ".join(PRESETS)
    assert rows[f"`{PREFIX}keep_ratio`"][:2] == (str(PruningParams().keep_ratio), "number in (0, 1]")
    assert all(meaning for _, _, meaning in rows.values())


@pytest.mark.parametrize("page", ["choosing-knobs.md", "getting-started.md"])
def test_hand_written_tables_have_the_default_keep_ratio(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    (written,) = re.findall(r"^\| `redvtp_keep_ratio` \| (\S+) \|", text, re.MULTILINE)
    assert float(written) == PruningParams().keep_ratio, f"mend the table of docs/{page} by hand"


def test_the_short_table_names_the_same_knobs() -> None:
    """gen_length is left to its usual name there, max_tokens."""
    firsts = re.findall(r"^\| (`redvtp_[^|]*) \|", SHORT.read_text(encoding="utf-8"), re.MULTILINE)
    named = {knob for cell in firsts for knob in re.findall(r"`redvtp_(\w+)`", cell)}
    assert named == set(KNOBS) - {"gen_length"}
