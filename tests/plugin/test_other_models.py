"""Models that are not ours are served as if the plugin were not installed."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.platforms import current_platform

import vllm_redvtp
from plugin.command_line import facts_of_fresh_processes, write_llama
from vllm_redvtp.patches import install_request_check

OPTION = "--plugin"


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return facts_of_fresh_processes(write_llama(tmp_path_factory.mktemp("llama")))


@pytest.mark.slow
def test_whole_engine_config_is_what_it_is_without_the_plugin(facts: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Scheduler, worker, block size, prefix caching, default temperature and everything else."""
    installed, absent = facts
    assert installed["config"] == absent["config"]
    assert installed["default_sampling"] == absent["default_sampling"]


@pytest.mark.slow
def test_only_the_option_is_new(facts: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Fails, too, when vLLM gets a --plugin of its own and `install_plugin_option` may go."""
    installed, absent = facts
    assert set(installed["options"]) - set(absent["options"]) == {OPTION}
    assert not absent["modules"], "an allow-list without redvtp keeps it out"


@pytest.mark.slow
def test_registration_imports_no_model_and_no_engine(facts: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """Families bring the geometry of their vision paths with them; the modules with weights come later."""
    installed, _ = facts
    modules = set(installed["modules"])
    rooms = {".".join(module.split(".")[:2]) for module in modules}
    assert rooms <= {
        "redvtp",
        "redvtp.errors",
        "redvtp.families",
        "redvtp.prompt",
        "redvtp.values",
        "redvtp.vision",
        "vllm_redvtp",
        "vllm_redvtp.engine_config",
        "vllm_redvtp.hook",
        "vllm_redvtp.patches",
    }
    assert not modules & {"redvtp.vision.encoder", "redvtp.vision.tower"}


def test_registering_again_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    vllm_redvtp.register()
    add_cli_args, hooks = EngineArgs.add_cli_args, dict(MODELS_CONFIG_MAP)
    monkeypatch.setattr(vllm_redvtp, "_registered", False)
    vllm_redvtp.register()
    assert EngineArgs.add_cli_args is add_cli_args
    assert hooks == MODELS_CONFIG_MAP


def test_request_check_is_installed_once() -> None:
    install_request_check()
    validate = type(current_platform).validate_request
    install_request_check()
    assert type(current_platform).validate_request == validate


def test_prompts_without_our_check_pass() -> None:
    install_request_check()
    current_platform.validate_request(
        {"type": "token", "prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=10**6, logprobs=5)
    )
