"""The Triton kernels of scores against their twins in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.ragged import LAYERS, SHAPES, TOLERANCE, Ragged, Shape
from redvtp.kernels import score
from redvtp.kernels.choice import runs_kernels
from redvtp.kernels.scoring_work import ScoredPart, ScoringWork, scoring_work


def _work(ragged: Ragged) -> ScoringWork:
    layout = ragged.layout()
    parts = []
    for index, part in enumerate(ragged.parts):
        rows = torch.arange(layout.spans[index].start, layout.spans[index].end)
        visual = torch.arange(0, part.length, 2)
        parts.append(
            ScoredPart(
                rows.flip(0),
                layout.slots[index][visual],
                layout.block_tables[index],
                part.length,
                averaged=index % 2 == 0,
                weight=0.5 + index,
            )
        )
    return scoring_work(parts)


def _lse_and_sums(ragged: Ragged, work: ScoringWork, counted: list[int], *, kernel: bool) -> tuple[Tensor, Tensor]:
    keys = ragged.pages().keys[LAYERS - 1]
    find, add = (
        (score.log_sum_exp, score.score_sums) if kernel else (score.log_sum_exp_in_torch, score.score_sums_in_torch)
    )
    lse = find(work, ragged.query, keys, ragged.shape.scale)
    sums = torch.arange(work.cells, dtype=torch.float32)
    add(work, counted, ragged.query, keys, lse, sums, ragged.shape.scale)
    return lse, sums - torch.arange(work.cells)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("counted", [[0, 1, 2, 3, 4, 5], [1, 4]], ids=["all", "some"])
def test_the_kernels_add_what_torch_adds(shape: Shape, counted: list[int]) -> None:
    ragged = Ragged(shape)
    work = _work(ragged)
    assert runs_kernels(ragged.query)
    lse, sums = _lse_and_sums(ragged, work, counted, kernel=True)
    expected_lse, expected_sums = _lse_and_sums(ragged, work, counted, kernel=False)
    tolerance = TOLERANCE[shape.dtype]
    torch.testing.assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)
    # The sums stand on numbers up to `cells`, which float32 keeps to that many bits only.
    torch.testing.assert_close(sums, expected_sums, atol=max(tolerance, work.cells * 2**-22), rtol=tolerance)
    for index, cells in enumerate(sums.split([part.cells for part in work.parts])):
        assert (cells.abs().max() > 0) == (index in counted), "a part that does not count is left alone"


def test_a_part_alone_has_the_same_bits() -> None:
    ragged = Ragged(SHAPES[0])
    together = _work(ragged)
    keys = ragged.pages().keys[0]
    lse = score.log_sum_exp(together, ragged.query, keys, ragged.shape.scale)
    sums = torch.zeros(together.cells)
    score.score_sums(together, range(len(together.parts)), ragged.query, keys, lse, sums, ragged.shape.scale)
    rows = [part.rows.numel() for part in together.parts]
    cells = [part.cells for part in together.parts]
    for part, own_lse, own_sums in zip(together.parts, lse.split(rows), sums.split(cells), strict=True):
        alone = scoring_work([part])
        assert torch.equal(score.log_sum_exp(alone, ragged.query, keys, ragged.shape.scale), own_lse)
        again = torch.zeros(alone.cells)
        score.score_sums(alone, [0], ragged.query, keys, own_lse, again, ragged.shape.scale)
        assert torch.equal(again, own_sums)
