"""One command trains the tiny model, from nothing or from where it stopped:

    python -m training.train --folder training/runs/tiny

The folder holds `state.pt` (weights, their average, optimizers, phase and step; written atomically), `log.jsonl` (one
line per report), `loss.png`, and `pid`. Stop it whenever you like and run the same command again: the batches depend
on seed, phase and step alone. `python -m training.export` turns the state into a checkpoint, also while this runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from training.dataset import Batches, LanguageBatch, TowerBatch
from training.evaluate import evaluate_short
from training.model import TinyDvlm, tiny_shape
from training.objective import Report, language_loss, tower_loss
from training.optimizer import Average, Muon
from training.plan import PLAN, Phase
from training.plot import plot_log

Batch = TowerBatch | LanguageBatch

_SAVE_SECONDS = 120.0
# Gradients of a step are the mean over this many batches, whatever the number of threads.
_SHARDS = 2


class Trainer:
    """State of a training: everything that `state.pt` holds, and how to go on from it."""

    def __init__(self, folder: Path, seed: int, threads: int = 1) -> None:
        self.folder = folder
        self.seed = seed
        torch.manual_seed(seed)
        self.model = TinyDvlm(tiny_shape())
        # One Python thread a shard, each with single-threaded operators: on a shared machine that is several times
        # faster than operators that split their work and wait for each other.
        self.threads = ThreadPoolExecutor(threads)
        self.replicas = [self.model, *(copy.deepcopy(self.model) for _ in range(_SHARDS - 1))]
        self.average = Average(self.model)
        self.phase_index = 0
        self.step = 0
        self.updates = 0
        self.seconds = 0.0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.start_part()

    @property
    def phase(self) -> Phase:
        return PLAN[self.phase_index]

    def start_part(self) -> None:
        """Which parameters learn, and fresh optimizers for them; the phases of one part go on with the same."""
        tower = self.phase.part == "tower"
        if not tower and self.phase_index and PLAN[self.phase_index - 1].part == "tower":
            self.model.start_head()
        learning = dict(self.model.named_parameters())
        seen = ("vision_tower.", "projector.", "attributes.")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in learning.items():
            of_tower = name.startswith(seen) or (tower and "embed_tokens" in name)
            parameter.requires_grad_(of_tower == tower)
            if of_tower != tower:
                continue
            hidden = parameter.ndim >= 2 and ".layers." in name
            (matrices if hidden else others).append(parameter)
        for replica in self.replicas[1:]:
            for parameter, twin in zip(self.model.parameters(), replica.parameters(), strict=True):
                # Shared values, separate gradients.
                twin.data = parameter.data
                twin.requires_grad_(parameter.requires_grad)
        # Two optimizers: a matrix's update has a length of its own under Muon.
        self.optimizers = [
            Muon(matrices, lr=self.phase.matrix_lr),
            torch.optim.AdamW(others, lr=self.phase.other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def state(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "shape": asdict(self.model.shape),
            "phase": self.phase.name,
            "phase_index": self.phase_index,
            "step": self.step,
            "updates": self.updates,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "average": self.average.values,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def save(self) -> None:
        path = self.folder / "state.pt"
        torch.save(self.state(), path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self) -> None:
        state = torch.load(self.folder / "state.pt", weights_only=True)
        if state["shape"] != asdict(self.model.shape):
            raise ValueError(f"{self.folder / 'state.pt'} is of a model of other sizes; give another --folder")
        self.seed, self.step = state["seed"], state["step"]
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.phase_index = next((i for i, phase in enumerate(PLAN) if phase.name == state["phase"]), -1)
        if self.phase_index < 0:
            raise ValueError(f"phase {state['phase']!r} of {self.folder / 'state.pt'} is not in the plan")
        self.start_part()
        self.model.load_state_dict(state["model"])
        self.average.values = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def rate(self) -> float:
        """Share of the phase's learning rates: a rise at its start, a fall to a fiftieth at its end."""
        rise = min(1.0, (self.step + 1) / max(1, self.phase.warmup))
        left = self.phase.steps - self.step
        fall = min(1.0, max(0.02, left / self.phase.decay)) if self.phase.decay else 1.0
        return rise * fall

    def learn(self, shards: Sequence[Batch]) -> Report:
        """One update. Returns the shards' mean report."""
        reports = list(self.threads.map(self._gradients, self.replicas, shards))
        for replica in self.replicas[1:]:
            for parameter, twin in zip(self.model.parameters(), replica.parameters(), strict=True):
                if parameter.grad is not None and twin.grad is not None:
                    parameter.grad += twin.grad
                twin.grad = None
        nn.utils.clip_grad_norm_([p for group in self.optimizers[1].param_groups for p in group["params"]], 1.0)
        rate = self.rate()
        base = (self.phase.matrix_lr, self.phase.other_lr)
        for optimizer, lr in zip(self.optimizers, base, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.average.update(self.model, self.updates)
        self.step += 1
        self.updates += 1
        return {key: fmean(report[key] for report in reports if key in report) for key in set().union(*reports)}

    def _gradients(self, model: TinyDvlm, batch: Batch) -> Report:
        if isinstance(batch, TowerBatch):
            loss, report = tower_loss(model, batch)
        else:
            loss, report = language_loss(model, batch, self.phase.auxiliary, self.phase.frugality)
        (loss / _SHARDS).backward()
        return {"total": loss.item(), **report}


class Log:
    """Means of the reports since the last line of `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, report: Report) -> None:
        for key, value in report.items():
            if value == value:
                self.values[key].append(value)

    def write(self, **more: object) -> dict[str, object]:
        line: dict[str, object] = dict(more)
        line |= {key: round(sum(values) / len(values), 4) for key, values in self.values.items() if values}
        self.values.clear()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line


def _batches(phase: Phase, index: int, seed: int, first: int, workers: int) -> Iterator[Sequence[Batch]]:
    loader: DataLoader[Batch] = DataLoader(
        Batches(phase, index, seed),
        batch_size=None,
        sampler=range(first * _SHARDS, phase.steps * _SHARDS),
        num_workers=workers,
        prefetch_factor=8 if workers else None,
    )
    batches = iter(loader)
    return iter(zip(*[batches] * _SHARDS, strict=True))


def train(folder: Path, seed: int, threads: int, workers: int, evaluate_seconds: float, until: str | None) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
    trainer = Trainer(folder, seed, threads)
    if (folder / "state.pt").is_file():
        trainer.load()
    log = Log(folder / "log.jsonl")
    while True:
        phase = trainer.phase
        _run_phase(trainer, log, workers, evaluate_seconds)
        if trainer.phase_index + 1 == len(PLAN) or phase.name == until:
            break
        trainer.phase_index, trainer.step = trainer.phase_index + 1, 0
        if trainer.phase.part != phase.part:
            trainer.start_part()
        trainer.save()


def _run_phase(trainer: Trainer, log: Log, workers: int, evaluate_seconds: float) -> None:
    phase = trainer.phase
    saved = evaluated = reported = time.monotonic()
    with tqdm(total=phase.steps, initial=trainer.step, desc=phase.name, unit="step", mininterval=10) as bar:
        for shards in _batches(phase, trainer.phase_index, trainer.seed, trainer.step, workers):
            started = time.monotonic()
            log.add(trainer.learn(shards))
            trainer.seconds += time.monotonic() - started
            bar.update()
            now = time.monotonic()
            if now - reported > 30:
                reported = now
                place = {"phase": phase.name, "step": trainer.step, "updates": trainer.updates}
                line = log.write(**place, seconds=round(trainer.seconds), time=round(time.time()))
                bar.write(json.dumps(line))
            if now - saved > _SAVE_SECONDS:
                saved = now
                trainer.save()
                plot_log(log.path, trainer.folder / "loss.png")
            if evaluate_seconds and phase.part == "language" and now - evaluated > evaluate_seconds:
                _evaluate(trainer, log)
                evaluated = time.monotonic()
    trainer.save()
    if phase.part == "language":
        _evaluate(trainer, log)
    plot_log(log.path, trainer.folder / "loss.png")


def _evaluate(trainer: Trainer, log: Log) -> None:
    """Held-out exact match per task, with the averaged weights, decoded as served."""
    model = TinyDvlm(trainer.model.shape)
    model.load_state_dict({**trainer.model.state_dict(), **trainer.average.values})
    scores = evaluate_short(model, phase=trainer.phase)
    line = log.write(phase=trainer.phase.name, step=trainer.step, updates=trainer.updates, exact_match=scores)
    tqdm.write(json.dumps(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/tiny"), help="where the state is kept")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=_SHARDS, help="computing at the same time, at most 2")
    parser.add_argument("--workers", type=int, default=1, help="processes that make pictures")
    parser.add_argument("--evaluate-seconds", type=float, default=600, help="between evaluations; 0: at phase ends")
    parser.add_argument("--until", choices=[phase.name for phase in PLAN], help="stop after this phase")
    args = parser.parse_args()
    train(args.folder, args.seed, args.threads, args.workers, args.evaluate_seconds, args.until)


if __name__ == "__main__":
    main()
