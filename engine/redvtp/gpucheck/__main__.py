"""The command.

    PYTHONPATH=engine python3 -m redvtp.gpucheck --output out/gpucheck            a card, nine minutes at most
    python -m redvtp.gpucheck --device cpu --small --output out/gpucheck          the same code, at small sizes

Status 0 when every check passed, 1 when one failed, 2 for a flag that cannot be.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from redvtp.device import configure_torch, named_device
from redvtp.errors import InvalidRequest
from redvtp.gpucheck.attention import check_attention
from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.golden_runs import check_golden
from redvtp.gpucheck.kernels import check_kernels
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.markdown import as_markdown
from redvtp.gpucheck.report import FAILED, PASSED, SKIPPED, Report, write
from redvtp.gpucheck.sampling import check_sampling
from redvtp.gpucheck.speed import check_speed

PARTS = ("golden", "attention", "kernels", "sampling", "speed")
# Of the time that is left when a part begins, the most it may take; speed takes what there is.
_SHARES = {"golden": 0.2, "attention": 0.2, "kernels": 0.15}
# For the last piece of work that was begun, and for writing.
_RESERVE_MINUTES = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        device = named_device(options.device)
    except InvalidRequest as error:
        print(f"gpucheck: error: {error}; --device cpu --small runs everywhere", file=sys.stderr)
        return 2
    started, machine = time.monotonic(), Machine(device, options.small)
    budget = Budget.of_minutes(max(0.0, options.minutes - _RESERVE_MINUTES))
    _settle(device)
    # disable=None: no bar where stderr is a file.
    with tqdm(total=len(options.only), unit="part", leave=None, disable=None) as bar:
        report = Report(machine.facts(), bar.write)
        bar.write(f"{report.machine['name']}, torch {report.machine['torch']}")
        for part in options.only:
            bar.write(f"{time.monotonic() - started:4.0f} s: {part}")
            with torch.inference_mode():
                _run(part, machine, report, budget, options.golden, bar.set_description)
            report.seconds = time.monotonic() - started
            write(report, options.output, as_markdown(report))
            bar.update()
    _summarise(report, options.output)
    return 1 if report.failed else 0


def _settle(device: torch.device) -> None:
    """As an engine sets torch; on a CPU one thread, so that other processes show as little as they can."""
    configure_torch(exact_products=True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)


def _run(
    part: str, machine: Machine, report: Report, budget: Budget, golden: Path, tick: Callable[[str], None]
) -> None:
    share = budget.share(_SHARES.get(part, 1.0))
    with report.checking(part, "the part as a whole"):
        match part:
            case "golden":
                check_golden(machine, report, share, golden, tick)
            case "attention":
                check_attention(machine, report, share, tick)
            case "kernels":
                check_kernels(machine, report, share, tick)
            case "sampling":
                check_sampling(machine, report, tick)
            case "speed":
                check_speed(machine, report, share, tick)


def _summarise(report: Report, folder: Path) -> None:
    for part, count in report.counts().items():
        print(f"{part:10} {count[PASSED]:4} passed {count[FAILED]:4} failed {count[SKIPPED]:4} skipped")
    for check in report.failed:
        print(f"FAILED {check.part}: {check.name}: {check.detail}")
    if report.cells:
        print(f"{len(report.cells)} kinds of steps measured")
    if report.left_out:
        print(f"{len(report.left_out)} left out, see the report")
    print(f"{report.seconds:.0f} s; {folder / 'gpucheck.md'}, {folder / 'gpucheck.json'}")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m redvtp.gpucheck", description="Checks a card, and measures denoising steps on it."
    )
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, or cpu (default %(default)s)")
    add("--small", action="store_true", help="small sizes, and one golden run of each mode")
    add("--minutes", type=float, default=9.0, metavar="N", help="stop after about so many (default %(default)s)")
    golden = "folder of the golden data, in a source checkout (default %(default)s)"
    add("--golden", type=Path, default=Path("tests/golden"), metavar="DIR", help=golden)
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    output = "folder for gpucheck.json and gpucheck.md (default %(default)s)"
    add("--output", type=Path, default=Path("gpucheck"), metavar="DIR", help=output)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
