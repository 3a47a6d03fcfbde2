"""The rates of this machine for each kind of work, measured by running such work at a model's sizes.

Each measurement repeats one kind of operation over more memory than a processor's cache holds. None of them is a
denoising step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from machines import Cost, Machine
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu
from work import (
    ATTENTION,
    ELEMENTWISE,
    GATHERS,
    PRODUCTS,
    Code,
    Work,
    attention_work,
    elementwise_work,
    linear_sizes,
    linears_work,
    pages_work,
)

from redvtp.families.config import DvlmConfig
from redvtp.kv.pages import PagedKVCache
from redvtp.kv.rotary import Rotary, apply_rotary
from redvtp.models.operations import TORCH
from redvtp.models.transformer import RmsNorm

# Rows of a product, of a query, of a norm. What is predicted has other numbers of rows.
MANY, FEW, ONE = 1024, 32, 1
# Different weights, keys and pages that a pass goes through.
LAYERS = 4
PASSES = 5
# How often `measure_rates` says that it has measured something.
MEASUREMENTS = 7

Clock = Callable[[], float]
# What a pass does, and the pass.
Pass = tuple[list[Work], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Bench:
    """Sizes to measure at: those of `config`, on a CPU.

    clock: seconds; `time.process_time` where the machine has other work to do and torch has one thread.
    """

    config: DvlmConfig
    dtype: torch.dtype
    clock: Clock = time.perf_counter

    @property
    def code(self) -> Code:
        return Code(self.dtype.itemsize)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of the median pass: what is predicted lasts long, and a busy machine is at its best for moments."""
        run()
        passes = []
        for _ in range(PASSES):
            started = self.clock()
            run()
            passes.append(self.clock() - started)
        return statistics.median(passes)


@torch.inference_mode()
def measure_rates(bench: Bench, done: Callable[[], object] = lambda: None) -> Machine:
    """Of the machine that this runs on, with torch's threads. done: called after each of the MEASUREMENTS."""

    def measured(made: Pass) -> tuple[list[Work], float]:
        works, run = made
        elapsed = bench.seconds(run)
        done()
        return works, elapsed

    works, elapsed = measured(_elementwise(bench, ONE))
    # One row has next to no bytes.
    gap = elapsed / _launches(works)
    costs = {kind: _byte_cost(*measured(make(bench, MANY)), gap) for kind, make in SINGLE.items()}
    for kind, make in PAIRS.items():
        costs[kind] = _costs(measured(make(bench, FEW)), measured(make(bench, MANY)), gap)
    return Machine("this machine", costs, overlaps=False, gap=gap)


def _launches(works: list[Work]) -> float:
    return sum(work.launches for work in works)


def _without_launches(works: list[Work], elapsed: float, gap: float) -> float:
    """Seconds. In a model so small that calls are everything, a tenth is left for the work."""
    return max(elapsed - _launches(works) * gap, elapsed / 10)


def _byte_cost(works: list[Work], elapsed: float, gap: float) -> Cost:
    return Cost(0.0, _without_launches(works, elapsed, gap) / sum(work.bytes for work in works))


def _costs(few: tuple[list[Work], float], many: tuple[list[Work], float], gap: float) -> Cost:
    """From two passes with different shares of FLOP and bytes, each the sum of what FLOP, bytes and launches take.

    Where one of the two costs would be negative, it is zero, and the other is that of the larger pass.
    """
    (few_flops, few_bytes), (flops, moved) = (
        (sum(work.flops for work in works), sum(work.bytes for work in works)) for works, _ in (few, many)
    )
    few_time, many_time = (_without_launches(works, elapsed, gap) for works, elapsed in (few, many))
    determinant = few_flops * moved - flops * few_bytes
    flop = (few_time * moved - many_time * few_bytes) / determinant
    byte = (few_flops * many_time - flops * few_time) / determinant
    if flop < 0:
        return Cost(0.0, many_time / moved)
    return Cost(many_time / flops, 0.0) if byte < 0 else Cost(flop, byte)


