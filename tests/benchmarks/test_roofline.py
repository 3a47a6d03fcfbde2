"""benchmarks/roofline.py: its tables, its help, its rates, and a check at a tiny size."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import rates
import roofline
import torch
from machines import CARDS, Cost, Machine
from rates import Bench
from roofline_check import check_report, status, within_tolerance
from work import ELEMENTWISE, KINDS, PRODUCTS, Work

from conftest import EngineFactory

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
TINY = [
    *("--hidden", "64", "--intermediate", "128", "--layers", "2", "--heads", "4"),
    *("--tower-hidden", "64", "--tower-layers", "2", "--tile", "56", "--image", "90x60"),
    *("--gen-length", "8", "--block-length", "8", "--steps", "4", "--keep", "25"),
    *("--repeats", "1", "--threads", "1", "--clock", "processor", "--quiet"),
]


def cells(table: str) -> dict[tuple[str, str], list[str]]:
    """(card, batch) -> the other cells of its row."""
    found = {}
    for line in table.splitlines():
        words = [word.strip() for word in line.strip("|").split("|")]
        if len(words) > 2 and words[1].isdigit():
            found[words[0], words[1]] = words[2:]
    return found


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The parts of the printed tables."""
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lines.append)
        assert roofline.main([]) == 0
    return lines[0].split("\n\n")


def test_every_table_says_that_it_is_predicted(printed: list[str]) -> None:
    titles = [part for part in printed if not part.startswith("|")]
    assert sum(title.startswith("PREDICTED") for title in titles) == 3
    assert "No card was measured" in titles[0]


def test_all_cards_have_a_row_for_each_batch(printed: list[str]) -> None:
    steps, requests, published = (part for part in printed if part.startswith("|"))
    expected = [(card.name, batch) for card in CARDS for batch in ("1", "4", "16")]
    assert list(cells(steps)) == list(cells(requests)) == expected
    for card in CARDS:
        assert card.source in published


def test_pruning_and_caches_gain_what_they_should(printed: list[str]) -> None:
    steps, requests, _ = (cells(part) for part in printed if part.startswith("|"))
    full, half, quarter, *response = map(float, steps["H100", "1"])
    assert full > half > quarter > max(response)
    # Without a cache nearly all of the work is rows.
    none, pruned, more_pruned, *cached = map(float, requests["H100", "1"])
    assert none < pruned < more_pruned < min(cached)


def test_a_full_step_is_bound_by_its_products(printed: list[str]) -> None:
    """53 TFLOP of them, at a rate that cannot be exceeded."""
    steps = cells(next(part for part in printed if part.startswith("|")))
    assert 53 / 0.9894 < float(steps["H100", "1"][0]) < 2 * 53 / 0.9894


def test_what_does_not_fit_a_card_is_left_out(printed: list[str]) -> None:
    """16.9 GB of weights, 2 GB for each dense request, 24 GB."""
    _, requests, _ = (cells(part) for part in printed if part.startswith("|"))
    assert set(requests["RTX 4090", "16"]) == {"-"}
    assert "-" not in requests["RTX 4090", "1"]
    assert "-" not in requests["H200", "16"]


def test_the_page_shows_what_the_command_prints(printed: list[str]) -> None:
    names = tuple(f"| {name}" for name in ("card", *(card.name for card in CARDS)))
    (section,) = re.findall(r"^## What to expect$.*?(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    shown, expected = (
        [line for line in text.splitlines() if line.startswith(names)] for text in (section, "\n".join(printed))
    )
    assert shown == expected


