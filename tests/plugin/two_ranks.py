"""Golden runs of one checkpoint over two tensor-parallel ranks, in a process of its own:

    python -m plugin.two_ranks answers.json [--disturb] RUN...

--disturb: the second rank's head is another one, so that by itself it would decide differently.

vLLM's parallel groups are globals of a process, and an engine that ends takes those of the other engines with it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from vllm import LLM

import golden_data
from plugin.requests import answer_of, prompt_of, sampling_of


def main(output: str, *names: str) -> None:
    disturb = "--disturb" in names
    if disturb:
        # vLLM runs functions in its workers only if it is told that nobody else can send it some.
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    runs = [run for run in golden_data.runs() if str(run) in names]
    (checkpoint,) = {run.case.checkpoint for run in runs}
    model = str(golden_data.checkpoint_dir(checkpoint))
    llm = LLM(model, dtype="float32", tensor_parallel_size=2, disable_log_stats=True)
    if disturb:
        assert llm.collective_rpc(_disturb) == [0, 1]
    outputs = llm.generate([prompt_of(run.case) for run in runs], [sampling_of(run) for run in runs])
    answers = {
        str(run): answer_of(run, list(output.outputs[0].token_ids), llm.get_tokenizer())
        for run, output in zip(runs, outputs, strict=True)
    }
    Path(output).write_text(json.dumps(answers))


def _disturb(worker: Any) -> int:
    """In a worker: which rank it is; the second one's head is shuffled."""
    if worker.rank == 1:
        head = worker.model_runner.model.language_model.lm_head.weight
        head.data = head.data.roll(7, dims=0)
    rank: int = worker.rank
    return rank


if __name__ == "__main__":
    main(*sys.argv[1:])
