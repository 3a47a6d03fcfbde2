"""The Triton kernels of scores and compaction against their torch twins, on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.ragged import LAYERS, PARTS, Part, Ragged, Shape
from redvtp.gpucheck.report import Report
from redvtp.kernels import score
from redvtp.kernels.choice import runs_kernels
from redvtp.kernels.scoring_work import ScoredPart, ScoringWork, scoring_work
from redvtp.kv.compaction import CompactionPlan, compact, compact_in_torch, joined, plan_compaction
from redvtp.kv.rotary import Rotary

PART = "kernels"
# Both compute in float32 from the same numbers and differ in the order of additions.
SCORE_TOLERANCE = 1e-4
# Of turned keys, absolute and relative: angles come from two libraries, and a last bit of the type may fall otherwise.
MOVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_SHAPES = ((8, 8, 128, 64), (7, 1, 128, 16), (6, 2, 24, 32))
_LONG = (Part(3806, 3742), Part(1900, 1836))
_THETA = 5e5


def check_kernels(machine: Machine, report: Report, budget: Budget, tick: Callable[[str], None]) -> None:
    if not runs_kernels(torch.empty(0, device=machine.device)):
        report.skip(PART, "scores and compaction", f"Triton is missing, or does not compile for {machine.device.type}")
        return
    parts = PARTS if machine.small else (*PARTS, *_LONG)
    # Triton's interpreter takes half a minute for one.
    for heads, kv_heads, head_dim, block_size in _SHAPES[-1:] if machine.small else _SHAPES:
        for dtype in MOVE_TOLERANCE:
            label = f"{heads}/{kv_heads} heads of {head_dim}, pages of {block_size}, {str(dtype).split('.')[1]}"
            if not budget.allows():
                report.left_out.append(f"kernels with {label}: no time left for it")
                continue
            tick(f"kernels: {label}")
            ragged = Ragged(Shape(heads, kv_heads, head_dim, block_size, dtype), parts, device=machine.device)
            if dtype == torch.bfloat16 and not machine.is_cuda:
                report.skip(PART, f"scores, {label}", "Triton's interpreter multiplies bfloat16 wrongly")
            else:
                with report.checking(PART, f"scores, {label}"):
                    _check_scores(report, ragged, label)
            for renumber in (True, False):
                name = f"compaction {'with' if renumber else 'without'} new positions, {label}"
                with report.checking(PART, name):
                    report.add(PART, name, *_compacted(ragged, renumber))


def _check_scores(report: Report, ragged: Ragged, label: str) -> None:
    work, keys, scale = _work(ragged), ragged.pages().keys[0], ragged.shape.scale
    counted = [index for index in range(len(work.parts)) if index != 1]
    lse = score.log_sum_exp(work, ragged.query, keys, scale)
    expected = score.log_sum_exp_in_torch(work, ragged.query, keys, scale)
    report.add(PART, f"log-sum-exp, {label}", *_close(lse, expected, SCORE_TOLERANCE))
    sums, twin = (torch.zeros(work.cells, device=ragged.device) for _ in range(2))
    score.score_sums(work, counted, ragged.query, keys, expected, sums, scale)
    score.score_sums_in_torch(work, counted, ragged.query, keys, expected, twin, scale)
    report.add(PART, f"score sums, {label}", *_close(sums, twin, SCORE_TOLERANCE))


def _work(ragged: Ragged) -> ScoringWork:
    layout = ragged.layout()
    parts = []
    for index, part in enumerate(ragged.parts):
        span = layout.spans[index]
        rows = torch.arange(span.start, span.end, device=ragged.device).flip(0)
        visual = torch.arange(0, part.length, 2, device=ragged.device)
        slots, table = layout.slots[index][visual], layout.block_tables[index]
        parts.append(ScoredPart(rows, slots, table, part.length, averaged=index % 2 == 0, weight=0.5))
    return scoring_work(parts)


def _compacted(ragged: Ragged, renumber: bool) -> tuple[bool, str]:
    plan, rotary = _plan(ragged, renumber), Rotary(ragged.shape.head_dim, _THETA)
    found, expected = ragged.pages(), ragged.pages()
    compact(found, plan, rotary)
    compact_in_torch(expected, plan, rotary, range(LAYERS))
    tolerance = MOVE_TOLERANCE[ragged.shape.dtype]
    for ours, theirs in zip(found.keys, expected.keys, strict=True):
        # What is no number in both has not been touched.
        close, detail = _close(ours.nan_to_num(7e3), theirs.nan_to_num(7e3), tolerance)
        if not close:
            return False, f"keys: {detail}"
    same = all(_bits_equal(ours, theirs) for ours, theirs in zip(found.values, expected.values, strict=True))
    return same, "" if same else "values have not moved to where the twin moves them"


def _plan(ragged: Ragged, renumber: bool) -> CompactionPlan:
    """Two of three rows stay, the first ones of some sequences and the last ones of others."""
    plans = []
    for index, (table, part) in enumerate(zip(ragged.tables, ragged.parts, strict=True)):
        rows = torch.arange(part.length, device=ragged.device)
        kept = rows[part.length // 3 :] if index % 2 else rows[rows % 3 != 1]
        new = torch.arange(kept.numel(), device=ragged.device) if renumber else kept
        blocks = torch.tensor(table, device=ragged.device)
        plans.append(plan_compaction(blocks, kept, kept, new, ragged.shape.block_size))
    return joined(plans)


def _close(found: Tensor, expected: Tensor, tolerance: float) -> tuple[bool, str]:
    allowed = tolerance * (1 + expected.float().abs())
    apart = float(((found.float() - expected.float()).abs() / allowed).max())
    return apart <= 1, f"{apart:.2f} of what is allowed"


def _bits_equal(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
