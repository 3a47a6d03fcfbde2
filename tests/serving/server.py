"""A real `vllm serve` for tests, started on a free port and gone with all its children afterwards.

`running_server(log, MODEL, "--plugin", "redvtp")` yields a `Server` once it answers /health; `Server.client()` talks to
it and `Server.metric(name)` reads a number it exports. `run_to_exit` is for command lines that must not come up. What
goes wrong fails with the end of the server's log.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai

from devices import vllm_flags

HOST = "127.0.0.1"
# Half a minute on two idle cores, minutes on busy ones; a server that dies is noticed at once.
START_SECONDS = 900
# A hang is noticed late; an answer on a machine that stands still for a while is no hang.
REQUEST_SECONDS = 300
TAIL_LINES = 60


@dataclass(frozen=True)
class Server:
    """A server that has answered /health."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def client(self) -> openai.OpenAI:
        # Proxies of the environment have no business here, and a retry would hide an HTTP 500.
        return openai.OpenAI(
            base_url=f"http://{HOST}:{self.port}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_SECONDS,
            http_client=openai.DefaultHttpxClient(trust_env=False),
        )

    def model(self) -> str:
        with self.client() as client:
            return client.models.list().data[0].id

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Status and answer to a body no client library would send."""
        return _request(self.port, "POST", path, body)

    def metric(self, name: str, label: str = "") -> float:
        """A gauge or counter of /metrics, summed over its labels, or over those with `label` (`reason="abort"`)."""
        text = self.metrics()
        series = re.findall(rf"^{re.escape(name)}{{([^}}]*)}} (\S+)$", text, re.MULTILINE)
        assert series, f"vLLM exports no {name}"
        return sum(float(value) for labels, value in series if label in labels)

    def metrics(self) -> str:
        """The whole of /metrics."""
        status, text = _request(self.port, "GET", "/metrics")
        assert status == 200
        return text

    def wait_until_idle(self, seconds: float = REQUEST_SECONDS) -> None:
        """Until no request is running or waiting; vLLM counts a finished one out shortly after its last token."""
        deadline = time.monotonic() + seconds
        while self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, f"still busy after {seconds} s\n{tail(self.log)}"
            time.sleep(0.1)


@contextlib.contextmanager
def running_server(log: Path, *arguments: str | Path) -> Iterator[Server]:
    """`vllm serve *arguments`, healthy. The first one is the model."""
    port = _free_port()
    model, *flags = arguments
    flags = [model, *vllm_flags(), *flags, "--host", HOST, "--port", str(port)]
    with _started(log, "serve", *flags) as process:
        server = Server(process, port, log)
        deadline = time.monotonic() + START_SECONDS
        while not _healthy(port):
            status = process.poll()
            assert status is None, f"the server exited with {status}\n{tail(log)}"
            assert time.monotonic() < deadline, f"no /health after {START_SECONDS} s\n{tail(log)}"
            time.sleep(0.3)
        yield server


def run_to_exit(log: Path, *arguments: str | Path, seconds: float) -> tuple[int, str]:
    """`vllm *arguments` until it ends by itself; exit status and all it said."""
    with _started(log, *arguments) as process:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{tail(log)}") from None
    return status, log.read_text(errors="replace")


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])


@contextlib.contextmanager
def _started(log: Path, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """The `vllm` command in a process group of its own, which is gone however the block is left."""
    command = [str(Path(sys.executable).with_name("vllm")), *map(str, arguments)]
    # An allow-list of plugins in the developer's shell would decide the outcome.
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "NO_PROXY": HOST, "no_proxy": HOST}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: engine and workers outlive a server that was killed."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    """Below those the kernel deals out: it would give one of them away again before the server has bound it.

    Drawn by the system: engines in this process seed `random`, and test processes side by side would draw one sequence
    of ports. Two servers on one port share its connections.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def _healthy(port: int) -> bool:
    try:
        return _request(port, "GET", "/health")[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_SECONDS)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()
