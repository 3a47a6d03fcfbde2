"""Asks a running `vllm serve MODEL --plugin redvtp` about images, through the ordinary openai package.

    python examples/chat_with_image.py examples/tiny_dvlm/tasks/00008.jpg --prompt "List all boxes row by row." \\
        --gen-length 8 --steps 8 --keep-ratio 0.25
    python examples/chat_with_image.py examples/images/coffee.jpg --pruning progressive --knob prune_steps=3
    python examples/chat_with_image.py examples/images/coffee.jpg --stream
    python examples/chat_with_image.py examples/images/coffee.jpg --heatmap out/pruned.png

The first is a question that the model in examples/tiny_dvlm knows; photographs need a published checkpoint.

RedVTP's knobs travel in `vllm_xargs`, a field of vLLM's API; its report comes back in `kv_transfer_params`. Any other
OpenAI client works the same way. The server checks the knobs, and refuses a wrong one with what is allowed. --heatmap
draws which patches were pruned; it needs this package and the checkpoint's config.json, so it runs where the model
folder is.
"""

from __future__ import annotations

import argparse
import base64
import json
import mimetypes
import sys
from pathlib import Path
from typing import Any

import openai


def main() -> int:
    arguments = parse_arguments()
    client = openai.OpenAI(base_url=arguments.base_url, api_key="none", timeout=arguments.timeout, max_retries=0)
    try:
        served = client.models.list().data[0]
        if arguments.stream:
            stream_answer(client, served.id, arguments)
        else:
            report = whole_answer(client, served.id, arguments)
            if arguments.heatmap is not None:
                model_dir = arguments.model_dir or Path(getattr(served, "root", served.id))
                draw(arguments.heatmap, arguments.image, model_dir, report)
    except openai.APIConnectionError as error:
        return fail(
            f"no answer from {arguments.base_url} ({error}); start a server (vllm serve MODEL --plugin "
            "redvtp) or name its address with --base-url"
        )
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        return fail(f"the server refused (HTTP {error.status_code}): {body.get('message', error)}")
    except (OSError, ValueError) as error:
        return fail(str(error))
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, nargs="*", help="image files; none for a question without an image")
    parser.add_argument("--prompt", default="Describe the image.", help="the question (default: %(default)s)")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="default: %(default)s")
    answer = parser.add_argument_group("the answer")
    answer.add_argument("--gen-length", type=int, default=64, help="canvas length in tokens (default: %(default)s)")
    answer.add_argument("--block-length", type=int, help="canvas positions decoded together (default: at most 32)")
    answer.add_argument("--steps", type=int, help="denoising steps in all (default: half the canvas length)")
    answer.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s, greedy")
    answer.add_argument("--seed", type=int)
    answer.add_argument(
        "--cache", metavar="MODE", help="what is kept between steps: none, prefix, dual, prefix_lm (default: none)"
    )
    answer.add_argument("--stream", action="store_true", help="print the answer as it is decided; no report then")
    pruning = parser.add_argument_group("pruning")
    pruning.add_argument(
        "--pruning", metavar="POLICY", help="redvtp, late, none, ... (default: what the server was started with)"
    )
    pruning.add_argument("--keep-ratio", type=float, help="share of visual tokens kept (default: the server's)")
    pruning.add_argument(
        "--knob",
        type=knob,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other knob of docs/knobs.md, without redvtp_; may be given several times",
    )
    pruning.add_argument("--heatmap", type=Path, metavar="FILE.png", help="draw which patches of the image were pruned")
    pruning.add_argument("--model-dir", type=Path, help="the model folder, if it is not where the server says")
    arguments = parser.parse_args()
    if arguments.stream and arguments.heatmap:
        parser.error("--heatmap needs the report, which comes with whole answers only: leave out --stream")
    if arguments.heatmap and not arguments.image:
        parser.error("--heatmap needs an image")
    return arguments


def knob(text: str) -> tuple[str, Any]:
    """A value that is JSON (a number, a list of numbers) is sent as such, any other as text."""
    name, found, value = text.partition("=")
    if not (name and found):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return f"redvtp_{name}", json.loads(value)
    except ValueError:
        return f"redvtp_{name}", value


def request(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a chat completion. Knobs that are not given keep the server's defaults."""
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(path)}} for path in arguments.image
    ]
    content.append({"type": "text", "text": arguments.prompt})
    knobs = {
        "redvtp_block_length": arguments.block_length,
        "redvtp_steps": arguments.steps,
        "redvtp_cache": arguments.cache,
        "redvtp_pruning": arguments.pruning,
        "redvtp_keep_ratio": arguments.keep_ratio,
        **dict(arguments.knob),
        **({"redvtp_report": "full"} if arguments.heatmap else {}),
    }
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": arguments.gen_length,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "extra_body": {"vllm_xargs": {name: value for name, value in knobs.items() if value is not None}},
    }


def data_url(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def stream_answer(client: openai.OpenAI, model: str, arguments: argparse.Namespace) -> None:
    for chunk in client.chat.completions.create(**request(model, arguments), stream=True):
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()


def whole_answer(client: openai.OpenAI, model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the answer and what pruning did; returns RedVTP's report."""
    completion = client.chat.completions.create(**request(model, arguments))
    choice = completion.choices[0]
    report: dict[str, Any] = (getattr(completion, "kv_transfer_params", None) or {}).get("redvtp", {})
    print(f"answer: {choice.message.content!r} (finished by {choice.finish_reason})")
    if report.get("visual_tokens"):
        print(f"visual tokens: {report['visual_tokens']} before pruning, {report['visual_tokens_kept']} after")
    if report:
        print(f"KV blocks freed: {report['blocks_freed']} of {report['kv_blocks_admitted']}, {report['steps']} steps")
    return report


def draw(target: Path, images: list[Path], model_dir: Path, report: dict[str, Any]) -> None:
    # Here, not above: without --heatmap this client needs only openai.
    from redvtp.families.config import load_config
    from redvtp.heatmap import draw_saved
    from redvtp.vision.images import open_image

    picture = draw_saved([open_image(path) for path in images], load_config(model_dir), report)
    picture.save(target)
    print(f"heat map: {target} (grey: pruned; blue to red: looked at least to most)")


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
