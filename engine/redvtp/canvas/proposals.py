"""What a step proposes for each masked position, how sure it is, and which proposals it commits.

Confidence is computed for the whole batch in one pass over the logits; the choice is made request by request on a
handful of numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

# float64: two candidates that differ in the last float32 bit swap places, and with them every later step (LLaDA-V does
# the same).
CONFIDENCE_DTYPE = torch.float64
# Rows of float64 logits held at once: 64 rows of a 126k vocabulary are 64 MB.
ROWS_AT_ONCE = 64


# Keeps the logarithm of a probability that underflowed finite (LaViDa's number).
_TINY = 1e-10


@dataclass(frozen=True, slots=True)
class Choice:
    """How one request chooses, see DenoisingParams. generator: its own, for all that is random."""

    temperature: float
    remasking: str
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Proposals:
    """One proposal for each masked row.

    tokens: [rows] int64 on the CPU, the proposed token id.
    confidence: [rows] float64 on the CPU, the highest is committed first.
    """

    tokens: Tensor
    confidence: Tensor


def suppress(logits: Tensor, suppressed: tuple[int, ...]) -> Tensor:
    """Float32 logits [rows, vocab] where `suppressed` ids can never win (see `SamplerTraits.suppressed`)."""
    logits = logits.float()
    if suppressed:
        logits[:, list(suppressed)] = float("-inf")
    return logits


def keep_best(logits: Tensor, count: int | None) -> Tensor:
    """Logits [rows, vocab] with all but the `count` best of each row at -inf; None keeps all."""
    if count is None or count >= logits.shape[-1]:
        return logits
    last = logits.topk(count, dim=-1).values[:, -1:]
    return logits.masked_fill_(logits < last, float("-inf"))


def gumbel_perturbed(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Logits [rows, vocab] with Gumbel noise, float64, on the scale exp(logits) / (-log u)^T (reference: LLaDA).

    Taken in the logarithm, which orders the same and cannot overflow. The noise is drawn on the CPU, so that a seed
    gives the same answer on every device and every tensor-parallel rank.
    """
    noise = torch.rand(logits.shape, generator=generator, dtype=CONFIDENCE_DTYPE).clamp_min_(1e-300)
    return logits.to(CONFIDENCE_DTYPE) - temperature * (-noise.log()).log().to(logits.device)


def propose(logits: Tensor, vocab: int, choices: list[Choice], rows: list[int]) -> Proposals:
    """Proposals of a batch of requests.

    logits: [sum(rows), vocab or more] float32, suppressed ids at -inf; request i owns rows[i] of them, in order.
    vocab: ids from here on are never proposed, though they take their share of every probability.
    """
    tokens = logits[:, :vocab].argmax(-1)
    starts = [0, *accumulate(rows)]
    drawing = [index for index, choice in enumerate(choices) if choice.temperature > 0 and rows[index]]
    for group in _grouped(drawing, rows):
        perturbed = [
            gumbel_perturbed(logits[starts[i] : starts[i + 1], :vocab], choices[i].temperature, choices[i].generator)
            for i in group
        ]
        found = torch.cat(perturbed).argmax(-1).split([rows[i] for i in group])
        for i, ids in zip(group, found, strict=True):
            tokens[starts[i] : starts[i + 1]] = ids
    kinds = [choice.remasking for choice, count in zip(choices, rows, strict=True) for _ in range(count)]
    sure = _confidence(logits, tokens, kinds)
    for choice, start, end in zip(choices, starts, starts[1:], strict=False):
        if choice.remasking == "random":
            sure[start:end] = torch.rand(end - start, generator=choice.generator, dtype=CONFIDENCE_DTYPE)
    return Proposals(tokens.cpu(), sure)


def _grouped(indices: list[int], rows: list[int]) -> Iterator[list[int]]:
    """`indices` in groups of about ROWS_AT_ONCE rows."""
    group: list[int] = []
    for index in indices:
        group.append(index)
        if sum(rows[i] for i in group) >= ROWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _confidence(logits: Tensor, tokens: Tensor, kinds: list[str]) -> Tensor:
    """[rows] float64 on the CPU, of the proposals `tokens` [rows], each measured in its own way; 0 for `random`."""
    measured = sorted(set(kinds) - {"random"})
    if not measured:
        return torch.zeros(len(kinds), dtype=CONFIDENCE_DTYPE)
    found = torch.zeros(len(kinds), dtype=CONFIDENCE_DTYPE, device=logits.device)
    for start in range(0, len(kinds), ROWS_AT_ONCE):
        chunk = slice(start, start + ROWS_AT_ONCE)
        probabilities = logits[chunk].to(CONFIDENCE_DTYPE).softmax(-1)
        if len(measured) == 1 and "random" not in kinds[chunk]:
            found[chunk] = confidence(probabilities, tokens[chunk], measured[0])
            continue
        for kind in measured:
            own = torch.tensor([row for row, of in enumerate(kinds[chunk]) if of == kind], dtype=torch.int64)
            own = own.to(logits.device)
            found[chunk][own] = confidence(probabilities[own], tokens[chunk][own], kind)
    return found.cpu()


def confidence(probabilities: Tensor, tokens: Tensor, remasking: str) -> Tensor:
    """How sure the model is, [rows] float64 (reference: LaViDa; `low_confidence`: LLaDA).

    probabilities: [rows, vocab] float64. tokens: [rows], the proposals. remasking: `low_confidence` is the proposal's
    probability, `entropy` the negative entropy of the whole row, `margin` the distance of the two best.
    """
    if remasking == "entropy":
        return (probabilities * (probabilities + _TINY).log()).sum(-1)
    if remasking == "margin":
        best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return best - second
    return probabilities.gather(-1, tokens[:, None])[:, 0]


def select(confidence: Tensor, count: int) -> Tensor:
    """Rows to commit: the `count` most confident of [rows], fewer when there are fewer. Returns [selected] int64."""
    return confidence.topk(min(count, confidence.numel())).indices
