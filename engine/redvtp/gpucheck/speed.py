"""Times of whole denoising steps of a random LLaDA-V, and what share of the card's rates they reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from redvtp.attention.embedded import preferred_block_size
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.costs import Cost, Work, compaction_cost, score_cost, step_cost
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.model import PUBLISHED, SMALL, RandomModel, block_tables, random_model
from redvtp.gpucheck.profile import busiest_kernels
from redvtp.gpucheck.rates import COPY, MATRIX, measured_rates
from redvtp.gpucheck.report import Report
from redvtp.gpucheck.settings import Setting, needed_bytes, serving_backends, settings
from redvtp.kv.pages import PagedKVCache
from redvtp.reports import StepReport

PART = "speed"
# Rounds of a setting after the one that warms up, by its batch, and the steps of each behind the first one.
_ROUNDS = {1: 3, 4: 2, 16: 1}
_RESPONSE_STEPS, _FULL_STEPS = 10, 3
# A guess, before a setting runs, of what share of the matrix rate a full step reaches.
_GUESSED_SHARE = 0.35


@dataclass(frozen=True, slots=True)
class Cell:
    """One line of the table.

    what: `first step`, `full step` (a later one), `response step`, or what pruning adds to the first step: `score`,
        `compaction`.
    rows: computed in all sequences; for compaction those that move.
    ms: the median. samples: of how many.
    tflop, gigabytes: the least it has to do, see `redvtp.gpucheck.costs`.
    of_matrix, of_copy: shares of the measured rates.
    peak_gib: memory of the whole setting, weights and pages among them.
    """

    what: str
    batch: int
    keep: float
    cache: str
    attention: str
    temperature: float
    rows: int
    ms: float
    samples: int
    tflop: float
    gigabytes: float
    of_matrix: float
    of_copy: float
    peak_gib: float


@dataclass(frozen=True, slots=True)
class _Sample:
    """One measured thing, see `Cell`."""

    what: str
    rows: int
    ms: float
    cost: Cost


def check_speed(machine: Machine, report: Report, budget: Budget, tick: Callable[[str], None]) -> None:
    tick("speed: rates of the card")
    # CPUs of today multiply bfloat16 slowly, if at all.
    sizes, dtype = (SMALL, torch.float32) if machine.small else (PUBLISHED, torch.bfloat16)
    report.rates = measured_rates(machine, dtype)
    tick("speed: random weights")
    try:
        made = random_model(sizes, machine.device, dtype)
    except torch.OutOfMemoryError as error:
        report.left_out.append(f"all of the speed: the weights do not fit the memory ({str(error)[:100]})")
        return
    head_dim, block_size = made.model.config.head_dim, preferred_block_size(machine.device)
    names = list(serving_backends(machine.device, dtype, head_dim, block_size))
    for setting in settings(names):
        reason = _obstacle(machine, report, budget, made, setting)
        if reason is None:
            tick(f"speed: {setting}")
            with report.checking(PART, str(setting)):
                reason = _measure(machine, report, budget, made, setting)
        if reason is not None:
            report.left_out.append(f"{setting}: {reason}")


def _obstacle(machine: Machine, report: Report, budget: Budget, made: RandomModel, setting: Setting) -> str | None:
    """Why a setting is left out; None where it can run."""
    config, tokens, size = made.model.config, made.sizes.tokens, made.model.dtype.itemsize
    needed, free = needed_bytes(config, made.sizes, size, setting.batch), machine.memory
    if needed > free:
        return f"needs about {needed / 2**30:.1f} GiB beside the weights, {free / 2**30:.1f} GiB are free"
    first = step_cost(config, size, [Work(tokens, tokens, made.sizes.gen_length)] * setting.batch)
    seconds = first.flop / (_GUESSED_SHARE * report.rates[MATRIX])
    # Two rounds are the least: one warms up.
    if not budget.allows(2 * (1 + _FULL_STEPS * (setting.cache == "none")) * seconds):
        return "no time left for it"
    return None


def _measure(machine: Machine, report: Report, budget: Budget, made: RandomModel, setting: Setting) -> str | None:
    """Adds the cells of a setting. Returns why there are none."""
    machine.forget_peak()
    try:
        samples = _samples(machine, report, budget, made, setting)
    except torch.OutOfMemoryError:
        samples = []
    # Outside the handler: within it the traceback holds what did not fit.
    peak = machine.peak()
    if not samples:
        return "did not fit the memory"
    for what, rows in dict.fromkeys((sample.what, sample.rows) for sample in samples):
        own = [sample for sample in samples if (sample.what, sample.rows) == (what, rows)]
        ms, cost = statistics.median(sample.ms for sample in own), own[0].cost
        report.cells.append(asdict(_cell(report, setting, own[0], ms, len(own), cost, peak)))
    return None


def _cell(report: Report, setting: Setting, sample: _Sample, ms: float, count: int, cost: Cost, peak: int) -> Cell:
    seconds = max(ms, 1e-6) / 1e3
    return Cell(
        what=sample.what,
        **asdict(setting),
        rows=sample.rows,
        ms=round(ms, 4),
        samples=count,
        tflop=cost.flop / 1e12,
        gigabytes=cost.bytes / 1e9,
        of_matrix=round(cost.flop / seconds / report.rates[MATRIX], 4),
        of_copy=round(cost.bytes / seconds / report.rates[COPY], 4),
        peak_gib=round(peak / 2**30, 2),
    )


def _samples(machine: Machine, report: Report, budget: Budget, made: RandomModel, setting: Setting) -> list[_Sample]:
    """Of a few rounds, all but the first."""
    config, sizes, block_size = made.model.config, made.sizes, preferred_block_size(machine.device)
    blocks, tables = block_tables([sizes.tokens] * setting.batch, block_size)
    pages = PagedKVCache(
        config.num_hidden_layers,
        blocks,
        block_size,
        config.num_key_value_heads,
        config.head_dim,
        made.model.dtype,
        machine.device,
    )
    backend = serving_backends(machine.device, made.model.dtype, config.head_dim, block_size)[setting.attention]
    attention = backend.make(pages, config.num_attention_heads, config.head_dim**-0.5)
    runner = DenoisingRunner(made.model, pages, made.special, attention=attention)
    samples: list[_Sample] = []
    for number in range(1 + (1 if machine.small else _ROUNDS[setting.batch])):
        if number > 1 and not budget.allows():
            break
        sequences = [
            made.sequence(index, setting.denoising(sizes), setting.pruning(), list(table), sizes.visual)
            for index, table in enumerate(tables)
        ]
        found = _request(machine, runner, made, setting, sequences)
        samples += found if number else []
    kept = sequences[0].prompt.num_visual
    wanted = max(1, int(sizes.visual * setting.keep))
    finite = bool(pages.keys[-1].isfinite().all()) and bool(pages.values[-1].isfinite().all())
    detail = f"{kept} of {sizes.visual} visual tokens kept, {'finite' if finite else 'NOT FINITE'}"
    report.add(PART, str(setting), kept == wanted and finite, detail)
    if setting.profiled:
        # A machine may not let its counters be read.
        with report.checking(PART, f"{setting}: profile"):
            report.kernels += busiest_kernels(machine, runner, sequences, str(setting))
    return samples


def _request(
    machine: Machine, runner: DenoisingRunner, made: RandomModel, setting: Setting, sequences: list[Sequence]
) -> list[_Sample]:
    """The first steps of a batch."""
    samples = []
    for number in range(1 + (_FULL_STEPS if setting.cache == "none" else _RESPONSE_STEPS)):
        begun = runner.begin(sequences)
        counts = [one.sequence.canvas.masked_rows(one.plan.first_candidate).numel() for one in begun]
        work = [
            Work(one.plan.tokens_computed, one.sequence.total_length, count)
            for one, count in zip(begun, counts, strict=True)
        ]
        before = dict(runner.clock.seconds)
        reports: list[StepReport] = []
        ms = machine.milliseconds(lambda reports=reports: reports.extend(runner.step(sequences)))  # type: ignore[misc]
        # What the step ended with, such as compaction, was still under way when it collected.
        runner.clock.collect()
        what = f"{reports[0].kind} step" if number else "first step"
        rows = sum(one.rows for one in work)
        samples.append(_Sample(what, rows, ms, step_cost(made.model.config, made.model.dtype.itemsize, work)))
        if number == 0 and setting.keep < 1:
            added = {label: (after - before[label]) * 1e3 for label, after in runner.clock.seconds.items()}
            samples += _added_by_pruning(made, setting, reports, added)
    return samples


def _added_by_pruning(
    made: RandomModel, setting: Setting, reports: list[StepReport], ms: dict[str, float]
) -> list[_Sample]:
    """What scores and compaction took in the first step."""
    config, sizes, size = made.model.config, made.sizes, made.model.dtype.itemsize
    scored = score_cost(config, size, sizes.gen_length, sizes.visual, len(reports))
    samples = [_Sample("score", sizes.gen_length * len(reports), ms["score"], scored)]
    if setting.cache != "none":
        # Without pages to read later nothing moves; the rows in front of the image stay where they are.
        moved = sum(report.prompt_length - sizes.text // 2 for report in reports)
        samples.append(_Sample("compaction", moved, ms["compaction"], compaction_cost(config, size, moved)))
    return samples
