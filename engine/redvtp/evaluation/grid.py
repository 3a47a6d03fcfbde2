"""What is compared. A cell is a pruning policy, a keep ratio and a cache mode; every question goes to every cell.

Dense (`none`, which keeps everything) is a cell of each cache mode, since all others are compared with it. Ratio 1 runs
once, as dense: a policy that keeps everything gives dense's tokens, which a test of the engine verifies. A policy that
sets its budget by itself runs once too, whatever the ratios are.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from redvtp.errors import InvalidRequest, Knob
from redvtp.evaluation.tasks import LENGTHS, Task
from redvtp.params import DenoisingParams, PruningParams
from redvtp.presets import PRESET_TABLE

# Parameters that a cell sets; all others are the same for every question.
_OF_CELL = {"cache", "preset", "keep_ratio"}


def has_own_budget(preset: str) -> bool:
    """Whether a preset decides by itself how much is kept, so that keep_ratio changes nothing."""
    return preset in PRESET_TABLE and PRESET_TABLE[preset].own_budget


@dataclass(frozen=True, slots=True)
class Cell:
    """One column of a comparison.

    policy: a preset of PruningParams.
    keep_ratio: 1.0 for `none`, None for a policy that sets its budget by itself.
    cache: of DenoisingParams.
    """

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
        return replace(DENSE, cache="none" if self.dense else self.cache)

    def pruning(self, shared: PruningParams) -> PruningParams:
        """The parameters of a request of this cell. shared: those that no cell sets."""
        pruning = replace(shared, preset=self.policy)
        return pruning if self.keep_ratio is None else replace(pruning, keep_ratio=self.keep_ratio)


DENSE = Cell("none", 1.0, "none")


@dataclass(frozen=True, slots=True)
class Question:
    """One task in one cell: a complete request but for its images."""

    task: Task
    cell: Cell
    denoising: DenoisingParams
    pruning: PruningParams

    @property
    def key(self) -> tuple[str, Cell]:
        return self.task.id, self.cell


@dataclass(frozen=True, slots=True)
class Settings:
    """What all questions share.

    denoising, pruning: parameters; those that a cell sets are replaced.
    gen_length, block_length, steps: go before a task's lengths; None leaves them to the task.
    seed: with a task's id, the seed of its requests.
    """

    denoising: DenoisingParams
    pruning: PruningParams = field(default_factory=PruningParams)
    gen_length: int | None = None
    block_length: int | None = None
    steps: int | None = None
    seed: int = 0

    def configuration(self) -> dict[str, Any]:
        """Every parameter that must be the same for all answers in one folder, by name. Cells may be added."""
        parameters = asdict(self.denoising) | asdict(self.pruning) | {name: getattr(self, name) for name in LENGTHS}
        return {name: value for name, value in parameters.items() if name not in _OF_CELL} | {"seed": self.seed}


def cells(policies: Sequence[str], keep_ratios: Sequence[float], caches: Sequence[str]) -> list[Cell]:
    """Dense first in each cache mode. Raises ValueError for a value that PruningParams or DenoisingParams refuse."""
    for policy in policies:
        PruningParams(preset=policy)
        if policy == "external":
            reason = " external needs an importance for each question, which task files do not hold"
            raise InvalidRequest(Knob("preset"), reason)
    for ratio in keep_ratios:
        PruningParams(keep_ratio=ratio)
    for cache_mode in caches:
        DenoisingParams(cache=cache_mode)
    found: dict[Cell, None] = {}
    for cache_mode in caches:
        found[Cell("none", 1.0, cache_mode)] = None
        for policy in policies:
            if has_own_budget(policy):
                found[Cell(policy, None, cache_mode)] = None
            elif policy != "none":
                found |= dict.fromkeys(Cell(policy, float(ratio), cache_mode) for ratio in keep_ratios if ratio < 1)
    return list(found)


def questions(tasks: Iterable[Task], cell: Cell, settings: Settings) -> list[Question]:
    """The tasks in one cell. Raises ValueError naming the line of a task whose lengths do not go together."""
    return [_question(task, cell, settings) for task in tasks]


def _question(task: Task, cell: Cell, settings: Settings) -> Question:
    lengths = {name: getattr(settings, name) or getattr(task, name) for name in LENGTHS}
    try:
        denoising = replace(
            settings.denoising,
            **{**lengths, "gen_length": lengths["gen_length"] or DenoisingParams().gen_length},
            cache=cell.cache,
            # From the task alone, so the same in every cell and on every machine. Different tasks get different
            # seeds, or `random` would drop the same places of every image.
            seed=zlib.crc32(f"{settings.seed}:{task.id}".encode()),
        )
    except InvalidRequest as error:
        # A length that the task brings is named as the file names it, not as a flag.
        theirs = {Knob(name) for name in LENGTHS if getattr(settings, name) is None and getattr(task, name) is not None}
        parts = [part.name if isinstance(part, Knob) and part in theirs else part for part in error.parts]
        line = f"line {task.line} of the task file cannot be asked with these flags: "
        raise InvalidRequest(line, *parts) from error
    return Question(task, cell, denoising, cell.pruning(settings.pruning))
