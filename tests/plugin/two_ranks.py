"""Golden runs of one checkpoint over two tensor-parallel ranks, in a process of its own:

    python -m plugin.two_ranks answers.json ROUNDS RUN...

ROUNDS: a JSON list; in each round all runs are asked together, with `knobs` beside their own, and all are preempted
after every `preempt` engine steps if that is not 0. From a round with `disturb` on, the second rank's head is another
one, so that by itself it would decide differently. The answers are a list too, by run.

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
from devices import vllm_options
from plugin.requests import answer_of, prompt_of, sampling_of


def main(output: str, rounds: str, *names: str) -> None:
    # vLLM runs functions in its workers only if it is told that nobody else can send it some.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    runs = [run for run in golden_data.runs() if str(run) in names]
    (checkpoint,) = {run.case.checkpoint for run in runs}
    model = str(golden_data.checkpoint_dir(checkpoint))
    # The scheduler in this process, so that a step is a step; the ranks have theirs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    llm = LLM(model, dtype="float32", tensor_parallel_size=2, disable_log_stats=True, **vllm_options())
    Path(output).write_text(json.dumps([_round(llm, runs, **each) for each in json.loads(rounds)]))


def _round(
    llm: LLM, runs: list[golden_data.Run], preempt: int, disturb: bool, knobs: dict[str, Any]
) -> dict[str, list[int]]:
    if disturb:
        assert llm.collective_rpc(_disturb) == [0, 1]
    asked = {f"redvtp_{name}": value for name, value in knobs.items()}
    for run in runs:
        llm.llm_engine.add_request(str(run), prompt_of(run.case), sampling_of(run, **asked))
    outputs: dict[str, Any] = {}
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        outputs |= {done.request_id: done for done in llm.llm_engine.step() if done.finished}
        steps += 1
        if preempt and steps % preempt == 0:
            assert llm.reset_prefix_cache(reset_running_requests=True)
    return {str(run): answer_of(run, list(outputs[str(run)].outputs[0].token_ids), llm.get_tokenizer()) for run in runs}


def _disturb(worker: Any) -> int:
    """In a worker: which rank it is; the second one's head is shuffled."""
    if worker.rank == 1:
        head = worker.model_runner.model.language_model.lm_head.weight
        head.data = head.data.roll(7, dims=0)
    rank: int = worker.rank
    return rank


if __name__ == "__main__":
    main(*sys.argv[1:])
