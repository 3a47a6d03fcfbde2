"""Which process group every tensor of two tensor-parallel ranks goes to, in a process of its own:

    python -m plugin.rank_groups

A golden run that prunes is asked over two ranks. Prints a JSON object: the run's tokens and the reference's, and for
each rank a list without doubles of [collective, group, type of its numbers], where group is "device" or "cpu".
"""

from __future__ import annotations

import json
import os
from typing import Any

from vllm import LLM

import golden_data
from devices import vllm_options
from plugin.requests import answer_of, prompt_of, sampling_of

RUN = "tiny-lavida-dream/wide/full_maskgit_s16"


def main() -> None:
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # The scheduler in this process; the ranks have theirs.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    (run,) = [run for run in golden_data.runs() if str(run) == RUN]
    model = str(run.case.model_dir)
    llm = LLM(model, dtype="float32", tensor_parallel_size=2, disable_log_stats=True, **vllm_options())
    llm.collective_rpc(_note_groups)
    asked = sampling_of(run), sampling_of(run, redvtp_pruning="redvtp", redvtp_keep_ratio=0.5, redvtp_cache="dual")
    answers = llm.generate([prompt_of(run.case)] * 2, list(asked), use_tqdm=False)
    got = answer_of(run, list(answers[0].outputs[0].token_ids), llm.get_tokenizer())
    noted = llm.collective_rpc(_noted)
    print("RESULT", json.dumps({"tokens": [got, run.output], "noted": noted}), flush=True)


def _note_groups(worker: Any) -> None:
    """In a worker: torch's collectives note the group and the type of each tensor before they run."""
    import functools

    import torch
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    names = {id(group.device_group): "device", id(group.cpu_group): "cpu"}
    worker.collectives = set()

    def noting(name: str, collective: Any) -> Any:
        @functools.wraps(collective)
        def noted(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            worker.collectives.add((name, names.get(id(kwargs.get("group")), "another"), kind))
            return collective(tensor, *args, **kwargs)

        return noted

    for name in ("broadcast", "all_reduce", "all_gather", "broadcast_object_list"):
        setattr(torch.distributed, name, noting(name, getattr(torch.distributed, name)))
    communicator: Any = group.device_communicator
    reduce = communicator.all_reduce

    # vLLM's CPU build sums in shared memory, its CUDA build as it sees fit; both are the device communicator's matter.
    def summed(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        worker.collectives.add(("sum", "device", str(tensor.dtype)))
        return reduce(tensor, *args, **kwargs)

    communicator.all_reduce = summed


def _noted(worker: Any) -> list[list[str]]:
    return sorted(map(list, worker.collectives))


if __name__ == "__main__":
    main()
