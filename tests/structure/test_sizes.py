"""Files, functions and classes stay small enough to be read at once."""

from __future__ import annotations

import ast
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("engine/redvtp", "vllm_redvtp") for path in (ROOT / folder).rglob("*.py"))
LONGEST_FILE, MEDIAN_FILE, LONGEST_FUNCTION, MOST_METHODS = 300, 130, 50, 15


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert lines(path) <= LONGEST_FILE


def test_the_median_file_is_short() -> None:
    counts = [count for path in FILES if path.name != "__init__.py" and (count := lines(path))]
    assert statistics.median(counts) <= MEDIAN_FILE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_function_and_no_class_is_too_large(path: Path) -> None:
    """A class with more methods says in its docstring why: `Methods:` and the reason."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"
        elif isinstance(node, ast.ClassDef):
            methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
            reason = "Methods:" in (ast.get_docstring(node) or "")
            assert methods <= MOST_METHODS or reason, f"{node.name} has {methods} methods"
