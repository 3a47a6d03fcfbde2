"""Hugging Face config classes made from the registry of families."""

from __future__ import annotations

import json
import pickle

import pytest

from golden_data import checkpoint_dir
from redvtp.families.config import load_config, read_config
from redvtp.families.registry import FAMILIES
from vllm_redvtp import engine_config
from vllm_redvtp.engine_config import CONFIG_CLASSES, DvlmHfConfig


def test_each_model_type_has_one() -> None:
    assert CONFIG_CLASSES.keys() == {family.model_type for family in FAMILIES}
    for model_type, config_class in CONFIG_CLASSES.items():
        assert config_class.model_type == model_type
        assert getattr(engine_config, config_class.__name__) is config_class


@pytest.mark.parametrize("checkpoint", ["tiny-llada-v", "tiny-lavida", "tiny-lavida-dream"])
def test_sizes_stand_under_their_usual_names_and_survive_pickle(checkpoint: str) -> None:
    folder = checkpoint_dir(checkpoint)
    raw = json.loads((folder / "config.json").read_text())
    config = pickle.loads(pickle.dumps(CONFIG_CLASSES[raw["model_type"]](**raw)))
    assert isinstance(config, DvlmHfConfig)
    ours = load_config(folder)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        assert getattr(config, name) == getattr(ours, name), name
    assert read_config(config.to_dict(), folder).hidden_size == ours.hidden_size
