"""Serves a model with `vllm serve --plugin redvtp`, asks it about pictures over the OpenAI API, and stops it again.

`scripts/demo.sh` makes the environment and runs this. Every question is sent twice, with all visual tokens and with
the best share of them. The default model is the small one in `examples/tiny_dvlm`; `--model path/to/LLaDA-V --image
photo.jpg --prompt "What is shown?"` asks another one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import openai
from PIL import Image

from redvtp.evaluation.server import data_url
from redvtp.evaluation.tasks import Task, read_tasks
from redvtp.families.config import load_config
from redvtp.heatmap import draw_saved
from redvtp.vision.images import open_image

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny_dvlm"
QUESTIONS = MODEL / "demo.jsonl"
PHOTO = ROOT / "examples" / "images" / "coffee.jpg"
# Pictures smaller than this are drawn larger, for the eye.
SHOWN_PIXELS = 640


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    text: without the space at its ends.
    report: RedVTP's, from the response.
    """

    text: str
    report: dict[str, Any]


def main() -> int:
    arguments = parse_arguments()
    for path in (arguments.model, arguments.image):
        if path is not None and not path.exists():
            sys.exit(f"demo: there is no {path}")
    try:
        questions = chosen_questions(arguments)
    except ValueError as error:
        sys.exit(f"demo: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "server.log"
    port = arguments.port or free_port()
    # Requests between two processes of this machine bypass proxies.
    os.environ["NO_PROXY"] = "127.0.0.1"
    with server(arguments.model, port, log) as process:
        wait_until_healthy(process, port, log, arguments.timeout)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=1800, max_retries=0)
        try:
            ask_all(client, questions, arguments)
        except openai.OpenAIError as error:
            sys.exit(f"demo: the request failed: {error}; the server's log is {shown(log)}")
    return 0


def chosen_questions(arguments: argparse.Namespace) -> Sequence[Task]:
    """The user's question, or those that come with the default model."""
    if arguments.image is None and arguments.prompt is None and arguments.model == MODEL:
        return read_tasks(QUESTIONS).tasks
    prompt = arguments.prompt or "What is shown?"
    return [Task(1, "1", "demo", None, prompt, (), (arguments.image or PHOTO,), arguments.gen_length)]


def ask_all(client: openai.OpenAI, questions: Sequence[Task], arguments: argparse.Namespace) -> None:
    model = client.models.list().data[0].id
    config = load_config(arguments.model)
    keep = arguments.keep_ratio
    right = {"dense": 0, "pruned": 0}
    freed = []
    for image, tasks in groupby(questions, key=lambda task: task.images[0]):
        with Image.open(image) as picture:
            print(f"\n{shown(image)} ({picture.width} x {picture.height})")
        for number, task in enumerate(tasks, 1):
            dense = ask(client, model, task, {"redvtp_pruning": "none"})
            pruned = ask(client, model, task, {"redvtp_keep_ratio": keep, "redvtp_report": "full"})
            report = pruned.report
            print(f"  {task.question}")
            print_answer("all visual tokens", dense, task)
            print_answer(f"best {keep:.0%} of them", pruned, task)
            print(
                f"    visual tokens {report['visual_tokens']} -> {report['visual_tokens_kept']}, KV blocks "
                f"{report['kv_blocks_admitted']} -> {report['kv_blocks_admitted'] - report['blocks_freed']}"
            )
            right["dense"] += dense.text in task.answers
            right["pruned"] += pruned.text in task.answers
            freed.append(report["blocks_freed"] / report["kv_blocks_admitted"])
            if report["prunings"]:
                heatmap = arguments.output / f"{image.stem}-{number}.png"
                enlarged(draw_saved([open_image(image)], config, report)).save(heatmap)
                print(f"    what it looked at: {shown(heatmap)}")
    print(f"\n{sum(freed) / len(freed):.0%} of the KV blocks went back to vLLM after the first denoising step.")
    if all(task.answers for task in questions):
        print(f"Right answers: {right['dense']} of {len(questions)} dense, {right['pruned']} with {keep:.0%} kept.")
    print("In the heat maps grey is what was dropped; from blue to red, what is left was looked at more.")


def ask(client: openai.OpenAI, model: str, task: Task, knobs: dict[str, Any]) -> Reply:
    content: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(path)}} for path in task.images]
    response = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": [*content, {"type": "text", "text": task.question}]}],
        max_tokens=task.gen_length,
        temperature=0,
        extra_body={"vllm_xargs": knobs},
    )
    fields = response.model_extra or {}
    # The answer's first word may come with the space that stands before it in a sentence.
    return Reply((response.choices[0].message.content or "").strip(), fields["kv_transfer_params"]["redvtp"])


def print_answer(how: str, reply: Reply, task: Task) -> None:
    mark = "" if not task.answers or reply.text in task.answers else f"   (wrong: it is {task.answers[0]})"
    first, *more = textwrap.wrap(f"{reply.text}{mark}", 90) or [""]
    print(f"    {how:18} {first}")
    for line in more:
        print(f"    {'':18} {line}")


def enlarged(picture: Image.Image) -> Image.Image:
    factor = max(1, SHOWN_PIXELS // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="model folder (default: examples/tiny_dvlm)")
    parser.add_argument("--image", type=Path, help="ask about this picture instead of those of the default model")
    parser.add_argument("--prompt", help="the question about --image (default: What is shown?)")
    parser.add_argument("--gen-length", type=int, default=32, help="canvas of that answer (default: %(default)s)")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="visual tokens kept (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="for the log and the heat maps")
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
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=2, trust_env=False).status_code == 200
    return False


def finish_line() -> None:
    if sys.stdout.isatty():
        print()


def shown(path: Path) -> str:
    """The path, relative to the present folder if it lies inside."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)


if __name__ == "__main__":
    sys.exit(main())
