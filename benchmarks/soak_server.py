"""The server of a soak: started here or found running, how much memory it holds, what its log and metrics say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

HOST = "127.0.0.1"
# A server that dies is noticed at once; a busy machine takes minutes to start one.
START_SECONDS = 600
PAGE = os.sysconf("SC_PAGE_SIZE")


class ServerGone(Exception):
    """It did not come up, or ended while requests were sent."""


@dataclass(frozen=True)
class Server:
    """pid and log: None where the server was started by somebody else, who did not say."""

    url: str
    pid: int | None = None
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def check_alive(self) -> None:
        if self.process is not None and self.process.poll() is not None:
            raise ServerGone(f"the server ended with status {self.process.returncode}")

    def rss(self) -> int | None:
        """Bytes held by the server and all its children."""
        return None if self.pid is None else sum(_resident(pid) for pid in _family(self.pid))

    def tracebacks(self) -> int | None:
        return None if self.log is None else self.log.read_text(errors="replace").count("Traceback")

    def metric(self, name: str) -> float:
        """A gauge of /metrics, summed over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text
        series = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        if not series:
            raise ServerGone(f"the server exports no {name}")
        return sum(map(float, series))

    def busy(self) -> float:
        return self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting")


@contextlib.contextmanager
def started_server(model: str, log: Path, arguments: list[str]) -> Iterator[Server]:
    """`vllm serve MODEL --plugin redvtp` on a free port, gone with all its children afterwards."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", model, "--plugin", "redvtp"]
    # float32: tokens do not depend on what else is in a batch. Tracebacks of refused requests, which vLLM's dev mode
    # would log, must not hide real ones.
    command += ["--dtype", "float32", "--no-log-error-stack", "--host", HOST, "--port", str(port), *arguments]
    # Dev mode has the endpoint for resetting caches.
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
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
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=60, trust_env=False).status_code == 200:
                return
        if time.monotonic() > deadline:
            raise ServerGone(f"no /health after {START_SECONDS} s")
        time.sleep(0.5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The whole group: engine and workers outlive a server that was killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)


def _family(pid: int) -> set[int]:
    """A process and all its descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name in parentheses may have spaces in it.
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    return 0
