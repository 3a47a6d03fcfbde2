"""Version 2's training: the loss falls, resuming changes nothing, what is exported is what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from training.v2.batches import prompt_pieces
from training.v2.draw import render
from training.v2.evaluate import decode, evaluate, held_out, load_average, prompt_embeddings
from training.v2.export import export
from training.v2.plan import PLAN, Phase
from training.v2.questions import TASKS, Question, steps_for
from training.v2.taskset import write_tasks
from training.v2.train import Trainer, train
from training.v2.vocab import tokenizer
from training.v2.world import Family, Sample

pytestmark = pytest.mark.slow

# Every family, so that every hint and both kinds of prompt are trained.
MICRO = (
    Phase("tower", "tower", steps=3, batch=4, warmup=0),
    Phase("words", "language", steps=4, batch=2, tokens=200, warmup=2),
    Phase("exact", "language", steps=2, batch=2, tokens=160, exact=True, decay=2),
)


class Stopped(Exception):
    """Stands for a kill."""


@contextmanager
def stop_after(updates: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Saves after so many updates and stops, as a training that is killed right after it saved."""
    learn: Callable[..., dict[str, float]] = Trainer.learn

    def learn_or_stop(self: Trainer, shards: object) -> dict[str, float]:
        if self.updates == updates:
            self.save()
            raise Stopped
        return learn(self, shards)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "learn", learn_or_stop)
        yield


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "state.pt", weights_only=True)
    averages = {f"average of {name}": value for name, value in state["average"].items()}
    return {**state["model"], **averages}


def _assert_same(folder: Path, other: Path) -> None:
    ours, theirs = _weights(folder), _weights(other)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training in one go. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, 3, threads=1, workers=0, plan=MICRO)
    return folder


