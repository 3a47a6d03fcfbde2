"""Counters of denoising and pruning on vLLM's `/metrics`: `vllm:redvtp_*`, and vLLM's `vllm:diffusion_*`.

The workers measure, and `DenoisingTally` adds up in the scheduler. Each engine step's increments travel to a front-end
in `SchedulerStats.kv_connector_stats`, the one field of vLLM's statistics that carries a dictionary; KV connectors are
refused for these models (vllm_redvtp.hook). In the front-end `DenoisingProm` turns them into counters with vLLM's
labels: by engine (`engine="1"`) and over several API servers.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorProm
from vllm.v1.metrics.utils import create_metric_per_engine
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from redvtp.families.registry import architectures

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from redvtp.reports import StepReport
    from vllm_redvtp.output import DenoisingOutput
    from vllm_redvtp.scheduling.request_state import DenoisingState

PREFIX = "vllm:redvtp_"
STEP_KINDS = ("full", "response")
# Prometheus adds `_total`. Tokens are counted when a request leaves, all else as it happens.
COUNTERS = {
    "visual_tokens_seen": "Visual tokens of the requests that have ended, before any pruning.",
    "visual_tokens_kept": "Visual tokens that were left when those requests ended.",
    "prunings": "Prunings of a request's visual tokens.",
    "kv_blocks_freed": "KV cache blocks that prunings gave back while their requests went on.",
    "tokens_computed": "Rows that went through the language model; one that left half way counts for its layers.",
    "step_seconds": "Time of the worker's denoising steps, each for a whole batch.",
    "score_seconds": "Time within them for attention scores of visual tokens.",
    "compaction_seconds": "Time within them for dropping visual tokens and moving the KV cache rows that survive.",
}
_STEPS = "denoising_steps"
_CANVAS_POSITIONS = "canvas_positions"
# Growth of the answers' resolved prefixes. A token that is committed behind a gap counts once the gap is closed, one
# behind a stop never.
_RESOLVED = "resolved_tokens"


class DenoisingTally:
    """Counts in the scheduler since they were last taken."""

    def __init__(self) -> None:
        self._counts: defaultdict[str, float] = defaultdict(int)

    def batch(self, output: DenoisingOutput) -> None:
        """A step of the worker."""
        self._counts["step_seconds"] += output.step_ms / 1e3
        for label, seconds in output.seconds.items():
            self._counts[f"{label}_seconds"] += seconds

    def step(self, report: StepReport) -> None:
        """One request's part in it."""
        self._counts[f"{_STEPS}_{report.kind}"] += 1
        self._counts["tokens_computed"] += report.tokens_computed
        self._counts[_CANVAS_POSITIONS] += report.canvas_computed
        self._counts[_RESOLVED] += len(report.new_tokens)
        if report.pruning is not None:
            # One that may keep everything (`attention_mass`) may drop nothing.
            self._counts["prunings"] += report.pruning.visual_after < report.pruning.visual_before

    def freed(self, blocks: int) -> None:
        self._counts["kv_blocks_freed"] += blocks

    def left(self, state: DenoisingState) -> None:
        """A request has ended, in whatever way. One that took no step does not count."""
        if state.steps:
            self._counts["visual_tokens_seen"] += state.visual_tokens
            self._counts["visual_tokens_kept"] += len(state.kept)

    def take(self) -> dict[str, float] | None:
        """The counts since the last call, for `SchedulerStats.kv_connector_stats`."""
        taken, self._counts = self._counts, defaultdict(int)
        return dict(taken) or None


class DenoisingProm(KVConnectorProm):
    """The counters, in the place of vLLM's Prometheus logger for those of a KV connector (patches.install_metrics)."""

    def __init__(
        self, vllm_config: VllmConfig, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> None:
        super().__init__(vllm_config, labelnames, per_engine_labelvalues)
        self._ours = not architectures().isdisjoint(vllm_config.model_config.architectures)
        if not self._ours:
            return
        self._counters: dict[str, dict[int, Any]] = {
            name: create_metric_per_engine(
                self._counter_cls(name=PREFIX + name, documentation=documentation, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, documentation in COUNTERS.items()
        }
        steps = self._counter_cls(
            name=PREFIX + _STEPS,
            documentation="Denoising steps, each counted for every request in it.",
            labelnames=[*labelnames, "kind"],
        )
        for kind in STEP_KINDS:
            labels = {engine: [*values, kind] for engine, values in per_engine_labelvalues.items()}
            self._counters[f"{_STEPS}_{kind}"] = create_metric_per_engine(steps, labels)
        # vLLM makes these only for models of its block-diffusion path.
        self._diffusion = SpecDecodingProm(None, labelnames, per_engine_labelvalues, is_diffusion=True)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        if not self._ours:
            super().observe(transfer_stats_data, engine_idx)
            return
        counts = transfer_stats_data
        for name, counter in self._counters.items():
            counter[engine_idx].inc(counts.get(name, 0))
        self._diffusion.observe(
            SpecDecodingStats(
                num_spec_tokens=0,
                num_drafts=sum(counts.get(f"{_STEPS}_{kind}", 0) for kind in STEP_KINDS),
                num_draft_tokens=counts.get(_CANVAS_POSITIONS, 0),
                # vLLM calls the counter num_committed_tokens.
                num_accepted_tokens=counts.get(_RESOLVED, 0),
            ),
            engine_idx,
        )
