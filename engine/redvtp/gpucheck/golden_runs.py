"""Golden runs in float32 on the device: the tokens after every step are the reference's, or a near tie says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from redvtp.canvas.proposals import Choice, keep_best, propose, suppress
from redvtp.denoising.sequence import Sequence
from redvtp.gpucheck import margins
from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.golden_files import GoldenRun, golden_runs
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.margins import Divergence, StepEvidence
from redvtp.gpucheck.report import Report
from redvtp.local import LocalEngine, Request
from redvtp.prompt import chat_prompt

PART = "golden"


def check_golden(machine: Machine, report: Report, budget: Budget, root: Path, tick: Callable[[str], None]) -> None:
    """root: the folder with runs.json, such as tests/golden of a source checkout."""
    try:
        runs = golden_runs(root, quick=machine.small)
    except OSError:
        report.skip(PART, "golden runs", f"no golden data at {root}; give its folder with --golden")
        return
    engines: dict[str, LocalEngine] = {}
    for number, run in enumerate(runs):
        if not budget.allows():
            report.left_out.append(f"{len(runs) - number} of {len(runs)} golden runs: no time left for them")
            return
        tick(f"golden {number + 1}/{len(runs)}")
        with report.checking(PART, str(run)):
            name = json.dumps([run.entry["checkpoint"], run.entry["config"]])
            if name not in engines:
                engines[name] = _engine(run, machine.device)
            divergence = follow(engines[name], run)
            passed = divergence is None or divergence.near_tie
            report.add(PART, str(run), passed, "" if divergence is None else str(divergence))


def _engine(run: GoldenRun, device: torch.device) -> LocalEngine:
    config = run.entry["config"]
    return LocalEngine(run.model, dtype="float32", device=str(device), max_num_seqs=1, config_overrides=config)


def follow(engine: LocalEngine, run: GoldenRun) -> Divergence | None:
    """Step by step beside the reference, to the first difference."""
    images = run.images()
    template = engine.config.family.template
    prompt = chat_prompt(engine.tokenizer, run.entry["question"], num_images=len(images), template=template)
    request = Request(prompt, images, run.denoising, run.pruning)
    blocks = engine.blocks.allocate(engine.blocks.num_free)
    assert blocks is not None
    head = _LastOutput(engine.model.language_model.lm_head)
    try:
        sequence = engine.sequence(request, engine.tokenize(request), list(blocks))
        return _compared(engine, run, sequence, head)
    finally:
        head.close()
        engine.blocks.free(blocks)


def _compared(engine: LocalEngine, run: GoldenRun, sequence: Sequence, head: _LastOutput) -> Divergence | None:
    compared, mask, kept = run.entry["compared"], engine.special.mask_id, run.kept()
    for step, reference in enumerate(run.canvases()):
        if sequence.finished:
            return Divergence(f"ended after {step} steps", None, 0.0)
        steps = engine.runner.begin([sequence])
        before = sequence.canvas.copy()
        (report,) = engine.runner.step([sequence])
        ours, theirs = report.canvas[:compared], reference[:compared]
        if ours != theirs:
            rows = before.masked_rows(steps[0].plan.first_candidate)
            return margins.of_canvas(step, ours, theirs, mask, _evidence(engine, sequence, rows, step, head.output))
        if report.pruning is not None and kept is not None:
            found = margins.of_kept(step, report.pruning.kept, kept, report.pruning.importance)
            if found is not None:
                return found
    if not sequence.finished or sequence.output_ids != run.entry["output"]:
        return Divergence(f"output {sequence.output_ids} instead of {run.entry['output']}", None, 0.0)
    return None


def _evidence(engine: LocalEngine, sequence: Sequence, rows: Tensor, step: int, output: Tensor) -> StepEvidence:
    """output: [rows or more, vocab or more], what the head gave last."""
    sampler, special = engine.config.family.sampler, engine.special
    width = engine.config.vocab_size if sampler.counts_surplus_rows else special.vocab
    # A first token that the prompt decided is no row of the step any more.
    rows = rows[-output.shape[0] :]
    logits = keep_best(suppress(output[:, :width].clone(), special.suppressed), sampler.top_k)
    choice = Choice(0.0, sequence.denoising.remasking, sequence.draws(step))
    return StepEvidence(rows, logits, propose(logits, special.vocab, [choice], [rows]).confidence)


class _LastOutput:
    """What a module put out last. output: [rows, columns]."""

    def __init__(self, module: nn.Module) -> None:
        self.output = torch.empty(0, 0)
        self._hook = module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self.output = output

    def close(self) -> None:
        self._hook.remove()
