"""Imports run one way: between folders by the order below, between the files of a folder without circles.

Every import counts, those inside functions and under TYPE_CHECKING too: a reader follows them all the same.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"redvtp": ROOT / "engine" / "redvtp", "vllm_redvtp": ROOT / "vllm_redvtp"}

# Lowest first. A file or folder may import what stands on a line above its own, and nothing else of its package.
# Names on one line are sisters: they do not import each other.
ORDER = {
    "redvtp": (
        ("presets", "errors", "reports", "clock", "noise"),
        ("values",),
        ("model_folder", "device"),
        ("params", "kernels"),
        ("kv", "vision"),
        ("attention", "prompt"),
        ("families",),
        ("models",),
        ("canvas", "pruning"),
        ("planning",),
        ("denoising", "request"),
        ("local_queue", "local_cache"),
        ("local",),
        ("trace",),
        ("heatmap", "engines", "doctor"),
        ("evaluation", "gpucheck"),
        ("cli",),
    ),
    "vllm_redvtp": (
        ("engine_config", "fused", "output", "patches", "server_options"),
        ("knob_names",),
        ("knobs",),
        ("planning",),
        ("attention",),
        ("frontend", "scheduling", "worker"),
        ("served_model",),
        ("hook",),
        ("quiet",),
        ("offline",),
        ("diagnosis",),
        ("__init__",),
    ),
}


def modules(package: str) -> dict[str, Path]:
    """Dotted name of each module of a package -> its file."""
    folder = SOURCES[package]
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        names[".".join((package, *parts))] = path
    return names


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of `known` that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a module lives"
            module = node.module or ""
            found |= {name if (name := f"{module}.{alias.name}") in known else module for alias in node.names}
    return found & known.keys()


def room(module: str) -> str:
    """The file or folder right below the package that a module is in."""
    return module.split(".")[1]


def rank(package: str, module: str) -> int:
    (found,) = [place for place, names in enumerate(ORDER[package]) if room(module) in names]
    return found


@pytest.mark.parametrize("package", SOURCES)
def test_every_room_has_a_place_in_the_order(package: str) -> None:
    rooms = {room(module) for module in modules(package)} - {"__init__"}
    placed = [name for names in ORDER[package] for name in names]
    assert len(placed) == len(set(placed))
    assert rooms == set(placed) - {"__init__"}


@pytest.mark.parametrize("package", SOURCES)
def test_imports_run_down(package: str) -> None:
    known = modules(package)
    upwards = sorted(
        f"{module} -> {target}"
        for module, path in known.items()
        if module != f"{package}.__init__" or package == "vllm_redvtp"
        for target in imported(path, known)
        if target != f"{package}.__init__" and room(target) != room(module)
        if rank(package, target) >= rank(package, module)
    )
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("package", SOURCES)
def test_no_circles(package: str) -> None:
    known = modules(package)
    try:
        TopologicalSorter({module: imported(path, known) for module, path in known.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_engine_never_imports_vllm_or_the_plugin() -> None:
    for path in modules("redvtp").values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"vllm", "vllm_redvtp"}, path
