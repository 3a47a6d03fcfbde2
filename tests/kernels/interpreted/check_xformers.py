"""The backend `xformers` and our scores, in Triton's interpreter, against torch."""

from __future__ import annotations

import pytest
import torch

from kernels.ragged import PARTS, Part, Ragged, Shape, same
from redvtp.attention.paged import PagedAttention
from redvtp.attention.xformers_paged import XformersKernel
from redvtp.kv.pages import PagedKVCache

# Pages of a multiple of 64, heads of a power of two. In the interpreter bfloat16 gives wrong numbers.
SHAPES = (
    Shape(4, 2, 32, 64, torch.float16),
    Shape(2, 2, 16, 128, torch.float16),
    Shape(4, 1, 64, 64, torch.float16),
)


def _attention(ragged: Ragged, pages: PagedKVCache) -> PagedAttention:
    return PagedAttention(pages, ragged.shape.scale, XformersKernel(ragged.shape.scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_ragged_batch(shape: Shape) -> None:
    ragged = Ragged(shape)
    pages = ragged.pages()
    found = ragged.run(_attention(ragged, pages), pages, scored=True)
    same(found, ragged.expected(scored=True), ragged, clears=True)


def test_a_batch_of_single_rows() -> None:
    ragged = Ragged(SHAPES[0], [Part(part.length, part.length - 1) for part in PARTS])
    pages = ragged.pages()
    found = ragged.run(_attention(ragged, pages), pages, scored=True)
    same(found, ragged.expected(scored=True), ragged, clears=True)
