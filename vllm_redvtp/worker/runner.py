"""DiffusionModelRunner: vLLM's model-runner interface over `redvtp.denoising.step.DenoisingRunner`.

It loads the model, allocates the cache and turns step reports into vLLM's output; `arrivals` makes the sequences.
Everything about denoising and pruning is in the engine.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.device import configure_torch
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.models.visual_cache import ImageEncoder
from redvtp.reports import StepReport
from vllm_redvtp.attention.choice import attention_summary, chosen_backend
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.output import DenoisingOutput
from vllm_redvtp.planning import RequestPlanner
from vllm_redvtp.server_options import vision_cache_bytes
from vllm_redvtp.worker.arrivals import Arrivals
from vllm_redvtp.worker.failures import OF_ANOTHER_RANK, failure_message, raise_if_of_device
from vllm_redvtp.worker.kv_cache import allocate_kv_cache, kv_cache_spec
from vllm_redvtp.worker.profiling import profile_largest_step
from vllm_redvtp.worker.ranks import ranks_of_this_worker

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.redvtp.runner")


class DiffusionModelRunner:
    """What vLLM's workers call.

    Methods: vLLM's interface, in the order of a server's life; those without a body are called and need nothing here.
    """

    is_pooling_model = False
    lora_config = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        # vLLM has set the precision of products, by VLLM_FLOAT32_MATMUL_PRECISION.
        configure_torch(exact_products=False)
        self.vllm_config = vllm_config
        self.device = device
        self.config = engine_config(vllm_config.model_config)
        self.planner = RequestPlanner(vllm_config, cached_tokenizer_from_config(vllm_config.model_config))
        self.model: Dvlm
        self.model_memory_usage = 0
        self.images: ImageEncoder
        self.sequences: dict[str, Sequence] = {}
        self._ranks = ranks_of_this_worker()
        self._engine: DenoisingRunner
        self.arrivals: Arrivals

    def load_model(self, load_dummy_weights: bool = False) -> None:
        load_config = self.vllm_config.load_config
        if load_dummy_weights:
            load_config.load_format = "dummy"
        loader = get_model_loader(load_config)
        self.model = loader.load_model(vllm_config=self.vllm_config, model_config=self.vllm_config.model_config)
        self.images = ImageEncoder(self.model, vision_cache_bytes(self.vllm_config))
        self.model_memory_usage = sum(weight.nbytes for weight in self.model.parameters())

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return kv_cache_spec(self.config, self.vllm_config)

    def profile_run(self, randomize_inputs: bool = False) -> None:
        profile_largest_step(self.model, self.vllm_config, self.planner.special, self._make_engine)

    warming_up_model = profile_run

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager[Any] | None = None,
    ) -> None:
        with kv_cache_allocation_context or nullcontext():
            cache = allocate_kv_cache(self.config, self.vllm_config, kv_cache_config, self.device)
        self._engine = self._make_engine(self.model, cache)
        neighbours = "cannot" if self._engine.context.attention.batch_invariant else "can"
        summary = attention_summary(self.vllm_config)
        logger.info("attention: %s; neighbours in a batch %s change its bits", summary, neighbours)
        self.arrivals = Arrivals(self.model, self.images, self.planner, self._engine, self._ranks)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> ModelRunnerOutput:
        """Forget the finished, suspend the preempted, resume or add the admitted, step the scheduled."""
        for request_id in scheduler_output.finished_req_ids:
            self.sequences.pop(request_id, None)
        self._suspend_and_resume(scheduler_output)
        # A policy that drops tokens before the first step scores them as the request is added.
        clock = self._engine.clock
        before = dict(clock.seconds)
        added, errors = self.arrivals.add(scheduler_output.scheduled_new_reqs)
        self.sequences |= added
        scheduled = list(scheduler_output.num_scheduled_tokens)
        if not scheduled:
            return EMPTY_MODEL_RUNNER_OUTPUT
        started = time.perf_counter()
        reports = self._step([self.sequences[rid] for rid in scheduled if rid not in errors], errors)
        # Also after an engine step in which every request failed before its step.
        clock.collect(wait=False)
        return DenoisingOutput(
            req_ids=scheduled,
            req_id_to_index={request_id: index for index, request_id in enumerate(scheduled)},
            sampled_token_ids=[reports[rid].new_tokens if rid in reports else [] for rid in scheduled],
            reports=reports,
            errors=errors,
            step_ms=(time.perf_counter() - started) * 1e3,
            seconds={label: seconds - before[label] for label, seconds in clock.seconds.items()},
        )

    def _suspend_and_resume(self, scheduler_output: SchedulerOutput) -> None:
        """A preempted request keeps all but its pages here, on every rank, until it is resumed or ended."""
        for request_id in scheduler_output.preempted_req_ids or ():
            # It may have been aborted since.
            if request_id in self.sequences:
                self.sequences[request_id].suspend()
        continuing = scheduler_output.scheduled_cached_reqs
        for request_id, blocks in zip(continuing.req_ids, continuing.new_block_ids, strict=True):
            if request_id in continuing.resumed_req_ids:
                assert blocks is not None
                self.sequences[request_id].resume(list(blocks[0]))

    def _step(self, batch: list[Sequence], errors: dict[str, str]) -> dict[str, StepReport]:
        """One step of the batch. What fails is reported in `errors` and costs only the requests it concerns."""
        if not batch:
            return {}
        restore = [sequence.snapshot() for sequence in batch]
        reports: list[StepReport] = []
        failure: Exception | None = None
        try:
            reports = self._engine.step(batch)
        except Exception as error:
            failure = error
        if failure is not None:
            # No request is to blame, and collectives would fail again.
            raise_if_of_device(failure)
        if not self._ranks.any_failed(failure is not None):
            return {report.request_id: report for report in reports}
        if len(batch) == 1:
            name = batch[0].request_id
            errors[name] = OF_ANOTHER_RANK if failure is None else failure_message(name, failure)
            return {}
        # Every rank takes the whole step back and steps each request by itself, to find the failing one.
        reason = OF_ANOTHER_RANK if failure is None else str(failure)
        # Its traceback holds every tensor of the failed step; the retry may need that memory.
        failure = None
        logger.warning("a step of %d requests failed (%s); stepping them one by one", len(batch), reason)
        for undo in restore:
            undo()
        found: dict[str, StepReport] = {}
        for sequence in batch:
            found |= self._step([sequence], errors)
        return found

    def _make_engine(self, model: Dvlm, cache: KVPages) -> DenoisingRunner:
        heads = self.config.num_attention_heads // self.vllm_config.parallel_config.tensor_parallel_size
        attention = chosen_backend(self.vllm_config).make(cache, heads, self.config.head_dim**-0.5)
        return DenoisingRunner(model, cache, self.planner.special, self._ranks, attention)

    def reset_encoder_cache(self) -> None:
        """Forget the visual tokens of images, which the weights of the tower decide."""
        self.images.clear()

    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Load weights again in place, from the checkpoint where nothing else is named. Needs no running request."""
        reload_weights(self.vllm_config, self.model, weights_iterator, weights_path, is_checkpoint_format)
        self.reset_encoder_cache()

    def get_model(self) -> Dvlm:
        return self.model

    def get_draft_model(self) -> None: ...

    def take_draft_token_ids(self) -> None: ...

    def get_encoder_timing_stats(self) -> dict[str, Any]:
        return {}

    def profile_cudagraph_memory(self) -> int:
        return 0

    def maybe_remove_all_loras(self, lora_config: Any) -> None: ...

    def update_max_model_len(self, max_model_len: int) -> None:
        """The planner reads it from the model config, where the worker has written it."""

    def reset_mm_cache(self) -> None: ...

    def shutdown(self) -> None:
        self.sequences.clear()
