"""Serves a model with `vllm serve --plugin redvtp`, asks it about pictures over the OpenAI API, and stops it again.

`scripts/demo.sh` makes the environment and runs this. Every question is sent twice, with all visual tokens and with
the best share of them. The default model is the small one in `examples/tiny_dvlm`; `--model path/to/LLaDA-V --image
photo.jpg --prompt "What is shown?"` asks another one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
# What a question of the small model means where its words do not say it.
MEANINGS = {
    "field_value": "the number behind that word in the form",
    "list_boxes": "color and digit of each",
    "list_shapes": "color and shape of each",
    "transcribe_form": "every word with its number",
    "transcribe_signs": "color and letters of each",
}
# What vLLM's logger puts before each line of a traceback.
LOG_PREFIX = re.compile(r"^\((?P<process>[\w-]+)[^)]*\)\s+(?:ERROR \S+ \S+ \[[^]]*\] ?)?")


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
            sys.exit(f"demo: the request failed: {error}\n{what_went_wrong(log)}")
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
    if arguments.model.resolve() == MODEL:
        print("The small model knows only pictures of boxes with digits, signs, shapes and forms, and set questions.")
        if arguments.image or arguments.prompt:
            print("It answers nonsense to all others; examples/tiny_dvlm/README.md lists the questions.")
    for image, tasks in itertools.groupby(questions, key=lambda task: task.images[0]):
        with Image.open(image) as picture:
            print(f"\n{shown(image)} ({picture.width} x {picture.height})")
        for number, task in enumerate(tasks, 1):
            dense = ask(client, model, task, {"redvtp_pruning": "none"})
            pruned = ask(client, model, task, {"redvtp_keep_ratio": keep, "redvtp_report": "full"})
            report = pruned.report
            meaning = f"   ({MEANINGS[task.name]})" if task.name in MEANINGS else ""
            print(f"  {task.question}{meaning}")
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
                draw_saved([open_image(image)], config, report, legend=True).save(heatmap)
                print(f"    what it looked at: {shown(heatmap)}")
    print(f"\n{sum(freed) / len(freed):.0%} of the KV blocks went back to vLLM after the first denoising step.")
    if all(task.answers for task in questions):
        print(f"Right answers: {right['dense']} of {len(questions)} dense, {right['pruned']} with {keep:.0%} kept.")


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
            how = f"demo: the server stopped after {waited:.0f} s (exit status {process.returncode})"
            sys.exit(f"{how}\n{what_went_wrong(log)}")
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
    how = f"demo: the server was not ready after {timeout:.0f} s; wait longer with --timeout"
    sys.exit(f"{how}\n{what_went_wrong(log)}")


def what_went_wrong(log: Path) -> str:
    """The log's first error, which later ones follow from, and its last line, which often only says "see above"."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    parts = {"what went wrong first:": first_error(lines), "the last line of its log:": lines[-1:]}
    said = "".join(
        f"  {what}\n" + textwrap.indent("\n".join(found), "    ") + "\n" for what, found in parts.items() if found
    )
    return f"{said}  the whole log: {shown(log)}"


def first_error(lines: Sequence[str]) -> list[str]:
    """How the first traceback ends, and in which process; without one the first lines with an error."""
    bare = [LOG_PREFIX.sub("", line) for line in lines]
    start = next((index for index, line in enumerate(bare) if line.startswith("Traceback (most recent")), None)
    if start is None:
        return [line for line in lines if re.search(r"\bERROR\b|\berror: ", line)][:3]
    # Frames are indented. A message of several lines goes on indented, too.
    end = next((index for index in range(start + 1, len(bare)) if not bare[index].startswith(" ")), len(bare) - 1)
    message = [bare[end], *itertools.takewhile(lambda line: line.startswith(" "), bare[end + 1 : end + 6])]
    process = LOG_PREFIX.match(lines[end])
    return [f"{process['process']}: {message[0]}" if process else message[0], *message[1:]]


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
