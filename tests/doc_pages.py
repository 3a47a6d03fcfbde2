"""The pages a reader is shown, and the code blocks in them.

`PAGES` are the Markdown files for readers, as paths of the repository. `blocks(page)` are its fences. A comment right
above a fence says how it is tested: `<!-- not run: REASON -->`, or `<!-- output -->` for a `text` fence whose lines the
block above it prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
# Pages outside docs/, which docs/hooks.py brings into the site.
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/golden/README.md", "training/README.md")
FOUND = [path for folder in ("docs", "examples") for path in (ROOT / folder).rglob("*.md")]
PAGES = sorted([*OUTSIDE, *(path.relative_to(ROOT).as_posix() for path in FOUND)])
NOT_RUN = re.compile(r"^<!-- not run: (\S.*) -->$")
OUTPUT = "<!-- output -->"
# The command that starts a server, and the address that its clients use.
SERVE = re.compile(r"^(\w+=\S+ )*vllm serve ")
ADDRESS = "127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class Block:
    """A fence.

    place: page and line.
    reason: why it is not run; empty if it is.
    output: it is what the block above prints.
    """

    place: str
    language: str
    text: str
    reason: str
    output: bool

    @property
    def serves(self) -> bool:
        return self.language == "bash" and any(SERVE.match(line) for line in self.text.splitlines())

    @property
    def asks_a_server(self) -> bool:
        return ADDRESS in self.text or "chat_with_image.py" in self.text


@cache
def blocks(page: str) -> tuple[Block, ...]:
    return tuple(_blocks(page))


def run_blocks(page: str) -> tuple[Block, ...]:
    """Those that are commands or Python and carry no reason, and the outputs between them."""
    return tuple(block for block in blocks(page) if not block.reason and (block.output or block.language in RUN))


RUN = ("bash", "python")


def _blocks(page: str) -> Iterator[Block]:
    comment = ""
    for token in MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8")):
        if token.type == "html_block":
            comment = token.content.strip()
        elif token.type == "fence":
            reason = NOT_RUN.match(comment)
            line = (token.map or [0])[0] + 1
            yield Block(
                f"{page}:{line}", token.info.strip(), token.content, reason[1] if reason else "", comment == OUTPUT
            )
            comment = ""
        elif token.type not in ("list_item_close", "bullet_list_close"):
            comment = ""
