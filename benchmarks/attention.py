"""vLLM's CPU attention kernel against the engine's torch backend, and why each sequence needs a separate call.

    python benchmarks/attention.py [--heads 8] [--kv-heads 8] [--head-dim 128] [--threads 1]

Times are one layer's attention with its page writes: milliseconds of processor time, the least of interleaved rounds,
so that other work on the machine shows as little as it can. With --neighbours, instead: how often a sequence's output
in a mixed batch differs from its output alone, by one call of the kernel for the batch and by one for each sequence.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from redvtp.attention.interface import LayerAttention, layer_attention
from redvtp.attention.layout import Layout, Span
from redvtp.attention.torch_paged import TorchAttention
from redvtp.kv.blocks import blocks_needed, padded_block_tables, slots_of, slots_of_tables
from redvtp.kv.pages import KVPages, PagedKVCache
from vllm_redvtp.attention.cpu_kernel import CpuAttention
from vllm_redvtp.attention.packed_pages import PackedKVCache

BLOCK_SIZE = 32
# What it stands for, keys of a request, queries of a request, requests.
SHAPES = [
    ("response step", 3000, 32, 1),
    ("response step", 3000, 32, 8),
    ("pruned response step", 800, 32, 1),
    ("pruned response step", 800, 32, 8),
    ("full step", 800, 800, 1),
    ("full step", 3000, 3000, 1),
]
Parts = list[tuple[int, int, Tensor]]


class OneCall:
    """The kernel over a whole batch at once, as vLLM's models call it."""

    def __init__(self, cache: PackedKVCache, heads: int, parts: Parts, scale: float) -> None:
        self._cache, self._scale = cache, scale
        _, kv_heads, _, head_dim = cache.keys[0].shape
        widest = max(table.numel() for _, _, table in parts)
        self._tables = torch.zeros(len(parts), widest, dtype=torch.int32)
        for row, (_, _, table) in zip(self._tables, parts, strict=True):
            row[: table.numel()] = table
        self._starts = torch.tensor([0, *(queries for _, queries, _ in parts)]).cumsum(0).to(torch.int32)
        self._lengths = torch.tensor([length for length, _, _ in parts], dtype=torch.int32)
        self._write_slots = torch.cat([slots_of(table, n - queries, n, BLOCK_SIZE) for n, queries, table in parts])
        self._schedule = ops.cpu_attn_get_scheduler_metadata(
            len(parts), heads, kv_heads, head_dim, self._lengths, cache.keys[0].dtype, self._starts, False, -1,
            cache.layout.isa, False,
        )  # fmt: skip

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        self._cache.write(layer, self._write_slots, key, value)
        output = torch.empty_like(query)
        ops.cpu_attention_with_kv_cache(
            query, self._cache.keys[layer], self._cache.values[layer], output, self._starts, self._lengths, self._scale,
            False, None, -1, self._tables, 0.0, self._schedule, None,
        )  # fmt: skip
        return output


def layout_of(parts: Parts, bring_all: bool) -> Layout:
    """bring_all: sequences that compute all their tokens read no pages, as in the engine's full steps."""
    spans: list[Span] = []
    row = 0
    for length, queries, _ in parts:
        spans.append(Span(row, row + queries, length, not (bring_all and queries == length), write_end=length))
        row += queries
    tables = padded_block_tables([table.tolist() for *_, table in parts], torch.device("cpu"))
    slots = slots_of_tables(tables, BLOCK_SIZE).unbind(0)
    written = [own[length - queries : length] for own, (length, queries, _) in zip(slots, parts, strict=True)]
    return Layout(tuple(spans), tables, slots, BLOCK_SIZE, torch.cat(written))


def kernel(pages: PackedKVCache, heads: int, parts: Parts, scale: float) -> LayerAttention:
    """The backend `cpu`, all its sequences read from pages."""
    return layer_attention(CpuAttention(pages, heads, scale).prepare(layout_of(parts, False)))


def tables_of(sizes: list[tuple[int, int]]) -> Parts:
    needed = [blocks_needed(length, BLOCK_SIZE) for length, _ in sizes]
    tables = torch.randperm(sum(needed)).split(needed)
    return [(length, queries, table) for (length, queries), table in zip(sizes, tables, strict=True)]


