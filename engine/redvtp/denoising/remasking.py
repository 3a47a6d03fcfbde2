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


@dataclass(frozen=True, slots=True)
class Proposals:
    """One proposal for each masked row.

    tokens: [rows] int64 on the CPU, the proposed token id.
    confidence: [rows] float64 on the CPU, the probability of that id.
    """

    tokens: Tensor
    confidence: Tensor


def suppress(logits: Tensor, suppressed: tuple[int, ...]) -> Tensor:
    """Float32 logits [rows, vocab] where `suppressed` ids can never win (LLaDA-V: bos, eos, the header tokens)."""
    logits = logits.float()
    if suppressed:
        logits[:, list(suppressed)] = float("-inf")
    return logits


def gumbel_perturbed(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """Logits [rows, vocab] with Gumbel noise, float64, on the scale exp(logits) / (-log u)^T (reference: LLaDA).

    Taken in the logarithm, which orders the same and cannot overflow. The noise is drawn on the CPU, so that a seed
    gives the same answer on every device and every tensor-parallel rank.
    """
    noise = torch.rand(logits.shape, generator=generator, dtype=CONFIDENCE_DTYPE).clamp_min_(1e-300)
    return logits.to(CONFIDENCE_DTYPE) - temperature * (-noise.log()).log().to(logits.device)


def propose(logits: Tensor, temperatures: list[float], generators: list[torch.Generator], rows: list[int]) -> Proposals:
    """Proposals of a batch of requests.

    logits: [sum(rows), vocab] float32, suppressed ids at -inf; request i owns rows[i] of them, in order.
    temperatures, generators: one for each request.
    """
    tokens: list[Tensor] = []
    start = 0
    greedy = logits.argmax(-1)
    for count, temperature, generator in zip(rows, temperatures, generators, strict=True):
        end = start + count
        if temperature > 0:
            tokens.append(gumbel_perturbed(logits[start:end], temperature, generator).argmax(-1))
        else:
            tokens.append(greedy[start:end])
        start = end
    chosen = torch.cat(tokens) if tokens else greedy
    confidence = torch.cat(
        [
            part.to(CONFIDENCE_DTYPE).softmax(-1).gather(-1, ids[:, None])[:, 0]
            for part, ids in zip(logits.split(ROWS_AT_ONCE), chosen.split(ROWS_AT_ONCE), strict=True)
        ]
    )
    return Proposals(chosen.cpu(), confidence.cpu())


def select(confidence: Tensor, count: int) -> Tensor:
    """Rows to commit: the `count` most confident of [rows], fewer when there are fewer. Returns [selected] int64."""
    return confidence.topk(min(count, confidence.numel())).indices


def random_confidence(rows: int, generator: torch.Generator) -> Tensor:
    """Confidence for `random` remasking: [rows] float64, uniform (reference: LLaDA)."""
    return torch.rand(rows, generator=generator, dtype=CONFIDENCE_DTYPE)
