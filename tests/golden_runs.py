"""A run of the reference's `generate`, said in our knobs.

The families' references have other names and other defaults for the same things; this is the one place that translates
them, for the engine, the command and the server alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from golden_data import DREAM, LLADA_V, Run
from redvtp.params import DenoisingParams, PruningParams

_LLADA_V_KEYS = {
    "gen_length", "block_length", "steps", "stopping_criteria", "generation_suffix", "prefix_refresh_interval",
    "threshold",
}  # fmt: skip
_LAVIDA_KEYS = {
    "max_new_tokens", "block_length", "steps", "step_ratio", "step_per_block", "prefix_lm", "schedule",
    "schedule_kwargs", "remasking",
}  # fmt: skip
_DREAM_KEYS = {
    "max_new_tokens", "steps", "step_ratio", "prefix_lm", "schedule", "alg", "temperature", "top_p", "alg_temp",
}  # fmt: skip
_REMASKINGS = {
    "low_confidence": "low_confidence", "entrophy": "entropy", "margin": "margin",
    "maskgit_plus": "low_confidence", "entropy": "entropy", "topk_margin": "margin",
}  # fmt: skip


def knobs(run: Run) -> dict[str, Any]:
    """gen_length and all other knobs of the run that are not the default."""
    if run.case.checkpoint in LLADA_V:
        values = _llada_v(run)
    else:
        values = _dream(run) if run.case.checkpoint in DREAM else _lavida(run)
    if run.keep_ratio is None:
        return {**values, "pruning": "none"}
    return {**values, "pruning": "redvtp", "keep_ratio": run.keep_ratio}


def denoising_of(run: Run) -> DenoisingParams:
    values = {name: value for name, value in knobs(run).items() if name not in ("pruning", "keep_ratio")}
    # The reference ends at the stop strings it is given and at nothing else.
    return DenoisingParams(**values, stop=tuple(run.params.get("stopping_criteria", ())), ignore_eos=True)


def pruning_of(run: Run) -> PruningParams:
    values = knobs(run)
    if values["pruning"] == "none":
        return PruningParams(preset="none")
    return PruningParams(preset=values["pruning"], keep_ratio=values["keep_ratio"])


def one_of_each_mode(runs: Iterable[Run]) -> set[str]:
    """Names of the runs that are enough for the quick loop: the first robust one of each checkpoint and set of knobs.

    Lengths, numbers of steps and keep ratios make no mode of their own.
    """
    chosen: dict[tuple[object, ...], str] = {}
    for run in runs:
        if run.robust:
            chosen.setdefault(_mode(run), str(run))
    return set(chosen.values())


def _mode(run: Run) -> tuple[object, ...]:
    values = knobs(run)
    which = [values.get(name) for name in ("pruning", "cache", "threshold", "schedule", "remasking")]
    return (
        run.case.checkpoint, bool(run.case.config_overrides), run.kind, *which,
        "suffix" in values, "stopping_criteria" in run.params,
    )  # fmt: skip


def selected_runs(session: pytest.Session) -> set[str]:
    """Names of the runs that the selected tests of this session ask for."""
    asked = (getattr(item, "callspec", None) for item in session.items)
    return {str(spec.params["run"]) for spec in asked if spec is not None and "run" in spec.params}


def _params(run: Run, known: set[str]) -> dict[str, Any]:
    unknown = set(run.params) - known
    assert not unknown, f"the reference was given {unknown}, which is not translated"
    return run.params


def _llada_v(run: Run) -> dict[str, Any]:
    params = _params(run, _LLADA_V_KEYS)
    values = {name: params[name] for name in ("gen_length", "block_length", "steps")}
    if "generation_suffix" in params:
        values["suffix"] = params["generation_suffix"]
    if run.uses_threshold:
        values["threshold"] = params["threshold"]
    if "prefix_refresh_interval" in params:
        values |= {"cache": "prefix", "refresh_interval": params["prefix_refresh_interval"]}
    return values


def _lavida(run: Run) -> dict[str, Any]:
    params = _params(run, _LAVIDA_KEYS)
    length, block = params["max_new_tokens"], params["block_length"]
    per_block = block
    if "step_per_block" in params:
        per_block = min(params["step_per_block"], block)
    elif "steps" in params:
        # Only RedVTP's fork listens to it.
        per_block = params["steps"] * block // length
    per_block = int(per_block * params.get("step_ratio", 1))
    return {
        "gen_length": length,
        "block_length": block,
        "steps": per_block * (length // block),
        "remasking": _REMASKINGS[params.get("remasking", "low_confidence")],
        **_schedule(params, "even"),
    }


def _dream(run: Run) -> dict[str, Any]:
    params = _params(run, _DREAM_KEYS)
    length = params["max_new_tokens"]
    return {
        "gen_length": length,
        "block_length": length,
        "steps": int(params["steps"] * params.get("step_ratio", 1)),
        "remasking": _REMASKINGS[params["alg"]],
        **_schedule(params, "dream"),
    }


def _schedule(params: dict[str, Any], usual: str) -> dict[str, Any]:
    values = {"schedule": params.get("schedule") or usual, "cache": "prefix_lm" if params["prefix_lm"] else "none"}
    return values | {f"schedule_{name}": value for name, value in (params.get("schedule_kwargs") or {}).items()}
