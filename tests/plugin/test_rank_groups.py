"""Tensors of the device go over the device's process group, flags of the host over the CPU's.

NCCL, the device group's backend on CUDA, takes no tensor of the host; gloo, which it is here, takes any. That what is
handed to ranks is on the device shows in tests/engine/test_second_device.py.
"""

from __future__ import annotations

import pytest

from devices import needs_two_ranks
from module_process import results, run_module


@pytest.mark.slow
@needs_two_ranks
def test_each_tensor_goes_to_the_group_of_its_device() -> None:
    (found,) = results(run_module("plugin.rank_groups"))
    got, expected = found["tokens"]
    assert got == expected
    assert len(found["noted"]) == 2
    for noted in found["noted"]:
        # vLLM sums in shared memory on some processors, and through torch on others.
        assert [each for each in noted if each != ["all_reduce", "device", "torch.float32"]] == [
            # Whether a rank failed.
            ["all_reduce", "cpu", "torch.int32"],
            # Importance of visual tokens; tokens and their confidence together.
            ["broadcast", "device", "torch.float32"],
            ["broadcast", "device", "torch.float64"],
            # Activations and scores.
            ["sum", "device", "torch.float32"],
        ]
