"""Int8 checkpoints through vLLM's quantised linears: every scale arrives where it belongs, and answers stay close."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM

from golden_data import Run, checkpoint_dir, runs
from plugin.conftest import LlmFactory, in_process_llm
from plugin.quantised import Scheme, quantise
from plugin.requests import prompt_of, sampling_of
from redvtp.models.dvlm import Dvlm

pytestmark = pytest.mark.slow

Quantised = Callable[[str, Scheme], LLM]
SCHEMES = [Scheme(dynamic=True), Scheme(dynamic=False)]


# For the session: an engine that goes takes the parallel groups of all others in this process with it.
@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    made: dict[tuple[str, Scheme], LLM] = {}

    def make(checkpoint: str, scheme: Scheme) -> LLM:
        if (checkpoint, scheme) not in made:
            folder = tmp_path_factory.mktemp("quantised") / checkpoint
            made[checkpoint, scheme] = in_process_llm(str(quantise(checkpoint_dir(checkpoint), folder, scheme)))
        return made[checkpoint, scheme]

    return make


def _model(llm: LLM) -> Dvlm:
    executor: Any = llm.llm_engine.model_executor
    model: Dvlm = executor.driver_worker.worker.model_runner.model
    return model


# LaViDa's layers are called otherwise, in the checkpoint and in the scheme's list of what is ignored.
@pytest.mark.parametrize(
    ("checkpoint", "scheme"),
    [("tiny-llada-v", SCHEMES[0]), ("tiny-llada-v", SCHEMES[1]), ("tiny-lavida", SCHEMES[0])],
    ids=str,
)
def test_every_linear_computes_with_its_own_scales(
    checkpoint: str, scheme: Scheme, quantised: Quantised, llm_factory: LlmFactory
) -> None:
    layers = zip(
        _model(quantised(checkpoint, scheme)).language_model.layers,
        _model(llm_factory(checkpoint)).language_model.layers,
        strict=True,
    )
    compared = 0
    for index, (ours, floats) in enumerate(layers):
        for name, linear in floats.named_modules():
            if not isinstance(linear, torch.nn.Linear):
                continue
            rows = torch.randn(40, linear.in_features, generator=torch.Generator().manual_seed(compared)) * 2
            left_out = (index, name) == (3, "mlp.down_proj")
            expected = linear(rows) if left_out else scheme.apply(rows, linear.weight.detach())
            found = ours.get_submodule(name)(rows)
            # A value between two int8 steps may be rounded either way.
            error = (found - expected).norm() / expected.norm()
            assert error < 2e-3, name
            compared += 1
    assert compared == 7 * len(_model(llm_factory(checkpoint)).language_model.layers)


def _pruned_run() -> Run:
    return next(run for run in runs("redvtp", checkpoints=("tiny-llada-v",)) if run.case.name == "square")


def test_importance_and_kept_tokens_stay_close_to_float(quantised: Quantised, llm_factory: LlmFactory) -> None:
    prunings = []
    for llm in (llm_factory("tiny-llada-v"), quantised("tiny-llada-v", SCHEMES[0])):
        run = _pruned_run()
        (output,) = llm.generate([prompt_of(run.case)], [sampling_of(run, redvtp_report="full")])
        assert len(output.outputs[0].token_ids) == len(run.output)
        assert output.kv_transfer_params is not None
        (pruning,) = output.kv_transfer_params["redvtp"]["prunings"]
        prunings.append(pruning)
    floats, ours = prunings
    expected, found = torch.tensor(floats["importance"]), torch.tensor(ours["importance"])
    assert (found - expected).norm() / expected.norm() < 0.1
    kept = set(floats["kept"])
    assert len(kept & set(ours["kept"])) / len(kept) > 0.8


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    """Without a word it would be whatever was in memory."""
    folder = quantise(checkpoint_dir("tiny-llada-v"), tmp_path / "checkpoint", SCHEMES[0])
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    lost = "model.layers.1.mlp.up_proj.weight_scale"
    del tensors[lost]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=f"checkpoint lacks 1 tensor: {lost}"):
        in_process_llm(str(folder))
