"""Fixtures every test may use: engines over the tiny checkpoints, loaded once a session, in float32.

`engine("tiny-llada-v")` gives the engine of that checkpoint; further keywords (config_overrides, ...) make another.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings

from golden_data import checkpoint_dir
from redvtp.local import LocalEngine

EngineFactory = Callable[..., LocalEngine]

# On a busy machine a slow example is no finding.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # A second thread is of no use to models this small; where other processes want the core, it waits for them at every
    # matrix product: three times slower on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine() -> EngineFactory:
    """engine(checkpoint, **keywords of LocalEngine) -> LocalEngine, one for each distinct call."""
    made: dict[str, LocalEngine] = {}

    def make(checkpoint: str, **options: Any) -> LocalEngine:
        key = json.dumps([checkpoint, options], sort_keys=True)
        if key not in made:
            made[key] = LocalEngine(checkpoint_dir(checkpoint), **{"dtype": "float32", "device": "cpu", **options})
        return made[key]

    return make
