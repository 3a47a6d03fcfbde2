"""Two tensor-parallel ranks of which one fails alone, in a process of its own:

    python -m plugin.one_rank_fails WHERE...

WHERE: "after" plants an error behind the last collective of a step, "inside" one that leaves the other rank waiting in
a collective, "device" one of the device; the last two end the engine. Prints a line of JSON for each: finish reason,
stop reason and tokens of each of two requests; or how the engine ended, and the seconds until then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

import golden_data
from devices import vllm_options
from plugin.requests import step_of

TOKENS = 16


def main(*where: str) -> None:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # The scheduler in this process, so that a step is a step; the ranks have theirs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    model = str(golden_data.checkpoint_dir("tiny-llada-v"))
    llm = LLM(model, dtype="float32", tensor_parallel_size=2, disable_log_stats=True, **vllm_options())
    for plant in where:
        assert llm.collective_rpc({"after": _after, "inside": _inside, "device": _device}[plant]) == [0, 1]
        print("RESULT", json.dumps(_asked(llm)), flush=True)
    # Nothing can be ended in order any more.
    os._exit(0)


def _asked(llm: LLM) -> dict[str, Any]:
    for number in range(2):
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        llm.llm_engine.add_request(str(number), {"prompt": "hello there"}, sampling)
    started = time.monotonic()
    outputs: dict[str, Any] = {}
    try:
        while llm.llm_engine.has_unfinished_requests():
            outputs |= {done.request_id: done.outputs[0] for done in step_of(llm) if done.finished}
    except Exception as error:
        return {"ended": type(error).__name__, "seconds": time.monotonic() - started}
    found = [[out.finish_reason, out.stop_reason, list(out.token_ids)] for _, out in sorted(outputs.items())]
    return {"answers": found}


def _after(worker: Any) -> int:
    return _plant(worker, first=False)


def _inside(worker: Any) -> int:
    return _plant(worker, first=True)


def _device(worker: Any) -> int:
    return _plant(worker, first=False, of_device=True)


def _plant(worker: Any, *, first: bool, of_device: bool = False) -> int:
    """In a worker: rank 1 runs out of memory in the third step, before the step or after it, or its device fails."""
    import torch

    def planted() -> Exception:
        if of_device:
            return RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED, planted on rank 1 only")
        return torch.OutOfMemoryError("planted on rank 1 only")

    engine = worker.model_runner._engine
    step, calls = engine.step, 0

    def step_or_fail(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and first:
            raise planted()
        reports = step(batch)
        if calls == 3:
            raise planted()
        return reports

    if worker.rank == 1:
        engine.step = step_or_fail
    rank: int = worker.rank
    return rank


if __name__ == "__main__":
    main(*sys.argv[1:])
