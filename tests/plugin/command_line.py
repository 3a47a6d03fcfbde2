"""vLLM's own way from a command line to its config, and the same in a fresh process with or without the plugin.

Run as a script it prints what `stock_facts` returns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

PREFIX = "facts: "


@cache
def serve_parser() -> FlexibleArgumentParser:
    """The parser of `vllm serve`; building it loads the plugins."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser())  # type: ignore[no-untyped-call]


def engine_config(model: Path, *options: str) -> VllmConfig:
    """What `vllm serve MODEL *options` would start with."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    arguments = serve_parser().parse_args(["--model", str(model), *options])
    config: VllmConfig = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
    return config


def write_llama(folder: Path) -> Path:
    """config.json of a small model that is none of ours."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "torch_dtype": "float32",
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def facts_of_fresh_processes(model: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(with the plugin, without it): the whole engine config of `model`, the parser's options, our loaded modules."""
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment["HF_HUB_OFFLINE"] = "1"
    # An empty allow-list: no plugin is loaded.
    environments = (environment, environment | {"VLLM_PLUGINS": ""})
    processes = [
        # -P: this folder's requests.py is not the requests package.
        subprocess.Popen(
            [sys.executable, "-P", __file__, str(model)],
            env=each,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for each in environments
    ]
    found: list[dict[str, Any]] = []
    for process in processes:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        (line,) = (line for line in out.splitlines() if line.startswith(PREFIX))
        found.append(json.loads(line.removeprefix(PREFIX)))
    return found[0], found[1]


def _facts(model: Path) -> dict[str, Any]:
    config = engine_config(model, "--skip-tokenizer-init")
    return {
        # instance_id is drawn anew by each process.
        "config": {
            field.name: repr(getattr(config, field.name))
            for field in dataclasses.fields(config)
            if field.name != "instance_id"
        },
        "default_sampling": config.model_config.get_diff_sampling_param(),
        "options": sorted(serve_parser()._option_string_actions),
        "modules": sorted(name for name in sys.modules if name.split(".")[0] in ("redvtp", "vllm_redvtp")),
    }


if __name__ == "__main__":
    print(PREFIX + json.dumps(_facts(Path(sys.argv[1]))))