def filled(cache: KVPages, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    slots = torch.arange(cache.num_blocks * BLOCK_SIZE)
    cache.write(0, slots, *(torch.randn(slots.numel(), kv_heads, head_dim).to(dtype) for _ in range(2)))


def least_ms(run: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    best = dict.fromkeys(run, float("inf"))
    started, rounds = time.process_time(), 0
    while rounds < 3 or time.process_time() - started < seconds:
        for name, function in run.items():
            before = time.process_time()
            function()
            best[name] = min(best[name], (time.process_time() - before) * 1e3)
        rounds += 1
    return best


def inputs_of(rows: int, args: argparse.Namespace, dtype: torch.dtype) -> list[Tensor]:
    return [
        torch.randn(rows, heads, args.head_dim).to(dtype) for heads in (args.heads, args.kv_heads, args.kv_heads)
    ]  # fmt: skip


def compare_times(args: argparse.Namespace) -> None:
    scale = args.head_dim**-0.5
    print("| dtype | step | keys x queries x requests | torch | kernel | kernel, one call | torch / kernel |")
    print("|---|---|---|---:|---:|---:|---:|")
    for dtype in (torch.float32, torch.bfloat16):
        for name, length, queries, count in SHAPES:
            parts = tables_of([(length, queries)] * count)
            blocks = sum(table.numel() for _, _, table in parts)
            plain = PagedKVCache(1, blocks, BLOCK_SIZE, args.kv_heads, args.head_dim, dtype)
            packed = PackedKVCache(1, blocks, BLOCK_SIZE, args.kv_heads, args.head_dim, dtype)
            for cache in (plain, packed):
                filled(cache, args.kv_heads, args.head_dim, dtype)
            inputs = inputs_of(queries * count, args, dtype)
            backends: dict[str, LayerAttention] = {
                "torch": layer_attention(TorchAttention(plain, scale).prepare(layout_of(parts, True))),
                "kernel": kernel(packed, args.heads, parts, scale),
                "one call": OneCall(packed, args.heads, parts, scale),
            }
            ms = least_ms({name: partial(made, 0, *inputs) for name, made in backends.items()}, args.seconds)
            print(
                f"| {str(dtype).removeprefix('torch.')} | {name} | {length} x {queries} x {count} | {ms['torch']:.1f} "
                f"| {ms['kernel']:.1f} | {ms['one call']:.1f} | {ms['torch'] / ms['kernel']:.2f} |",
                flush=True,
            )


def compare_neighbours(args: argparse.Namespace) -> None:
    """Batches of one to eight response steps of all lengths, each sequence compared with itself alone."""
    scale, dtype = args.head_dim**-0.5, torch.float32
    packed = PackedKVCache(1, 8 * 100, BLOCK_SIZE, args.kv_heads, args.head_dim, dtype)
    filled(packed, args.kv_heads, args.head_dim, dtype)
    makers: dict[str, Callable[[Parts], LayerAttention]] = {
        "one call for the batch": lambda parts: OneCall(packed, args.heads, parts, scale),
        "one call for each sequence": lambda parts: kernel(packed, args.heads, parts, scale),
    }
    found = {name: [0, 0, 0.0] for name in makers}
    for _ in range(args.batches):
        lengths = [random.choice([300, 777, 1500, 3000]) for _ in range(random.randint(2, 8))]
        parts = tables_of([(length, random.choice([1, 13, 32, 33, 64])) for length in lengths])
        counts = [queries for _, queries, _ in parts]
        inputs = inputs_of(sum(counts), args, dtype)
        for name, make in makers.items():
            together = make(parts)(0, *inputs).split(counts)
            for part, output, *own in zip(parts, together, *(tensor.split(counts) for tensor in inputs), strict=True):
                apart = (make([part])(0, *own) - output).abs().max().item()
                found[name][0] += 1
                found[name][1] += apart > 0
                found[name][2] = max(found[name][2], apart)
    for name, (sequences, different, largest) in found.items():
        print(f"{name}: {different} of {sequences} outputs differ from those alone, by up to {largest:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="processor time for each row of the table")
    parser.add_argument("--neighbours", action="store_true")
    parser.add_argument("--batches", type=int, default=40, help="with --neighbours")
    args = parser.parse_args()
    torch.manual_seed(0)
    random.seed(0)
    torch.set_num_threads(args.threads)
    if torch.cpu._is_amx_tile_supported():
        # As the worker does before its first bfloat16 kernel.
        torch.cpu._init_amx()
    (compare_neighbours if args.neighbours else compare_times)(args)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
