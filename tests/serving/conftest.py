"""One `vllm serve` for each configuration, started when the first test asks for it and stopped with the session."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import openai
import pytest

from golden_data import checkpoint_dir
from serving.chat import CHECKPOINT, SERVER_DEFAULTS
from serving.server import Server, running_server, tail


@pytest.fixture(scope="session", autouse=True)
def _servers_end_with_a_terminated_run() -> Iterator[None]:
    """A CI time-out sends SIGTERM, and Python would die without its clean-up."""
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", 143))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def _plugin_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("plugin-server") / "server.log"
    with running_server(log, checkpoint_dir(CHECKPOINT), "--plugin", "redvtp", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="session")
def _defaults_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("defaults-server") / "server.log"
    defaults = json.dumps({"redvtp": SERVER_DEFAULTS})
    # Without --plugin: installing the package is enough.
    with running_server(
        log, checkpoint_dir(CHECKPOINT), "--dtype", "float32", "--additional-config", defaults
    ) as server:
        yield server


@pytest.fixture
def server(_plugin_server: Server) -> Iterator[Server]:
    """`vllm serve tiny-llada-v --plugin redvtp`."""
    yield from _watched(_plugin_server)


@pytest.fixture
def defaults_server(_defaults_server: Server) -> Iterator[Server]:
    """`vllm serve tiny-llada-v`, with `SERVER_DEFAULTS` as the knobs' defaults."""
    yield from _watched(_defaults_server)


def _watched(server: Server) -> Iterator[Server]:
    """The server, which must come through the test alive, idle, without a traceback and with all its KV blocks."""
    before = server.log.stat().st_size
    yield server
    assert server.process.poll() is None, f"the server is gone\n{tail(server.log)}"
    said = server.log.read_bytes()[before:].decode(errors="replace")
    assert "Traceback" not in said, said
    server.wait_until_idle()
    assert server.metric("vllm:kv_cache_usage_perc") == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


@pytest.fixture
def model(_plugin_server: Server) -> str:
    return _plugin_server.model()
