"""One command trains version 2, from nothing or from where it stopped, in one pass over `training.v2.plan`:

    python -m training.v2.train --folder training/runs/small

The folder holds `state.pt` (weights, their average, optimizers, phase and step; written atomically), `log.jsonl` (one
line per report), `loss.png`, and `pid`. Stop it at any time and run the same command again: batches depend on seed,
phase and step alone, and the weights end bit for bit the same.
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

from training.optimizer import Average, Muon
from training.v2.batches import Batches, LanguageBatch, TowerBatch
from training.v2.evaluate import evaluate, held_out
from training.v2.layers import fast_bfloat16
from training.v2.model import SmallDvlm, small_shape
from training.v2.objective import Report, language_loss, tower_loss
from training.v2.plan import PLAN, Phase
from training.v2.plot import plot_log

Batch = TowerBatch | LanguageBatch

_SAVE_SECONDS = 240.0
_REPORT_SECONDS = 60.0
_PLOT_SECONDS = 1200.0
# Gradients of a step are the mean over this many batches, whatever the number of threads.
_SHARDS = 2
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Trainer:
    """State of a training: everything that `state.pt` holds, and how to go on from it."""

    def __init__(
        self, folder: Path, seed: int, threads: int = 1, precision: str = "float32", plan: Sequence[Phase] = PLAN
    ) -> None:
        self.folder = folder
        self.seed = seed
        self.precision = precision
        self.plan = plan
        torch.manual_seed(seed)
        self.model = SmallDvlm(small_shape())
        # One Python thread a shard, each with single-threaded operators: on a shared machine that is several times
        # faster than operators that split their work and wait for each other.
        self.threads = ThreadPoolExecutor(threads)
        self.replicas = [self.model, *(copy.deepcopy(self.model) for _ in range(_SHARDS - 1))]
        self.average = Average(self.model, decay=0.998)
        self.phase_index = 0
        self.step = 0
        self.updates = 0
        self.seconds = 0.0
        self.optimizers: list[torch.optim.Optimizer] = []
        self.start_part()

    @property
    def phase(self) -> Phase:
        return self.plan[self.phase_index]

    def start_part(self) -> None:
        """Which parameters learn, and fresh optimizers for them; the phases of one part go on with the same."""
        tower = self.phase.part == "tower"
        if not tower and self.phase_index and self.plan[self.phase_index - 1].part == "tower":
            self.model.start_head()
        seen = ("vision_tower.", "projector.", "attributes.")
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.model.named_parameters():
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
            "precision": self.precision,
            "shape": asdict(self.model.shape),
            "plan": [repr(phase) for phase in self.plan[: self.phase_index + 1]],
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
        """Go on from `state.pt`; its seed and precision win.

        Raises ValueError when a phase up to the state's is not the plan's: one pass, one plan.
        """
        path = self.folder / "state.pt"
        state = torch.load(path, weights_only=True)
        if state["shape"] != asdict(self.model.shape):
            raise ValueError(f"{path} is of a model of other sizes; give another --folder")
        if state["plan"] != [repr(phase) for phase in self.plan[: state["phase_index"] + 1]]:
            raise ValueError(f"{path} was trained by another plan; give another --folder, or check out its version")
        self.seed, self.precision = state["seed"], state["precision"]
        self.phase_index, self.step = state["phase_index"], state["step"]
        self.updates, self.seconds = state["updates"], state["seconds"]
        self.start_part()
        self.model.load_state_dict(state["model"])
        self.average.values = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def rate(self) -> float:
        """Share of the phase's learning rates: a rise at its start, a straight fall to `final` at its end."""
        phase = self.phase
        rise = min(1.0, (self.step + 1) / max(1, phase.warmup))
        left = (phase.steps - self.step) / phase.decay if phase.decay else 1.0
        return rise * (phase.final + (1.0 - phase.final) * min(1.0, left))

    def learn(self, shards: Sequence[Batch]) -> Report:
        """One update. Returns the shards' mean report."""
        reports = list(self.threads.map(self._gradients, self.replicas, shards))
        for replica in self.replicas[1:]:
            for parameter, twin in zip(self.model.parameters(), replica.parameters(), strict=True):
                if parameter.grad is not None and twin.grad is not None:
                    parameter.grad += twin.grad
                elif twin.grad is not None:
                    # A hint that only the other shard asked.
                    parameter.grad = twin.grad
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
        keys = dict.fromkeys(key for report in reports for key in report)
        return {key: fmean(report[key] for report in reports if key in report) for key in keys}

    def _gradients(self, model: SmallDvlm, batch: Batch) -> Report:
        if isinstance(batch, TowerBatch):
            loss, report = tower_loss(model, batch)
        else:
            dtype = torch.float32 if self.phase.exact else _DTYPES[self.precision]
            loss, report = language_loss(model, batch, self.phase.auxiliary, dtype)
        (loss / _SHARDS).backward()
        return {"total": loss.item(), **report}

    def averaged(self) -> SmallDvlm:
        model = SmallDvlm(self.model.shape)
        model.load_state_dict({**self.model.state_dict(), **self.average.values})
        return model.eval()


