"""The worker process: vLLM's worker of the platform with our model runner in it.

`vllm_redvtp.hook` names the class as a string and vLLM resolves it with getattr on this module. The base classes of the
two platforms must not be imported together, so each is imported when its name is looked up.
"""

from __future__ import annotations

import os
import re
from typing import Any


def __getattr__(name: str) -> type:
    makers = {"CpuWorker": _make_cpu_worker, "GpuWorker": _make_gpu_worker}
    if name not in makers:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    worker = makers[name]()
    worker.__qualname__ = worker.__name__ = name
    globals()[name] = worker
    return worker


def _make_gpu_worker() -> type:
    from vllm.v1.worker.gpu_worker import Worker

    class GpuWorker(Worker):
        """CUDA: vLLM's worker measures memory and sets the device up; the runner is ours."""

        def _make_model_runner(self) -> Any:
            return _make_runner(self)

        def compile_or_warm_up_model(self) -> Any:
            return _ready_to_serve(self)

    return GpuWorker


def _make_cpu_worker() -> type:
    import torch
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_random_seed
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

    class CpuWorker(CPUWorker):
        """CPU: as vLLM's, whose `init_device` names its model runner and is written out here to use another."""

        def init_device(self) -> None:
            self.device = torch.device("cpu")
            if torch.cpu._is_amx_tile_supported():
                # The process must ask the kernel for AMX tiles before the first bfloat16 kernel uses them: SIGILL
                # otherwise.
                torch.cpu._init_amx()
            # Thread counts follow from the binding of vLLM's executor, as for vLLM's own runner.
            torch.set_num_threads = _keep_num_threads
            address = self.distributed_init_method
            # vLLM's shared-memory collectives find each other by this name.
            os.environ["VLLM_DIST_IDENT"] = re.split("[:/]", address)[-1]
            init_worker_distributed_environment(
                self.vllm_config, self.rank, address, self.local_rank, current_platform.dist_backend
            )
            set_random_seed(self.model_config.seed)
            self.model_runner = _make_runner(self)

        def compile_or_warm_up_model(self) -> Any:
            return _ready_to_serve(self)

    return CpuWorker


def _make_runner(worker: Any) -> Any:
    from vllm_redvtp.worker.runner import DiffusionModelRunner

    return DiffusionModelRunner(worker.vllm_config, worker.device)


def _ready_to_serve(worker: Any) -> Any:
    """Nothing to compile or capture. vLLM's versions would run steps of its own model runners."""
    from vllm.utils.torch_utils import set_random_seed
    from vllm.v1.worker.worker_base import CompilationTimes

    set_random_seed(worker.model_config.seed)
    return CompilationTimes(language_model=0.0, encoder=0.0)


def _keep_num_threads(nthreads: int) -> None:
    """In place of torch.set_num_threads, which undoes the binding of threads to cores."""