def _products(bench: Bench, rows: int) -> Pass:
    sizes = linear_sizes(bench.config)
    weights = [[bench.random(out, columns) for columns, out in sizes] for _ in range(LAYERS)]
    inputs = {columns: bench.random(rows, columns) for columns, _ in sizes}

    def run() -> None:
        for layer in weights:
            for weight in layer:
                linear(inputs[weight.shape[1]], weight)

    return linears_work(bench.config, rows, bench.code) * LAYERS, run


def _attention(bench: Bench, rows: int) -> Pass:
    """Of `rows` to MANY keys. Heads lie inside rows, as in the model."""
    config = bench.config

    def heads(tokens: int, count: int) -> Tensor:
        return bench.random(tokens, count, config.head_dim).transpose(0, 1)[None]

    layers = [
        (heads(rows, config.num_attention_heads), *(heads(MANY, config.num_key_value_heads) for _ in "kv"))
        for _ in range(LAYERS)
    ]
    grouped = config.num_attention_heads != config.num_key_value_heads

    def run() -> None:
        for query, key, value in layers:
            scaled_dot_product_attention(query, key, value, enable_gqa=grouped)

    return [attention_work(config, rows, MANY, bench.code)] * LAYERS, run


def _gathers(bench: Bench, rows: int) -> Pass:
    """Keys and values read from pages, and written to them."""
    config = bench.config
    pages = PagedKVCache(LAYERS, 3, rows, config.num_key_value_heads, config.head_dim, bench.dtype)
    slots = torch.arange(rows, 2 * rows)
    key, value = (bench.random(rows, config.num_key_value_heads, config.head_dim) for _ in "kv")

    def run() -> None:
        for layer in range(LAYERS):
            pages.read(layer, slots)
            pages.write(layer, slots, key, value)

    return [pages_work(config, rows, bench.code)] * (2 * LAYERS), run


def _elementwise(bench: Bench, rows: int) -> Pass:
    config = bench.config
    norm = RmsNorm(config.hidden_size, config.rms_norm_eps, TORCH).to(bench.dtype)
    cos, sin = (part.to(bench.dtype) for part in Rotary(config.head_dim, config.rope_theta).angles(torch.arange(rows)))
    hidden, change = bench.random(rows, config.hidden_size), bench.random(rows, config.hidden_size)
    query, key = (
        bench.random(rows, count, config.head_dim) for count in (config.num_attention_heads, config.num_key_value_heads)
    )
    gates, up = bench.random(rows, config.intermediate_size), bench.random(rows, config.intermediate_size)
    gate = torch.empty_like(gates)

    def layer(hidden: Tensor) -> Tensor:
        norm(hidden)
        apply_rotary(query, cos, sin)
        apply_rotary(key, cos, sin)
        hidden = hidden + change
        norm(hidden)
        # Again and again in place, numbers would become so small that they are slow.
        gate.copy_(gates)
        silu(gate, inplace=True).mul_(up)
        return hidden + change

    def run() -> None:
        state = hidden
        for _ in range(LAYERS):
            state = layer(state)

    copy = Work(ELEMENTWISE, 0, 2 * rows * config.intermediate_size * bench.dtype.itemsize, 1)
    return [elementwise_work(config, rows, bench.code), copy] * LAYERS, run


# Measured at MANY rows; and at FEW and MANY.
SINGLE = {ELEMENTWISE: _elementwise, GATHERS: _gathers}
PAIRS = {PRODUCTS: _products, ATTENTION: _attention}


def mean(machines: Sequence[Machine]) -> Machine:
    """What these measurements of one machine say together."""
    costs = {
        kind: Cost(
            statistics.fmean(machine.costs[kind].flop for machine in machines),
            statistics.fmean(machine.costs[kind].byte for machine in machines),
        )
        for kind in machines[0].costs
    }
    return replace(machines[0], costs=costs, gap=statistics.fmean(machine.gap for machine in machines))


def described(machine: Machine) -> str:
    """Its rates."""
    kinds = []
    for kind, cost in machine.costs.items():
        rates = ((cost.flop, "GFLOP/s"), (cost.byte, "GB/s"))
        kinds.append(f"{kind} {' and '.join(f'{1e-9 / each:.1f} {unit}' for each, unit in rates if each)}")
    return "; ".join((*kinds, f"{machine.gap * 1e6:.1f} us for each launch"))
