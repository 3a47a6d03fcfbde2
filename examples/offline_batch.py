"""Asks one question about every image of a folder, offline, and writes one JSON line for each answer.

    python examples/offline_batch.py MODEL FOLDER --prompt "What is it?" --output answers.jsonl --keep-ratio 0.25

Answers are written as they finish. Started again with the same --output, it skips images that have an answer there and
tries those that failed again. A file that is no image, or an image the model cannot
take, is reported in its line ({"image": ..., "error": ...}) and does not stop the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from redvtp.params import DenoisingParams, PruningParams
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

    # Imported late: vLLM takes seconds, which --help and the checks above should not.
    from vllm import LLM, SamplingParams

    llm = LLM(str(arguments.model), dtype=arguments.dtype, disable_log_stats=True)
    # What is not asked for is the plugin's default.
    keep = {} if arguments.keep_ratio is None else {"redvtp_keep_ratio": arguments.keep_ratio}
    sampling = SamplingParams(
        max_tokens=arguments.gen_length,
        temperature=0.0,
        extra_args={"redvtp_cache": arguments.cache} | keep,
    )
    failed = 0
    try:
        with arguments.output.open("a", encoding="utf-8") as output, tqdm(total=len(todo), unit="image") as progress:
            for line in answers(llm, sampling, arguments.prompt, todo, arguments.in_flight):
                output.write(json.dumps(line, ensure_ascii=False) + "\n")
                output.flush()
                progress.update()
                if "error" in line:
                    failed += 1
                    tqdm.write(f"{line['image']}: {line['error']}", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what {arguments.output} lacks", file=sys.stderr)
        return 130
    print(f"{len(todo) - failed} answers written to {arguments.output}, {failed} images failed", file=sys.stderr)
    return 1 if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="LLaDA-V model folder")
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument("--prompt", default="Describe the image.", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("answers.jsonl"), help="default: %(default)s")
    parser.add_argument("--gen-length", type=int, default=64, help="canvas length in tokens (default: %(default)s)")
    parser.add_argument("--keep-ratio", type=float, help="share of visual tokens kept (default: the plugin's)")
    parser.add_argument("--cache", choices=("none", "prefix", "dual"), default="none", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: %(default)s)")
    parser.add_argument("--in-flight", type=int, default=64, help="requests in vLLM at once (default: %(default)s)")
    arguments = parser.parse_args()
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder} is not a folder")
    if arguments.in_flight < 1:
        parser.error(f"--in-flight must be at least 1, got {arguments.in_flight}")
    try:
        DenoisingParams(gen_length=arguments.gen_length)
        if arguments.keep_ratio is not None:
            PruningParams(keep_ratio=arguments.keep_ratio)
    except ValueError as error:
        parser.error(str(error))
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


def answers(
    llm: LLM, sampling: SamplingParams, prompt: str, images: list[Path], in_flight: int
) -> Iterator[dict[str, Any]]:
    """One line for each image, as they finish.

    llm.chat() would hand all answers over at the end, and refuse the whole list for one bad image. This is what it does
    inside, one request at a time, with at most `in_flight` decoded images in memory.
    """
    from vllm.exceptions import VLLMClientError

    waiting = iter(images)
    running: dict[str, str] = {}
    while True:
        while len(running) < in_flight and (path := next(waiting, None)):
            try:
                content = [{"type": "image_pil", "image_pil": open_image(path)}, {"type": "text", "text": prompt}]
                conversation: list[Any] = [{"role": "user", "content": content}]
                (request_id,) = llm.enqueue_chat(conversation, sampling, use_tqdm=False)
                # vLLM 0.32 returns its inner id: the one that outputs bear, and a random tail.
                running[request_id.rpartition("-")[0]] = path.name
            except (OSError, ValueError, VLLMClientError) as error:
                yield {"image": path.name, "error": str(error)}
        if not running:
            return
        for output in llm.llm_engine.step():
            if output.finished:
                yield answer_line(running.pop(output.request_id), output)


def answer_line(image: str, output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    if completion.finish_reason == "error":
        return {"image": image, "error": str(completion.stop_reason or "the engine could not answer; see its log")}
    report = (output.kv_transfer_params or {}).get("redvtp", {})
    return {"image": image, "answer": completion.text, "finish_reason": completion.finish_reason, **report}


if __name__ == "__main__":
    sys.exit(main())
