"""Pages: every code block is run, is data that can be read, or says why not; knobs and versions are the code's."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
import yaml

import redvtp
from doc_pages import OUTPUT, PAGES, ROOT, RUN, Block, blocks
from vllm_redvtp.knob_names import KNOBS

# What a reader sees and does not type.
SHOWN = ("console", "text")
# tests/docs/test_walk_throughs.py uses each of these blocks of CONTRIBUTING.md.
WALK_THROUGHS = ("diff", "jinja")
BLOCKS = [block for page in PAGES for block in blocks(page)]
# Other things whose names begin so: the model class for lmms-eval, and its task.
NO_KNOBS = {"lmms_eval", "photos"}
README_LINES = 130


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_block_is_run_or_read_or_says_why_not(block: Block) -> None:
    if block.output:
        assert block.language == "text", f"{block.place}: {OUTPUT} belongs above a text block"
    elif block.reason or block.language in (*RUN, *SHOWN):
        pass
    elif block.language == "json":
        json.loads(block.text)
    elif block.language == "yaml":
        yaml.safe_load(block.text)
    else:
        assert block.language in WALK_THROUGHS, f"{block.place}: not known how to test a block of {block.language!r}"
        assert block.place.startswith("CONTRIBUTING.md")


def test_walk_throughs_alone_are_run_elsewhere() -> None:
    assert {block.language for block in blocks("CONTRIBUTING.md")} >= {*WALK_THROUGHS, *RUN}


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_typed_in_the_environment_which_is_said_once(page: str) -> None:
    texts = [block.text for block in blocks(page) if block.language == "bash" and not block.reason]
    said = [text for text in texts if ". .venv/bin/activate" in text]
    assert not any(".venv/bin/" in text.replace(". .venv/bin/activate", "") for text in texts)
    if texts and page != "CONTRIBUTING.md":
        assert said == texts[:1], f"{page} says it in its first block and nowhere else"


@pytest.mark.parametrize("page", PAGES)
def test_names_of_knobs_are_those_of_the_code(page: str) -> None:
    """Names on /metrics have `vllm:` in front."""
    text = (ROOT / page).read_text(encoding="utf-8")
    names = {name for name in re.findall(r"(?<![:\w])redvtp_([a-z_]+)\b", text) if not name.endswith("_")}
    assert names - NO_KNOBS <= set(KNOBS), names - set(KNOBS)


def test_an_operator_opens_the_addresses_on_this_machine_only() -> None:
    for block in BLOCKS:
        assert "VLLM_SERVER_DEV_MODE=1" not in block.text or "--host 127.0.0.1" in block.text, block.place


def test_the_readme_fits_on_two_screens() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") or "/" not in page])
def test_lines_wrap_at_120_columns(page: str) -> None:
    """Tables aside."""
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 120 or line.lstrip().startswith("|"), f"{page}:{number}"


def test_the_version_is_the_same_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert redvtp.__version__ == version
    newest = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
