"""Hooks of MkDocs: pages outside docs/ join the site, and links fit it as they fit GitHub.

A Markdown link names a file of the repository, relative to the page it stands in. Here it becomes a link to that file's
page. A link to a file that has no page (an example, a test) becomes plain text, or a link into `repo_url` once
mkdocs.yml has one. A link to a file that does not exist is a warning, and so an error under --strict.
"""

from __future__ import annotations

import logging
import os.path
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
# Below this name MkDocs counts warnings.
LOG = logging.getLogger("mkdocs.hooks")

# File of the repository: its page.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples/index.md",
    "examples/grafana/README.md": "examples/grafana.md",
    "examples/images/README.md": "examples/images.md",
    "examples/lmms_eval/README.md": "examples/lmms_eval.md",
    "examples/tiny_dvlm/README.md": "examples/tiny_dvlm.md",
    "tests/golden/README.md": "golden.md",
    "training/README.md": "training.md",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
# A list that follows a line of text: GitHub starts it there, Python-Markdown wants an empty line.
LIST = re.compile(r"^((?![ *|#<>-])[^\n]+)\n(?=[*-] )", re.MULTILINE)
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = Path(page.file.abs_src_path or "").relative_to(ROOT)

    def fitted(link: re.Match[str]) -> str:
        return _fitted(link, source, page.file.src_uri, config, files)

    pieces = []
    end = 0
    for fence in FENCE.finditer(markdown):
        pieces += [LINK.sub(fitted, _with_lists(markdown[end : fence.start()])), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(fitted, _with_lists(markdown[end:]))])


def _with_lists(text: str) -> str:
    return LIST.sub(r"\1\n\n", text)


def _fitted(link: re.Match[str], source: Path, uri: str, config: MkDocsConfig, files: Files) -> str:
    """source: the page's file. uri: its place in the site."""
    image, text, target, anchor = link.groups()
    if ":" in target:
        return link[0]
    path = Path(os.path.normpath(source.parent / target))
    page = OUTSIDE.get(path.as_posix()) or (path.relative_to("docs").as_posix() if path.parts[0] == "docs" else None)
    if page and files.get_file_from_path(page):
        return f"{image}[{text}]({os.path.relpath(page, Path(uri).parent)}{anchor or ''})"
    if not (ROOT / path).exists():
        LOG.warning("%s links to %s, which does not exist", source, path)
    if config.repo_url:
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path.as_posix()}{anchor or ''})"
    return text
