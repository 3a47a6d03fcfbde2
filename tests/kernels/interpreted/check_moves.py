"""The Triton kernel of compaction against its twin in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.ragged import LAYERS, SHAPES, Part, Ragged, Shape
from redvtp.kernels.choice import runs_kernels
from redvtp.kv.compaction import CompactionPlan, compact, compact_in_torch, joined, plan_compaction
from redvtp.kv.pages import PagedKVCache
from redvtp.kv.rotary import Rotary

PARTS = (Part(130, 0), Part(33, 0), Part(1, 0), Part(64, 0), Part(70, 0))
# Angles in float32 are computed by two libraries; half keeps three digits.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3}


def _kept(part: Part, share: str) -> Tensor:
    rows = torch.arange(part.length)
    # The last ones: each row lands where another of the same tile comes from.
    return {"all": rows, "half": rows[::2], "last": rows[part.length // 3 :], "one": rows[-1:]}[share]


def _plan(ragged: Ragged, share: str, *, renumber: bool) -> CompactionPlan:
    plans = []
    for table, part in zip(ragged.tables, ragged.parts, strict=True):
        kept = _kept(part, share)
        new = torch.arange(kept.numel()) if renumber else kept
        plans.append(plan_compaction(torch.tensor(table), kept, kept, new, ragged.shape.block_size))
    return joined(plans)


def _close(found: PagedKVCache, expected: PagedKVCache, dtype: torch.dtype, *, renumber: bool) -> None:
    for ours, theirs in zip(found.keys, expected.keys, strict=True):
        tolerance = TOLERANCE[dtype] if renumber else 0
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance, equal_nan=True)
    for ours, theirs in zip(found.values, expected.values, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)), "values only move"


@pytest.mark.parametrize(
    ("shape", "renumber"), [*((shape, True) for shape in SHAPES), (SHAPES[0], False), (SHAPES[-1], False)], ids=str
)
@pytest.mark.parametrize("share", ["all", "half", "last", "one"])
def test_the_kernel_moves_what_torch_moves(shape: Shape, renumber: bool, share: str) -> None:
    ragged = Ragged(shape, PARTS)
    rotary = Rotary(shape.head_dim, 1e4)
    plan = _plan(ragged, share, renumber=renumber)
    found, expected = ragged.pages(), ragged.pages()
    assert runs_kernels(found.keys[0])
    compact(found, plan, rotary)
    compact_in_torch(expected, plan, rotary, range(LAYERS))
    _close(found, expected, shape.dtype, renumber=renumber)


def test_layers_that_are_not_named_stay() -> None:
    ragged = Ragged(SHAPES[0], PARTS)
    found, before = ragged.pages(), ragged.pages()
    compact(found, _plan(ragged, "half", renumber=True), Rotary(SHAPES[0].head_dim, 1e4), range(1, LAYERS))
    assert torch.equal(found.keys[0].view(torch.uint8), before.keys[0].view(torch.uint8))
    assert not torch.equal(found.keys[1].view(torch.uint8), before.keys[1].view(torch.uint8))