class Log:
    """Means of the reports since the last line of `log.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, list[float]] = defaultdict(list)

    def add(self, report: Report) -> None:
        for key, value in report.items():
            # A share of nothing is NaN.
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


def train(
    folder: Path,
    seed: int,
    *,
    threads: int = _SHARDS,
    workers: int = 1,
    evaluate_steps: int = 0,
    per_task: int = 0,
    until: str | None = None,
    precision: str = "float32",
    plan: Sequence[Phase] = PLAN,
) -> Trainer:
    """Train to the end of the plan, or of the phase `until`. per_task: held-out questions a task, 0 for none."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pid").write_text(f"{os.getpid()}\n", encoding="utf-8")
    trainer = Trainer(folder, seed, threads, precision, plan)
    if (folder / "state.pt").is_file():
        trainer.load()
    log = Log(folder / "log.jsonl")
    while True:
        phase = trainer.phase
        _run_phase(trainer, log, workers, evaluate_steps, per_task)
        if trainer.phase_index + 1 == len(plan) or phase.name == until:
            return trainer
        trainer.phase_index, trainer.step = trainer.phase_index + 1, 0
        if trainer.phase.part != phase.part:
            trainer.start_part()
        trainer.save()


def _run_phase(trainer: Trainer, log: Log, workers: int, evaluate_steps: int, per_task: int) -> None:
    phase = trainer.phase
    if trainer.step == phase.steps:
        return
    saved = plotted = reported = time.monotonic()
    with tqdm(total=phase.steps, initial=trainer.step, desc=phase.name, unit="step", mininterval=10) as bar:
        for shards in _batches(phase, trainer.phase_index, trainer.seed, trainer.step, workers):
            started = time.monotonic()
            log.add(trainer.learn(shards))
            trainer.seconds += time.monotonic() - started
            bar.update()
            now = time.monotonic()
            if now - reported > _REPORT_SECONDS:
                reported = now
                place = {"phase": phase.name, "step": trainer.step, "updates": trainer.updates}
                line = log.write(**place, seconds=round(trainer.seconds), time=round(time.time()))
                bar.set_postfix(loss=line.get("loss", line["total"]), refresh=False)
            if now - saved > _SAVE_SECONDS:
                saved = now
                trainer.save()
            if now - plotted > _PLOT_SECONDS:
                plotted = now
                plot_log(log.path, trainer.folder / "loss.png")
            if per_task and evaluate_steps and phase.part == "language" and trainer.step % evaluate_steps == 0:
                _evaluate(trainer, log, per_task)
    trainer.save()
    if phase.part == "language" and per_task:
        _evaluate(trainer, log, 2 * per_task)
    plot_log(log.path, trainer.folder / "loss.png")


def _evaluate(trainer: Trainer, log: Log, per_task: int) -> None:
    """Held-out exact match with the averaged weights, decoded as served."""
    tasks, groups = evaluate(trainer.averaged(), held_out(per_task))
    log.write(phase=trainer.phase.name, step=trainer.step, updates=trainer.updates, exact_match=tasks, groups=groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("training/runs/small"), help="where the state is kept")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--threads", type=int, default=_SHARDS, help="computing at the same time, at most 2")
    parser.add_argument("--workers", type=int, default=1, help="processes that make pictures")
    parser.add_argument("--evaluate-steps", type=int, default=1000, help="between evaluations; 0: at phase ends")
    parser.add_argument("--per-task", type=int, default=8, help="held-out questions of each task in an evaluation")
    parser.add_argument("--precision", choices=("auto", *_DTYPES), default="auto", help="of the matrix products")
    parser.add_argument("--until", choices=[phase.name for phase in PLAN], help="stop after this phase")
    args = parser.parse_args()
    precision = args.precision
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16() else "float32"
    train(
        args.folder,
        args.seed,
        threads=args.threads,
        workers=args.workers,
        evaluate_steps=args.evaluate_steps,
        per_task=args.per_task,
        until=args.until,
        precision=precision,
    )


if __name__ == "__main__":
    main()
