"""Whether all packages are there in versions that go together, and whether vLLM will find the plugin."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution, entry_points, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from redvtp.doctor.findings import Finding

PACKAGE = "vllm-redvtp"
PLUGINS = "vllm.general_plugins"
PLUGIN = "redvtp"
TOPIC = "installed"
_SET_UP = "run ./scripts/setup.sh in the folder of the repository, then `. .venv/bin/activate`"
# Kernels for NVIDIA GPUs. On a CPU none of them is used.
_KERNELS = ("xformers", "triton", "flash_attn", "flashinfer")


def installed() -> Iterator[Finding]:
    """One line for each package, then the plugin and the command."""
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        yield Finding(TOPIC, f"{PACKAGE} is not installed in {sys.prefix}", _SET_UP)
        return
    yield Finding(TOPIC, f"{PACKAGE} {package.version} in {sys.prefix}")
    yield _python(package)
    missing_extras = []
    for text in package.requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)
        elif requirement.marker.evaluate({"extra": "eval"}) and _version(requirement.name) is None:
            missing_extras.append(requirement.name)
    if missing_extras:
        names = ", ".join(dict.fromkeys(missing_extras))
        yield Finding(
            TOPIC, f"not there: {names}; only redvtp eval and consistency need it: pip install '{PACKAGE}[eval]'"
        )
    kernels = [name for name in _KERNELS if find_spec(name) is not None]
    yield Finding(TOPIC, f"kernels for GPUs: {', '.join(kernels) or 'none'}; none is needed on a CPU")
    yield _plugin()
    yield _command()


def serve_command() -> str:
    """`vllm` as it must be typed here."""
    beside = Path(sys.executable).with_name("vllm")
    return "vllm" if shutil.which("vllm") is not None or not beside.is_file() else str(beside)


def _python(package: Distribution) -> Finding:
    now = ".".join(map(str, sys.version_info[:3]))
    wanted = package.metadata["Requires-Python"] or ""
    if now not in SpecifierSet(wanted):
        return Finding(
            TOPIC, f"python {now}, but {PACKAGE} needs {wanted}", "PYTHON=/path/to/python ./scripts/setup.sh"
        )
    return Finding(TOPIC, f"python {now}")


def _package(requirement: Requirement) -> Finding:
    found = _version(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    if found is None:
        return Finding(TOPIC, f"{requirement.name} is not installed", f"pip install '{wanted}', or ./scripts/setup.sh")
    if not requirement.specifier.contains(found, prereleases=True):
        remedy = f"pip install '{wanted}', or ./scripts/setup.sh"
        return Finding(TOPIC, f"{requirement.name} {found}, but {PACKAGE} needs {requirement.specifier}", remedy)
    return Finding(TOPIC, f"{requirement.name} {found}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _plugin() -> Finding:
    names = {entry.name for entry in entry_points(group=PLUGINS)}
    if PLUGIN not in names:
        return Finding(TOPIC, f"vLLM will not find the plugin {PLUGIN}: it is in no entry point of {PLUGINS}", _SET_UP)
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        text = f"the environment variable VLLM_PLUGINS={allowed} keeps the plugin {PLUGIN} out"
        return Finding(TOPIC, text, f"serve with --plugin {PLUGIN}, which adds it, or `unset VLLM_PLUGINS`")
    return Finding(TOPIC, f"vLLM finds the plugin {PLUGIN}")


def _command() -> Finding:
    command = serve_command()
    if command != "vllm":
        text = f"the command vllm is not on PATH; it is {command} (or first `. {Path(command).with_name('activate')}`)"
        return Finding(TOPIC, text)
    if shutil.which(command) is None:
        return Finding(TOPIC, "there is no command vllm", _SET_UP)
    return Finding(TOPIC, "the command vllm is on PATH")
