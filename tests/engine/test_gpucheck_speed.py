"""The part `speed` of gpucheck: what is measured, what is left out, and the work that times are compared with."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.gpucheck import speed
from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.costs import Work, step_cost
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.model import PUBLISHED, SMALL, RandomModel, block_tables, config_of, random_model
from redvtp.gpucheck.report import Report
from redvtp.gpucheck.settings import Setting, needed_bytes, settings
from redvtp.kv.pages import PagedKVCache
from redvtp.params import DenoisingParams, PruningParams
from redvtp.reports import StepReport

CPU = Machine(torch.device("cpu"), small=True)


def _report() -> Report:
    return Report({"name": "test"}, lambda line: None)


def test_not_finite_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    made = random_model(SMALL, CPU.device, torch.float32)
    made.model.language_model.get_parameter("layers.0.mlp.down_proj.weight").data[0, 0] = float("inf")
    monkeypatch.setattr(speed, "random_model", lambda *given: made)
    monkeypatch.setattr(speed, "settings", lambda names: list(settings(names))[:1])
    report = _report()
    with torch.inference_mode():
        speed.check_speed(CPU, report, Budget.of_minutes(1), lambda line: None)
    (check,) = report.failed
    assert "NOT FINITE" in check.detail


def test_what_does_not_fit_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    config = random_model(SMALL, CPU.device, torch.float32).model.config
    enough_for_one = needed_bytes(config, SMALL, 4, 1)
    monkeypatch.setattr(Machine, "memory", property(lambda machine: enough_for_one))
    monkeypatch.setattr(speed, "settings", lambda names: [Setting(batch, 0.5, "dual", "torch") for batch in (1, 16)])
    report = _report()
    with torch.inference_mode():
        speed.check_speed(CPU, report, Budget.of_minutes(3), lambda line: None)
    assert {cell["batch"] for cell in report.cells} == {1}
    (entry,) = report.left_out
    assert entry.startswith("batch 16, ")
    assert "GiB are free" in entry


def test_running_out_of_memory_is_left_out_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DenoisingRunner.step

    def step(self: DenoisingRunner, batch: list[Sequence]) -> list[StepReport]:
        if len(batch) == 16:
            raise torch.OutOfMemoryError("no room")
        return right(self, batch)

    monkeypatch.setattr(DenoisingRunner, "step", step)
    monkeypatch.setattr(speed, "settings", lambda names: [Setting(batch, 0.5, "dual", "torch") for batch in (16, 1)])
    report = _report()
    with torch.inference_mode():
        speed.check_speed(CPU, report, Budget.of_minutes(3), lambda line: None)
    assert not report.failed
    assert {cell["batch"] for cell in report.cells} == {1}
    assert report.left_out == ["batch 16, keep 50%, cache dual, torch: did not fit the memory"]


def _step(made: RandomModel, cache: str, steps: int) -> tuple[int, list[Work]]:
    """(products of the step behind `steps` others as torch counts them, what it computed), of two requests."""
    config, sizes = made.model.config, made.sizes
    tokens = [sizes.text + visual + sizes.gen_length for visual in (40, 21)]
    blocks, tables = block_tables(tokens, 16)
    pages = PagedKVCache(
        config.num_hidden_layers, blocks, 16, config.num_key_value_heads, config.head_dim, torch.float32
    )
    runner = DenoisingRunner(made.model, pages, made.special)
    denoising = DenoisingParams(sizes.gen_length, sizes.block_length, sizes.gen_length, cache=cache)
    dense = PruningParams(preset="none")
    sequences = [
        made.sequence(index, denoising, dense, table, count - sizes.text - sizes.gen_length)
        for index, (table, count) in enumerate(zip(tables, tokens, strict=True))
    ]
    for _ in range(steps):
        runner.step(sequences)
    begun = runner.begin(sequences)
    work = [
        Work(
            one.plan.tokens_computed,
            one.sequence.total_length,
            one.sequence.canvas.masked_rows(one.plan.first_candidate).numel(),
        )
        for one in begun
    ]
    # torch's counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        runner.step(sequences)
    return counter.get_total_flops(), work


@pytest.mark.parametrize(("cache", "steps"), [("none", 0), ("none", 2), ("prefix", 2), ("dual", 2)])
def test_products_of_a_step_are_those_that_torch_counts(cache: str, steps: int) -> None:
    made = random_model(SMALL, CPU.device, torch.float32)
    counted, work = _step(made, cache, steps)
    assert step_cost(made.model.config, 4, work).flop == counted


def test_the_published_sizes_cost_what_is_known_of_them() -> None:
    """8 billion weights, 16 GB in bfloat16; a full step is 53 TFLOP of products and 7.7 of attention."""
    config = config_of(PUBLISHED)
    full = step_cost(config, 2, [Work(PUBLISHED.tokens, PUBLISHED.tokens, PUBLISHED.gen_length)])
    assert full.flop == pytest.approx(53e12 + 7.7e12, rel=0.03)
    response = step_cost(config, 2, [Work(32, 1000, 32)])
    assert response.bytes == pytest.approx(2 * (8.02e9 - 126464 * 4096) + 1000 * (512 << 10), rel=0.01)
