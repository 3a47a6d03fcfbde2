"""What `python -m redvtp.gpucheck` finds out: right code passes, and each planted fault is reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.test_flash import read_slowly
from redvtp.attention.offered import OfferedKernel
from redvtp.attention.paged import PagedAttention
from redvtp.attention.paged_batch import PagedBatch
from redvtp.attention.torch_paged import TorchAttention, TorchPrepared
from redvtp.canvas import proposals
from redvtp.gpucheck import backends, golden_runs, kernels, margins, sampling
from redvtp.gpucheck.__main__ import main
from redvtp.gpucheck.budget import Budget
from redvtp.gpucheck.golden_files import GoldenRun
from redvtp.gpucheck.machine import Machine
from redvtp.gpucheck.margins import StepEvidence
from redvtp.gpucheck.report import FAILED, PASSED, Report
from redvtp.gpucheck.settings import settings
from redvtp.kernels import score
from redvtp.kv.pages import KVPages
from vllm_redvtp.attention.flash import FlashKernel

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = Machine(torch.device("cpu"), small=True)


def _run(tmp_path: Path, part: str) -> tuple[int, dict[str, Any]]:
    flags = ["--device", "cpu", "--small", "--golden", str(GOLDEN), "--output", str(tmp_path), "--only", part]
    status = main(flags)
    found: dict[str, Any] = json.loads((tmp_path / "gpucheck.json").read_text())
    assert (status == 1) == (found["failed"] > 0)
    return status, found


def _failed(found: dict[str, Any]) -> list[str]:
    return [check["name"] for check in found["checks"] if check["status"] == FAILED]


def _report() -> Report:
    return Report({"name": "test"}, lambda line: None)


class SlowKernel:
    """FlashAttention's arguments through a slow reader, with what a fault changes.

    scale: times the right one. writes: it writes to a slot of a block that it was not given.
    """

    batch_invariant = True
    reads_unused = True

    def __init__(self, scale: float, times: float = 1.0, writes: bool = False, neighbours: bool = False) -> None:
        self._kernel = FlashKernel(scale * times, read_slowly, 3)
        self._writes, self._neighbours = writes, neighbours

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor | None]:
        output, lse = self._kernel(query, keys, values, batch)
        if self._writes:
            spare = sorted(set(range(keys.shape[0])) - set(batch.block_table.flatten().tolist()))
            keys[spare[0]] = 0
        if self._neighbours:
            output = output * (1 + 2**-9 * (len(batch.sequences) > 1))
        return output, lse


def _offer(monkeypatch: pytest.MonkeyPatch, **fault: Any) -> None:
    def make(pages: KVPages, heads: int, scale: float) -> PagedAttention:
        return PagedAttention(pages, scale, SlowKernel(scale, **fault))

    monkeypatch.setattr(backends, "offered_kernels", lambda: {"slow": OfferedKernel(lambda *_: None, make)})


@pytest.mark.parametrize(
    ("fault", "reported"),
    [
        ({}, ""),
        ({"times": 1.1}, "slow, "),
        ({"writes": True}, ": pages"),
        ({"neighbours": True}, ": alone"),
    ],
    ids=["right", "wrong scale", "writes elsewhere", "depends on neighbours"],
)
def test_a_kernel_of_a_package_is_checked(
    fault: dict[str, Any], reported: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # One shape: the reader is slow.
    monkeypatch.setattr("redvtp.gpucheck.attention._SHAPES", ((4, 2, 64, 128),))
    _offer(monkeypatch, **fault)
    status, found = _run(tmp_path, "attention")
    assert status == bool(fault)
    failed = _failed(found)
    assert all("slow, " in name and reported in name for name in failed)
    assert any(check["name"].startswith("slow, ") for check in found["checks"])
    if fault:
        assert any(name.endswith(reported) for name in failed) or reported == "slow, "


def test_torch_is_checked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(backends, "_torch", lambda pages, heads, scale: TorchAttention(pages, scale * 1.05))
    status, found = _run(tmp_path, "attention")
    assert status == 1
    assert _failed(found)
    assert not any(": pages" in name for name in _failed(found))


def test_wrong_scores_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def half(self: TorchPrepared, layer: int, query: Tensor, key: Tensor) -> None:
        if layer:
            right(self, layer, query, key)

    right = TorchPrepared.score
    monkeypatch.setattr(TorchPrepared, "score", half)
    assert _run(tmp_path, "attention")[0] == 1


def test_a_backend_that_raises_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def make(pages: KVPages, heads: int, scale: float) -> PagedAttention:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(backends, "offered_kernels", lambda: {"broken": OfferedKernel(lambda *_: None, make)})
    status, found = _run(tmp_path, "attention")
    assert status == 1
    assert {name.split(",")[0] for name in _failed(found)} == {"broken"}
    assert all("no kernel image" in check["detail"] for check in found["checks"] if check["status"] == FAILED)
    assert any(check["name"].startswith("torch") and check["status"] == PASSED for check in found["checks"])


@pytest.fixture
def report_of_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Report]:
    """The kernels' twins run in their place: what is tested is that a difference is found."""
    monkeypatch.setattr(kernels, "runs_kernels", lambda tensor: True)

    def run() -> Report:
        report = _report()
        kernels.check_kernels(CPU, report, Budget.of_minutes(5), lambda line: None)
        return report

    return run


def test_kernels_that_are_their_twins_pass(report_of_kernels: Callable[[], Report]) -> None:
    report = report_of_kernels()
    assert not report.failed
    assert sum(check.status == PASSED for check in report.checks) >= 10


