"""The collectives of this worker's tensor-parallel ranks, as the engine's `Ranks`.

A step runs collectives all the way through. A rank that fails inside it leaves the others waiting in one that cannot be
completed, and its retry would add numbers of another step to theirs. So ranks compare results on the CPU group before
they retry. Where all reach that point they retry together. A failed rank that waits there in vain ends its process with
a sentence, and vLLM shuts the engine down.
"""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger

from redvtp.denoising.ranks import ALONE, Ranks

logger = init_logger("vllm.redvtp.ranks")

# Ranks end a step within milliseconds of each other; longer means that the others wait in a collective of the step.
PATIENCE = timedelta(seconds=20)


def ranks_of_this_worker() -> Ranks:
    """vLLM's collectives; nothing to do on one rank."""
    if get_tensor_model_parallel_world_size() == 1:
        return ALONE
    return Ranks(tensor_model_parallel_all_reduce, _broadcast_from_rank0, _any_failed)


def _broadcast_from_rank0(numbers: Tensor) -> Tensor:
    received: Tensor = get_tp_group().broadcast(numbers.contiguous(), src=0)
    return received


def _any_failed(failed: bool) -> bool:
    """Whether any rank failed. Ends this process where it failed and the others do not come to this point."""
    group = get_tp_group()
    flag = torch.tensor([int(failed)], dtype=torch.int32)
    work = torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group, async_op=True)
    assert work is not None
    if not failed:
        work.wait()
        return bool(flag.item())
    try:
        work.wait(PATIENCE)
    except RuntimeError:
        logger.exception(
            "tensor-parallel rank %d failed alone; the other ranks wait for it in the middle of a step and cannot go "
            "on. The error is above; if memory ran out, lower --gpu-memory-utilization, --max-num-seqs or "
            "--max-num-batched-tokens",
            group.rank_in_group,
        )
        _end_process()
    return True


def end_rank(error: Exception) -> None:
    """End this process for an `error` of its device, unless it is the first rank, whose errors vLLM hears of."""
    if get_tensor_model_parallel_world_size() == 1 or get_tp_group().rank_in_group == 0:
        return
    logger.error("the device of tensor-parallel rank %d failed", get_tp_group().rank_in_group, exc_info=error)
    _end_process()


def _end_process() -> NoReturn:
    """vLLM sees that a worker has died and shuts the engine down.

    An exception would not do: vLLM logs those of ranks behind the first and goes on, and an orderly exit waits for the
    unfinished collective.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
