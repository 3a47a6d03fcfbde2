"""DiffusionScheduler: vLLM's scheduler for requests that recompute their canvas step by step and shrink while they run.

Every running request takes one denoising step in each engine step, within the token budget (`turns`). Blocks for prompt
and canvas are taken once, at admission, so a running request never waits for memory. After a pruning the tail of its
block table goes back to vLLM's pool before the next admission. A preempted request loses its blocks and nothing else:
the workers keep its sequence. Queues, aborts, stop checks, outputs and metrics are vLLM's. Scheduling is synchronous
(see vllm_redvtp.hook): the step whose blocks are freed has always finished.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from vllm.logger import init_logger
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from redvtp.errors import InvalidRequest
from redvtp.kv.blocks import blocks_needed
from redvtp.reports import StepReport
from vllm_redvtp.knob_names import in_request
from vllm_redvtp.knobs import write_gen_length
from vllm_redvtp.output import DenoisingOutput
from vllm_redvtp.planning import RequestPlanner, visual_spans
from vllm_redvtp.scheduling import turns
from vllm_redvtp.scheduling.endings import RefusedSessions, attach_report, end_output, outputs_of, spells_stop
from vllm_redvtp.scheduling.metrics import DenoisingTally
from vllm_redvtp.scheduling.request_state import DenoisingState

# vLLM's logging shows only loggers below `vllm`.
logger = init_logger("vllm.redvtp.scheduler")


class DiffusionScheduler(Scheduler):
    """One denoising step per running request and engine step.

    Methods: vLLM's interface (add_request to _free_request) and the parts of `schedule` and `update_from_output`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        if len(managers) != 1 or self.cache_config.enable_prefix_caching or self.defer_block_free:
            raise ValueError(
                "diffusion decoding needs one KV cache group, no prefix caching and no asynchronous KV transfer"
            )
        self._blocks_of: dict[str, list[KVCacheBlock]] = managers[0].req_to_blocks
        self._tokenizer = cached_tokenizer_from_config(self.vllm_config.model_config)
        self._planner = RequestPlanner(self.vllm_config, self._tokenizer)
        self._states: dict[str, DenoisingState] = {}
        self._tally = DenoisingTally()
        # Requests that the next update ends without new tokens, with the error message of those that failed.
        self._ending: dict[str, str | None] = {}
        self._sessions = RefusedSessions()
        # Whether every running request took a step in the last engine step.
        self._all_stepped = True

    def add_request(self, request: Request) -> None:
        """Queue a request, or refuse it: an exception here would take the whole engine down."""
        try:
            self._sessions.refuse(request)
            self._states[request.request_id] = self._plan(request)
        except ValueError as error:
            reason = in_request(error, request.sampling_params)
            logger.error("request %s refused: %s", request.request_id, reason)
            request.resumable = False
            self._ending[request.request_id] = reason
            if request.request_id in self.requests:
                # A later message of a session whose first one is about to be ended.
                return
        super().add_request(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> Any:
        if finished_status == RequestStatus.FINISHED_ABORTED and request_ids is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            self._sessions.forget(request_ids)
        return super().finish_requests(request_ids, finished_status)

    def _plan(self, request: Request) -> DenoisingState:
        sampling = request.sampling_params
        if sampling is None or request.prompt_token_ids is None:
            raise InvalidRequest(
                "diffusion decoding generates from prompt tokens; pooling and prompt embeddings are not supported"
            )
        spans = visual_spans(request.mm_features)
        lengths = tuple(end - start for start, end in spans)
        served = self._planner.plan(sampling, request.num_prompt_tokens, lengths, request.request_id)
        plan = served.plan
        write_gen_length(sampling, plan.denoising.gen_length)
        request.max_tokens = plan.denoising.gen_length
        if plan.draft_ids:
            # vLLM has entered the model's end tokens, which do not end a draft.
            sampling._eos_token_id = None
            kept = set(sampling.stop_token_ids or ()) - set(self._planner.special.end_ids)
            sampling.stop_token_ids = sorted(kept)
        if not plan.denoising.ignore_eos:
            # vLLM knows one end token, LLaDA has two.
            ends = set(self._planner.special.end_ids) - {sampling.eos_token_id}
            sampling.stop_token_ids = [*(sampling.stop_token_ids or []), *sorted(ends)]
        return DenoisingState(plan, served.report, spans)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        stepping: dict[str, int] = {}
        admitted: list[Request] = []
        admitting = self._pause_state == PauseState.UNPAUSED
        if admitting and self._head_goes_first():
            admitted = self._admit_waiting(stepping, limit=1)
        continuing = [] if self._pause_state == PauseState.PAUSED_ALL else self._continue_running(stepping)
        if admitting:
            admitted += self._admit_waiting(stepping)
        states = [self._states[request.request_id] for request in (*continuing, *admitted)]
        for state in states:
            state.last_step = self.current_step
        self._all_stepped = len(states) == len(self.running)
        return self._scheduler_output(stepping, continuing, admitted)

    def _head_goes_first(self) -> bool:
        if not self.waiting or not self.running or not self._all_stepped:
            return False
        request_id = self.waiting.peek_request().request_id
        if request_id in self._ending:
            return False
        running = (self._states[request.request_id] for request in self.running)
        return turns.head_goes_first(self._states[request_id], running, self.max_num_scheduled_tokens)

    def _continue_running(self, stepping: dict[str, int]) -> list[Request]:
        """Running requests that take a step; `stepping` gets their costs."""
        running = {
            request.request_id: self._states[request.request_id]
            for request in self.running
            if request.request_id not in self._ending
        }
        continuing = turns.continuing(running, stepping, self.max_num_scheduled_tokens)
        stepping |= continuing
        return [self.requests[request_id] for request_id in continuing]

    def _admit_waiting(self, stepping: dict[str, int], limit: int | None = None) -> list[Request]:
        """First come, first served (or by priority), while there are tokens in the budget, blocks and running slots."""
        admitted: list[Request] = []
        while self.waiting and len(self.running) < self.max_num_active_reqs and len(admitted) != limit:
            request = self.waiting.peek_request()
            if request.request_id in self._ending:
                break
            state = self._states[request.request_id]
            if not turns.fits(state, sum(stepping.values()), self.max_num_scheduled_tokens):
                break
            if self.kv_cache_manager.allocate_slots(request, state.kv_tokens) is None:
                break
            self.waiting.pop_request()
            self.deferred_waiting.discard(request)
            self._start(request, state)
            stepping[request.request_id] = state.next_tokens
            admitted.append(request)
        return admitted

    def _start(self, request: Request, state: DenoisingState) -> None:
        if request.num_preemptions <= 0:
            state.blocks_admitted = len(self._blocks_of[request.request_id])
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        if request.prefill_stats is not None and request.num_preemptions <= 0:
            request.prefill_stats.set(
                num_prompt_tokens=request.num_prompt_tokens, num_local_cached_tokens=0, num_external_cached_tokens=0
            )
        if self.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED, time.monotonic())

    def _scheduler_output(
        self, stepping: dict[str, int], continuing: list[Request], admitted: list[Request]
    ) -> SchedulerOutput:
        new = [request for request in admitted if request.num_preemptions <= 0]
        resumed = [request for request in admitted if request.num_preemptions > 0]
        known = [*continuing, *resumed]
        output = SchedulerOutput(
            scheduled_new_reqs=[
                NewRequestData.from_request(request, self.kv_cache_manager.get_block_ids(request.request_id))
                for request in new
            ],
            scheduled_cached_reqs=CachedRequestData(
                req_ids=[request.request_id for request in known],
                resumed_req_ids={request.request_id for request in resumed},
                new_token_ids=[],
                # A resumed request's canvas and all else is still with the workers.
                all_token_ids={},
                new_block_ids=[
                    *[None] * len(continuing),
                    *(self.kv_cache_manager.get_block_ids(request.request_id) for request in resumed),
                ],
                num_computed_tokens=[request.num_computed_tokens for request in known],
                num_output_tokens=[request.num_output_tokens for request in known],
            ),
            num_scheduled_tokens=stepping,
            total_num_scheduled_tokens=sum(stepping.values()),
            scheduled_spec_decode_tokens={},
            # The worker runs the vision tower when a request arrives there, without vLLM's encoder cache.
            scheduled_encoder_inputs={},
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            preempted_req_ids=self.reset_preempted_req_ids,
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
        )
        # After the output is built: vLLM strips images from it that computed tokens cover.
        for request in (*known, *new):
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
            self._tally.step(report)
            self._free_tail(report.request_id, state)
        ending, self._ending = self._ending, {}
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        for request_id, error in ending.items():
            self._end(request_id, error, outputs)
        for report in reports:
            if report.request_id in self._states:
                self._report_before_the_front_end_ends(report, outputs)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats: SchedulerStats | None = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.kv_connector_stats = self._tally.take()
        return stats

    def _free_tail(self, request_id: str, state: DenoisingState) -> None:
        """Free the blocks beyond what the request holds now; the worker has cut its table by the same formula."""
        blocks = self._blocks_of[request_id]
        tail = blocks[blocks_needed(state.kv_tokens, self.block_size) :]
        if tail:
            del blocks[-len(tail) :]
            self.kv_cache_manager.block_pool.free_blocks(reversed(tail))
            state.blocks_freed += len(tail)
            self._tally.freed(len(tail))

    def _report_before_the_front_end_ends(self, report: StepReport, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Send the request's report along where the front-end is about to end it at a stop string.

        A finished canvas that vLLM has not ended has its stop in the text. The front-end usually aborts the request
        before the next step; if it does not, the next step ends it here, so that nothing hangs.
        """
        request = self.requests[report.request_id]
        if report.finished:
            self._ending[report.request_id] = None
        elif not spells_stop(
            self._tokenizer, request.output_token_ids, len(report.new_tokens), request.sampling_params
        ):
            return
        attach_report(request, self._states[report.request_id].summary(), outputs)

    def _end(self, request_id: str, error: str | None, outputs: dict[int, EngineCoreOutputs]) -> None:
        """End a request without new tokens. error: why it failed; None when its answer is complete."""
        request = self.requests.get(request_id)
        if request is None or request.is_finished():
            return
        state = self._states.get(request_id)
        status = RequestStatus.FINISHED_STOPPED if error is None else RequestStatus.FINISHED_ERROR
        self.finish_requests(request_id, status)
        report = state.summary() if state is not None else None
        outputs_of(request, outputs).outputs.append(end_output(request, error, report))

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Take all blocks of a request; it queues for others and continues with the step it would have taken."""
        super()._preempt_request(request, *args, **kwargs)
        self._states[request.request_id].suspend()

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> tuple[dict[str, Any] | None, Any]:
        _, ec_transfer_params = super()._free_request(request, delay_free_blocks)
        state = self._states.pop(request.request_id, None)
        self._ending.pop(request.request_id, None)
        if state is not None:
            self._tally.left(state)
        return (state.summary() if state is not None else None), ec_transfer_params
