"""Serves a checkpoint with `vllm serve --plugin redvtp`, asks it about a photo over the OpenAI API, and stops it again.

`scripts/demo.sh` makes the environment and runs this. The default checkpoint is the small one of the test data: its
weights are random, so its answer means nothing, but all else, from the HTTP request to the freed KV blocks, is real.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "tests" / "golden" / "ckpt" / "tiny-llada-v"
PHOTO = ROOT / "examples" / "images" / "coffee.jpg"


def main() -> int:
    arguments = parse_arguments()
    for path in (arguments.model, arguments.image):
        if not path.exists():
            sys.exit(f"demo: there is no {path}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "server.log"
    heatmap = arguments.output / "heatmap.png"
    port = arguments.port or free_port()
    with server(arguments.model, port, log) as process:
        wait_until_healthy(process, port, log, arguments.timeout)
        print(f"asking about {shown(arguments.image)}: {arguments.prompt}")
        client = [sys.executable, str(ROOT / "examples" / "chat_with_image.py"), str(arguments.image)]
        client += ["--base-url", f"http://127.0.0.1:{port}/v1", "--prompt", arguments.prompt]
        client += ["--keep-ratio", str(arguments.keep_ratio), "--heatmap", shown(heatmap)]
        # A proxy in the environment has no business between two processes of this machine.
        status = subprocess.run(client, check=False, env=os.environ | {"NO_PROXY": "127.0.0.1"}).returncode
    if status:
        sys.exit(f"demo: the request failed; the server's log is {shown(log)}")
    if arguments.model == MODEL:
        print("(this checkpoint has random weights: the words mean nothing, the numbers are real)")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=MODEL, help="LLaDA-V folder (default: the tests' tiny checkpoint)"
    )
    parser.add_argument("--image", type=Path, default=PHOTO, help="default: examples/images/coffee.jpg")
    parser.add_argument("--prompt", default="What stands on the table?", help="default: %(default)s")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="visual tokens kept (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="for the log and the heat map")
    parser.add_argument("--port", type=int, help="default: a free one")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds to wait for the server (default: %(default)s)"
    )
    return parser.parse_args()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(model: Path, port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running `vllm serve`; it and its children are gone afterwards, however the block is left."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--plugin", "redvtp"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    # The demo needs nothing from the network, and reports nothing to it.
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    print("starting: vllm " + " ".join(["serve", shown(model), *command[3:]]))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    # A terminated demo (kill, a CI time-out) must not leave the server behind either.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("demo: terminated"))
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        print("the server does not stop by itself: killing it")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_until_healthy(process: subprocess.Popen[bytes], port: int, log: Path, timeout: float) -> None:
    started = time.monotonic()
    said = 0
    while (waited := time.monotonic() - started) < timeout:
        if process.poll() is not None:
            finish_line()
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            sys.exit(f"{tail}\ndemo: the server stopped (exit {process.returncode}); its whole log is {shown(log)}")
        if healthy(port):
            finish_line()
            print(f"the server is ready after {waited:.0f} s")
            return
        if sys.stdout.isatty():
            print(f"\rwaiting for the server, {waited:.0f} s (about 30 s; log: {shown(log)}) ", end="", flush=True)
        elif waited >= said:
            print(f"waiting for the server, {waited:.0f} s (log: {shown(log)})", flush=True)
            said += 10
        time.sleep(0.5)
    finish_line()
    sys.exit(f"demo: the server was not ready after {timeout:.0f} s; see {shown(log)}, or wait longer with --timeout")


def healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def finish_line() -> None:
    if sys.stdout.isatty():
        print()


def shown(path: Path) -> str:
    """The path as a person in the present folder would type it."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)


if __name__ == "__main__":
    sys.exit(main())
