"""What is compared: every cell is a pruning policy, a keep ratio and a cache mode, and is asked every question.

Dense (`none`, keeping everything) is always among the cells of a cache mode, since all others are compared with it. A
policy that keeps everything is dense token for token (a test of the engine says so), so ratio 1 is run once, as dense.
A policy with a budget of its own is run once too, whatever the ratios are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from redvtp.evaluation.tasks import Task
from redvtp.params import DenoisingParams, PruningParams

# Policies that keep_ratio has no say in: what they keep follows from something else.
OWN_BUDGET = frozenset({"zipvl", "layer-skip"})


@dataclass(frozen=True, slots=True)
class Cell:
    """policy: a preset of PruningParams. keep_ratio: 1.0 where the policy is `none`, None where it has a budget of its
    own."""

    policy: str
    keep_ratio: float | None
    cache: str

    def __str__(self) -> str:
        ratio = "" if self.keep_ratio is None else f" {self.keep_ratio:g}"
        return f"{self.policy}{ratio} cache={self.cache}"

    @property
    def dense(self) -> bool:
        return self.policy == "none"

    @property
    def baseline(self) -> Cell | None:
        """What its accuracy is compared with: dense with the same cache; for that, dense without a cache."""
        if self.dense and self.cache == "none":
            return None
        return Cell("none", 1.0, "none" if self.dense else self.cache)

    def pruning(self, positions: str) -> PruningParams:
        """What a request of this cell asks for."""
        if self.keep_ratio is None:
            return PruningParams(self.policy, positions=positions)
        return PruningParams(self.policy, self.keep_ratio, positions)


@dataclass(frozen=True, slots=True)
class Question:
    """One task in one cell, ready to be asked."""

    task: Task
    cell: Cell
    denoising: DenoisingParams
    pruning: PruningParams

    @property
    def key(self) -> tuple[str, Cell]:
        return self.task.id, self.cell


@dataclass(frozen=True, slots=True)
class Settings:
    """What all questions share. The lengths are those of the command line; None leaves them to the task."""

    denoising: DenoisingParams
    gen_length: int | None = None
    block_length: int | None = None
    steps: int | None = None
    positions: str = "compact"
    seed: int = 0


def cells(policies: Sequence[str], keep_ratios: Sequence[float], caches: Sequence[str]) -> list[Cell]:
    """Dense first in each cache mode. Raises ValueError for a value that PruningParams or DenoisingParams refuse."""
    for policy in policies:
        PruningParams(preset=policy)
        if policy == "external":
            raise ValueError("policy external needs an importance for each question, which task files do not hold")
    for ratio in keep_ratios:
        PruningParams(keep_ratio=ratio)
    found: dict[Cell, None] = {}
    for cache in caches:
        DenoisingParams(cache=cache)
        found[Cell("none", 1.0, cache)] = None
        for policy in policies:
            if policy in OWN_BUDGET:
                found[Cell(policy, None, cache)] = None
            elif policy != "none":
                found |= dict.fromkeys(Cell(policy, float(ratio), cache) for ratio in keep_ratios if ratio < 1)
    return list(found)


def questions(tasks: Iterable[Task], cell: Cell, settings: Settings) -> list[Question]:
    """The tasks in one cell. Raises ValueError naming the line of a task whose lengths do not go together."""
    return [_question(task, cell, settings) for task in tasks]


def _question(task: Task, cell: Cell, settings: Settings) -> Question:
    lengths = {name: getattr(settings, name) or getattr(task, name) for name in ("gen_length", "block_length", "steps")}
    try:
        denoising = replace(
            settings.denoising,
            **{**lengths, "gen_length": lengths["gen_length"] or DenoisingParams().gen_length},
            cache=cell.cache,
            # From the task alone: the same for every cell and wherever it runs, but not the same for every task, or
            # `random` would drop the same places of every image.
            seed=zlib.crc32(f"{settings.seed}:{task.id}".encode()),
        )
    except ValueError as error:
        raise ValueError(f"line {task.line} of the task file cannot be asked with these flags: {error}") from error
    return Question(task, cell, denoising, cell.pruning(settings.positions))
