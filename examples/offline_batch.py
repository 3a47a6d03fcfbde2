"""Asks one question about every image of a folder, offline, and writes one JSON line for each answer.

    python examples/offline_batch.py MODEL FOLDER --prompt "What is in the picture?" --output answers.jsonl --keep-ratio 0.25

Answers are written as they finish. Started again with the same --output, it goes on where it stopped: images that have an
answer there are skipped, those that failed are tried again. A file that is no image, or an image the model cannot take, is
reported in its line ({"image": ..., "error": ...}) and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from redvtp.vision.images import open_image

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def main() -> int:
    arguments = parse_arguments()
    images = sorted(path for path in arguments.folder.iterdir() if path.suffix.lower() in SUFFIXES)
    done = answered(arguments.output)
    todo = [path for path in images if path.name not in done]
    print(f"{len(images)} images in {arguments.folder}, {len(images) - len(todo)} already answered", file=sys.stderr)
    if not todo:
        return 0

    # Imported late: --help and the checks above should not take the seconds that importing vLLM takes.
    from vllm import LLM, SamplingParams

    llm = LLM(str(arguments.model), dtype=arguments.dtype, disable_log_stats=True)
    sampling = SamplingParams(
        max_tokens=arguments.gen_length,
        temperature=0.0,
        extra_args={"redvtp_keep_ratio": arguments.keep_ratio, "redvtp_cache": arguments.cache},
    )
    failed = 0
    with arguments.output.open("a", encoding="utf-8") as output, tqdm(total=len(todo), unit="image") as progress:
        for start in range(0, len(todo), arguments.batch_size):
            batch = todo[start : start + arguments.batch_size]
            for line in answer(llm, sampling, arguments.prompt, batch):
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
                output.flush()
                progress.update()
                if "error" in line:
                    failed += 1
                    tqdm.write(f"{line['image']}: {line['error']}", file=sys.stderr)
    print(f"{len(todo) - failed} answers written to {arguments.output}, {failed} images failed", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="LLaDA-V model folder")
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument("--prompt", default="Describe the image.", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("answers.jsonl"), help="default: %(default)s")
    parser.add_argument("--gen-length", type=int, default=64, help="canvas length in tokens (default: %(default)s)")
    parser.add_argument("--keep-ratio", type=float, default=0.5, help="visual tokens kept (default: %(default)s)")
    parser.add_argument("--cache", choices=("none", "prefix"), default="none", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="images handed to vLLM at once (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder")
    if arguments.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {arguments.batch_size}")
    return arguments


def answered(output: Path) -> set[str]:
    """Names of the images whose answer is in the file. A last line cut off by a crash is dropped from the file."""
    if not output.exists():
        return set()
    text = output.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        output.write_text(whole, encoding="utf-8")
    lines = (json.loads(line) for line in whole.splitlines())
    return {line["image"] for line in lines if "answer" in line}


def answer(llm: LLM, sampling: SamplingParams, prompt: str, batch: list[Path]) -> Iterator[dict[str, Any]]:
    """One line for each image of the batch, in any order; nothing it meets in an image stops it."""
    conversations: dict[str, list[Any]] = {}
    for path in batch:
        try:
            image = open_image(path)
        except (OSError, ValueError) as error:
            yield {"image": path.name, "error": str(error)}
            continue
        content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": prompt}]
        conversations[path.name] = [{"role": "user", "content": content}]
    try:
        outputs = llm.chat(list(conversations.values()), sampling, use_tqdm=False)
    except ValueError:
        # vLLM refuses a whole list for one request it cannot take (too long for the model, say): find the culprit.
        for name, conversation in conversations.items():
            try:
                yield line(name, llm.chat(conversation, sampling, use_tqdm=False)[0])
            except ValueError as error:
                yield {"image": name, "error": str(error)}
        return
    for name, output in zip(conversations, outputs, strict=True):
        yield line(name, output)


def line(name: str, output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    report = (output.kv_transfer_params or {}).get("redvtp", {})
    return {"image": name, "answer": completion.text, "finish_reason": completion.finish_reason, **report}


if __name__ == "__main__":
    sys.exit(main())
