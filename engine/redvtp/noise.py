"""Random numbers that depend on their place and on nothing else: (seed, step, stream, place, index) -> a number.

A generator hands out its numbers in order, so what a request draws depends on what was drawn before. Here every number
is a hash of its place (a counter-based generator, like Philox). So a request draws the same alone, in any batch, on any
number of ranks, after a preemption and when a step is taken again, and there is no state to keep. The hash is whole
numbers only: every device has the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    numbers = torch.arange(count, dtype=torch.int32, device=keys.device).mul_(_INCREMENT)
    bits = numbers + keys[:, :1]
    _mix32(bits)
    bits += keys[:, 1:]
    _mix32(bits)
    return bits.to(torch.float64).add_(2.0**31 + 0.5).mul_(2.0**-32)


def _mix32(bits: Tensor) -> None:
    for shift, factor in _MIX32:
        bits ^= _shifted(bits, shift, 32)
        bits *= factor
    bits ^= _shifted(bits, _LAST32, 32)


def _mixed64(bits: Tensor) -> Tensor:
    for shift, factor in _MIX64:
        bits = (bits ^ _shifted(bits, shift, 64)) * factor
    return bits ^ _shifted(bits, _LAST64, 64)


def _shifted(bits: Tensor, shift: int, width: int) -> Tensor:
    """A logical shift to the right: torch's brings the sign along."""
    return (bits >> shift).bitwise_and_((1 << (width - shift)) - 1)


def _signed(number: int) -> int:
    """Its lowest 64 bits as a signed number."""
    low = number & ((1 << 64) - 1)
    return low - (1 << 64) if low >> 63 else low
