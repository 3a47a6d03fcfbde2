"""What a step proposes for each masked position, and how sure it is.

Logits come in parts of LOGIT_BYTES, and what is float64 is made for FLOAT64_BYTES at once, so a step's memory does not
grow with the canvas. Each row's noise is its own (`redvtp.noise`), whatever the parts and the batch are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from redvtp.canvas.remasking import RULES, Rule, rule_of
from redvtp.device import on_device, to_device
from redvtp.noise import CONFIDENCE, GUMBEL, Draws, uniform

# float64: two candidates that differ in the last float32 bit swap places, and with them every later step (LLaDA-V does
# the same).
CONFIDENCE_DTYPE = torch.float64
# Bytes of float32 logits held at once: 256 rows of a 126k vocabulary.
LOGIT_BYTES = 128 << 20
# Bytes of one float64 tensor: 32 rows of that vocabulary. Drawing noise takes two, probabilities two.
FLOAT64_BYTES = 32 << 20
# Bytes of float64 noise that a CPU makes at once: thirty passes go over it, within the caches.
NOISE_BYTES = 8 << 20
_NO_KEYS = torch.zeros(0, 2, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class Choice:
    """How one request chooses, see DenoisingParams. draws: everything that is random in it."""

    temperature: float
    remasking: str
    draws: Draws


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
        logits.index_fill_(1, on_device(suppressed, torch.int64, logits.device), float("-inf"))
    return logits


def keep_best(logits: Tensor, count: int | None) -> Tensor:
    """Logits [rows, vocab] with all but the `count` best of each row at -inf; None keeps all."""
    if count is None or count >= logits.shape[-1]:
        return logits
    last = logits.topk(count, dim=-1).values[:, -1:]
    return logits.masked_fill_(logits < last, float("-inf"))


def gumbel_perturbed(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """Logits [rows, vocab] with Gumbel noise, float64, on the scale exp(logits) / (-log u)^T (reference: LLaDA).

    Taken in the logarithm, which orders the same and cannot overflow.
    temperatures: [rows, 1] float64. keys: [rows, 2] int32, see `redvtp.noise.uniform`.
    """
    noise = uniform(keys, logits.shape[1])
    noise.log_().neg_().log_().mul_(temperatures)
    return logits.to(CONFIDENCE_DTYPE, copy=True).sub_(noise)


def rows_of_logits(width: int) -> int:
    """How many rows of logits of that width are held at once."""
    return max(1, LOGIT_BYTES // (4 * width))


def propose(logits: Tensor, vocab: int, choices: list[Choice], places: list[Tensor]) -> Proposals:
    """Proposals of a batch of requests.

    logits: [rows, vocab or more] float32, suppressed ids at -inf.
    vocab: ids from here on are never proposed, though they take their share of every probability.
    places: for each request the canvas positions [its rows] int64 that its rows are about, in order.
    """
    return propose_in_parts(lambda part: logits[part], logits.shape[1], vocab, choices, places)


def propose_in_parts(
    logits_of: Callable[[slice], Tensor], width: int, vocab: int, choices: list[Choice], places: list[Tensor]
) -> Proposals:
    """`propose` for logits that are computed when they are needed.

    logits_of: a slice of the rows -> their logits [rows, width].
    """
    rows = [own.numel() for own in places]
    logit_rows, rows_at_once = rows_of_logits(width), max(1, FLOAT64_BYTES // (8 * width))
    owners = [index for index, count in enumerate(rows) for _ in range(count)]
    warm = _Warm.rows_of(choices, places)
    tokens: list[Tensor] = []
    confidence: list[Tensor] = []
    for start in range(0, len(owners), logit_rows):
        part = slice(start, min(start + logit_rows, len(owners)))
        logits = logits_of(part)
        for first in range(0, part.stop - start, rows_at_once):
            chunk = logits[first : first + rows_at_once]
            among = range(start + first, start + first + chunk.shape[0])
            tokens.append(_proposed(chunk[:, :vocab], warm.within(among)))
            confidence.append(_confidence(chunk, tokens[-1], [choices[owners[row]].remasking for row in among]))
    if not tokens:
        return Proposals(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=CONFIDENCE_DTYPE))
    sure = torch.cat(confidence)
    for start, choice, own in zip(accumulate(rows, initial=0), choices, places, strict=False):
        if RULES[choice.remasking] is None and own.numel():
            drawn = uniform(choice.draws.keys(CONFIDENCE, own), 1)[:, 0]
            sure[start : start + own.numel()] = to_device(drawn, sure.device)
    return Proposals(torch.cat(tokens), sure)


@dataclass(frozen=True, slots=True)
class _Warm:
    """Rows whose requests have a temperature.

    rows: [warm] int64, ascending. temperatures: [warm, 1] float64. keys: [warm, 2] int32, of their noise.
    """

    rows: Tensor
    temperatures: Tensor
    keys: Tensor

    @staticmethod
    def rows_of(choices: list[Choice], places: list[Tensor]) -> _Warm:
        rows, temperatures, keys = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)], [_NO_KEYS]
        start = 0
        for choice, own in zip(choices, places, strict=True):
            end = start + own.numel()
            if choice.temperature > 0:
                rows.append(torch.arange(start, end))
                temperatures.append(torch.full((own.numel(),), choice.temperature, dtype=CONFIDENCE_DTYPE))
                keys.append(choice.draws.keys(GUMBEL, own))
            start = end
        return _Warm(torch.cat(rows), torch.cat(temperatures).to(CONFIDENCE_DTYPE)[:, None], torch.cat(keys))

    def within(self, rows: range) -> _Warm:
        """Those of some rows, counted from the first of these."""
        first, end = torch.searchsorted(self.rows, torch.tensor([rows.start, rows.stop])).tolist()
        return _Warm(self.rows[first:end] - rows.start, self.temperatures[first:end], self.keys[first:end])


def _proposed(logits: Tensor, warm: _Warm) -> Tensor:
    """[rows] int64, the best id of each row, after noise for the rows `warm`."""
    if not warm.rows.numel():
        return logits.argmax(-1)
    temperatures, keys = (to_device(part, logits.device) for part in (warm.temperatures, warm.keys))
    if warm.rows.numel() == logits.shape[0]:
        return _sampled(logits, temperatures, keys)
    rows = to_device(warm.rows, logits.device)
    return logits.argmax(-1).index_copy_(0, rows, _sampled(logits.index_select(0, rows), temperatures, keys))


def _sampled(logits: Tensor, temperatures: Tensor, keys: Tensor) -> Tensor:
    """[rows] int64, the best id of each row of logits [rows, vocab] after its noise."""
    # A GPU takes all rows: launches are dear there.
    at_once = logits.shape[0]
    if logits.device.type == "cpu":
        at_once = max(1, NOISE_BYTES // (8 * logits.shape[1]))
    parts = zip(logits.split(at_once), temperatures.split(at_once), keys.split(at_once), strict=True)
    return torch.cat([gumbel_perturbed(*part).argmax(-1) for part in parts])


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
        rows = on_device([row for row, of in enumerate(names) if of == name], torch.int64, logits.device)
        sure[rows] = measure(probabilities[rows], tokens[rows])
    return sure


def select(confidence: Tensor, count: int) -> Tensor:
    """Rows to commit: the `count` most confident of [rows], fewer when there are fewer. Returns [selected] int64."""
    return confidence.topk(min(count, confidence.numel())).indices
