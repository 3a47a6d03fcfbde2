"""The engine must run on any machine with torch: it never imports vLLM."""

from __future__ import annotations

import ast
from pathlib import Path

ENGINE = Path(__file__).resolve().parents[2] / "engine" / "redvtp"


def test_the_engine_never_imports_vllm() -> None:
    sources = sorted(ENGINE.rglob("*.py"))
    assert len(sources) > 20
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name == "vllm" or name.startswith("vllm.") for name in names), source
