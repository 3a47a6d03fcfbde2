"""Random numbers that depend on their place and on nothing else: (seed, step, stream, place, index) -> a number.

A generator hands out its numbers in order, so what a request draws depends on what was drawn before. Here every number
is a hash of its place (a counter-based generator, like Philox). So a request draws the same alone, in any batch, on any
number of ranks, after a preemption and when a step is taken again, and there is no state to keep. The hash is whole
numbers only: every device has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# What draws: each use has numbers of its own.
GUMBEL, CONFIDENCE, IMPORTANCE = range(3)

# splitmix64 for keys: its increment and multipliers, as signed numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX64 = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_LAST64 = 31
# The finaliser of murmur3 for numbers, and an odd increment.
_MIX32 = ((16, 0x85EBCA6B - (1 << 32)), (13, 0xC2B2AE35 - (1 << 32)))
_LAST32 = 16
_INCREMENT = 0x9E3779B9 - (1 << 32)


@dataclass(frozen=True, slots=True)
class Draws:
    """What one request draws in one step. seed: 64 bits of it count; step: from -1, the pruning before all steps."""

    seed: int
    step: int

    def keys(self, stream: int, places: Tensor) -> Tensor:
        """[places, 2] int32, the key of each place's numbers. places: [places] int64, such as canvas positions."""
        key = torch.zeros((), dtype=torch.int64)
        for part in (self.seed, self.step, stream):
            key = _mixed64(key ^ _mixed64(torch.tensor(_signed(part)) + _GOLDEN))
        return _mixed64(key ^ _mixed64(places.cpu() + _GOLDEN)).view(torch.int32).view(-1, 2)


def uniform(keys: Tensor, count: int) -> Tensor:
    """[places, count] float64 between 0 and 1, neither of them: numbers 0 to count - 1 of each key [places, 2] int32.

    32 bits each: a tail of less than 2^-33 is never drawn.
    """
    bits = _counters(count, keys.device) + keys[:, :1]
    # One more tensor for all rounds: a new one for each costs more than the arithmetic.
    spare = torch.empty_like(bits)
    _mix32(bits, spare)
    bits += keys[:, 1:]
    _mix32(bits, spare)
    return bits.to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)


@lru_cache(maxsize=4)
def _counters(count: int, device: torch.device) -> Tensor:
    """[count] int32. The vocabularies of a process are few."""
    return torch.arange(count, dtype=torch.int32, device=device).mul_(_INCREMENT)


def _mix32(bits: Tensor, spare: Tensor) -> None:
    for shift, factor in _MIX32:
        _fold32(bits, spare, shift)
        bits *= factor
    _fold32(bits, spare, _LAST32)


def _fold32(bits: Tensor, spare: Tensor, shift: int) -> None:
    """bits ^= bits >> shift, a logical shift; torch's brings the sign along."""
    torch.bitwise_right_shift(bits, shift, out=spare)
    bits ^= spare.bitwise_and_((1 << (32 - shift)) - 1)


def _mixed64(bits: Tensor) -> Tensor:
    for shift, factor in _MIX64:
        bits = _folded64(bits, shift) * factor
    return _folded64(bits, _LAST64)


def _folded64(bits: Tensor, shift: int) -> Tensor:
    return bits ^ (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(number: int) -> int:
    """Its lowest 64 bits as a signed number."""
    low = number & ((1 << 64) - 1)
    return low - (1 << 64) if low >> 63 else low
