"""What a step proposes for each masked position, how sure it is, and which proposals it commits.

Confidence is computed for the whole batch in one pass over the logits; the choice is made request by request on a
handful of numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Float32 logits [rows, vocab] where `suppressed` ids can never win (LLaDA-V: bos, eos, the header tokens)."""
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
    tokens: list[Tensor] = []
    confidence: list[Tensor] = []
    greedy = logits[:, :vocab].argmax(-1)
    for choice, part, ids in zip(choices, logits.split(rows), greedy.split(rows), strict=True):
        if choice.temperature > 0:
            ids = gumbel_perturbed(part[:, :vocab], choice.temperature, choice.generator).argmax(-1)
        tokens.append(ids)
        confidence.append(_confidence(part, ids, choice))
    return Proposals(torch.cat(tokens).cpu(), torch.cat(confidence))


def _confidence(logits: Tensor, tokens: Tensor, choice: Choice) -> Tensor:
    """[rows] float64 on the CPU, of one request's proposals `tokens` [rows]."""
    if choice.remasking == "random":
        return torch.rand(tokens.numel(), generator=choice.generator, dtype=CONFIDENCE_DTYPE)
    parts = zip(logits.split(ROWS_AT_ONCE), tokens.split(ROWS_AT_ONCE), strict=True)
    return torch.cat(
        [confidence(part.to(CONFIDENCE_DTYPE).softmax(-1), ids, choice.remasking) for part, ids in parts]
    ).cpu()


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
