"""Golden runs of one checkpoint over two tensor-parallel ranks, in a process of its own:

    python -m plugin.two_ranks answers.json RUN...

vLLM's parallel groups are globals of a process, and an engine that ends takes those of the other engines with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM

import golden_data
from plugin.requests import answer_of, prompt_of, sampling_of


def main(output: str, *names: str) -> None:
    runs = [run for run in golden_data.runs() if str(run) in names]
    (checkpoint,) = {run.case.checkpoint for run in runs}
    model = str(golden_data.checkpoint_dir(checkpoint))
    llm = LLM(model, dtype="float32", tensor_parallel_size=2, disable_log_stats=True)
    outputs = llm.generate([prompt_of(run.case) for run in runs], [sampling_of(run) for run in runs])
    answers = {
        str(run): answer_of(run, list(output.outputs[0].token_ids), llm.get_tokenizer())
        for run, output in zip(runs, outputs, strict=True)
    }
    Path(output).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
