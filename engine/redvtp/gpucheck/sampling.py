"""Temperature sampling: the noise has the same bits everywhere, follows the softmax, and knows no neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch

from redvtp.attention.torch_paged import TorchAttention
from redvtp.canvas.proposals import Choice, gumbel_perturbed, propose
from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.model import SMALL, RandomModel, block_tables, random_model
from redvtp.gpucheck.report import Report
from redvtp.kv.pages import PagedKVCache
from redvtp.noise import CONFIDENCE, GUMBEL, IMPORTANCE, Draws, uniform
from redvtp.params import DenoisingParams, PruningParams

PART = "sampling"
# A right generator falls below it once in ten thousand sets of seeds; the seeds are fixed.
_LEAST_P = 1e-4
_VOCAB = 126464
_BLOCK_SIZE = 16


def check_sampling(machine: Machine, report: Report, tick: Callable[[str], None]) -> None:
    tick("sampling")
    checks: dict[str, Callable[[torch.device], tuple[bool, str]]] = {
        "the device draws the CPU's numbers": _same_bits,
        "noise follows the softmax": _chi_square,
        "proposals alone and in a batch": _proposals_alone,
        "requests alone and in a batch": _requests_alone,
    }
    for name, check in checks.items():
        with report.checking(PART, name):
            report.add(PART, name, *check(machine.device))


def _same_bits(device: torch.device) -> tuple[bool, str]:
    """Whole numbers only, so every device must give every bit."""
    for seed in (0, 7, -3, (1 << 63) - 1):
        for stream in (GUMBEL, CONFIDENCE, IMPORTANCE):
            keys = Draws(seed, 5).keys(stream, torch.tensor([0, 3, 511]))
            there, here = uniform(keys.to(device), _VOCAB).cpu(), uniform(keys, _VOCAB)
            if not torch.equal(there, here):
                return False, f"{int((there != here).sum())} of {here.numel():,} numbers differ with seed {seed}"
    return True, ""


def _chi_square(device: torch.device) -> tuple[bool, str]:
    """Sampled ids of a small vocabulary against the softmax."""
    ids, count = 12, 20000
    logits = torch.linspace(-1.5, 1.5, ids, device=device)
    keys = torch.cat([Draws(3, step).keys(GUMBEL, torch.arange(100)) for step in range(count // 100)]).to(device)
    worst = 1.0
    for temperature in (0.5, 1.0, 2.0):
        heat = torch.full((count, 1), temperature, dtype=torch.float64, device=device)
        drawn = gumbel_perturbed(logits.repeat(count, 1), heat, keys).argmax(-1)
        expected = (logits.double() / temperature).softmax(-1) * count
        observed = torch.bincount(drawn, minlength=ids)
        statistic = ((observed - expected) ** 2 / expected).sum().cpu()
        worst = min(worst, float(torch.special.gammaincc(torch.tensor((ids - 1) / 2).double(), statistic / 2)))
    return worst >= _LEAST_P, f"chi-square over {count:,} draws at three temperatures: least p {worst:.2g}"


def _proposals_alone(device: torch.device) -> tuple[bool, str]:
    """Rows of the published vocabulary: warm requests among cold ones propose what each proposes alone."""
    rows = [3, 1, 5, 4]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(sum(rows), _VOCAB, generator=generator).to(device)
    heats = [1.0, 0.0, 0.7, 1.3]
    choices = [Choice(heat, "low_confidence", Draws(index, 2)) for index, heat in enumerate(heats)]
    places = [torch.arange(count) * 3 for count in rows]
    together = propose(logits, _VOCAB, choices, places)
    different, start = 0, 0
    for count, choice, own in zip(rows, choices, places, strict=True):
        part = slice(start, start + count)
        alone = propose(logits[part], _VOCAB, [choice], [own])
        same = torch.equal(alone.tokens, together.tokens[part])
        different += not (same and torch.equal(alone.confidence, together.confidence[part]))
        start += count
    return different == 0, f"{different} of {len(rows)} requests propose something else" if different else ""


def _requests_alone(device: torch.device) -> tuple[bool, str]:
    """Whole answers of a small model in float32, at temperature 1, caches and pruning mixed."""
    made = random_model(SMALL, device, torch.float32)
    every = range(len(_KNOBS))
    together = _answers(made, list(every))
    alone = [_answers(made, [index])[0] for index in every]
    different = [index for index in every if alone[index] != together[index]]
    drawn = sum(len(answer) for answer in together)
    detail = f"requests {different} have other tokens" if different else f"{drawn} tokens of {len(_KNOBS)} requests"
    return not different, detail


# Cache, share of the visual tokens that is kept, visual tokens.
_KNOBS = (("none", 1.0, 90), ("dual", 0.25, 40), ("prefix", 0.5, 71), ("dual", 1.0, 5), ("none", 0.25, 64))


def _answers(made: RandomModel, members: list[int]) -> list[list[int]]:
    """The answer of each member, all of them stepped together."""
    sizes, config = made.sizes, made.model.config
    tokens = [sizes.text + _KNOBS[index][2] + sizes.gen_length for index in members]
    blocks, tables = block_tables(tokens, _BLOCK_SIZE)
    pages = PagedKVCache(
        config.num_hidden_layers, blocks, _BLOCK_SIZE, config.num_key_value_heads, config.head_dim,
        made.model.dtype, made.model.device,
    )  # fmt: skip
    runner = DenoisingRunner(made.model, pages, made.special, attention=TorchAttention(pages, config.head_dim**-0.5))
    sequences = [_request(made, index, table) for index, table in zip(members, tables, strict=True)]
    while running := [sequence for sequence in sequences if not sequence.finished]:
        runner.step(running)
    return [sequence.output_ids for sequence in sequences]


def _request(made: RandomModel, index: int, table: list[int]) -> Sequence:
    cache, keep, visual = _KNOBS[index]
    sizes = made.sizes
    denoising = DenoisingParams(
        sizes.gen_length, sizes.block_length, sizes.gen_length // 2, temperature=1.0, seed=index, cache=cache
    )
    pruning = PruningParams(keep_ratio=keep) if keep < 1 else PruningParams(preset="none")
    return made.sequence(index, denoising, pruning, list(table), visual)
