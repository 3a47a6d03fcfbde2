"""Commands and snippets of the pages that speak with a server, against the one that the page starts."""

from __future__ import annotations

import shutil

import pytest

from doc_pages import PAGES, blocks
from doc_workshop import Workshop, serve_lines

# By the first server they need, so that a server is started once for all pages in a row.
SERVED = sorted((page for page in PAGES if serve_lines(page)), key=serve_lines)

pytestmark = [pytest.mark.serving, pytest.mark.slow]


@pytest.mark.parametrize("page", SERVED)
def test_the_page_can_be_typed_from_top_to_bottom(workshop: Workshop, page: str) -> None:
    if any("curl " in block.text for block in blocks(page)) and shutil.which("curl") is None:
        pytest.skip("needs curl: apt-get install curl")
    workshop.run_page(page)