@pytest.mark.parametrize("name", ["compact", "log_sum_exp", "score_sums"])
def test_a_kernel_that_differs_is_reported(
    name: str, report_of_kernels: Callable[[], Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "compact":
        monkeypatch.setattr(kernels, "compact", lambda pages, plan, rotary: None)
    elif name == "log_sum_exp":
        right = score.log_sum_exp_in_torch
        monkeypatch.setattr(score, "log_sum_exp", lambda *given: right(*given) + 1e-3)
    else:
        monkeypatch.setattr(score, "score_sums", lambda *given: None)
    said = {"compact": "compaction", "log_sum_exp": "log-sum-exp", "score_sums": "score sums"}[name]
    report = report_of_kernels()
    assert report.failed
    assert all(check.name.startswith(said) for check in report.failed)


def test_sampling_passes(tmp_path: Path) -> None:
    status, found = _run(tmp_path, "sampling")
    assert status == 0
    assert len(found["checks"]) == 4


@pytest.mark.parametrize(
    ("owner", "name", "fault", "reported"),
    [
        (
            sampling,
            "gumbel_perturbed",
            lambda logits, heat, keys: proposals.gumbel_perturbed(logits, heat * 0.9, keys),
            "noise follows the softmax",
        ),
        (
            sampling,
            "uniform",
            lambda keys, count: torch.rand(keys.shape[0], count),
            "the device draws the CPU's numbers",
        ),
        (
            proposals,
            "uniform",
            lambda keys, count: torch.rand(keys.shape[0], count, dtype=torch.float64),
            "proposals alone and in a batch",
        ),
    ],
    ids=["temperature", "bits", "state"],
)
def test_wrong_noise_is_reported(
    owner: Any, name: str, fault: Any, reported: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(owner, name, fault)
    status, found = _run(tmp_path, "sampling")
    assert status == 1
    assert reported in _failed(found)


def test_the_index_of_golden_runs_is_up_to_date() -> None:
    from golden.write_runs import index

    assert json.loads((GOLDEN / "runs.json").read_text()) == index()


def test_a_token_that_is_not_the_references_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = GoldenRun.canvases

    def changed(run: GoldenRun) -> list[list[int]]:
        canvases = right(run)
        place = next(place for place, token in enumerate(canvases[2]) if token not in (584, canvases[1][place]))
        canvases[2][place] = (canvases[2][place] + 1) % 500
        return canvases

    monkeypatch.setattr(GoldenRun, "canvases", changed)
    monkeypatch.setattr(golden_runs, "golden_runs", lambda root, quick: _few_runs(root))
    status, found = _run(tmp_path, "golden")
    assert status == 1
    assert len(_failed(found)) == 3
    assert all("step 2, position" in check["detail"] for check in found["checks"])


def test_golden_runs_pass_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(golden_runs, "golden_runs", lambda root, quick: _few_runs(root))
    assert _run(tmp_path, "golden")[0] == 0


def _few_runs(root: Path) -> list[GoldenRun]:
    """A dense one and pruned ones of two families, of three steps or more."""
    entries = json.loads((root / "runs.json").read_text())
    wanted = [("tiny-llada-v", "plain"), ("tiny-llada-v", "redvtp"), ("tiny-lavida", "redvtp")]
    return [
        GoldenRun(root, next(e for e in entries if (e["checkpoint"], e["kind"]) == pair and len(e["steps"]) > 3))
        for pair in wanted
    ]


def test_without_golden_data_it_says_so(tmp_path: Path) -> None:
    report = _report()
    golden_runs.check_golden(CPU, report, Budget.of_minutes(1), tmp_path, lambda line: None)
    (check,) = report.checks
    assert (check.status, "--golden" in check.detail) == ("skipped", True)


def _evidence(token_gap: float, confidence_gap: float) -> StepEvidence:
    """Positions 0 and 1 are undecided; id 1 is the best of position 0, by so much before id 2."""
    logits = torch.tensor([[0.0, 5.0, 5.0 - token_gap], [0.0, 1.0, 2.0]])
    return StepEvidence(torch.tensor([0, 1]), logits, torch.tensor([0.5, 0.5 * (1 - confidence_gap)]).double())


@pytest.mark.parametrize(("gap", "near"), [(1e-3, True), (1e-2, False)])
def test_a_near_tie_of_tokens_is_excused(gap: float, near: bool) -> None:
    found = margins.of_canvas(0, [1, 9], [2, 9], mask=9, evidence=_evidence(gap, 0.5))
    assert found is not None
    assert found.near_tie == near


@pytest.mark.parametrize(("gap", "near"), [(1e-4, True), (1e-3, False)])
def test_a_near_tie_of_confidences_is_excused(gap: float, near: bool) -> None:
    found = margins.of_canvas(0, [1, 9], [9, 2], mask=9, evidence=_evidence(1.0, gap))
    assert found is not None
    assert found.near_tie == near


def test_a_difference_without_a_margin_is_no_near_tie() -> None:
    found = margins.of_canvas(0, [1, 9], [9, 9], mask=9, evidence=_evidence(0.0, 0.0))
    assert found is not None
    assert not found.near_tie


@pytest.mark.parametrize(("third", "near"), [(0.29995, True), (0.2, False)])
def test_a_near_tie_of_visual_tokens_is_excused(third: float, near: bool) -> None:
    found = margins.of_kept(0, [0, 1], [0, 2], [0.4, 0.3, third])
    assert found is not None
    assert found.near_tie == near


def test_without_time_everything_is_left_out(tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--small", "--minutes", "0", "--golden", str(GOLDEN), "--output", str(tmp_path)]
    assert main([*flags, "--only", "golden", "attention", "speed"]) == 0
    found = json.loads((tmp_path / "gpucheck.json").read_text())
    assert not found["checks"]
    assert not found["cells"]
    assert len(found["left_out"]) == 1 + 8 + len(list(settings(["torch"])))


def test_no_card_is_said_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "finds no GPU here" in capsys.readouterr().err
