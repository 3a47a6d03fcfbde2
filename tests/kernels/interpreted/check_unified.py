"""The backend `triton`: vLLM's kernel and our scores, in Triton's interpreter, against torch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
import vllm.triton_utils
from triton.language.extra import libdevice

from kernels.ragged import PARTS, SHAPES, Part, Ragged, Shape, same
from redvtp.attention.paged import PagedAttention
from redvtp.kv.pages import PagedKVCache


@pytest.fixture(scope="module", autouse=True)
def _triton_on_a_cpu() -> None:
    """vLLM switches Triton off where it runs on a CPU; its kernel's module takes it from here as it is imported."""
    found = {"triton": triton, "tl": tl, "tldevice": libdevice, "HAS_TRITON": True}
    for name, value in found.items():
        setattr(vllm.triton_utils, name, value)


def _attention(ragged: Ragged, pages: PagedKVCache) -> PagedAttention:
    from vllm_redvtp.attention.triton import TritonKernel

    return PagedAttention(pages, ragged.shape.scale, TritonKernel(ragged.shape.scale))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_ragged_batch(shape: Shape) -> None:
    ragged = Ragged(shape)
    pages = ragged.pages()
    found = ragged.run(_attention(ragged, pages), pages, scored=True)
    same(found, ragged.expected(scored=True), ragged, clears=False)


def test_sequences_that_read_some_of_their_slots_only_go_to_torch() -> None:
    ragged = Ragged(SHAPES[0], (Part(70, 61, gap=3), *PARTS[:2]))
    pages = ragged.pages()
    same(ragged.run(_attention(ragged, pages), pages), ragged.expected(), ragged, clears=False)


def test_neighbours_change_no_bit() -> None:
    together = Ragged(SHAPES[0])
    pages = together.pages()
    found = together.run(_attention(together, pages), pages, scored=True)
    rows = [part.length - part.first for part in PARTS]
    outputs = found.output.split(rows, dim=1)
    starts = [sum(rows[:index]) for index in range(len(rows))]
    for index, part in enumerate(PARTS):
        alone = Ragged(SHAPES[0], [part])
        alone.blocks, alone.tables = together.blocks, [together.tables[index]]
        own = slice(starts[index], starts[index] + rows[index])
        alone.query, alone.key, alone.value = together.query[own], together.key[own], together.value[own]
        again = together.pages()
        result = alone.run(_attention(alone, again), again)
        assert torch.equal(result.output, outputs[index])
