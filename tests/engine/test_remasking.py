"""Proposals: suppression, float64 confidence, seeded noise."""

from __future__ import annotations

import math

import torch

from redvtp.canvas.proposals import Choice, Proposals, keep_best, propose, select, suppress
from redvtp.noise import Draws


def _propose(
    logits: torch.Tensor,
    rows: list[int],
    temperatures: tuple[float, ...] = (0.0,),
    remasking: str = "low_confidence",
    seed: int = 0,
    vocab: int | None = None,
) -> Proposals:
    choices = [Choice(temperature, remasking, Draws(seed, 0)) for temperature in temperatures]
    return propose(
        logits, logits.shape[1] if vocab is None else vocab, choices, [torch.arange(count) for count in rows]
    )


def test_suppressed_ids_never_win() -> None:
    logits = suppress(torch.tensor([[1.0, 9.0, 5.0]]), (1,))
    proposals = _propose(logits, [1])
    assert proposals.tokens.tolist() == [2]


def test_ids_no_token_has_never_win_but_take_their_share() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0]])
    proposals = _propose(logits, [1], vocab=2)
    assert proposals.tokens.tolist() == [1]
    torch.testing.assert_close(proposals.confidence, logits.double().softmax(-1)[:, 1])


def test_each_confidence_ranks_by_its_own_idea() -> None:
    """Three rows, each of which another confidence likes best."""
    rows = torch.tensor([[0.50, 0.45, 0.05, 0.0], [0.48, 0.18, 0.17, 0.17], [0.49, 0.49, 0.02, 0.0]]).log()
    expected = {"low_confidence": 0, "margin": 1, "entropy": 2}
    for remasking, best in expected.items():
        assert select(_propose(rows, [3], remasking=remasking).confidence, 1).tolist() == [best], remasking


def test_confidences_are_what_their_names_say() -> None:
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for row, entropy, margin in zip(
        logits.tolist(),
        _propose(logits, [40], remasking="entropy").confidence.tolist(),
        _propose(logits, [40], remasking="margin").confidence.tolist(),
        strict=True,
    ):
        total = sum(math.exp(value) for value in row)
        shares = sorted((math.exp(value) / total for value in row), reverse=True)
        assert math.isclose(entropy, sum(p * math.log(p) for p in shares), rel_tol=1e-6)
        assert math.isclose(margin, shares[0] - shares[1], rel_tol=1e-9)


def test_random_confidence_ignores_the_logits_and_repeats_with_the_seed() -> None:
    first = _propose(torch.randn(6, 9), [6], remasking="random", seed=3).confidence
    again = _propose(torch.randn(6, 9), [6], remasking="random", seed=3).confidence
    other = _propose(torch.randn(6, 9), [6], remasking="random", seed=4).confidence
    assert first.tolist() == again.tolist() != other.tolist()


def test_only_the_best_ids_keep_any_probability() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 5.0]])
    assert keep_best(logits.clone(), 2).isneginf().tolist() == [[False, True, False, True], [True, False, False, False]]
    assert torch.equal(keep_best(logits.clone(), None), logits)
    assert torch.equal(keep_best(logits.clone(), 9), logits)


def test_confidence_tells_apart_what_float32_cannot() -> None:
    logits = torch.tensor([[20.0, 0.0, 0.0], [20.0, 0.0, -1.0]])
    assert logits.softmax(-1)[0, 0] == logits.softmax(-1)[1, 0]
    proposals = _propose(logits, [2])
    assert select(proposals.confidence, 1).tolist() == [1]


def test_each_request_draws_from_its_own_seed() -> None:
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    together = _propose(logits, [2, 2, 2], (0.0, 1.5, 1.5), seed=7)
    alone = _propose(logits[4:], [2], (1.5,), seed=7)
    assert together.tokens[4:].tolist() == alone.tokens.tolist()
    assert together.tokens[:2].tolist() == logits[:2].argmax(-1).tolist()


def test_selecting_more_than_there_is_takes_all() -> None:
    assert sorted(select(torch.tensor([0.1, 0.3]), 5).tolist()) == [0, 1]


def test_mixed_requests_get_what_each_gets_alone() -> None:
    """More rows than are looked at together, and every way of choosing beside every other."""
    generator = torch.Generator().manual_seed(5)
    asked = [("low_confidence", 0.0), ("margin", 1.1), ("random", 0.0), ("entropy", 0.0), ("random", 0.7)] * 3
    rows = [9, 20, 5, 30, 7, 1, 0, 3, 11, 40, 2, 13, 8, 6, 4]
    logits = torch.randn(sum(rows), 23, generator=generator)

    def choice(index: int) -> Choice:
        remasking, temperature = asked[index]
        return Choice(temperature, remasking, Draws(index, 4))

    places = [torch.randperm(64, generator=generator)[:count].sort().values for count in rows]
    together = propose(logits, 21, [choice(index) for index in range(len(asked))], places)
    for index, part in enumerate(logits.split(rows)):
        alone = propose(part, 21, [choice(index)], [places[index]])
        assert torch.equal(together.tokens.split(rows)[index], alone.tokens)
        assert torch.equal(together.confidence.split(rows)[index], alone.confidence)
