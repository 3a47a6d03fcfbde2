"""A workshop for the pages of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from doc_workshop import Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    made = Workshop(tmp_path_factory.mktemp("workshop"))
    yield made
    made.close()
