"""The training of the tiny model: it learns, resuming changes nothing, what is exported is what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from redvtp.local import LocalEngine, Request
from redvtp.params import DenoisingParams, PruningParams
from redvtp.prompt import chat_prompt
from training import train as training
from training.evaluate import decode, held_out, prompt_embeddings
from training.export import export, load_average
from training.plan import PLAN, Phase
from training.scenes import render
from training.tasks import steps_for
from training.vocab import tokenizer

pytestmark = pytest.mark.slow

_FEW: dict[str, Any] = {"background": (0.0, 0.3), "items": (2, 4), "lines": (2, 3)}
SHORT_PLAN = (
    Phase("tower", "tower", steps=4, batch=1, warmup=0),
    Phase("words", "language", steps=4, batch=2, tokens=136, warmup=0, **_FEW),
)


@pytest.fixture(autouse=True)
def _short_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PLAN", SHORT_PLAN)
    # Each picture is asked about at the end of a phase otherwise, which takes longer than all the rest.
    monkeypatch.setattr(training, "_evaluate", lambda *_: None)


def _train(folder: Path, until: str | None = None) -> dict[str, torch.Tensor]:
    training.train(folder, seed=3, threads=2, workers=0, evaluate_seconds=0, until=until)
    weights: dict[str, torch.Tensor] = torch.load(folder / "state.pt", weights_only=True)["model"]
    return weights


def test_a_training_that_was_stopped_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _train(tmp_path / "whole")

    stopped = tmp_path / "stopped"
    _train(stopped, until="tower")
    # Killed in the middle of the second phase, just after it saved.
    learn, learned = training.Trainer.learn, 0

    def learn_and_die(self: training.Trainer, shards: Any) -> object:
        nonlocal learned
        if learned == 2:
            self.save()
            raise KeyboardInterrupt
        learned += 1
        return learn(self, shards)

    monkeypatch.setattr(training.Trainer, "learn", learn_and_die)
    with pytest.raises(KeyboardInterrupt):
        _train(stopped)
    monkeypatch.setattr(training.Trainer, "learn", learn)
    resumed = _train(stopped)

    assert resumed.keys() == whole.keys()
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


def test_the_tower_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PLAN", (Phase("tower", "tower", steps=30, batch=1, warmup=5),))
    totals: list[float] = []
    learn = training.Trainer.learn

    def learn_and_note(self: training.Trainer, shards: Any) -> dict[str, float]:
        report = learn(self, shards)
        totals.append(report["total"])
        return report

    monkeypatch.setattr(training.Trainer, "learn", learn_and_note)
    _train(tmp_path)
    assert sum(totals[-5:]) < 0.6 * sum(totals[:5])


def test_the_engine_answers_as_the_trained_model_does(tmp_path: Path) -> None:
    """Both greedy and dense; the checkpoint's float16 weights in float32."""
    _train(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "checkpoint")
    model = load_average(tmp_path / "run").half().float()
    engine = LocalEngine(tmp_path / "checkpoint", dtype="float32", device="cpu")
    asked = held_out(PLAN[-1], 2)
    requests = []
    for scene, question in asked:
        params = DenoisingParams(gen_length=question.canvas, steps=steps_for(question.canvas))
        prompt = chat_prompt(engine.tokenizer, question.text, 1)
        requests.append(Request(prompt, (Image.fromarray(render(scene)),), params, PruningParams(preset="none")))
    for (scene, question), generation in zip(asked, engine.generate(requests), strict=True):
        (tokens,) = decode(model, [prompt_embeddings(model, scene, question)], [question.canvas])
        assert generation.text == tokenizer().decode(tokens, skip_special_tokens=True), question.text