@pytest.mark.parametrize("updates", [1, 3, 5, 8], ids=["tower", "phase-start", "language", "exact"])
def test_a_training_that_was_stopped_ends_with_the_same_weights(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    with stop_after(updates, monkeypatch), pytest.raises(Stopped):
        train(tmp_path, 3, workers=0, plan=MICRO)
    train(tmp_path, 3, workers=0, plan=MICRO)
    _assert_same(whole, tmp_path)


def test_threads_and_workers_change_no_weight(whole: Path, tmp_path: Path) -> None:
    train(tmp_path, 3, threads=2, workers=1, plan=MICRO)
    _assert_same(whole, tmp_path)


def test_another_seed_gives_other_weights(tmp_path: Path) -> None:
    plan = MICRO[:1]
    train(tmp_path / "three", 3, workers=0, plan=plan)
    train(tmp_path / "four", 4, workers=0, plan=plan)
    name = "projector.0.weight"
    assert not torch.equal(_weights(tmp_path / "three")[name], _weights(tmp_path / "four")[name])


def test_a_state_of_another_plan_is_refused(tmp_path: Path) -> None:
    """One pass, one plan: weights that saw two curricula have no command that makes them."""
    train(tmp_path, 3, workers=0, plan=MICRO[:1])
    with pytest.raises(ValueError, match="another plan"):
        train(tmp_path, 3, workers=0, plan=MICRO[1:])


def test_a_finished_training_stays_as_it_is(tmp_path: Path) -> None:
    train(tmp_path, 3, workers=0, plan=MICRO[:1])
    before = _weights(tmp_path)
    train(tmp_path, 3, workers=0, plan=MICRO[:1])
    after = _weights(tmp_path)
    assert all(torch.equal(before[name], after[name]) for name in before)


def _losses(monkeypatch: pytest.MonkeyPatch, key: str) -> list[float]:
    noted: list[float] = []
    learn: Callable[..., dict[str, float]] = Trainer.learn

    def learn_and_note(self: Trainer, shards: object) -> dict[str, float]:
        report = learn(self, shards)
        if key in report:
            noted.append(report[key])
        return report

    monkeypatch.setattr(Trainer, "learn", learn_and_note)
    return noted


def test_the_tower_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = _losses(monkeypatch, "total")
    train(tmp_path, 3, plan=(Phase("tower", "tower", steps=30, batch=2, warmup=5),))
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_a_minute_of_training_lowers_the_loss_and_survives_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole training in small: the tower, then answers, stopped once on the way."""
    plan = (
        Phase("tower", "tower", steps=60, batch=2, decay=30),
        Phase("words", "language", steps=24, batch=2, tokens=180, warmup=5),
    )
    losses = _losses(monkeypatch, "loss")
    with stop_after(72, monkeypatch), pytest.raises(Stopped):
        train(tmp_path, 3, plan=plan)
    train(tmp_path, 3, plan=plan)
    assert len(losses) == 24
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def _one_of_each_family() -> list[tuple[Sample, Question]]:
    """A short question of every family, and one that takes two blocks of the canvas."""
    picked: dict[Family | int, tuple[Sample, Question]] = {}
    for sample, question in held_out(2):
        if question.canvas in (4, 64):
            picked.setdefault(sample.family if question.canvas == 4 else 64, (sample, question))
    return list(picked.values())


def test_the_engine_answers_as_the_trained_model_does(whole: Path, tmp_path: Path) -> None:
    """Both greedy and dense; the checkpoint's float16 weights in float32. One picture, two pictures, and clips."""
    parameters = export(whole, tmp_path)
    assert 4_000_000 <= parameters <= 10_000_000
    assert (tmp_path / "model.safetensors").stat().st_size <= 25_000_000

    model = load_average(whole).half().float()
    engine = LocalEngine(tmp_path, dtype="float32", device="cpu")
    asked = _one_of_each_family()
    requests = []
    for sample, question in asked:
        params = DenoisingParams(gen_length=question.canvas, steps=steps_for(question.canvas))
        prompt = chat_prompt(engine.tokenizer, question.text, len(sample.scenes))
        images = tuple(Image.fromarray(render(scene)) for scene in sample.scenes)
        requests.append(Request(prompt, images, params, PruningParams(preset="none")))
    for (sample, question), generation in zip(asked, engine.generate(requests), strict=True):
        (tokens,) = decode(model, [prompt_embeddings(model, sample, question)], [question.canvas])
        assert generation.text == tokenizer().decode(tokens, skip_special_tokens=True), question.text


def test_the_engine_sees_the_visual_tokens_the_model_was_trained_on(whole: Path, tmp_path: Path) -> None:
    export(whole, tmp_path)
    model = load_average(whole).half().float()
    engine = LocalEngine(tmp_path, dtype="float32", device="cpu")
    for sample, question in _one_of_each_family():
        ours = prompt_embeddings(model, sample, question)
        images = [Image.fromarray(render(scene)) for scene in sample.scenes]
        request = Request(chat_prompt(engine.tokenizer, question.text, len(images)), tuple(images))
        prompt = engine.tokenize(request)
        before, after = prompt_pieces(question.text, len(images), True)
        assert prompt.ids[: len(before)] == before
        assert prompt.ids[len(prompt.ids) - len(after) :] == after
        with torch.inference_mode():
            visual = engine.images.encode(engine.config.vision.items(images))
            theirs = engine.model.embed_prompt(torch.tensor(prompt.ids), prompt.visual_spans, visual)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_task_files_hold_every_task(tmp_path: Path) -> None:
    written = write_tasks(tmp_path, 2, seed=5)
    lines = [json.loads(line) for line in (tmp_path / "tasks.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == written
    assert {line["task"] for line in lines} == set(TASKS)
    assert {line["group"] for line in lines} == {"short", "count", "list", "long", "json", "pair", "clip"}
    for line in lines:
        images = line["image"] if isinstance(line["image"], list) else [line["image"]]
        assert all((tmp_path / name).is_file() for name in images)
        assert line["answer"]


def test_an_evaluation_scores_each_task_and_group(whole: Path) -> None:
    examples = [(sample, question) for sample, question in held_out(1) if question.canvas <= 8]
    tasks, groups = evaluate(load_average(whole), examples)
    assert set(tasks) == {question.task for _, question in examples}
    assert set(groups) == {question.group for _, question in examples}
    assert all(0.0 <= score <= 1.0 for score in (*tasks.values(), *groups.values()))


def test_the_plan_helps_no_pruning() -> None:
    """The knobs of version 1 that did are gone: nothing is dropped, nothing penalised."""
    for phase in PLAN:
        assert not {"background", "whole", "frugality", "partial"} & set(phase.__slots__)
