"""Engines that answer one request with a `Trace`: the embedded one here, others by entry point.

    engine = engine_named("local")
    trace = engine(EngineOptions("path/to/checkpoint"), request)

A package offers an engine under the entry point group `redvtp.engines`; the plugin's is `vllm_redvtp.offline`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from redvtp.errors import BadInput, refusing
from redvtp.values import did_you_mean

if TYPE_CHECKING:
    from redvtp.request import Request
    from redvtp.trace import Trace

ENGINES = "redvtp.engines"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is started.

    model: checkpoint folder.
    dtype: of the weights; `auto` is the checkpoint's.
    max_model_len: longest prompt and canvas together; None is what the checkpoint allows.
    block_size: tokens in a block of the KV cache; None is the engine's default.
    attention: the attention backend by its name; `auto` is the engine's choice.
    device: cpu, cuda or cuda:N; None is the engine's choice.
    kv_cache_memory_bytes: memory for the KV cache; None is the engine's default.
    progress: show a bar on stderr.
    """

    model: str
    dtype: str = "auto"
    max_model_len: int | None = None
    block_size: int | None = None
    attention: str = "auto"
    device: str | None = None
    kv_cache_memory_bytes: int | None = None
    progress: bool = False


class Engine(Protocol):
    """Answers one request. Raises BadInput for a request or a checkpoint that it cannot serve."""

    def __call__(self, options: EngineOptions, request: Request) -> Trace: ...


def check_engine(name: str) -> None:
    """Raises BadInput for a name that no installed package offers. Loads no engine."""
    names = ["local", *sorted(entry_points(group=ENGINES).names)]
    if name not in names:
        raise BadInput(f"--engine must be one of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}")


def engine_named(name: str) -> Engine:
    """Raises BadInput as `check_engine` does."""
    check_engine(name)
    if name == "local":
        return local_engine
    engine: Engine = next(iter(entry_points(group=ENGINES, name=name))).load()
    return engine


def local_engine(options: EngineOptions, request: Request) -> Trace:
    """`LocalEngine`, in this process, without vLLM."""
    from redvtp.local import LocalEngine
    from redvtp.trace import trace_of_generation

    with refusing():
        engine = LocalEngine(
            options.model,
            dtype=options.dtype,
            max_model_len=options.max_model_len,
            max_num_seqs=1,
            block_size=options.block_size,
            attention=options.attention,
            device=options.device,
            kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        )
        engine.tokenize(request)
    (generation,) = engine.generate([request], progress=options.progress)
    return trace_of_generation(options.model, generation)
