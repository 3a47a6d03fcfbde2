"""The pages as a site: built strictly, without the network; llms.txt names the same pages."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from doc_pages import PAGES, ROOT

pytestmark = pytest.mark.slow

# A proxy that refuses: what would go to the network fails.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


class Loader(yaml.SafeLoader):
    """Reads mkdocs.yml without the Python objects in it."""


Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
CONFIG = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)
OUTSIDE: dict[str, str] = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["OUTSIDE"]


def pages_of(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from pages_of(value)
        else:
            yield value


# As files of the repository.
IN_NAV = [
    {page: source for source, page in OUTSIDE.items()}.get(page, f"docs/{page}") for page in pages_of(CONFIG["nav"])
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | NO_NETWORK,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_in_the_navigation() -> None:
    assert sorted(IN_NAV) == PAGES


def test_the_site_asks_no_other_server_for_anything(site: Path) -> None:
    """Links may lead away; scripts, styles, fonts and pictures are the site's."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\bsrc=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*\brel=\"(?:stylesheet|preconnect|icon)\"[^>]*\bhref=\"([^\"]+)\"", text)
        loaded += re.findall(r"<link[^>]*\bhref=\"([^\"]+)\"[^>]*\brel=\"(?:stylesheet|preconnect|icon)\"", text)
        assert loaded
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], page
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_search_knows_every_page(site: Path) -> None:
    found = {
        entry["location"].partition("#")[0]
        for entry in json.loads((site / "search/search_index.json").read_text())["docs"]
    }
    expected = {re.sub(r"(^|/)index\.md$", r"\1", page).replace(".md", "/") for page in pages_of(CONFIG["nav"])}
    assert found == expected


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    """Otherwise the strict build would prove little: three kinds of wrong links, each of them noticed."""
    page = ROOT / "docs" / "roadmap.md"
    for link in ("[x](no-such-page.md)", "[x](../no/such/file.py)", "[x](knobs.md#no-such-heading)"):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        copied = folder / "docs"
        copied.mkdir(parents=True)
        for name in ("hooks.py", "knobs.md"):
            (copied / name).write_bytes((page.parent / name).read_bytes())
        (copied / "roadmap.md").write_text(f"# Roadmap\n\n{link}\n")
        for source in OUTSIDE:
            (folder / source).parent.mkdir(parents=True, exist_ok=True)
            (folder / source).write_text("# A page\n")
        plain = {key: CONFIG[key] for key in ("site_name", "hooks", "exclude_docs", "validation")}
        (folder / "mkdocs.yml").write_text(yaml.safe_dump(plain))
        # Links of knobs.md lead to pages that are not here; only roadmap.md counts.
        done = subprocess.run(
            [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site"],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        warned = [line for line in done.stderr.splitlines() if "WARNING" in line and "roadmap.md" in line]
        assert len(warned) == 1, done.stderr


def test_llms_txt_lists_every_page_in_the_form_of_llmstxt_org() -> None:
    text = (ROOT / "llms.txt").read_text(encoding="utf-8")
    title, summary = text.split("\n\n")[:2]
    assert re.fullmatch(r"# .+", title)
    assert all(line.startswith("> ") for line in summary.splitlines())
    entries = re.findall(r"^- \[([^\]]+)\]\(([^)]+)\)(?:: .+)?$", text, re.MULTILINE)
    assert len(entries) == text.count("\n- ")
    assert sorted(path for _, path in entries) == sorted(IN_NAV)
