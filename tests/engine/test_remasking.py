"""Proposals: suppression, float64 confidence, seeded noise."""

from __future__ import annotations

import torch

from redvtp.denoising.remasking import gumbel_perturbed, propose, select, suppress


def _generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for _ in range(count)]


def test_suppressed_ids_never_win() -> None:
    logits = suppress(torch.tensor([[1.0, 9.0, 5.0]]), (1,))
    proposals = propose(logits, [0.0], _generators(1), [1])
    assert proposals.tokens.tolist() == [2]


def test_confidence_tells_apart_what_float32_cannot() -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0], [20.0, 0.0, -1.0]])
    assert logits.softmax(-1)[0, 0] == logits.softmax(-1)[1, 0]
    proposals = propose(logits, [0.0], _generators(1), [2])
    assert select(proposals.confidence, 1).tolist() == [1]


def test_each_request_draws_from_its_own_seed() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    together = propose(logits, [0.0, 1.5, 1.5], _generators(3, 7), [2, 2, 2])
    alone = propose(logits[4:], [1.5], _generators(1, 7), [2])
    assert together.tokens[4:].tolist() == alone.tokens.tolist()
    assert together.tokens[:2].tolist() == logits[:2].argmax(-1).tolist()


def test_gumbel_noise_samples_the_softmax() -> None:
    """At temperature 1 the argmax of perturbed logits follows the softmax of the logits."""
    logits = torch.tensor([2.0, 1.0, 0.0]).repeat(20000, 1)
    drawn = gumbel_perturbed(logits, 1.0, torch.Generator().manual_seed(3)).argmax(-1)
    shares = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([2.0, 1.0, 0.0]).softmax(-1), atol=0.02, rtol=0)


def test_selecting_more_than_there_is_takes_all() -> None:
    assert sorted(select(torch.tensor([0.1, 0.3]), 5).tolist()) == [0, 1]
