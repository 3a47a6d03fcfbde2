"""What a step proposes for each masked position, and how sure it is.

Logits come in parts of LOGIT_BYTES, and what is float64 is made for FLOAT64_BYTES at once, so a step's memory does not
grow with the canvas. Noise is drawn from each request's generator row by row, whatever the parts are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from redvtp.canvas.remasking import RULES, Rule, rule_of

# float64: two candidates that differ in the last float32 bit swap places, and with them every later step (LLaDA-V does
# the same).
CONFIDENCE_DTYPE = torch.float64
# Bytes of float32 logits held at once: 256 rows of a 126k vocabulary.
LOGIT_BYTES = 128 << 20
# Bytes of one float64 tensor: 32 rows of that vocabulary. Drawing noise takes two, probabilities two.
FLOAT64_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """How one request chooses, see DenoisingParams. generator: draws everything that is random in it."""

    temperature: float
    remasking: str
    generator: torch.Generator


@dataclass(frozen=True, slots=True)
class Proposals:
    """One proposal for each masked row.

    tokens: [rows] int64, the proposed token id.
    confidence: [rows] float64, the highest is committed first.

    Both are on the device of the logits, so that tensor-parallel ranks can exchange them.
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
    noise.log_().neg_().log_().mul_(temperature)
    return logits.to(CONFIDENCE_DTYPE, copy=True).sub_(noise.to(logits.device))


def propose(logits: Tensor, vocab: int, choices: list[Choice], rows: list[int]) -> Proposals:
    """Proposals of a batch of requests.

    logits: [sum(rows), vocab or more] float32, suppressed ids at -inf; request i has rows[i] of them, in order.
    vocab: ids from here on are never proposed, though they take their share of every probability.
    """
    return propose_in_parts(lambda part: logits[part], logits.shape[1], vocab, choices, rows)


def propose_in_parts(
    logits_of: Callable[[slice], Tensor], width: int, vocab: int, choices: list[Choice], rows: list[int]
) -> Proposals:
    """`propose` for logits that are computed when they are needed.

    logits_of: a slice of the rows -> their logits [rows, width].
    """
    logit_rows, rows_at_once = max(1, LOGIT_BYTES // (4 * width)), max(1, FLOAT64_BYTES // (8 * width))
    owners = [index for index, count in enumerate(rows) for _ in range(count)]
    tokens: list[Tensor] = []
    confidence: list[Tensor] = []
    for start in range(0, len(owners), logit_rows):
        part = slice(start, min(start + logit_rows, len(owners)))
        logits = logits_of(part)
        for first in range(0, part.stop - start, rows_at_once):
            chunk = logits[first : first + rows_at_once]
            chosen = [choices[owner] for owner in owners[start + first : start + first + chunk.shape[0]]]
            tokens.append(_proposed(chunk[:, :vocab], chosen))
            confidence.append(_confidence(chunk, tokens[-1], [choice.remasking for choice in chosen]))
    if not tokens:
        return Proposals(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=CONFIDENCE_DTYPE))
    sure = torch.cat(confidence)
    start = 0
    for choice, count in zip(choices, rows, strict=True):
        if RULES[choice.remasking] is None and count:
            # After all noise of the request, so that the parts do not change what its generator gives.
            drawn = torch.rand(count, generator=choice.generator, dtype=CONFIDENCE_DTYPE)
            sure[start : start + count] = drawn.to(sure.device)
        start += count
    return Proposals(torch.cat(tokens), sure)


def _proposed(logits: Tensor, choices: list[Choice]) -> Tensor:
    """[rows] int64, the best id of each row, after noise where its request has a temperature. choices: by row."""
    tokens = logits.argmax(-1)
    row = 0
    for _, group in groupby(choices, key=id):
        same = list(group)
        end = row + len(same)
        if same[0].temperature > 0:
            tokens[row:end] = gumbel_perturbed(logits[row:end], same[0].temperature, same[0].generator).argmax(-1)
        row = end
    return tokens


def _confidence(logits: Tensor, tokens: Tensor, names: list[str]) -> Tensor:
    """[rows] float64, of the proposals `tokens` [rows], each by its row's rule; 0 where that draws at random."""
    rules: dict[str, Rule] = {name: rule for name in dict.fromkeys(names) if (rule := rule_of(name)) is not None}
    sure = torch.zeros(len(names), dtype=CONFIDENCE_DTYPE, device=logits.device)
    if not rules:
        return sure
    probabilities = logits.to(CONFIDENCE_DTYPE).softmax(-1)
    for name, measure in rules.items():
        if len(set(names)) == 1:
            return measure(probabilities, tokens)
        rows = torch.tensor([row for row, of in enumerate(names) if of == name]).to(logits.device)
        sure[rows] = measure(probabilities[rows], tokens[rows])
    return sure


def select(confidence: Tensor, count: int) -> Tensor:
    """Rows to commit: the `count` most confident of [rows], fewer when there are fewer. Returns [selected] int64."""
    return confidence.topk(min(count, confidence.numel())).indices
