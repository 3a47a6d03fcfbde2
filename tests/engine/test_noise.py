"""Random numbers by place: the same everywhere, and random."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from redvtp.canvas.proposals import gumbel_perturbed
from redvtp.noise import CONFIDENCE, GUMBEL, Draws, uniform

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def _mixed64(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def _mixed32(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def _slow(seed: int, step: int, stream: int, place: int, index: int) -> float:
    """The definition, in Python's whole numbers."""
    key = 0
    for part in (seed, step, stream, place):
        key = _mixed64(key ^ _mixed64((part + 0x9E3779B97F4A7C15) & MASK64))
    low, high = key & MASK32, key >> 32
    bits = _mixed32((_mixed32((index * 0x9E3779B9 + low) & MASK32) + high) & MASK32)
    return (((bits + (1 << 31)) & MASK32) + 0.5) / 2**32


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 11, -3])
def test_numbers_are_what_the_definition_says(seed: int) -> None:
    """On vectors, and at their odd ends, where other instructions run."""
    drawn = uniform(Draws(seed, 5).keys(GUMBEL, torch.tensor([0, 3, 511])), 1003)
    for row, place in enumerate((0, 3, 511)):
        for index in (0, 1, 15, 16, 998, 1002):
            assert drawn[row, index] == _slow(seed, 5, GUMBEL, place, index)


def test_every_part_of_the_place_counts() -> None:
    places = torch.arange(4)
    usual = uniform(Draws(1, 2).keys(GUMBEL, places), 50)
    for other in (
        Draws(2, 2).keys(GUMBEL, places),
        Draws(1, 3).keys(GUMBEL, places),
        Draws(1, 2).keys(CONFIDENCE, places),
    ):
        assert not (uniform(other, 50) == usual).any()
    assert usual.unique().numel() == usual.numel()


def test_they_are_uniform_and_do_not_hang_together() -> None:
    drawn = uniform(Draws(0, 0).keys(GUMBEL, torch.arange(200)), 1000).numpy()
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    for left, right in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1]), (drawn[:, 7:], drawn[:, :-7])):
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 0.01
    pairs = np.histogram2d(drawn[:, :-1].ravel(), drawn[:, 1:].ravel(), bins=16)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_follow_the_softmax(temperature: float) -> None:
    """The best of perturbed logits is a draw from the softmax of logits / temperature: chi-square over 12 ids."""
    logits = torch.linspace(-1.5, 1.5, 12)
    count = 20000
    keys = torch.cat([Draws(3, step).keys(GUMBEL, torch.arange(100)) for step in range(count // 100)])
    heat = torch.full((count, 1), temperature, dtype=torch.float64)
    drawn = gumbel_perturbed(logits.repeat(count, 1), heat, keys).argmax(-1)
    expected = (logits.double() / temperature).softmax(-1) * count
    observed = torch.bincount(drawn, minlength=12)
    assert stats.chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
