"""`python -m redvtp.gpucheck --device cpu --small`: the command for a card, whole, at small sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# Without the plugin's folder, as on a machine without vLLM.
ENGINE = {**os.environ, "PYTHONPATH": str(ROOT / "engine")}


def _gpucheck(output: Path, *flags: str, **environment: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-m", "redvtp.gpucheck", "--device", "cpu", "--small", "--output", str(output), *flags]
    run = subprocess.run(command, cwd=ROOT, env={**ENGINE, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found: dict[str, Any] = json.loads((output / "gpucheck.json").read_text())
    return found, run.stdout


def test_every_part_passes_and_every_setting_is_measured(tmp_path: Path) -> None:
    found, said = _gpucheck(tmp_path)
    assert found["failed"] == 0
    assert not found["left_out"]
    passed = {check["part"] for check in found["checks"] if check["status"] == "passed"}
    assert passed == {"golden", "attention", "sampling", "speed"}
    measured = {(cell["batch"], cell["keep"], cell["cache"]) for cell in found["cells"]}
    assert measured == {
        (batch, keep, cache) for batch in (1, 4, 16) for keep in (1, 0.5, 0.25) for cache in ("none", "prefix", "dual")
    }
    for cell in found["cells"]:
        assert cell["ms"] > 0
        assert cell["gigabytes"] > 0
        assert (cell["tflop"] > 0) == (cell["what"] != "compaction")
        assert cell["peak_gib"] > 0
    pruned = {cell["what"] for cell in found["cells"] if (cell["keep"], cell["cache"]) == (0.25, "dual")}
    assert pruned == {"first step", "response step", "score", "compaction"}
    rows = {cell["rows"] for cell in found["cells"] if (cell["what"], cell["batch"]) == ("response step", 1)}
    # A canvas block, and the whole canvas of 16.
    assert rows == {8, 16}
    assert {entry["step"] for entry in found["kernels"]} == {"full", "response"}
    assert "golden" in said
    assert "0 failed" in said
    page = (tmp_path / "gpucheck.md").read_text()
    assert page.count("| response step |") == sum(cell["what"] == "response step" for cell in found["cells"])


def test_triton_kernels_run_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    found, _ = _gpucheck(tmp_path, "--only", "kernels", TRITON_INTERPRET="1")
    passed = [check["name"] for check in found["checks"] if check["status"] == "passed"]
    for kernel in ("log-sum-exp", "score sums", "compaction with new", "compaction without"):
        assert any(name.startswith(kernel) and name.endswith("float32") for name in passed)


def test_a_bare_machine_is_enough(tmp_path: Path) -> None:
    """torch, triton, transformers, numpy, pillow, safetensors, tqdm and what they need; no vLLM, no scipy."""
    packages = tmp_path / "packages"
    packages.mkdir()
    waiting, linked = ["torch", "triton", "transformers", "numpy", "pillow", "safetensors", "tqdm"], set()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in linked or (found := _distribution(name)) is None:
            continue
        linked.add(name)
        for top in {Path(str(file)).parts[0] for file in found.files or ()} - {".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(str(found.locate_file(top))))
        needed = map(Requirement, found.requires or ())
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert not linked & {"vllm", "vllm-redvtp", "scipy", "tabulate"}
    arguments = ["--device", "cpu", "--small", "--only", "golden", "attention", "--output", str(tmp_path)]
    script = f"import sys; from redvtp.gpucheck.__main__ import main; sys.exit(main({arguments!r}))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'engine'}{os.pathsep}{packages}"}
    # -S: nothing of what is installed beside them.
    command = [sys.executable, "-S", "-c", script]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def _distribution(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None
