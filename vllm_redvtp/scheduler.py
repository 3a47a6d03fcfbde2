"""DiffusionScheduler: vLLM's scheduler for requests that recompute their canvas step by step and shrink while they run.

Every running request takes one denoising step in each engine step. Blocks for prompt and canvas are taken once, at
admission, so a running request never waits for memory; after a pruning the tail of its block table goes back to
vLLM's pool before the next admission. Queues, aborts, stop checks, outputs and metrics are vLLM's. Scheduling is
synchronous (see vllm_redvtp.config): the step whose blocks are freed has always finished.
"""

from __future__ import annotations

import time
from typing import Any

from vllm.logger import init_logger
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from redvtp.kv.blocks import blocks_needed
from redvtp.sequence import StepReport
from vllm_redvtp.metrics import DenoisingTally
from vllm_redvtp.output import DenoisingOutput
from vllm_redvtp.planning import RequestPlanner
from vllm_redvtp.request_state import DenoisingState

# vLLM's logging shows loggers below its own name only.
logger = init_logger("vllm.redvtp.scheduler")


class DiffusionScheduler(Scheduler):
    """One denoising step per running request and engine step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or self.cache_config.enable_prefix_caching or self.defer_block_free:
            raise ValueError(
                "diffusion decoding needs one KV cache group, no prefix caching and no asynchronous KV transfer"
            )
        self._blocks_of: dict[str, list[KVCacheBlock]] = managers[0].req_to_blocks
        self._planner = RequestPlanner(self.vllm_config, cached_tokenizer_from_config(self.vllm_config.model_config))
        self._states: dict[str, DenoisingState] = {}
        self._tally = DenoisingTally()
        # Requests the next update ends without new tokens, with the sentence for those that failed.
        self._ending: dict[str, str | None] = {}
        self._refused_sessions: set[str] = set()

    # Arrival

    def add_request(self, request: Request) -> None:
        """Queue a request, or refuse it: an exception here would take the whole engine down."""
        try:
            self._refuse_sessions(request)
            self._states[request.request_id] = self._plan(request)
        except ValueError as error:
            logger.error("request %s refused: %s", request.request_id, error)
            request.resumable = False
            self._ending[request.request_id] = str(error)
            if request.request_id in self.requests:
                # A later message of a session whose first one is about to be ended.
                return
        super().add_request(request)

    def _refuse_sessions(self, request: Request) -> None:
        session = request.request_id
        if not request.resumable and session not in self._refused_sessions:
            return
        # Later messages of the session come under the same id; the last one is not resumable.
        (self._refused_sessions.add if request.resumable else self._refused_sessions.discard)(session)
        raise ValueError(
            "streaming input sessions are not supported by diffusion decoding; send the whole prompt at once"
        )

    def _plan(self, request: Request) -> DenoisingState:
        sampling = request.sampling_params
        if sampling is None or request.prompt_token_ids is None:
            raise ValueError(
                "diffusion decoding generates from prompt tokens; pooling and prompt embeddings are not supported"
            )
        plan = self._planner.plan(sampling, request.num_prompt_tokens, request.request_id)
        places = [feature.mm_position for feature in request.mm_features]
        state = DenoisingState(plan, tuple((place.offset, place.offset + place.length) for place in places))
        self._planner.check_fits(plan, state.visual_tokens)
        self._planner.settle(sampling, plan.denoising.gen_length)
        request.max_tokens = plan.denoising.gen_length
        if plan.draft_ids:
            # vLLM has entered the model's end tokens before anybody knew of the draft, which they do not end.
            sampling._eos_token_id = None
            kept = set(sampling.stop_token_ids or ()) - set(self._planner.special.end_ids)
            sampling.stop_token_ids = sorted(kept)
        if not plan.denoising.ignore_eos:
            # vLLM itself knows one end token, LLaDA has two.
            ends = set(self._planner.special.end_ids) - {sampling.eos_token_id}
            sampling.stop_token_ids = [*(sampling.stop_token_ids or []), *sorted(ends)]
        return state

    # One engine step

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        stepping: dict[str, int] = {}
        paused = self._pause_state == PauseState.PAUSED_ALL
        continuing = [] if paused else self._continue_running(stepping)
        admitted = [] if self._pause_state != PauseState.UNPAUSED else self._admit_waiting(stepping)
        return self._scheduler_output(stepping, continuing, admitted)

    def _continue_running(self, stepping: dict[str, int]) -> list[Request]:
        """Running requests that take a step; `stepping` gets their costs. Those over the token budget wait a step."""
        continuing = []
        for request in self.running:
            state = self._states[request.request_id]
            if request.request_id not in self._ending and self._within_budget(state, stepping):
                stepping[request.request_id] = state.next_tokens
                continuing.append(request)
        return continuing

    def _admit_waiting(self, stepping: dict[str, int]) -> list[Request]:
        """First come, first served, while there are tokens in the budget, blocks in the pool and running slots."""
        admitted: list[Request] = []
        while self.waiting and len(self.running) < self.max_num_active_reqs:
            request = self.waiting.peek_request()
            if request.request_id in self._ending:
                break
            state = self._states[request.request_id]
            if not self._within_budget(state, stepping):
                break
            if self.kv_cache_manager.allocate_slots(request, state.plan.kv_tokens) is None:
                break
            self.waiting.pop_request()
            self.deferred_waiting.discard(request)
            self._start(request, state)
            stepping[request.request_id] = state.next_tokens
            admitted.append(request)
        return admitted

    def _within_budget(self, state: DenoisingState, stepping: dict[str, int]) -> bool:
        # One request always steps: its full step may be larger than a budget the user has set.
        return not stepping or sum(stepping.values()) + state.next_tokens <= self.max_num_scheduled_tokens

    def _start(self, request: Request, state: DenoisingState) -> None:
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        state.blocks_admitted = len(self._blocks_of[request.request_id])
        if request.prefill_stats is not None and request.num_preemptions <= 0:
            request.prefill_stats.set(
                num_prompt_tokens=request.num_prompt_tokens, num_local_cached_tokens=0, num_external_cached_tokens=0
            )
        if self.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED, time.monotonic())

    def _scheduler_output(
        self, stepping: dict[str, int], continuing: list[Request], admitted: list[Request]
    ) -> SchedulerOutput:
        output = SchedulerOutput(
            scheduled_new_reqs=[
                # All token ids: after a preemption the worker keeps what was already streamed.
                NewRequestData.from_request(
                    request, self.kv_cache_manager.get_block_ids(request.request_id), request._all_token_ids
                )
                for request in admitted
            ],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=[request.request_id for request in continuing],
                resumed_req_ids=set(),
                new_token_ids=[],
                all_token_ids={},
                new_block_ids=[None] * len(continuing),
                num_computed_tokens=[request.num_computed_tokens for request in continuing],
                num_output_tokens=[request.num_output_tokens for request in continuing],
            ),
            num_scheduled_tokens=stepping,
            total_num_scheduled_tokens=sum(stepping.values()),
            scheduled_spec_decode_tokens={},
            # The worker runs the vision tower when a request arrives there; vLLM's encoder cache has no part in it.
            scheduled_encoder_inputs={},
            # The worker forgets preempted requests too; they come again as new ones.
            finished_req_ids=self.finished_req_ids | self.reset_preempted_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            preempted_req_ids=self.reset_preempted_req_ids,
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        # After the output is built: vLLM strips images from it that computed tokens cover.
        for request in (*continuing, *admitted):
            request.num_in_flight_tokens += stepping[request.request_id]
            # vLLM counts its prefill by this; here the prompt is computed whole in the first step.
            request.num_computed_tokens = request.num_prompt_tokens
            request.is_prefill_chunk = False
        self.finished_req_ids, self.reset_preempted_req_ids = set(), set()
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        reports: list[StepReport] = []
        step_ms = 0.0
        if isinstance(model_runner_output, DenoisingOutput):
            reports = [report for rid, report in model_runner_output.reports.items() if rid in self._states]
            self._ending.update(model_runner_output.errors)
            step_ms = model_runner_output.step_ms
            self._tally.batch(model_runner_output)
        for report in reports:
            state = self._states[report.request_id]
            state.record(report, step_ms)
            self._tally.step(report, state)
            self._free_tail(report.request_id, state)
        ending, self._ending = self._ending, {}
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, error in ending.items():
            self._end(request_id, error, outputs)
        for report in reports:
            if report.finished and report.request_id in self._states:
                self._expect_stop_string(report.request_id, outputs)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_connector_stats = self._tally.take()
        return stats

    # Endings

    def _free_tail(self, request_id: str, state: DenoisingState) -> None:
        """Give back the blocks beyond what the request holds now; the worker has cut its table by the same formula."""
        blocks = self._blocks_of[request_id]
        tail = blocks[blocks_needed(state.kv_tokens, self.block_size) :]
        if tail:
            del blocks[-len(tail) :]
            self.kv_cache_manager.block_pool.free_blocks(reversed(tail))
            state.blocks_freed += len(tail)
            self._tally.freed(len(tail))

    def _expect_stop_string(self, request_id: str, outputs: dict[int, EngineCoreOutputs]) -> None:
        """The engine has finished, vLLM has not: the answer ends with a stop string, which the front-end looks for.

        It usually aborts the request before the next step. If it does not, the next step ends it here, so that
        nothing hangs.
        """
        request = self.requests[request_id]
        self._ending[request_id] = None
        for output in _outputs_of(request, outputs).outputs:
            if output.request_id == request_id:
                # The abort brings no output of its own to carry this.
                output.kv_transfer_params = self._states[request_id].summary()

    def _end(self, request_id: str, error: str | None, outputs: dict[int, EngineCoreOutputs]) -> None:
        """End a request without new tokens. error: why it failed; None when its answer is complete."""
        request = self.requests.get(request_id)
        if request is None or request.is_finished():
            return
        state = self._states.get(request_id)
        self.finish_requests(
            request_id, RequestStatus.FINISHED_STOPPED if error is None else RequestStatus.FINISHED_ERROR
        )
        _outputs_of(request, outputs).outputs.append(
            EngineCoreOutput(
                request_id=request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                stop_reason=error,
                events=request.take_events(),
                kv_transfer_params=state.summary() if state is not None else None,
                trace_headers=request.trace_headers,
            )
        )

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Only `/reset_prefix_cache` and `/pause` preempt; the request starts again with what it has streamed kept."""
        super()._preempt_request(request, *args, **kwargs)
        self._states[request.request_id].restart()

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[dict[str, Any] | None, Any]:
        _, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        state = self._states.pop(request.request_id, None)
        self._ending.pop(request.request_id, None)
        if state is not None:
            self._tally.left(state)
        return (state.summary() if state is not None else None), ec_transfer_params


def _outputs_of(request: Request, outputs: dict[int, EngineCoreOutputs]) -> EngineCoreOutputs:
    """The outputs that go to the request's front-end."""
    found = outputs.get(request.client_index)
    if found is None:
        found = outputs[request.client_index] = EngineCoreOutputs(outputs=[])
    return found
