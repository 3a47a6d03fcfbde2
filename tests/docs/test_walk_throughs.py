"""CONTRIBUTING.md's walk-throughs, carried out in a copy of the repository: all changes at once, then every command.

tests/structure/test_contributing.py checks that each change fits the code of today by itself.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from doc_pages import ROOT, Block, blocks
from doc_workshop import Workshop

PAGE = "CONTRIBUTING.md"
# "New file `PATH`:" in the text above a block.
NEW_FILE = re.compile(r"New file `([^`]+)`:\n\n```\w+\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TYPED = [block for block in blocks(PAGE) if block.language == "bash" and not block.reason]
# What the page's last Python block presumes, and what shows that it did what it says.
ENGINE = """
from redvtp.denoising.step import DenoisingRunner
from redvtp.local import LocalEngine
from vllm_redvtp.attention.choice import BACKENDS
from vllm_redvtp.attention.eager import EagerAttention

engine = LocalEngine("examples/tiny_dvlm", dtype="float32")
{snippet}
from redvtp.families.registry import FAMILIES
from redvtp.local import Request
from redvtp.params import DenoisingParams
from redvtp.prompt import chat_prompt
from redvtp.vision.images import open_image

prompt = chat_prompt(engine.tokenizer, "List all boxes row by row.", 1)
image = open_image("examples/tiny_dvlm/tasks/00008.jpg")
(answer,) = engine.generate([Request(prompt, (image,), DenoisingParams(gen_length=8, steps=8, cache="prefix"))])
assert "eager" in BACKENDS
print(answer.text)
print([family.name for family in FAMILIES])
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def changed(workshop: Workshop) -> Workshop:
    """A copy with all five changes in it."""
    for path, text in NEW_FILE.findall((ROOT / PAGE).read_text(encoding="utf-8")):
        (workshop.folder / path).write_text(text, encoding="utf-8")
    for block in blocks(PAGE):
        if block.language == "diff":
            done = subprocess.run(
                ["git", "apply", "-"],
                cwd=workshop.folder, input=block.text, text=True, capture_output=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.place}: {done.stdout}{done.stderr}"
    return workshop


def snippet(beginning: str) -> Block:
    (found,) = [block for block in blocks(PAGE) if block.language == "python" and block.text.startswith(beginning)]
    return found


@pytest.mark.parametrize("block", TYPED, ids=lambda block: block.place)
def test_the_command_of_a_walk_through_runs(changed: Workshop, block: Block) -> None:
    assert changed.run(block).strip()


def test_the_test_that_is_shown_passes_after_the_change(changed: Workshop) -> None:
    test = (ROOT / "tests/engine/test_remasking.py").read_text(encoding="utf-8")
    pytest_of_one = (sys.executable, "-m", "pytest", "-k", "ratio")
    assert "1 passed" in changed.run_text(
        "test_shown.py", f"{test}\n\n{snippet('def test_ratio').text}", *pytest_of_one
    )


def test_the_backend_and_the_family_are_there(changed: Workshop) -> None:
    text = ENGINE.format(snippet=snippet("attention = EagerAttention").text)
    answer, families = changed.run_text("backend.py", text, sys.executable).splitlines()
    assert answer == "orange:6 cyan:0"
    assert "Sparrow" in families


def test_no_block_is_left_out() -> None:
    new_files = [text for _, text in NEW_FILE.findall((ROOT / PAGE).read_text(encoding="utf-8"))]
    used = {*new_files, snippet("def test_ratio").text, snippet("attention = EagerAttention").text}
    used |= {block.text for block in blocks(PAGE) if block.language in ("diff", "bash") or block.reason}
    assert [block.place for block in blocks(PAGE) if block.text not in used] == []
