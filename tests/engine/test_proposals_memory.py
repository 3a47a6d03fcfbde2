"""Proposals of a whole canvas need no more memory at a time than those of a few rows, and are the same ones."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from redvtp.canvas import proposals as proposals_module
from redvtp.canvas.proposals import Choice, propose, propose_in_parts
from redvtp.canvas.remasking import RULES
from redvtp.noise import Draws
from redvtp.params import REMASKINGS

# Made in a process of its own, so that nothing else's memory counts. 1,024 rows of 32,768 ids: 128 MB in float32,
# 256 MB in float64.
SCRIPT = """
import resource, sys, torch
from redvtp.canvas.proposals import Choice, propose_in_parts
from redvtp.noise import Draws
temperature = float(sys.argv[1])
torch.set_num_threads(1)
rows, vocab = 1024, 32768
logits = torch.randn(1, vocab).expand(rows, vocab)
choice = Choice(temperature, "low_confidence", Draws(0, 0))
propose_in_parts(lambda part: logits[part], vocab, vocab, [choice], [torch.arange(8)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
propose_in_parts(lambda part: logits[part], vocab, vocab, [choice], [torch.arange(rows)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_long_canvas_takes_little_memory(temperature: float) -> None:
    """All noise of the canvas at once took five tensors of 256 MB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(temperature)], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) * 1024 < 200 << 20


def _places(*counts: int) -> list[torch.Tensor]:
    return [torch.arange(count) for count in counts]


def _choices() -> list[Choice]:
    asked = [("low_confidence", 1.1), ("random", 0.7), ("margin", 0.0)]
    return [Choice(heat, rule, Draws(seed, 1)) for seed, (rule, heat) in enumerate(asked)]


@pytest.mark.parametrize("parts", [(1, 1), (700, 90), (3000, 3000)])
def test_parts_change_nothing(parts: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(53, 31, generator=torch.Generator().manual_seed(2))
    expected = propose(logits, 29, _choices(), _places(20, 30, 3))
    monkeypatch.setattr(proposals_module, "LOGIT_BYTES", parts[0] * 4)
    monkeypatch.setattr(proposals_module, "FLOAT64_BYTES", parts[1] * 8)
    found = propose(logits, 29, _choices(), _places(20, 30, 3))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.confidence, expected.confidence)


def test_logits_are_made_for_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's output is the largest tensor of a step, so what is profiled at the start holds for every step."""
    monkeypatch.setattr(proposals_module, "LOGIT_BYTES", 10 * 4 * 31)
    logits, seen = torch.randn(53, 31), []

    def part(rows: slice) -> torch.Tensor:
        seen.append(rows.stop - rows.start)
        return logits[rows]

    propose_in_parts(part, 31, 31, _choices()[:1], _places(53))
    assert max(seen) == 10
    assert sum(seen) == 53


def test_an_unknown_rule_is_refused() -> None:
    """It was silently taken for low_confidence."""
    with pytest.raises(ValueError, match=f"remasking must be one of {', '.join(REMASKINGS)}"):
        propose(torch.randn(2, 5), 5, [Choice(0.0, "attention", Draws(0, 0))], _places(2))


def test_every_rule_has_a_name_that_requests_may_use() -> None:
    assert tuple(RULES) == REMASKINGS