def test_fused_operations_make_a_step_shorter(printed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--cards", "H100", "--batch", "1", "--fused"])
    for plain, fused in zip(printed, capsys.readouterr().out.split("\n\n"), strict=True):
        if "response" in plain.partition("\n")[0]:
            before, after = (cells(table)["H100", "1"] for table in (plain, fused))
            assert all(float(short) < float(long) for short, long in zip(after, before, strict=True))
            return
    pytest.fail("no table of steps")


def test_the_help_says_what_is_predicted_and_what_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        roofline.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for words in ("--check", "predict and measure the rows of decode.py on this machine", "(assumed)", "H200"):
        assert words in " ".join(text.split())


def test_costs_are_found_from_two_passes() -> None:
    """Times that were made from known costs."""
    known, gap = Cost(2e-11, 1.5e-10), 7e-6

    def timed(work: Work) -> tuple[list[Work], float]:
        return [work], work.flops * known.flop + work.bytes * known.byte + work.launches * gap

    few, many = timed(Work(PRODUCTS, 1e9, 2e8, 28)), timed(Work(PRODUCTS, 3e11, 3e8, 28))
    found = rates._costs(few, many, gap)
    assert found.flop == pytest.approx(known.flop)
    assert found.byte == pytest.approx(known.byte)


def test_a_cost_that_would_be_negative_is_none() -> None:
    slow, fast = ([Work(PRODUCTS, 1e9, 2e8, 0)], 5.0), ([Work(PRODUCTS, 3e11, 3e8, 0)], 1.0)
    assert rates._costs(slow, fast, 0.0) == Cost(0.0, 1.0 / 3e8)
    instant, long = ([Work(PRODUCTS, 1e9, 2e8, 0)], 1e-9), ([Work(PRODUCTS, 3e11, 3e8, 0)], 1.0)
    assert rates._costs(instant, long, 0.0) == Cost(1.0 / 3e11, 0.0)


def test_measurements_are_averaged_as_times() -> None:
    machines = [
        Machine("this", dict.fromkeys(KINDS, Cost(flop, byte)), overlaps=False, gap=gap)
        for flop, byte, gap in ((1.0, 2.0, 3.0), (3.0, 4.0, 5.0))
    ]
    found = rates.mean(machines)
    assert (found.costs[ELEMENTWISE], found.gap) == (Cost(2.0, 3.0), 4.0)


def test_this_machine_has_a_rate_for_each_kind_of_work(engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "MANY", 256)
    said: list[None] = []
    machine = rates.measure_rates(
        Bench(engine("tiny-llada-v").config, torch.float32, time.process_time), lambda: said.append(None)
    )
    assert len(said) == rates.MEASUREMENTS
    assert set(machine.costs) == set(KINDS)
    assert machine.gap > 0
    for cost in machine.costs.values():
        assert cost.flop >= 0
        assert cost.byte >= 0
        assert cost.flop + cost.byte > 0
    assert "GFLOP/s" in rates.described(machine)


def row(ratio: float) -> dict[str, Any]:
    return {
        "cache": "none", "setting": "dense", "measured_s": 1.0, "predicted_s": ratio, "ratio": ratio,
        "flops_ratio": 1.0, "by_kind_s": dict.fromkeys(KINDS, 0.1),
    }  # fmt: skip


@pytest.mark.parametrize(("ratio", "good"), [(0.74, False), (0.76, True), (1.0, True), (1.24, True), (1.26, False)])
def test_a_row_may_be_a_quarter_off(ratio: float, good: bool) -> None:
    results = {
        "machine": {"device": "cpu", "threads": 1, "clock": "wall"},
        "rates": ["", ""],
        "rows": [row(1.0), row(ratio)],
    }
    assert within_tolerance(row(ratio)) is good
    assert status(results) == int(not good)
    assert f"{1 + good} of 2 rows within 25%" in check_report(results)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--family", "lavida"], "only LLaDA-V"),
        (["--policies", "late"], "dense or with redvtp"),
        (["--thresholds", "1"], "fixed number of steps"),
        (["--cache", "prefix_lm"], "only these caches are predicted: none, prefix, dual"),
        (["--device", "cuda"], "measured on a CPU only"),
    ],
)
def test_rows_that_are_not_predicted_are_refused(flags: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        roofline.main(["--check", *TINY, *flags])


@pytest.mark.slow
def test_a_check_compares_every_row_of_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At a size where calls are everything, so ratios may be anything."""
    file = tmp_path / "results.json"
    returned = roofline.main(["--check", *TINY, "--workdir", str(tmp_path), "--json", str(file)])
    results = json.loads(file.read_text())
    assert [(row["cache"], row["setting"]) for row in results["rows"]] == [
        (cache, setting) for cache in ("none", "prefix", "dual") for setting in ("dense", "redvtp 25%")
    ]
    for row in results["rows"]:
        assert row["flops_ratio"] == 1
        assert row["ratio"] == row["predicted_s"] / row["measured_s"] > 0
    assert returned == status(results)
    assert "predicted / measured" in capsys.readouterr().out
