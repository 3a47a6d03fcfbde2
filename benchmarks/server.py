"""A `vllm serve` for a benchmark: started here or found running, its memory, its log and its metrics.

with started_server(model, log, ["--dtype", "float32"]) as server:
    print(server.url, server.metrics()["vllm:num_requests_running"])
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

HOST = "127.0.0.1"
# A server that dies is noticed at once; a busy machine takes minutes to start one.
START_SECONDS = 900
TAIL_LINES = 40


class ServerGone(Exception):
    """It did not come up, or ended while requests were sent."""


@dataclass(frozen=True)
class Server:
    """A server that answers at `url`.

    pid, log: None for a server that was not started here, unless the user names them.
    process: None for a server that was not started here.
    """

    url: str
    pid: int | None = None
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def check_alive(self) -> None:
        """Raises ServerGone, with the end of the log, if it has ended."""
        if self.process is not None and self.process.poll() is not None:
            raise ServerGone(f"the server ended with status {self.process.returncode}\n{self.tail()}")

    def tail(self) -> str:
        """The end of the log."""
        return "" if self.log is None else "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def rss(self) -> int | None:
        """Bytes held by the server and all its children."""
        if self.pid is None:
            return None
        resident = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    resident += process.memory_info().rss
        return resident

    def tracebacks(self) -> int | None:
        return None if self.log is None else self.log.read_text(errors="replace").count("Traceback")

    def metrics(self) -> Mapping[str, float]:
        """Counters and gauges, see `metric_values`."""
        return metric_values(httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text)

    def metric(self, name: str) -> float:
        """Raises ServerGone if the server does not export it."""
        values = self.metrics()
        if name not in values:
            raise ServerGone(f"the server exports no {name}")
        return values[name]

    def busy(self) -> float:
        """Requests running or waiting."""
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")


def metric_values(text: str) -> Mapping[str, float]:
    """The samples of a /metrics page, summed over their labels."""
    values: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] += sample.value
    return values


@contextlib.contextmanager
def started_server(model: str | Path, log: Path, flags: Sequence[str], **environment: str) -> Iterator[Server]:
    """`vllm serve MODEL --plugin redvtp FLAGS` on a free port. It and all its children are gone afterwards."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--plugin", "redvtp"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port), *flags],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | environment,
            start_new_session=True,
        )
    server = Server(f"http://{HOST}:{port}", process.pid, log, process)
    try:
        _wait_until_healthy(server)
        yield server
    finally:
        _stop(process)


def _wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        server.check_alive()
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=60, trust_env=False).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise ServerGone(f"no /health after {START_SECONDS} s\n{server.tail()}")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: engine and workers outlive a server that was killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
