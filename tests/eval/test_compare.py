"""`redvtp compare`: a row and a picture for every policy, keep ratio and cache, as `redvtp generate` has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageChops

from eval.task_files import FLAGS, MODEL, in_process
from golden_data import Case
from redvtp.cli.flags import COMPARED
from redvtp.evaluation.comparison import agreement
from redvtp.evaluation.sheet import WIDTH, Panel, sheet
from redvtp.params import PRESETS

pytestmark = pytest.mark.slow

IMAGE = Case("tiny-llada-v", "wide").image_files[0]
ASKED = ("--image", IMAGE, "--prompt", "Which?", "--gen-length", "16", "--steps", "8", *FLAGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def cells(made: Path) -> list[dict[str, Any]]:
    """All policies there are, at two ratios, with and without cache."""
    from redvtp.cli.main import main

    files = ("--output", str(made / "kept.png"), "--json", str(made / "compared.json"))
    flags = ("--keep", "1.0,0.5,0.25", "--cache", "none,prefix", "--repeats", "2", *files)
    assert main(["compare", str(MODEL), *map(str, ASKED), *flags]) == 0
    found: list[dict[str, Any]] = json.loads((made / "compared.json").read_text())["cells"]
    return found


def test_every_policy_is_there_in_every_cache_mode_behind_dense(cells: list[dict[str, Any]]) -> None:
    for cache in ("none", "prefix"):
        names = [cell["policy"] for cell in cells if cell["cache"] == cache]
        assert names[0] == "none"
        assert list(dict.fromkeys(names)) == ["none", *COMPARED]
    assert {cell["cache"] for cell in cells} == {"none", "prefix"}


def test_numbers_are_held_against_the_first_row(cells: list[dict[str, Any]]) -> None:
    dense = cells[0]
    assert (dense["ratio"], dense["agreement"]) == (1, 1)
    for cell in cells:
        assert len(cell["latencies_s"]) == 2
        assert cell["ratio"] == pytest.approx(dense["latency_s"] / cell["latency_s"])
        assert cell["agreement"] == agreement(cell["output_ids"], dense["output_ids"])
        assert cell["steps"] == 8


def test_a_row_is_what_generate_answers(
    cells: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = ("--pruning", "redvtp", "--keep-ratio", "0.25", "--cache", "prefix", "--trace", tmp_path / "trace.json")
    assert in_process(capsys, "generate", MODEL, *ASKED, *knobs)[0] == 0
    trace = json.loads((tmp_path / "trace.json").read_text())
    (cell,) = [c for c in cells if (c["policy"], c["keep_ratio"], c["cache"]) == ("redvtp", 0.25, "prefix")]
    assert cell["output_ids"] == trace["output_ids"]
    assert [pruning["kept"] for pruning in cell["prunings"]] == [pruning["kept"] for pruning in trace["prunings"]]
    assert cell["visual_tokens_kept"] == len(trace["prunings"][-1]["kept"])
    first, last = trace["steps"][0], trace["steps"][-1]
    assert cell["kv_blocks"] == [first["kv_blocks"] + first["blocks_freed"], last["kv_blocks"]]


def test_picture_has_the_heat_map_of_each_pruned_row(
    cells: list[dict[str, Any]], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heatmap = tmp_path / "one.png"
    knobs = ("--pruning", "redvtp", "--keep-ratio", "0.5", "--heatmap", heatmap)
    assert in_process(capsys, "generate", MODEL, *ASKED, *knobs)[0] == 0
    with Image.open(made / "kept.png") as whole, Image.open(heatmap) as one:
        expected = sheet([[None, Panel(one, ("", ""))]])
        # Behind the dense picture, in the first row; the labels lie above it.
        left, height = 2 * 10 + WIDTH, round(one.height * WIDTH / one.width)
        box = (left, expected.height - 10 - height, left + WIDTH, expected.height - 10)
        assert ImageChops.difference(whole.crop(box), expected.crop(box)).getbbox() is None
        assert len({whole.crop(box).tobytes(), whole.crop((10, box[1], 10 + WIDTH, box[3])).tobytes()}) == 2


def test_table_says_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("compare", MODEL, *ASKED, "--policies", "uniform", "--keep", "0.5", "--repeats", "1")
    status, out, _ = in_process(capsys, *arguments)
    assert status == 0
    head, _, dense, uniform, *_ = out.splitlines()
    for word in ("tokens kept", "steps", "latency s", "ratio", "agreement", "KV blocks", "answer"):
        assert word in head
    assert dense.startswith("| dense ")
    assert uniform.startswith("| uniform |  50% |")


def test_policies_with_a_budget_of_their_own_are_asked_once(cells: list[dict[str, Any]]) -> None:
    for policy in ("zipvl", "layer-skip"):
        found = [(cell["keep_ratio"], cell["cache"]) for cell in cells if cell["policy"] == policy]
        assert found == [(None, "none"), (None, "prefix")]


@pytest.mark.parametrize(("answer", "share"), [([1, 2, 3], 1), ([1, 9, 3], 2 / 3), ([1], 1 / 3), ([1, 2, 3, 4], 0.75)])
def test_agreement_counts_places_of_the_longer_answer(answer: list[int], share: float) -> None:
    assert agreement(answer, [1, 2, 3]) == pytest.approx(share)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "Hi"), "there is nothing to prune in a request without an image; pass --image FILE"),
        (("--image", IMAGE), "no question was given; pass --prompt TEXT"),
        ((*ASKED, "--policies", "external"), "external needs scores that come with a request"),
        ((*ASKED, "--policies", "best"), "--policies must be one of"),
        ((*ASKED, "--keep", "2"), "--keep must be a number in (0, 1], got 2.0"),
        ((*ASKED, "--repeats", "0"), "--repeats must be an integer >= 1, got 0"),
        ((*ASKED, "--output", "kept.txt"), "does not end like an image file"),
        ((*ASKED, "--gen-length", "5000", "--steps", "5000"), "exceeds --max-model-len"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    flags: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = in_process(capsys, "compare", MODEL, *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_all_policies_are_compared_unless_said_otherwise() -> None:
    assert set(PRESETS) - set(COMPARED) <= {"none", "external"}
