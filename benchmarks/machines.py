"""The roofline: how long work takes on a machine that a few rates describe, and the cards of data sheets.

A piece of work takes its FLOP over the rate of products and its bytes over the bandwidth, each of its kind: the larger
of the two where a machine reads while it computes, their sum where it does not. Each launch adds a little. A step is
the sum of its pieces, but never shorter than the host needs to launch them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from work import KINDS, Work


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one kind of work: seconds of a FLOP, and of a byte that is read or written. Zero is no limit."""

    flop: float
    byte: float


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs the model.

    costs: by kind of work.
    overlaps: reads and writes go on while it computes. A CPU's matrix library first lays out what it multiplies.
    gap: seconds that each launch adds: the call of an operation on a CPU, the time between two kernels of a GPU.
    host: seconds that the host needs for each launch; they hide behind the work before it.
    """

    name: str
    costs: Mapping[str, Cost]
    overlaps: bool
    gap: float
    host: float = 0.0


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU as its maker publishes it.

    tflops: TFLOP/s of dense bfloat16 products.
    bandwidth, memory: GB/s and GB, in powers of ten.
    """

    name: str
    tflops: float
    bandwidth: float
    memory: float
    source: str


# Where a source gives rates with sparsity only, these are half of them.
CARDS = (
    Card("H100", 989.4, 3350, 80, "NVIDIA H100 data sheet, SXM"),
    Card("H200", 989.4, 4800, 141, "NVIDIA H200 data sheet, SXM"),
    Card("A100", 312, 2039, 80, "NVIDIA A100 data sheet, SXM, 80 GB"),
    Card("L40S", 362.05, 864, 48, "NVIDIA L40S data sheet"),
    Card("RTX 4090", 165.2, 1008, 24, "NVIDIA Ada GPU architecture white paper"),
)


def card_machine(card: Card, gap: float, host: float) -> Machine:
    """All kinds of work at the card's published rates. gap, host: see Machine."""
    cost = Cost(1 / (card.tflops * 1e12), 1 / (card.bandwidth * 1e9))
    return Machine(card.name, dict.fromkeys(KINDS, cost), overlaps=True, gap=gap, host=host)


def seconds(works: Iterable[Work], machine: Machine) -> float:
    """Of a step, or of anything else that runs in one go."""
    works = list(works)
    launches = sum(work.launches for work in works)
    return max(sum(seconds_by_kind(works, machine).values()), machine.host * launches)


def seconds_by_kind(works: Iterable[Work], machine: Machine) -> dict[str, float]:
    """Where the time goes, launches included."""
    found = dict.fromkeys(KINDS, 0.0)
    join = max if machine.overlaps else _sum
    for work in works:
        cost = machine.costs[work.kind]
        found[work.kind] += join(work.flops * cost.flop, work.bytes * cost.byte) + work.launches * machine.gap
    return found


def _sum(first: float, second: float) -> float:
    return first + second
