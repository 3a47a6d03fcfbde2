"""Commands and snippets of the pages that need no server, as they stand there."""

from __future__ import annotations

import pytest

from doc_pages import PAGES, run_blocks
from doc_workshop import Workshop, serve_lines

# The blocks of CONTRIBUTING.md are its walk-throughs, see test_walk_throughs.py.
TYPED = [page for page in PAGES if page != "CONTRIBUTING.md" and run_blocks(page) and not serve_lines(page)]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("page", TYPED)
def test_the_page_can_be_typed_from_top_to_bottom(workshop: Workshop, page: str) -> None:
    workshop.run_page(page)
