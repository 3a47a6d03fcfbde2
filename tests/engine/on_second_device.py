"""Requests of every kind on a second device, in a process of its own:

    python -m engine.on_second_device

Prints a JSON object. mixed: what an operation on tensors of two devices gives. golden: by run, its tokens and the
reference's, on torch's attention and, where its name ends in "paged", on a paged kernel's. others: how many further
requests were answered. collectives: the device of every tensor that was handed to
tensor-parallel ranks.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from unittest import mock

import second_device

second_device.prepare()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import golden_data  # noqa: E402
import golden_runs  # noqa: E402
from redvtp import local  # noqa: E402
from redvtp.attention.paged import PagedAttention  # noqa: E402
from redvtp.attention.paged_batch import PagedBatch  # noqa: E402
from redvtp.denoising.ranks import Ranks  # noqa: E402
from redvtp.denoising.step import DenoisingRunner  # noqa: E402
from redvtp.kv.blocks import blocks_needed  # noqa: E402
from redvtp.params import CACHES, REMASKINGS, DenoisingParams, PruningParams  # noqa: E402
from redvtp.presets import PRESET_TABLE  # noqa: E402

DEVICE = second_device.DEVICE
# One of each family.
CHECKPOINTS = (golden_data.LLADA_V[0], golden_data.LAVIDA[0], golden_data.DREAM[0])


class ReadingKernel:
    """A `PagedKernel` written out: each sequence's pages are gathered by the block table that a kernel would read."""

    batch_invariant = True
    reads_unused = True

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
        group, size = query.shape[1] // keys.shape[2], batch.block_size
        outputs, sums = [], []
        for index, own in enumerate(query.split(list(batch.query_counts))):
            count = batch.kv_counts[index]
            blocks = batch.block_table[index, : -(-count // size)].long()
            key, value = (
                pages.index_select(0, blocks).flatten(0, 1)[:count].repeat_interleave(group, dim=1)
                for pages in (keys, values)
            )
            logits = torch.einsum("qhd,khd->hqk", own, key) * self._scale
            sums.append(logits.logsumexp(-1))
            outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), value))
        return torch.cat(outputs), torch.cat(sums, dim=1)


def main() -> None:
    torch.set_num_threads(1)
    devices: dict[str, set[str]] = {"sum_scores": set(), "broadcast_from_rank0": set()}

    def noting(name: str) -> Any:
        def collective(tensor: Tensor) -> Tensor:
            devices[name].add(str(tensor.device))
            return tensor.clone()

        return collective

    ranks = Ranks(**{name: noting(name) for name in devices})
    golden: dict[str, list[list[int]]] = {}
    others = 0
    with second_device.SecondDevice(), mock.patch.object(local, "named_device", return_value=DEVICE):
        for checkpoint in CHECKPOINTS:
            engine = local.LocalEngine(golden_data.checkpoint_dir(checkpoint), dtype="float32", device=str(DEVICE))
            scale = engine.config.head_dim**-0.5
            paged = PagedAttention(engine.cache, scale, ReadingKernel(scale))
            runs = _runs(checkpoint)
            for attention, end in ((None, ""), (paged, " paged")):
                engine.runner = DenoisingRunner(engine.model, engine.cache, engine.special, ranks, attention)
                answers = engine.generate([_request(run) for run in runs])
                golden |= {f"{run}{end}": [got.output_ids, run.output] for run, got in zip(runs, answers, strict=True)}
            # On the last of the two.
            others += sum(_interrupted(engine, request) for request in _others(runs[0]))
        mixed = _mixed()
    found = {name: sorted(seen) for name, seen in devices.items()}
    print("RESULT", json.dumps({"mixed": mixed, "golden": golden, "others": others, "collectives": found}))


def _runs(checkpoint: str) -> list[golden_data.Run]:
    found = [run for run in golden_data.runs(checkpoints=(checkpoint,)) if not run.case.config_overrides]
    names = golden_runs.one_of_each_mode(found)
    return [run for run in found if str(run) in names and run.case.image_files]


def _request(run: golden_data.Run) -> local.Request:
    images = tuple(run.case.images())
    return local.Request(run.case.prompt, images, golden_runs.denoising_of(run), golden_runs.pruning_of(run))


def _interrupted(engine: local.LocalEngine, request: local.Request) -> bool:
    """The request to its end, its pages taken away after every step and given back elsewhere."""
    sequence = engine.sequence(request, engine.tokenize(request), [])
    steps = 0
    while not sequence.finished:
        blocks = blocks_needed(sequence.total_length, engine.cache.block_size)
        sequence.resume([(7 * steps + block) % engine.cache.num_blocks for block in range(blocks)])
        engine.runner.step([sequence])
        sequence.suspend()
        steps += 1
    return steps > 1


def _others(run: golden_data.Run) -> list[local.Request]:
    """Every preset, cache mode and remasking rule, half of them with a temperature."""
    visual = run.case.meta["num_visual_tokens_total"]
    asked = []
    for number, preset in enumerate(PRESET_TABLE):
        pruning = PruningParams(preset=preset, keep_ratio=0.5)
        if preset == "external":
            pruning = replace(pruning, importance=tuple(index / visual for index in range(visual)))
        denoising = DenoisingParams(
            gen_length=16,
            block_length=8,
            steps=6,
            cache=CACHES[number % len(CACHES)],
            remasking=REMASKINGS[number // 2 % len(REMASKINGS)],
            temperature=0.7 * (number % 2),
            seed=number,
        )
        asked.append(local.Request(run.case.prompt, tuple(run.case.images()), denoising, pruning))
    return asked


def _mixed() -> str:
    try:
        torch.zeros(3, device=DEVICE) + torch.zeros(3)
    except RuntimeError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    main()
