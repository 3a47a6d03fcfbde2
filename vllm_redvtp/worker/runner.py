"""DiffusionModelRunner: vLLM's model-runner interface over `redvtp.denoising.step.DenoisingRunner`.

It loads the model, allocates the cache, turns arriving requests into engine sequences and step reports into vLLM's
output. Everything about denoising and pruning is the engine's.
"""

from __future__ import annotations

import operator
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group, tensor_model_parallel_all_reduce
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model_loader
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from redvtp.denoising.sequence import Sequence
from redvtp.denoising.step import DenoisingRunner
from redvtp.kv.pages import KVPages
from redvtp.models.dvlm import Dvlm
from redvtp.models.visual_cache import ImageEncoder
from redvtp.reports import StepReport
from redvtp.vision.media import MediaItem
from vllm_redvtp.attention.choice import attention_over, told_at_start
from vllm_redvtp.engine_config import engine_config
from vllm_redvtp.knobs import vision_cache_bytes
from vllm_redvtp.output import DenoisingOutput
from vllm_redvtp.planning import RequestPlanner
from vllm_redvtp.worker.kv_cache import allocate_kv_cache, kv_cache_spec
from vllm_redvtp.worker.profiling import profile_largest_step

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.redvtp.runner")


class DiffusionModelRunner:
    """What vLLM's workers call. Methods are in the order of a server's life."""

    is_pooling_model = False
    lora_config = None

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.device = device
        self.config = engine_config(vllm_config.model_config)
        self.planner = RequestPlanner(vllm_config, cached_tokenizer_from_config(vllm_config.model_config))
        self.model: Dvlm
        self.model_memory_usage = 0
        self.images: ImageEncoder
        self.sequences: dict[str, Sequence] = {}
        self._engine: DenoisingRunner

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
        logger.info("attention: %s", told_at_start(self.vllm_config))
        self._engine = self._make_engine(self.model, cache)

    def get_supported_tasks(self) -> tuple[str, ...]:
        return ("generate",)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> ModelRunnerOutput:
        """Forget the finished, suspend the preempted, resume or add the admitted, step the scheduled."""
        for request_id in scheduler_output.finished_req_ids:
            self.sequences.pop(request_id, None)
        self._suspend_and_resume(scheduler_output)
        errors: dict[str, str] = {}
        # What is dropped before a first step is scored as it is added.
        clock = self._engine.clock
        before = dict(clock.seconds)
        self._add(scheduler_output.scheduled_new_reqs, errors)
        scheduled = list(scheduler_output.num_scheduled_tokens)
        if not scheduled:
            return EMPTY_MODEL_RUNNER_OUTPUT
        started = time.perf_counter()
        reports = self._step([self.sequences[rid] for rid in scheduled if rid not in errors], errors)
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

    def _add(self, requests: list[NewRequestData], errors: dict[str, str]) -> None:
        """Sequences for arriving requests; the vision tower takes the images of all of them together."""
        try:
            visual = iter(self.images.encode([image for request in requests for image in self._items(request)]))
            encoded = [list(islice(visual, len(request.mm_features))) for request in requests]
        except Exception as error:
            if len(requests) > 1:
                # Find out whose fault it is.
                logger.warning("adding %d requests failed (%s); adding them one by one", len(requests), error)
                for request in requests:
                    self._add([request], errors)
            else:
                errors[requests[0].req_id] = _explain(requests[0].req_id, error)
            return
        for request, tokens in zip(requests, encoded, strict=True):
            try:
                self.sequences[request.req_id] = self._sequence(request, tokens)
            except Exception as error:
                errors[request.req_id] = _explain(request.req_id, error)

    def _items(self, request: NewRequestData) -> list[MediaItem]:
        images: list[dict[str, Any]] = [
            feature.data.get_data() for feature in request.mm_features if feature.data is not None
        ]
        treatments = self.config.vision.treatments(["image"] * len(images))
        return [
            MediaItem(
                "image",
                bytes(image["image_digest"].tolist()),
                tuple(image["image_sizes"].tolist()),
                treatment,
                partial(operator.itemgetter("pixel_values"), image),
            )
            for image, treatment in zip(images, treatments, strict=True)
        ]

    def _sequence(self, request: NewRequestData, visual: list[Tensor]) -> Sequence:
        """The engine's view of an arriving request with these visual tokens, [visual, hidden] for each image."""
        prompt, sampling = request.prompt_token_ids, request.sampling_params
        # The scheduler refuses requests without them.
        assert prompt is not None
        assert sampling is not None
        spans = tuple(
            (feature.mm_position.offset, feature.mm_position.offset + feature.mm_position.length)
            for feature in request.mm_features
        )
        images = tuple(end - start for start, end in spans)
        plan = self.planner.plan(sampling, len(prompt), images, request.req_id)
        sequence = Sequence(
            request.req_id,
            self.model.embed_prompt(torch.tensor(prompt, device=self.device), spans, visual),
            spans,
            plan.denoising,
            plan.policy,
            self.planner.special,
            self.config.family.sampler.shifted_logits,
            stop_ids=plan.stop_ids,
            suffix_ids=plan.suffix_ids,
            block_table=list(request.block_ids[0]),
            draft_ids=plan.draft_ids,
        )
        self._engine.prune_before(sequence)
        return sequence

    def _step(self, batch: list[Sequence], errors: dict[str, str]) -> dict[str, StepReport]:
        """One step of the batch. What fails is reported in `errors` and costs only the requests it concerns.

        Tensor-parallel ranks run the same code over the same numbers, so they fail, and try again, alike.
        """
        if not batch:
            return {}
        restore = [sequence.snapshot() for sequence in batch]
        try:
            return {report.request_id: report for report in self._engine.step(batch)}
        except Exception as error:
            if len(batch) == 1:
                errors[batch[0].request_id] = _explain(batch[0].request_id, error)
                return {}
            # Find out whose fault it is: all back to where they were, and each by itself.
            logger.warning("a step of %d requests failed (%s); stepping them one by one", len(batch), error)
            for undo in restore:
                undo()
            found: dict[str, StepReport] = {}
            for sequence in batch:
                found |= self._step([sequence], errors)
            return found

    def _make_engine(self, model: Dvlm, cache: KVPages) -> DenoisingRunner:
        attention = attention_over(cache, self.config, self.vllm_config)
        if get_tensor_model_parallel_world_size() == 1:
            return DenoisingRunner(model, cache, self.planner.special, attention=attention)
        return DenoisingRunner(
            model, cache, self.planner.special, tensor_model_parallel_all_reduce, _of_first_rank, attention
        )

    def reset_encoder_cache(self) -> None:
        """As after new weights: what the old ones saw in an image is worth nothing."""
        self.images.clear()

    # Asked for by vLLM's workers; nothing to do here.

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
        self.planner = RequestPlanner(self.vllm_config, cached_tokenizer_from_config(self.vllm_config.model_config))

    def reset_mm_cache(self) -> None: ...

    def shutdown(self) -> None:
        self.sequences.clear()


def _of_first_rank(numbers: torch.Tensor) -> torch.Tensor:
    """The first tensor-parallel rank's numbers, on every rank."""
    agreed: torch.Tensor = get_tp_group().broadcast(numbers.contiguous(), src=0)
    return agreed


def _explain(request_id: str, error: Exception) -> str:
    """Log a failure of one request; a failure of the device itself is nobody's and goes on up."""
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        raise error
    logger.error("request %s failed", request_id, exc_info=error)
    return f"{type(error).__name__}: {error}"
