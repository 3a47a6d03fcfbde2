"""What the command found: checks, measured rates, measured steps, and what was left out. Writes JSON and Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison.

    part: the part of the command it belongs to.
    status: `passed`, `failed`, or `skipped` with the reason in `detail`.
    """

    part: str
    name: str
    status: str
    detail: str = ""


@dataclass(slots=True)
class Report:
    """Everything found so far.

    machine: the device and the versions.
    rates: what the card reaches, see `redvtp.gpucheck.rates`.
    cells: measured steps, see `redvtp.gpucheck.speed.Cell`.
    kernels: what the device did in a step, by kernel, see `redvtp.gpucheck.profile`.
    left_out: what the time or the memory did not allow, with the reason.
    tell: called with each line that a person should see at once.
    """

    machine: dict[str, Any]
    tell: Callable[[str], None]
    rates: dict[str, float] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAILED]

    def add(self, part: str, name: str, passed: bool, detail: str = "") -> None:
        self.checks.append(Check(part, name, PASSED if passed else FAILED, detail))
        if not passed:
            self.tell(f"FAILED {part}: {name}: {detail}")

    def skip(self, part: str, name: str, reason: str) -> None:
        self.checks.append(Check(part, name, SKIPPED, reason))

    @contextmanager
    def checking(self, part: str, name: str) -> Iterator[None]:
        """An exception within it is a failed check: a kernel that does not compile must not hide what comes next."""
        try:
            yield
        except Exception as error:
            self.add(part, name, False, f"{type(error).__name__}: {str(error).strip()[:500]}")

    def counts(self) -> dict[str, Counter[str]]:
        """{part: how many checks passed, failed, were skipped}, in the order in which the parts ran."""
        found: dict[str, Counter[str]] = {}
        for check in self.checks:
            found.setdefault(check.part, Counter())[check.status] += 1
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "seconds": round(self.seconds, 1),
            "failed": len(self.failed),
            "rates": self.rates,
            "checks": [asdict(check) for check in self.checks],
            "cells": self.cells,
            "kernels": self.kernels,
            "left_out": self.left_out,
        }


def write(report: Report, folder: Path, markdown: str) -> None:
    """gpucheck.json and gpucheck.md. Called after each part, so that a run that is cut off leaves what it had."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpucheck.json").write_text(json.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "gpucheck.md").write_text(markdown, encoding="utf-8")
