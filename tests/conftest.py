"""What every test may use, and how tests are chosen and spread.

`engine("tiny-llada-v")` gives the engine of that checkpoint, loaded once a session, in float32; further keywords
(config_overrides, ...) make another. It is on the CPU, or where REDVTP_TEST_DEVICE says (`devices`).

`pytest -m "not slow"` is the quick loop. With `-n 2 --dist loadfile --no-loadscope-reorder` two processes share the
files of tests between them; files that share a server stay together.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from devices import DEVICE
from golden_data import checkpoint_dir
from redvtp.local import LocalEngine

# Files of tests/serving that start servers of their own; the others use those of its conftest.
OWN_SERVERS = ("test_lavida.py", "test_parallel.py", "test_startup.py", "test_tiny_dvlm.py")

EngineFactory = Callable[..., LocalEngine]

# On a busy machine a slow example is no finding.
settings.register_profile("patient", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=10)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("quick" if "not slow" in config.option.markexpr else "patient")


class _ByServer(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """A file goes to one process, and so do all files that share a server: it would be started in each."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        shares = file.startswith("tests/serving/") and not file.endswith(OWN_SERVERS)
        return "tests/serving" if shares else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByServer | None:
    return _ByServer(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.get_closest_marker("serving"):
        item.add_marker("slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Side by side, files with long tests first, so that a long one is not the last."""
    if getattr(config, "workerinput", None) is not None:
        long = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish() -> None:
    # vLLM collects garbage whenever an engine starts or ends; thousands of collected tests need not be gone through.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # A second thread is of no use to models this small; where other processes want the core, it waits for them at every
    # matrix product: three times slower on a busy machine.
    torch.set_num_threads(1)
    # The same for commands that tests start. vLLM's workers choose for themselves.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def engine() -> EngineFactory:
    """engine(checkpoint, **keywords of LocalEngine) -> LocalEngine, one for each distinct call."""
    made: dict[str, LocalEngine] = {}

    def make(checkpoint: str, **options: Any) -> LocalEngine:
        key = json.dumps([checkpoint, options], sort_keys=True)
        if key not in made:
            made[key] = LocalEngine(checkpoint_dir(checkpoint), **{"dtype": "float32", "device": DEVICE, **options})
        return made[key]

    return make
