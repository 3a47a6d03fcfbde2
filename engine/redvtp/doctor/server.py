"""What vLLM would make of a checkpoint here. The plugin answers; this package never imports vLLM.

The plugin offers the function under the entry point group `redvtp.doctor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Protocol

from redvtp.doctor.findings import Finding
from redvtp.errors import BadInput

GROUP = "redvtp.doctor"
TOPIC = "server"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """As of `vllm serve`; None is vLLM's default. model: None asks about no checkpoint."""

    model: str | None
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What `vllm serve` would start with. All but the device is None where no checkpoint was asked about.

    device: as vLLM calls it.
    attention: what it runs on, and why not on something faster.
    dtype: of weights and KV cache.
    block_size: tokens in a KV block.
    memory_share: of the device's memory that vLLM takes at most; None on a CPU.
    """

    device: str
    attention: str | None = None
    dtype: str | None = None
    max_model_len: int | None = None
    block_size: int | None = None
    memory_share: float | None = None


class AskServer(Protocol):
    """Raises BadInput for options that a server would refuse."""

    def __call__(self, options: ServerOptions) -> ServerFacts: ...


def server_facts(options: ServerOptions) -> tuple[list[Finding], ServerFacts | None]:
    """The facts in lines and as they are; None where vLLM cannot be asked or refuses."""
    found = next(iter(entry_points(group=GROUP)), None)
    if found is None:
        return [Finding(TOPIC, f"no package offers {GROUP}", "install this version: ./scripts/setup.sh")], None
    try:
        ask: AskServer = found.load()
        facts = ask(options)
    except BadInput as error:
        return [Finding(TOPIC, f"vllm serve would refuse: {error}", "change what the sentence names")], None
    except Exception as error:
        # A broken installation shows in any error, and to find that out is what this is for.
        text = f"vLLM cannot be used: {type(error).__name__}: {error}"
        return [Finding(TOPIC, text, "run ./scripts/setup.sh again")], None
    findings = [Finding(TOPIC, f"vLLM runs on {facts.device}")]
    if facts.attention is None:
        findings.append(Finding(TOPIC, "attention is chosen for each checkpoint; redvtp doctor MODEL says which"))
    else:
        findings.append(Finding(TOPIC, f"attention: {facts.attention}"))
    return findings, facts
