"""Every attention backend over ragged batches in half precision, against plain products in float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from redvtp.attention.interface import AttentionBackend
from redvtp.gpucheck.backends import Backend, backends
from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.ragged import LAYERS, PARTS, Part, Ragged, Result, Shape
from redvtp.gpucheck.report import Report

PART = "attention"
# Largest difference, absolute and relative, of outputs around 1: three roundings of the type, that of the stored
# probabilities among them.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Of scores, as a share of the largest one: both sides work them out in float32.
SCORE_TOLERANCE = 5e-3
# LLaDA's heads, Dream's grouped heads, the smallest page of the kernels, and a small model's.
_SHAPES = ((8, 8, 128, 64), (7, 1, 128, 64), (8, 8, 128, 16), (4, 2, 64, 128))
# Beside the short ones, lengths of the real thing: a full step and a response step of 3.8 k tokens.
_LONG = (Part(3806, 3774), Part(1900, 0))


def check_attention(machine: Machine, report: Report, budget: Budget, tick: Callable[[str], None]) -> None:
    parts = PARTS if machine.small else (*PARTS, *_LONG)
    for heads, kv_heads, head_dim, block_size in _SHAPES:
        for dtype in TOLERANCE:
            shape = Shape(heads, kv_heads, head_dim, block_size, dtype)
            label = f"{heads}/{kv_heads} heads of {head_dim}, pages of {block_size}, {str(dtype).split('.')[1]}"
            if not budget.allows():
                report.left_out.append(f"attention of {label}: no time left for it")
                continue
            tick(f"attention: {label}")
            ragged = Ragged(shape, parts, device=machine.device)
            expected = plain(ragged)
            for backend in backends():
                with report.checking(PART, f"{backend.name}, {label}"):
                    _check(report, backend, ragged, expected, f"{backend.name}, {label}")


def _check(report: Report, backend: Backend, ragged: Ragged, expected: Result, name: str) -> None:
    shape = ragged.shape
    obstacle = backend.obstacle(ragged.device, shape.dtype, shape.head_dim, shape.block_size)
    if obstacle is not None:
        report.skip(PART, name, obstacle)
        return
    pages = ragged.pages()
    made = backend.make(pages, shape.heads, shape.scale)
    found = ragged.run(made, pages, scored=True)
    tolerance = TOLERANCE[shape.dtype]
    apart = _apart(found.output, expected.output, tolerance * (1 + expected.output.abs()))
    scores = max(
        _apart(own, other, SCORE_TOLERANCE * other.max())
        for own, other in zip(found.scores, expected.scores, strict=True)
    )
    detail = f"output {apart:.2f}, scores {scores:.2f} of what the type allows"
    report.add(PART, name, apart <= 1 and scores <= 1, detail)
    report.add(PART, f"{name}: pages", *_pages(found, expected, ragged))
    if made.batch_invariant:
        report.add(PART, f"{name}: alone", *_alone(made, found, ragged))


def plain(ragged: Ragged) -> Result:
    """The same by its definition, in float32, without pages: the reference of all backends, torch's among them."""
    pages, shape = ragged.pages(), ragged.shape
    scores = ragged.scores()
    layout = ragged.layout()
    assert layout.write_slots is not None
    output = torch.empty(LAYERS, *ragged.query.shape, device=ragged.device)
    sums = [torch.zeros_like(own.by_row()) for _, own in scores]
    group = shape.heads // shape.kv_heads
    for layer in range(LAYERS):
        pages.write(layer, layout.write_slots, ragged.key, ragged.value)
        for index, part in enumerate(ragged.parts):
            rows = ragged.rows(index)
            read = pages.read(layer, layout.slots[index][: part.length])
            key, value = (one.float().transpose(0, 1).repeat_interleave(group, 0) for one in read)
            logits = ragged.query[rows].float().transpose(0, 1) @ key.transpose(1, 2) * shape.scale
            weights = logits.softmax(-1)  # [heads, rows, tokens]
            output[layer, rows] = (weights @ value).transpose(0, 1)
            for own, (of, scored) in zip(sums, scores, strict=True):
                if of == index and scored.counts(layer):
                    seen = weights[:, scored.rows][:, :, scored.visual].sum(0) * scored.weight
                    own += seen.sum(0, keepdim=True) if scored.averaged else seen
    return Result(output, [*pages.keys, *pages.values], sums)


def _apart(found: Tensor, expected: Tensor, allowed: Tensor) -> float:
    """The largest difference as a multiple of what is allowed; infinite where something is no number."""
    apart = float(((found.float() - expected).abs() / allowed).max())
    return apart if apart == apart else float("inf")


def _pages(found: Result, expected: Result, ragged: Ragged) -> tuple[bool, str]:
    """Whether the pages hold what was written and nothing else was touched."""
    behind = ragged.behind_the_last_keys()
    for ours, theirs in zip(found.pages, expected.pages, strict=True):
        left, right = ours.flatten(0, 1).clone(), theirs.flatten(0, 1)
        # What a kernel may clear.
        left[behind] = right[behind]
        if not torch.equal(left.view(torch.int16), right.view(torch.int16)):
            return False, "slots outside the batch's rows have changed, or rows were not written"
    return True, ""


def _alone(backend: AttentionBackend, found: Result, ragged: Ragged) -> tuple[bool, str]:
    """Whether each sequence has the same bits without its neighbours, as the backend says."""
    different = [
        index
        for index in range(len(ragged.parts))
        if not torch.equal(ragged.alone(backend, index), found.output[:, ragged.rows(index)])
    ]
    lengths = [ragged.parts[index].length for index in different]
    return not different, f"other bits than in the batch: sequences of {lengths} tokens" if different else ""
