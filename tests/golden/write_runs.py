"""Writes runs.json beside it: the committed runs of the references in our knobs, for `python -m redvtp.gpucheck`.

    python tests/golden/write_runs.py

`tests/golden_runs.py` translates. A card has no tests installed, so what they know of a run is written down here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from golden_data import DREAM, Run, runs  # noqa: E402
from golden_runs import knobs, one_of_each_mode  # noqa: E402

MASK = 584


def index() -> list[dict[str, Any]]:
    """One entry for each run of the committed part, whichever part the tests read."""
    # What no knob asks for, see tests/parity.
    known = [run for run in runs() if "noschedule" not in run.name and _committed(run)]
    quick = one_of_each_mode(known)
    return [{**_entry(run), "quick": str(run) in quick} for run in known]


def _committed(run: Run) -> bool:
    file = HERE / "goldens" / run.case.checkpoint / run.case.name / f"{run.kind}.json"
    return file.is_file() and run.name in json.loads(file.read_text())["runs"]


def _entry(run: Run) -> dict[str, Any]:
    values = knobs(run)
    pruning = {"preset": values.pop("pruning")} | ({"keep_ratio": ratio} if (ratio := run.keep_ratio) else {})
    values.pop("keep_ratio", None)
    stop = list(run.params.get("stopping_criteria", ()))
    return {
        "checkpoint": run.case.checkpoint,
        "case": run.case.name,
        "kind": run.kind,
        "name": run.name,
        "robust": run.robust,
        "question": run.case.question,
        "images": [file.name for file in run.case.image_files],
        "config": run.case.config_overrides,
        "denoising": {**values, "stop": stop, "ignore_eos": True},
        "pruning": pruning,
        # Behind a stop the reference's last step chooses arbitrarily.
        "compared": len(run.output) if stop else values["gen_length"],
        "steps": _steps(run),
        "output": run.output,
    }


def _steps(run: Run) -> list[int]:
    """Steps of the reference that the engine takes, too: it skips those of Dream's that commit nothing."""
    masked = [int(count) for count in (run.tensor("x") == MASK).sum(1)]
    if run.case.checkpoint not in DREAM:
        return list(range(len(masked)))
    return [step for step, count in enumerate(masked) if step == 0 or count < masked[step - 1]]


if __name__ == "__main__":
    entries = index()
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    (HERE / "runs.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{len(entries)} runs, {sum(entry['quick'] for entry in entries)} of them quick")
